"""The scan of a queue: all of it, a slice at a time, whatever lies there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mtad.scheduler.scan import SLICE, Scan
from mtad.spool.queue_id import encode
from mtad.spool.queues import Queue, Spool


class Found:
    """What a scan of deferred tells."""

    def __init__(self, root: Path) -> None:
        self.spool = Spool(str(root / "spool"), create=True)
        self.directory = root / "spool" / "deferred"
        self.messages: dict[str, float] = {}
        self.strangers: list[tuple[Queue, str]] = []
        self.warnings: list[str] = []
        self.scan = Scan(
            self.spool,
            Queue.DEFERRED,
            self.messages.__setitem__,
            lambda *what: self.strangers.append(what),
            self.warnings.append,
        )

    def run(self) -> int:
        """Advance to the end; how many slices it took."""
        slices = 1
        while self.scan.advance():
            slices += 1
        return slices


@pytest.fixture
def found(tmp_path: Path) -> Found:
    return Found(tmp_path)


def test_an_empty_queue(found: Found) -> None:
    assert found.run() == 1
    assert found.messages == {}


@pytest.mark.parametrize("count", [1, SLICE - 1, SLICE, SLICE + 1, 3 * SLICE])
def test_every_message_with_its_time_in_slices(found: Found, count: int) -> None:
    wanted = {}
    for number in range(count):
        name = encode(1_700_000_000_000_000 + number, 7)
        (found.directory / name).touch()
        os.utime(found.directory / name, (number, number))
        wanted[name] = float(number)
    assert found.run() == count // SLICE + 1
    assert found.messages == wanted
    assert found.strangers == []


def test_a_file_about_which_the_disk_says_nothing_does_not_hide_the_others(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [encode(1_700_000_000_000_000 + number, 7) for number in range(3 * SLICE)]
    for name in names:
        (found.directory / name).touch()
    broken = {names[1], names[SLICE], names[-1]}
    look = os.stat

    def stat(name: str, **options: Any) -> os.stat_result:
        if name in broken:
            raise OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN))
        return look(name, **options)

    monkeypatch.setattr(os, "stat", stat)
    found.run()
    assert found.messages.keys() == {*names} - broken
    first, count = found.warnings
    assert first.endswith(": cannot look at it in deferred, passing over it: Structure needs cleaning")
    assert count == "3 files in deferred were passed over, because the disk says nothing about them"


def test_what_is_no_queue_file_is_told_apart(found: Found) -> None:
    good, fifo, link, directory = (encode(1_700_000_000_000_000 + number, 7) for number in range(4))
    (found.directory / good).touch()
    os.mkfifo(found.directory / fifo)
    (found.directory / link).symlink_to("/etc/passwd")
    (found.directory / directory).mkdir()
    (found.directory / "notes.txt").touch()
    (found.directory / ".gitkeep").touch()
    (found.directory / os.fsdecode(b"\xff\x1b[2J")).touch()
    found.run()
    assert list(found.messages) == [good]
    strangers = {fifo, link, directory, "notes.txt", os.fsdecode(b"\xff\x1b[2J")}
    assert {name for _, name in found.strangers} == strangers
    assert {queue for queue, _ in found.strangers} == {Queue.DEFERRED}


def test_files_may_come_and_go_between_two_slices(found: Found) -> None:
    names = [encode(1_700_000_000_000_000 + number, 7) for number in range(SLICE + 50)]
    for name in names:
        (found.directory / name).touch()
    assert found.scan.advance()
    for name in names:
        (found.directory / name).unlink()
    assert found.scan.advance() is False
    assert len(found.messages) == SLICE


def test_a_directory_that_cannot_be_read_is_the_callers_to_handle(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        found.scan.advance()
