"""What lies in a directory of the spool, by name and time; nothing is opened.

Errors: OSError, when the directory cannot be read; a file about which the disk says nothing is passed over and told.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

from mtad.spool.queue_id import is_queue_id


def names(directory: int) -> Iterator[str]:
    """The names in an open directory, in no order, one by one."""
    # Opened anew each time: descriptors that a fork or a second scan shares would share their position, too.
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        with os.scandir(fd) as found:
            for entry in found:
                yield entry.name
    finally:
        os.close(fd)


def entries(directory: int, broken: Callable[[str, OSError], None]) -> Iterator[tuple[str, float | None]]:
    """See `mtad.spool.queues.Spool.entries`."""
    for name in names(directory):
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            continue
        except OSError as fault:
            broken(name, fault)
            continue
        regular = stat.S_ISREG(status.st_mode)
        if regular and name.startswith("."):
            continue  # .gitkeep of a checkout
        yield name, status.st_mtime if regular and is_queue_id(name) else None
