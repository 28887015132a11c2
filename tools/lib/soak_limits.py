"""What is used up in the sweep ``soak``: memory, processes, descriptors; and the line. For `tools.lib.soak_harms`."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tools.lib.soak_line import lossy
from tools.lib.soak_schedule import Harm
from tools.lib.soak_stage import Stage
from tools.lib.sweeps import Unavailable

_MIB: Final = 1 << 20
#: What may still be had when something is short: MiB, processes and threads, descriptors; at most.
_MEMORY: Final = 24
_PROCESSES: Final = 6
_DESCRIPTORS: Final = 3


def memory_short(stage: Stage, harm: Harm, chance: random.Random) -> str:
    """All processes together get hardly any more memory; whoever takes it nevertheless is killed by the kernel."""
    with _groups(stage, "memory"):
        groups = stage.groups
        before = groups.killed()
        groups.limit("memory", groups.use("memory") + chance.randint(2, _MEMORY) * _MIB)
        try:
            time.sleep(harm.lasts)
        finally:
            groups.limit("memory", None)
        if groups.killed() > before:
            stage.books.died()
            with stage.life_lock:
                stage.bury()
    return ""


def processes_short(stage: Stage, harm: Harm, chance: random.Random) -> str:
    """All of them together get hardly a process or a thread more."""
    with _groups(stage, "pids"):
        stage.groups.limit("pids", stage.groups.use("pids") + chance.randint(0, _PROCESSES))
        try:
            time.sleep(harm.lasts)
        finally:
            stage.groups.limit("pids", None)
    return ""


@contextmanager
def _groups(stage: Stage, controller: str) -> Iterator[None]:
    if lack := stage.groups.lacks.get(controller):
        raise Unavailable(lack)
    with stage.limit_lock:
        yield


def descriptors_short(stage: Stage, harm: Harm, chance: random.Random) -> str:
    """A process may open hardly a file more."""
    with stage.files_lock:  # one at a time: what is put back must be the limit of before
        return _descriptors_short(stage, harm, chance)


def _descriptors_short(stage: Stage, harm: Harm, chance: random.Random) -> str:
    pid = stage.one_of(chance.choice(("scheduler", "listener", "delivery")), chance)
    if not pid:
        return "nobody was there"
    try:
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        least = len(os.listdir(f"/proc/{pid}/fd")) + chance.randint(0, _DESCRIPTORS)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (least, limits[1]))
        time.sleep(harm.lasts)
        for one in {pid, *stage.site.processes()}:  # whom it has forked meanwhile, they have the same limit
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(one, resource.RLIMIT_NOFILE, limits)
    except (ProcessLookupError, FileNotFoundError):
        return "it has ended"
    return ""


def line_loses(stage: Stage, harm: Harm, _: random.Random) -> str:
    """Of all packets, also those of the clients and the name server, many are lost."""
    if not stage.own_line:
        raise Unavailable("there is no network of our own")
    with stage.line_lock, lossy():
        time.sleep(harm.lasts)
    return ""
