"""A place for a child of the master, and when the next one comes to it: ever later, as long as they die young."""

from __future__ import annotations

import time
from typing import Final

#: A child that lived less than this (seconds) died young: the pause before its successor doubles.
_YOUNG: Final = 5.0
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 30.0


class ChildPlace:
    """A place for one child of the current generation: a listener, or the scheduler."""

    def __init__(self, role: str, row: int = -1) -> None:
        """``row`` is a listener's in the occupancy table."""
        self.role = role
        self.row = row
        self.pid = 0
        self.started = 0.0
        """When its child was started, in seconds since the epoch; 0 before the first."""
        self.deaths = 0
        self.pause = _FIRST_PAUSE
        self.not_before = 0.0
        """When the next child may come, monotonic."""
        self._born = 0.0

    def due(self) -> bool:
        """Whether a child is to be started now."""
        return not self.pid and time.monotonic() >= self.not_before

    def filled(self, pid: int) -> None:
        """A child was started."""
        self.pid = pid
        self.started = time.time()
        self._born = time.monotonic()

    def died(self) -> None:
        """Its child came to an end that nobody asked for."""
        self.deaths += 1
        self.wait(young=time.monotonic() - self._born < _YOUNG)

    def wait(self, *, young: bool) -> None:
        """The next child comes after a pause, which doubles as long as they die ``young``."""
        self.pause = min(_LONGEST_PAUSE, self.pause * 2) if young else _FIRST_PAUSE
        self.not_before = time.monotonic() + self.pause
