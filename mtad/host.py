"""What the master asks of the machine: the user to become, directories, the pid file, the care of orphans.

Errors: OSError is the world's; a user who does not exist is a ConfigError.
"""

from __future__ import annotations

import ctypes
import os
import pwd
from typing import Final

from mtad.config import Config
from mtad.errors import ConfigError, Problem

_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h


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
    os.makedirs(path, mode=0o755)
    os.chown(path, owner.pw_uid, owner.pw_gid)
    os.chmod(path, 0o700)


def give_spool(root: str, owner: pwd.struct_passwd) -> None:
    """What root has just made in the spool belongs to the user of the server."""
    for name in os.listdir(root):
        path = os.path.join(root, name)
        if os.lstat(path).st_uid == 0:
            os.lchown(path, owner.pw_uid, owner.pw_gid)
    if os.lstat(root).st_uid == 0:
        os.lchown(root, owner.pw_uid, owner.pw_gid)


def drop_privileges(owner: pwd.struct_passwd) -> None:
    """Become another user for good."""
    os.initgroups(owner.pw_name, owner.pw_gid)
    os.setresgid(owner.pw_gid, owner.pw_gid, owner.pw_gid)
    os.setresuid(owner.pw_uid, owner.pw_uid, owner.pw_uid)


def write_pid_file(path: str) -> None:
    """Leave our process id at ``path``."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")


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
