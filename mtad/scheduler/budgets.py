"""Budgets: how much may be under way at a time to a destination, and how much may be started in a time.

All times are seconds of one monotonic clock. Pure data: time is a parameter.

The *window* of a budget is how many jobs may be under way. It starts small and opens by one with each success, up to the
limit. It closes by one with each failure of the destination. A destination that asks for less (421, "too many
connections", a rate limit of its own) halves it, once for all that was under way when it did; the window never closes for
that, and afterwards opens slowly: by one in `SLOWLY` seconds at most. Each step beyond what the other side allows costs a
message a deferral, so few steps are taken.

A `Bucket` holds the jobs of one budget to a rate. Of "100/1m" never more than 100 start within any minute. Up to a tenth
of them start at once, after a pause; the others are spread evenly over the time. So a single message does not wait long,
however much goes out, and the other side sees no bursts. Steadily that makes nine tenths of the rate (all of it where a
tenth is less than one message).
"""

from __future__ import annotations

import math
from typing import Final

from mtad.nexthop import Rate
from mtad.outcome import Deferred, Outcome

#: Window of a budget that has not been used before; Postfix's initial_destination_concurrency.
INITIAL_WINDOW: Final = 5
#: Seconds between two steps of a window that opens slowly.
SLOWLY: Final = 30.0
#: The part of a rate that may start at once.
_BURST: Final = 10


class Bucket:
    """Holds jobs to a rate; see the module."""

    __slots__ = ("_before", "_burst", "_spacing", "full", "rate")

    def __init__(self, rate: Rate) -> None:
        """A full bucket."""
        self.rate = rate
        burst = max(1, rate.count // _BURST)
        # In a time: those at once, and those that follow within it, one by one. Both together are the number allowed.
        self._spacing = rate.seconds / (rate.count - burst + 1)
        self._burst = burst
        self.full = -math.inf
        """When nothing that was started counts any more."""
        self._before = self.full

    @property
    def opens(self) -> float:
        """When the next job may start; any time that is past means now."""
        return self.full - (self._burst - 1) * self._spacing

    def within(self, seconds: float) -> int:
        """How many jobs start in this time, if there are as many: at least one tenth of the rate's number, and one."""
        return self._burst + int(seconds / self._spacing)

    def take(self, now: float) -> None:
        """A job starts; before its time, and the next ones wait the longer."""
        self._before = self.full
        self.full = max(now, self.full) + self._spacing

    def undo(self) -> None:
        """The job that was taken last did not start."""
        self.full = self._before


class Budget:
    """A window, and perhaps a rate; see the module."""

    __slots__ = ("_moved", "_shrunk", "bucket", "careful", "in_flight", "limit", "reason", "window")

    def __init__(self, limit: int, rate: Rate | None = None) -> None:
        """Nothing is under way. ``limit`` is the largest window, 1 or more."""
        self.limit = limit
        self.bucket = None if rate is None else Bucket(rate)
        self.window = min(INITIAL_WINDOW, limit)
        self.in_flight = 0
        self.reason: Outcome | None = None
        """What made the window smaller, last; None when it is as large as may be."""
        self.careful = False
        """The destination has asked for less, and the window opens slowly since."""
        self._shrunk = -math.inf
        self._moved = -math.inf

    @property
    def room(self) -> bool:
        """One more may be under way."""
        return self.in_flight < self.window

    @property
    def opens(self) -> float:
        """When the rate lets the next job start; any time that is past means now."""
        return -math.inf if self.bucket is None else self.bucket.opens

    def start(self, now: float) -> None:
        """A job is under way."""
        self.in_flight += 1
        if self.bucket is not None:
            self.bucket.take(now)

    def undo(self) -> None:
        """The job for which `start` was called last did not get under way."""
        self.in_flight -= 1
        if self.bucket is not None:
            self.bucket.undo()

    def end(self) -> None:
        """A job is no longer under way."""
        self.in_flight -= 1

    def succeeded(self, now: float) -> None:
        """The destination took part in a job."""
        if self.window < self.limit and not (self.careful and now < self._moved + SLOWLY):
            self.window += 1
            self._moved = now
        if self.window >= self.limit:
            self.reason = None
            self.careful = False

    def failed(self, reason: Deferred, least: int) -> None:
        """The destination as a whole was out of reach. The window does not become smaller than ``least`` by that."""
        self.reason = reason
        self.window = max(least, self.window - 1)

    def asked_for_less(self, reason: Outcome, started: float, now: float) -> bool:
        """The destination does not want so much at a time, as a job says that was ``started`` then.

        Returns:
            whether it said so to one job at a time.
        """
        self.reason = reason
        alone = self.window <= 1
        if started <= self._shrunk:
            return False  # it was under way when the window was halved for the same reason
        self.window = max(1, self.window // 2)
        self._shrunk = self._moved = now
        self.careful = True
        return alone
