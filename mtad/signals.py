"""Signals as something to be read: the handlers only note which ones came, and wake a poll.

A process calls `Signals` once, in its only thread, right after its fork; what it inherited is replaced.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

#: Signals that a process has to ask for; all others of them are ignored by it.
OURS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def held_back() -> Iterator[None]:
    """Put off signals while a process forks: the child then gets its own in its own `Signals`, none in its parent's.

    The child leaves this by calling `let_through` once it has made them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, OURS)
    try:
        yield
    finally:
        let_through()


def let_through() -> None:
    """End `held_back`; what came meanwhile is delivered now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OURS)


class Signals:
    """The signals of this process; to be polled by `fileno` and read by `take`."""

    def __init__(self, wanted: Iterable[signal.Signals]) -> None:
        """Take note of the ``wanted`` signals from now on; the others of `OURS` are ignored, but for SIGCHLD."""
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._seen: set[signal.Signals] = set()
        wanted = frozenset(wanted)
        for number in OURS:
            if number in wanted:
                signal.signal(number, self._note)
            else:
                signal.signal(number, signal.SIG_DFL if number is signal.SIGCHLD else signal.SIG_IGN)

    def _note(self, number: int, _frame: object) -> None:
        self._seen.add(signal.Signals(number))

    def fileno(self) -> int:
        """For a poll."""
        return self._read

    def take(self) -> set[signal.Signals]:
        """Which signals have come since the last call."""
        try:
            while os.read(self._read, 512):
                pass
        except BlockingIOError:
            pass
        seen, self._seen = self._seen, set()
        return seen

    def close(self) -> None:
        """Forget a parent's, in a child that has made its own."""
        os.close(self._read)
        os.close(self._write)


def how_ended(code: int) -> str:
    """An exit code, negative for a signal (`os.waitstatus_to_exitcode`), in words."""
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # those for real-time use have no names in Python
        return f"killed by signal {-code}"
