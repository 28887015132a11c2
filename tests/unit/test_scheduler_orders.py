"""Orders about messages to a scheduler, in each of the states in which it can have one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from mtad.delivery.jobs import Job
from mtad.desk import Order, Ordered, OrderName
from mtad.outcome import Delivered, Failed
from mtad.progress import Reported
from mtad.spool.queues import Queue
from tests.unit.scheduler_aid import DEAD, LATER, NEVER, OK, World, refuse

ALL: tuple[OrderName, ...] = get_args(OrderName)
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    world = World(tmp_path)
    yield world
    world.spool.close()


def tell(world: World, what: OrderName, *ids: str) -> Ordered:
    return world.scheduler._orders.give(Order(what, ids))


def left(world: World) -> None:
    """Nothing is left in any table."""
    scheduler = world.scheduler
    assert (len(scheduler), len(scheduler._jobs), len(scheduler._moves), len(scheduler._agenda)) == (0, 0, 0, 0)
    assert scheduler._orders._remembered == {}
    assert world.run() == []


def flying(world: World, *recipients: str) -> tuple[str, Job]:
    queue_id = world.enter(*recipients)
    [job] = world.run()
    return queue_id, job


@pytest.mark.parametrize("what", ALL)
def test_an_order_about_a_deferred_message(world: World, what: OrderName) -> None:
    queue_id = world.enter()
    world.deliver(LATER)
    if what == "release":
        assert tell(world, what, queue_id).refused == ((queue_id, "it is not on hold"),)
        return
    assert tell(world, what, queue_id) == Ordered(done=(queue_id,))
    assert ("ordered", queue_id, what) in world.events.said
    jobs = list(world.run())
    match what:
        case "hold" | "delete":
            assert jobs == []
            assert world.where(queue_id) == (["hold"] if what == "hold" else [])
            assert ("removed", queue_id) in world.events.said or what == "hold"
        case "requeue":
            assert [job.transport for job in jobs] == ["smtp"]
            world.finish(jobs[0], OK)
        case _:
            assert [job.transport for job in jobs] == ["bounce"]
            world.report(jobs[0])
            assert world.where(queue_id) == []
    left(world)


@pytest.mark.parametrize("what", ["hold", "delete", "expire", "bounce", "requeue"])
@pytest.mark.parametrize("also", [False, True])
def test_an_order_about_a_message_in_delivery_waits(world: World, what: OrderName, also: bool) -> None:
    world.deliveries.capacity = 1
    queue_id = world.enter("a@x.test", "b@y.test")  # one under way, one that waits
    [job] = world.run()
    assert tell(world, what, queue_id) == Ordered(later=(queue_id,))
    if also:
        assert tell(world, what, queue_id) == Ordered(later=(queue_id,))
    assert world.where(queue_id) == ["active"]
    world.finish(job, OK)
    assert [state.settled for message in world.scheduler._messages.values() for state in message.states] in (
        [],
        [True, False],
    )
    jobs = list(world.run())
    match what:
        case "hold" | "delete":
            assert jobs == []
            assert world.where(queue_id) == (["hold"] if what == "hold" else [])
        case "requeue":
            assert [(job.transport, job.recipients) for job in jobs] == [("smtp", (1,))]
            world.finish(jobs[0], OK)
        case _:
            assert [(job.transport, job.recipients) for job in jobs] == [("bounce", (1,))]
            world.report(jobs[0])
            assert world.where(queue_id) == []
    left(world)


@pytest.mark.parametrize("what", ["hold", "delete", "expire", "bounce", "requeue"])
def test_an_order_about_a_message_that_waits_in_a_lane_is_done_at_once(world: World, what: OrderName) -> None:
    world.deliveries.capacity = 0
    queue_id = world.enter("a@x.test", "b@y.test")
    assert world.run() == []
    assert tell(world, what, queue_id) == Ordered(done=(queue_id,))
    world.deliveries.capacity = 10
    kinds = sorted((job.transport, job.recipients) for job in world.run())
    match what:
        case "hold" | "delete":
            assert kinds == []
        case "requeue":
            assert kinds == [("smtp", (0,)), ("smtp", (1,))]
            world.deliver(OK)
        case _:
            assert kinds == [("bounce", (0, 1))]
            world.report(world.deliveries.jobs[0])
    assert world.where(queue_id) == (["hold"] if what == "hold" else [])
    left(world)


@pytest.mark.parametrize("what", ["hold", "delete", "bounce", "requeue"])
def test_a_delivery_that_settles_all_makes_an_order_void(world: World, what: OrderName) -> None:
    queue_id, job = flying(world)
    assert tell(world, what, queue_id).later == (queue_id,)
    world.finish(job, OK)
    assert world.where(queue_id) == []
    assert world.events.about("ordered") == []
    left(world)


def test_what_failed_in_the_last_delivery_is_in_the_same_report(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@y.test")
    first, second = list(world.run())
    tell(world, "bounce", queue_id)
    world.finish(first, NEVER)
    assert world.where(queue_id) == ["active"]
    world.finish(second, LATER)
    [bounce] = world.run()
    assert (bounce.transport, bounce.recipients) == ("bounce", (0, 1))
    assert [state.outcome.status for state in world.load(Queue.ACTIVE, queue_id).states if state.outcome] == [
        "5.1.1",
        "5.7.0",
    ]
    world.report(bounce)
    left(world)


def test_a_hold_keeps_a_failure_that_was_not_told_yet(world: World) -> None:
    queue_id, job = flying(world)
    tell(world, "hold", queue_id)
    world.finish(job, NEVER)
    assert world.where(queue_id) == ["hold"]
    assert tell(world, "release", queue_id).done == (queue_id,)
    [bounce] = world.run()
    world.report(bounce)
    left(world)


def test_an_order_while_the_sender_is_being_told(world: World) -> None:
    queue_id, job = flying(world, "a@x.test", "b@x.test")
    world.finish(job, NEVER, LATER)
    [bounce] = world.run()
    assert tell(world, "delete", queue_id).later == (queue_id,)
    world.report(bounce)
    assert world.where(queue_id) == []
    left(world)


def test_a_hold_can_be_taken_back_before_it_is_done(world: World) -> None:
    queue_id, job = flying(world)
    assert tell(world, "release", queue_id).refused
    tell(world, "hold", queue_id)
    assert tell(world, "requeue", queue_id).refused == ((queue_id, "it is on hold; mtaq release tries it now"),)
    assert tell(world, "release", queue_id).later == (queue_id,)
    world.finish(job, DEAD)
    [again] = world.run()
    assert again.queue_id == queue_id, "release tries it now"
    world.finish(again, OK)
    left(world)


def test_requeue_does_not_mind_a_suspended_lane(world: World) -> None:
    ids = [world.enter() for _ in range(8)]
    for _ in range(5):
        world.finish(world.run()[0], DEAD)
    for job in list(world.run()):
        world.finish(job, DEAD)
    assert world.run() == []
    assert all(world.where(queue_id) == ["deferred"] for queue_id in ids)
    assert tell(world, "requeue", ids[0]).done == (ids[0],)
    [probe] = world.run()
    assert probe.queue_id == ids[0]


def test_a_dead_delivery_process_does_not_lose_an_order(world: World) -> None:
    queue_id, job = flying(world)
    tell(world, "hold", queue_id)
    world.deliveries.jobs.remove(job)
    world.scheduler.died([job], "killed by SIGKILL")
    assert world.where(queue_id) == ["hold"]
    left(world)


@pytest.mark.parametrize("what", ["hold", "delete", "expire"])
def test_the_next_scheduler_finds_an_order_that_waits(world: World, what: OrderName) -> None:
    queue_id, _ = flying(world)
    tell(world, what, queue_id)
    world.start()
    assert world.scheduler.restore(queue_id)
    jobs = list(world.run())
    assert [job.transport for job in jobs] == (["bounce"] if what == "expire" else [])
    for job in jobs:
        world.report(job)
    assert world.where(queue_id) == (["hold"] if what == "hold" else [])
    left(world)


def test_a_message_of_which_no_wake_up_has_come(world: World) -> None:
    ids = {what: world.enter(wake=False) for what in ALL if what != "release"}
    heads = [world.load(Queue.INCOMING, queue_id).head for queue_id in ids.values()]
    for what, queue_id in ids.items():
        assert tell(world, what, queue_id).done == (queue_id,)
    for head in heads:
        world.scheduler.arrived(head)  # the wake-up comes after all
    assert sorted(job.transport for job in world.run()) == ["bounce", "bounce", "smtp"]
    assert world.where(ids["hold"]) == ["hold"]
    assert world.where(ids["delete"]) == []


def test_a_message_that_is_being_received_is_none_yet(world: World) -> None:
    envelope = world.envelope()
    entry = world.spool.enter(envelope)
    entry.write(b"x" * 100_000)
    assert tell(world, "delete", envelope.id) == Ordered(missing=(envelope.id,))
    entry.commit()
    assert tell(world, "delete", envelope.id) == Ordered(done=(envelope.id,))


def test_damage_is_refused_and_moves_nothing(world: World) -> None:
    queue_id = world.place(Queue.DEFERRED)
    world.path(Queue.DEFERRED, queue_id).write_bytes(b"garbage")
    assert "queue file" in dict(tell(world, "expire", queue_id).refused)[queue_id]
    assert world.where(queue_id) == ["deferred"]
    assert tell(world, "delete", queue_id).done == (queue_id,)


# -- a disk that refuses ----------------------------------------------------------------------------------------------


def test_what_the_disk_refuses_at_once_is_refused(world: World) -> None:
    queue_id = world.enter()
    world.deliver(LATER)
    allow = refuse(world.spool, "hold", NO_SPACE)
    assert tell(world, "hold", queue_id).refused == ((queue_id, "the spool cannot be changed: No space left on device"),)
    assert world.where(queue_id) == ["deferred"]
    allow()
    assert tell(world, "hold", queue_id).done == (queue_id,)


def test_what_was_promised_is_tried_until_the_disk_lets_it(world: World) -> None:
    queue_id, job = flying(world)
    tell(world, "hold", queue_id)
    allow = refuse(world.spool, "hold", NO_SPACE)
    world.finish(job, LATER)
    assert world.where(queue_id) == ["active"]
    assert tell(world, "hold", queue_id).later == (queue_id,)
    assert world.run() == []
    allow()
    world.clock.advance(11)
    world.run()
    assert world.where(queue_id) == ["hold"]
    left(world)


def test_an_order_for_a_message_that_the_disk_does_not_let_go(world: World) -> None:
    queue_id, job = flying(world)
    allow = refuse(world.spool, "defer", NO_SPACE)
    world.finish(job, LATER)
    assert tell(world, "delete", queue_id).later == (queue_id,)
    allow()
    world.clock.advance(11)
    world.run()
    assert world.where(queue_id) == []
    left(world)


def test_an_order_that_proves_to_be_unfit_is_void_and_the_message_goes_on(world: World) -> None:
    """It was promised while nobody could read the message."""
    queue_id = world.enter()
    world.deliver(LATER)
    allow = refuse(world.spool, "claim", NO_SPACE)
    world.clock.advance(400)
    world.run()
    assert tell(world, "release", queue_id).later == (queue_id,)
    allow()
    world.clock.advance(11)
    world.run()
    assert world.events.about("warning")[-1] == (f"{queue_id}: cannot release it: it is not on hold",)
    world.clock.advance(11)
    [job] = world.run()
    assert job.queue_id == queue_id
    world.finish(job, OK)
    left(world)


def test_an_order_for_a_message_that_cannot_be_claimed_yet(world: World) -> None:
    queue_id = world.enter()
    world.deliver(LATER)
    allow = refuse(world.spool, "claim", NO_SPACE)
    world.clock.advance(400)
    world.run()
    assert tell(world, "hold", queue_id).later == (queue_id,)
    allow()
    world.clock.advance(11)
    assert world.run() == []
    assert world.where(queue_id) == ["hold"]
    left(world)


def test_what_could_not_be_written_is_written_before_an_order_is_carried_out(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@y.test")
    first, second = list(world.run())
    tell(world, "bounce", queue_id)
    world.finish(first, OK, unwritten=True)
    world.finish(second, LATER)
    outcomes = [state.outcome for state in world.load(Queue.ACTIVE, queue_id).states]
    assert isinstance(outcomes[0], Delivered)
    assert isinstance(outcomes[1], Failed)
    [bounce] = world.run()
    assert bounce.recipients == (1,)
    world.spool.append(Queue.ACTIVE, queue_id, Reported(1.0, (1,), "R"))
    world.finish(bounce, reports=(Reported(1.0, (1,), "R"),))
    left(world)
