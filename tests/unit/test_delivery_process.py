"""The delivery process: jobs in, results out, and the queue file in between, over a real channel."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from mtad.delivery import process
from mtad.delivery.jobs import Job, Result, job_encoder, result_decoder
from mtad.delivery.process import OwnAddresses
from mtad.delivery.transport import Content, Interrupted, Task
from mtad.net.channels import MAX_PACKET
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.progress import Doubt
from mtad.spool.message import OpenMessage
from mtad.spool.queues import Queue
from tests.site import await_value
from tests.unit.delivery_aid import LATER, NEVER, SENT, Deliver, World, broken, giving


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    world = World(tmp_path)
    yield world
    world.close()


# -- one job ----------------------------------------------------------------------------------------------------------


def test_what_was_done_stands_in_the_file_before_it_is_answered(world: World) -> None:
    queue_id = world.message("a@far.test", "b@far.test")
    world.script(giving(SENT, LATER))
    assert world.work(queue_id, 0, 1) == Result(7, ((0, SENT), (1, LATER)), host="mx.far.test")
    doubt, attempt = world.events(queue_id)
    assert isinstance(doubt, Doubt)
    assert (doubt.recipients, doubt.host) == ((0, 1), "mx.far.test")
    assert attempt == Attempt(1.0, ((0, SENT), (1, LATER)), host="mx.far.test")


def test_the_last_outcome_of_several_attempts_counts(world: World) -> None:
    queue_id = world.message()
    world.script(lambda *_: [Attempt(1.0, ((0, LATER),), host="mx1"), Attempt(2.0, ((0, SENT),), host="mx2")])
    assert world.work(queue_id).outcomes == ((0, SENT),)
    assert len(world.events(queue_id)) == 2


def test_the_file_says_when_the_message_was_taken_in_hand(world: World) -> None:
    queue_id = world.message()
    world.worker.work(Job(7, queue_id, "smtp", "far.test", (0,), active=4.5))
    assert [event.active for event in world.events(queue_id) if isinstance(event, Attempt)] == [4.5]


def test_the_answer_says_that_ipv4_was_the_rescue_and_the_job_that_it_is_enough(world: World) -> None:
    blame = Deferred("4.7.25", "no PTR", "mx.far.test", "550 5.7.25 no PTR")
    tasks: list[Task] = []

    def deliver(task: Task, _content: Content, _in_doubt: Callable[[str], None]) -> list[Attempt]:
        tasks.append(task)
        return [
            Attempt(1.0, ((0, blame),), host="mx1.far.test", address="[2001:db8::1]:25"),
            Attempt(1.0, ((0, SENT),), host="mx2.far.test", address="192.0.2.1:25"),
        ]

    world.script(deliver)
    result = world.worker.work(Job(7, world.message(), "smtp", "far.test", (0,)))
    assert result == Result(7, ((0, SENT),), host="mx1.far.test", ipv4=True)
    world.worker.work(Job(7, world.message(), "smtp", "far.test", (0,), ipv4=True))
    assert [task.ipv4 for task in tasks] == [False, True]


def test_a_local_delivery_lands_in_the_maildir(world: World) -> None:
    queue_id = world.message("alice@example.org")
    [(_, outcome)] = world.work(queue_id, transport="local").outcomes
    assert isinstance(outcome, Delivered)
    [stored] = (world.mail / "alice" / "new").iterdir()
    assert stored.read_bytes().endswith(b"Subject: x\n\nhello\n")


def test_a_report_enters_the_spool_and_wakes_the_scheduler(world: World) -> None:
    queue_id = world.message("a@far.test", "b@far.test")
    world.script(giving(NEVER, SENT))
    world.work(queue_id, 0, 1)
    result = world.work(queue_id, 0, transport="bounce")
    [reported] = result.reports
    assert (reported.recipients, reported.kind) == ((0,), "failure")
    assert list(world.spool.names(Queue.INCOMING)) == [reported.report]
    [line] = world.runtime.wake.receive()
    assert reported.report.encode() in line


def test_a_report_about_nothing_is_answered_as_none(world: World) -> None:
    assert world.work(world.message(), transport="bounce") == Result(7)


def test_a_report_that_cannot_be_stored_is_answered_as_none(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    queue_id = world.message()
    world.script(giving(NEVER))
    world.work(queue_id)

    def refuse(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    assert world.work(queue_id, transport="bounce") == Result(7)
    assert "cannot store the report to its sender: " in capfd.readouterr().err


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_damaged_content_is_found_before_anything_is_delivered(world: World) -> None:
    queue_id = world.message(content=b"x" * 200_000)
    path = Path(world.spool.root) / "active" / queue_id
    data = bytearray(path.read_bytes())
    data[150_000] ^= 1
    path.write_bytes(data)
    world.script(lambda *_: pytest.fail("delivered"))
    assert "checksum" in world.work(queue_id).damaged


def test_a_file_that_is_gone_defers(world: World) -> None:
    [(_, outcome)] = world.work("0123456789zabc").outcomes
    assert outcome == Deferred("4.3.0", "queue file: No such file or directory")


def forgetful(task: Task, _content: Content, _in_doubt: Callable[[str], None]) -> list[Attempt]:
    return [Attempt(1.0, ((task.recipients[0], SENT),))]


def interrupted(task: Task, _content: Content, _in_doubt: Callable[[str], None]) -> list[Attempt]:
    raise Interrupted(RuntimeError("oops"), [Attempt(1.0, ((task.recipients[0], SENT), (task.recipients[1], LATER)))])


_BUG = Deferred("4.3.0", "internal error: RuntimeError")


@pytest.mark.parametrize(
    ("transport", "outcomes"),
    [(broken, ((0, _BUG), (1, _BUG))), (forgetful, ((0, SENT), (1, _BUG))), (interrupted, ((0, SENT), (1, _BUG)))],
)
def test_a_bug_in_a_transport_defers_and_is_told_and_who_has_the_message_has_it(
    world: World, capfd: pytest.CaptureFixture[str], transport: Deliver, outcomes: tuple[tuple[int, Outcome], ...]
) -> None:
    queue_id = world.message("a@far.test", "b@far.test")
    world.script(transport)
    assert world.work(queue_id, 0, 1).outcomes == outcomes
    assert "panic: " in capfd.readouterr().err
    assert isinstance(world.events(queue_id)[-1], Attempt)


@pytest.mark.parametrize(("outcome", "unwritten"), [(SENT, True), (NEVER, True), (LATER, False)])
def test_an_answer_says_when_the_file_does_not_have_it(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], outcome: Outcome, unwritten: bool
) -> None:
    queue_id = world.message()
    world.script(giving(outcome))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OpenMessage, "append", refuse)
    assert world.work(queue_id) == Result(7, ((0, outcome),), unwritten=unwritten, host="mx.far.test")
    assert "cannot be noted in the queue file" in capfd.readouterr().err


def test_an_answer_says_when_the_file_does_not_have_that_the_sender_was_told(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The report is committed by then: who took it for not sent would send another."""
    queue_id = world.message()
    world.spool.append(Queue.ACTIVE, queue_id, Attempt(1.0, ((0, NEVER),)))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(OpenMessage, "append", refuse)
    result = world.worker.work(Job(7, queue_id, "bounce", "", (0,)))
    assert result is not None
    [reported] = result.reports
    assert (result.unwritten, reported.recipients) == (True, (0,))
    assert world.spool.load(Queue.INCOMING, reported.report).envelope.kind == "bounce"
    assert "cannot be noted in the queue file" in capfd.readouterr().err


