"""The watchdog of a delivery process: no delivery waits for ever, whatever it waits for.

Every wait of a delivery has a time-out of its own. The watchdog is for the wait that nobody thought of: it knows the job of
each thread, and when that has last moved. Moving is an octet sent or received, and each step in between. A job that has not
moved for longer than the longest time-out that can apply gets its connection shut down from outside, so that its thread
comes back with an error. One that has not moved for twice as long (it hangs in a disk, or in ourselves) is named to the
scheduler, which ends the process when nothing else is at work in it, see `mtad.scheduler.pool`.

Invariants: a session belongs to a job only while the job's thread uses it, so that one that has gone back to the cache is
never shut down for an old user. Methods but `look` are called by the thread whose job it is, `look` by another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock, get_ident
from typing import Final, Protocol

from mtad import log
from mtad.config import Config
from mtad.routing import HOST_LIMIT
from mtad.smtp.dialogue import PHASES

#: Seconds on top of the longest time-out: a busy machine, and what we do between two waits.
MARGIN: Final = 30.0


class Line(Protocol):
    """What the watchdog needs of `mtad.delivery.connections.Session`."""

    host: str
    moved: float
    """When an octet was last sent or received, monotonic."""

    def interrupt(self) -> None:
        """End the connection under the thread that waits on it."""


class _Watch:
    """One job in its thread."""

    __slots__ = ("interrupted", "line", "moved", "number", "queue_id")

    def __init__(self, number: int, queue_id: str, now: float) -> None:
        self.number = number
        self.queue_id = queue_id
        self.line: Line | None = None
        self.moved = now
        self.interrupted = 0.0


class Watchdog:
    """Of one process. Thread-safe."""

    def __init__(self, limit: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        """``limit``: seconds without a move, see `longest_wait`."""
        self._limit = limit
        self._monotonic = monotonic
        self._lock = Lock()
        self._watches: dict[int, _Watch] = {}

    def begin(self, number: int, queue_id: str) -> None:
        """This thread begins with a job, of which the scheduler knows the number."""
        with self._lock:
            self._watches[get_ident()] = _Watch(number, queue_id, self._monotonic())

    def end(self) -> None:
        """This thread's job is done."""
        with self._lock:
            self._watches.pop(get_ident(), None)

    def follow(self, line: Line | None) -> None:
        """This thread goes on, over this session or over none; a step in itself."""
        with self._lock:
            watch = self._watches.get(get_ident())
            if watch is not None:
                watch.line = line
                watch.moved = self._monotonic()

    def look(self) -> list[int]:
        """Interrupt what has not moved for too long; the numbers of the jobs that did not move after that either."""
        now = self._monotonic()
        stuck: list[int] = []
        with self._lock:
            for watch in self._watches.values():
                idle = now - max(watch.moved, watch.line.moved if watch.line is not None else 0.0)
                if idle < self._limit:
                    watch.interrupted = 0.0
                elif not watch.interrupted:
                    watch.interrupted = now
                    self._interrupt(watch, idle)
                elif now - watch.interrupted >= self._limit:
                    stuck.append(watch.number)
        return stuck

    @staticmethod
    def _interrupt(watch: _Watch, idle: float) -> None:
        where = f"with {watch.line.host}; its connection is shut down" if watch.line is not None else "without a connection"
        log.warning(f"a delivery has made no progress for {idle:.0f} s, {where}", watch.queue_id)
        if watch.line is not None:
            watch.line.interrupt()


def longest_wait(config: Config) -> float:
    """Seconds that a delivery may pass without a move: the longest of its time-outs, and a margin."""
    delivery = config.delivery
    waits = [float(getattr(delivery, words.timeout)) for words in PHASES.values()]
    waits += [float(delivery.data_xfer_timeout), float(delivery.connect_timeout)]
    waits.append(2 * HOST_LIMIT * float(config.dns.timeout))  # both addresses of hosts that nobody answers for
    return max(waits) + MARGIN
