"""The places of the delivery processes: the dead never take those of the living, and nobody stands aside without need."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from mtad.config import Delivery
from mtad.nexthop import Rules
from mtad.outcome import Deferred
from mtad.scheduler.lane import LaneKey
from mtad.scheduler.lanes import DEAD_LANE, IDLE_LANE, Lanes
from mtad.scheduler.line import LaneJob
from tests.unit.lanes_aid import job

DEAD = Deferred("4.4.1", "connect to mx: timed out", destination=True)
PAUSE = 60.0


def make(places: int) -> Lanes:
    return Lanes(Rules(Delivery(destination_concurrency=20)), PAUSE, places=places)


def add(lanes: Lanes, name: str, count: int = 1, now: float = 0.0) -> None:
    for _ in range(count):
        assert lanes.add(LaneKey("smtp", name), job(), now) is None


def start(lanes: Lanes, now: float = 0.0) -> list[tuple[str, LaneJob]]:
    """All that may start."""
    started = []
    while (taken := lanes.take(now)) is not None:
        started.append((taken[0].key.destination, taken[1]))
    return started


def end(lanes: Lanes, started: tuple[str, LaneJob], failure: Deferred | None, now: float = 0.0) -> None:
    lane = lanes.get(LaneKey("smtp", started[0]))
    assert lane is not None
    lanes.done(lane, started[1], now, failure=failure)


def test_forty_dead_destinations_leave_room_for_a_live_one() -> None:
    """Fresh ones have up to five places each as long as there is room, then one each; another one still gets its own."""
    lanes = make(200)
    for number in range(40):
        add(lanes, f"dead{number}.test", 10)
    started = start(lanes)
    assert {name for name, _ in started} == {f"dead{number}.test" for number in range(40)}
    assert len(started) < 100
    add(lanes, "live.test")
    assert [name for name, _ in start(lanes)] == ["live.test"]


def test_what_is_not_known_never_has_more_than_three_quarters() -> None:
    lanes = make(100)
    for number in range(500):
        add(lanes, f"fresh{number}.test", 3)
    assert len(start(lanes)) == 75


def test_a_lane_that_works_gets_every_place() -> None:
    lanes = make(100)
    add(lanes, "live.test", 2)
    [first, second] = start(lanes)
    end(lanes, first, None)
    end(lanes, second, None)
    for number in range(500):
        add(lanes, f"fresh{number}.test", 3)
    assert len(start(lanes)) == 75
    add(lanes, "live.test", 30)
    assert len(start(lanes)) >= 7, "as many as its window has"


def test_those_that_failed_share_a_quarter() -> None:
    lanes = make(40)
    for number in range(30):
        add(lanes, f"dead{number}.test")
    for one in start(lanes):
        end(lanes, one, DEAD)
    for number in range(30):
        add(lanes, f"dead{number}.test", 4)
    started = start(lanes)
    assert len(started) == 10
    add(lanes, "live.test")
    assert [name for name, _ in start(lanes)] == ["live.test"]
    # As one ends another one gets its place, and a lane that answers has left them.
    end(lanes, started[0], DEAD)
    [again] = start(lanes)
    end(lanes, again, None)
    assert len(start(lanes)) > 1


def test_a_machine_with_one_place_delivers_all() -> None:
    lanes = make(1)
    for number in range(20):
        add(lanes, f"d{number}.test")
    done: set[str] = set()
    while started := start(lanes):
        for one in started:
            end(lanes, one, None)
            done.add(one[0])
    assert len(done) == 20


@example([(2, 3, False), (0, 0, False), (0, 2, False), (1, 2, False)], 1)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 3), st.booleans()), max_size=150), st.integers(1, 20))
def test_nobody_is_forgotten(steps: list[tuple[int, int, bool]], places: int) -> None:
    """Whatever fails or works in whatever order: in the end every job that was not handed back is done."""
    lanes = make(places)
    under_way: list[tuple[str, LaneJob]] = []
    left = 0
    now = 0.0
    for which, count, good in steps:
        now += 7.0
        for _ in range(count):
            left += lanes.add(LaneKey("smtp", f"d{which}.test"), job(), now) is None
        under_way += start(lanes, now)
        if under_way:
            name, one = under_way.pop(which % len(under_way))
            lane = lanes.get(LaneKey("smtp", name))
            assert lane is not None
            left -= 1 + len(lanes.done(lane, one, now, failure=None if good else DEAD))
    while under_way := under_way + start(lanes, now):
        end(lanes, under_way.pop(), None, now)
        left -= 1
    assert left == 0


def test_a_dead_lane_is_remembered_until_its_mail_comes_back() -> None:
    """Its window need not be closed anew by each message that is due."""
    lanes = make(100)
    add(lanes, "dead.test", 5)
    for one in start(lanes):
        end(lanes, one, DEAD)
    lanes.forget(PAUSE + 10 * IDLE_LANE)
    later = PAUSE + 3600.0
    lanes.forget(later)
    for _ in range(3):
        lanes.add(LaneKey("smtp", "dead.test"), job(), later)
    assert len(start(lanes, later)) == 1, "one probe"
    other = make(100)
    add(other, "dead.test", 5)
    for one in start(other):
        end(other, one, DEAD)
    other.forget(PAUSE + DEAD_LANE + 1)
    assert len(other) == 0
