"""Lanes: who is served next, how many at a time, and what becomes of those whose destination is dead."""

from __future__ import annotations

import pytest

from mtad.outcome import Deferred, Delivered, Failed
from mtad.scheduler.budgets import INITIAL_WINDOW, SLOWLY
from mtad.scheduler.destinations import destination_failure, less_wanted
from mtad.scheduler.lane import Lane
from mtad.scheduler.lanes import DEAD_LANE, REFUSALS, Lanes
from mtad.scheduler.line import LaneJob
from tests.unit.lanes_aid import BUSY, DEAD, SLOWER, drain, job, key, lanes_of, mailing, take


def test_nothing_to_take_from_no_lanes() -> None:
    lanes = lanes_of(20, 60.0)
    assert lanes.take(0.0) is None
    assert len(lanes) == 0


def test_lanes_take_turns_however_long_one_is() -> None:
    lanes = lanes_of(20, 60.0)
    for number in range(1000):
        lanes.add(key("big"), job(f"big{number}"), 0.0)
    lanes.add(key("small"), job("small"), 0.0)
    first, second = take(lanes), take(lanes)
    assert [lane.key.destination for lane, _ in (first, second)] == ["big", "small"]
    assert first[1].message.id == "big0"


def test_a_lane_is_served_in_the_order_of_arrival() -> None:
    lanes = lanes_of(20, 60.0)
    for number in range(3):
        lanes.add(key("a"), job(str(number)), 0.0)
    assert [taken.message.id for _, taken in drain(lanes)] == ["0", "1", "2"]


def test_a_window_starts_small_and_opens_with_success_up_to_the_limit() -> None:
    lanes = lanes_of(7, 60.0)
    for number in range(100):
        lanes.add(key("a"), job(str(number)), 0.0)
    flying = drain(lanes)
    assert len(flying) == INITIAL_WINDOW
    for expected in (6, 7, 7, 7):
        lane, ended = flying.pop()
        assert lanes.done(lane, ended, 0.0) == []
        flying += drain(lanes)
        assert len(flying) == lane.budget.in_flight == expected


def test_the_limit_bounds_the_first_window_too() -> None:
    lanes = lanes_of(2, 60.0)
    for number in range(9):
        lanes.add(key("a"), job(str(number)), 0.0)
    assert len(drain(lanes)) == 2


def test_failures_of_the_destination_close_the_window_and_hand_back_what_waits() -> None:
    lanes = lanes_of(20, 60.0)
    for number in range(8):
        lanes.add(key("a"), job(str(number)), 0.0)
    flying = drain(lanes)
    for lane, ended in flying[:-1]:
        assert lanes.done(lane, ended, 10.0, failure=DEAD) == []
        assert lanes.take(0.0) is None
    lane, last = flying[-1]
    assert [waiting.message.id for waiting in lanes.done(lane, last, 10.0, failure=DEAD)] == ["5", "6", "7"]
    assert lane.suspended
    assert lane.reason is DEAD
    assert lanes.take(0.0) is None


@pytest.fixture
def suspended() -> tuple[Lanes, Lane]:
    """A lane that failed at time 10 and is left alone for 60 seconds."""
    lanes = lanes_of(20, 60.0)
    for _ in range(INITIAL_WINDOW):
        lanes.add(key("a"), job(), 0.0)
    flying = drain(lanes)
    for lane, ended in flying:
        lanes.done(lane, ended, 10.0, failure=DEAD)
    return lanes, flying[0][0]


def test_a_suspended_lane_answers_with_the_reason(suspended: tuple[Lanes, Lane]) -> None:
    lanes, _ = suspended
    assert lanes.add(key("a"), job(), 69.9) is DEAD
    assert lanes.take(0.0) is None


def test_after_the_pause_one_probe_is_let_through(suspended: tuple[Lanes, Lane]) -> None:
    lanes, lane = suspended
    for number in range(3):
        assert lanes.add(key("a"), job(str(number)), 70.0) is None
    _, probe = take(lanes)
    assert lanes.take(0.0) is None
    assert [waiting.message.id for waiting in lanes.done(lane, probe, 71.0, failure=DEAD)] == ["1", "2"]
    assert lane.suspended
    assert (lane.suspended_since, lane.suspended_until) == (10.0, 131.0)


