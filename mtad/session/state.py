"""What is remembered while a client is connected: the `Session`, and inside it the `Transaction`.

What it is for: two objects with two lifetimes. A session lasts as long as the connection, but after STARTTLS a new one
begins, and nothing that was said before counts; a transaction lasts from MAIL to the end of its content. Giving up a
transaction is ``session.transaction = None`` and nothing else, so there is no list of fields to reset and none to forget.

The states follow from what is remembered and are never stored:

    START      --EHLO/HELO-->  READY  --MAIL-->  SENDER  --RCPT (first one taken)-->  RECIPIENT  --DATA, content--> READY
       ^ nobody has greeted       ^ RSET, EHLO, HELO and the end of the content        |  BDAT
                                    lead back here                    BDAT LAST <-- CHUNKS

Standards: RFC 5321 sections 3.1 to 3.3, 4.1.4 (order of commands); RFC 3030 section 2 (BDAT); RFC 3207 section 4.2 (after
the handshake); RFC 3848 and 6531 section 4.3 (names of protocols).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

import msgspec

from mtad.address import Address
from mtad.config import Limits
from mtad.envelope import Recipient
from mtad.policy import Policy
from mtad.reply import Reply
from mtad.smtp.parameters import Body, Chunk, Ret
from mtad.smtp.sasl import Entry, Steps


class State(Enum):
    """Where a session stands; see the picture above."""

    START = "no EHLO or HELO yet"
    READY = "no transaction"
    SENDER = "MAIL was taken, no recipient was"
    RECIPIENT = "at least one recipient was taken"
    CHUNKS = "the content has begun to come, with BDAT"

    __hash__ = object.__hash__  # each is one object; Enum's own is slow, and this is asked for each command


class Client(msgspec.Struct, frozen=True):
    """Who is connected: the address in text form, and the name that the DNS gives for it."""

    address: str
    name: str = "unknown"

    def __str__(self) -> str:
        return f"{self.name}[{self.address}]"

    @property
    def loopback(self) -> bool:
        """Whether it is this machine itself; an IPv4 address mapped into IPv6 counts as what it is."""
        try:
            address = ipaddress.ip_address(self.address)
        except ValueError:
            return False
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback


class TlsFacts(msgspec.Struct, frozen=True):
    """What the handshake with a client came to.

    ``protocol`` is TLSv1.2 or TLSv1.3, ``cipher`` its name as the standards have it, ``bits`` the length of its key, and
    ``bindings`` the channel bindings by their names, see `mtad.smtp.sasl`.
    """

    protocol: str
    cipher: str
    bits: int
    bindings: Mapping[str, bytes] = {}


class Logins(Protocol):
    """Who may log in: `mtad.passwords`."""

    def find(self, login: str, /) -> Entry:
        """The entry for a login; one that is made up for a login that nobody has, the same each time."""

    def any(self) -> bool:
        """Whether there is anybody at all."""


class Guard(Protocol):
    """Who has tried wrong passwords too often: `mtad.throttle`. ``address`` is a client's, ``login`` what it claimed."""

    def refused(self, address: str, login: str = "", /) -> bool:
        """Whether no further try is allowed for now."""

    def failed(self, address: str, login: str, /) -> float:
        """Count a wrong password; the seconds for which the reply to it is to be held back."""


class Site(msgspec.Struct, frozen=True):
    """What the listening service is; the same for all its sessions."""

    hostname: str
    limits: Limits
    policy: Policy
    tls: Literal["none", "starttls", "implicit"] = "none"
    """Whether the listener can do the handshake, and when it does."""
    logins: Logins | None = None
    """None: there is no AUTH here."""
    guard: Guard | None = None
    auth_without_tls: bool = False
    """AUTH without TLS, for clients on this machine only."""
    bare_line_ends: Literal["refuse", "normalize"] = "refuse"
    """What becomes of a CR or LF on its own in content from a client that is known; of others it is always refused."""
    strict_order: bool = True
    """Clients that are not known are cut off when they send ahead of a reply that they must wait for."""
    stressed: Callable[[], bool] = lambda: False
    """Whether the server is nearly full, and has less patience."""


