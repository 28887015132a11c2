"""The scheduler and its lanes: policies, what results teach about destinations, and lives that end in a lane."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtad.config import Delivery, DeliveryPolicy
from mtad.delivery.jobs import Job
from mtad.outcome import Deferred
from mtad.scheduler.lane import LaneKey
from mtad.scheduler.lanes import REMEMBERED, WAITING
from mtad.spool.queues import Queue
from tests.unit.scheduler_aid import DEAD, LATER, OK, RETRY, World

BUSY = Deferred("4.7.0", "host mx said: 421", "mx.test", "421 4.7.0 Too many connections", destination=True)

Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes a world with these policies and settings of delivery."""
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    made: list[World] = []

    def make(*policy: DeliveryPolicy, **delivery: Any) -> World:
        made.append(World(tmp_path, delivery=Delivery(policy=policy, **delivery)))
        return made[-1]

    yield make
    for world in made:
        world.spool.close()


def to(jobs: list[Job]) -> list[str]:
    return [job.destination for job in jobs]


def test_the_scheduler_wakes_up_when_a_rate_lets_the_next_one_go(make: Make) -> None:
    world = make(DeliveryPolicy(domain=("x.test",), rate="1/10s"))
    for _ in range(3):
        world.enter("a@x.test")
    assert len(world.run()) == 1
    assert world.scheduler.wait() == 10.0
    world.clock.advance(4)
    world.enter("a@y.test")
    assert to(world.run()) == ["x.test", "y.test"]
    assert world.scheduler.wait() == 6.0
    world.clock.wall -= 100_000  # a clock that is set back has no part in it
    world.clock.monotonic += 6.0
    assert to(world.run()) == ["x.test", "y.test", "x.test"]


def test_recipients_of_a_job_are_as_many_as_the_policy_says(make: Make) -> None:
    world = make(DeliveryPolicy(domain=(".x.test",), recipients=2), destination_recipients=4)
    world.enter(*(f"u{number}@{domain}" for domain in ("a.x.test", "b.test") for number in range(5)))
    sizes: dict[str, list[int]] = {}
    for job in world.run():
        sizes.setdefault(job.destination, []).append(len(job.recipients))
    assert sizes == {"a.x.test": [2, 2, 1], "b.test": [4, 1]}


def test_a_big_mailing_and_single_messages_take_turns(make: Make) -> None:
    world = make(destination_concurrency=1, destination_recipients=1)
    mailing = world.enter(*(f"u{number}@x.test" for number in range(20)))
    singles = [world.enter("s@x.test") for _ in range(5)]
    order = []
    while jobs := list(world.run()):
        order.append(jobs[0].queue_id)
        world.finish(jobs[0], OK)
    assert order[:11] == [mailing, *(queue_id for single in singles for queue_id in (mailing, single))]
    assert len(order) == 25


def test_domains_of_one_exchanger_share_a_window(make: Make) -> None:
    world = make(DeliveryPolicy(mx=(".big.test",), concurrency=2))
    for domain in ("a.test", "b.test", "c.test"):
        world.enter(f"x@{domain}")
    for job in list(world.run()):
        world.finish(job, OK, host="mx.big.test")
    for _ in range(3):
        for domain in ("a.test", "b.test", "c.test"):
            world.enter(f"x@{domain}")
    assert to(world.run()) == ["a.test", "b.test"]
    world.finish(world.deliveries.jobs[0], LATER, host="mx.big.test")
    assert to(world.run()) == ["b.test", "c.test"]


def test_too_many_connections_shrink_a_lane_and_put_off_nobody_else(make: Make) -> None:
    world = make()
    ids = [world.enter("a@x.test") for _ in range(20)]
    for job in list(world.run()):
        world.finish(job, BUSY)
    assert len(world.run()) == 2
    assert [queue_id for queue_id in ids if world.where(queue_id) == ["deferred"]] == ids[:5]


