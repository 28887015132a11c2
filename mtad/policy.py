"""Who may send what to whom: the decisions at MAIL and RCPT.

What it is for: one `Policy` belongs to one listening service and says for each recipient whether we store it, pass it on,
or refuse it, and in the last case why; and which sender addresses a login may use. It gives verdicts; the words of the
replies are `mtad.session.commands`'.

Invariants: closed by default. A recipient is taken only when its domain is one of ours and the user exists (or it is
postmaster), or when the client may relay: because it is in a trusted network, or because it has shown who it is. Domains
are compared as written: an address literal, a trailing dot, a percent sign or a bang make no domain ours and route nothing;
they are part of a local part that nobody has. A login owns the addresses of the user of the same name, and what `senders`
names; nothing else.

Errors: `ValueError` for a network or a line of senders that is none (the caller checked the configuration before). Whatever
``Users`` raises goes through.

Standards: RFC 5321 sections 3.6.2 (relaying), 4.5.1 (postmaster), 5.1 (local domains); RFC 3463 section 3.8 (policy); RFC
6409 section 6.1 (submission: enforced addresses).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from typing import Final, Literal, Protocol

from mtad.address import Address
from mtad.config_rules import parse_sender
from mtad.errors import SyntaxFault
from mtad.smtp.grammar import parse_mailbox

Service = Literal["mx", "relay", "submission"]


class Users(Protocol):
    """The users who have mail here."""

    def lookup(self, address: Address) -> str | None:
        """The name of the user who has this address, or None. Without regard to case."""


#: Client addresses of which a process remembers whether they are trusted: asked for each connection, and dear to compute.
_REMEMBERED: Final = 4096


class Verdict(Enum):
    """What becomes of a recipient."""

    LOCAL = "stored here"
    RELAY = "passed on"
    UNKNOWN_USER = "the domain is ours, the user is not"
    NOT_OURS = "the domain is not ours and the client may not relay"
    NOT_TRUSTED = "this service is not for this client"
    NOT_AUTHENTICATED = "this service is for clients who have said who they are"


class Policy:
    """The rules of one listening service; has no state and is shared by all its sessions."""

    def __init__(
        self,
        users: Users,
        domains: Iterable[str],
        service: Service = "mx",
        trusted: Iterable[str] = (),
        senders: Iterable[str] = (),
    ) -> None:
        """Make the rules.

        Args:
            users: who has mail here.
            domains: the local domains.
            service: what the listener is for.
            trusted: networks such as ``192.0.2.0/24``; only a relay heeds them.
            senders: lines for `parse_sender`.

        Raises:
            ValueError: a network or a line is not well-formed.
        """
        self.service = service
        self._users = users
        self._ordered = tuple(domain.lower() for domain in domains)
        self._domains = frozenset(self._ordered)
        self._trusted = tuple(ipaddress.ip_network(network) for network in trusted)
        self._senders = frozenset(map(parse_sender, senders))
        #: Whether a client at this address may relay; an IPv4 address mapped into IPv6 counts as what it is.
        self.trusts = lru_cache(maxsize=_REMEMBERED)(self._trusts)

    @property
    def first_domain(self) -> str:
        """The local domain that a bare postmaster belongs to; "" when no domain is local."""
        return self._ordered[0] if self._ordered else ""

    def _trusts(self, address: str) -> bool:
        if self.service != "relay":
            return False
        try:
            client = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(client, ipaddress.IPv6Address):
            client = client.ipv4_mapped or client
        return any(client in network for network in self._trusted)

    def owns(self, login: str, sender: Address) -> bool:
        """Whether a login may send as this address; as nobody (``<>``) may everybody who may send at all."""
        if not sender.domain:
            return True
        name = login.casefold()
        given = {sender.key, f"@{sender.domain}", "*"}
        if any((name, address) in self._senders for address in given):
            return True
        user = self._users.lookup(sender)
        return user is not None and user.casefold() == self._user_of(login)

    def _user_of(self, login: str) -> str:
        """The user behind a login: who is called so, or has that address when the login is one."""
        try:
            user = self._users.lookup(parse_mailbox(login)) if "@" in login else None
        except SyntaxFault:
            user = None
        return (user or login).casefold()

    def judge(self, recipient: Address, known: bool) -> Verdict:
        """Decide about one recipient of a client.

        Args:
            recipient: the forward-path.
            known: whether the client is in a trusted network (`trusts`), or has shown who it is.
        """
        if self.service == "relay" and not known:
            return Verdict.NOT_TRUSTED
        if self.service == "submission" and not known:
            return Verdict.NOT_AUTHENTICATED
        if not recipient.domain:
            return Verdict.LOCAL
        if recipient.domain not in self._domains:
            return Verdict.RELAY if known else Verdict.NOT_OURS
        if recipient.local.lower() == "postmaster" or self._users.lookup(recipient) is not None:
            return Verdict.LOCAL
        return Verdict.UNKNOWN_USER
