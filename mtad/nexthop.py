"""Who is asked to take mail for a domain, and how he is spoken to: the settings of ``[delivery]`` and its policies.

`Rules.of` gives the `Rule` for a destination: the most specific table ``[[delivery.policy]]`` that names its domain, on top
of ``[delivery]``. A table names domains as ``example.com``, which is that domain alone, or as ``.example.com``, which is
every domain below it; the longest one wins, and of equals the first. What a table does not set is inherited.

``next_hop`` is ``host``, ``host:port``, ``[host]`` or ``[host]:port``, in brackets without MX lookup; in a table also ``@``
for the domain's own MX, in spite of a smarthost for all the others.

A table with ``mx`` names hosts instead, in the same way. All domains that are served by one of them are a `Group` and share
its limits, as far as it is known which host serves them; a ``domain`` in such a table is one of them from the beginning.

`Rules.of` with the host that takes the mail, once that is known, has the limits of its group as well: of two that limit the
recipients of a transaction, or the messages of a connection, the smaller one holds.

Port 465 speaks TLS from the first octet (RFC 8314 section 3.3), whatever ``tls`` says; ``tls = "implicit"`` says so for any
other port.

`Rules.lane` is for the scheduler: mail that goes to the same next hop by the same rule may wait in one lane. A domain that
a table names has one of its own.

Errors: `BadNextHop` when a setting cannot be read; the caller's fault, found at start.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Final, Literal, TypeVar

import msgspec

from mtad.config import Delivery, DeliveryPolicy
from mtad.config_values import rate as parse_rate
from mtad.errors import MtadError

#: The port of submission over TLS.
IMPLICIT_PORT: Final = 465

#: ``next_hop`` of a policy: the MX of the destination itself.
OWN_MX: Final = "@"

# RFC 1123 section 2.1 and the underscore that some zones use. The last label of a name is never all digits, so that an
# IPv4 address is no name.
HOST_NAME: Final = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?\.)*(?![0-9]+$)[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?")

TlsLevel = Literal["none", "opportunistic", "required"]


class BadNextHop(MtadError):
    """A next hop is none of ``host``, ``host:port``, ``[host]``, ``[host]:port``."""


class NextHop(msgspec.Struct, frozen=True):
    """Where to look: a domain, or with ``direct`` a host or an address that is not to be looked up as MX."""

    name: str
    port: int
    direct: bool = False


class Rate(msgspec.Struct, frozen=True):
    """So many messages within so many seconds, at most. ``text`` is how the configuration has it."""

    count: int
    seconds: float
    text: str


class Group(msgspec.Struct, frozen=True):
    """What the domains that some hosts serve have in common. Numbers are as in `Rule`."""

    name: str
    """The hosts, as the configuration has them."""
    concurrency: int = 0
    rate: Rate | None = None
    recipients: int = 0
    messages: int = 0


class Rule(msgspec.Struct, frozen=True):
    """How mail for a destination goes out. The numbers at the end are limits; 0: no other than for all other mail."""

    hop: NextHop | None
    """Who takes it; None: the MX of the destination."""
    port: int
    """Where the MX listen."""
    tls: TlsLevel = "opportunistic"
    implicit: bool = False
    """TLS from the first octet."""
    credentials: str = ""
    """The file with what to show to whom; "": nothing to anybody."""
    concurrency: int = 0
    """Deliveries at a time."""
    rate: Rate | None = None
    """Messages in a time; None: as many as there are."""
    recipients: int = 0
    """Recipients in a transaction."""
    messages: int = 0
    """Messages over one connection."""

    @property
    def key(self) -> str:
        """Connections to a next hop may be shared by all mail for which this is the same."""
        where = f"[{self.hop.name}]:{self.hop.port}/{self.hop.direct}" if self.hop else f"mx:{self.port}"
        return f"{where}/{self.tls}/{self.implicit}/{self.credentials}"


class Rules:
    """The rules for all destinations. Never changes; shared by all threads."""

    def __init__(self, settings: Delivery) -> None:
        """Read the settings.

        Raises:
            BadNextHop: a ``next_hop`` cannot be read.
        """
        self.concurrency = settings.destination_concurrency
        """Deliveries at a time to one destination, where its rule does not say otherwise."""
        self._recipients = settings.destination_recipients
        self._smarthost = settings.next_hop
        self._general = _rule(settings, DeliveryPolicy(domain=()))
        self._exact: dict[str, Rule] = {}
        self._members: dict[str, Group] = {}
        self._hosts: dict[str, Group] = {}
        for policy in settings.policy:
            if policy.mx:
                group = _group(policy)
                for table, names in ((self._members, policy.domain), (self._hosts, policy.mx)):
                    for name in names:
                        table.setdefault(name.lower(), group)
            else:
                rule = _rule(settings, policy)
                for domain in policy.domain:
                    self._exact.setdefault(domain.lower(), rule)

    def of(self, destination: str, host: str = "") -> Rule:
        """The rule for a destination: a domain in lower case, or an address literal; ``host`` takes the mail, if known."""
        rule = _find(self._exact, destination) or self._general
        group = self.group(destination, host) if self._hosts else None
        if group is None or not (group.recipients or group.messages):
            return rule
        return msgspec.structs.replace(
            rule,
            recipients=_smaller(rule.recipients, group.recipients),
            messages=_smaller(rule.messages, group.messages),
        )

    def recipients(self, destination: str, host: str = "") -> int:
        """How many recipients one transaction may have."""
        return self.of(destination, host).recipients or self._recipients

    @property
    def grouped(self) -> bool:
        """There are groups, so that it matters which host takes the mail of a domain."""
        return bool(self._hosts)

    def group(self, destination: str, host: str) -> Group | None:
        """The group of a destination, in lower case, whose mail ``host`` takes; "" when that is not known."""
        return (_find(self._hosts, host.lower()) if host else None) or _find(self._members, destination)

    def lane(self, domain: str) -> str:
        """What deliveries to this domain are counted by: the domain, or the smarthost of all that have no rule."""
        own = not self._smarthost or _find(self._exact, domain) is not None
        return domain if own else self._smarthost


_Of = TypeVar("_Of")


def _find(table: Mapping[str, _Of], name: str) -> _Of | None:
    """The entry of a name, or of the longest of the domains that it is in."""
    if not table:
        return None
    found = table.get(name)
    while found is None and "." in name:
        name = name.partition(".")[2]
        found = table.get("." + name)
    return found


def _smaller(one: int, other: int) -> int:
    """The smaller of two limits of which each may be none, that is 0."""
    return min(one, other) if one and other else one or other


def _rate(text: str) -> Rate | None:
    return Rate(*parse_rate(text), text) if text else None


def _group(policy: DeliveryPolicy) -> Group:
    name = " ".join(policy.mx)
    return Group(name, policy.concurrency, _rate(policy.rate), policy.recipients, policy.messages)


def _rule(settings: Delivery, policy: DeliveryPolicy) -> Rule:
    level = settings.tls if policy.tls == "inherit" else policy.tls
    port = policy.port or settings.port
    text = policy.next_hop or settings.next_hop
    # a port that the policy sets is meant for the smarthost that it inherits, too
    hop = parse_next_hop(text, port) if text and text != OWN_MX else None
    if hop is not None and policy.port and not policy.next_hop:
        hop = msgspec.structs.replace(hop, port=policy.port)
    implicit = level == "implicit" or (hop.port if hop else port) == IMPLICIT_PORT
    return Rule(
        hop,
        port,
        "required" if level == "implicit" else level,
        implicit,
        policy.credentials or settings.credentials,
        policy.concurrency,
        _rate(policy.rate),
        policy.recipients,
        policy.messages,
    )


def parse_next_hop(text: str, port: int) -> NextHop:
    """Read ``host``, ``host:port``, ``[host]`` or ``[host]:port``; in brackets a name or an address, without MX lookup.

    ``port`` is for a text that names none.

    Raises:
        BadNextHop: none of these.
    """
    match = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^\[\]\s:]+))(?::([0-9]{1,5}))?", text)
    number = int(match[3]) if match and match[3] else port
    if match is None or not 0 < number < 65536:
        raise BadNextHop(f"next_hop {text!r} is none of host, host:port, [host], [host]:port")
    direct = match[1] is not None
    name = (match[1] if direct else match[2]).lower().rstrip(".")
    if not name or (not (literal(name) if direct else None) and HOST_NAME.fullmatch(name) is None):
        raise BadNextHop(f"next_hop {text!r} names no host" + ("" if direct else "; an address goes in brackets"))
    return NextHop(name, number, direct)


def literal(text: str) -> str | None:
    """The address of an address literal without its brackets: ``192.0.2.1``, ``IPv6:2001:db8::1``; None: it is none."""
    bare = text[5:] if text[:5].lower() == "ipv6:" else text
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return None
    return None if "%" in bare else unmapped(str(address))


def unmapped(address: str) -> str:
    """An IPv4 address that is written as an IPv6 one (``::ffff:127.0.0.1``) as what it is."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)
