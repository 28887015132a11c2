"""Control groups of our own, for processes whose memory or number is to be limited, as a container or a unit file does it.

    with ExitStack() as stack:
        groups = Groups(stack)
        groups.limit("pids", 60)

The groups are made in version 1 or version 2 of the kernel's hierarchy, whichever of them limits what is wanted. At the end
they are gone, and so is every process that is still in them.
"""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Literal

import msgspec

Controller = Literal["memory", "pids"]

#: Where the groups of a controller are, and its files with limit, use and events, in version 1 and in version 2.
_PLACES: Final = {
    "memory": (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control"),
        ("/sys/fs/cgroup", "memory.max", "memory.current", "memory.events"),
    ),
    "pids": (
        ("/sys/fs/cgroup/pids", "pids.max", "pids.current", "pids.events"),
        ("/sys/fs/cgroup", "pids.max", "pids.current", "pids.events"),
    ),
}
#: Go into control groups, and become a program.
_ENTER: Final = 'while [ "$1" != -- ]; do echo $$ >"$1" || exit 1; shift; done; shift; exec "$@"'
#: Seconds in which the killed are gone.
_GONE: Final = 10.0


class Group(msgspec.Struct, frozen=True):
    """One group: its directory, and the names of its files."""

    directory: Path
    limit: str
    use: str
    events: str


class Groups:
    """The groups that can be had; those that cannot are named in `lacks`."""

    def __init__(self, stack: ExitStack) -> None:
        """Make them; ``stack`` removes them."""
        self.lacks: dict[str, str] = {}
        self._groups: dict[str, Group] = {}
        for controller in _PLACES:
            made = _make(controller, stack)
            if isinstance(made, str):
                self.lacks[controller] = made
            else:
                self._groups[controller] = made

    def entrances(self) -> list[str]:
        """The files into which a process writes its id to be in the groups, and what it forks with it."""
        return sorted({str(group.directory / "cgroup.procs") for group in self._groups.values()})

    def prefix(self) -> list[str]:
        """What stands before a command that is to be in the groups."""
        return ["sh", "-c", _ENTER, "sh", *self.entrances(), "--"]

    def use(self, controller: Controller) -> int:
        """Octets, or processes and threads, that there are."""
        group = self._groups[controller]
        return int((group.directory / group.use).read_text())

    def limit(self, controller: Controller, most: int | None) -> None:
        """So many of them may be; None: as many as they like."""
        group = self._groups[controller]
        unlimited = "-1" if group.limit == "memory.limit_in_bytes" else "max"
        (group.directory / group.limit).write_text(unlimited if most is None else str(most))

    def free(self) -> None:
        """Lift all limits."""
        for controller in self._groups:
            self.limit("memory" if controller == "memory" else "pids", None)

    def killed(self) -> int:
        """How many processes the kernel has killed since there was no memory for them."""
        group = self._groups.get("memory")
        if group is None:
            return 0
        match = re.search(r"^oom_kill (\d+)$", (group.directory / group.events).read_text(), re.M)
        return int(match[1]) if match is not None else 0


def _make(controller: str, stack: ExitStack) -> Group | str:
    """Make a group, or say why there is none."""
    lack = f"there is no control group for {controller} here"
    for top, *names in _PLACES[controller]:
        directory = Path(top) / f"mtad-limits-{os.getpid()}-{controller}"
        try:
            directory.mkdir()
        except OSError as fault:
            lack = f"no control group for {controller}: {fault.strerror or fault}"
            continue
        if (directory / names[0]).exists():
            stack.callback(_remove, directory)
            return Group(directory, *names)
        directory.rmdir()
    return lack


def _remove(directory: Path) -> None:
    deadline = time.monotonic() + _GONE
    while pids := (directory / "cgroup.procs").read_text().split():
        for pid in pids:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
        if time.monotonic() > deadline:
            raise AssertionError(f"{directory} still has the processes {pids}")
        time.sleep(0.02)
    directory.rmdir()
