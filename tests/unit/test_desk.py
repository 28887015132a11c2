"""The scheduler's desk: the socket and its visitors, and the answers out of the scheduler's tables."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest

from mtad.desk import (
    MOST_ASKED,
    MOST_ORDERED,
    AskLanes,
    AskMessages,
    Lanes,
    Messages,
    MessageView,
    Order,
    Ordered,
    Refused,
    answer_decoder,
    encoder,
    question_decoder,
)
from mtad.net import desk as net_desk
from mtad.net.desk import IDLE, MOST_VISITORS, Desk, ask
from mtad.spool.queues import Queue
from tests.unit.scheduler_aid import DEAD, LATER, NEVER, OK, World, refuse

QUESTION: Final = AskMessages(("A",))


class Serving:
    """A desk whose loop runs in a thread, as the scheduler's does in its own."""

    def __init__(self, path: str, answer: Callable[[bytes], bytes]) -> None:
        self.desk = Desk(path)
        self._answer = answer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self.desk.fileno(), select.POLLIN)
        while not self._stop.is_set():
            if poll.poll(10):
                self.desk.serve(self._answer)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.desk.close()


def echo(question: bytes) -> bytes:
    """Answers with the ids of the question."""
    asked = question_decoder.decode(question)
    return encoder.encode(Ordered(done=getattr(asked, "ids", ())))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "desk.sock")


@pytest.fixture
def serving(path: str) -> Iterator[Serving]:
    serving = Serving(path, echo)
    yield serving
    serving.close()


# -- the socket -------------------------------------------------------------------------------------------------------


def test_a_question_and_its_answer(serving: Serving, path: str) -> None:
    assert ask(path, QUESTION) == Ordered(done=("A",))
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_visitor_may_ask_again(serving: Serving, path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
        visitor.settimeout(10)
        visitor.connect(path)
        for name in ("A", "B"):
            visitor.send(encoder.encode(AskMessages((name,))))
            packet = visitor.recv(1000)
            assert packet[:1] == b"."
            assert answer_decoder.decode(packet[1:]) == Ordered(done=(name,))


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 131_072, 3_000_000])
def test_answers_of_any_length(path: str, size: int) -> None:
    text = "x" * size
    serving = Serving(path, lambda _question: encoder.encode(Refused(text)))
    try:
        assert ask(path, QUESTION) == Refused(text)
    finally:
        serving.close()


def test_nobody_answers(path: str, tmp_path: Path) -> None:
    assert ask(path, QUESTION) is None
    desk = Desk(path)
    start = time.monotonic()
    assert ask(path, QUESTION, timeout=0.05) is None, "nobody serves"
    assert time.monotonic() - start < 5
    desk.close()
    assert ask(path, QUESTION) is None, "what a dead scheduler leaves behind"
    assert ask(str(tmp_path / "no" / "desk.sock"), QUESTION) is None


def test_a_socket_that_was_left_behind_is_replaced(path: str) -> None:
    Desk(path).close()
    serving = Serving(path, echo)
    assert ask(path, QUESTION) == Ordered(done=("A",))
    serving.close()


def test_an_answer_that_is_none(path: str) -> None:
    serving = Serving(path, lambda _question: b"nonsense")
    assert ask(path, QUESTION) is None
    serving.close()


def test_visitors_who_go_at_any_moment(serving: Serving, path: str) -> None:
    for step in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
            visitor.connect(path)
            if step:
                visitor.send(encoder.encode(QUESTION))
            if step == 2:
                visitor.shutdown(socket.SHUT_RD)
    assert ask(path, QUESTION) == Ordered(done=("A",))


