"""The DNS, as far as mail needs it: MX, addresses, and the verified name of a client (RFC 1035, RFC 5321 section 5.1).

The only DNS of mtad; the work is dnspython's. What the DNS says is returned as values, for "no such domain" and "no MX" are
answers that routing decides about. That the DNS says nothing usable (SERVFAIL, REFUSED, silence, nonsense) is a
`ResolverFailure`: always temporary, so it must never be taken for one of the others.

Answers are kept by their TTL, within bounds: `CACHE_SIZE` answers, none for more than `LONGEST_TTL`, negative ones for at
most `LONGEST_NEGATIVE`. One `Resolver` serves all threads of a process.

Host names are returned as A-labels in lower case without the final dot. A domain that cannot be a DNS name at all (a
label of 64 octets, an empty label) is `NoSuchDomain`: it does not exist, and never will.

Standards: RFC 1035, RFC 2181 section 10.3 (an MX may not point to a CNAME; we follow it, as everybody does), RFC 2308
(negative answers), RFC 5890 and RFC 5891 (IDNA), RFC 7505 (null MX), RFC 6891 (EDNS, with the payload of DNS flag day
2020).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Final

import dns.exception
import dns.flags
import dns.name
import dns.nameserver
import dns.rdatatype
import dns.resolver
import dns.reversename
import msgspec

from mtad.errors import MtadError, ResolverFailure

#: Answers that are kept.
CACHE_SIZE: Final = 10_000

#: Seconds that an answer is kept at most, whatever its TTL says.
LONGEST_TTL: Final = 3600.0

#: Seconds that "does not exist" is kept at most (RFC 2308 section 5 allows more): a domain just set up should work soon.
LONGEST_NEGATIVE: Final = 300.0

#: Octets of a UDP answer: what passes without fragments (DNS flag day 2020).
EDNS_PAYLOAD: Final = 1232

#: Seconds for the name of a client, which waits for its greeting meanwhile.
PTR_TIMEOUT: Final = 2.0

_PORT: Final = 53

# "[" address "]" [":" port]  /  address-without-colon ":" port; an address alone is all the rest
_SERVER: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)(?=:))(?::([0-9]{1,5}))?")


class Mx(msgspec.Struct, frozen=True):
    """The mail exchangers of a domain: (preference, host name), in no particular order; never empty."""

    hosts: tuple[tuple[int, str], ...]


class NullMx(msgspec.Struct, frozen=True):
    """``MX 0 .`` and nothing else: the domain takes no mail (RFC 7505)."""


class NoMx(msgspec.Struct, frozen=True):
    """The domain exists and has no MX: its own addresses are to be tried (RFC 5321 section 5.1)."""


class NoSuchDomain(msgspec.Struct, frozen=True):
    """The domain does not exist (NXDOMAIN)."""


class Addresses(msgspec.Struct, frozen=True):
    """The addresses of a host, each family in the order of the answer. Both may be empty: the host has none."""

    v6: tuple[str, ...] = ()
    v4: tuple[str, ...] = ()


#: The file with the name servers of the system.
SYSTEM: Final = "/etc/resolv.conf"


class BadServer(MtadError):
    """A name server is not given as ``address``, ``address:port`` or ``[v6]:port``: the caller's fault."""


class _Cache(dns.resolver.LRUCache):
    """Keeps no answer longer than our bounds: a negative one without SOA would stay for 68 years.

    Nor does one stay for as long as the wall's clock, by which the library measures, was set back.
    """

    def put(self, key: dns.resolver.CacheKey, value: dns.resolver.Answer) -> None:
        value.expiration = min(value.expiration, self._latest(value))
        super().put(key, value)

    def get(self, key: dns.resolver.CacheKey) -> dns.resolver.Answer | None:
        value = super().get(key)
        return None if value is None or value.expiration > self._latest(value) else value

    @staticmethod
    def _latest(value: dns.resolver.Answer) -> float:
        return time.time() + (LONGEST_TTL if value.rrset is not None else LONGEST_NEGATIVE)


