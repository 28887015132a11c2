"""The threads of a delivery process: one more than there are jobs, and those that nobody needs any more end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from mtad.delivery.crew import SPARE, Crew
from mtad.net.channels import packet_pair
from tests.site import await_value


class World:
    """A crew whose jobs last until they are let go."""

    def __init__(self, quiet: float) -> None:
        self.channel, self.theirs = packet_pair()
        self.under_way = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.crew = Crew(self.theirs, self._work, quiet)

    def _work(self, _: bytes) -> None:
        self.under_way.release()
        assert self.go.acquire(timeout=10)

    def jobs(self, count: int) -> None:
        """Send so many, until all are under way at the same time."""
        for _ in range(count):
            self.channel.send(b"job")
        for _ in range(count):
            assert self.under_way.acquire(timeout=10)

    def waiting(self, count: int) -> None:
        """Until so many threads wait."""
        await_value(lambda: self.crew._idle == count, what=f"{count} threads wait")

    def left(self, count: int) -> None:
        """Until there are so many threads."""
        await_value(lambda: self.crew.threads == count, what=f"{count} threads are left")


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(getattr(request, "param", 0.05))
    assert world.crew.muster()
    yield world
    world.go.release(1000)
    world.channel.close()
    assert world.crew.ended.wait(10), "a crew ends with its channel"
    assert world.crew.threads == 0
    world.theirs.close()


def test_one_more_than_there_are_jobs(world: World) -> None:
    world.waiting(1)
    world.jobs(30)
    world.waiting(1)
    assert world.crew.threads == 31


def test_nobody_ends_who_was_needed_since(world: World) -> None:
    world.jobs(30)
    world.crew.thin_out()
    world.go.release(30)
    world.waiting(31)
    world.crew.thin_out()  # one waited at some moment since: the thirty were needed
    assert world.crew._surplus == 0
    assert world.crew.threads == 31


def test_who_waits_in_vain_ends(world: World) -> None:
    world.jobs(30)
    world.go.release(30)
    world.waiting(31)
    assert [world.crew.thin_out() for _ in range(2)] == [False, False]
    world.left(SPARE)
    assert [world.crew.thin_out() for _ in range(2)] == [True, False]
    # They are as good as before.
    world.jobs(30)
    assert world.crew.threads == 31


@pytest.mark.parametrize("world", [60.0], indirect=True)
def test_who_comes_from_a_job_ends(world: World) -> None:
    """With jobs all the time nobody waits in vain; then each that comes back from one."""
    world.jobs(30)
    world.go.release(30)
    world.waiting(31)
    for _ in range(2):
        world.crew.thin_out()
    for left in range(30, SPARE - 1, -1):
        world.jobs(1)
        world.go.release()
        world.left(left)
    world.jobs(1)
    world.go.release()
    world.waiting(SPARE)


def test_nobody_ends_when_all_others_are_at_work(world: World) -> None:
    world.jobs(30)
    world.go.release(30)
    world.waiting(31)
    for _ in range(2):
        world.crew.thin_out()
    world.jobs(30)
    world.jobs(1)
    world.go.release(31)