def test_a_destination_that_wants_ipv4_gets_it_for_a_day(make: Make) -> None:
    world = make()
    world.enter("a@x.test")
    [job] = world.run()
    assert not job.ipv4
    world.finish(job, OK, ipv4=True)
    world.clock.advance(1000)
    world.scheduler.keep_house()
    world.enter("a@x.test", "a@y.test")
    assert {job.destination: job.ipv4 for job in world.run()} == {"x.test": True, "y.test": False}
    world.clock.advance(REMEMBERED)
    world.enter("a@x.test")
    assert [job.ipv4 for job in world.run()][2:] == [False]


def test_more_than_a_rate_lets_go_is_deferred_and_others_have_their_places(make: Make) -> None:
    world = make(DeliveryPolicy(domain=("slow.test",), rate="1/1h"))
    world.enter("a@slow.test")
    assert len(world.run()) == 1
    ids = [world.enter("a@slow.test") for _ in range(WAITING + 2)]
    assert len(world.run()) == 1
    *kept, _, last = ids
    assert {queue_id for queue_id in ids if world.where(queue_id) == ["active"]} == set(kept)
    [state] = world.load(Queue.DEFERRED, last).states
    assert isinstance(state.outcome, Deferred)
    assert state.outcome.text.endswith("the rate of 1/1h for slow.test is used up: 100 messages wait before it")
    assert state.outcome.status == "4.4.5"
    world.scheduler.flush([last])
    world.run()
    assert world.where(last) == ["active"], "somebody asked for it"


def test_a_life_that_ends_in_a_lane_ends(make: Make) -> None:
    world = make(DeliveryPolicy(domain=("slow.test",), rate="1/1d"))
    first = world.enter("a@slow.test")
    second = world.enter("b@slow.test", "c@fast.test", arrival=world.clock.wall - RETRY.lifetime + 100)
    slow, fast = list(world.run())
    world.finish(slow, OK)
    world.clock.advance(100)
    world.scheduler.keep_house()
    assert to(world.run()) == ["fast.test"], "a delivery is under way"
    world.finish(fast, OK)
    world.deliveries.capacity = 0
    for _ in range(3):  # while the report waits, it is not begun again
        world.scheduler.keep_house()
        assert world.run() == []
    world.deliveries.capacity = 1000
    [bounce] = world.run()
    assert (bounce.queue_id, bounce.transport, bounce.recipients) == (second, "bounce", (0,))
    assert world.events.about("expired") == [(second,)]
    world.clock.advance(100)
    world.scheduler.keep_house()
    assert world.run() == [bounce], "once"
    world.report(bounce)
    assert (world.where(first), world.where(second)) == ([], [])
    world.clock.advance(86400)
    assert world.run() == [], "what was left in the lane is nobody's"
    assert len(world.scheduler) == 0


def test_a_message_gets_its_last_attempt_in_time(make: Make) -> None:
    world = make(DeliveryPolicy(domain=("slow.test",), rate="1/1m"))
    world.enter("a@slow.test")
    world.enter("b@slow.test", arrival=world.clock.wall - RETRY.lifetime)
    [first] = list(world.run())
    world.finish(first, OK)
    world.clock.advance(59)
    world.scheduler.keep_house()
    world.clock.advance(1)
    [second] = world.run()
    assert second.transport == "smtp"


def test_what_a_failure_says_of_a_group_and_of_a_domain(make: Make) -> None:
    world = make(DeliveryPolicy(mx=(".big.test",)), destination_concurrency=5)
    for domain in ("a.test", "b.test"):
        world.enter(f"x@{domain}")
    for job in list(world.run()):
        world.finish(job, OK, host="mx.big.test")
    for _ in range(10):
        world.enter("x@a.test")
    for _ in range(5):
        for job in list(world.run()):
            world.finish(job, DEAD, host="mx.big.test")
    key = LaneKey("smtp", "a.test")
    lane = world.scheduler._lanes.get(key)
    assert lane is not None
    assert lane.suspended
    world.enter("x@b.test")
    assert to(world.run()) == ["b.test"]
