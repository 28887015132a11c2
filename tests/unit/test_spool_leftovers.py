"""What fails at its commit is never taken for a message, also on a disk that does not let it go."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtad.errors import QueueFileUnfinished
from mtad.spool import leftovers
from mtad.spool.leftovers import LEFTOVERS, undo
from mtad.spool.message import IncomingFile
from mtad.spool.queues import Queue, Spool
from tests.site import await_value
from tests.unit.spool_aid import CONTENT, envelope


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(str(tmp_path / "spool"), create=True)
    yield spool
    spool.close()


def begun(spool: Spool) -> IncomingFile:
    file = spool.enter(envelope(spool.ids.new()))
    file.write(CONTENT)
    return file


def fail(file: IncomingFile, monkeypatch: pytest.MonkeyPatch, *refused: str) -> None:
    """Commit on a disk whose fsync fails, and which refuses these calls."""
    with monkeypatch.context() as patch:
        for call in ("fsync", *refused):
            patch.setattr(os, call, refuse)
        with pytest.raises(OSError, match="Read-only"):
            file.commit()


def test_it_is_removed(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(begun(spool), monkeypatch)
    assert list(spool.names(Queue.INCOMING)) == []
    assert not LEFTOVERS


@pytest.mark.parametrize("refused", [("unlink",), ("unlink", "ftruncate")], ids=["emptied", "marked"])
def test_what_cannot_be_removed_is_no_message(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, refused: tuple[str, ...]
) -> None:
    file = begun(spool)
    fail(file, monkeypatch, *refused)
    with pytest.raises(QueueFileUnfinished):
        spool.load(Queue.INCOMING, file.envelope.id)
    assert not spool.in_work(Queue.INCOMING, file.envelope.id)
    assert spool.sweep(file.envelope.id)
    assert not LEFTOVERS


def test_a_disk_that_refuses_everything(spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays in work, nothing new is made beside it, and it goes as soon as the disk lets it."""
    monkeypatch.setattr(leftovers, "PAUSE", 0.02)
    file = begun(spool)
    whole: list[bool] = []

    def marked(fd: int, data: bytes, offset: int) -> int:
        if not whole:  # the first line of the commit is written as ever
            whole.append(True)
            return pwrite(fd, data, offset)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        for call in ("fsync", "unlink", "ftruncate"):
            patch.setattr(os, call, refuse)
        patch.setattr(os, "pwrite", marked)
        with pytest.raises(OSError, match="Read-only"):
            file.commit()
        assert spool.load(Queue.INCOMING, file.envelope.id).envelope == file.envelope, "it looks as good as any"
        assert spool.in_work(Queue.INCOMING, file.envelope.id)
        assert len(LEFTOVERS) == 1
        for _ in range(3):
            with pytest.raises(OSError, match="cannot be removed yet"):
                begun(spool).commit()
        assert list(spool.names(Queue.INCOMING)) == [file.envelope.id]
        assert len(LEFTOVERS) == 1
    await_value(lambda: list(spool.names(Queue.INCOMING)) == [])
    await_value(lambda: not LEFTOVERS)
    after = begun(spool)
    after.commit()
    assert list(spool.names(Queue.INCOMING)) == [after.envelope.id]


def test_the_next_message_clears_what_is_left(spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when no thread is there to do it."""
    monkeypatch.setattr(threading, "Thread", _no_thread)
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fd = os.open("left", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
    LEFTOVERS.keep(directory, "left", fd)
    begun(spool).commit()
    assert not (tmp_path / "left").exists()
    assert not LEFTOVERS
    os.close(directory)


def _no_thread(**_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_what_is_gone_already_is_done(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    assert undo(directory, "nothing", -1)
    os.close(directory)
