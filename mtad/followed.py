"""A small file that somebody may change while it is in use: read again when it has changed, by whichever thread asks first.

    self._file = FollowedFile(path, "local.users", self._take, lambda text: warn(f"{text}; the old ones stay in force"))
    self._file.read()        # at the start
    self._file.follow()      # before each use: looks once a second at most

A changed file is read when nobody has written to it for `SETTLES` seconds, so that whoever writes it in place is not
interrupted in the middle. A new file with a fault is told about, once for each change, and what was taken from the old one
stays in force. One that cannot be read (no permission, no descriptor left) is told about once, too, and is tried again at
each look. A slower thread never puts what it has read in the place of what a faster one has read after it.

Errors: ConfigError from `FollowedFile.read` only, when the file cannot be read, and from what takes its contents.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final

from mtad.errors import ConfigError, Problem

#: How long, in seconds, a change of the file may go unnoticed.
CHECK_INTERVAL: Final = 1.0

#: Seconds since the last change of the file before it is read again.
SETTLES: Final = 0.5

_Signature = tuple[int, ...]

#: That of a file that could not be read: no file has it, so it is read at the next look.
_UNREAD: Final[_Signature] = ()


class FollowedFile:
    """The file at ``path``; any thread may call any method."""

    def __init__(
        self, path: str, setting: str, take: Callable[[bytes | None], None], tell: Callable[[Problem], None]
    ) -> None:
        """Nothing is read yet.

        Args:
            path: of the file.
            setting: of the configuration, where its name stands.
            take: is given the contents of the file, None when there is none; what it raises is raised, or told.
            tell: is given each fault that is found after the first reading.
        """
        self._path = path
        self._setting = setting
        self._take = take
        self._tell = tell
        self._signature: _Signature | None = None
        self._told: tuple[_Signature | None, list[str]] = (None, [])
        self._reading = threading.Lock()
        self._checked = 0.0

    def read(self) -> None:
        """Read it, whether it has changed or not.

        Raises:
            ConfigError: it cannot be read, or has a fault.
        """
        self._checked = time.monotonic()
        # Looked at before the reading: a change in between is then found by the next look.
        self._signature = self._look()
        data: bytes | None = None
        try:
            with open(self._path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            pass
        except (OSError, MemoryError) as error:
            self._signature = _UNREAD
            why = error.strerror if isinstance(error, OSError) else ""
            raise ConfigError([Problem(self._path, None, self._setting, why or "cannot be read")]) from None
        self._take(data)

    def follow(self) -> None:
        """Refresh, unless the last look was less than `CHECK_INTERVAL` ago."""
        now = time.monotonic()
        if now - self._checked >= CHECK_INTERVAL:
            self._checked = now
            self.refresh()

    def refresh(self) -> None:
        """Read it if it has changed, and is not being changed still."""
        with self._reading:
            found = self._look()
            if found == self._signature or (found and 0 <= time.time() - found[0] / 1e9 < SETTLES):
                return
            try:
                self.read()
            except ConfigError as error:
                told = self._signature, [str(problem) for problem in error.problems]
                if told != self._told:
                    self._told = told
                    for problem in error.problems:
                        self._tell(problem)
            else:
                self._told = (None, [])

    def _look(self) -> _Signature | None:
        """What tells one state of the file from another; None when there is none."""
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev)
