"""mtad with a wall's clock that can be set while it runs: for the sweep ``soak``.

    python soak_clock.py FILE PROGRAM ARGUMENTS…

FILE has the seconds by which the clock is wrong (`Clock` writes it); all processes see a change at once. The monotonic
clock is left alone, and so are the times that the kernel gives to files, which are not those by which mtad goes.
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


def wrong(path: str) -> Callable[[], float]:
    """A clock that is wrong by what a file says."""
    with open(path, "rb") as file:
        view = mmap.mmap(file.fileno(), _OFF.size, prot=mmap.PROT_READ)
    right, unpack = time.time, _OFF.unpack_from

    def now() -> float:
        off: float = unpack(view)[0]
        return right() + off

    return now


def main(arguments: list[str]) -> None:
    """Become the program."""
    path, program, *_ = arguments
    time.time = wrong(path)
    sys.argv = arguments[1:]
    sys.path[0] = str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