def test_a_visitor_who_has_gone_gets_nothing_done(path: str) -> None:
    """He says that nobody answered; what he wanted must not be done behind his back, when the server comes to it."""
    heard: list[bytes] = []
    desk = Desk(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
        visitor.connect(path)
        desk.serve(echo)
        visitor.send(encoder.encode(QUESTION))
    for _ in range(3):
        desk.serve(lambda question: heard.append(question) or b"")  # type: ignore[func-returns-value]
    assert heard == []
    assert not desk._visitors
    desk.close()


def test_a_visitor_who_does_not_read_holds_up_nobody(path: str) -> None:
    big = encoder.encode(Refused("x" * 5_000_000))
    served: list[bytes] = []

    def answer(question: bytes) -> bytes:
        served.append(question)
        return big if len(served) == 1 else echo(question)

    serving = Serving(path, answer)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as slow:
            slow.settimeout(10)
            slow.connect(path)
            slow.send(encoder.encode(QUESTION))
            while not served:
                time.sleep(0.001)
            slow.send(encoder.encode(QUESTION))  # not heard before the first is answered
            assert ask(path, QUESTION) == Ordered(done=("A",))
            parts: list[bytes] = []
            while not parts or parts[-1][:1] == b"+":
                parts.append(slow.recv(100_000))
            assert b"".join(part[1:] for part in parts) == big
            assert slow.recv(1000)[:1] == b"."
    finally:
        serving.close()


def test_one_turn_serves_a_bounded_number(path: str) -> None:
    desk = Desk(path)
    visitors = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(10)]
    try:
        for visitor in visitors:
            visitor.connect(path)
            visitor.send(encoder.encode(QUESTION))
        heard: list[bytes] = []
        turns: list[int] = []

        def answer(question: bytes) -> bytes:
            heard.append(question)
            return echo(question)

        while len(heard) < len(visitors):
            before = len(heard)
            assert select.select([desk], [], [], 10)[0], "somebody still waits"
            desk.serve(answer)
            turns.append(len(heard) - before)
        assert max(turns) <= net_desk.TURN
        assert len(turns) >= 3
    finally:
        for visitor in visitors:
            visitor.close()
        desk.close()


def test_when_all_places_are_taken_the_silent_ones_make_room(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(path)
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(MOST_VISITORS + 1)]
    try:
        for visitor in silent:
            visitor.connect(path)
        for _ in range(2 * MOST_VISITORS):
            desk.serve(echo)
        assert len(desk._visitors) == MOST_VISITORS
        desk.tidy()
        assert len(desk._visitors) == MOST_VISITORS, "they have just come"
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + IDLE + 1)
        desk.tidy()
        assert len(desk._visitors) == 0
        assert silent[0].recv(10) == b""
        silent[-1].send(encoder.encode(QUESTION))
        silent[-1].settimeout(10)
        for _ in range(3):
            desk.serve(echo)
        assert answer_decoder.decode(silent[-1].recv(1000)[1:]) == Ordered(done=("A",))
    finally:
        for visitor in silent:
            visitor.close()
        desk.close()


def test_a_child_that_closes_the_desk_leaves_it_to_its_parent(serving: Serving, path: str) -> None:
    assert ask(path, QUESTION) is not None
    pid = os.fork()
    if pid == 0:
        serving.desk.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert ask(path, QUESTION) == Ordered(done=("A",))


# -- the answers ------------------------------------------------------------------------------------------------------


class Pool:
    """Delivery processes: the job with number n is that of process 100 + n."""

    def pids(self) -> list[int]:
        return [101, 102]

    def pid_of(self, number: int) -> int:
        return 100 + number


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    world = World(tmp_path)
    yield world
    world.spool.close()


def answer(world: World, question: object) -> object:
    return answer_decoder.decode(world.scheduler.clerk.answer(encoder.encode(question), Pool()))


def view(world: World, queue_id: str) -> MessageView:
    found = answer(world, AskMessages((queue_id,)))
    assert isinstance(found, Messages)
    [told] = found.messages
    assert told.id == queue_id
    return told


def overview(world: World, **asked: object) -> Lanes:
    found = answer(world, AskLanes(**asked))  # type: ignore[arg-type]
    assert isinstance(found, Lanes)
    return found


