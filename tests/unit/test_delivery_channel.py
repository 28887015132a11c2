"""The delivery process and its channel: threads, hang-ups, signs of life, and answers that always come."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mtad.delivery import crew, process
from mtad.delivery.jobs import ALIVE, Job
from mtad.delivery.transport import Content, Task
from mtad.net.channels import PacketRoom, PacketSocket
from mtad.outcome import Attempt, Deferred
from mtad.spool.message import OpenMessage
from tests.site import await_value
from tests.unit.delivery_aid import BROKEN, SENT, World, broken, giving


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture
def running(world: World) -> Iterator[World]:
    """A worker that serves its channel in a thread of this process."""
    thread = threading.Thread(target=world.worker.run)
    thread.start()
    yield world
    world.channel.close()
    thread.join(10)
    assert not thread.is_alive(), "a worker ends with its channel"


def test_jobs_are_answered(running: World) -> None:
    for number in range(1, 30):
        running.send(running.message(), number)
    results = {running.hear().number for _ in range(1, 30)}
    assert results == set(range(1, 30))


def test_a_job_never_waits_for_another(running: World) -> None:
    gate = threading.Event()

    def slow(task: Task, content: Content, in_doubt: Callable[[str], None]) -> Sequence[Attempt]:
        if task.envelope.id in slow_ones:
            assert gate.wait(10)
        return giving(SENT)(task, content, in_doubt)

    running.script(slow)
    slow_ones = [running.message() for _ in range(20)]
    for number, queue_id in enumerate(slow_ones):
        running.send(queue_id, number)
    running.send(running.message(), 99)
    assert running.hear().number == 99
    gate.set()
    assert {running.hear().number for _ in slow_ones} == set(range(20))


def test_what_is_under_way_is_finished_when_the_scheduler_hangs_up(running: World) -> None:
    gate, begun = threading.Event(), threading.Event()

    def slow(task: Task, content: Content, in_doubt: Callable[[str], None]) -> Sequence[Attempt]:
        begun.set()
        assert gate.wait(10)
        return giving(SENT)(task, content, in_doubt)

    running.script(slow)
    queue_id = running.message()
    running.send(queue_id, 5)
    assert begun.wait(10)
    running.channel.shutdown(1)
    gate.set()
    assert running.hear().number == 5
    assert isinstance(running.events(queue_id)[-1], Attempt)


def test_a_bug_outside_of_a_transport_is_answered_and_the_thread_lives_on(
    running: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(OpenMessage, "verify", broken)
        running.send(running.message(), 1)
        [(_, outcome)] = running.hear().outcomes
    assert outcome == Deferred("4.3.0", "internal error: RuntimeError")
    running.send(running.message(), 2)
    assert running.hear().outcomes == ((0, SENT),)
    assert BROKEN in capfd.readouterr().err


@pytest.mark.parametrize(
    ("place", "name", "fault"),
    [
        (threading.Thread, "start", RuntimeError("can't start new thread")),
        (crew, "PacketRoom", OSError(errno.ENOMEM, "Cannot allocate memory")),
    ],
)
def test_a_machine_without_threads_makes_jobs_wait(
    running: World,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    place: object,
    name: str,
    fault: Exception,
) -> None:
    def refuse(*_: object) -> None:
        raise fault

    await_value(lambda: running.worker._crew._idle, what="its first thread waits")
    with monkeypatch.context() as patch:
        patch.setattr(place, name, refuse)
        for number in range(5):
            running.send(running.message(), number)
        assert sorted(running.hear().number for _ in range(5)) == list(range(5))
    assert "no thread for the next delivery" in capfd.readouterr().err


def test_a_thread_that_cannot_answer_ends_its_process_for_the_scheduler_to_take_the_job_back(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(process, "_fit", fail)
    monkeypatch.setattr(os, "_exit", sys.exit)
    world.script(giving(SENT))
    world.send(world.message())
    with pytest.raises(SystemExit) as ended:
        world.worker._crew.serve(PacketRoom())
    assert ended.value.code == os.EX_SOFTWARE
    assert "panic: " in capfd.readouterr().err


def test_signs_of_life(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "HEARTBEAT", 0.01)
    thread = threading.Thread(target=world.worker.run)
    thread.start()
    try:
        assert [world.channel.recv(100) for _ in range(3)] == [ALIVE] * 3
    finally:
        world.channel.close()
        thread.join(10)


def test_a_worker_that_nobody_hears_any_more_still_writes_down(running: World) -> None:
    """kill -9 of the scheduler in the middle of a delivery."""
    gate, begun = threading.Event(), threading.Event()

    def slow(task: Task, content: Content, in_doubt: Callable[[str], None]) -> Sequence[Attempt]:
        begun.set()
        assert gate.wait(10)
        return giving(SENT)(task, content, in_doubt)

    running.script(slow)
    queue_id = running.message()
    running.send(queue_id)
    assert begun.wait(10)
    running.channel.close()
    gate.set()
    path = Path(running.spool.root) / "active" / queue_id
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for the delivery
    assert isinstance(running.events(queue_id)[-1], Attempt)


def test_an_answer_that_is_not_taken_ends_its_process_unless_nobody_waits_for_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler would wait for it for ever, as when there is no memory for a packet."""
    world.script(giving(SENT))
    job = Job(1, world.message(), "smtp", "far.test", (0,))

    class Channel:
        def __init__(self, end: PacketSocket) -> None:
            self._end = end

        def fileno(self) -> int:
            return self._end.fileno()

        def send(self, _: bytes) -> None:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    monkeypatch.setattr(world.worker, "_channel", Channel(world.theirs))
    with pytest.raises(OSError, match="buffer space"):
        world.worker._answer(job)
    world.channel.close()
    world.worker._answer(job)
