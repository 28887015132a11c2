"""Lanes and jobs as they are told at the desk."""

from __future__ import annotations

from mtad.config import DeliveryPolicy
from mtad.desk import LaneView
from mtad.scheduler.lane import LaneKey
from mtad.scheduler.lanes import REMEMBERED, Lanes
from mtad.scheduler.views import view_delivering, view_lane, view_lanes, view_waiting
from tests.unit.lanes_aid import BUSY, DEAD, drain, job, key, lanes_of, mailing, take

#: What the wall's clock is ahead of the other one.
WALL = 1_700_000_000.0


def told(lanes: Lanes, name: str, now: float) -> LaneView:
    lane = lanes.get(key(name))
    assert lane is not None
    return view_lane(lanes, lane, now, now + WALL)


def test_a_lane_at_work() -> None:
    lanes = lanes_of(20)
    for number in range(8):
        lanes.add(key("a"), job(), 10.0 + number)
    lanes.done(*take(lanes, 20.0), 21.0)
    assert len(drain(lanes, 21.0)) == 6
    assert told(lanes, "a", 30.0) == LaneView("smtp", "a", 1, 6, 6, 20, done=1, oldest=WALL + 17.0)


def test_a_suspended_lane() -> None:
    lanes = lanes_of(1, 60.0)
    lanes.add(key("a"), job(), 10.0)
    lanes.done(*take(lanes, 10.0), 12.0, failure=DEAD)
    expected = LaneView(
        "smtp", "a", 0, 0, 0, 1,
        suspended_since=WALL + 12, suspended_until=WALL + 72, reason="4.4.1 refused", done=1,
    )  # fmt: skip
    assert told(lanes, "a", 30.0) == expected
    lanes.add(key("a"), job(), 80.0)
    taken = take(lanes, 80.0)
    assert told(lanes, "a", 81.0).suspended_since == WALL + 12, "as long as the probe has not come back"
    lanes.done(*taken, 82.0)
    after = told(lanes, "a", 83.0)
    assert (after.suspended_since, after.suspended_until, after.reason) == (0.0, 0.0, "")


def test_a_lane_that_was_asked_for_less() -> None:
    lanes = lanes_of(8)
    for _ in range(9):
        lanes.add(key("a"), job(), 0.0)
    lanes.done(*take(lanes), 1.0, less=BUSY)
    view = told(lanes, "a", 2.0)
    assert (view.window, view.reason) == (2, "4.7.0 too many connections")
    assert view.reply == "421 4.7.0 Too many connections"


def test_a_lane_with_a_rate_and_one_with_ipv4_only() -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(domain=("a",), rate="1/1m"))
    lanes.add(key("a"), job(), 5.0)
    lanes.ipv4.learn(key("a"), True, 5.0)
    lanes.done(*take(lanes, 5.0), 6.0)
    view = told(lanes, "a", 7.0)
    assert (view.rate, view.next_start, view.ipv4_until) == ("1/1m", WALL + 65.0, WALL + 5.0 + REMEMBERED)
    assert told(lanes, "a", 66.0).next_start == 0.0


def waiting(lanes: Lanes, name: str, now: float) -> list[tuple[str, int, LaneView]]:
    """What the jobs of one more message for this lane wait for."""
    jobs = mailing("asked", 2)
    for one in jobs:
        lanes.add(key(name), one, now)
    keys = [LaneKey("local", ""), key(name), key("none")]
    views = view_waiting(lanes, keys, jobs[0].message, now + 1, now + 1 + WALL)
    assert [view.recipients for view in views] == [(0,), (1,)]
    assert {(view.state, view.since) for view in views} == {("waiting", now + WALL)}
    return [(view.blocked, view.ahead, view.lane) for view in views]


