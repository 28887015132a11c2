"""Files of incoming that failed at their commit and that the disk does not let go: nobody may take them for messages.

After a failed fsync nobody knows what of a file is on the disk, and its sender was told that we do not have the message.
Such a file is removed, or emptied, or marked as unfinished. A disk that refuses all three leaves it there whole; then its
descriptor is kept open, with the lock that says to everybody that the file is in work, and all is tried again every
`PAUSE` seconds. Until it has come to something no new file is made: what such a disk is given it would keep, too.

Errors: none. A process that ends lets go of its locks, too: what the disk has then is judged by its checksums.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Final

from mtad.spool.queue_file import UNFINISHED

#: Seconds between two tries.
PAUSE: Final = 1.0


def undo(directory: int, name: str, fd: int) -> bool:
    """Do away with a file that is open for writing, one way or another; whether that was possible."""
    try:
        os.unlink(name, dir_fd=directory)
        return True
    except FileNotFoundError:
        return True
    except OSError:
        pass
    try:
        os.ftruncate(fd, 0)
        return True
    except OSError:
        pass
    try:
        return os.pwrite(fd, UNFINISHED, 0) == len(UNFINISHED)
    except OSError:
        return False


class Leftovers:
    """Those of one process. Thread-safe."""

    def __init__(self) -> None:
        """There are none."""
        self._lock = threading.Lock()
        self._files: list[tuple[int, str, int]] = []

    def __len__(self) -> int:
        return len(self._files)

    def keep(self, directory: int, name: str, fd: int) -> None:
        """Take over a file: its name in the directory, and its descriptor, which holds the lock."""
        with self._lock:
            self._files.append((directory, name, fd))
            alone = len(self._files) == 1
        if alone:
            # A machine without a thread to spare: the next message that comes tries it, see `clear`.
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self._clear_later, name="leftovers", daemon=True).start()

    def clear(self) -> bool:
        """Try again; whether none is left."""
        with self._lock:
            while self._files:
                directory, name, fd = self._files[-1]
                if not undo(directory, name, fd):
                    return False
                self._files.pop()
                with contextlib.suppress(OSError):
                    os.close(fd)
            return True

    def abandon(self) -> None:
        """Let go of all, as the end of the process does."""
        with self._lock:
            while self._files:
                with contextlib.suppress(OSError):
                    os.close(self._files.pop()[2])

    def _clear_later(self) -> None:
        while not self.clear():
            time.sleep(PAUSE)


#: This process's.
LEFTOVERS: Final = Leftovers()
