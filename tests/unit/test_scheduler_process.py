"""The loop of the scheduler process, turn by turn in this process, with delivery processes that do what a test says."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtad.config import Config, Delivery, Duration, Local, Processes
from mtad.delivery.jobs import Result, job_decoder, job_encoder, sign_of_life
from mtad.envelope import Envelope, Recipient
from mtad.net.channels import MAX_PACKET, Lifeline, Mailslot, PacketSocket, WakePipe
from mtad.occupancy import Occupancy
from mtad.outcome import Attempt, Deferred, Delivered
from mtad.runtime import Runtime
from mtad.scheduler import pool, process
from mtad.scheduler.process import SchedulerProcess
from mtad.scheduler.scan import Scan
from mtad.spool.queue_id import encode
from mtad.spool.queues import MAILSLOT, Queue, Spool
from mtad.users import Users

SENT = Delivered("2.0.0", "sent")


class FakeSignals:
    """`mtad.signals.Signals` whose signals a test sends."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK)
        self._seen: set[signal.Signals] = set()

    def send(self, number: signal.Signals) -> None:
        self._seen.add(number)
        os.write(self._write, b"x")

    def fileno(self) -> int:
        return self._read

    def take(self) -> set[signal.Signals]:
        os.read(self._read, 100)
        seen, self._seen = self._seen, set()
        return seen

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


class Loop:
    """A scheduler process that stands still between two calls of `turn`."""

    def __init__(self, root: Path) -> None:
        config = Config(
            hostname="mx.example.org",
            spool=str(root / "spool"),
            local=Local(domains=("example.org",)),
            delivery=Delivery(processes=1, threads=5),
            processes=Processes(stop_timeout=Duration(2.0)),
        )
        self.root = root / "spool"
        self.spool = Spool(config.spool, create=True)
        self.signals = FakeSignals()
        self.runtime = Runtime(
            config=config,
            users=Users(str(root / "users"), (), ""),
            sockets=(),
            occupancy=Occupancy(b"x" * 16),
            lifeline=Lifeline(),
            wake=WakePipe(),
            mailslot=Mailslot(str(self.root / MAILSLOT)),
        )
        self.spool.wake = self.runtime.wake.send
        self.process = SchedulerProcess(self.runtime, self.spool, self.signals)  # type: ignore[arg-type]
        for source in (self.signals, self.runtime.lifeline, self.runtime.wake, self.runtime.mailslot):
            self.process._poll.register(source.fileno(), select.POLLIN)

    def start(self) -> None:
        assert self.process._get_spool()

    def turn(self, until: Callable[[], object], timeout: float = 10.0) -> None:
        """Turn until something is so."""
        deadline = time.monotonic() + timeout
        while not until():
            assert time.monotonic() < deadline, "it did not happen"
            os.write(self.runtime.wake._write, b"\n")  # a turn that has nothing to do sleeps, else
            self.process._turn()

    def send(self, *recipients: str) -> str:
        """A new message, with its wake-up; its queue id."""
        names = recipients or ("b@far.test",)
        envelope = Envelope(self.spool.ids.new(), time.time(), "a@sender.test", tuple(map(Recipient, names)))
        incoming = self.spool.enter(envelope)
        incoming.write(b"Subject: x\r\n\r\n")
        incoming.commit()
        return envelope.id

    def files(self, queue: Queue) -> list[str]:
        return os.listdir(self.root / queue.value)

    def close(self) -> None:
        for slot in list(self.process._pool.channels().values()):
            self.process._pool.bury(slot, "test is over", 0.0)
        while self.process._pool._dying:
            self.process._pool.reap()
            time.sleep(0.001)
        for end in (self.spool, self.signals, self.runtime.mailslot):
            end.close()
        for fd in (self.runtime.wake._read, self.runtime.wake._write, self.runtime.lifeline._read):
            os.close(fd)
        if self.process._lock >= 0:
            os.close(self.process._lock)


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    monkeypatch.setattr(process, "run_delivery", deliver)
    loop = Loop(tmp_path)
    yield loop
    loop.close()