class Resolver:
    """Asks the name servers. Thread-safe."""

    def __init__(self, servers: Sequence[str] = (), timeout: float = 10.0, system: str = SYSTEM) -> None:
        """Prepare; asks nothing yet.

        Args:
            servers: ``address``, ``address:port`` or ``[v6]:port`` each, asked in this order; empty: those of the system.
            timeout: seconds for one question, all servers and repetitions included.
            system: the file with those of the system. One that cannot be used, as without a network, is tried again with
                each question, which fails as long as it is so.

        Raises:
            BadServer: an entry of ``servers`` is none.
        """
        self._timeout = timeout
        self._system = system
        self._dns: dns.resolver.Resolver | None = None
        if servers:
            made = dns.resolver.Resolver(configure=False)
            made.nameservers = [_server(text) for text in servers]
            self._dns = self._prepared(made)

    def _prepared(self, made: dns.resolver.Resolver) -> dns.resolver.Resolver:
        # A third of the whole for each try, so that a dead server leaves time for the next one.
        made.timeout = min(3.0, self._timeout / 3)
        made.use_edns(0, 0, EDNS_PAYLOAD)
        made.cache = _Cache(CACHE_SIZE)
        return made

    def _configured(self) -> dns.resolver.Resolver:
        """What asks the servers.

        Raises:
            DNSException, ValueError: the system's configuration cannot be read, or has no servers, or what is none.
        """
        made = self._dns
        if made is None:
            made = self._dns = self._prepared(dns.resolver.Resolver(self._system))
        return made

    def mx(self, domain: str) -> Mx | NullMx | NoMx | NoSuchDomain:
        """The mail exchangers of ``domain``.

        An MX ``.`` beside others says nothing and is left out.

        Raises:
            ResolverFailure: no usable answer.
        """
        answer = self._ask(domain, dns.rdatatype.MX, self._timeout)
        if isinstance(answer, NoSuchDomain):
            return answer
        if not answer:
            return NoMx()
        hosts = tuple(
            (record.preference, _text(record.exchange))  # type: ignore[attr-defined]  # dnspython types by rdtype
            for record in answer
        )
        named = tuple((preference, host) for preference, host in hosts if host)
        return Mx(named) if named else NullMx()

    def addresses(self, host: str) -> Addresses | NoSuchDomain:
        """The IPv6 and IPv4 addresses of ``host``, CNAMEs followed.

        When one family cannot be looked up and the other has addresses, those are the answer.

        Raises:
            ResolverFailure: no usable answer, and no address.
        """
        found: dict[dns.rdatatype.RdataType, tuple[str, ...]] = {}
        failure: ResolverFailure | None = None
        missing = False
        for family in (dns.rdatatype.A, dns.rdatatype.AAAA):
            try:
                answer = self._ask(host, family, self._timeout)
            except ResolverFailure as error:
                failure = error
                continue
            if isinstance(answer, NoSuchDomain):
                missing = True
                continue
            found[family] = tuple(record.to_text() for record in answer)
        if any(found.values()):
            return Addresses(found.get(dns.rdatatype.AAAA, ()), found.get(dns.rdatatype.A, ()))
        if failure is not None:
            raise failure
        # Some servers deny a name that has no AAAA; one that exists for the other family does exist.
        return NoSuchDomain() if missing and not found else Addresses()

    def ptr(self, address: str, timeout: float = PTR_TIMEOUT) -> str | None:
        """The name of a client for logs: of its PTR names the first that leads back to ``address``; None: no such name.

        A failure of the DNS is None too: a name for the log is not worth an error. ``timeout`` is in seconds, for the at
        most three questions together; a client waits for its greeting meanwhile.
        """
        end = time.monotonic() + timeout
        family = dns.rdatatype.AAAA if ":" in address else dns.rdatatype.A
        try:
            reverse = dns.reversename.from_address(address).to_text()
            pointers = self._ask(reverse, dns.rdatatype.PTR, timeout)
            if isinstance(pointers, NoSuchDomain):
                return None
            for record in pointers[:2]:
                name = _text(record.target)  # type: ignore[attr-defined]  # dnspython types by rdtype
                found = self._ask(name, family, max(0.0, end - time.monotonic()))
                if not isinstance(found, NoSuchDomain) and any(one.to_text() == address for one in found):
                    return name
        except (ResolverFailure, dns.exception.DNSException):
            pass  # as documented: no name
        return None

    def _ask(self, name: str, kind: dns.rdatatype.RdataType, timeout: float) -> Sequence[dns.rdata.Rdata] | NoSuchDomain:
        """The records of one kind; none at all when the name exists without them."""
        absolute = _name(name)
        if absolute is None:
            return NoSuchDomain()
        try:
            asks = self._configured()
        except (dns.exception.DNSException, ValueError) as error:
            raise ResolverFailure(_failure(name, kind, f"the system's name servers: {error}")) from None
        try:
            answer = asks.resolve(absolute, kind, raise_on_no_answer=False, lifetime=timeout, search=False)
        except dns.resolver.NXDOMAIN:
            return NoSuchDomain()
        except dns.resolver.LifetimeTimeout:
            raise ResolverFailure(_failure(name, kind, "no answer in time")) from None
        except (dns.exception.DNSException, OSError) as error:
            text = "server failure" if isinstance(error, dns.resolver.NoNameservers) else type(error).__name__
            raise ResolverFailure(_failure(name, kind, text)) from None
        return () if answer.rrset is None else tuple(answer.rrset)


def _failure(name: str, kind: dns.rdatatype.RdataType, why: str) -> str:
    """In the words of Postfix, which log readers know."""
    return (
        f"Host or domain name not found. Name service error for name={name} type={kind.name}: "
        f"Host not found, try again ({why})"
    )


def _server(text: str) -> dns.nameserver.Nameserver:
    """Parse ``address``, ``address:port`` or ``[v6]:port``."""
    match = _SERVER.fullmatch(text)
    host, port = (match[1] or match[2], match[3] or "") if match else (text, "")
    number = int(port) if port else _PORT
    if not dns.inet.is_address(host) or not 0 < number < 65536:
        raise BadServer(f"name server {text!r}: neither ADDRESS nor ADDRESS:PORT, IPv6 with a port in brackets")
    return dns.nameserver.Do53Nameserver(host, number)


def _name(text: str) -> dns.name.Name | None:
    """A domain as an absolute DNS name in A-labels; None when there cannot be such a name."""
    if not text:
        return None
    try:
        name = dns.name.from_text(text, idna_codec=dns.name.IDNA_2008_Practical)
    except (dns.exception.DNSException, UnicodeError):
        return None
    return None if name == dns.name.root else name


def _text(name: dns.name.Name) -> str:
    """A DNS name as text in lower case, "" for the root; octets that are no host name's stay escaped (``\\032``)."""
    return name.to_text(omit_final_dot=True).lower().rstrip(".")
