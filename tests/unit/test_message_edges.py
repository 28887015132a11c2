"""Open queue files: what is refused with which words, whose files are believed, and calls that do half of their work."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtad.errors import QueueFileDamaged
from mtad.spool.message import CHUNK, MAX_EVENTS, MAX_NULS, IncomingFile, OpenMessage, write_all
from mtad.spool.queue_file import MAX_ENVELOPE, PREAMBLE_SIZE, encode_envelope
from mtad.spool.queue_id import encode
from tests.unit.spool_aid import CONTENT, EVENTS, ID, directory, envelope, needs_root, read, store, unheard


@pytest.fixture
def active(tmp_path: Path) -> Iterator[int]:
    """A descriptor of an empty active/."""
    fd = directory(tmp_path / "active")
    yield fd
    os.close(fd)


def refused(active: int) -> str:
    """What is said when the message is opened."""
    with pytest.raises(QueueFileDamaged) as caught:
        OpenMessage.open(ID, active)
    return str(caught.value)


@needs_root
@pytest.mark.parametrize(
    ("file", "place", "good"), [(0, 0, True), (65534, 0, False), (1, 0, False), (65534, 65534, True), (0, 65534, True)]
)
def test_a_file_of_somebody_else_is_none_of_ours(active: int, tmp_path: Path, file: int, place: int, good: bool) -> None:
    path = store(tmp_path / "active", envelope())
    os.chown(path, file, 0)
    os.chown(tmp_path / "active", place, 0)
    if good:
        OpenMessage.open(ID, active).close()
    else:
        assert refused(active) == "the file belongs to another user"


def test_a_file_under_another_name_is_told(active: int, tmp_path: Path) -> None:
    other = encode(1_700_000_000_000_001, 4711)
    store(tmp_path / "active", envelope(other)).rename(tmp_path / "active" / ID)
    assert refused(active) == f"the file of {ID} holds message {other}"


@pytest.mark.parametrize("content", [CONTENT, b"x" * CHUNK * 2])
def test_content_that_is_cut_off_is_told(active: int, tmp_path: Path, content: bytes) -> None:
    path = store(tmp_path / "active", envelope(), content)
    os.truncate(path, path.stat().st_size - 1)
    assert refused(active) == "the content is shorter than it says"


def test_content_with_another_octet_is_told(active: int, tmp_path: Path) -> None:
    path = store(tmp_path / "active", envelope())
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert refused(active) == "the checksum of the content is wrong"


def test_large_content_is_told_at_its_end_only(active: int, tmp_path: Path) -> None:
    path = store(tmp_path / "active", envelope(), b"x" * CHUNK * 3)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with OpenMessage.open(ID, active) as opened:
        pieces: list[bytes] = []
        with pytest.raises(QueueFileDamaged, match=r"^the checksum of the content is wrong$"):
            pieces.extend(iter(opened.chunks().__next__, None))
        with pytest.raises(QueueFileDamaged):
            opened.verify()
        os.truncate(path, CHUNK * 2)
        with pytest.raises(QueueFileDamaged, match=r"^the content is shorter than it says$"):
            opened.verify()


def test_a_history_that_is_too_long_is_told(active: int, tmp_path: Path) -> None:
    path = store(tmp_path / "active", envelope())
    os.truncate(path, path.stat().st_size + MAX_EVENTS + 1)
    assert refused(active) == f"{MAX_EVENTS + 1} octets follow the content"


@pytest.mark.parametrize(("nuls", "good"), [(MAX_NULS - CHUNK, True), (MAX_NULS + 2 * CHUNK, False)])
def test_a_hole_is_no_power_cut(active: int, tmp_path: Path, nuls: int, good: bool) -> None:
    path = store(tmp_path / "active", envelope(), CONTENT, EVENTS)
    os.truncate(path, path.stat().st_size + nuls)
    if good:
        with OpenMessage.open(ID, active) as opened:
            assert opened.message.events == EVENTS
            assert opened.message.cut
    else:
        assert refused(active) == f"more than {MAX_NULS} NUL octets follow the content"


def test_lengths_around_what_is_read_at_once(active: int, tmp_path: Path) -> None:
    store(tmp_path / "active", envelope(), b"")
    with OpenMessage.open(ID, active) as opened:
        head = opened.message.head.content_offset
        assert opened.size == 0
    for over in range(-2, 3):
        content = b"c" * (CHUNK - head + over)
        path = store(tmp_path / "active" / str(over), envelope(), content, EVENTS)
        fd = directory(path.parent)
        with OpenMessage.open(ID, fd) as opened:
            assert opened.message.events == EVENTS
            assert b"".join(opened.chunks()) == content
        os.close(fd)


def test_a_delivery_shares_its_lock_and_a_reader_has_none(active: int, tmp_path: Path) -> None:
    path = store(tmp_path / "active", envelope())
    with (
        OpenMessage.open(ID, active),
        OpenMessage.open(ID, active),
        path.open("rb") as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with OpenMessage.open(ID, active, share=False) as opened, path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(OSError, match="Bad file descriptor"):
            opened.append(EVENTS[0])


def test_an_append_that_is_cut_short_is_made_again(active: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(tmp_path / "active", envelope())
    write = os.write
    flushed: list[int] = []
    lengths = [5, 1]

    def short(fd: int, data: bytes) -> int:
        return write(fd, data[: lengths.pop()]) if lengths else write(fd, data)

    monkeypatch.setattr(os, "fdatasync", flushed.append)
    with OpenMessage.open(ID, active) as opened:
        monkeypatch.setattr(os, "write", short)
        opened.append(*EVENTS[:2])
        assert flushed == []
        opened.append(*EVENTS[2:], durable=True)
        assert len(flushed) == 1
    assert read(path)[2] == EVENTS


def test_the_largest_envelope_that_is_taken(active: int) -> None:
    base = envelope(recipients=1)
    room = MAX_ENVELOPE - len(encode_envelope(base))
    for over in (0, 1):
        grown = envelope(recipients=1, sender=base.sender + "x" * (room + over))
        if over:
            with pytest.raises(OSError, match="the envelope is too large for a queue file") as caught:
                IncomingFile(active, grown, unheard)
            assert caught.value.errno == errno.EMSGSIZE
        else:
            IncomingFile(active, grown, unheard).discard()


def test_a_new_file_is_for_its_owner_and_locked_by_its_receiver(active: int, tmp_path: Path) -> None:
    file = IncomingFile(active, envelope(), unheard)
    file.write(b"x" * CHUNK)
    path = tmp_path / "active" / ID
    assert not path.exists()
    file.write(b"y")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with path.open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    file.commit()
    assert read(path)[1] == b"x" * CHUNK + b"y"


@pytest.mark.parametrize("end", ["commit", "discard"])
def test_nothing_is_taken_after_the_end(active: int, end: str) -> None:
    file = IncomingFile(active, envelope(), unheard)
    file.write(CONTENT)
    if end == "commit":
        file.commit()
    else:
        file.discard()
    acts: list[Callable[[], None]] = [lambda: file.write(CONTENT), file.commit]
    for act in acts:
        with pytest.raises(OSError, match="the message is already committed or discarded") as caught:
            act()
        assert caught.value.errno == errno.EBADF


def test_a_first_line_that_is_cut_short_fails_the_message(
    active: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: PREAMBLE_SIZE - 1], at))
    file = IncomingFile(active, envelope(), unheard)
    file.write(CONTENT)
    with pytest.raises(OSError, match="short write") as caught:
        file.commit()
    assert caught.value.errno == errno.EIO
    assert list((tmp_path / "active").iterdir()) == []


def test_a_descriptor_that_does_not_close_well_harms_no_message(
    active: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = os.close

    def badly(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, "Input/output error")

    file = IncomingFile(active, envelope(), unheard)
    file.write(CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", badly)
        file.commit()
    assert read(tmp_path / "active" / ID)[1] == CONTENT


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5), (35,), (0, 7), ()])
def test_write_all_writes_each_octet_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    write, left = os.write, list(sizes)
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[: left.pop(0)] if left else data))
        write_all(fd, CONTENT)
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert left == []


@pytest.mark.parametrize("over", range(-3, 4))
@pytest.mark.parametrize("content", [b"", CONTENT])
def test_an_envelope_around_what_is_read_at_once(active: int, tmp_path: Path, over: int, content: bytes) -> None:
    base = envelope(recipients=1)
    room = CHUNK - PREAMBLE_SIZE - 1 - len(encode_envelope(base))
    grown = envelope(recipients=1, sender=base.sender + "x" * (room + over))
    store(tmp_path / "active", grown, content, EVENTS[:0])
    with OpenMessage.open(ID, active) as opened:
        assert opened.message.envelope == grown
        assert b"".join(opened.chunks()) == content


@pytest.mark.parametrize("content", [CONTENT, b"x" * CHUNK * 2])
def test_a_record_about_a_recipient_that_is_not_there_is_told(active: int, tmp_path: Path, content: bytes) -> None:
    store(tmp_path / "active", envelope(recipients=1), content, EVENTS[:1])
    assert refused(active) == "a record names a recipient that is not in the envelope"


def test_a_power_cut_up_to_a_sector_of_the_file_is_passed_over(active: int, tmp_path: Path) -> None:
    path = store(tmp_path / "active", envelope(), CONTENT, EVENTS[:1])
    size = path.stat().st_size
    os.truncate(path, size + 512 - size % 512)
    with path.open("ab") as file:
        file.write(b"x")
    with OpenMessage.open(ID, active) as opened:
        opened.append(EVENTS[1])
    with OpenMessage.open(ID, active) as opened:
        assert opened.message.events == EVENTS[:2]
    os.truncate(path, size)
    os.truncate(path, size + 513 - size % 512)
    with path.open("ab") as file:
        file.write(b"x")
    assert refused(active) == "NUL octets stand in a record"
