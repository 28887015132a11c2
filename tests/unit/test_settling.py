"""The last steps of a message: when it is due again, what is said when it is held, and a report that is under way."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from mtad.delivery.jobs import Result
from mtad.progress import Doubt
from mtad.spool.queues import Queue
from tests.unit.scheduler_aid import LATER, NEVER, RETRY, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_report_that_cannot_be_stored_is_due_after_the_shortest_wait(world: World) -> None:
    queue_id = world.enter()
    world.deliver(NEVER)
    [bounce] = world.run()
    world.finish(bounce)
    assert world.spool.due(queue_id) == world.clock.wall + RETRY.minimum
    world.clock.advance(RETRY.minimum - 1)
    assert world.run() == []
    world.clock.advance(1)
    [again] = world.run()
    assert again.transport == "bounce"


@pytest.mark.parametrize("gone", [False, True])
def test_only_what_is_on_hold_is_called_held(world: World, gone: bool) -> None:
    queue_id = world.enter("root@example.org", sender="", kind="double-bounce")
    [job] = world.run()
    if gone:
        world.path(Queue.ACTIVE, queue_id).rename(world.root / "taken away")
    world.deliveries.jobs.remove(job)
    world.scheduler.result(Result(job.number, ((0, NEVER),)))
    why = "a notice to postmaster about an undeliverable report cannot be delivered itself"
    assert world.events.about("held") == ([] if gone else [(queue_id, why)])
    assert world.where(queue_id) == ([] if gone else ["hold"])
    assert len(world.scheduler) == 0


def test_who_is_left_in_doubt_is_held_with_what_to_do(tmp_path: Path) -> None:
    world = World(tmp_path, retry=msgspec.structs.replace(RETRY, on_doubt="hold"))
    queue_id = world.place(Queue.ACTIVE, events=[Doubt(1.0, (0,), "mx.test")])
    assert world.scheduler.restore(queue_id)
    assert world.run() == []
    assert world.events.about("held") == [(queue_id, f"who is left is in doubt; to have it sent: mtaq release {queue_id}")]


def test_a_report_that_waits_for_a_process_is_not_told_twice(world: World) -> None:
    """Past its lifetime, a message whose report is under way, or waits for its turn, is not settled once more."""
    queue_id = world.enter()
    world.deliver(NEVER)
    while world.scheduler.turn():
        pass
    world.clock.advance(10 * RETRY.lifetime)
    world.scheduler.keep_house()
    jobs = world.run()
    assert [(job.transport, job.recipients) for job in jobs] == [("bounce", (0,))]
    world.report(jobs[0])
    assert world.run() == []
    assert world.where(queue_id) == []


def test_after_its_report_a_message_that_waits_too_long_is_settled_again(world: World) -> None:
    """The report of one recipient is told; the other waits in a lane beyond its life, and is given up."""
    queue_id = world.enter("a@one.test", "b@two.test")
    first, second = world.run()
    world.finish(first, NEVER)
    world.finish(second, LATER)
    [bounce] = world.run()
    assert bounce.recipients == (0,)
    world.report(bounce)
    assert world.where(queue_id) == ["deferred"]
    world.clock.advance(2 * RETRY.minimum)
    while world.scheduler.turn():
        pass
    world.clock.advance(10 * RETRY.lifetime)
    world.scheduler.keep_house()
    [again] = world.run()
    assert (again.transport, again.recipients) == ("bounce", (1,))
