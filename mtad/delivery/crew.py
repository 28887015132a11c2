"""The threads of a delivery process: as many as there are jobs at a time, and at least one more that waits.

They read the channel themselves, each packet goes to one of them. A thread that takes a job leaves at least one waiting, so
a job never waits for a thread; how many jobs there are at a time is the scheduler's decision. Threads that nobody needed
for `QUIET` seconds end, and give back what they hold: a destination that hung for a while costs no memory for ever.

Errors: a machine that gives no more threads makes deliveries wait for one. What breaks a thread ends the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Final

from mtad import log
from mtad.net.channels import PacketRoom, PacketSocket, hung_up, wait_at_most

#: Seconds in which a thread must have been needed once, or it ends.
QUIET: Final = 10.0
#: Threads that wait, and stay, although nobody needed them: the next jobs rarely come alone.
SPARE: Final = 4
#: What it is when the machine gives no thread, or no memory for one.
_NO_THREAD: Final = (RuntimeError, OSError)


class Crew:
    """The threads of one process."""

    def __init__(self, channel: PacketSocket, work: Callable[[bytes], None], quiet: float = QUIET) -> None:
        """No thread yet. ``work`` is done with each packet from ``channel``; ``quiet`` is `QUIET`."""
        self._channel = channel
        self._work = work
        # Threads that wait are woken by this, to see whether they are too many.
        wait_at_most(channel, quiet)
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._least_idle = 0
        self._surplus = 0
        self._before = 0
        self._starved = False
        self.ended = threading.Event()
        """The channel is closed, and the last job done."""

    @property
    def threads(self) -> int:
        """How many there are."""
        return self._threads

    def muster(self) -> bool:
        """Start the first thread. Where there is none to be had jobs wait for it; False when nobody waits for them."""
        if self._threads or self.ended.is_set():
            return True
        try:
            self._add()
        except _NO_THREAD as fault:
            if not self._starved:
                log.warning(f"no thread for deliveries, they wait: {fault}")
            self._starved = True
            return not hung_up(self._channel)
        return True

    def thin_out(self) -> bool:
        """Let those end that waited all the time since this was last called; to be called every `QUIET` seconds.

        Whether some have ended since, so that there may be memory to give back.
        """
        with self._lock:
            fewer = self._threads < self._before
            self._before = self._threads
            self._surplus = max(0, self._least_idle - SPARE)
            self._least_idle = self._idle
            return fewer

    def _add(self) -> None:
        """Start a thread, with all that it needs before its first job.

        Raises:
            RuntimeError, OSError: the machine gives none, or no memory for it.
        """
        room = PacketRoom()
        self._threads += 1
        try:
            threading.Thread(target=self.serve, args=(room,), name="delivery", daemon=True).start()
        except RuntimeError:
            self._threads -= 1
            raise

    def serve(self, room: PacketRoom) -> None:
        """What a thread does."""
        try:
            while (packet := self._next(room)) is not None:
                self._work(packet)
        except BaseException as bug:
            # A job without an answer would be under way for ever. The scheduler takes back what a dead process had.
            try:
                log.panic("a thread of deliveries came to an end that nobody thought of", bug)
            finally:
                os._exit(os.EX_SOFTWARE)

    def _next(self, room: PacketRoom) -> bytes | None:
        """Wait for a packet; None when this thread is to end."""
        with self._lock:
            if self._too_many():
                return None
            self._idle += 1
        while True:
            try:
                packet = room.receive(self._channel)
            except BlockingIOError:  # nothing came for so long
                with self._lock:
                    self._idle -= 1
                    if self._too_many():
                        return None
                    self._idle += 1
                continue
            except OSError:
                packet = b""
            with self._lock:
                self._idle -= 1
                self._least_idle = min(self._least_idle, self._idle)
                if packet:
                    self._relieve()
                    return packet
                self._threads -= 1
                if not self._threads:
                    self.ended.set()
                return None

    def _too_many(self) -> bool:
        """Whether this thread is one too many; it is no longer counted then."""
        if not self._surplus or self._idle < SPARE:
            return False
        self._surplus -= 1
        self._threads -= 1
        return True

    def _relieve(self) -> None:
        """See that somebody waits for the next packet."""
        if self._idle:
            return
        try:
            self._add()
        except _NO_THREAD as fault:
            log.warning(f"no thread for the next delivery, it waits for one that ends: {fault}")
