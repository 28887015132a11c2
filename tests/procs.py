"""What /proc tells about the processes under test, and the privileges that some tests need."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Final

import pytest

from mtad.host import adopt_orphans

AS_ROOT: Final = os.geteuid() == 0
needs_root = pytest.mark.skipif(not AS_ROOT, reason="only root can do this")

#: Run a command in a network of its own, where only loopback is; every port is free there.
OWN_NETWORK: Final = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")

_TICKS: Final = os.sysconf("SC_CLK_TCK")


def _has_networks() -> bool:
    if not AS_ROOT or not shutil.which("unshare") or not shutil.which("ip"):
        return False
    return subprocess.run([*OWN_NETWORK, "true"], capture_output=True, check=False).returncode == 0


needs_networks = pytest.mark.skipif(not _has_networks(), reason="this machine lets nobody make network namespaces")


def children(pid: int) -> list[int]:
    """The children of a process."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def title(pid: int) -> str:
    """What `ps` shows."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()


def identity(pid: int) -> dict[str, set[int]]:
    """User and group ids of a process: real, effective, saved and of the file system; ``Groups`` are supplementary."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in {"Uid", "Gid", "Groups"}:
            found[name] = {int(number) for number in value.split()}
    return found


def descriptors(pid: int) -> dict[int, str]:
    """The open files of a process, such as ``pipe:[1234]``."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[int(entry.name)] = os.readlink(entry)
        except FileNotFoundError:
            pass  # closed meanwhile
    return found


def cpu_seconds(pid: int) -> float:
    """The time that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Orphanage:
    """Processes that lose their parents come to this one, so that a test sees which were left."""

    def __init__(self) -> None:
        """From now on."""
        adopt_orphans()
        self._before = set(children(os.getpid()))

    def left(self) -> list[int]:
        """The living children that there were not before; those that have ended are buried."""
        found = []
        for pid in set(children(os.getpid())) - self._before:
            if alive(pid):
                found.append(pid)
            else:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    pass  # its Popen was faster
        return found


def suspend(pid: int) -> None:
    """SIGSTOP, and wait until it stands still: a process that runs on another processor does not do so at once."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "Tt":
        assert time.monotonic() < deadline, f"{pid} does not stop"
        time.sleep(0.001)


def private_kib() -> int:
    """KiB of memory of this process alone."""
    match = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert match is not None
    return int(match[1])
