"""The resolver against a real DNS server: what is an answer, what is a failure, and what is kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtad.errors import ResolverFailure
from mtad.resolver import (
    LONGEST_NEGATIVE,
    LONGEST_TTL,
    Addresses,
    BadServer,
    Mx,
    NoMx,
    NoSuchDomain,
    NullMx,
    Resolver,
)
from tests.peers.dns import (
    EMPTY,
    FORGED,
    GARBAGE,
    NXDOMAIN,
    POINTER,
    QUESTION,
    REFUSED,
    SERVFAIL,
    SILENT,
    TRICKLE,
    TRUNCATED,
    DnsServer,
    Fault,
    Zones,
    reverse,
)

TIMEOUT = 0.6

ZONES: Zones = {
    "example.org": {"MX": ["20 MX2.example.org.", "10 mx1.example.org."], "A": "192.0.2.9"},
    "mx1.example.org": {"A": ["192.0.2.1", "192.0.2.2"], "AAAA": "2001:db8::1"},
    "only4.example.org": {"A": "192.0.2.3"},
    "only6.example.org": {"AAAA": "2001:db8::3"},
    "nothing.example.org": {"TXT": '"x"'},
    "null.example.org": {"MX": "0 ."},
    "mixed.example.org": {"MX": ["0 .", "10 mx1.example.org."]},
    "alias.example.org": {"CNAME": "example.org."},
    "chain.example.org": {"CNAME": "alias.example.org."},
    "loop.example.org": {"CNAME": "loop.example.org."},
    "dangling.example.org": {"CNAME": "gone.example.org."},
    "half4.example.org": {"A": "192.0.2.4", "AAAA": SERVFAIL},
    "half6.example.org": {"AAAA": "2001:db8::4", "A": SILENT},
    "worse.example.org": {"AAAA": SERVFAIL},
    "partial.example.org": {"A": "192.0.2.6", "AAAA": NXDOMAIN},
    "xn--bcher-kva.example.org": {"MX": "10 mx1.example.org."},
    "escaped.example.org": {"MX": "10 a\\032b.example.org."},
}


@pytest.fixture(name="dns")
def _dns() -> Iterator[DnsServer]:
    with DnsServer(ZONES) as server:
        yield server


@pytest.fixture
def resolver(dns: DnsServer) -> Resolver:
    return Resolver([dns.address], TIMEOUT)


def test_mx_is_a_list_of_preferences_and_hosts(resolver: Resolver) -> None:
    answer = resolver.mx("Example.ORG")
    assert isinstance(answer, Mx)
    assert sorted(answer.hosts) == [(10, "mx1.example.org"), (20, "mx2.example.org")]


def test_d1_null_mx(resolver: Resolver) -> None:
    assert resolver.mx("null.example.org") == NullMx()


def test_d2_a_dot_beside_other_mx_is_ignored(resolver: Resolver) -> None:
    assert resolver.mx("mixed.example.org") == Mx(((10, "mx1.example.org"),))


def test_d3_no_mx_and_no_such_domain_are_told_apart(resolver: Resolver) -> None:
    assert resolver.mx("only4.example.org") == NoMx()
    assert resolver.mx("gone.example.org") == NoSuchDomain()


@pytest.mark.parametrize("fault", [SERVFAIL, REFUSED, SILENT, GARBAGE, FORGED, TRUNCATED])
def test_d3_a_dns_without_a_usable_answer_is_a_failure(dns: DnsServer, resolver: Resolver, fault: Fault) -> None:
    dns.set("broken.example.org", fault)
    with pytest.raises(ResolverFailure, match=r"name=broken\.example\.org type=MX"):
        resolver.mx("broken.example.org")
    with pytest.raises(ResolverFailure, match=r"name=broken\.example\.org type=A"):
        resolver.addresses("broken.example.org")


def test_a_failure_holds_the_time_out(dns: DnsServer) -> None:
    dns.set("silent.example.org", SILENT)
    start = time.monotonic()
    with pytest.raises(ResolverFailure, match="no answer in time"):
        Resolver([dns.address], 0.3).mx("silent.example.org")
    assert 0.2 < time.monotonic() - start < 2


def test_a_failure_is_not_remembered(dns: DnsServer, resolver: Resolver) -> None:
    dns.set("broken.example.org", SERVFAIL)
    with pytest.raises(ResolverFailure):
        resolver.mx("broken.example.org")
    dns.set("broken.example.org", {"MX": "10 mx1.example.org."})
    assert resolver.mx("broken.example.org") == Mx(((10, "mx1.example.org"),))


def test_addresses_of_both_families(resolver: Resolver) -> None:
    answer = resolver.addresses("mx1.example.org")
    assert isinstance(answer, Addresses)
    assert (answer.v6, sorted(answer.v4)) == (("2001:db8::1",), ["192.0.2.1", "192.0.2.2"])
    assert resolver.addresses("only4.example.org") == Addresses(v4=("192.0.2.3",))
    assert resolver.addresses("only6.example.org") == Addresses(v6=("2001:db8::3",))


def test_a_host_without_addresses_and_one_that_does_not_exist(resolver: Resolver) -> None:
    assert resolver.addresses("nothing.example.org") == Addresses()
    assert resolver.addresses("gone.example.org") == NoSuchDomain()


def test_one_family_that_fails_does_not_hide_the_other(resolver: Resolver) -> None:
    assert resolver.addresses("half4.example.org") == Addresses(v4=("192.0.2.4",))
    assert resolver.addresses("half6.example.org") == Addresses(v6=("2001:db8::4",))
    assert resolver.addresses("partial.example.org") == Addresses(v4=("192.0.2.6",))


def test_one_family_that_fails_and_no_address_of_the_other_is_a_failure(resolver: Resolver) -> None:
    with pytest.raises(ResolverFailure):
        resolver.addresses("worse.example.org")


def test_cname_is_followed(resolver: Resolver) -> None:
    assert isinstance(resolver.mx("alias.example.org"), Mx)
    assert resolver.addresses("chain.example.org") == Addresses(v4=("192.0.2.9",))
    assert resolver.mx("dangling.example.org") == NoSuchDomain()


def test_d5_a_cname_loop_is_a_failure(resolver: Resolver) -> None:
    with pytest.raises(ResolverFailure):
        resolver.mx("loop.example.org")


def test_d5_a_long_chain_of_cnames_ends(dns: DnsServer, resolver: Resolver) -> None:
    for number in range(20):
        dns.set(f"c{number}.example.org", {"CNAME": f"c{number + 1}.example.org."})
    dns.set("c20.example.org", {"A": "192.0.2.9"})
    with pytest.raises(ResolverFailure):
        resolver.addresses("c0.example.org")
    assert resolver.addresses("c14.example.org") == Addresses(v4=("192.0.2.9",))


def test_d5_a_dname_is_what_its_cname_says(dns: DnsServer, resolver: Resolver) -> None:
    dns.set("old.example.org", {"DNAME": "new.example.org."})
    dns.set("mail.old.example.org", {"CNAME": "mail.new.example.org."})
    dns.set("mail.new.example.org", {"A": "192.0.2.8"})
    assert resolver.addresses("mail.old.example.org") == Addresses(v4=("192.0.2.8",))


def test_d5_an_mx_that_names_its_own_domain(dns: DnsServer, resolver: Resolver) -> None:
    dns.set("same.example.org", {"MX": "10 same.example.org.", "A": "192.0.2.7"})
    assert resolver.mx("same.example.org") == Mx(((10, "same.example.org"),))


@pytest.mark.parametrize("fault", [FORGED, QUESTION, GARBAGE, POINTER, EMPTY, TRICKLE, TRUNCATED])
@pytest.mark.parametrize("kind", ["MX", "A"])
def test_d7_what_is_no_answer_is_a_failure_in_time(dns: DnsServer, resolver: Resolver, fault: Fault, kind: str) -> None:
    dns.set("bad.example.org", fault)
    start = time.monotonic()
    ask = resolver.mx if kind == "MX" else resolver.addresses
    with pytest.raises(ResolverFailure):
        ask("bad.example.org")
    assert time.monotonic() - start < 2 * TIMEOUT + 3.0


def test_d7_an_answer_over_tcp_that_is_as_large_as_can_be(dns: DnsServer) -> None:
    resolver = Resolver([dns.address], 10.0)
    dns.set("huge.example.org", {"A": [f"10.{one}.{two}.1" for one in range(16) for two in range(250)]})
    found = resolver.addresses("huge.example.org")
    assert isinstance(found, Addresses)
    assert len(found.v4) == 4000


def test_idn_is_asked_for_as_a_labels(dns: DnsServer) -> None:
    resolver = Resolver([dns.address], 10.0)
    assert resolver.mx("b\u00fccher.example.org") == Mx(((10, "mx1.example.org"),))
    assert dns.count("xn--bcher-kva.example.org", "MX") == 1


@pytest.mark.parametrize("name", ["", ".", "a..b", ".a", "x" * 64 + ".example.org", "x." * 128 + "org", "\u2488.org"])
def test_what_cannot_be_a_name_does_not_exist(dns: DnsServer, resolver: Resolver, name: str) -> None:
    assert resolver.mx(name) == NoSuchDomain()
    assert resolver.addresses(name) == NoSuchDomain()
    assert dns.count() == 0


def test_odd_octets_in_a_name_stay_escaped(resolver: Resolver) -> None:
    assert resolver.mx("escaped.example.org") == Mx(((10, "a\\032b.example.org"),))


def test_answers_are_kept_and_so_are_denials(dns: DnsServer) -> None:
    resolver = Resolver([dns.address], 10.0)
    for _ in range(3):
        resolver.mx("example.org")
        resolver.mx("only4.example.org")
        resolver.mx("gone.example.org")
        resolver.addresses("mx1.example.org")
    assert dns.count() == 5
    assert dns.count("mx1.example.org", "AAAA") == 1


def test_an_answer_is_asked_for_again_after_its_ttl() -> None:
    with DnsServer(ZONES, ttl=0) as dns:
        resolver = Resolver([dns.address], 10.0)
        resolver.mx("example.org")
        resolver.mx("example.org")
        assert dns.count("example.org", "MX") == 2


def test_a_clock_that_is_set_back_keeps_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with DnsServer(ZONES) as dns:
        resolver = Resolver([dns.address], 10.0)
        now = time.time()
        for _ in range(2):
            resolver.mx("example.org")
            resolver.mx("gone.example.org")
        assert dns.count() == 2
        monkeypatch.setattr(time, "time", lambda: now - 365 * 86400)
        resolver.mx("example.org")
        resolver.mx("gone.example.org")
        assert dns.count() == 4


def test_no_answer_is_kept_longer_than_its_bound() -> None:
    with DnsServer(ZONES, ttl=2**31 - 1) as dns:
        resolver = Resolver([dns.address], 10.0)
        resolver.mx("example.org")
        resolver.mx("gone.example.org")
        resolver.mx("only4.example.org")
        left = sorted(answer.value.expiration - time.time() for answer in resolver._configured().cache.data.values())
        assert left[-1] <= LONGEST_TTL
        assert left[-2] <= LONGEST_NEGATIVE


def test_d6_an_answer_too_large_for_udp_is_fetched_over_tcp(dns: DnsServer) -> None:
    resolver = Resolver([dns.address], 10.0)
    dns.set("many.example.org", {"MX": [f"10 mx{number}.example.org." for number in range(1000)]})
    answer = resolver.mx("many.example.org")
    assert isinstance(answer, Mx)
    assert len(answer.hosts) == 1000
    assert [question.transport for question in dns.questions("many.example.org")] == ["udp", "tcp"]


def test_the_next_server_is_asked_when_one_fails(dns: DnsServer) -> None:
    with DnsServer({"example.org": SERVFAIL, "silent.example.org": SILENT}) as broken:
        resolver = Resolver([broken.address, dns.address], 3.0)
        assert isinstance(resolver.mx("example.org"), Mx)
        assert broken.count("example.org") == 1


def test_a_server_that_is_not_there_is_a_failure() -> None:
    with DnsServer() as gone:
        address = gone.address
    with pytest.raises(ResolverFailure):
        Resolver([address], TIMEOUT).mx("example.org")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.53", "Do53:192.0.2.53@53"),
        ("192.0.2.53:5353", "Do53:192.0.2.53@5353"),
        ("2001:db8::53", "Do53:2001:db8::53@53"),
        ("[2001:db8::53]", "Do53:2001:db8::53@53"),
        ("[2001:db8::53]:5353", "Do53:2001:db8::53@5353"),
    ],
)
def test_servers_are_given_with_or_without_port(text: str, expected: str) -> None:
    assert [str(server) for server in Resolver([text])._configured().nameservers] == [expected]


@pytest.mark.parametrize(
    "text", ["", "dns.example.org", "192.0.2.53:", "1.2.3.4:0", "1.2.3.4:65536", "[::1", "[::1]53", "::1:x"]
)
def test_a_server_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(BadServer):
        Resolver([text])


def test_the_name_of_a_client_leads_back_to_its_address(dns: DnsServer, resolver: Resolver) -> None:
    dns.set(reverse("192.0.2.1"), {"PTR": ["other.example.org.", "mx1.example.org."]})
    dns.set(reverse("2001:db8::1"), {"PTR": "mx1.example.org."})
    dns.set(reverse("192.0.2.77"), {"PTR": "mx1.example.org."})
    dns.set(reverse("192.0.2.78"), SILENT)
    assert resolver.ptr("192.0.2.1") == "mx1.example.org"
    assert resolver.ptr("2001:db8::1") == "mx1.example.org"
    assert resolver.ptr("192.0.2.77") is None  # a name that anybody can give himself
    assert resolver.ptr("192.0.2.78", timeout=0.1) is None
    assert resolver.ptr("192.0.2.79") is None
    start = time.monotonic()
    dns.set(reverse("192.0.2.80"), {"PTR": ["silent1.example.org.", "silent2.example.org."]})
    dns.set("silent1.example.org", SILENT)
    dns.set("silent2.example.org", SILENT)
    assert resolver.ptr("192.0.2.80", timeout=0.2) is None
    assert time.monotonic() - start < 1
    assert resolver.ptr("not an address") is None


def test_one_resolver_serves_many_threads(dns: DnsServer, resolver: Resolver) -> None:
    for number in range(50):
        dns.set(f"d{number}.example.org", {"MX": f"10 mx{number}.example.org."})
    wrong: list[object] = []

    def ask() -> None:
        for number in range(50):
            answer = resolver.mx(f"d{number}.example.org")
            if answer != Mx(((10, f"mx{number}.example.org"),)):
                wrong.append(answer)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


@pytest.mark.parametrize(
    "content", [None, b"", b"search example.org\n", b"nameserver localhost\n", b"nameserver 127.0.0.1\n# \xfc\n"]
)
def test_a_system_without_name_servers_fails_each_question_until_it_has_some(
    dns: DnsServer, tmp_path: Path, content: bytes | None
) -> None:
    """As long as a network is down; nothing but the question may fail."""
    system = tmp_path / "resolv.conf"
    if content is not None:
        system.write_bytes(content)
    resolver = Resolver(timeout=10.0, system=str(system))
    for ask in (resolver.mx, resolver.addresses):
        with pytest.raises(ResolverFailure, match=r"Host not found, try again \(the system's name servers: "):
            ask("example.org")
    host, port = dns.address.rsplit(":", 1)
    system.write_text(f"nameserver {host}\n")
    resolver._configured().port = int(port)
    assert isinstance(resolver.mx("example.org"), Mx)