def deliver(runtime: Runtime, channel: PacketSocket) -> None:
    """A delivery process for which the recipient's domain says what it does."""
    spool = Spool(runtime.config.spool)
    while packet := channel.recv(MAX_PACKET):
        job = job_decoder.decode(packet)
        kind = job.destination.partition(".")[0]
        with spool.open(Queue.ACTIVE, job.queue_id) as message:
            if kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "odd":
                channel.send(b"something else")
                time.sleep(60)
            if kind == "stuck":
                channel.send(sign_of_life([job.number]))
                time.sleep(60)
            if kind == "slow":
                time.sleep(0.5)
            if kind == "forever":
                time.sleep(60)
            outcomes = tuple((index, SENT) for index in job.recipients)
            message.append(Attempt(time.time(), outcomes))
        channel.send(job_encoder.encode(Result(job.number, outcomes)))


def test_a_message_goes_through(loop: Loop) -> None:
    loop.start()
    queue_id = loop.send()
    loop.turn(lambda: not loop.files(Queue.INCOMING) and not loop.files(Queue.ACTIVE))
    assert queue_id not in loop.files(Queue.DEFERRED)


def test_what_stands_in_the_pipe_and_is_no_wake_up_is_passed_over(loop: Loop) -> None:
    loop.start()
    os.write(loop.runtime.wake._write, b"\nnonsense\nmtad-queue 1 unfinished\n" + b"\xff" * 30 + b"\n0123456789zabc\n")
    loop.send()
    loop.turn(lambda: not loop.files(Queue.INCOMING) and not loop.files(Queue.ACTIVE))


