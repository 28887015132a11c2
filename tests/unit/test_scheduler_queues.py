"""The scheduler and its queues: dead destinations, restarts, and what it finds in the directories."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtad.outcome import Attempt, Deferred
from mtad.progress import Doubt, Event
from mtad.spool.queues import Queue
from tests.unit.scheduler_aid import DEAD, LATER, NEVER, OK, RETRY, World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)  # what is durable is tested elsewhere
    world = World(tmp_path)
    yield world
    world.spool.close()


# -- dead destinations ------------------------------------------------------------------------------------------------


def kill_destination(world: World) -> None:
    """far.test fails until it is suspended."""
    for _ in range(5):
        world.enter("x@far.test")
    world.deliver(DEAD)


def test_what_waits_for_a_dead_destination_is_deferred_with_the_reason(world: World) -> None:
    queue_ids = [world.enter("b@far.test") for _ in range(8)]
    world.deliver(DEAD)
    assert world.run() == []
    assert [world.where(queue_id) for queue_id in queue_ids] == [["deferred"]] * 8
    texts = {said[0]: said[1] for said in world.events.about("deferred")}
    assert texts == dict.fromkeys(queue_ids[5:], f"delivery temporarily suspended: {DEAD.text}")
    [state] = world.load(Queue.DEFERRED, queue_ids[7]).states
    assert isinstance(state.outcome, Deferred)
    assert state.outcome.status == "4.4.1"


def test_a_thousand_messages_for_a_dead_host_do_not_delay_one(world: World) -> None:
    for _ in range(1000):
        world.enter("b@dead.test")
    alive = world.enter("b@alive.test")
    # Nobody hears from the dead host: its jobs hang, and still the other one's starts with the first of them.
    assert alive in [job.queue_id for job in world.run()]
    assert len(world.deliveries.jobs) <= 6


def test_a_suspended_destination_is_probed_after_the_pause_only(world: World) -> None:
    kill_destination(world)
    early = world.enter("b@far.test")
    assert world.run() == []
    assert world.where(early) == ["deferred"]
    world.clock.advance(61)
    first, second = world.enter("b@far.test"), world.enter("b@far.test")
    [probe] = world.run()
    assert probe.queue_id == first
    world.finish(probe, OK)
    assert [job.queue_id for job in world.run()] == [second]


def test_a_clock_that_is_set_back_does_not_keep_a_destination_suspended(world: World) -> None:
    kill_destination(world)
    world.clock.wall -= 86400
    world.clock.monotonic += 61
    queue_id = world.enter("b@far.test")
    assert [job.queue_id for job in world.run()] == [queue_id]


def test_a_flush_ends_a_suspension(world: World) -> None:
    kill_destination(world)
    queue_id = world.enter("b@far.test")
    world.run()
    world.scheduler.flush([queue_id])
    assert [job.queue_id for job in world.run()] == [queue_id]


def test_a_message_waits_for_its_suspended_part_only_with_that_part(world: World) -> None:
    kill_destination(world)
    queue_id = world.enter("a@far.test", "b@alive.test")
    [job] = world.run()
    assert job.destination == "alive.test"
    world.finish(job, OK)
    assert world.where(queue_id) == ["deferred"]
    first, second = world.load(Queue.DEFERRED, queue_id).states
    assert isinstance(first.outcome, Deferred)
    assert second.settled


def test_an_expired_message_for_a_suspended_destination_bounces_untried(world: World) -> None:
    kill_destination(world)
    world.enter("b@far.test", arrival=world.clock.wall - RETRY.lifetime)
    [bounce] = world.run()
    assert bounce.transport == "bounce"


def test_lanes_of_the_past_are_forgotten(world: World) -> None:
    for number in range(20):
        world.enter(f"b@d{number}.test")
    world.deliver(OK)
    assert len(world.scheduler._lanes) == 20
    world.clock.advance(100)
    world.scheduler.keep_house()
    assert len(world.scheduler._lanes) == 0


def test_full_delivery_processes_make_jobs_wait(world: World) -> None:
    world.deliveries.capacity = 2
    ids = [world.enter(f"b@d{number}.test") for number in range(3)]
    first, _ = list(world.run())
    world.finish(first, OK)
    world.run()
    assert [job.queue_id for job in world.deliveries.log] == ids


# -- restarts ---------------------------------------------------------------------------------------------------------


def test_a_restart_goes_on_where_the_one_before_was(world: World) -> None:
    history: list[Event] = [
        Attempt(world.clock.wall, ((0, OK), (1, LATER), (2, NEVER))),
        Doubt(world.clock.wall, (1,), "mx.far.test"),
    ]
    queue_id = world.place(Queue.ACTIVE, "a@far.test", "b@far.test", "c@far.test", events=history)
    assert world.scheduler.restore(queue_id) is True
    [job] = world.run()
    assert job.recipients == (1,)
    assert world.events.about("in_doubt") == [(queue_id, "b@far.test", "mx.far.test")]
    assert world.scheduler.restore(queue_id) is True
    assert len(world.run()) == 1, "not twice"


def test_a_message_that_was_done_but_for_its_removal_is_removed(world: World) -> None:
    queue_id = world.place(Queue.ACTIVE, events=[Attempt(world.clock.wall, ((0, OK),))])
    world.scheduler.restore(queue_id)
    assert world.where(queue_id) == []
    assert world.run() == []


def test_a_failure_that_nobody_was_told_of_is_reported_after_a_restart(world: World) -> None:
    world.scheduler.restore(world.place(Queue.ACTIVE, events=[Attempt(world.clock.wall, ((0, NEVER),))]))
    [bounce] = world.run()
    assert bounce.transport == "bounce"


def test_a_file_that_a_delivery_still_holds_is_left_alone(world: World) -> None:
    queue_id = world.place(Queue.ACTIVE)
    with world.spool.open(Queue.ACTIVE, queue_id):
        assert world.scheduler.restore(queue_id) is False
    assert world.scheduler.restore(queue_id) is True


# -- incoming ---------------------------------------------------------------------------------------------------------


def test_a_message_without_a_wake_up_is_found(world: World) -> None:
    queue_id = world.enter(wake=False)
    world.scheduler.found_incoming(queue_id, world.clock.wall)
    assert [job.queue_id for job in world.run()] == [queue_id]


def test_a_wake_up_after_the_scan_and_a_scan_after_the_wake_up_change_nothing(world: World) -> None:
    queue_id = world.enter(wake=False)
    head = world.load(Queue.INCOMING, queue_id).head
    world.scheduler.found_incoming(queue_id, world.clock.wall)
    world.scheduler.arrived(head)
    world.scheduler.found_incoming(queue_id, world.clock.wall)
    [job] = world.run()
    world.finish(job, OK)
    world.scheduler.arrived(head)
    assert world.run() == []
    assert len(world.scheduler) == 0


def test_a_message_in_the_making_is_left_alone(world: World) -> None:
    envelope = world.envelope()
    incoming = world.spool.enter(envelope)
    incoming.write(b"x" * 100_000)
    world.scheduler.found_incoming(envelope.id, world.clock.wall - 1000)
    assert world.where(envelope.id) == ["incoming"]
    incoming.commit()


@pytest.mark.parametrize(("age", "remains"), [(0.5, ["incoming"]), (1.5, [])])
def test_half_a_message_without_a_receiver_is_swept(world: World, age: float, remains: list[str]) -> None:
    queue_id = world.envelope().id
    world.path(Queue.INCOMING, queue_id).write_bytes(b"mtad-queue 1 unfinished")
    world.scheduler.found_incoming(queue_id, world.clock.wall - age)
    assert world.where(queue_id) == remains
    assert world.events.about("swept") == ([] if remains else [(queue_id,)])


def test_names_that_the_scan_does_not_know_go_to_corrupt(world: World) -> None:
    world.path(Queue.DEFERRED, "README").write_text("hello")
    os.mkfifo(world.path(Queue.ACTIVE, "fifo"))
    world.scheduler.found_stranger(Queue.DEFERRED, "README")
    world.scheduler.found_stranger(Queue.ACTIVE, "fifo")
    assert sorted(os.listdir(world.root / "corrupt")) == ["README", "fifo"]
    assert [said[:2] for said in world.events.about("damaged")] == [("README", "deferred"), ("fifo", "active")]
