"""mtad with a wall's clock that can be set while it runs: for the sweeps ``clock`` and ``soak``.

    python wrong_clock.py FILE PROGRAM ARGUMENTS…

FILE has the seconds by which the clock is wrong (`Clock` writes it); all processes see a change at once. The monotonic
clock is left alone, and so are the times that the kernel gives to files, which are not those by which mtad goes.

It is not libfaketime that does it, because that library also gets hold of how long threads wait for one another, and waits
for Python's lock then take no time at all, or too much.
"""

from __future__ import annotations

import mmap
import os
import runpy
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_OFF: Final = struct.Struct("<d")


class Clock:
    """The file, in the hands of whoever sets the clock."""

    def __init__(self, path: Path) -> None:
        """The file is made; the clock is right."""
        self.path = path
        self.off = 0.0
        self.set_by(0.0)

    def set_by(self, seconds: float) -> None:
        """Set the clock ahead, or back."""
        self.off += seconds
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(fd, _OFF.pack(self.off), 0)
        finally:
            os.close(fd)

    def now(self) -> float:
        """The time that mtad takes it to be, in seconds since the epoch."""
        return time.time() + self.off

    def prefix(self) -> list[str]:
        """What stands before a command, for this clock."""
        return [sys.executable, __file__, str(self.path)]


def reader(path: str) -> Callable[[], float]:
    """What says by how many seconds a clock is wrong now."""
    with open(path, "rb") as file:
        view = mmap.mmap(file.fileno(), _OFF.size, prot=mmap.PROT_READ)
    unpack = _OFF.unpack_from

    def off() -> float:
        seconds: float = unpack(view)[0]
        return seconds

    return off


def main(arguments: list[str]) -> None:
    """Become the program."""
    path, program, *_ = arguments
    off, right, right_ns = reader(path), time.time, time.time_ns
    time.time = lambda: right() + off()
    time.time_ns = lambda: right_ns() + int(off() * 1e9)
    sys.argv = arguments[1:]
    sys.path[0] = str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
