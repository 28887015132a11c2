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
        self, spool: Spool, queue: Queue, visit: Callable[[str, float], None], stranger: Callable[[Queue, str], None]
    ) -> None:
        """``visit`` gets queue id and mtime of each message, ``stranger`` what does not belong in the queue."""
        self.queue = queue
        self._visit = visit
        self._stranger = stranger
        self._entries = spool.entries(queue)

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
        return len(entries) == SLICE
