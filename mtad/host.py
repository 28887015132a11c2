"""What the master asks of the machine: the user to become, directories, descriptors, the pid file, the care of orphans.

The order matters to who starts as root: directories are made and ports are bound first, then the privileges go, and only
then are files made or opened. So nothing that the server's own user may have put in the way is followed by root.

Errors: OSError is the world's; a user who does not exist is a ConfigError.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
from typing import Final

from mtad.config import Config
from mtad.errors import ConfigError, Problem

_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
_M_ARENA_MAX: Final = -8  # malloc.h


def account(config: Config) -> pwd.struct_passwd | None:
    """Whom to become; None when not root, or when the configuration says to stay.

    Raises:
        ConfigError: there is no such user.
    """
    if os.geteuid() != 0 or not config.user:
        return None
    try:
        return pwd.getpwnam(config.user)
    except KeyError:
        message = f"there is no user {config.user!r} on this machine (adduser --system --group {config.user})"
        raise ConfigError([Problem("", None, "user", message)]) from None


def make_directory(path: str, owner: pwd.struct_passwd) -> None:
    """Make a directory that is missing, for the user of the server; one that exists is left as it is."""
    if os.path.isdir(path):
        return
    above = [path]
    while not os.path.isdir(above[-1]):
        above.append(os.path.dirname(above[-1]))
    for parent in reversed(above[1:-1]):
        os.mkdir(parent)
        os.chmod(parent, 0o755)  # whatever the umask of a daemon is: the user must get through
    os.mkdir(path, mode=0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchown(fd, owner.pw_uid, owner.pw_gid)
    finally:
        os.close(fd)


def raise_descriptor_limit() -> None:
    """As many open files as the machine allows us: each session needs two, and the usual 1024 are soon used up."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def drop_privileges(owner: pwd.struct_passwd) -> None:
    """Become another user for good.

    Raises:
        ConfigError: that user cannot read our own code, and we would fail at the first module that is needed later.
    """
    os.initgroups(owner.pw_name, owner.pw_gid)
    os.setresgid(owner.pw_gid, owner.pw_gid, owner.pw_gid)
    os.setresuid(owner.pw_uid, owner.pw_uid, owner.pw_uid)
    for path in (os.__file__, __file__):
        if not os.access(path, os.R_OK):
            message = f"{owner.pw_name!r} cannot read {path}: install Python and mtad where everybody can read them"
            raise ConfigError([Problem("", None, "user", message)])


def words(fault: Exception) -> str:
    """A failure as an administrator wants to read it: what it is about, and why."""
    if isinstance(fault, OSError) and fault.strerror:
        return f"{fault.filename}: {fault.strerror}" if fault.filename else fault.strerror
    return str(fault)


def write_pid_file(path: str) -> None:
    """Leave our process id at ``path``, for everybody to read; what an earlier server left there is replaced."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="ascii") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(f"{os.getpid()}\n")


def stay_on_processor(number: int) -> None:
    """Keep this process to one of the processors that it may use: the ``number``-th, counted round and round.

    Only one thread of a Python process runs at a time, and each system call may be a change of threads. On one processor
    that is cheap; between two it takes an interrupt, and the other one's caches know nothing of the work. Negative numbers
    count from the last processor. A machine that does not allow it is as good, only slower.
    """
    try:
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[number % len(allowed)]})
    except OSError:
        pass  # a sandbox that forbids it


def share_one_heap() -> None:
    """Let all threads of this process, and of its children, take memory from one heap; glibc would give many one each.

    What a thread has freed would wait in its own heap for threads that use the same one: processes would grow with the
    most threads that they ever had. Hardly two threads of a Python process ask for memory at the same time.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    except AttributeError:
        pass  # not glibc: no such heaps


def give_back_memory() -> None:
    """Give the machine back what was freed, wherever it lies between what is in use; some milliseconds for all threads."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass  # not glibc


def adopt_orphans() -> None:
    """Become the parent of delivery processes whose scheduler was killed, so that a stop can wait for them, too."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> list[int]:
    """The children of this process as the kernel lists them; empty where it does not."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []
