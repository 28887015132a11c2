"""Moves of queue files, and whatever else the disk may refuse: tried again until it lets them.

A full disk, a file system that was remounted read-only, a file server that is gone for a while: nothing of that may lose a
message or hold up another. What failed is repeated after a pause, under the queue id that it is about. As long as such a
repetition is pending the message is in nobody else's hands: whoever finds its file asks here first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

#: Seconds until something that the disk refused is tried again: once it is healed, all is well within a few.
PAUSE: Final = 2.0
#: Seconds between two complaints about that.
QUIET: Final = 10.0
#: Repetitions that one call of `Moves.turn` makes.
TURN: Final = 50


class Moves:
    """What is to be repeated, by queue id (or file name), at most one thing for each."""

    def __init__(self, monotonic: Callable[[], float], warn: Callable[[str], None]) -> None:
        """``monotonic`` is a clock, in seconds; ``warn`` is told what the disk refuses, once for each `QUIET`."""
        self._monotonic = monotonic
        self._warn = warn
        self._pending: OrderedDict[str, tuple[float, Callable[[], None], str]] = OrderedDict()
        self._quiet_until = 0.0

    def __contains__(self, name: str) -> bool:
        return name in self._pending

    def __len__(self) -> int:
        return len(self._pending)

    def do(self, name: str, move: Callable[[], bool], then: Callable[[bool], None]) -> None:
        """Do a move now, or as soon as the disk lets it; then call ``then`` with its answer (False: the file was gone)."""
        try:
            moved = move()
        except OSError as fault:
            now = self._monotonic()
            if now >= self._quiet_until:
                self._quiet_until = now + QUIET
                self._warn(f"the spool cannot be changed, trying again every {PAUSE:g} s: {name}: {fault}")
            self.later(name, lambda: self.do(name, move, then), fault.strerror or str(fault))
            return
        then(moved)

    def why(self, name: str) -> str:
        """What is in the way of something that is pending, in words; "" when nothing is pending."""
        return self._pending[name][2] if name in self._pending else ""

    def later(self, name: str, action: Callable[[], None], why: str = "it cannot be read") -> None:
        """Call ``action`` after the pause; ``why`` not now, in words."""
        self._pending[name] = (self._monotonic() + PAUSE, action, why)
        self._pending.move_to_end(name)

    def turn(self) -> bool:
        """Repeat what is due, a bounded number of things; whether there is more of it at once."""
        now = self._monotonic()
        for _ in range(TURN):
            if not self._pending:
                return False
            name, (when, action, _) = next(iter(self._pending.items()))
            if when > now:
                return False
            del self._pending[name]
            action()
        return True

    def wait(self) -> float | None:
        """Seconds until `turn` has something to do; None when nothing is pending."""
        for when, _, _ in self._pending.values():
            return max(0.0, when - self._monotonic())
        return None
