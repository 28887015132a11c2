"""A small ext4 of a sweep's own, on a loop device, and the ways in which it can go wrong for a while and be healed.

Each trouble is a context manager: wrong inside, healed behind it, also when what is inside raises. A frozen disk has a
guard, a process that thaws it after a time whatever becomes of us: nobody can kill a process that waits for a frozen disk.

Errors: `Unavailable`, where this machine lets nobody mount, freeze or trace.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tools.lib.crash_disks import lack
from tools.lib.sweeps import Unavailable

#: Seconds for strace to attach, or to let go.
_ATTACH: Final = 10.0
#: Seconds over the planned end of a freeze after which its guard ends it.
_GUARD: Final = 3.0
#: Seconds in which a disk that is in use must let itself be remounted.
_REMOUNT: Final = 10.0


class SmallDisk:
    """The disk; a context manager that makes and mounts it, and leaves nothing mounted."""

    def __init__(self, image: Path, place: Path, size: int = 128 * 2**20, inodes: int = 8192) -> None:
        """``image`` is made, a sparse file of ``size`` octets; ``place`` is the mount point."""
        self.place = place
        self._image = image
        self._size = size
        self._inodes = inodes
        self._ballast = place / "ballast"
        self._made = 0

    def __enter__(self) -> Self:
        if reason := lack():
            raise Unavailable(reason)
        for program in ("mkfs.ext4", "mount", "fsfreeze", "strace"):
            if shutil.which(program) is None:
                raise Unavailable(f"{program} is not installed")
        with self._image.open("wb") as file:
            file.truncate(self._size)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-N", str(self._inodes), str(self._image))
        self.place.mkdir(parents=True, exist_ok=True)
        _run("mount", "-o", "loop", str(self._image), str(self.place))
        self._ballast.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # --lazy: also when a test that failed has left something open there.
        subprocess.run(["umount", "--lazy", str(self.place)], check=False)
        self._image.unlink(missing_ok=True)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Not one block is free."""
        path = self._ballast / "blocks"
        try:
            self.fill()
            yield
        finally:
            path.unlink(missing_ok=True)

    def fill(self) -> None:
        """Take the blocks that are free; within `full`, also those that have become so since."""
        fd = os.open(self._ballast / "blocks", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            step = 16 * 2**20
            while step >= 1024:
                try:
                    os.posix_fallocate(fd, os.fstat(fd).st_size, step)
                except OSError:
                    step //= 2
        finally:
            os.close(fd)

    @contextmanager
    def without_inodes(self) -> Iterator[None]:
        """No new file can be made."""
        try:
            self.exhaust()
            yield
        finally:
            for path in self._ballast.glob("inode*"):
                path.unlink()

    def exhaust(self) -> None:
        """Take the inodes that are free; within `without_inodes`, also those that have become so since."""
        directory = os.open(self._ballast, os.O_RDONLY | os.O_DIRECTORY)
        try:
            while True:
                self._made += 1
                os.close(os.open(f"inode{self._made}", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=directory))
        except OSError:
            pass  # that was the last one
        finally:
            os.close(directory)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be changed. Waits for a moment in which nobody has a file open for writing."""
        self._remount("ro")
        try:
            yield
        finally:
            self._remount("rw")

    def _remount(self, how: str) -> None:
        deadline = time.monotonic() + _REMOUNT
        while True:
            done = subprocess.run(
                ["mount", "-o", f"remount,{how}", str(self.place)], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                return
            assert time.monotonic() < deadline, f"cannot remount: {done.stderr.strip()}"
            time.sleep(0.01)

    @contextmanager
    def frozen(self, seconds: float) -> Iterator[None]:
        """Whoever changes something waits, for at most so many seconds (and the guard's)."""
        place = str(self.place)
        guard = subprocess.Popen(
            ["sh", "-c", 'sleep "$1"; exec fsfreeze -u "$2"', "guard", str(seconds + _GUARD), place],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _run("fsfreeze", "-f", place)
            yield
        finally:
            subprocess.run(["fsfreeze", "-u", place], capture_output=True, check=False)
            guard.kill()  # only the shell: its sleep ends by itself
            guard.wait()


@contextmanager
def failing(pids: Sequence[int], *faults: str) -> Iterator[None]:
    """Have system calls of processes (and their children to come) fail, each as ``fsync:error=EIO``.

    Raises:
        Unavailable: strace may not attach here.
    """
    names = ",".join(fault.partition(":")[0] for fault in faults)
    command = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={names}"]
    for fault in faults:
        command += ["-e", f"inject={fault}"]
    for pid in pids:
        command += ["-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert tracer.stderr is not None
    # It waits for ever for a thread that comes to its end while it is attached to.
    guard = threading.Timer(_ATTACH, tracer.kill)
    guard.start()
    try:
        missing = set(pids)
        while missing:
            line = tracer.stderr.readline().decode()
            if not line or "Could not attach" in line or "Operation not permitted" in line:
                raise Unavailable(f"strace may not attach here: {line.strip()}")
            if " attached" in line:
                missing.discard(int(line.split("Process ")[1].split()[0]))
        guard.cancel()
        yield
    finally:
        guard.cancel()
        tracer.terminate()
        try:
            tracer.communicate(timeout=_ATTACH)
        except subprocess.TimeoutExpired:
            tracer.kill()  # who is traced goes on, as after an end in order
            tracer.communicate()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{command[0]}: {done.stderr.strip()}")
