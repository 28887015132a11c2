"""The scheduler when the world fails: dead delivery processes, damaged files, a disk that refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtad.config import Delivery, Duration, Retry
from mtad.delivery.jobs import Result
from mtad.outcome import Attempt
from mtad.progress import Doubt
from mtad.scheduler.moves import PAUSE
from mtad.spool.message import OpenMessage
from mtad.spool.queues import Queue
from tests.unit.scheduler_aid import DEAD, LATER, NEVER, OK, RETRY, World, refuse

READ_ONLY = OSError(30, "Read-only file system")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)  # what is durable is tested elsewhere
    world = World(tmp_path)
    yield world
    world.spool.close()


def die(world: World, *numbers: int) -> None:
    """The process that has these jobs (by their place in the list of those under way) is gone."""
    jobs = [world.deliveries.jobs[number] for number in numbers]
    for job in jobs:
        world.deliveries.jobs.remove(job)
    world.scheduler.died(jobs, "killed by SIGKILL")


def damage(world: World, queue_id: str, queue: Queue = Queue.ACTIVE) -> None:
    with open(world.path(queue, queue_id), "r+b") as file:
        file.write(b"not")


# -- delivery processes that die --------------------------------------------------------------------------------------


def test_the_work_of_a_dead_process_is_done_by_another(world: World) -> None:
    queue_id = world.enter()
    world.run()
    die(world, 0)
    [again] = world.run()
    assert (again.queue_id, again.recipients) == (queue_id, (0,))


def test_what_the_dead_one_wrote_down_is_not_done_again(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@x.test")
    world.run()
    world.spool.append(Queue.ACTIVE, queue_id, Attempt(world.clock.wall, ((0, OK),)))
    die(world, 0)
    [again] = world.run()
    assert again.recipients == (1,)


def test_a_message_that_was_done_when_its_process_died_is_removed(world: World) -> None:
    queue_id = world.enter()
    world.run()
    world.spool.append(Queue.ACTIVE, queue_id, Attempt(world.clock.wall, ((0, OK),)))
    die(world, 0)
    assert world.where(queue_id) == []


def test_recipients_in_doubt_are_named_and_those_still_under_way_are_not(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@y.test")
    world.run()
    for index in (0, 1):
        world.spool.append(Queue.ACTIVE, queue_id, Doubt(world.clock.wall, (index,), f"mx{index}.test"))
    die(world, 0)
    assert world.events.about("in_doubt") == [(queue_id, "a@x.test", "mx0.test")]


def test_a_message_with_which_processes_die_waits_as_a_deferred_one(world: World) -> None:
    queue_id = world.enter()
    world.run()
    die(world, 0)
    world.run()
    die(world, 0)
    assert world.run() == []
    assert world.where(queue_id) == ["deferred"]
    assert world.events.about("deferred") == [(queue_id, "delivery process killed by SIGKILL")]


def test_one_death_counts_once_however_many_jobs_the_message_had(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@y.test", "c@z.test")
    world.run()
    die(world, 0, 1, 2)
    assert [job.queue_id for job in world.run()] == [queue_id] * 3


def test_a_report_with_which_processes_die_is_not_tried_for_ever(world: World) -> None:
    queue_id = world.enter()
    world.deliver(NEVER)
    for _ in range(2):
        [bounce] = world.run()
        assert bounce.transport == "bounce"
        die(world, 0)
    assert world.run() == []
    assert world.where(queue_id) == ["deferred"]
    world.clock.advance(RETRY.minimum)
    [later] = world.run()
    assert later.transport == "bounce"


def test_a_death_does_not_open_the_window_of_a_lane(world: World) -> None:
    for _ in range(30):
        world.enter("b@x.test")
    assert len(world.run()) == 5
    die(world, *range(5))
    assert len(world.run()) == 5


# -- damage -----------------------------------------------------------------------------------------------------------


def test_a_file_that_a_delivery_finds_damaged_goes_to_corrupt_and_its_other_jobs_are_dropped(tmp_path: Path) -> None:
    world = World(tmp_path, delivery=Delivery(destination_concurrency=1))
    before = world.enter("x@y.test")
    world.run()
    queue_id = world.enter("a@x.test", "b@y.test")  # the second waits behind the message before
    first, second = list(world.run())
    world.finish(second, damaged="the checksum of the content is wrong")
    assert world.where(queue_id) == ["corrupt"]
    world.finish(first, OK)
    assert world.run() == []
    assert world.where(before) == []
    assert len(world.scheduler) == 0
    assert world.events.about("damaged") == [(queue_id, "active", "the checksum of the content is wrong")]
    world.enter("z@y.test")
    assert len(world.run()) == 1, "the dropped job has left its lane free"


def test_a_file_that_is_damaged_when_its_process_dies_goes_to_corrupt(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@y.test")
    world.run()
    damage(world, queue_id)
    die(world, 0)
    assert world.where(queue_id) == ["corrupt"]
    [other] = world.deliveries.jobs
    world.deliveries.jobs.clear()
    world.scheduler.died([other], "killed by SIGKILL")
    assert world.run() == []
    assert len(world.scheduler) == 0


@pytest.mark.parametrize("queue", [Queue.INCOMING, Queue.ACTIVE, Queue.DEFERRED])
def test_a_damaged_file_in_any_queue_goes_to_corrupt_and_the_rest_flows(world: World, queue: Queue) -> None:
    queue_id, healthy = world.place(queue), world.enter("b@y.test")
    damage(world, queue_id, queue)
    if queue is Queue.INCOMING:
        world.scheduler.found_incoming(queue_id, world.clock.wall)
    elif queue is Queue.ACTIVE:
        world.scheduler.restore(queue_id)
    else:
        world.scheduler.found_deferred(queue_id, world.clock.wall)
    assert [job.queue_id for job in world.run()] == [healthy]
    assert world.where(queue_id) == ["corrupt"]
    assert [said[0] for said in world.events.about("damaged")] == [queue_id]


def test_a_job_that_waits_for_a_suspended_lane_when_its_message_is_found_damaged_is_dropped(world: World) -> None:
    for _ in range(5):
        world.enter("x@dead.test")
    world.deliver(DEAD)
    queue_id = world.enter("a@alive.test", "b@dead.test")  # the second goes to the backlog at once
    world.scheduler.dispatch(world.deliveries)
    [job] = world.deliveries.jobs
    world.finish(job, damaged="the checksum of the content is wrong")
    assert world.run() == []
    assert world.where(queue_id) == ["corrupt"]
    assert len(world.scheduler) == 0


def test_a_result_for_a_message_that_was_found_damaged_meanwhile_is_dropped(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@y.test")
    first, second = list(world.run())
    world.finish(first, damaged="the checksum of the content is wrong")
    world.finish(second, OK, unwritten=True)
    assert world.where(queue_id) == ["corrupt"]
    assert len(world.scheduler) == 0


def test_an_id_that_turns_up_in_a_second_queue_waits_for_the_first(world: World) -> None:
    queue_id = world.enter()
    copy = world.path(Queue.ACTIVE, queue_id).read_bytes()
    world.path(Queue.DEFERRED, queue_id).write_bytes(copy)
    world.scheduler._agenda.set(queue_id, 0.0)
    assert len(world.run()) == 1
    assert world.where(queue_id) == ["active", "deferred"]


def test_damage_that_is_found_while_noting_why_a_message_waits(world: World) -> None:
    ids = [world.enter() for _ in range(7)]  # five are tried, two wait for them
    world.run()
    damage(world, ids[5])
    world.deliver(DEAD)
    world.run()
    assert [world.where(queue_id) for queue_id in ids] == [["deferred"]] * 5 + [["corrupt"], ["deferred"]]
    assert len(world.scheduler) == 0


def test_an_administrator_may_remove_a_message_at_any_time(world: World) -> None:
    in_flight, waiting, dying = world.enter("a@x.test"), world.enter("a@y.test"), world.enter("a@z.test")
    flying, _, _ = list(world.run())
    for queue_id in (in_flight, waiting, dying):
        world.path(Queue.ACTIVE, queue_id).unlink()
    world.deliveries.jobs.remove(flying)
    world.deliveries.jobs.insert(2, flying)
    die(world, 1)
    assert len(world.scheduler) == 2
    for job in list(world.deliveries.jobs):
        world.finish(job, LATER, unwritten=True)
    assert len(world.scheduler) == 0
    assert world.run() == []


# -- a disk that refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "outcome", "ends"), [("remove", OK, []), ("defer", LATER, ["deferred"])], ids=["remove", "defer"]
)
def test_a_message_that_cannot_leave_active_stays_in_hand_until_it_can(
    world: World, method: str, outcome: object, ends: list[str]
) -> None:
    queue_id = world.enter()
    allow = refuse(world.spool, method, READ_ONLY)
    world.deliver(outcome)  # type: ignore[arg-type]
    assert world.events.about("removed") == []
    for _ in range(3):
        world.scheduler.restore(queue_id)  # the scan comes by
        assert world.run() == [], "nobody delivers it again"
        world.clock.advance(PAUSE)
    assert world.where(queue_id) == ["active"]
    allow()
    assert world.run() == []
    assert world.where(queue_id) == ends
    assert len(world.scheduler) == 0
    if ends:
        world.clock.advance(400)
        assert [job.queue_id for job in world.run()] == [queue_id], "on the agenda without a scan"


def test_a_new_message_that_cannot_be_claimed_waits_and_nothing_piles_up(world: World) -> None:
    allow = refuse(world.spool, "claim", READ_ONLY)
    queue_id = world.enter()
    for _ in range(100):
        world.scheduler.found_incoming(queue_id, world.clock.wall)
        world.scheduler.turn()
        world.clock.advance(5)
    assert len(world.scheduler._moves) == 1
    assert len(world.events.about("warning")) <= 51
    allow()
    world.clock.advance(PAUSE)
    assert [job.queue_id for job in world.run()] == [queue_id]


def test_a_deferred_message_that_cannot_be_claimed_waits_without_a_busy_loop(world: World) -> None:
    queue_id = world.enter()
    world.deliver(LATER)
    world.clock.advance(400)
    allow = refuse(world.spool, "claim", READ_ONLY)
    assert world.run() == []
    world.scheduler.found_deferred(queue_id, world.clock.wall)
    assert world.scheduler.wait() == PAUSE
    world.clock.advance(PAUSE)
    allow()
    assert [job.queue_id for job in world.run()] == [queue_id]


def test_a_double_bounce_that_cannot_be_held_stays_in_hand(world: World) -> None:
    queue_id = world.enter("root@example.org", sender="", kind="double-bounce")
    allow = refuse(world.spool, "hold", READ_ONLY)
    world.deliver(NEVER)
    assert world.events.about("held") == []
    allow()
    world.clock.advance(PAUSE)
    world.run()
    assert world.where(queue_id) == ["hold"]


def test_a_message_of_active_that_cannot_be_read_is_tried_again_once(world: World) -> None:
    queue_id = world.place(Queue.ACTIVE)
    allow = refuse(world.spool, "load", OSError(5, "Input/output error"))
    assert world.scheduler.restore(queue_id) is True
    assert world.where(queue_id) == ["active"], "the disk's fault is no damage"
    world.clock.advance(PAUSE)
    world.run()
    allow()
    world.scheduler.restore(queue_id)
    assert world.run() == []
    world.clock.advance(PAUSE)
    with world.spool.open(Queue.ACTIVE, queue_id):
        assert world.run() == [], "still held by a delivery"
    world.clock.advance(PAUSE)
    assert [job.queue_id for job in world.run()] == [queue_id]


def test_a_new_file_that_cannot_be_read_is_left_for_the_next_scan(world: World) -> None:
    queue_id = world.enter(wake=False)
    allow = refuse(world.spool, "load", OSError(5, "Input/output error"))
    world.scheduler.found_incoming(queue_id, world.clock.wall)
    assert world.where(queue_id) == ["incoming"]
    allow()
    world.scheduler.found_incoming(queue_id, world.clock.wall)
    assert [job.queue_id for job in world.run()] == [queue_id]


def test_half_a_message_that_cannot_be_swept_is_left_for_the_next_scan(world: World) -> None:
    queue_id = world.envelope().id
    world.path(Queue.INCOMING, queue_id).write_bytes(b"")
    allow = refuse(world.spool, "sweep", READ_ONLY)
    world.scheduler.found_incoming(queue_id, 0.0)
    assert world.where(queue_id) == ["incoming"]
    allow()
    world.scheduler.found_incoming(queue_id, 0.0)
    assert world.where(queue_id) == []


def test_a_reason_that_cannot_be_noted_stops_nothing(world: World) -> None:
    queue_id = world.enter()
    refuse(world.spool, "append", OSError(28, "No space left on device"))
    world.run()
    die(world, 0)
    world.run()
    die(world, 0)
    assert world.where(queue_id) == ["deferred"]


@pytest.mark.parametrize("outcomes", [(OK, LATER), (NEVER, LATER), (NEVER, OK)], ids=["sent", "failed", "both"])
def test_what_could_not_be_written_down_is_made_good_before_the_message_moves_on(
    world: World, monkeypatch: pytest.MonkeyPatch, outcomes: tuple[object, object]
) -> None:
    """A full disk must not make a delivered recipient get a second copy, nor a failed one be forgotten."""
    queue_id = world.enter("a@x.test", "b@x.test")
    append = OpenMessage.append
    monkeypatch.setattr(OpenMessage, "append", full)
    [job] = world.run()
    world.finish(job, *outcomes, unwritten=True)  # type: ignore[arg-type]
    assert world.where(queue_id) == ["active"]
    world.clock.advance(PAUSE)
    assert world.run() == []
    monkeypatch.setattr(OpenMessage, "append", append)
    world.clock.advance(PAUSE)
    jobs = world.run()
    [path] = [world.path(queue, queue_id) for queue in Queue if world.path(queue, queue_id).exists()]
    states = world.load(Queue(path.parent.name), queue_id).states
    assert tuple(state.outcome for state in states) == outcomes
    assert [one.transport for one in jobs] == (["bounce"] if NEVER in outcomes else [])


def full(*_: object, **__: object) -> None:
    """A disk that takes nothing."""
    raise OSError(28, "No space left on device")


def test_who_ends_writes_down_for_the_last_time_what_was_not_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has healed, and the pause until the next try is not over: a stop or a reload in between forgets nothing."""
    queue_id = world.enter("a@x.test", "b@x.test")
    with monkeypatch.context() as patch:
        patch.setattr(OpenMessage, "append", full)
        [job] = world.run()
        world.finish(job, OK, LATER, unwritten=True)
        world.scheduler.put_down()
        [warning] = [text for (text,) in world.events.about("warning") if "who has the message" in text]
        assert warning.startswith(f"{queue_id}: cannot be noted in the queue file, ")
    world.scheduler.put_down()
    assert [state.settled for state in world.load(Queue.ACTIVE, queue_id).states] == [True, False]


