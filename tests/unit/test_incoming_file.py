"""A message on its way in: what is in the file system before the commit, after it, and after a discard."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtad.envelope import Recipient
from mtad.errors import QueueFileUnfinished
from mtad.spool.message import CHUNK, IncomingFile, OpenMessage
from mtad.spool.queue_file import MAX_ENVELOPE, UNFINISHED, parse_wakeup
from mtad.spool.queue_id import encode
from mtad.spool.queues import Queue, Spool
from tests.unit.spool_aid import CONTENT, ID, Worker, directory, envelope, read, unheard

LINE: Final = b"A line of a long message, as long as lines are wont to be in mail.\r\n"
LARGE: Final = LINE * 4_000


@pytest.fixture
def incoming(tmp_path: Path) -> Iterator[int]:
    """A descriptor of an empty incoming/."""
    fd = directory(tmp_path / "incoming")
    yield fd
    os.close(fd)


def begin(incoming: int, content: bytes = b"") -> IncomingFile:
    """A message of which some content has come."""
    file = IncomingFile(incoming, envelope(), unheard)
    for start in range(0, len(content), 5_000):
        file.write(content[start : start + 5_000])
    return file


def test_a_small_message_is_not_in_the_file_system_before_its_commit(incoming: int) -> None:
    file = begin(incoming, CONTENT)
    assert os.listdir(incoming) == []
    file.commit()
    assert os.listdir(incoming) == [ID]


def test_a_large_message_is_unfinished_and_locked_before_its_commit(incoming: int, tmp_path: Path) -> None:
    file = begin(incoming, LARGE)
    path = tmp_path / "incoming" / ID
    assert path.read_bytes().startswith(UNFINISHED)
    with path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with pytest.raises(QueueFileUnfinished):
        OpenMessage.open(ID, incoming, share=False)
    file.discard()
    assert os.listdir(incoming) == []


@pytest.mark.parametrize("content", [b"", CONTENT, LARGE], ids=["empty", "small", "large"])
def test_promise_1_a_committed_message_is_whole_and_free(incoming: int, tmp_path: Path, content: bytes) -> None:
    file = begin(incoming, content)
    file.commit()
    path = tmp_path / "incoming" / ID
    assert read(path) == (envelope(), content, ())
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 1
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("content", [b"", CONTENT, LARGE], ids=["empty", "small", "large"])
def test_a_discarded_message_leaves_nothing(incoming: int, content: bytes) -> None:
    file = begin(incoming, content)
    file.discard()
    file.discard()
    assert os.listdir(incoming) == []
    with pytest.raises(OSError, match="discarded"):
        file.commit()
    with pytest.raises(OSError, match="discarded"):
        file.write(b"more")
    assert os.listdir(incoming) == []


def test_a_committed_message_survives_what_a_confused_caller_does_next(incoming: int, tmp_path: Path) -> None:
    file = begin(incoming, CONTENT)
    file.commit()
    file.discard()
    with pytest.raises(OSError, match="committed"):
        file.write(b"more")
    with pytest.raises(OSError, match="committed"):
        file.commit()
    assert read(tmp_path / "incoming" / ID)[1] == CONTENT


@given(st.lists(st.sampled_from([0, 1, 2, CHUNK // 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]), max_size=6))
@settings(max_examples=40)
def test_content_is_stored_as_it_came_wherever_it_was_cut(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    root = tmp_path_factory.mktemp("cuts")
    fd = directory(root)
    file = IncomingFile(fd, envelope(), unheard)
    pieces = [bytes([65 + number]) * size for number, size in enumerate(cuts)]
    for piece in pieces:
        file.write(piece)
    file.commit()
    os.close(fd)
    assert read(root / ID)[1] == b"".join(pieces)


def test_content_around_the_size_of_a_chunk(incoming: int, tmp_path: Path) -> None:
    # One of these files ends exactly where the first read of a file ends, one ends there with its content.
    for size in (*range(CHUNK - 450, CHUNK + 3), 2 * CHUNK - 1, 2 * CHUNK):
        begin(incoming, b"x" * size).commit()
        assert read(tmp_path / "incoming" / ID) == (envelope(), b"x" * size, ())
        os.unlink(ID, dir_fd=incoming)


def test_promise_3_a_message_costs_memory_independent_of_its_size(incoming: int) -> None:
    piece = b"x" * 8192
    tracemalloc.start()
    try:
        file = begin(incoming)
        for _ in range(4 * 1024):
            file.write(piece)
        file.commit()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * CHUNK


def test_the_wakeup_comes_after_the_commit_and_holds_the_head(incoming: int, tmp_path: Path) -> None:
    heard: list[tuple[str, bytes]] = []

    def hear(queue_id: str, line: bytes) -> None:
        assert read(tmp_path / "incoming" / ID)[1] == CONTENT
        heard.append((queue_id, line))

    file = IncomingFile(incoming, envelope(), hear)
    file.write(CONTENT)
    assert heard == []
    file.commit()
    ((queue_id, line),) = heard
    assert queue_id == ID
    head = parse_wakeup(line)
    assert head.envelope == envelope()
    assert (tmp_path / "incoming" / ID).read_bytes()[head.content_offset :] == CONTENT


def test_a_wakeup_that_fails_does_not_make_the_message_fail(incoming: int, tmp_path: Path) -> None:
    def deaf(_queue_id: str, _line: bytes) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "the scheduler is down")

    file = IncomingFile(incoming, envelope(), deaf)
    file.write(CONTENT)
    file.commit()
    file.discard()
    assert read(tmp_path / "incoming" / ID)[1] == CONTENT


def test_a_file_of_the_same_name_is_never_overwritten_nor_removed(incoming: int, tmp_path: Path) -> None:
    begin(incoming, CONTENT).commit()
    for content in (b"another", LARGE):
        with pytest.raises(FileExistsError):
            begin(incoming, content).commit()
    assert read(tmp_path / "incoming" / ID)[1] == CONTENT


def test_an_envelope_that_no_reader_would_believe_is_refused_at_once(incoming: int) -> None:
    huge = envelope(recipients=MAX_ENVELOPE // 30)
    assert len(huge.recipients) > 100_000
    with pytest.raises(OSError, match="too large"):
        IncomingFile(incoming, huge, unheard)


def test_an_envelope_larger_than_a_chunk_is_stored(incoming: int, tmp_path: Path) -> None:
    recipients = tuple(Recipient(f"{'x' * 60}{number}@example.net") for number in range(2_000))
    big = envelope().__class__(id=ID, arrival=1.0, sender="", recipients=recipients)
    file = IncomingFile(incoming, big, unheard)
    file.write(LARGE)
    file.commit()
    assert read(tmp_path / "incoming" / ID) == (big, LARGE, ())


def test_promise_2_a_killed_receiver_leaves_what_a_sweep_removes(tmp_path: Path) -> None:
    Spool(str(tmp_path), create=True).close()
    worker = Worker(
        """
        from mtad.spool.queues import Spool
        from tests.unit.spool_aid import envelope
        file = Spool(sys.argv[1]).enter(envelope())
        file.write(b"x" * 100_000)
        ready()
        """,
        tmp_path,
    )
    spool = Spool(str(tmp_path))
    assert list(spool.names(Queue.INCOMING)) == [ID]
    assert spool.in_work(Queue.INCOMING, ID)
    assert not spool.sweep(ID)
    worker.kill()
    assert not spool.in_work(Queue.INCOMING, ID)
    with pytest.raises(QueueFileUnfinished):
        spool.load(Queue.INCOMING, ID)
    assert spool.sweep(ID)
    assert list(spool.names(Queue.INCOMING)) == []
    assert not spool.sweep(ID)
    spool.close()


def test_a_sweep_that_comes_late_does_not_take_a_committed_message(tmp_path: Path) -> None:
    # The scan saw it unfinished; then its receiver committed, answered 250, and let go of the lock; then comes the sweep.
    spool = Spool(str(tmp_path), create=True)
    file = spool.enter(envelope())
    file.write(LARGE)
    with pytest.raises(QueueFileUnfinished):
        spool.load(Queue.INCOMING, ID)
    file.commit()
    assert not spool.sweep(ID)
    assert read(tmp_path / "incoming" / ID)[1] == LARGE
    spool.close()


def test_a_sweep_takes_no_damaged_file_and_no_stranger(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path), create=True)
    (tmp_path / "incoming" / ID).write_bytes(b"mtad-queue 1 damaged beyond recognition")
    assert not spool.sweep(ID)
    other = encode(2, 2)
    (tmp_path / "incoming" / other).mkdir()
    assert not spool.sweep(other)
    fifo = encode(3, 3)
    os.mkfifo(tmp_path / "incoming" / fifo)
    assert not spool.sweep(fifo)
    assert sorted(spool.names(Queue.INCOMING)) == sorted([ID, other, fifo])
    spool.close()


def test_receivers_and_a_sweep_that_never_rests(tmp_path: Path) -> None:
    # Invariant: no commit fails because of a sweep or a probe, and each committed message is there.
    spool = Spool(str(tmp_path), create=True)
    done = threading.Event()

    def sweep() -> None:
        while not done.is_set():
            for name in spool.names(Queue.INCOMING):
                spool.in_work(Queue.INCOMING, name)
                spool.sweep(name)

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    for sweeper in sweepers:
        sweeper.start()
    committed = []
    try:
        for number in range(300):
            file = spool.enter(envelope(spool.ids.new()))
            file.write(CONTENT if number % 3 else LARGE)
            file.commit()
            committed.append(file.envelope.id)
    finally:
        done.set()
        for sweeper in sweepers:
            sweeper.join()
    assert sorted(spool.names(Queue.INCOMING)) == committed
    assert all(read(tmp_path / "incoming" / queue_id)[1] in {CONTENT, LARGE} for queue_id in committed)
    spool.close()


def test_content_in_tiny_pieces_takes_no_more_memory_than_it_has_octets(incoming: int, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        file = IncomingFile(incoming, envelope(), unheard)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(CHUNK // 2):
            file.write(bytes(bytearray(b"xy")))
        assert tracemalloc.get_traced_memory()[0] - before < 2 * CHUNK
    finally:
        tracemalloc.stop()
    file.commit()
    assert read(tmp_path / "incoming" / ID)[1] == b"xy" * (CHUNK // 2)
