"""The rules for destinations: how a next hop is written, and which policy wins."""

from __future__ import annotations

import pytest

from mtad.config import Delivery, DeliveryPolicy
from mtad.nexthop import BadNextHop, Group, NextHop, Rate, Rule, Rules, parse_next_hop


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smart.example", NextHop("smart.example", 25)),
        ("smart.example.:26", NextHop("smart.example", 26)),
        ("[Smart.example]", NextHop("smart.example", 25, direct=True)),
        ("[::1]:2525", NextHop("::1", 2525, direct=True)),
        ("[127.0.0.1]:2525", NextHop("127.0.0.1", 2525, direct=True)),
    ],
)
def test_next_hop_is_read(text: str, expected: NextHop) -> None:
    assert parse_next_hop(text, 25) == expected


@pytest.mark.parametrize(
    "text", ["", " ", "a b", "a:", "a:0", "a:65536", "a:x", "[a", "a]", "[]", "[a]b", "::1", "192.0.2.1", ".", "-", "a..b"]
)
def test_a_next_hop_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(BadNextHop):
        parse_next_hop(text, 25)
    with pytest.raises(BadNextHop):
        Rules(Delivery(policy=(DeliveryPolicy(domain=("a.test",), next_hop=text or "a:0"),)))


RULES = Rules(
    Delivery(
        port=26,
        policy=(
            DeliveryPolicy(domain=(".test",), port=1),
            DeliveryPolicy(domain=("a.test", ".B.test"), port=2),
            DeliveryPolicy(domain=(".x.b.test", "a.test"), port=3),
            DeliveryPolicy(domain=("mine.test",), next_hop="[smart.example]:465", credentials="/c", tls="none"),
        ),
    )
)


@pytest.mark.parametrize(
    ("domain", "port"),
    [
        ("a.test", 2),
        ("z.a.test", 1),
        ("b.test", 1),
        ("y.b.test", 2),
        ("z.y.b.test", 2),
        ("x.b.test", 2),
        ("y.x.b.test", 3),
        ("test", 26),
        ("other.example", 26),
        ("[192.0.2.1]", 26),
    ],
)
def test_the_most_specific_policy_wins(domain: str, port: int) -> None:
    assert RULES.of(domain) == Rule(None, port)


def test_a_policy_overrides_what_it_sets_and_inherits_the_rest() -> None:
    hop = NextHop("smart.example", 465, direct=True)
    assert RULES.of("mine.test") == Rule(hop, 26, "none", implicit=True, credentials="/c")
    general = Delivery(next_hop="smart.example:587", tls="required", credentials="/g")
    rules = Rules(
        with_policies(
            general,
            DeliveryPolicy(domain=("p.test",), port=2),
            DeliveryPolicy(domain=("m.test",), next_hop="@"),
            DeliveryPolicy(domain=("i.test",), tls="implicit"),
        )
    )
    assert rules.of("z.test") == Rule(NextHop("smart.example", 587), 25, "required", credentials="/g")
    assert rules.of("p.test") == Rule(NextHop("smart.example", 2), 2, "required", credentials="/g")
    assert rules.of("m.test") == Rule(None, 25, "required", credentials="/g")
    assert rules.of("i.test") == Rule(NextHop("smart.example", 587), 25, "required", implicit=True, credentials="/g")


def with_policies(settings: Delivery, *policy: DeliveryPolicy) -> Delivery:
    """The same settings with these policies."""
    return Delivery(next_hop=settings.next_hop, tls=settings.tls, credentials=settings.credentials, policy=policy)


def test_only_mail_with_the_same_rule_shares_connections() -> None:
    keys = {RULES.of(domain).key for domain in ("a.test", "b.test", "y.x.b.test", "mine.test", "z.example")}
    assert len(keys) == 5
    assert RULES.of("z.example").key == RULES.of("y.example").key


def test_a_domain_with_a_policy_has_a_lane_of_its_own() -> None:
    rules = Rules(Delivery(next_hop="smart.example", policy=(DeliveryPolicy(domain=("a.test",), next_hop="@"),)))
    assert [rules.lane(domain) for domain in ("a.test", "b.test", "c.test")] == ["a.test", "smart.example", "smart.example"]
    assert Rules(Delivery()).lane("b.test") == "b.test"


LIMITED = Rules(
    Delivery(
        policy=(
            DeliveryPolicy(domain=("a.test",), concurrency=2, rate="100/1m", recipients=3, messages=4),
            DeliveryPolicy(domain=("b.test",), recipients=9, messages=9),
            DeliveryPolicy(mx=(".mail.test", "Mail.test"), domain=("m.test", ".m.test"), recipients=5, messages=1),
            DeliveryPolicy(mx=("one.mail.test", "192.0.2.1"), concurrency=7, rate="1/2s"),
        )
    )
)


def test_a_policy_has_limits() -> None:
    rate = Rate(100, 60.0, "100/1m")
    assert LIMITED.of("a.test") == Rule(None, 25, concurrency=2, rate=rate, recipients=3, messages=4)
    assert LIMITED.of("z.test") == Rule(None, 25)
    assert LIMITED.of("m.test") == Rule(None, 25, recipients=5, messages=1), "no rule of its own, but a member"


@pytest.mark.parametrize(
    ("host", "recipients", "messages"),
    [("", 9, 9), ("other.test", 9, 9), ("x.MAIL.test", 5, 1), ("mail.test", 5, 1), ("one.mail.test", 9, 9)],
)
def test_the_smaller_of_two_limits_holds(host: str, recipients: int, messages: int) -> None:
    rule = LIMITED.of("b.test", host)
    assert (rule.recipients, rule.messages) == (recipients, messages)


@pytest.mark.parametrize(
    ("domain", "host", "name"),
    [
        ("z.test", "", None),
        ("z.test", "x.y.mail.test", ".mail.test Mail.test"),
        ("z.test", "one.mail.test", "one.mail.test 192.0.2.1"),
        ("z.test", "x.one.mail.test", ".mail.test Mail.test"),
        ("z.test", "192.0.2.1", "one.mail.test 192.0.2.1"),
        ("m.test", "", ".mail.test Mail.test"),
        ("x.m.test", "elsewhere.test", ".mail.test Mail.test"),
        ("m.test", "one.mail.test", "one.mail.test 192.0.2.1"),
    ],
)
def test_domains_are_grouped_by_who_takes_their_mail_or_by_name(domain: str, host: str, name: str | None) -> None:
    group = LIMITED.group(domain, host)
    assert (group.name if group else None) == name
    assert LIMITED.grouped
    assert not RULES.grouped


def test_the_domains_of_a_group_share_what_it_allows() -> None:
    assert LIMITED.group("z.test", "one.mail.test") == Group("one.mail.test 192.0.2.1", 7, Rate(1, 2.0, "1/2s"))
    assert LIMITED.group("y.test", "one.mail.test") is LIMITED.group("z.test", "192.0.2.1")