def test_what_comes_after_a_handover_and_was_not_written_is_written_then(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@x.test")
    [job] = world.run()
    outcomes = ((0, OK), (1, LATER))
    world.scheduler.late(job, Result(job.number, outcomes))
    assert not any(state.settled for state in world.load(Queue.ACTIVE, queue_id).states)
    world.scheduler.late(job, Result(job.number, outcomes, unwritten=True))
    assert [state.settled for state in world.load(Queue.ACTIVE, queue_id).states] == [True, False]


def test_a_message_that_is_done_needs_no_record_of_it(world: World) -> None:
    queue_id = world.enter()
    refuse(world.spool, "open", OSError(28, "No space left on device"))
    [job] = world.run()
    world.finish(job, OK, unwritten=True)
    assert world.where(queue_id) == []


def test_what_was_not_written_down_survives_the_death_of_another_process(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@y.test")
    first, _ = list(world.run())
    world.finish(first, OK, unwritten=True)
    die(world, 0)
    [again] = world.run()
    assert (again.queue_id, again.recipients) == (queue_id, (1,))
    world.finish(again, LATER)
    assert [state.settled for state in world.load(Queue.DEFERRED, queue_id).states] == [True, False]


# -- clocks -----------------------------------------------------------------------------------------------------------


def test_a_clock_that_is_set_back_does_not_stop_repetitions(world: World) -> None:
    allow = refuse(world.spool, "claim", READ_ONLY)
    queue_id = world.enter()
    world.clock.wall -= 86400
    allow()
    world.clock.monotonic += PAUSE
    assert [job.queue_id for job in world.run()] == [queue_id]


def test_a_clock_that_jumps_ahead_makes_everything_due_and_nothing_is_lost(tmp_path: Path) -> None:
    world = World(tmp_path, retry=Retry(minimum=Duration(300), lifetime=Duration(86400)))
    ids = [world.enter(f"a@d{number}.test") for number in range(3)]
    world.deliver(LATER)
    world.clock.wall += 7200
    assert sorted(job.queue_id for job in world.run()) == ids