def test_a_message_in_delivery_and_one_that_waits(world: World) -> None:
    world.deliveries.capacity = 1
    first = world.enter("a@x.test", "b@x.test")
    world.run()
    world.clock.advance(7)
    second = world.enter("c@x.test")
    world.run()
    world.clock.advance(3)
    told = view(world, first)
    [job] = told.jobs
    assert told.known
    assert (job.state, job.pid, job.recipients, job.since) == ("delivering", 101, (0, 1), world.clock.wall - 10)
    assert (job.lane.destination, job.lane.in_flight, job.lane.waiting) == ("x.test", 1, 1)
    [job] = view(world, second).jobs
    assert (job.state, job.pid, job.ahead, job.blocked, job.since) == ("waiting", 0, 0, "processes", world.clock.wall - 3)


def test_answers_stand_in_the_order_of_the_question(world: World) -> None:
    ids = [world.enter() for _ in range(3)]
    found = answer(world, AskMessages((ids[2], "nothing", ids[0])))
    assert isinstance(found, Messages)
    assert [(told.id, told.known) for told in found.messages] == [(ids[2], True), ("nothing", False), (ids[0], True)]


def test_a_deferred_message_is_due(world: World) -> None:
    queue_id = world.enter()
    world.deliver(LATER)
    told = view(world, queue_id)
    assert (told.known, told.jobs) == (False, ())
    assert told.due == pytest.approx(world.path(Queue.DEFERRED, queue_id).stat().st_mtime)


def test_a_report_that_is_being_written_is_a_job(world: World) -> None:
    queue_id = world.enter()
    world.deliver(NEVER)
    [job] = world.run()
    assert job.transport == "bounce"
    assert [(job.state, job.lane.transport) for job in view(world, queue_id).jobs] == [("delivering", "bounce")]


def test_what_the_disk_refuses_and_what_was_ordered(world: World) -> None:
    queue_id = world.enter()
    [job] = world.run()
    assert answer(world, Order("hold", (queue_id,))) == Ordered(later=(queue_id,))
    assert view(world, queue_id).ordered == "hold"
    refuse(world.spool, "hold", OSError(30, "Read-only file system"))
    world.finish(job, LATER)
    told = view(world, queue_id)
    assert (told.known, told.stuck, told.jobs) == (True, "Read-only file system", ())


def test_the_lanes_and_the_counts(world: World) -> None:
    started = world.clock.wall
    world.enter("a@x.test", "b@y.test", "c@z.test")
    world.enter("a@x.test")
    outcomes = {"x.test": OK, "y.test": NEVER, "z.test": DEAD}
    for job in list(world.run()):
        world.finish(job, outcomes[job.destination])
    world.clock.advance(10)
    told = overview(world)
    assert (told.delivered, told.failed, told.deferrals, told.started) == (2, 1, 1, started)
    assert (told.count, told.active, told.in_flight, told.waiting, told.deferred) == (4, 1, 0, 1, 0)
    assert told.processes == (101, 102)
    assert {lane.destination for lane in told.lanes} == {"", "x.test", "y.test", "z.test"}
    assert len(overview(world, most=2).lanes) == 2
    assert overview(world, most=-1).lanes == ()
    assert [lane.destination for lane in overview(world, destinations=("y.test", "unknown.test")).lanes] == ["y.test"]


@pytest.mark.parametrize(
    "question",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"type":"order","what":"burn","ids":[]}',
        b'{"type":"messages","ids":7}',
        encoder.encode(AskMessages(("A",) * (MOST_ASKED + 1))),
        encoder.encode(Order("delete", ("A",) * (MOST_ORDERED + 1))),
    ],
)
def test_what_is_no_question_is_refused(world: World, question: bytes) -> None:
    refused = answer_decoder.decode(world.scheduler.clerk.answer(question, Pool()))
    assert isinstance(refused, Refused)
    assert len(refused.why) < 300


def test_as_many_as_may_be_asked_about_are_answered(world: World) -> None:
    found = answer(world, AskMessages(("A",) * MOST_ASKED))
    assert isinstance(found, Messages)
    assert len(found.messages) == MOST_ASKED
    assert answer(world, Order("delete", ("A",) * MOST_ORDERED)) == Ordered(missing=("A",) * MOST_ORDERED)
    assert msgspec.json.decode(encoder.encode(QUESTION)) == {"type": "messages", "ids": ["A"]}
