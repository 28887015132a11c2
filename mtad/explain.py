"""What would happen to a message, without sending one: who takes it in, where it goes, and how.

What it is for: `mtad explain`. Every decision is asked of the code that makes it for real mail: a session is opened for
each listener and gets EHLO, MAIL and RCPT by the dispatcher of the server; the router names the hosts; a probe opens a
session as a delivery does, and says QUIT where that would say MAIL. Nothing is written or counted.

Invariants: nothing here decides. Without ``probe`` nothing is asked but the DNS.

Errors: `BadAddress` for an address that cannot be one. What the DNS or a server says is part of the answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import msgspec

from mtad.address import Address, domain_of
from mtad.config import Config, Listener
from mtad.delivery.opening import Opener
from mtad.delivery.process import OwnAddresses
from mtad.nexthop import Rule, Rules
from mtad.outcome import Deferred, Failed
from mtad.policy import Policy, Verdict
from mtad.resolver import Resolver
from mtad.routing import Host, Router
from mtad.session.commands import dispatch
from mtad.session.site import site_of
from mtad.session.state import Client, Session, open_session
from mtad.smtp.grammar import Command, parse_mail, parse_rcpt
from mtad.users import Users

#: Who asks when nobody is named: somebody out in the world, with an address that is kept for examples, or this machine.
STRANGER: Final = "192.0.2.1"
SELF: Final = "127.0.0.1"


class Taken(msgspec.Struct, frozen=True):
    """What one listening service says to the message."""

    listener: str
    service: str
    client: str
    accepted: bool
    reply: str
    """The last one: to RCPT, or to the command that was refused."""
    command: str
    """That command."""
    why: str
    """The rule, in words."""


class Probe(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a server really offers; ``fault`` when there is no session with it."""

    address: str
    tls: str = ""
    """Protocol and cipher; "" for clear text."""
    certificate: str = ""
    """``good``, or why it would not do where TLS is required; "" when TLS was not tried."""
    extensions: tuple[str, ...] = ()
    fault: str = ""


class Exchanger(msgspec.Struct, frozen=True, omit_defaults=True):
    """A host to try, its addresses in their order."""

    host: str
    port: int
    addresses: tuple[str, ...]
    probes: tuple[Probe, ...] = ()


