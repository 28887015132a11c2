"""Where mail for a domain goes: the hosts to try, in order (RFC 5321 section 5.1).

`Router.hops` is an iterator. It yields hosts with their addresses, best first, and looks a host up only when its turn
comes: a message that the first one takes costs no question about the others. When there was no host at all it yields one
`Outcome` instead, Deferred or Failed, with the reason; it raises for nothing that the DNS can say.

The rules, each from the standard or, where that is silent, from Postfix:

- MX by preference, equal ones in random order, and so the addresses of a host; the domain's own addresses only when it has
  no MX at all.
- ``MX 0 .`` takes no mail: 5.1.10 (RFC 7505). NXDOMAIN: 5.1.2. A DNS that does not answer: deferred, 4.4.3, and never taken
  for "no MX".
- Ourselves in the list, by name or by an address that we listen on: cut off, with all that are not better (RFC 5321
  section 5.1, "MUST be discarded"). If we are the best one, the mail loops: 5.4.6. To know that by address, all hosts of
  one preference are looked up before the first of them is tried; those that are worse are not.
- MX hosts without addresses are passed over; if none has any: 5.4.4, or 4.4.3 if the DNS failed for one of them.
- At most `ADDRESS_LIMIT` addresses for a message, the families taking turns within a host, IPv6 first. If the first hosts
  have one family only, the last place is kept for the other (RFC 8305 in spirit; Postfix: smtp_balance_inet_protocols).
- Addresses that cannot be a mail exchanger's are not tried: unspecified, multicast, link-local, broadcast. Nor are hosts
  whose names are none (an IP address as text, octets that are not letters, digits, hyphens). Attack D-4.
- Loopback on port 25 is not tried either, unless a setting names it: whatever listens there trusts who comes from this
  machine, and a stranger's zone must not make us the one who comes. Another port is a setting of ours in itself.

The rules of `mtad.nexthop` say where to look and on which port. A smarthost takes the place of the destination; its loops
are the administrator's to avoid, but the check for our own addresses holds for it as well.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, zip_longest
from typing import Final, Protocol

import msgspec

from mtad.errors import ResolverFailure
from mtad.nexthop import HOST_NAME, NextHop, Rule, Rules, literal, unmapped
from mtad.outcome import Deferred, Failed
from mtad.resolver import Addresses, Mx, NoMx, NoSuchDomain, NullMx

#: Addresses tried for one message (Postfix: smtp_mx_address_limit).
ADDRESS_LIMIT: Final = 5

#: MX hosts that are looked up for one message: no zone can make us ask for ever (attack D-6).
HOST_LIMIT: Final = 20

#: The port on which a mail server trusts its own machine.
SMTP_PORT: Final = 25


class Host(msgspec.Struct, frozen=True):
    """A host to try: its name as the MX has it (or the address literal), its addresses in order, and the port."""

    name: str
    addresses: tuple[str, ...]
    port: int


class Dns(Protocol):
    """What routing needs of `mtad.resolver.Resolver`."""

    def mx(self, domain: str) -> Mx | NullMx | NoMx | NoSuchDomain:
        """The mail exchangers of a domain."""

    def addresses(self, host: str) -> Addresses | NoSuchDomain:
        """The addresses of a host."""


class Router:
    """Finds the hosts for a destination. Thread-safe as far as ``random.Random`` and the resolver are."""

    def __init__(
        self,
        dns: Dns,
        hostname: str,
        rules: Rules,
        *,
        is_own: Callable[[str, int], bool] | None = None,
        rng: random.Random | None = None,
        address_limit: int = ADDRESS_LIMIT,
    ) -> None:
        """Prepare.

        Args:
            dns: whom to ask.
            hostname: our own name, compared without case.
            rules: who is asked for which destination.
            is_own: whether mail sent to this address and port would come back to ourselves.
            rng: for the order of equal preferences.
            address_limit: addresses for one message, 2 or more.
        """
        self._dns = dns
        self._hostname = hostname.lower().rstrip(".")
        self._rules = rules
        self._is_own = is_own
        self._random = rng or random.Random()
        self._limit = address_limit

    def rule(self, destination: str, host: str = "") -> Rule:
        """How mail for this destination goes out; with ``host`` (who takes it) also what holds for that one."""
        return self._rules.of(destination, host)

    def hops(self, destination: str) -> Iterator[Host | Deferred | Failed]:
        """The hosts for ``destination``, a domain in lower case or an address literal; or the reason why there is none."""
        rule = self._rules.of(destination)
        hop = rule.hop or NextHop(destination, rule.port, direct=destination.startswith("["))
        trusted = rule.hop is not None
        try:
            groups = self._groups(hop)
        except ResolverFailure as failure:
            yield Deferred("4.4.3", str(failure), destination=True)
            return
        if isinstance(groups, Failed):
            yield groups
            return
        yield from self._hosts(hop, groups, trusted)

    def _groups(self, hop: NextHop) -> list[list[str]] | Failed:
        """Host names, those of equal preference together."""
        if hop.direct:
            return [[hop.name.strip("[]")]]
        answer = self._dns.mx(hop.name)
        if isinstance(answer, NoSuchDomain):
            return Failed("5.1.2", _not_found(hop.name, "MX", "Host not found"))
        if isinstance(answer, NullMx):
            return Failed("5.1.10", f"Domain {hop.name} does not accept mail (nullMX)")
        if isinstance(answer, NoMx):
            return [[hop.name]]
        own = [preference for preference, name in answer.hosts if name == self._hostname]
        better = sorted(entry for entry in set(answer.hosts) if not own or entry[0] < min(own))
        if not better:
            return _loops(hop.name)
        groups = [[name for _, name in group] for _, group in groupby(better, key=lambda entry: entry[0])]
        for group in groups:
            self._random.shuffle(group)
        return groups

    def _hosts(self, hop: NextHop, groups: Sequence[Sequence[str]], trusted: bool) -> Iterator[Host | Deferred | Failed]:
        budget = _Budget(self._limit)
        problem: Deferred | Failed | None = None
        looked_up = 0
        for group in groups:
            found: list[Host] = []
            for name in group[: HOST_LIMIT - looked_up]:
                looked_up += 1
                host = self._look_up(name, hop, trusted)
                if isinstance(host, Host):
                    found.append(host)
                elif not isinstance(problem, Deferred):
                    problem = host
            if any(self._own(host) for host in found):
                if not budget.spent:
                    yield problem if isinstance(problem, Deferred) else _loops(hop.name)
                    return
                break
            for host in found:
                share = budget.share(host)
                if share.addresses:
                    yield share
            if budget.exhausted or looked_up >= HOST_LIMIT:
                break
        if budget.kept is not None and not budget.exhausted:
            yield budget.kept
        elif not budget.spent and problem is not None:
            yield problem

    def _look_up(self, name: str, hop: NextHop, trusted: bool) -> Host | Deferred | Failed:
        address = literal(name)
        loopback = trusted or hop.port != SMTP_PORT
        if address is not None:
            # as an MX target an address is no host; only a destination may be one (RFC 5321 section 4.1.3)
            usable = hop.direct and _usable(address, loopback)
            return Host(address, (address,), hop.port) if usable else Failed("5.4.4", f"{name} is no mail exchanger")
        if name.lower().startswith("ipv6:") or (name.isascii() and HOST_NAME.fullmatch(name.lower()) is None):
            return Failed("5.1.2" if hop.direct else "5.4.4", f"{name} is neither a host name nor an address")
        try:
            answer = self._dns.addresses(name)
        except ResolverFailure as failure:
            return Deferred("4.4.3", str(failure), destination=True)
        if isinstance(answer, NoSuchDomain):
            return Failed("5.4.4", _not_found(name, "AAAA", "Host not found"))
        turns = zip_longest(self._shuffled(answer.v6, loopback), self._shuffled(answer.v4, loopback))
        addresses = tuple(address for turn in turns for address in turn if address is not None)
        if not addresses:
            return Failed("5.4.4", _not_found(name, "AAAA", "Host found but no data record of requested type"))
        return Host(name, addresses, hop.port)

    def _shuffled(self, addresses: Sequence[str], loopback: bool) -> Sequence[str]:
        """The usable ones in random order: answers are kept, so that nobody else spreads the load (RFC 5321, 5.1)."""
        usable = [address for address in addresses if _usable(address, loopback)]
        if len(usable) > 1:
            self._random.shuffle(usable)
        return usable

    def _own(self, host: Host) -> bool:
        if self._is_own is None:
            return False
        return any(self._is_own(unmapped(address), host.port) for address in host.addresses)


class _Budget:
    """How many addresses are left, with a place for the family that has not come yet."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._families: set[bool] = set()
        self.spent = False
        self.kept: Host | None = None
        """What takes the last place when the other family does not come."""

    @property
    def exhausted(self) -> bool:
        return self._left <= 0

    def share(self, host: Host) -> Host:
        """The part of a host's addresses that may be tried."""
        before = frozenset(self._families)
        self._families.update(":" in address for address in host.addresses)
        both = len(self._families) == 2
        addresses: Sequence[str] = host.addresses
        if both and len(before) == 1 and self._left == 1:  # the place that was kept: for the family that was missing
            addresses = sorted(addresses, key=lambda address: (":" in address) in before)
        allowed = self._left if both else self._left - 1
        taken, rest = addresses[:allowed], addresses[allowed:]
        if rest and not both and self.kept is None:
            self.kept = Host(host.name, (rest[0],), host.port)
        self._left -= len(taken)
        self.spent = self.spent or bool(taken)
        return Host(host.name, tuple(taken), host.port)


def _usable(address: str, loopback: bool) -> bool:
    """Whether a mail exchanger can have this address."""
    parsed = ipaddress.ip_address(unmapped(address))
    if parsed.is_unspecified or parsed.is_multicast or parsed.is_link_local or (parsed.is_loopback and not loopback):
        return False
    return not (isinstance(parsed, ipaddress.IPv4Address) and (parsed.packed[0] == 0 or parsed.packed[0] >= 240))


def _not_found(name: str, kind: str, why: str) -> str:
    """In the words of Postfix, which log readers know."""
    return f"Host or domain name not found. Name service error for name={name} type={kind}: {why}"


def _loops(domain: str) -> Failed:
    return Failed("5.4.6", f"mail for {domain} loops back to myself")