def test_a_wake_up_that_was_too_long_names_the_message(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.start()
    monkeypatch.setattr(process, "SCAN_INTERVALS", dict.fromkeys(process.SCAN_INTERVALS, 1e9))
    loop.process._turn()
    loop.send(*(f"user{number}@far.test" for number in range(400)))
    loop.turn(lambda: not loop.files(Queue.INCOMING) and not loop.files(Queue.ACTIVE))


def test_a_flush_request(loop: Loop, capfd: pytest.CaptureFixture[str]) -> None:
    loop.start()
    queue_id = loop.send()
    os.rename(loop.root / "incoming" / queue_id, loop.root / "deferred" / queue_id)
    os.utime(loop.root / "deferred" / queue_id, (2e9, 2e9))
    nested = b'{"a":' + b"[" * 100_000
    good = b'{"flush":["../x","' + queue_id.encode() + b'"]}'
    for request in (b"garbage", b'{"flush":3}', b'{"flush":["\xff"]}', nested, good):
        assert Mailslot.send(str(loop.root / MAILSLOT), request)
    loop.turn(lambda: not loop.files(Queue.DEFERRED) and not loop.files(Queue.ACTIVE))
    assert capfd.readouterr().err.count("a request that cannot be read") == 4


@pytest.mark.parametrize(
    ("kind", "silence", "complaint"),
    [
        ("stop", 1.0, "did not show a sign of life"),
        ("stuck", 60.0, "has deliveries that make no progress"),
        ("odd", 60.0, "gave an answer that cannot be read"),
    ],
)
def test_a_delivery_process_that_hangs_is_killed_and_its_work_taken_back(
    loop: Loop,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    silence: float,
    complaint: str,
) -> None:
    monkeypatch.setattr(pool, "SILENCE", silence)
    monkeypatch.setattr(process, "_HOUSEKEEPING", 0.05)
    loop.start()
    stopped = loop.send(f"b@{kind}.test")
    loop.turn(lambda: stopped in loop.files(Queue.DEFERRED))  # after two processes that it has stopped
    good = loop.send("c@good.test")
    loop.turn(lambda: good not in loop.files(Queue.INCOMING) and not loop.files(Queue.ACTIVE))
    assert good not in loop.files(Queue.DEFERRED)
    said = capfd.readouterr().err
    assert said.count(f"{complaint} (killed by SIGKILL); ") == 2
    [state] = loop.spool.load(Queue.DEFERRED, stopped).states
    assert isinstance(state.outcome, Deferred)
    assert state.outcome.text == "delivery process killed by SIGKILL"


def test_the_spool_is_waited_for(loop: Loop, capfd: pytest.CaptureFixture[str]) -> None:
    other = loop.spool.lock()
    loop.signals.send(signal.SIGTERM)
    assert loop.process._get_spool() is False, "a stop ends the waiting"
    assert "waiting for the scheduler before this one" in capfd.readouterr().err
    os.close(other)
    assert loop.process._get_spool() is True


def test_a_master_that_is_gone_ends_it(loop: Loop) -> None:
    loop.start()
    loop.runtime.lifeline.hold()
    loop.turn(lambda: loop.process._ending is signal.SIGTERM)


def test_a_stop_settles_what_is_under_way(loop: Loop) -> None:
    loop.start()
    loop.send("b@slow.test")
    loop.turn(lambda: loop.process._scheduler._jobs)
    loop.signals.send(signal.SIGTERM)
    loop.turn(lambda: loop.process._ending)
    loop.process._end()
    assert loop.files(Queue.ACTIVE) == []


def test_a_stop_is_bounded(loop: Loop) -> None:
    loop.start()
    queue_id = loop.send("b@forever.test")
    loop.turn(lambda: loop.process._scheduler._jobs)
    loop.signals.send(signal.SIGTERM)
    loop.turn(lambda: loop.process._ending)
    begin = time.monotonic()
    loop.process._end()
    assert 1.5 < time.monotonic() - begin < 10
    assert loop.files(Queue.ACTIVE) == [queue_id]


def test_a_handover_gives_the_spool_away_at_once_and_touches_nothing_more(loop: Loop) -> None:
    loop.start()
    queue_id = loop.send("b@slow.test")
    loop.turn(lambda: loop.process._scheduler._jobs)
    loop.signals.send(signal.SIGUSR1)
    loop.turn(lambda: loop.process._ending)
    loop.process._end()
    os.close(loop.spool.lock())
    assert loop.files(Queue.ACTIVE) == [queue_id], "the next scheduler settles it"
    assert [state.settled for state in loop.spool.load(Queue.ACTIVE, queue_id).states] == [True]


def test_a_handover_is_ended_by_a_stop(loop: Loop) -> None:
    loop.start()
    loop.send("b@forever.test")
    loop.turn(lambda: loop.process._scheduler._jobs)
    loop.signals.send(signal.SIGUSR1)
    loop.turn(lambda: loop.process._ending)
    loop.signals.send(signal.SIGTERM)
    begin = time.monotonic()
    loop.process._end()
    assert time.monotonic() - begin < 10


def test_a_handover_does_not_wait_for_a_delivery_process_that_hangs(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SILENCE", 1.0)
    loop.start()
    loop.send("b@forever.test")
    loop.turn(lambda: loop.process._scheduler._jobs)
    [pid] = loop.process._pool.pids()
    os.kill(pid, signal.SIGSTOP)
    loop.signals.send(signal.SIGUSR1)
    loop.turn(lambda: loop.process._ending)
    begin = time.monotonic()
    loop.process._end()
    assert 0.5 < time.monotonic() - begin < 10
    assert loop.process._pool.pids() == []


def test_messages_that_an_orphan_holds_are_waited_for(loop: Loop) -> None:
    queue_id = loop.send()
    os.rename(loop.root / "incoming" / queue_id, loop.root / "active" / queue_id)
    loop.start()
    with loop.spool.open(Queue.ACTIVE, queue_id):
        loop.turn(lambda: queue_id in loop.process._held_elsewhere)
        for _ in range(3):
            loop.process._turn()
        assert loop.files(Queue.ACTIVE) == [queue_id]
    loop.turn(lambda: not loop.files(Queue.ACTIVE))
    assert loop.process._held_elsewhere == []


def test_a_queue_that_cannot_be_looked_through_is_told_and_the_others_go_on(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    advance = Scan.advance

    def refuse(self: Scan) -> bool:
        if self.queue is Queue.INCOMING:
            raise OSError(5, "Input/output error")
        return advance(self)

    monkeypatch.setattr(Scan, "advance", refuse)
    loop.start()
    queue_id = encode(int(time.time()) * 1_000_000, 9)
    (loop.root / "deferred" / queue_id).write_bytes(b"garbage")
    loop.turn(lambda: queue_id in loop.files(Queue.CORRUPT))
    assert "cannot look through incoming: " in capfd.readouterr().err


def test_an_idle_loop_sleeps_until_something_is_due(loop: Loop) -> None:
    loop.start()
    loop.turn(lambda: loop.process._housekeeping and not loop.process._scans)
    now = time.monotonic()
    assert loop.process._milliseconds(now) > 1000
    queue_id = loop.send()
    os.rename(loop.root / "incoming" / queue_id, loop.root / "deferred" / queue_id)
    loop.process._scheduler.found_deferred(queue_id, time.time() + 0.5)
    assert 300 < loop.process._milliseconds(time.monotonic()) <= 501
