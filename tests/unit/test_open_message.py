"""A committed queue file that is open: its content, its growing history, and what damage to it is noticed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.outcome import Attempt, Deferred, Delivered
from mtad.progress import Doubt
from mtad.spool.message import CHUNK, OpenMessage, write_all
from mtad.spool.queue_file import encode_event
from mtad.spool.queue_id import encode
from tests.unit.spool_aid import CONTENT, EVENTS, ID, Worker, directory, envelope, read, store

LARGE: Final = bytes(range(256)) * 1_000


@pytest.fixture
def active(tmp_path: Path) -> Iterator[int]:
    """A descriptor of an empty active/."""
    fd = directory(tmp_path / "active")
    yield fd
    os.close(fd)


def test_a_message_is_its_envelope_its_content_and_its_history(active: int, tmp_path: Path) -> None:
    store(tmp_path / "active", envelope(), CONTENT, EVENTS)
    with OpenMessage.open(ID, active) as message:
        assert message.message.envelope == envelope()
        assert message.size == len(CONTENT)
        assert list(message.chunks()) == [CONTENT]
        assert message.message.events == EVENTS
        message.verify()


def test_content_comes_in_bounded_pieces_and_as_often_as_asked(active: int, tmp_path: Path) -> None:
    store(tmp_path / "active", envelope(), LARGE, EVENTS)
    with OpenMessage.open(ID, active) as message:
        for _ in range(2):
            pieces = list(message.chunks())
            assert b"".join(pieces) == LARGE
            assert max(map(len, pieces)) <= CHUNK
        half, whole = message.chunks(), message.chunks()
        next(half)
        assert b"".join(whole) == LARGE
        message.verify()


def test_no_content_is_no_piece(active: int, tmp_path: Path) -> None:
    store(tmp_path / "active", envelope(), b"")
    with OpenMessage.open(ID, active) as message:
        assert list(message.chunks()) == []
        message.verify()


def test_promise_4_what_is_appended_is_there_for_the_next_reader(active: int, tmp_path: Path) -> None:
    file = store(tmp_path / "active", envelope(), LARGE)
    before = file.read_bytes()
    with OpenMessage.open(ID, active) as message:
        for number, event in enumerate(EVENTS):
            message.append(event, durable=bool(number % 2))
            assert read(file)[2] == EVENTS[: number + 1]
        assert message.message.events == ()
        assert b"".join(message.chunks()) == LARGE
    # Promise 3: content is written once and never again.
    assert file.read_bytes().startswith(before)


def test_promise_4_history_of_many_attempts_is_read_whole(active: int, tmp_path: Path) -> None:
    events = tuple(Attempt(float(number), ((1, Deferred("4.4.1", "timed out")),), "mx") for number in range(2_000))
    file = store(tmp_path / "active", envelope(), CONTENT, events)
    assert file.stat().st_size > 2 * CHUNK
    assert read(file) == (envelope(), CONTENT, events)


def test_appends_of_several_threads_and_a_process_do_not_mix(active: int, tmp_path: Path) -> None:
    file = store(tmp_path / "active", envelope(), LARGE)
    program = """
        from mtad.progress import Doubt
        from mtad.spool.queues import Queue, Spool
        with Spool(sys.argv[1]).open(Queue.ACTIVE, sys.argv[2]) as message:
            ready()
            for number in range(300):
                message.append(Doubt(float(number), (1,), "process" + "x" * number))
    """
    for name in ("incoming", "deferred", "hold", "corrupt"):
        (tmp_path / name).mkdir()
    worker = Worker(program, tmp_path, ID)

    def append(name: str) -> None:
        with OpenMessage.open(ID, active) as message:
            for number in range(300):
                message.append(Doubt(float(number), (0,), name + "x" * number))

    threads = [threading.Thread(target=append, args=(name,)) for name in ("one", "two")]
    worker.go()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.finish()
    events = read(file)[2]
    for name in ("one", "two", "process"):
        mine = [event for event in events if isinstance(event, Doubt) and event.host.startswith(name)]
        assert [event.at for event in mine] == list(range(300))


def test_an_append_after_a_torn_one_is_read(active: int, tmp_path: Path) -> None:
    file = store(tmp_path / "active", envelope(), CONTENT, EVENTS[:1])
    torn = encode_event(EVENTS[1])
    for cut in range(len(torn) - 1):
        with file.open("ab") as crashed:
            crashed.write(torn[:cut])
        assert read(file)[2] == EVENTS[:1]
        with OpenMessage.open(ID, active) as message:
            message.append(EVENTS[2])
        assert read(file)[2] == (EVENTS[0], EVENTS[2])
        file.unlink()
        store(tmp_path / "active", envelope(), CONTENT, EVENTS[:1])


def test_a_disk_that_fills_up_in_the_middle_of_an_append_harms_no_other_event(active: int, tmp_path: Path) -> None:
    file = store(tmp_path / "active", envelope(), CONTENT, EVENTS[:1])
    size = file.stat().st_size
    worker = Worker(
        """
        import resource
        from mtad.spool.message import OpenMessage
        from tests.unit.spool_aid import EVENTS, ID
        with OpenMessage.open(ID, os.open(sys.argv[1], os.O_RDONLY)) as message:
            ready()
            for limit in range(int(sys.argv[2]), int(sys.argv[2]) + 40):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                try:
                    message.append(EVENTS[1])
                except OSError as fault:
                    say(fault.errno)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            message.append(EVENTS[2])
        """,
        tmp_path / "active",
        size,
    )
    said = worker.finish()
    assert said == ["27"] * 40  # EFBIG: none was taken for written
    assert read(file) == (envelope(), CONTENT, (EVENTS[0], EVENTS[2]))


def test_write_all_goes_on_after_a_short_write() -> None:
    reader, writer = os.pipe()
    got = bytearray()

    def drain() -> None:
        while data := os.read(reader, 1_000):
            got.extend(data)

    os.set_blocking(writer, True)
    thread = threading.Thread(target=drain)
    thread.start()
    write_all(writer, LARGE)
    os.close(writer)
    thread.join()
    os.close(reader)
    assert bytes(got) == LARGE


@pytest.mark.parametrize("content", [CONTENT, LARGE], ids=["small", "large"])
def test_promise_6_changed_content_is_never_given_out_whole(active: int, tmp_path: Path, content: bytes) -> None:
    file = store(tmp_path / "active", envelope(), content, EVENTS)
    data = file.read_bytes()
    start = data.index(content)
    for place in (start, start + len(content) // 2, start + len(content) - 1):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        given = bytearray()
        with pytest.raises(QueueFileDamaged, match="checksum"), OpenMessage.open(ID, active) as message:  # noqa: PT012
            for chunk in message.chunks():
                given += chunk
        assert len(given) < len(content)
    file.write_bytes(data)
    assert read(file)[1] == content


def test_promise_6_a_file_that_shrinks_while_it_is_read_is_damaged(active: int, tmp_path: Path) -> None:
    file = store(tmp_path / "active", envelope(), LARGE)
    with OpenMessage.open(ID, active) as message:
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(QueueFileDamaged, match="shorter"):
            message.verify()


def test_promise_6_a_file_under_the_name_of_another_is_damaged(active: int, tmp_path: Path) -> None:
    other = encode(1, 1)
    store(tmp_path / "active", envelope()).rename(tmp_path / "active" / other)
    with pytest.raises(QueueFileDamaged, match=ID):
        OpenMessage.open(other, active)


def test_promise_6_a_huge_sparse_file_is_refused_without_reading_it(active: int, tmp_path: Path) -> None:
    file = store(tmp_path / "active", envelope())
    os.truncate(file, 10 * 2**30)
    with pytest.raises(QueueFileDamaged, match="octets follow"):
        OpenMessage.open(ID, active)


@pytest.mark.parametrize("share", [True, False])
def test_what_is_no_queue_file_is_refused_and_does_not_block(active: int, tmp_path: Path, share: bool) -> None:
    place = tmp_path / "active"
    store(tmp_path, envelope())
    names = [encode(number, 1) for number in range(5)]
    (place / names[0]).symlink_to(tmp_path / ID)
    os.mkfifo(place / names[1])
    (place / names[2]).mkdir()
    (place / names[3]).write_bytes(b"")
    for name in names[:3]:
        with pytest.raises(OSError, match=r"."):
            OpenMessage.open(name, active, share=share)
    with pytest.raises(QueueFileUnfinished):
        OpenMessage.open(names[3], active, share=share)
    with pytest.raises(FileNotFoundError):
        OpenMessage.open(names[4], active, share=share)


def test_no_descriptor_is_lost_whatever_happens(active: int, tmp_path: Path) -> None:
    file = store(tmp_path / "active", envelope(), LARGE)
    data = file.read_bytes()
    before = os.listdir("/proc/self/fd")
    for size in (0, 50, 200, 10_000, len(data)):
        os.truncate(file, size) if size < len(data) else file.write_bytes(data)
        for _ in range(10):
            try:
                with OpenMessage.open(ID, active) as message:
                    message.verify()
            except (QueueFileDamaged, QueueFileUnfinished):
                pass
        file.write_bytes(data)
    assert os.listdir("/proc/self/fd") == before


def test_a_reader_without_a_lock_can_read_what_is_in_work(active: int, tmp_path: Path) -> None:
    store(tmp_path / "active", envelope(), CONTENT, EVENTS)
    with OpenMessage.open(ID, active) as one, OpenMessage.open(ID, active) as two:
        with OpenMessage.open(ID, active, share=False) as three:
            assert one.message == two.message == three.message
        with OpenMessage.open(ID, active, share=False) as three, pytest.raises(OSError, match="descriptor"):
            three.append(EVENTS[0])


def test_a_recorded_delivery_is_settled(active: int, tmp_path: Path) -> None:
    store(tmp_path / "active", envelope(), CONTENT, [Attempt(1.0, ((0, Delivered("2.0.0", "sent")),))])
    with OpenMessage.open(ID, active, share=False) as message:
        assert [state.settled for state in message.message.states] == [True, False]
