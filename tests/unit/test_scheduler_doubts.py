"""Recipients in doubt (issue 5): found after a crash, named once, tried again or held for a human."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from mtad.delivery.jobs import Job
from mtad.desk import Order, Ordered, OrderName
from mtad.outcome import Attempt, Delivered, Failed
from mtad.progress import CUT, REPORT, Doubt, Event, Instructed, Named, RecipientState
from mtad.scheduler.moves import PAUSE
from mtad.spool.queues import Queue
from tests.unit.scheduler_aid import DEAD, LATER, NEVER, OK, RETRY, START, World, refuse

MX = "mx.far.test"
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def make(root: Path, on_doubt: Literal["retry", "hold"]) -> World:
    return World(root, retry=msgspec.structs.replace(RETRY, on_doubt=on_doubt))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = make(tmp_path, "hold")
    yield world
    world.spool.close()


@pytest.fixture
def retrying(tmp_path: Path) -> Iterator[World]:
    world = make(tmp_path, "retry")
    yield world
    world.spool.close()


def doubt(*recipients: int, host: str = MX) -> Doubt:
    return Doubt(START, recipients or (0,), host)


def restart(world: World, queue_id: str, on_doubt: Literal["retry", "hold", ""] = "") -> list[Job]:
    """The next scheduler, perhaps with another setting, finds the message in active; the jobs that it starts."""
    if on_doubt:
        retry = msgspec.structs.replace(world.config.retry, on_doubt=on_doubt)
        world.config = msgspec.structs.replace(world.config, retry=retry)
    world.start()
    assert world.scheduler.restore(queue_id)
    return list(world.run())


def die(world: World, job: Job) -> None:
    """The process that has the job is gone, right after the final dot."""
    world.spool.append(Queue.ACTIVE, job.queue_id, Doubt(world.clock.wall, job.recipients, MX))
    world.deliveries.jobs.remove(job)
    world.scheduler.died([job], "killed by SIGKILL")


def order(world: World, what: OrderName, queue_id: str) -> Ordered:
    return world.scheduler._orders.give(Order(what, (queue_id,)))


def named(world: World) -> list[tuple[str, ...]]:
    """Addresses and hosts of the doubts that were named, with "held" behind those that are."""
    return [said[1:] for said in world.events.about("in_doubt")]


def state(world: World, queue: Queue, queue_id: str, index: int = 0) -> RecipientState:
    return world.load(queue, queue_id).states[index]


# -- they are tried again ---------------------------------------------------------------------------------------------


def test_a_doubt_is_named_once_however_often_there_is_a_restart(retrying: World) -> None:
    queue_id = retrying.place(Queue.ACTIVE, "b@far.test", events=[doubt()])
    for _ in range(3):
        [job] = restart(retrying, queue_id)
    assert named(retrying) == [("b@far.test", MX)]
    die(retrying, job)
    assert named(retrying) == [("b@far.test", MX)] * 2, "a new one"


def test_what_was_put_off_without_a_host_is_still_in_doubt_and_not_named_again(retrying: World) -> None:
    queue_id = retrying.enter()
    for _ in range(2):
        [job] = retrying.run()
        die(retrying, job)
    assert retrying.where(queue_id) == ["deferred"], "two processes died with it"
    found = state(retrying, Queue.DEFERRED, queue_id)
    assert (found.doubt, found.named, found.held) == (MX, True, False)
    assert len(named(retrying)) == 2
    retrying.clock.advance(RETRY.minimum * 2)
    [job] = retrying.run()
    assert len(named(retrying)) == 2
    retrying.finish(job, OK)
    assert retrying.where(queue_id) == []


def test_a_doubt_that_a_disk_does_not_let_us_mark_delays_nothing(retrying: World) -> None:
    undo = refuse(retrying.spool, "append", NO_SPACE)
    queue_id = retrying.place(Queue.INCOMING, "b@far.test")
    undo()
    retrying.spool.append(Queue.INCOMING, queue_id, doubt())
    undo = refuse(retrying.spool, "append", NO_SPACE)
    retrying.scheduler.found_incoming(queue_id, retrying.clock.wall)
    [job] = retrying.run()
    undo()
    retrying.finish(job, OK)
    assert (named(retrying), retrying.where(queue_id)) == ([("b@far.test", MX)], [])


# -- they are held ----------------------------------------------------------------------------------------------------


def test_only_the_recipients_in_doubt_are_held_and_the_others_go_on(world: World) -> None:
    queue_id = world.place(Queue.ACTIVE, "a@far.test", "b@far.test", "c@far.test", events=[doubt(1)])
    [job] = restart(world, queue_id)
    assert job.recipients == (0, 2)
    assert named(world) == [("b@far.test", MX, "held")]
    world.finish(job, OK, LATER)
    assert world.where(queue_id) == ["deferred"]
    world.clock.advance(RETRY.minimum * 2)
    [job] = world.run()
    assert job.recipients == (2,)
    world.finish(job, OK)
    assert world.where(queue_id) == ["hold"], "nothing else is left"
    assert [said[0] for said in world.events.about("held")] == [queue_id]
    assert len(named(world)) == 1


def test_a_message_that_is_all_in_doubt_goes_on_hold_and_its_release_sends_it(world: World) -> None:
    queue_id = world.enter()
    [job] = world.run()
    die(world, job)
    assert world.run() == []
    assert world.where(queue_id) == ["hold"]
    assert order(world, "requeue", queue_id).refused == ((queue_id, "it is on hold; mtaq release tries it now"),)
    assert order(world, "release", queue_id) == Ordered(done=(queue_id,))
    [job] = world.run()
    world.finish(job, OK)
    assert world.where(queue_id) == []
    assert named(world) == [("b@far.test", MX, "held")]


def test_a_release_lets_those_go_that_are_held_in_a_message_that_waits_for_others(world: World) -> None:
    queue_id = world.place(Queue.ACTIVE, "a@far.test", "b@far.test", events=[doubt(1)])
    [job] = restart(world, queue_id)
    world.finish(job, LATER)
    assert world.where(queue_id) == ["deferred"]
    assert order(world, "release", queue_id) == Ordered(done=(queue_id,))
    [job] = world.run()
    assert job.recipients == (0, 1)
    assert order(world, "release", queue_id).refused == ((queue_id, "it is not on hold"),)


def test_a_release_while_others_are_in_delivery_is_done_after_that(world: World) -> None:
    queue_id = world.place(Queue.ACTIVE, "a@far.test", "b@far.test", events=[doubt(1)])
    [job] = restart(world, queue_id)
    assert order(world, "release", queue_id) == Ordered(later=(queue_id,))
    world.finish(job, OK)
    [job] = world.run()
    assert job.recipients == (1,)
    world.finish(job, OK)
    assert world.where(queue_id) == []


def test_a_release_while_the_others_wait_in_their_lane(world: World) -> None:
    world.deliveries.capacity = 0
    queue_id = world.place(Queue.ACTIVE, "a@far.test", "b@far.test", events=[doubt(1)])
    assert restart(world, queue_id) == []
    assert order(world, "release", queue_id) == Ordered(done=(queue_id,))
    world.deliveries.capacity = 9
    [job] = world.run()
    assert job.recipients == (0, 1)


@pytest.mark.parametrize("queue", [Queue.DEFERRED, Queue.HOLD, Queue.ACTIVE])
def test_what_is_held_stays_held_over_restarts_and_with_another_setting(world: World, queue: Queue) -> None:
    queue_id = world.place(Queue.ACTIVE, "a@far.test", "b@far.test", events=[doubt(1)])
    [job] = restart(world, queue_id)
    for _ in range(2):
        [job] = restart(world, queue_id, "retry")
        assert job.recipients == (0,)
    if queue is not Queue.ACTIVE:
        world.finish(job, OK if queue is Queue.HOLD else LATER)
        world.start()
    assert world.where(queue_id) == [queue.value]
    assert state(world, queue, queue_id, 1).held
    assert len(named(world)) == 1


def test_who_was_to_be_tried_again_is_held_when_the_setting_says_so_before_that(retrying: World) -> None:
    retrying.deliveries.capacity = 0
    queue_id = retrying.place(Queue.ACTIVE, events=[doubt()])
    assert restart(retrying, queue_id) == []
    assert restart(retrying, queue_id, "hold") == []
    assert retrying.where(queue_id) == ["hold"]
    assert named(retrying) == [("b@far.test", MX), ("b@far.test", MX, "held")]


def test_who_was_released_and_cannot_be_tried_is_not_held_again(world: World) -> None:
    queue_id = world.place(Queue.ACTIVE, events=[doubt()])
    assert restart(world, queue_id) == []
    for _ in range(5):
        world.enter("x@far.test")
    world.deliver(DEAD)  # far.test is suspended
    world.spool.append(Queue.HOLD, queue_id, Instructed(START, "release", done=True))
    world.spool.append(Queue.HOLD, queue_id, Attempt(START, ((0, DEAD),)))
    os.rename(world.path(Queue.HOLD, queue_id), world.path(Queue.ACTIVE, queue_id))
    [job] = restart(world, queue_id)
    assert job.recipients == (0,)
    found = state(world, Queue.ACTIVE, queue_id)
    assert (found.doubt, found.held, found.released) == (MX, False, True)


def test_a_later_doubt_holds_a_released_one_again(world: World) -> None:
    queue_id = world.enter()
    for _ in range(2):
        [job] = world.run()
        die(world, job)
        assert world.where(queue_id) == ["hold"]
        order(world, "release", queue_id)
    assert len(world.run()) == 1


def test_what_is_held_does_not_expire_and_what_is_not_does(world: World) -> None:
    arrival = world.clock.wall - RETRY.lifetime
    queue_id = world.place(Queue.ACTIVE, "a@far.test", "b@far.test", events=[doubt(1)], arrival=arrival)
    [job] = restart(world, queue_id)
    world.finish(job, LATER)
    [report] = world.run()
    assert (report.transport, report.recipients) == ("bounce", (0,))
    world.report(report)
    assert world.where(queue_id) == ["hold"]


@pytest.mark.parametrize("what", ["expire", "bounce"])
def test_held_ones_can_be_sent_back(world: World, what: OrderName) -> None:
    queue_id = world.place(Queue.ACTIVE, "a@far.test", "b@far.test", events=[doubt()])
    [job] = restart(world, queue_id)
    world.finish(job, OK)
    assert world.where(queue_id) == ["hold"]
    assert order(world, what, queue_id) == Ordered(done=(queue_id,))
    [report] = world.run()
    assert (report.transport, report.recipients) == ("bounce", (0,))
    world.report(report)
    assert world.where(queue_id) == []


def test_a_report_in_doubt_is_made_again_and_not_held(world: World) -> None:
    queue_id = world.place(Queue.ACTIVE, events=[Attempt(START, ((0, NEVER),), MX), doubt(host=REPORT)])
    [report] = restart(world, queue_id)
    assert report.transport == "bounce"
    assert named(world) == [("b@far.test", REPORT)]
    assert len(restart(world, queue_id)) == 1
    assert len(named(world)) == 1


@pytest.mark.parametrize("last", [OK, NEVER])
def test_a_doubt_that_was_resolved_is_none(world: World, last: Delivered | Failed) -> None:
    events: list[Event] = [doubt(), Attempt(START, ((0, last),), MX)]
    world.scheduler.restore(world.place(Queue.ACTIVE, events=events))
    world.run()
    assert named(world) == []
    assert world.events.about("held") == []


def test_a_full_disk_does_not_let_one_in_doubt_slip_through(world: World) -> None:
    queue_id = world.place(Queue.ACTIVE, "a@far.test", "b@far.test", events=[doubt(1)])
    undo = [refuse(world.spool, "append", NO_SPACE), refuse(world.spool, "open", NO_SPACE)]
    [job] = restart(world, queue_id)
    assert job.recipients == (0,)
    finish(world, job, undo)
    world.clock.advance(PAUSE + 1)
    world.run()
    assert world.where(queue_id) == ["hold"], "it was written down before"
    assert state(world, Queue.HOLD, queue_id, 1).held


def test_a_release_is_not_undone_by_what_a_full_disk_has_delayed(world: World) -> None:
    queue_id = world.place(Queue.ACTIVE, "a@far.test", "b@far.test", events=[doubt(1)])
    undo = [refuse(world.spool, "append", NO_SPACE), refuse(world.spool, "open", NO_SPACE)]
    [job] = restart(world, queue_id)
    [(_, why)] = order(world, "release", queue_id).refused
    assert why == "the spool cannot be changed: No space left on device"
    for one in undo:
        one()
    assert order(world, "release", queue_id) == Ordered(later=(queue_id,))
    world.finish(job, OK)
    [job] = world.run()
    assert job.recipients == (1,)


def finish(world: World, job: Job, undo: list[Callable[[], None]]) -> None:
    """A job ends and its outcome can be written; then the disk refuses no more."""
    for one in undo:
        one()
    moves = refuse(world.spool, "hold", NO_SPACE)
    world.finish(job, OK)
    assert world.where(job.queue_id) == ["active"]
    moves()


# -- a power cut ------------------------------------------------------------------------------------------------------


def cut(world: World, queue: Queue, *recipients: str, events: tuple[Event, ...] = ()) -> str:
    """A message whose last record is gone: the file has its length, and nothing in it."""
    queue_id = world.place(queue, *recipients, events=events)
    with open(world.path(queue, queue_id), "ab") as file:
        file.write(bytes(70))
    return queue_id


def test_who_may_have_it_since_a_power_cut_took_the_record_is_named_once(retrying: World) -> None:
    queue_id = cut(retrying, Queue.ACTIVE, "a@far.test", "b@far.test", events=(Attempt(START, ((0, OK),), MX),))
    for _ in range(2):
        [job] = restart(retrying, queue_id)
        assert job.recipients == (1,)
    assert named(retrying) == [("b@far.test", CUT)]
    assert retrying.load(Queue.ACTIVE, queue_id).events[-2:] == (Doubt(START, (1,), CUT), Named(START, (1,)))


def test_a_doubt_that_is_there_is_not_told_twice_for_a_power_cut(retrying: World) -> None:
    queue_id = cut(retrying, Queue.ACTIVE, "a@far.test", events=(doubt(),))
    assert len(restart(retrying, queue_id)) == 1
    assert named(retrying) == [("a@far.test", MX)]


def test_a_power_cut_holds_what_it_has_put_in_doubt(world: World) -> None:
    queue_id = cut(world, Queue.INCOMING)
    world.scheduler.found_incoming(queue_id, world.clock.wall)
    assert world.run() == []
    assert world.where(queue_id) == ["hold"]
    assert named(world) == [("b@far.test", CUT, "held")]
    order(world, "release", queue_id)
    assert len(world.run()) == 1


def at(world: World, queue: Queue, queue_id: str, when: float) -> str:
    """The time of the file is set; its queue id."""
    os.utime(world.path(queue, queue_id), (when, when))
    return queue_id


def test_what_a_cut_may_have_brought_back_is_named_once(retrying: World) -> None:
    early, cut_at = START - 3600, START - 100
    place = retrying.place
    removed = at(retrying, Queue.ACTIVE, place(Queue.ACTIVE, "a@far.test", arrival=early), early)
    claimed = at(retrying, Queue.INCOMING, place(Queue.INCOMING, "b@far.test", arrival=early), early)
    due = at(retrying, Queue.DEFERRED, place(Queue.DEFERRED, "c@far.test", arrival=early), cut_at - 1)
    waiting = at(retrying, Queue.DEFERRED, place(Queue.DEFERRED, "d@far.test", arrival=early), cut_at + 1)
    fresh = place(Queue.INCOMING, "e@far.test", arrival=START)
    for _ in range(2):
        retrying.start()
        retrying.scheduler.begin(cut_at)
        for queue_id in (removed, claimed, due):
            retrying.scheduler.restore(queue_id)
        retrying.scheduler.found_incoming(claimed, early)
        retrying.scheduler.found_incoming(fresh, START)
        for queue_id in (due, waiting):
            retrying.scheduler.found_deferred(queue_id, cut_at)
        retrying.run()
    assert sorted(named(retrying)) == [("a@far.test", CUT), ("b@far.test", CUT), ("c@far.test", CUT)]
    assert {job.queue_id for job in retrying.deliveries.log} == {removed, claimed, due, waiting, fresh}


def test_who_is_done_is_not_put_in_doubt_by_a_cut(retrying: World) -> None:
    early = START - 3600
    done = Attempt(early, ((0, OK),), MX)
    queue_id = retrying.place(Queue.ACTIVE, "a@far.test", "b@far.test", events=[done], arrival=early)
    at(retrying, Queue.ACTIVE, queue_id, early)
    retrying.scheduler.begin(START - 100)
    retrying.scheduler.restore(queue_id)
    assert named(retrying) == [("b@far.test", CUT)]


def test_a_file_that_cannot_be_looked_at_is_not_put_in_doubt(retrying: World) -> None:
    queue_id = retrying.place(Queue.ACTIVE, arrival=START - 3600)
    retrying.scheduler.begin(START)
    undo = refuse(retrying.spool, "changed", NO_SPACE)
    retrying.scheduler.restore(queue_id)
    undo()
    assert (named(retrying), len(retrying.run())) == ([], 1)
