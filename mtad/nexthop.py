"""Who is asked to take mail for a domain, and how he is spoken to: the settings of ``[delivery]`` and its policies.

`Rules.of` gives the `Rule` for a destination: the most specific table ``[[delivery.policy]]`` that names its domain, on top
of ``[delivery]``. A table names domains as ``example.com``, which is that domain alone, or as ``.example.com``, which is
every domain below it; the longest one wins, and of equals the first. What a table does not set is inherited.

``next_hop`` is ``host``, ``host:port``, ``[host]`` or ``[host]:port``, in brackets without MX lookup; in a table also ``@``
for the domain's own MX, in spite of a smarthost for all the others.

Port 465 speaks TLS from the first octet (RFC 8314 section 3.3), whatever ``tls`` says; ``tls = "implicit"`` says so for any
other port.

`Rules.lane` is for the scheduler: mail that goes to the same next hop by the same rule may wait in one lane. A domain that
a table names has one of its own.

Errors: `BadNextHop` when a setting cannot be read; the caller's fault, found at start.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, Literal

import msgspec

from mtad.config import Delivery, DeliveryPolicy
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


class Rule(msgspec.Struct, frozen=True):
    """How mail for a destination goes out."""

    hop: NextHop | None
    """Who takes it; None: the MX of the destination."""
    port: int
    """Where the MX listen."""
    tls: TlsLevel = "opportunistic"
    implicit: bool = False
    """TLS from the first octet."""
    credentials: str = ""
    """The file with what to show to whom; "": nothing to anybody."""

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
        self._smarthost = settings.next_hop
        self._general = _rule(settings, DeliveryPolicy(domain=()))
        self._exact: dict[str, Rule] = {}
        for policy in settings.policy:
            rule = _rule(settings, policy)
            for domain in policy.domain:
                self._exact.setdefault(domain.lower(), rule)

    def of(self, destination: str) -> Rule:
        """The rule for a destination: a domain in lower case, or an address literal."""
        return self._find(destination) or self._general

    def lane(self, domain: str) -> str:
        """What deliveries to this domain are counted by: the domain, or the smarthost of all that have no rule."""
        return domain if not self._smarthost or self._find(domain) else self._smarthost

    def _find(self, domain: str) -> Rule | None:
        if not self._exact:
            return None
        rule = self._exact.get(domain)
        while rule is None and "." in domain:
            domain = domain.partition(".")[2]
            rule = self._exact.get("." + domain)
        return rule


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