def test_jobs_wait_for_the_window_of_their_lane() -> None:
    lanes = lanes_of(2)
    for _ in range(5):
        lanes.add(key("a"), job(), 0.0)
    drain(lanes)
    (first, ahead, view), (further, later, _) = waiting(lanes, "a", 1.0)
    assert (first, ahead, further, later) == ("concurrency", 4, "concurrency", 1)
    assert (view.in_flight, view.window, view.waiting) == (2, 2, 5)


def test_jobs_wait_for_the_rate_of_their_lane() -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(domain=("a",), rate="1/1m"))
    lanes.add(key("a"), job(), 0.0)
    drain(lanes)
    (blocked, ahead, view), _ = waiting(lanes, "a", 1.0)
    assert (blocked, ahead, view.next_start, view.rate) == ("rate", 0, WALL + 60.0, "1/1m")


def test_jobs_wait_for_a_delivery_process() -> None:
    lanes = lanes_of(20)
    assert [blocked for blocked, _, _ in waiting(lanes, "a", 1.0)] == ["processes", "processes"]


def test_jobs_wait_for_what_their_group_allows() -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(mx=("mx.big",), domain=(".big",), concurrency=2))
    for name in ("1.big", "2.big", "3.big"):
        lanes.add(key(name), job(), 0.0)
    assert len(drain(lanes)) == 2
    (blocked, ahead, view), _ = waiting(lanes, "3.big", 1.0)
    assert (blocked, ahead, view.group) == ("concurrency", 2, "mx.big")
    assert (view.in_flight, view.window, view.limit) == (2, 2, 2), "those of all"
    assert told(lanes, "3.big", 1.0).in_flight == 0


def test_jobs_wait_for_their_own_lane_in_a_group() -> None:
    policies = (DeliveryPolicy(mx=("mx.big",), domain=(".big",)), DeliveryPolicy(domain=("1.big",), concurrency=1))
    lanes = lanes_of(20, 60.0, *policies)
    for _ in range(2):
        lanes.add(key("1.big"), job(), 0.0)
    drain(lanes)
    (blocked, _, view), _ = waiting(lanes, "1.big", 1.0)
    assert (blocked, view.group, view.in_flight, view.limit) == ("concurrency", "", 1, 1)


def test_jobs_wait_for_the_rate_of_their_group() -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(mx=("mx.big",), domain=(".big",), rate="1/10s"))
    for name in ("1.big", "2.big"):
        lanes.add(key(name), job(), 0.0)
    drain(lanes)
    (blocked, _, view), _ = waiting(lanes, "2.big", 1.0)
    assert (blocked, view.group, view.rate, view.next_start) == ("rate", "mx.big", "1/10s", WALL + 10.0)


def test_a_job_in_delivery() -> None:
    lanes = lanes_of(20)
    lanes.add(key("a"), job(), 3.0)
    lane, taken = take(lanes, 5.0)
    view = view_delivering(lanes, lane, taken, 99, 8.0, WALL + 8.0)
    assert (view.state, view.since, view.pid, view.recipients) == ("delivering", WALL + 5.0, 99, (0,))
    assert view.lane == told(lanes, "a", 8.0)


def test_the_busiest_lanes_and_the_sums() -> None:
    lanes = lanes_of(2)
    for number in range(10):
        for _ in range(number + 1):
            lanes.add(key(f"d{number}"), job(), 0.0)
    lanes.add(key("dead"), job(), 0.0)
    for lane, taken in drain(lanes):
        if lane.key.destination == "dead":
            lanes.done(lane, taken, 1.0, failure=DEAD)
    lanes.add(key("dead"), job(), 100.0)
    lanes.done(*take(lanes, 100.0), 101.0, failure=DEAD)
    views, suspended, waits, in_flight = view_lanes(lanes, 102.0, WALL, 3)
    assert [view.destination for view in views] == ["d9", "d8", "d7"]
    assert (suspended, waits, in_flight) == (1, 55 - 19, 19)
    views = view_lanes(lanes, 102.0, WALL, 3, ("dead", "d1", "nobody"))[0]
    assert [view.destination for view in views] == ["d1", "dead"]
