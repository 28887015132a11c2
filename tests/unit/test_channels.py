"""How the processes of one server talk to each other."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtad.net.channels import (
    MAX_PACKET,
    Counter,
    Lifeline,
    Mailslot,
    PacketRoom,
    WakePipe,
    end_sending,
    hung_up,
    notify,
    packet_pair,
    wait_at_most,
)
from tests.procs import private_kib


def _deep(tmp_path: Path) -> Path:
    """A directory whose name is longer than a socket's may be."""
    deep = tmp_path.joinpath(*["x" * 60] * 4)
    deep.mkdir(parents=True)
    return deep


def _readable(source: Mailslot | Lifeline | WakePipe) -> bool:
    return bool(select.select([source], [], [], 0)[0])


def test_packets_keep_their_boundaries() -> None:
    ours, theirs = packet_pair()
    big = b"x" * MAX_PACKET
    for packet in (b"one", b"two", big):
        ours.send(packet)
    assert [theirs.recv(MAX_PACKET) for _ in range(3)] == [b"one", b"two", big]
    end_sending(ours)
    assert theirs.recv(MAX_PACKET) == b""
    theirs.send(b"still heard")
    assert ours.recv(MAX_PACKET) == b"still heard"
    theirs.close()
    end_sending(ours)  # nobody is there any more; not worth a word
    ours.close()


def test_a_room_gives_each_packet_as_it_was_sent_and_grows_with_the_largest_only() -> None:
    ours, theirs = packet_pair()
    room = PacketRoom()
    before = private_kib()
    rooms = [PacketRoom() for _ in range(200)]
    for packet in (b"one", b"x" * MAX_PACKET, b"two"):
        ours.send(packet)
        assert room.receive(theirs) == packet
    for number, another in enumerate(rooms):
        ours.send(b"%d" % number)
        assert another.receive(theirs) == b"%d" % number
    assert private_kib() - before < 200 * MAX_PACKET / 1024 / 4
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        room.receive(theirs)
    ours.close()
    assert room.receive(theirs) == b""
    theirs.close()


def test_a_channel_that_is_hung_up() -> None:
    ours, theirs = packet_pair()
    with theirs:
        ours.send(b"one")
        assert not hung_up(theirs)
        ours.close()
        assert hung_up(theirs)
        assert theirs.recv(MAX_PACKET) == b"one"


@pytest.mark.parametrize("seconds", [0.02, 1.01])
def test_whoever_reads_waits_no_longer_than_that(seconds: float) -> None:
    ours, theirs = packet_pair()
    with ours, theirs:
        wait_at_most(theirs, seconds)
        ours.send(b"one")
        assert theirs.recv(MAX_PACKET) == b"one"
        begin = time.monotonic()
        with pytest.raises(BlockingIOError):
            PacketRoom().receive(theirs)
        assert time.monotonic() - begin > seconds - 0.01


def test_mailslot(tmp_path: Path) -> None:
    path = str(_deep(tmp_path) / "slot")
    assert not Mailslot.send(path, b"nobody is there")
    slot = Mailslot(path)
    assert slot.receive() is None
    assert Mailslot.send(path, b"one")
    assert Mailslot.send(path, b"x" * 100_000)
    assert _readable(slot)
    assert slot.receive() == b"one"
    assert slot.receive() == b"x" * 100_000
    assert slot.receive() is None
    assert os.stat(path).st_mode & 0o777 == 0o600
    slot.close()
    assert not Mailslot.send(path, b"it is dead")
    second = Mailslot(path)  # takes over what the dead one left
    assert Mailslot.send(path, b"two")
    assert second.receive() == b"two"
    second.close()


def test_mailslot_in_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Mailslot(str(tmp_path / "missing" / "slot"))
    assert not Mailslot.send(str(tmp_path / "missing" / "slot"), b"x")


