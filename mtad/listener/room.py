"""What a listener process has room for: descriptors, and memory.

What it is for: a process that has used up either can serve nobody, also not those whom it serves already. So new sessions
are sent away (421) while there is some left for the sessions that there are: two descriptors for each, its connection and
the queue file of its message, and a reserve of memory. Should the descriptors be gone all the same, one is kept with which
a connection is still taken, and sent away (`Reserve`).

Memory is that of the control groups of the process, whichever of them has a limit, and that of the machine. What files take
of it does not count, since the kernel gives that up when it must. It is looked at now and then only, and never while nobody
comes.

Invariants: nothing here raises. Where the kernel does not say, there is room.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Final

#: Descriptors of one session: its connection, and the queue file.
_EACH: Final = 2
#: Descriptors for other things that are open for a moment: a directory, a file that is reread, one who is told to go.
_SPARE: Final = 8

#: Octets that are kept, so that a delivery process or two can still begin.
RESERVE: Final = 32 << 20
#: Octets that are kept for each session that there is: it may have more to say than it said yet.
_GROWTH: Final = 16 << 10
#: Of a control group with little memory no more than this part is kept.
_PART: Final = 8
#: Seconds, and new sessions, after which memory is looked at again: so many take some 2 MiB.
_SECONDS: Final = 0.25
_SESSIONS: Final = 64

_PAGES: Final = re.compile(rb"^(?:total_)?(?:in)?active_file (\d+)$", re.M)
_TOTALS: Final = re.compile(rb"^total_(?:in)?active_file (\d+)$", re.M)
_AVAILABLE: Final = re.compile(rb"^MemAvailable: +(\d+) kB$", re.M)

#: Names of a control group's files: limit and use, of version 2 and of version 1.
_NAMES: Final = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


class Room:
    """How much there is."""

    def __init__(self, root: Path = Path("/")) -> None:
        """Look at the process as it is before its first session; ``root`` has proc and sys in it."""
        self._sessions = _descriptors()
        self._groups = list(_groups(root))
        self._machine = root / "proc/meminfo"
        self._next_look = 0.0
        self._looks = 0
        self._short = False

    def lack(self, sessions: int, now: float, *, inherits: bool = False) -> str:
        """What there is too little of for one session more than ``sessions``, in words for the log; "" when there is room.

        ``now`` is in seconds, of any clock that never goes back. ``inherits``: there is a thread of an earlier session for
        it. What that one needed the process has still, and would keep from everybody as long as the thread waits.
        """
        if sessions >= self._sessions:
            return "too few descriptors"
        if inherits:
            return ""
        self._looks += 1
        if now >= self._next_look or self._looks >= _SESSIONS:
            self._next_look = now + _SECONDS
            self._looks = 0
            self._short = self._is_short(RESERVE + _GROWTH * sessions)
        return "too little memory" if self._short else ""

    def _is_short(self, reserve: int) -> bool:
        match = _AVAILABLE.search(_read_or_nothing(self._machine))
        if match is not None and int(match[1]) * 1024 < reserve:
            return True
        for directory, limit, use in self._groups:
            try:
                most = int(_read(limit))
                free = most - int(_read(use)) + _files(_read(directory / "memory.stat"))
            except (OSError, ValueError):
                continue  # there is no limit: "max"
            if free < min(reserve, most // _PART):
                return True
        return False


class Reserve:
    """A descriptor for nothing: when there is no other left, a connection is taken in its place, and told so."""

    def __init__(self) -> None:
        """Have it."""
        self._fd = -1
        self.restore()

    def give_up(self) -> bool:
        """Close it; False when it is closed already."""
        if self._fd < 0:
            return False
        os.close(self._fd)
        self._fd = -1
        return True

    def restore(self) -> bool:
        """Have it again; False when there is no descriptor for it."""
        if self._fd < 0:
            try:
                self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return False
        return True


def _descriptors() -> float:
    """How many sessions there are descriptors for, when there is none yet."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return inf
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 0
    return max(1, (limit - used - _SPARE) // _EACH)


def _groups(root: Path) -> Iterator[tuple[Path, Path, Path]]:
    """The control groups of this process that may limit memory: the directory, and the files with limit and use."""
    for line in _read_or_nothing(root / "proc/self/cgroup").decode("utf-8", "replace").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "memory"}:
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / path.strip("/")
        for directory in (group, *group.parents):
            for limit, use in _NAMES:
                if (directory / limit).exists() and (directory / use).exists():
                    yield directory, directory / limit, directory / use
            if directory == top:
                break


def _files(stat: bytes) -> int:
    """Octets of files in memory; version 1 says it for the group alone, and in total with those below it."""
    return sum(map(int, _TOTALS.findall(stat) or _PAGES.findall(stat)))


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def _read_or_nothing(path: Path) -> bytes:
    try:
        return _read(path)
    except OSError:
        return b""
