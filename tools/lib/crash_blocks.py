"""A disk that remembers each write and each flush, and the states in which a power cut could have left it.

    with Recorded(directory) as disk:      # an ext4 file system at disk.path
        ...
        here = disk.position()             # what was flushed before now is before this place of the log
        ...
    replay = Replay(disk)
    replay.state(number, chance)           # the disk as it may be after the record of that number: octets of an image

A state has all writes up to the last flush before the cut. Of those after it, it has all, none, or some: a disk with a
cache writes in whatever order it likes, and in sectors.

The kernel's loop device lies on a file of nbdfuse, which asks nbdkit, which calls `tools.lib.nbd_record`.

Errors: AssertionError, with what the program said. `lack` says beforehand what is missing.
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from tests.site import await_value
from tools.lib import crash_disks
from tools.lib.crash_disks import command, unmount

#: Octets: room for some hundred messages, and small enough to be copied for each state.
SIZE: Final = 64 * 2**20
_PLUGIN: Final = Path(__file__).with_name("nbd_record.py")
_RECORD: Final = struct.Struct("<cQI")
#: Octets that are written at once: a sector, or a page.
_PIECES: Final = (512, 4096)
_PROGRAMS: Final = ("nbdkit", "nbdfuse", "fusermount3", "mkfs.ext4")


def lack() -> str:
    """Why this machine cannot do it; "" when nothing is known to be missing."""
    if reason := crash_disks.lack():
        return reason
    for program in _PROGRAMS:
        if not shutil.which(program):
            return f"{program} is not installed"
    plugin = subprocess.run(["nbdkit", "python", "--dump-plugin"], capture_output=True, check=False, timeout=20)
    if plugin.returncode:
        return "nbdkit has no Python plugin"
    return "" if Path("/dev/fuse").exists() else "there is no /dev/fuse"


class Recorded:
    """The disk, and its file system while it is mounted; a context manager."""

    def __init__(self, directory: Path) -> None:
        """``directory`` is made."""
        self.path = directory / "at"
        self.log = directory / "log"
        self.base = directory / "base"
        self._image = directory / "image"
        self._fuse = directory / "fuse"
        self._mounted = False
        self._process: subprocess.Popen[bytes] | None = None
        for path in (self.path, self._fuse):
            path.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        """Make the file system and mount it."""
        with self.base.open("wb") as file:
            file.truncate(SIZE)
        command("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(self.base))
        shutil.copyfile(self.base, self._image)
        self.log.touch()
        disk = self._fuse / "disk"
        plugin = ["nbdkit", "-s", "python", str(_PLUGIN), f"image={self._image}", f"log={self.log}"]
        self._process = subprocess.Popen(
            ["nbdfuse", str(disk), "--command", *plugin],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=sys.stderr,
        )
        try:
            await_value(disk.exists, what="nbdfuse serves the disk")
            command("mount", "-t", "ext4", "-o", "loop", str(disk), str(self.path))
            self._mounted = True
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def position(self) -> int:
        """How long the log is, in octets."""
        return self.log.stat().st_size

    def _end(self) -> None:
        if self._mounted:
            unmount(self.path)
            self._mounted = False
        process, self._process = self._process, None
        if process is not None:
            subprocess.run(["fusermount3", "-u", str(self._fuse)], check=False, timeout=20, capture_output=True)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Record(msgspec.Struct, frozen=True):
    """A record of the log: ``length`` octets at ``start`` of it were written at ``offset``; a flush has none."""

    start: int
    offset: int
    length: int

    @property
    def flush(self) -> bool:
        """Whether it is a flush."""
        return self.length == 0


class Replay:
    """The states of a recorded disk. They are asked for in the order of the log."""

    def __init__(self, disk: Recorded) -> None:
        """Read the log."""
        self._log = memoryview(disk.log.read_bytes())
        self._durable = bytearray(disk.base.read_bytes())
        self._done = 0
        self.records: list[Record] = []
        position = 0
        while position < len(self._log):
            kind, offset, length = _RECORD.unpack_from(self._log, position)
            position += _RECORD.size
            self.records.append(Record(position, offset, length if kind == b"W" else 0))
            position += self.records[-1].length

    def position(self, number: int) -> int:
        """How long the log was when it had that many records."""
        if number == len(self.records):
            return len(self._log)
        return self.records[number].start - _RECORD.size

    def state(self, number: int, chance: random.Random) -> bytearray:
        """The disk after a power cut when the log had that many records, not less than the last time."""
        flushed = next((index for index in range(number - 1, self._done - 1, -1) if self.records[index].flush), self._done)
        for record in self.records[self._done : flushed]:
            self._durable[record.offset : record.offset + record.length] = self._log[record.start :][: record.length]
        self._done = flushed
        state = bytearray(self._durable)
        share = chance.choice((0.0, 1.0, chance.uniform(0.1, 0.9), chance.uniform(0.1, 0.9)))
        size = chance.choice(_PIECES)
        for record in self.records[flushed:number]:
            for at in range(0, record.length, size):
                if chance.random() < share:
                    piece = self._log[record.start + at : record.start + min(at + size, record.length)]
                    state[record.offset + at : record.offset + at + len(piece)] = piece
        return state