def test_counter(tmp_path: Path) -> None:
    path = str(_deep(tmp_path) / "counter")
    assert Counter.ask(path) is None
    counter = Counter(path)
    counter.answer(b"nobody asked")
    pid = os.fork()
    if pid == 0:
        os._exit(0 if Counter.ask(path) == b"x" * 50_000 else 1)
    select.select([counter], [], [], 5)
    counter.answer(b"x" * 50_000)
    assert os.waitpid(pid, 0)[1] == 0
    counter.close()
    assert Counter.ask(path) is None


def test_the_counter_waits_for_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "counter")
    counter = Counter(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
        visitor.connect(path)
        counter.answer(b"x" * 10_000_000)  # cut where the buffer ends
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
        visitor.connect(path)
    counter.answer(b"the visitor has gone")
    counter.close()


def _without_descriptors(act: Callable[[], bool]) -> bool:
    """Whether ``act`` says so in a process that has no descriptor left."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            with contextlib.suppress(OSError):
                while True:
                    os.dup(0)
            code = 0 if act() else 2
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def test_a_visitor_for_whom_there_is_no_descriptor_keeps_nobody_busy(tmp_path: Path) -> None:
    path = str(tmp_path / "counter")
    counter = Counter(path)
    with socket.socket(socket.AF_UNIX) as visitor:
        visitor.connect(path)

        def act() -> bool:
            begin = time.monotonic()
            counter.answer(b"x")
            return time.monotonic() - begin > 0.05 and bool(select.select([counter], [], [], 0)[0])

        assert _without_descriptors(act)
        counter.answer(b"x")
        assert visitor.recv(10) == b"x"
    counter.close()


def test_nobody_is_told_when_there_is_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))

    def act() -> bool:
        notify("STOPPING=1")
        return True

    assert _without_descriptors(act)


def test_wake_pipe() -> None:
    pipe = WakePipe()
    assert pipe.receive() == []
    pipe.send("ID1", b"first\n")
    pipe.send("ID2", b"second\n")
    assert _readable(pipe)
    assert pipe.receive() == [b"first", b"second"]
    pipe.send("ID3", b"x" * select.PIPE_BUF + b"\n")
    assert pipe.receive() == [b"ID3"], "what is not written in one piece is only named"
    _close(pipe)


def test_a_full_wake_pipe_makes_nobody_wait() -> None:
    pipe = WakePipe()
    line = b"x" * 4000 + b"\n"
    for _ in range(1000):
        pipe.send("ID", line)
    received = 0
    while lines := pipe.receive():
        assert set(lines) == {line[:-1]}, "whole lines or none"
        received += len(lines)
    assert 10 < received < 1000
    _close(pipe)


def _close(pipe: WakePipe | Lifeline) -> None:
    for fd in (pipe._read, pipe._write):
        try:
            os.close(fd)
        except OSError:
            pass  # closed in the test


def test_lines_of_many_writers_stay_whole() -> None:
    pipe = WakePipe()
    pids = []
    for letter in (b"a", b"b", b"c"):
        pid = os.fork()
        if pid == 0:
            for _ in range(200):
                pipe.send("ID", letter * 300 + b"\n")
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    lines = []
    while received := pipe.receive():
        lines += received
    assert sorted(lines) == sorted([letter * 300 for letter in (b"a", b"b", b"c")] * 200)
    _close(pipe)


def test_lifeline() -> None:
    """It can be read once the master is gone, however it went, and not before."""
    told, tell = os.pipe()
    looked, look = os.pipe()
    master = os.fork()
    if master == 0:
        line = Lifeline()
        if os.fork() == 0:
            line.hold()
            before = _readable(line)
            os.write(look, b"x")
            os.write(tell, b"1" if not before and select.select([line], [], [], 10)[0] else b"0")
            os._exit(0)
        os.read(looked, 1)
        os.kill(os.getpid(), 9)
    os.waitpid(master, 0)
    assert os.read(told, 1) == b"1"
    os.close(look)
    os.close(looked)
    os.close(told)
    os.close(tell)


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, abstract: bool) -> None:
    name = f"@mtad-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    notify("nobody is there")
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    notify("nobody is there yet")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0") if abstract else name)
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"
