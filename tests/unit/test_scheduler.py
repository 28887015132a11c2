"""The scheduler's decisions: the life of a message, with a real spool, clocks that stand still, and deliveries by hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtad.config import Delivery
from mtad.delivery.jobs import Result
from mtad.outcome import Deferred, Failed, Outcome
from mtad.progress import Reported
from mtad.scheduler.scheduler import ACTIVE_LIMIT, TURN
from mtad.spool.queues import Queue
from tests.unit.scheduler_aid import LATER, NEVER, OK, RETRY, World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)  # what is durable is tested elsewhere
    world = World(tmp_path)
    yield world
    world.spool.close()


# -- the way through --------------------------------------------------------------------------------------------------


def test_a_message_goes_through(world: World) -> None:
    queue_id = world.enter("b@far.test")
    assert world.where(queue_id) == ["active"]
    [job] = world.run()
    assert (job.queue_id, job.transport, job.destination, job.recipients) == (queue_id, "smtp", "far.test", (0,))
    assert job.active == world.clock.wall
    world.finish(job, OK)
    assert world.where(queue_id) == []
    assert world.events.said == [("active", queue_id), ("removed", queue_id)]
    assert len(world.scheduler) == 0
    assert world.scheduler._jobs == {}


def test_recipients_of_one_destination_share_a_job(world: World) -> None:
    world.enter("a@x.test", "root@EXAMPLE.org", "b@X.test", "c@y.test", "postmaster")
    jobs = {(job.transport, job.destination): job.recipients for job in world.run()}
    assert jobs == {("smtp", "x.test"): (0, 2), ("local", ""): (1, 4), ("smtp", "y.test"): (3,)}


def test_at_most_fifty_recipients_are_one_job(world: World) -> None:
    world.enter(*(f"u{number}@x.test" for number in range(101)))
    assert [len(job.recipients) for job in world.run()] == [50, 50, 1]


def test_a_smarthost_is_one_destination_for_all_remote_mail(tmp_path: Path) -> None:
    world = World(tmp_path, delivery=Delivery(next_hop="[127.0.0.1]:2500"))
    world.enter("a@x.test", "b@y.test", "root@example.org")
    jobs = {(job.transport, job.destination): job.recipients for job in world.run()}
    assert jobs == {("smtp", "[127.0.0.1]:2500"): (0, 1), ("local", ""): (2,)}


def test_a_message_is_settled_when_its_last_job_is_done(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@y.test")
    first, second = list(world.run())
    world.finish(first, OK)
    assert world.where(queue_id) == ["active"]
    world.finish(second, LATER)
    assert world.where(queue_id) == ["deferred"]
    assert [state.settled for state in world.load(Queue.DEFERRED, queue_id).states] == [True, False]


# -- later ------------------------------------------------------------------------------------------------------------


def test_the_next_attempt_is_the_mtime_of_the_file(world: World) -> None:
    queue_id = world.enter(arrival=world.clock.wall - 1000)
    world.deliver(LATER)
    due = world.path(Queue.DEFERRED, queue_id).stat().st_mtime
    assert world.clock.wall + 1000 <= due <= world.clock.wall + 1100
    wait = world.scheduler.wait()
    assert wait is not None
    assert wait == pytest.approx(due - world.clock.wall)
    world.clock.advance(wait - 0.01)
    assert world.run() == []
    world.clock.advance(0.02)
    [job] = world.run()
    assert job.queue_id == queue_id
    assert world.where(queue_id) == ["active"]


def test_only_what_is_left_is_tried_again(world: World) -> None:
    world.enter("a@x.test", "b@x.test", "c@x.test")
    [job] = world.run()
    world.finish(job, OK, LATER, LATER)
    world.clock.advance(400)
    [again] = world.run()
    assert again.recipients == (1, 2)


def test_deferred_messages_are_found_by_the_scan(world: World) -> None:
    queue_id = world.place(Queue.DEFERRED)
    world.scheduler.found_deferred(queue_id, world.clock.wall + 50)
    assert world.run() == []
    world.clock.advance(50)
    assert [job.queue_id for job in world.run()] == [queue_id]


def test_a_time_further_away_than_any_policy_wants_is_brought_near(world: World) -> None:
    # The clock was a year ahead when the message was deferred.
    queue_id = world.place(Queue.DEFERRED)
    for _ in range(20):
        world.scheduler.found_deferred(queue_id, world.clock.wall + 365 * 86400)
        assert world.run() == []
        world.clock.advance(RETRY.maximum * 1.1 / 20)
    assert [job.queue_id for job in world.run()] == [queue_id]


def test_a_deferred_file_that_is_gone_when_it_is_due_is_nothing(world: World) -> None:
    world.scheduler.found_deferred("0123456789zabc", world.clock.wall)
    assert world.run() == []
    assert world.scheduler.wait() is None


def test_one_turn_takes_a_bounded_number_of_deferred_messages(world: World) -> None:
    for _ in range(TURN + 1):
        world.scheduler.found_deferred(world.place(Queue.DEFERRED), world.clock.wall)
    assert world.scheduler.turn() is True
    assert len(world.scheduler) == TURN
    assert world.scheduler.turn() is False
    assert len(world.scheduler) == TURN + 1


def test_with_too_much_in_hand_deferred_ones_wait_and_new_ones_do_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtad.scheduler.scheduler.ACTIVE_LIMIT", 2)
    assert ACTIVE_LIMIT == 20000
    world.enter()
    world.enter()
    waiting = world.place(Queue.DEFERRED)
    world.scheduler.found_deferred(waiting, world.clock.wall)
    world.enter()
    assert len(world.run()) == 3
    assert world.scheduler.wait() is None, "a loop that waits for room must not spin"
    for job in list(world.deliveries.jobs)[:2]:
        world.finish(job, OK)
    assert waiting in [job.queue_id for job in world.run()]


def test_a_flush_tries_now(world: World) -> None:
    queue_id = world.enter()
    world.deliver(LATER)
    world.scheduler.flush([queue_id])
    assert world.scheduler.wait() == 0.0
    [job] = world.run()
    assert job.queue_id == queue_id
    world.scheduler.flush([queue_id])  # it is in hand already
    world.finish(job, OK)
    assert world.run() == []
    assert not world.scheduler._urgent


def test_a_flush_of_what_is_not_there_leaves_nothing_behind(world: World) -> None:
    world.scheduler.flush(["0123456789zabc"])
    world.run()
    assert not world.scheduler._urgent
    assert world.scheduler.wait() is None


# -- failures ---------------------------------------------------------------------------------------------------------


def test_failed_recipients_are_reported_together_and_once(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@y.test", "c@z.test")
    for job, outcome in zip(list(world.run()), (NEVER, OK, NEVER), strict=True):
        world.finish(job, outcome)
    [bounce] = world.run()
    assert (bounce.transport, bounce.destination, bounce.recipients) == ("bounce", "", (0, 2))
    world.report(bounce, "R1")
    assert world.where(queue_id) == []
    assert world.events.about("reported") == [(queue_id, "R1")]
    assert world.events.about("expired") == []


def test_the_failed_are_reported_while_others_wait(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@y.test")
    first, second = list(world.run())
    world.finish(first, NEVER)
    assert world.run() == [second], "one report for all that fail together"
    world.finish(second, LATER)
    [bounce] = world.run()
    assert bounce.recipients == (0,)
    world.report(bounce)
    assert world.where(queue_id) == ["deferred"]
    world.clock.advance(400)
    [again] = world.run()
    assert again.recipients == (1,)


def test_an_expired_message_bounces_after_its_last_attempt(world: World) -> None:
    queue_id = world.enter(arrival=world.clock.wall - RETRY.lifetime)
    world.deliver(LATER)
    [bounce] = world.run()
    assert bounce.transport == "bounce"
    assert world.events.about("expired") == [(queue_id,)]
    world.report(bounce)
    assert world.where(queue_id) == []


@pytest.mark.parametrize("queue", [Queue.INCOMING, Queue.ACTIVE, Queue.DEFERRED])
def test_a_message_past_its_lifetime_bounces_from_wherever_it_is_found(world: World, queue: Queue) -> None:
    queue_id = world.place(queue, arrival=world.clock.wall - 10 * RETRY.lifetime)
    if queue is Queue.INCOMING:
        world.scheduler.found_incoming(queue_id, world.clock.wall)
    elif queue is Queue.ACTIVE:
        world.scheduler.restore(queue_id)
    else:
        world.scheduler.found_deferred(queue_id, world.clock.wall)
    world.deliver(LATER)
    [bounce] = world.run()
    assert bounce.transport == "bounce"


def test_a_report_that_cannot_be_stored_is_tried_when_the_message_is_next_due(world: World) -> None:
    queue_id = world.enter()
    world.deliver(NEVER)
    [bounce] = world.run()
    world.finish(bounce)
    assert world.where(queue_id) == ["deferred"]
    world.clock.advance(RETRY.minimum)
    [again] = world.run()
    assert again.transport == "bounce"


def test_what_the_report_does_not_mention_is_not_taken_for_reported(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@x.test")
    world.deliver(NEVER)
    [bounce] = world.run()
    world.finish(bounce, reports=(Reported(1.0, (0,), "R1"),))
    [rest] = world.run()
    assert rest.recipients == (1,)
    assert world.where(queue_id) == ["active"]


def test_a_double_bounce_that_fails_is_held_for_a_human(world: World) -> None:
    queue_id = world.enter("root@example.org", sender="", kind="double-bounce")
    world.deliver(NEVER)
    assert world.run() == []
    assert world.where(queue_id) == ["hold"]
    [(held, why)] = world.events.about("held")
    assert held == queue_id
    assert "postmaster" in why
    assert len(world.scheduler) == 0


def test_many_outcomes_at_once_are_a_plain_table(world: World) -> None:
    """Every combination of three outcomes of two jobs ends in the queue where it belongs."""
    ends: dict[tuple[str, str], list[str]] = {}
    outcomes: dict[str, Outcome] = {"sent": OK, "later": LATER, "never": NEVER}
    for one, first in outcomes.items():
        for two, second in outcomes.items():
            queue_id = world.enter("a@x.test", "b@y.test")
            given: list[Outcome] = [first, second]
            for job, outcome in zip(list(world.run()), given, strict=True):
                world.finish(job, outcome)
            for job in list(world.run()):
                world.report(job)
            ends[one, two] = world.where(queue_id)
    assert {pair for pair, where in ends.items() if where == ["deferred"]} == {
        ("sent", "later"), ("later", "sent"), ("later", "later"), ("never", "later"), ("later", "never")
    }  # fmt: skip
    assert all(where in ([], ["deferred"]) for where in ends.values())


def test_a_history_ends_with_what_the_last_attempt_brought(world: World) -> None:
    queue_id = world.enter()
    world.deliver(LATER)
    world.clock.advance(400)
    world.deliver(Deferred("4.2.0", "another reason"))
    [state] = world.load(Queue.DEFERRED, queue_id).states
    assert isinstance(state.outcome, Deferred | Failed)
    assert state.outcome.text == "another reason"


@pytest.mark.parametrize("pick", [lambda jobs: jobs, lambda jobs: jobs[::-1]], ids=["in order", "reversed"])
def test_nothing_is_kept_of_what_is_done(world: World, pick: Callable[[list[object]], list[object]]) -> None:
    for number in range(30):
        world.enter(f"a@d{number % 3}.test", "b@x.test", "root@example.org")
    while jobs := list(world.run()):
        for job in pick(jobs):  # type: ignore[arg-type]
            world.finish(job, OK)  # type: ignore[arg-type]
    scheduler = world.scheduler
    assert (scheduler._messages, scheduler._jobs, len(scheduler._backlog), scheduler._urgent) == ({}, {}, 0, set())
    with pytest.raises(KeyError):
        scheduler.result(Result(1))
