"""The threads of the sessions: one for each connection, and used again for the next one while connections keep coming.

To start a thread costs more than to receive a small message: its stack is mapped and unmapped, and the interpreter passes
its lock to and fro. A thread that is done therefore waits a moment for the next connection before it ends. No connection
ever waits for a thread: when none is idle, one is started.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final, Generic, TypeVar

#: Seconds for which an idle thread waits for another connection: long enough for a steady stream, short enough that
#: the threads of a burst are soon gone.
_IDLE: Final = 5.0

T = TypeVar("T")


class SessionThreads(Generic[T]):
    """Runs ``work`` on each thing it is given, each in a thread of its own at that time."""

    def __init__(self, work: Callable[[T], None]) -> None:
        """``work`` must not raise."""
        self._work = work
        self._lock = threading.Lock()
        self._idle = 0
        self._handover: SimpleQueue[T] = SimpleQueue()

    @property
    def idle(self) -> bool:
        """Whether there is a thread that waits for work."""
        return self._idle > 0

    def start(self, what: T) -> None:
        """Have ``work`` done on this, now.

        Raises:
            RuntimeError: there is no idle thread, and the machine gives no new one.
        """
        with self._lock:
            idle = self._idle > 0
            if idle:
                self._idle -= 1  # this one is promised
        if idle:
            self._handover.put(what)
        else:
            _thread.start_new_thread(self._serve, (what,))

    def _serve(self, what: T) -> None:
        while True:
            self._work(what)
            with self._lock:
                self._idle += 1
            try:
                what = self._handover.get(timeout=_IDLE)
            except Empty:
                with self._lock:
                    if self._idle:
                        self._idle -= 1
                        return
                # All idle threads are promised to somebody, this one, too.
                what = self._handover.get()