@pytest.mark.parametrize(("recipients", "durable"), [((0,), [False]), ((0, 1), [False, False])])
def test_a_message_that_lives_on_has_its_record_on_stable_storage(
    world: World, monkeypatch: pytest.MonkeyPatch, recipients: tuple[int, ...], durable: list[bool]
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    world.work(world.message("a@far.test", "b@far.test"), 0)
    assert len(synced) == 1
    world.work(world.message("a@far.test"), 0)
    assert len(synced) == 1, "one that is done with this attempt needs none"


def test_the_file_is_locked_while_it_is_worked_on(world: World) -> None:
    queue_id = world.message()
    seen: list[bool] = []

    def look(task: Task, content: Content, in_doubt: Callable[[str], None]) -> Sequence[Attempt]:
        seen.append(world.spool.in_work(Queue.ACTIVE, queue_id))
        return giving(SENT)(task, content, in_doubt)

    world.script(look)
    world.work(queue_id)
    assert seen == [True]
    assert not world.spool.in_work(Queue.ACTIVE, queue_id)


def test_a_job_whose_scheduler_has_hung_up_is_left_alone(world: World) -> None:
    """The next scheduler does it: what lay in the channel when this one ended must not be done twice."""
    queue_id = world.message()
    world.channel.shutdown(1)
    world.script(lambda *_: pytest.fail("delivered"))
    assert world.worker.work(Job(1, queue_id, "smtp", "far.test", (0,))) is None
    assert world.events(queue_id) == []


# -- threads ----------------------------------------------------------------------------------------------------------


def _starved(monkeypatch: pytest.MonkeyPatch, refusals: int) -> list[int]:
    """So often the machine gives no thread; what is in the list has been refused."""
    refused: list[int] = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name != "delivery" or len(refused) >= refusals:
            start(thread)
            return
        refused.append(1)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(process, "_TICK", 0.01)
    return refused


def test_jobs_wait_until_there_is_a_thread(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    refused = _starved(monkeypatch, 5)
    main = threading.Thread(target=world.worker.run, name="main")
    main.start()
    world.send(world.message())
    assert world.hear().outcomes == ((0, SENT),)
    assert len(refused) == 5
    world.channel.shutdown(1)
    main.join(10)
    assert not main.is_alive()
    assert capfd.readouterr().err.count("no thread for deliveries, they wait: can't start new thread") == 1


def test_who_never_gets_a_thread_ends_with_its_scheduler(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = _starved(monkeypatch, 1_000_000)
    main = threading.Thread(target=world.worker.run, name="main")
    main.start()
    queue_id = world.message()
    world.send(queue_id)
    await_value(lambda: len(refused) > 5, what="it tries again")
    world.channel.shutdown(1)
    main.join(10)
    assert not main.is_alive()
    assert world.events(queue_id) == []


# -- results that are too big -----------------------------------------------------------------------------------------


def test_a_result_that_is_too_big_for_a_packet_is_cut_and_not_lost() -> None:
    outcome = Failed("5.1.1", "x" * 5000, "r" * 300, "y" * 5000)
    result = Result(3, tuple((index, outcome) for index in range(50)), unwritten=True)
    packet = process._fit(result)
    assert len(packet) <= MAX_PACKET < len(job_encoder.encode(result))
    cut = result_decoder.decode(packet)
    assert (cut.number, cut.unwritten, len(cut.outcomes)) == (3, True, 50)
    assert {type(one) for _, one in cut.outcomes} == {Failed}
    small = msgspec.structs.replace(result, outcomes=((0, outcome),))
    assert result_decoder.decode(process._fit(small)) == small


# -- who are we -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listening", "host", "port", "own"),
    [
        (["192.0.2.1:25"], "192.0.2.1", 25, True),
        (["192.0.2.1:25"], "192.0.2.1", 26, False),
        (["192.0.2.1:25"], "192.0.2.2", 25, False),
        (["[::1]:25"], "::1", 25, True),
        (["0.0.0.0:25"], "127.0.0.1", 25, True),
        (["0.0.0.0:25"], "192.0.2.99", 25, False),
        (["0.0.0.0:25"], "::1", 25, False),
        (["[::]:25"], "::1", 25, True),
        ([], "127.0.0.1", 25, False),
    ],
)
def test_our_own_addresses(listening: list[str], host: str, port: int, own: bool) -> None:
    assert OwnAddresses(listening)(host, port) is own