def test_a_probe_that_succeeds_opens_the_lane(suspended: tuple[Lanes, Lane]) -> None:
    lanes, lane = suspended
    for number in range(4):
        lanes.add(key("a"), job(str(number)), 70.0)
    _, probe = take(lanes)
    assert lanes.done(lane, probe, 71.0) == []
    assert not lane.suspended
    assert lane.suspended_since == 0.0
    assert len(drain(lanes)) == 2, "in steps, not at once"


def test_an_urgent_job_does_not_wait_for_the_pause(suspended: tuple[Lanes, Lane]) -> None:
    lanes, _ = suspended
    assert lanes.add(key("a"), job("now"), 11.0, urgent=True) is None
    assert take(lanes)[1].message.id == "now"


def test_while_a_last_job_is_under_way_nothing_probes() -> None:
    lanes = lanes_of(1, 0.0)
    lanes.add(key("a"), job(), 0.0)
    lane, _ = take(lanes)
    lane.reason, lane.budget.window = DEAD, 0
    assert lanes.add(key("a"), job(), 5.0) is DEAD


def test_a_release_says_nothing_about_the_destination() -> None:
    lanes = lanes_of(20, 60.0)
    lanes.add(key("a"), job(), 0.0)
    lane, ended = take(lanes)
    lanes.release(lane, ended, 1.0)
    assert (lane.budget.in_flight, lane.budget.window, lane.last_used) == (0, INITIAL_WINDOW, 1.0)


def test_what_was_given_back_is_the_next() -> None:
    lanes = lanes_of(20, 60.0)
    for name in ("a1", "a2", "b1"):
        lanes.add(key(name[0]), job(name), 0.0)
    lane, first = take(lanes)
    lanes.give_back(lane, first)
    assert [taken.message.id for _, taken in drain(lanes)] == ["a1", "b1", "a2"]


def test_idle_lanes_are_forgotten_and_busy_or_suspended_ones_are_not(suspended: tuple[Lanes, Lane]) -> None:
    lanes, _ = suspended
    lanes.add(key("busy"), job(), 0.0)
    lanes.add(key("waiting"), job(), 0.0)
    lanes.add(key("waiting"), job(), 0.0)
    drain(lanes)
    lanes.forget(70.0 + DEAD_LANE)
    assert {lane.key.destination for lane in lanes} == {"a", "busy", "waiting"}
    lanes.forget(70.1 + DEAD_LANE)
    assert {lane.key.destination for lane in lanes} == {"busy", "waiting"}


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ((), None),
        (((0, DEAD),), DEAD),
        (((0, DEAD), (1, DEAD)), DEAD),
        (((0, DEAD), (1, Deferred("4.2.0", "busy"))), None),
        (((0, DEAD), (1, Delivered("2.0.0", "sent"))), None),
        (((0, Failed("5.1.1", "no")),), None),
    ],
)
def test_a_destination_has_failed_when_all_recipients_say_so(outcomes: tuple[object, ...], expected: object) -> None:
    assert destination_failure(outcomes) == expected  # type: ignore[arg-type]


def test_what_asks_for_less_is_found_among_the_outcomes() -> None:
    assert less_wanted(((0, Delivered("2.0.0", "sent")), (1, SLOWER))) is SLOWER
    assert less_wanted(((0, BUSY),)) is BUSY
    assert less_wanted(((0, Delivered("2.0.0", "sent")), (1, DEAD))) is None


# -- who is next in a lane --------------------------------------------------------------------------------------------


def test_a_mailing_and_single_messages_take_turns() -> None:
    lanes = lanes_of(1000)
    for one in [*mailing("big", 6), job("a"), *mailing("other", 4), job("b"), *(job(str(number)) for number in range(4))]:
        lanes.add(key("x"), one, 0.0)
    order = []
    while (taken := lanes.take(0.0)) is not None:
        order.append(f"{taken[1].message.id}{taken[1].recipients[0]}")
        lanes.done(*taken, 0.0)
    assert " ".join(order) == "big0 big1 a0 other1 other0 big2 b0 other2 00 big3 10 other3 20 big4 30 big5"