@dataclass(slots=True)
class Transaction:
    """One message in the making, from MAIL on."""

    sender: Address
    recipients: dict[str, Recipient] = field(default_factory=dict)
    """In the order of RCPT: the form in which recipients are compared, and the recipient as given."""
    body: Body = ""
    smtputf8: bool = False
    ret: Ret | Literal[""] = ""
    envid: str = ""
    attempted: bool = False
    """Whether there was any RCPT, taken or not."""
    put_off: int = 0
    """Recipients refused with 4yz, such as those above the limit."""
    chunks: bool = False
    """Whether there was a BDAT that began its content."""
    failure: Reply | None = None
    """Why its content cannot be taken, when a chunk of it has shown that; the chunks that follow get the same reply."""


@dataclass(slots=True)
class Exchange:
    """AUTH, from the command to its last reply."""

    mechanism: str
    steps: Steps


@dataclass(slots=True)
class Session:
    """One connection, or what follows STARTTLS on it."""

    site: Site
    client: Client
    trusted: bool
    """Whether the client is in a network that may relay."""
    tls: TlsFacts | None = None
    """None: clear text."""
    helo: str = ""
    """How the client called itself; "" before EHLO or HELO."""
    esmtp: bool = False
    """Whether it said EHLO."""
    login: str = ""
    """Who the client has shown itself to be; "" when it has not."""
    mechanism: str = ""
    """How it showed that, or tried to last; in upper case."""
    claimed: str = ""
    """Who it last tried to be in vain, for the log."""
    exchange: Exchange | None = None
    auth_failures: int = 0
    transaction: Transaction | None = None
    chunk: Chunk | None = None
    """What follows the command that was just dispatched, whatever the reply to it is."""
    last_verb: str = "CONNECT"
    """The last command, for the log."""
    bad: int = 0
    """Refused commands, see `mtad.session.commands`."""
    bad_in_a_row: int = 0
    junk: int = 0
    """Commands that lead nowhere since the last message."""
    refused_recipients: int = 0
    """Recipients refused with 5yz."""
    pause: float = 0.0
    """Seconds to hold back what is said next."""
    closing: bool = False
    """Whether the last reply ends the connection."""
    commands: dict[str, tuple[int, int]] = field(default_factory=dict)
    """How many of each command did what they are for, and how many there were; for the log."""

    def tally(self, verb: str, good: bool) -> None:
        """Count a command once it is known what became of it: DATA at the end of its content."""
        done, tried = self.commands.get(verb, (0, 0))
        self.commands[verb] = (done + good, tried + 1)

    @property
    def state(self) -> State:
        """Where the session stands."""
        if not self.helo:
            return State.START
        if self.transaction is None:
            return State.READY
        if self.transaction.chunks:
            return State.CHUNKS
        return State.RECIPIENT if self.transaction.recipients else State.SENDER

    @property
    def known(self) -> bool:
        """Whether this is one of our own people: it may relay, and is borne with where strangers are not."""
        return self.trusted or bool(self.login)

    @property
    def private(self) -> bool:
        """Whether a secret may be said here: inside TLS, or on this machine when the site allows that."""
        return self.tls is not None or (self.site.auth_without_tls and self.client.loopback)

    @property
    def protocol(self) -> str:
        """The protocol as Received: and logs name it: SMTP, ESMTP, ESMTPSA, UTF8SMTPS .. (RFC 3848, RFC 6531)."""
        if not self.esmtp:
            return "SMTP"
        utf8 = self.transaction is not None and self.transaction.smtputf8
        return ("UTF8SMTP" if utf8 else "ESMTP") + ("S" if self.tls else "") + ("A" if self.login else "")


def open_session(site: Site, client: Client) -> Session:
    """A session of a client that has just connected."""
    return Session(site, client, site.policy.trusts(client.address))


def secured_session(session: Session, tls: TlsFacts) -> Session:
    """The session that begins when the handshake is done (RFC 3207 section 4.2).

    It knows nothing of what was said in clear, which anybody may have said. Misbehaviour alone is not forgotten, and the
    log counts the commands of both.
    """
    return Session(
        session.site,
        session.client,
        session.trusted,
        tls=tls,
        last_verb=session.last_verb,
        bad=session.bad,
        bad_in_a_row=session.bad_in_a_row,
        junk=session.junk,
        commands=session.commands,
    )
