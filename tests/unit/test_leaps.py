"""The wall's clock is set while the scheduler lives: nothing expires sooner, nothing waits longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtad.envelope import Envelope, Recipient
from mtad.scheduler.agenda import Agenda
from mtad.scheduler.leaps import LEAST, Leaps
from mtad.spool.queues import Queue
from tests.unit.scheduler_aid import LATER, RETRY, START, Clock, World

DAY = 86400.0


class Watched:
    """Leaps under a clock of the test's."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.agenda = Agenda()
        self.warnings: list[str] = []
        self.leaps = Leaps(lambda: self.clock.wall, lambda: self.clock.monotonic, self.agenda, self.warnings.append)

    def leap(self, seconds: float) -> None:
        self.clock.wall += seconds
        self.leaps.look()

    def age(self, arrival: float) -> float:
        return self.clock.wall - self.leaps.aged(Envelope("x", arrival, "a@b.test", (Recipient("c@d.test"),))).arrival


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_time_that_goes_by_is_no_leap_nor_is_a_slewed_clock() -> None:
    watched = Watched()
    watched.agenda.set("a", START + 300)
    for _ in range(1000):
        watched.clock.advance(3600)
        watched.leap(LEAST / 2)
    assert watched.warnings == []
    assert watched.agenda.time_of("a") == START + 300
    assert watched.age(START) == watched.clock.wall - START


def test_ages_after_leaps() -> None:
    watched = Watched()
    watched.clock.advance(100)
    watched.leap(DAY)
    watched.clock.advance(50)
    assert (watched.age(START), watched.age(START + 60), watched.age(START + 100 + DAY)) == (150, 90, 50)
    watched.leap(10 * DAY)
    watched.clock.advance(7)
    assert (watched.age(START), watched.age(START + 100 + DAY)) == (157, 57)
    assert watched.age(watched.clock.wall - 5) == 5
    assert len(watched.warnings) == 2


@pytest.mark.parametrize("steps", [(-10,), (-4, -6)], ids=str)
def test_a_leap_that_is_taken_back(steps: tuple[float, ...]) -> None:
    watched = Watched()
    watched.leap(10 * DAY)
    for step in steps:
        watched.leap(step * DAY)
    watched.clock.advance(5)
    assert watched.age(START) == 5


def test_a_leap_back_leaves_ages_smaller_and_never_larger() -> None:
    watched = Watched()
    watched.clock.advance(1000)
    watched.leap(-3600)
    assert watched.age(START) == 1000 - 3600
    assert watched.age(watched.clock.wall) == 0


def test_nothing_expires_by_a_leap(world: World) -> None:
    """RETRY has a lifetime of a day."""
    queue_id = world.enter()
    world.deliver(LATER)
    world.clock.wall += 10 * DAY
    world.deliver(LATER)
    assert world.where(queue_id) == ["deferred"]
    assert world.events.about("expired") == []
    assert world.path(Queue.DEFERRED, queue_id).stat().st_mtime == pytest.approx(world.clock.wall + RETRY.minimum, abs=31)
    attempts = 0
    while not world.events.about("expired"):  # and it does expire, in its time
        world.clock.advance(RETRY.maximum * 1.1)
        world.deliver(LATER)
        attempts += 1
    assert attempts * RETRY.maximum * 1.1 == pytest.approx(DAY, rel=0.06)


def test_what_waits_for_a_suspended_destination_does_not_expire_by_a_leap(world: World) -> None:
    world.deliveries.capacity = 0
    queue_id = world.enter()
    world.run()
    world.clock.wall += 10 * DAY
    world.run()
    world.scheduler.keep_house()
    assert world.where(queue_id) == ["active"]
    assert world.events.about("expired") == []


def test_a_leap_back_makes_nobody_wait_longer(world: World) -> None:
    queue_id = world.enter()
    world.deliver(LATER)
    due = world.path(Queue.DEFERRED, queue_id).stat().st_mtime
    left = due - world.clock.wall
    world.clock.wall -= 3600
    assert world.run() == []
    world.scheduler.found_deferred(queue_id, due)  # the scan comes by
    world.clock.advance(left - 1)
    assert world.run() == []
    world.clock.advance(1)
    assert [job.queue_id for job in world.run()] == [queue_id]


def test_what_a_flush_wants_sooner_is_sooner(world: World) -> None:
    queue_id = world.enter()
    world.deliver(LATER)
    world.scheduler.found_deferred(queue_id, world.clock.wall - 1)
    assert [job.queue_id for job in world.run()] == [queue_id]