def test_single_messages_that_keep_coming_do_not_keep_a_mailing_from_its_turns() -> None:
    lanes = lanes_of(1000)
    for one in mailing("big", 50):
        lanes.add(key("x"), one, 0.0)
    done = 0
    for number in range(200):
        lanes.add(key("x"), job(str(number)), 0.0)
        lane, taken = take(lanes)
        lanes.done(lane, taken, 0.0)
        done += taken.message.id == "big"
        if done == 50:
            assert number < 101
            return
    pytest.fail("it starves")


# -- a destination that wants less ------------------------------------------------------------------------------------


def busy(limit: int, flying: int) -> tuple[Lanes, list[tuple[Lane, LaneJob]]]:
    """A lane whose window is open as far as ``flying`` jobs, which are under way; many others wait."""
    lanes = lanes_of(limit)
    for number in range(10 * limit):
        lanes.add(key("a"), job(str(number)), 0.0)
    jobs = drain(lanes)
    while len(jobs) < flying:
        lanes.done(*jobs.pop(0), 0.0)
        jobs += drain(lanes)
    return lanes, jobs


def test_too_many_connections_halves_the_window_once_for_all_that_were_under_way() -> None:
    lanes, flying = busy(16, 16)
    for lane, ended in flying[:6]:
        assert lanes.done(lane, ended, 5.0, failure=BUSY, less=BUSY) == []
        assert lane.budget.window == 8
        assert not lane.suspended
    assert lanes.take(5.0) is None, "10 are still under way"
    for lane, ended in flying[6:]:
        lanes.done(lane, ended, 5.0, failure=BUSY, less=BUSY)
    flying = drain(lanes, 6.0)
    assert len(flying) == 8
    lanes.done(*flying[0], 7.0, less=SLOWER)
    assert lane.budget.window == 4, "what was started later counts again"


def test_after_that_the_window_opens_slowly() -> None:
    lanes, flying = busy(16, 8)
    lane = flying[0][0]
    for ended in flying:
        lanes.done(*ended, 5.0, less=SLOWER)
    assert lane.budget.window == 4
    now = 5.0
    widths = []
    while lane.budget.window < 16:
        now += SLOWLY / 3
        lanes.done(*take(lanes, now), now)
        assert lane.budget.reason is (SLOWER if lane.budget.window < 16 else None)
        widths.append(lane.budget.window)
    assert widths == [4] * 2 + [width for width in range(5, 16) for _ in range(3)] + [16]
    assert not lane.budget.careful


def test_one_at_a_time_is_the_least_and_no_suspension() -> None:
    lanes, flying = busy(2, 2)
    lane = flying[0][0]
    for ended in flying:
        lanes.done(*ended, 1.0, failure=BUSY, less=BUSY)
    for now in range(2, 20):
        failure = BUSY if now % REFUSALS else None  # now and then it talks, and wants less for this message only
        lanes.done(*take(lanes, now), now, failure=failure, less=BUSY)
        assert lane.budget.window == 1
        assert not lane.suspended


def test_a_destination_that_refuses_one_at_a_time_again_and_again_is_suspended() -> None:
    lanes, flying = busy(2, 2)
    lane = flying[0][0]
    for ended in flying:
        lanes.done(*ended, 1.0, failure=BUSY, less=BUSY)
    for now in range(2, 2 + REFUSALS):
        assert not lane.suspended
        waiting = lanes.done(*take(lanes, now), now, failure=BUSY, less=BUSY)
    assert lane.suspended
    assert lane.reason is BUSY
    assert len(waiting) > 10
    assert lanes.add(key("a"), job(), 1.0 + REFUSALS) is BUSY
    assert lanes.add(key("a"), job(), 100.0) is None
    lanes.done(*take(lanes, 100.0), 101.0)
    assert not lane.suspended


def test_a_suspended_lane_whose_last_job_asks_for_less_lives() -> None:
    lanes, flying = busy(3, 3)
    *dead, last = flying
    for ended in dead:
        lanes.done(*ended, 1.0, failure=DEAD)
    lane = last[0]
    assert lane.budget.window == 1
    lanes.done(*last, 2.0, less=SLOWER)
    assert (lane.budget.window, lane.suspended) == (1, False)