class Route(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where mail for a domain that is not local goes."""

    destination: str
    next_hop: str
    """The smarthost, or "" for the MX of the destination."""
    lane: str
    """What its deliveries are counted by."""
    tls: str
    """As ``delivery.tls``."""
    credentials: str
    """The file with what is shown to next hops; "" for none."""
    concurrency: int
    """Deliveries at a time; with ``group`` those of all its domains together."""
    recipients: int
    """In one transaction."""
    messages: int = 0
    """Over one connection; 0: as many as we like."""
    rate: str = ""
    """As the configuration has it, ``100/1m``; "" for none."""
    group: str = ""
    """The ``mx`` of the policy with whose other domains it shares concurrency and rate; "" when it has its own."""
    hosts: tuple[Exchanger, ...] = ()
    fault: str = ""
    """Why there are no hosts."""
    permanent: bool = False
    """Whether that sends the message back, instead of letting it wait."""


class Explanation(msgspec.Struct, frozen=True, omit_defaults=True):
    """All of it."""

    sender: str
    recipient: str
    taken: tuple[Taken, ...]
    user: str = ""
    """Whose mailbox it is; "" when it is none of ours."""
    mailbox: str = ""
    route: Route | None = None
    """None for a recipient that is local."""


class Explainer:
    """Answers questions about one configuration."""

    def __init__(self, config: Config, users: Users) -> None:
        """``users`` are those of the configuration."""
        self._config = config
        self._users = users
        self._rules = Rules(config.delivery)
        own = OwnAddresses([address for listener in config.listener for address in listener.address])
        resolver = Resolver(config.dns.servers, config.dns.timeout)
        self._router = Router(resolver, config.hostname, self._rules, is_own=own)
        self._opener = Opener(config.hostname, config.delivery)

    def explain(self, recipient: str, sender: str = "", client: str = "", *, probe: bool = False) -> Explanation:
        """What would happen.

        Args:
            recipient: an address.
            sender: an address, or "" for the null sender.
            client: the address from which the message would come; "" takes one that fits each service.
            probe: connect to the hosts and see what they offer.

        Raises:
            BadAddress: ``recipient`` or ``sender`` is no address.
        """
        mail, rcpt = f"FROM:<{sender}>", f"TO:<{recipient}>"
        parse_mail(mail)
        address = parse_rcpt(rcpt).address
        if not (mail.isascii() and rcpt.isascii()):
            mail += " SMTPUTF8"
        taken = tuple(self._taken(listener, client, mail, rcpt, address) for listener in self._config.listener)
        local = self._config.local
        user = self._users.lookup(address)
        if user is not None:
            mailbox = os.path.join(local.mail_root, user)
            return Explanation(sender, recipient, taken, user, mailbox)
        domain = domain_of(str(address))
        if not domain or domain in {name.lower() for name in local.domains}:
            return Explanation(sender, recipient, taken)
        return Explanation(sender, recipient, taken, route=self._route(domain, probe))

    def _taken(self, listener: Listener, client: str, mail: str, rcpt: str, address: Address) -> Taken:
        site = site_of(self._config, listener, self._users, None, None)
        who = client or (SELF if listener.service == "relay" else STRANGER)
        session = open_session(site, Client(who))
        commands = (Command("EHLO", "explain.invalid"), Command("MAIL", mail), Command("RCPT", rcpt))
        for command in commands:
            reply = dispatch(session, command)
            if not reply.positive:
                break
        said = f"{command.verb} {command.argument}"
        why = _why(site.policy, session, address, self._users)
        return Taken(listener.name, listener.service, who, reply.positive, reply.text, said, why)

    def _route(self, domain: str, probe: bool) -> Route:
        rule = self._rules.of(domain)
        hop = rule.hop
        name = "" if hop is None else f"{f'[{hop.name}]' if hop.direct else hop.name}:{hop.port}"
        hosts: list[Exchanger] = []
        fault: Deferred | Failed | None = None
        for found in self._router.hops(domain):
            if isinstance(found, Host):
                probes = tuple(self._probes(found, rule)) if probe else ()
                hosts.append(Exchanger(found.name, found.port, found.addresses, probes))
            else:
                fault = found
        # Who takes the mail is the first host that was tried, as a delivery tells the scheduler.
        first = hosts[0].host if hosts else ""
        group = self._rules.group(domain, first) if self._rules.grouped else None
        limits = group or rule
        rate = limits.rate
        return Route(
            destination=domain,
            next_hop=name,
            lane=self._rules.lane(domain),
            tls="implicit" if rule.implicit else rule.tls,
            credentials=rule.credentials,
            concurrency=limits.concurrency or self._rules.concurrency,
            recipients=self._rules.recipients(domain, first),
            messages=self._rules.of(domain, first).messages,
            rate="" if rate is None else rate.text,
            group="" if group is None else group.name,
            hosts=tuple(hosts),
            fault="" if fault is None else f"{fault.status} {fault.text}",
            permanent=isinstance(fault, Failed),
        )

    def _probes(self, host: Host, rule: Rule) -> Iterator[Probe]:
        for address in host.addresses:
            session = self._opener.open("", host, address, rule, whole=False)
            if isinstance(session, Deferred):
                yield Probe(address, fault=session.text)
                continue
            offered = session.capabilities.extensions
            extensions = tuple(f"{name} {value}".rstrip() for name, value in offered.items())
            tls = session.tls
            session.close()
            yield Probe(address, tls, self._certificate(host, address, rule) if tls else "", extensions)

    def _certificate(self, host: Host, address: str, rule: Rule) -> str:
        """Whether a delivery for which TLS is required would trust this server."""
        strict = msgspec.structs.replace(rule, tls="required", credentials="")
        session = self._opener.open("", host, address, strict, whole=False)
        if isinstance(session, Deferred):
            return session.text
        session.close()
        return "good"


def _why(policy: Policy, session: Session, recipient: Address, users: Users) -> str:
    """The rule by which a recipient is taken or refused, in words."""
    if session.transaction is None:
        return "this service is for clients who have logged in" if policy.service == "submission" else "MAIL is refused"
    verdict = policy.judge(recipient, session.known)
    if verdict is Verdict.LOCAL:
        return f"it is the mailbox of user {users.lookup(recipient)}"
    if verdict is Verdict.RELAY:
        return "the client is trusted to send to anywhere"
    words: str = verdict.value
    return words
