"""Routing, against a real DNS server: which hosts, in which order, and what it means when there are none."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from mtad.config import Delivery, DeliveryPolicy
from mtad.errors import ResolverFailure
from mtad.nexthop import Rules
from mtad.outcome import Deferred, Failed
from mtad.resolver import Addresses, Mx, Resolver
from mtad.routing import ADDRESS_LIMIT, HOST_LIMIT, Host, Router
from tests.peers.dns import SERVFAIL, SILENT, DnsServer, Zones

ZONES: Zones = {
    "a.test": {"MX": ["20 mx2.test.", "10 mx1.test."]},
    "equal.test": {"MX": ["10 mx1.test.", "10 mx2.test.", "10 mx3.test."]},
    "plain.test": {"A": "192.0.2.80", "AAAA": "2001:db8::80"},
    "empty.test": {"TXT": '"x"'},
    "null.test": {"MX": "0 ."},
    "mixed.test": {"MX": ["0 .", "10 mx1.test."]},
    "broken.test": SERVFAIL,
    "silent.test": SILENT,
    "mx1.test": {"A": "192.0.2.1", "AAAA": "2001:db8::1"},
    "mx2.test": {"A": "192.0.2.2"},
    "mx3.test": {"A": "192.0.2.3"},
    "many.test": {
        "A": [f"192.0.2.{number}" for number in range(10, 30)],
        "AAAA": [f"2001:db8::{number}" for number in range(10, 30)],
    },
    "many4.test": {"A": [f"192.0.2.{number}" for number in range(10, 30)]},
    "six.test": {"AAAA": [f"2001:db8::{number}" for number in range(10, 30)]},
    "self.test": {"A": "192.0.2.99"},
    "selfbest.test": {"MX": ["10 me.test.", "20 mx1.test."]},
    "selfmiddle.test": {"MX": ["10 mx1.test.", "20 me.test.", "20 mx2.test.", "30 mx3.test."]},
    "ownaddress.test": {"MX": ["10 mx1.test.", "20 self.test.", "20 mx2.test.", "30 mx3.test."]},
    "ownbest.test": {"MX": ["10 self.test.", "20 mx1.test."]},
    "nohosts.test": {"MX": ["10 gone.test.", "20 empty.test."]},
    "somehosts.test": {"MX": ["10 gone.test.", "20 empty.test.", "30 mx1.test."]},
    "badhosts.test": {"MX": ["10 gone.test.", "20 broken.test."]},
    "somebad.test": {"MX": ["10 broken.test.", "20 mx2.test."]},
    "literalmx.test": {"MX": ["10 192.0.2.1.", "20 mx2.test."]},
    "oddmx.test": {"MX": ["10 a\\032b.test.", "20 *.test.", "30 mx2.test."]},
    "useless.test": {
        "A": ["0.0.0.0", "0.1.2.3", "169.254.169.254", "224.0.0.1", "255.255.255.255", "192.0.2.7"],
        "AAAA": ["::", "fe80::1", "ff02::1", "::ffff:0.0.0.0"],
    },
    "loopback.test": {"A": ["127.0.0.1", "127.8.9.1"], "AAAA": ["::1", "::ffff:127.0.0.1"]},
    "loopmx.test": {"MX": ["10 loopback.test."]},
    "onlyuseless.test": {"A": "0.0.0.0"},
    "crowd.test": {"MX": [f"{number // 10} c{number}.test." for number in range(1000)]},
    "c.test": {},
}

Hops = Callable[..., list[Host | Deferred | Failed]]


@pytest.fixture(name="dns", scope="module")
def _dns() -> Iterator[DnsServer]:
    with DnsServer({**ZONES, **{f"c{number}.test": {"A": "192.0.2.1"} for number in range(1000)}}) as server:
        yield server


def own(address: str, port: int) -> bool:
    return address == "192.0.2.99" and port == 25


@pytest.fixture
def hops(dns: DnsServer) -> Hops:
    """What a router with a cold cache says to a destination."""
    dns.forget()

    def ask(
        destination: str, next_hop: str = "", seed: int = 0, port: int = 25, policy: tuple[DeliveryPolicy, ...] = ()
    ) -> list[Host | Deferred | Failed]:
        rules = Rules(Delivery(next_hop=next_hop, port=port, policy=policy))
        router = Router(Resolver([dns.address], 0.5), "Me.test", rules, is_own=own, rng=random.Random(seed))
        return list(router.hops(destination))

    return ask


def names(found: list[Host | Deferred | Failed]) -> list[str]:
    return [hop.name for hop in found if isinstance(hop, Host)]


def failure(found: list[Host | Deferred | Failed]) -> Deferred | Failed:
    """The only thing that was found, which is not a host."""
    (only,) = found
    assert not isinstance(only, Host)
    return only


def test_the_lowest_preference_comes_first(hops: Hops) -> None:
    assert hops("a.test") == [
        Host("mx1.test", ("2001:db8::1", "192.0.2.1"), 25),
        Host("mx2.test", ("192.0.2.2",), 25),
    ]


def test_equal_preferences_come_in_random_order(hops: Hops) -> None:
    orders = {tuple(names(hops("equal.test", seed=seed))) for seed in range(30)}
    assert len(orders) == 6


def test_a_host_is_looked_up_only_when_its_turn_comes(dns: DnsServer) -> None:
    dns.forget()
    route = Router(Resolver([dns.address], 10.0), "me.test", Rules(Delivery())).hops("a.test")
    assert dns.count() == 0
    first = next(route)
    assert isinstance(first, Host)
    assert first.name == "mx1.test"
    assert dns.count("mx2.test") == 0
    next(route)
    assert dns.count("mx2.test", "A") == 1


def test_the_domain_itself_when_it_has_no_mx(hops: Hops) -> None:
    assert hops("plain.test") == [Host("plain.test", ("2001:db8::80", "192.0.2.80"), 25)]


def test_d1_null_mx_takes_no_mail(hops: Hops) -> None:
    only = failure(hops("null.test"))
    assert isinstance(only, Failed)
    assert only.status == "5.1.10"


def test_d2_a_dot_beside_other_mx_is_ignored(hops: Hops) -> None:
    assert names(hops("mixed.test")) == ["mx1.test"]


def test_d3_a_domain_that_does_not_exist_fails(hops: Hops) -> None:
    only = failure(hops("gone.test"))
    assert isinstance(only, Failed)
    assert only.status == "5.1.2"


@pytest.mark.parametrize("domain", ["broken.test", "silent.test"])
def test_d3_a_dns_that_does_not_answer_defers_and_never_falls_back(dns: DnsServer, hops: Hops, domain: str) -> None:
    only = failure(hops(domain))
    assert isinstance(only, Deferred)
    assert (only.status, only.destination) == ("4.4.3", True)
    assert dns.count(domain, "A") == 0


def test_no_mx_and_no_address_fails(hops: Hops) -> None:
    only = failure(hops("empty.test"))
    assert isinstance(only, Failed)
    assert only.status == "5.4.4"


def test_our_own_name_cuts_off_itself_and_what_is_not_better(hops: Hops) -> None:
    assert names(hops("selfmiddle.test")) == ["mx1.test"]


@pytest.mark.parametrize("seed", range(4))
def test_our_own_address_cuts_off_itself_and_what_is_not_better(hops: Hops, seed: int) -> None:
    assert names(hops("ownaddress.test", seed=seed)) == ["mx1.test"]


@pytest.mark.parametrize(
    "domain", ["selfbest.test", "ownbest.test", "self.test", "[192.0.2.99]", "[IPv6:::ffff:192.0.2.99]"]
)
def test_q2_d4_mail_that_would_come_back_to_us_fails(hops: Hops, domain: str) -> None:
    only = failure(hops(domain))
    assert isinstance(only, Failed)
    assert only.status == "5.4.6"
    assert "loops back to myself" in only.text


def test_our_own_address_on_another_port_is_somebody_else(dns: DnsServer) -> None:
    router = Router(Resolver([dns.address], 10.0), "me.test", Rules(Delivery(port=2525)), is_own=own)
    assert list(router.hops("self.test")) == [Host("self.test", ("192.0.2.99",), 2525)]


def test_mx_hosts_without_addresses_are_passed_over(hops: Hops) -> None:
    assert names(hops("somehosts.test")) == ["mx1.test"]
    assert names(hops("somebad.test")) == ["mx2.test"]


def test_no_mx_host_with_an_address_fails(hops: Hops) -> None:
    only = failure(hops("nohosts.test"))
    assert isinstance(only, Failed)
    assert only.status == "5.4.4"


def test_no_mx_host_with_an_address_and_one_unknown_defers(hops: Hops) -> None:
    only = failure(hops("badhosts.test"))
    assert isinstance(only, Deferred)
    assert only.status == "4.4.3"


def test_families_take_turns_and_the_number_is_limited(hops: Hops) -> None:
    (host,) = hops("many.test")
    assert isinstance(host, Host)
    assert len(host.addresses) == ADDRESS_LIMIT
    assert [":" in address for address in host.addresses] == [True, False, True, False, True]


def test_the_addresses_of_a_host_come_in_random_order(hops: Hops) -> None:
    assert len({str(hops("many4.test", seed=seed)) for seed in range(5)}) > 1


def fixed(*hosts: tuple[str, int, int]) -> Router:
    """A router for a domain with such hosts: name, IPv6 addresses, IPv4 addresses."""

    class Fixed:
        def mx(self, domain: str) -> Mx:
            assert domain == "x.test"
            return Mx(tuple((number, name) for number, (name, _, _) in enumerate(hosts)))

        def addresses(self, host: str) -> Addresses:
            v6, v4 = next((v6, v4) for name, v6, v4 in hosts if name == host)
            return Addresses(
                tuple(f"2001:db8::{number + 1}" for number in range(v6)),
                tuple(f"192.0.2.{number + 1}" for number in range(v4)),
            )

    return Router(Fixed(), "me.test", Rules(Delivery()))


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ([("a", 0, 9)], "44444"),
        ([("a", 9, 0)], "66666"),
        ([("a", 9, 0), ("b", 0, 9)], "66664"),
        ([("a", 0, 9), ("b", 9, 9)], "44446"),
        ([("a", 9, 0), ("b", 9, 9)], "66664"),
        ([("a", 4, 0), ("b", 4, 0), ("c", 0, 1)], "66664"),
        ([("a", 4, 0), ("b", 4, 0)], "66666"),
        ([("a", 1, 0), ("b", 0, 1), ("c", 9, 0)], "64666"),
        ([("a", 1, 1)], "64"),
    ],
)
def test_d8_both_families_are_among_the_addresses(hosts: list[tuple[str, int, int]], expected: str) -> None:
    found = [hop for hop in fixed(*hosts).hops("x.test") if isinstance(hop, Host)]
    assert "".join("6" if ":" in address else "4" for hop in found for address in hop.addresses) == expected


def test_d6_a_thousand_mx_are_not_all_looked_up(dns: DnsServer, hops: Hops) -> None:
    found = hops("crowd.test")
    assert sum(len(hop.addresses) for hop in found if isinstance(hop, Host)) == ADDRESS_LIMIT
    # MX over UDP and TCP, two families each; a slow machine may ask a question twice.
    assert len(set(dns.questions())) <= 2 + 2 * HOST_LIMIT


@pytest.mark.parametrize("domain", ["literalmx.test", "oddmx.test"])
def test_d4_an_mx_that_is_no_host_name_is_passed_over(dns: DnsServer, hops: Hops, domain: str) -> None:
    assert names(hops(domain)) == ["mx2.test"]
    assert {question.name for question in dns.questions()} == {domain, "mx2.test"}


def test_d4_addresses_that_no_exchanger_can_have_are_not_tried(hops: Hops) -> None:
    assert hops("useless.test") == [Host("useless.test", ("192.0.2.7",), 25)]
    only = failure(hops("onlyuseless.test"))
    assert isinstance(only, Failed)
    assert only.status == "5.4.4"


@pytest.mark.parametrize(
    ("literal", "address"),
    [("[192.0.2.1]", "192.0.2.1"), ("[IPv6:2001:db8::1]", "2001:db8::1"), ("[ipv6:2001:DB8::1]", "2001:db8::1")],
)
def test_an_address_literal_is_that_address(dns: DnsServer, hops: Hops, literal: str, address: str) -> None:
    assert hops(literal) == [Host(address, (address,), 25)]
    assert dns.count() == 0


@pytest.mark.parametrize(
    "literal", ["[]", "[192.0.2]", "[192.0.2.256]", "[IPv6:nothing]", "[IPv6:fe80::1%lo]", "[0.0.0.0]", "[x-tag:y]"]
)
def test_a_literal_that_is_no_address_fails(dns: DnsServer, hops: Hops, literal: str) -> None:
    only = failure(hops(literal))
    assert isinstance(only, Failed)
    assert dns.count() == 0


def test_a_smarthost_with_mx_lookup(dns: DnsServer, hops: Hops) -> None:
    assert names(hops("gone.test", next_hop="a.test")) == ["mx1.test", "mx2.test"]
    assert dns.count("gone.test") == 0
    assert hops("gone.test", next_hop="A.test:587")[1] == Host("mx2.test", ("192.0.2.2",), 587)


def test_a_smarthost_without_mx_lookup(dns: DnsServer, hops: Hops) -> None:
    assert hops("gone.test", next_hop="[mx2.test]:587") == [Host("mx2.test", ("192.0.2.2",), 587)]
    assert hops("gone.test", next_hop="[192.0.2.5]") == [Host("192.0.2.5", ("192.0.2.5",), 25)]
    assert hops("gone.test", next_hop="[2001:db8::5]:24") == [Host("2001:db8::5", ("2001:db8::5",), 24)]
    assert dns.count(kind="MX") == 0


def test_a_policy_sends_a_domain_elsewhere(hops: Hops) -> None:
    policy = (
        DeliveryPolicy(domain=("gone.test",), next_hop="[mx2.test]:587"),
        DeliveryPolicy(domain=(".sub.test", "a.test"), port=2525),
        DeliveryPolicy(domain=("plain.test",), next_hop="@"),
    )
    assert hops("gone.test", policy=policy) == [Host("mx2.test", ("192.0.2.2",), 587)]
    assert hops("a.test", policy=policy)[1] == Host("mx2.test", ("192.0.2.2",), 2525)
    assert hops("plain.test", next_hop="[192.0.2.5]", policy=policy)[0] == Host(
        "plain.test", ("2001:db8::80", "192.0.2.80"), 25
    )
    assert hops("equal.test", next_hop="[192.0.2.5]", policy=policy) == [Host("192.0.2.5", ("192.0.2.5",), 25)]


@pytest.mark.parametrize(
    "destination", ["loopback.test", "loopmx.test", "[127.0.0.1]", "[IPv6:::1]", "[IPv6:::ffff:127.0.0.9]"]
)
def test_d4_a_stranger_does_not_make_us_talk_to_our_own_machine(hops: Hops, destination: str) -> None:
    only = failure(hops(destination))
    assert isinstance(only, Failed)
    assert only.status == "5.4.4"
    assert all(isinstance(hop, Host) for hop in hops(destination, port=2525))
    assert hops("a.test", next_hop="[127.0.0.2]") == [Host("127.0.0.2", ("127.0.0.2",), 25)]


def test_a_dns_failure_never_gets_out() -> None:
    class Down:
        def mx(self, domain: str) -> Mx:
            assert domain == "a.test"
            return Mx(((10, "mx1.test"),))

        def addresses(self, host: str) -> Addresses:
            raise ResolverFailure(f"{host}: down")

    assert list(Router(Down(), "me.test", Rules(Delivery())).hops("a.test")) == [
        Deferred("4.4.3", "mx1.test: down", destination=True)
    ]
