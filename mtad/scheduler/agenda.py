"""The agenda: which deferred message is due when.

The truth is on the disk (the mtime of the file in deferred/); the agenda is its picture in memory, a number and a name per
message, so that finding who is due costs the same with a hundred thousand messages as with ten.
"""

from __future__ import annotations

import heapq
from typing import Final

#: When more than half of the heap are entries that have been overruled, it is rebuilt; below this size never.
_SMALL: Final = 1024


class Agenda:
    """Times by queue id. Setting a message's time again overrules the one before."""

    def __init__(self) -> None:
        """An empty agenda."""
        self._times: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._times)

    def __contains__(self, queue_id: str) -> bool:
        return queue_id in self._times

    def time_of(self, queue_id: str) -> float:
        """When a message is due; 0 when it is not deferred."""
        return self._times.get(queue_id, 0.0)

    def set(self, queue_id: str, when: float) -> None:
        """A message is due at ``when``, in seconds since the epoch."""
        if self._times.get(queue_id) == when:
            return
        self._times[queue_id] = when
        heapq.heappush(self._heap, (when, queue_id))
        if len(self._heap) > max(_SMALL, 2 * len(self._times)):
            self._heap = [(time, name) for name, time in self._times.items()]
            heapq.heapify(self._heap)

    def shift(self, seconds: float) -> None:
        """Everything is due so many seconds later, or, negative, sooner."""
        self._times = {name: when + seconds for name, when in self._times.items()}
        self._heap = [(when, name) for name, when in self._times.items()]
        heapq.heapify(self._heap)

    def drop(self, queue_id: str) -> None:
        """A message is not deferred (any more)."""
        self._times.pop(queue_id, None)

    def pop(self, now: float) -> str | None:
        """Take out the message that has been due the longest; None when none is due."""
        while self._heap and self._heap[0][0] <= now:
            when, queue_id = heapq.heappop(self._heap)
            if self._times.get(queue_id) == when:
                del self._times[queue_id]
                return queue_id
        return None

    def next_time(self) -> float | None:
        """When the next message is due; None when there is none."""
        while self._heap:
            when, queue_id = self._heap[0]
            if self._times.get(queue_id) == when:
                return when
            heapq.heappop(self._heap)
        return None
