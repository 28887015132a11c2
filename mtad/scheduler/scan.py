"""Looking through the queue directories, a slice at a time, so that a hundred thousand files never hold up one delivery.

The scan is what makes the wake-ups dispensable: whatever lies in a queue is found by it, also what an administrator or a
crash left there. It judges and moves to corrupt/ what is no queue file; everything else it hands on by name.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Final

from mtad.spool.queues import Queue, Spool

#: Files looked at in one slice: a millisecond or two.
SLICE: Final = 200


class Scan:
    """One pass over a queue."""

    def __init__(
        self,
        spool: Spool,
        queue: Queue,
        visit: Callable[[str, float], None],
        stranger: Callable[[Queue, str], None],
        warn: Callable[[str], None],
    ) -> None:
        """``visit`` gets queue id and mtime of each message, ``stranger`` what does not belong in the queue.

        ``warn`` is told of the first file of a pass about which the disk tells nothing; the others are counted with it.
        """
        self.queue = queue
        self._visit = visit
        self._stranger = stranger
        self._warn = warn
        self._broken = 0
        self._entries = spool.entries(queue, self._skip)

    def advance(self) -> bool:
        """Look at the next slice; False when there was nothing left.

        Raises:
            OSError: the directory cannot be read.
        """
        entries = list(islice(self._entries, SLICE))
        for name, mtime in entries:
            if mtime is None:
                self._stranger(self.queue, name)
            else:
                self._visit(name, mtime)
        if len(entries) == SLICE:
            return True
        if self._broken > 1:
            self._warn(
                f"{self._broken} files in {self.queue.value} were passed over, because the disk says nothing about them"
            )
        return False

    def _skip(self, name: str, fault: OSError) -> None:
        self._broken += 1
        if self._broken == 1:
            self._warn(f"{name}: cannot look at it in {self.queue.value}, passing over it: {fault.strerror or fault}")
