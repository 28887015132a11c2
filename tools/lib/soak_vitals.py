"""What the processes of a server use, and whether it grows as long as they live.

A process is compared with itself, from one checkpoint to the next; one that was started anew is another. The first looks
are left out: what is used for the first time stays.

Errors: none; a process that ends while it is looked at is left out.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Final

import msgspec

from tests.site import Site

#: Looks at a process before it counts as warm.
WARM: Final = 2
#: Looks at a warm process from which something follows.
ENOUGH: Final = 4
#: KiB, and descriptors, that a warm process may gain from one look to the next, in the median.
MOST_KIB: Final = 100.0
MOST_DESCRIPTORS: Final = 0.34
#: Seconds in which connections that are kept for the next message are closed.
_IDLE: Final = 3.0
#: KiB, and descriptors, below which growth is no growth.
SLACK_KIB: Final = 2048
SLACK_DESCRIPTORS: Final = 4


class Vital(msgspec.Struct, frozen=True):
    """A process at a moment: KiB of memory of its own, open files, and threads, which may come and go."""

    kib: int
    descriptors: int
    threads: int = 1


def vital(pid: int) -> Vital | None:
    """What a process uses now; None when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        count = len(os.listdir(f"/proc/{pid}/fd"))
        threads = len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return None
    match = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.M)
    return Vital(int(match[1]), count, threads) if match is not None else None


def slope(values: Sequence[float]) -> float:
    """By how much they grow from one to the next: the median over all pairs (Theil and Sen)."""
    pairs = combinations(enumerate(values), 2)
    return statistics.median((later - earlier) / (j - i) for (i, earlier), (j, later) in pairs)


def growth(vitals: Sequence[Vital]) -> str:
    """What is wrong with the looks at one process; "" when it is flat, or did not live long enough to tell."""
    warm = vitals[WARM:]
    if len(warm) < ENOUGH:
        return ""
    found = []
    for name, values, most, slack in (
        ("KiB", [one.kib for one in warm], MOST_KIB, SLACK_KIB),
        ("descriptors", [one.descriptors for one in warm], MOST_DESCRIPTORS, SLACK_DESCRIPTORS),
    ):
        if values[-1] - values[0] > slack and slope(values) > most:
            found.append(f"{name} grow: {values}, with so many threads: {[one.threads for one in warm]}")
    return ", ".join(found)


class Vitals:
    """The looks at all processes of a run."""

    def __init__(self) -> None:
        """None yet."""
        self._looks: dict[tuple[str, int, str], list[Vital]] = {}

    def look(self, site: Site) -> None:
        """Look at the processes that there are now, when what they keep for a moment is gone."""
        time.sleep(_IDLE)
        roles = {"master": [site.status().pid], "scheduler": site.pids("scheduler"), "listener": site.pids("listener")}
        roles["delivery"] = site.deliveries()
        for role, pids in roles.items():
            for pid in pids:
                now = vital(pid)
                born = _born(pid)
                if now is not None and born:
                    self._looks.setdefault((role, pid, born), []).append(now)

    def faults(self) -> list[str]:
        """The processes that grew, a line each."""
        found = [(f"{role} {pid}", growth(looks)) for (role, pid, _), looks in self._looks.items()]
        return [f"{who}: {what}" for who, what in found if what]

    def lines(self) -> list[str]:
        """A line for each role about the process that lived longest."""
        longest: dict[str, Sequence[Vital]] = {}
        many: dict[str, int] = {}
        for (role, _, _), looks in self._looks.items():
            many[role] = many.get(role, 0) + (len(looks) >= WARM + ENOUGH)
            if len(looks) > len(longest.get(role, ())):
                longest[role] = looks
        return [
            f"{role}: {many[role]} lived through {WARM + ENOUGH} checkpoints or more; the oldest through {len(looks)}: "
            f"KiB {_ends([one.kib for one in looks])}, descriptors {_ends([one.descriptors for one in looks])}"
            for role, looks in longest.items()
        ]

    def looks(self) -> Mapping[tuple[str, int, str], Sequence[Vital]]:
        """All of them, by role, process id and time of birth."""
        return self._looks


def _ends(values: Sequence[int]) -> str:
    warm = values[min(WARM, len(values) - 1) :]
    return f"{values[0]} at first, {warm[0]} warm, {values[-1]} at last"


def _born(pid: int) -> str:
    """When a process was started, in ticks; process ids come again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
