"""A spool that is a table in memory, for the simulator: the moves that a scheduler makes, and the states that it reads.

What a queue file would keep of a message is its envelope and where its recipients stand. Nothing here can fail.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from mtad.envelope import Envelope
from mtad.outcome import Attempt
from mtad.progress import Event, RecipientState, Reported, attempted, told
from mtad.spool.queue_file import Head
from mtad.spool.queues import Queue


class Entry(msgspec.Struct):
    """One message, wherever it is; has what a scheduler asks of a message that it has read."""

    head: Head
    states: list[RecipientState]
    queue: Queue = Queue.INCOMING
    when: float = 0.0
    events: tuple[Event, ...] = ()
    """None is kept."""
    cut: bool = False
    """No power cut has taken anything."""

    @property
    def envelope(self) -> Envelope:
        """The envelope."""
        return self.head.envelope


class MemorySpool:
    """See the module; the methods are those of `mtad.spool.queues.Spool`."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.moves: Counter[str] = Counter()

    def add(self, envelope: Envelope, size: int) -> Head:
        """A new message in incoming."""
        head = Head(envelope, 0, size, 0)
        self.entries[envelope.id] = Entry(head, [RecipientState()] * len(envelope.recipients))
        return head

    def claim(self, queue: Queue, queue_id: str) -> bool:
        """To active."""
        return self._move(queue, Queue.ACTIVE, queue_id)

    def defer(self, queue_id: str, when: float) -> bool:
        """To deferred, until ``when``."""
        if not self._move(Queue.ACTIVE, Queue.DEFERRED, queue_id):
            return False
        self.entries[queue_id].when = when
        return True

    def hold(self, queue: Queue, queue_id: str) -> bool:
        """To hold."""
        return self._move(queue, Queue.HOLD, queue_id)

    def remove(self, queue_id: str) -> bool:
        """A message of active is done."""
        if queue_id not in self.entries or self.entries[queue_id].queue is not Queue.ACTIVE:
            return False
        del self.entries[queue_id]
        self.moves["removed"] += 1
        return True

    def load(self, queue: Queue, queue_id: str) -> Entry:
        """A message.

        Raises:
            FileNotFoundError: it is not in this queue.
        """
        entry = self.entries.get(queue_id)
        if entry is None or entry.queue is not queue:
            raise FileNotFoundError(queue_id)
        return entry

    def append(self, queue: Queue, queue_id: str, event: Event) -> None:
        """Add to the history of a message: only what it comes to is kept."""
        states = self.load(queue, queue_id).states
        if isinstance(event, Attempt):
            for index, outcome in event.outcomes:
                states[index] = attempted(states[index], outcome)
        elif isinstance(event, Reported):
            for index in event.recipients:
                states[index] = told(states[index], event)

    def in_work(self, _queue: Queue, _queue_id: str) -> bool:
        """Nobody else is there."""
        return False

    def _move(self, source: Queue, target: Queue, queue_id: str) -> bool:
        entry = self.entries.get(queue_id)
        if entry is None or entry.queue is not source:
            return False
        entry.queue = target
        self.moves[target.value] += 1
        return True
