"""What a policy limits in a delivery: recipients of a transaction, messages of a connection; by domain and by MX."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from mtad.config import DeliveryPolicy
from mtad.outcome import Delivered
from tests.peers.mx import Script
from tests.peers.outbound import Site, only

FIVE = [f"r{number}@x.test" for number in range(5)]


@pytest.fixture
def site() -> Iterator[Site]:
    with ExitStack() as stack:
        site = Site(stack)
        site.domain("127.0.0.5")
        yield site


def policy(recipients: int = 0, messages: int = 0, *, mx: bool = False) -> DeliveryPolicy:
    if mx:
        return DeliveryPolicy(domain=(), mx=(".x.test",), recipients=recipients, messages=messages)
    return DeliveryPolicy(domain=("x.test",), recipients=recipients, messages=messages)


@pytest.mark.parametrize("mx", [False, True])
def test_recipients_of_a_transaction(site: Site, mx: bool) -> None:
    peer = site.mx()
    site.make(policy=(policy(recipients=2, mx=mx),))
    outcomes = site.send(*FIVE)
    assert all(isinstance(outcome, Delivered) for outcome in outcomes.values())
    assert [one.recipients for one in peer.messages] == [FIVE[:2], FIVE[2:4], FIVE[4:]]
    assert peer.connections == 1


def test_a_policy_can_allow_more_than_is_usual(site: Site) -> None:
    peer = site.mx()
    site.make(destination_recipients=2, policy=(policy(recipients=4),))
    site.send(*FIVE)
    assert [len(one.recipients) for one in peer.messages] == [4, 1]


def test_what_the_server_announces_holds_as_well(site: Site) -> None:
    peer = site.mx(script=Script(extensions=["PIPELINING", "LIMITS RCPTMAX=1"]))
    site.make(policy=(policy(recipients=3),))
    site.send(*FIVE[:3])
    assert [len(one.recipients) for one in peer.messages] == [1, 1, 1]


@pytest.mark.parametrize("mx", [False, True])
def test_messages_of_a_connection(site: Site, mx: bool) -> None:
    peer = site.mx()
    site.make(policy=(policy(messages=2, mx=mx),))
    for _ in range(5):
        assert isinstance(only(site.send()), Delivered)
    assert peer.connections == 3
    assert [peer.verbs(number).count("MAIL") for number in (1, 2, 3)] == [2, 2, 1]
    assert peer.verbs(1)[-1] == "QUIT"


def test_transactions_of_one_message_count(site: Site) -> None:
    peer = site.mx()
    site.make(policy=(policy(recipients=1, messages=2),))
    outcomes = site.send(*FIVE)
    assert all(isinstance(outcome, Delivered) for outcome in outcomes.values())
    assert peer.connections == 3
    assert len(site.attempts) == 5


def test_other_destinations_have_no_such_limits(site: Site) -> None:
    peer = site.mx()
    site.domain("127.0.0.5", name="y.test")
    site.make(policy=(policy(recipients=1, messages=1),))
    site.send("a@y.test", "b@y.test", domain="y.test")
    site.send("a@y.test", domain="y.test")
    assert [len(one.recipients) for one in peer.messages] == [2, 1]
    assert peer.connections == 1
