"""File systems in files, on which a power cut can be made: what was not flushed before it is gone after it.

    with Disk(directory / "spool", "ext4") as disk:
        disk.format()
        disk.mount()
        ...
        disk.cut()      # every call on it fails from now on, with EIO
        disk.unmount()
        disk.mount()    # what was on stable storage, and nothing else

The cut is the kernel's own "shutdown" ioctl, with the flag that keeps the log from being flushed; it is the same number for
ext4 and XFS. Whoever uses the file system must have ended before `unmount`.

Errors: AssertionError, with what the program said, when mkfs, mount or umount fails. `lack` says beforehand why they would.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from tests.site import await_value

Kind = Literal["ext4", "xfs"]

#: EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN (fs/ext4/ext4.h, fs/xfs/libxfs/xfs_fs.h): _IOR('X', 125, __u32).
_SHUTDOWN: Final = 0x8004587D
#: Neither data nor log are flushed.
_NO_LOG_FLUSH: Final = 2

#: Octets. XFS makes none below 300 MB. The file has holes where nothing is written.
_SIZE: Final = 512 * 2**20
#: Seconds for others to let go of a file system of ours, which their mount namespace has got with everything else.
_ELSEWHERE: Final = 60.0
#: From linux/sched.h.
_CLONE_NEWNS: Final = 0x20000
#: Seconds for processes that were killed to end.
_PATIENCE: Final = 20.0
_MKFS: Final[dict[Kind, tuple[str, ...]]] = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}


def lack(kind: Kind = "ext4") -> str:
    """Why this machine cannot do it; "" when nothing is known to be missing."""
    if reason := _no_mounts():
        return reason
    return "" if shutil.which(_MKFS[kind][0]) else f"{_MKFS[kind][0]} is not installed"


@lru_cache(maxsize=1)
def _no_mounts() -> str:
    """Why nothing can be mounted here; "" when it can: root of a container may not, and is told only when it tries."""
    if os.geteuid() != 0:
        return "only root can mount file systems"
    with tempfile.TemporaryDirectory(prefix="mtad-mount-") as name:
        image, place = Path(name, "image"), Path(name, "at")
        place.mkdir()
        with image.open("wb") as file:
            file.truncate(2**20)
        try:
            command("mkfs.ext4", "-q", "-F", str(image))
            command("mount", "-t", "ext4", "-o", "loop", str(image), str(place))
        except (AssertionError, OSError) as fault:
            return f"file systems cannot be mounted: {str(fault).splitlines()[0]}"
        unmount(place)
    return ""


class Disk:
    """One file system in a file; a context manager that unmounts it."""

    def __init__(self, directory: Path, kind: Kind) -> None:
        """``directory`` is made: it holds the image, and ``at``, where it is mounted. Nothing is mounted yet."""
        self.kind = kind
        self.image = directory / "image"
        self.path = directory / "at"
        self._mounted = False
        self.path.mkdir(parents=True, exist_ok=True)

    def format(self) -> None:
        """Make an empty file system."""
        with self.image.open("wb") as file:
            file.truncate(_SIZE)
        command(*_MKFS[self.kind], str(self.image))

    def mount(self) -> None:
        """Mount it, with what its log brings back."""
        command("mount", "-t", self.kind, "-o", "loop", str(self.image), str(self.path))
        self._mounted = True

    def cut(self) -> None:
        """Cut its power."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, _NO_LOG_FLUSH.to_bytes(4, sys.byteorder))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        """Unmount it; see the function.

        As long as another mount namespace has it, too, the next mount would bring it back as it is: without power. So this
        waits until the kernel has let go of it.
        """
        unmount(self.path)
        self._mounted = False
        await_value(lambda: not _attached(self.image), _ELSEWHERE, f"the kernel lets go of {self.image}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._mounted:  # also when somebody has it open still, after a failure
            subprocess.run(["umount", "--lazy", str(self.path)], check=False, timeout=60)


def command(*words: str) -> None:
    """Run a program.

    Raises:
        AssertionError: it failed; with what it said.
    """
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip() or done.returncode}"


def unmount(path: Path) -> None:
    """Unmount what is there, as soon as the last thread of a process that was killed has let go of it.

    Raises:
        AssertionError: that is not within `_PATIENCE` seconds, or something else is in the way.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return command("umount", str(path))
        except AssertionError as fault:
            if "busy" not in str(fault) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _attached(image: Path) -> bool:
    """Whether a loop device has an image."""
    done = subprocess.run(["losetup", "-j", str(image)], capture_output=True, check=True, timeout=20)
    return bool(done.stdout)


def own_mounts() -> None:
    """Mount for this process and its children only, from now on: nobody else keeps a disk busy.

    Does nothing where that is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) == 0:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True, timeout=20)
