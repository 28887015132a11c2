"""Processor time, of processes and of the whole machine, as the kernel counts it (proc(5)). All results are seconds."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")
#: Fields of the line "cpu" of /proc/stat in which the machine works: user, nice, system, irq, softirq.
_BUSY: Final = (0, 1, 2, 5, 6)


def parse_process(stat: str) -> tuple[float, float]:
    """What a process used, and what its dead children did, from its /proc/PID/stat."""
    # The name, in parentheses, may hold anything; state is the first field behind it, utime the twelfth.
    fields = stat.rpartition(")")[2].split()
    own, dead = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
    return own / _TICKS, dead / _TICKS


def parse_machine(stat: str) -> float:
    """How long the processors worked since the boot, from /proc/stat; time stolen by a hypervisor is not ours."""
    fields = stat.splitlines()[0].split()[1:]
    return sum(int(fields[number]) for number in _BUSY) / _TICKS


def machine() -> float:
    """How long the processors of this machine worked since its boot."""
    return parse_machine(Path("/proc/stat").read_text(encoding="ascii"))


def process(pid: int) -> tuple[float, float]:
    """What a process used, and what its dead children did; nothing for one that is gone."""
    try:
        return parse_process(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0


def children(pid: int) -> list[int]:
    """The children of a process, of whichever of its threads."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            found.extend(map(int, Path(f"/proc/{pid}/task/{task}/children").read_text(encoding="ascii").split()))
    except (FileNotFoundError, ProcessLookupError):
        pass  # it ended meanwhile
    return found


def tree(roots: Iterable[int]) -> float:
    """What these processes and all their descendants used, the dead ones included."""
    pids = list(roots)
    total = 0.0
    for pid in pids:
        total += sum(process(pid))
        pids.extend(children(pid))
    return total
