"""Lanes: who is served next, how many at a time, and what becomes of those whose destination is dead."""

from __future__ import annotations

import pytest

from mtad.envelope import Envelope
from mtad.outcome import Deferred, Delivered, Failed
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.lanes import IDLE_LANE, INITIAL_WINDOW, Lane, LaneJob, LaneKey, Lanes, destination_failure

DEAD = Deferred("4.4.1", "refused", destination=True)


def key(name: str) -> LaneKey:
    return LaneKey("smtp", name)


def job(name: str = "m") -> LaneJob:
    return LaneJob(ActiveMessage(Envelope(name, 0.0, "", ()), (), 0, 0.0, urgent=False), (0,))


def take(lanes: Lanes) -> tuple[Lane, LaneJob]:
    taken = lanes.take()
    assert taken is not None
    return taken


def drain(lanes: Lanes) -> list[tuple[Lane, LaneJob]]:
    """Take all that may start."""
    found = []
    while (taken := lanes.take()) is not None:
        found.append(taken)
    return found


def test_nothing_to_take_from_no_lanes() -> None:
    lanes = Lanes(20, 60.0)
    assert lanes.take() is None
    assert len(lanes) == 0


def test_lanes_take_turns_however_long_one_is() -> None:
    lanes = Lanes(20, 60.0)
    for number in range(1000):
        lanes.add(key("big"), job(f"big{number}"), 0.0)
    lanes.add(key("small"), job("small"), 0.0)
    first, second = take(lanes), take(lanes)
    assert [lane.key.destination for lane, _ in (first, second)] == ["big", "small"]
    assert first[1].message.id == "big0"


def test_a_lane_is_served_in_the_order_of_arrival() -> None:
    lanes = Lanes(20, 60.0)
    for number in range(3):
        lanes.add(key("a"), job(str(number)), 0.0)
    assert [taken.message.id for _, taken in drain(lanes)] == ["0", "1", "2"]


def test_a_window_starts_small_and_opens_with_success_up_to_the_limit() -> None:
    lanes = Lanes(7, 60.0)
    for number in range(100):
        lanes.add(key("a"), job(str(number)), 0.0)
    flying = drain(lanes)
    assert len(flying) == INITIAL_WINDOW
    for expected in (6, 7, 7, 7):
        lane, _ = flying.pop()
        assert lanes.done(lane, None, 0.0) == []
        flying += drain(lanes)
        assert len(flying) == lane.in_flight == expected


def test_the_limit_bounds_the_first_window_too() -> None:
    lanes = Lanes(2, 60.0)
    for number in range(9):
        lanes.add(key("a"), job(str(number)), 0.0)
    assert len(drain(lanes)) == 2


def test_failures_of_the_destination_close_the_window_and_hand_back_what_waits() -> None:
    lanes = Lanes(20, 60.0)
    for number in range(8):
        lanes.add(key("a"), job(str(number)), 0.0)
    flying = drain(lanes)
    for lane, _ in flying[:-1]:
        assert lanes.done(lane, DEAD, 10.0) == []
        assert lanes.take() is None
    lane = flying[-1][0]
    assert [waiting.message.id for waiting in lanes.done(lane, DEAD, 10.0)] == ["5", "6", "7"]
    assert lane.suspended
    assert lane.reason is DEAD
    assert lanes.take() is None


@pytest.fixture
def suspended() -> tuple[Lanes, Lane]:
    """A lane that failed at time 10 and is left alone for 60 seconds."""
    lanes = Lanes(20, 60.0)
    for _ in range(INITIAL_WINDOW):
        lanes.add(key("a"), job(), 0.0)
    flying = drain(lanes)
    for lane, _ in flying:
        lanes.done(lane, DEAD, 10.0)
    return lanes, flying[0][0]


def test_a_suspended_lane_answers_with_the_reason(suspended: tuple[Lanes, Lane]) -> None:
    lanes, _ = suspended
    assert lanes.add(key("a"), job(), 69.9) is DEAD
    assert lanes.take() is None


def test_after_the_pause_one_probe_is_let_through(suspended: tuple[Lanes, Lane]) -> None:
    lanes, lane = suspended
    for number in range(3):
        assert lanes.add(key("a"), job(str(number)), 70.0) is None
    probe, _ = take(lanes)
    assert lanes.take() is None
    assert [waiting.message.id for waiting in lanes.done(probe, DEAD, 71.0)] == ["1", "2"]
    assert lane.suspended
    assert lane.suspended_until == 131.0


def test_a_probe_that_succeeds_opens_the_lane(suspended: tuple[Lanes, Lane]) -> None:
    lanes, lane = suspended
    for number in range(4):
        lanes.add(key("a"), job(str(number)), 70.0)
    probe, _ = take(lanes)
    assert lanes.done(probe, None, 71.0) == []
    assert not lane.suspended
    assert len(drain(lanes)) == 2


def test_an_urgent_job_does_not_wait_for_the_pause(suspended: tuple[Lanes, Lane]) -> None:
    lanes, _ = suspended
    assert lanes.add(key("a"), job("now"), 11.0, urgent=True) is None
    assert take(lanes)[1].message.id == "now"


def test_while_a_last_job_is_under_way_nothing_probes() -> None:
    lanes = Lanes(1, 0.0)
    lanes.add(key("a"), job(), 0.0)
    lane, _ = take(lanes)
    lane.reason, lane.window = DEAD, 0
    assert lanes.add(key("a"), job(), 5.0) is DEAD


def test_a_release_says_nothing_about_the_destination() -> None:
    lanes = Lanes(20, 60.0)
    lanes.add(key("a"), job(), 0.0)
    lane, _ = take(lanes)
    lanes.release(lane, 1.0)
    assert (lane.in_flight, lane.window, lane.last_used) == (0, INITIAL_WINDOW, 1.0)


def test_what_was_given_back_is_the_next() -> None:
    lanes = Lanes(20, 60.0)
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
    lanes.forget(70.0 + IDLE_LANE)
    assert {lane.key.destination for lane in lanes} == {"a", "busy", "waiting"}
    lanes.forget(70.1 + IDLE_LANE)
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
