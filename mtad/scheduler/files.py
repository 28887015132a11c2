"""The queue files in the hands of the scheduler: reading them, and what follows when one cannot be read or written.

Gone is nothing: an administrator has removed it. Damaged, or not ours to read: it moves to corrupt/, is logged, and stays
there for a human. What the disk refuses is tried again later, see `mtad.scheduler.moves`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from mtad.envelope import Envelope
from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.outcome import Attempt
from mtad.progress import RecipientState
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.events import Events
from mtad.scheduler.moves import Moves
from mtad.spool.queue_file import StoredMessage
from mtad.spool.queues import Queue, Spool

#: What reading a queue file may raise.
UNREADABLE: Final = (QueueFileDamaged, QueueFileUnfinished, OSError)


class Files:
    """Reads and appends for one scheduler."""

    def __init__(self, spool: Spool, events: Events, moves: Moves, restore: Callable[[str], bool]) -> None:
        """``restore`` goes on with a message of active that could not be read before; False: it is in work, ask again."""
        self._spool = spool
        self._events = events
        self._moves = moves
        self._restore = restore

    def load(self, queue_id: str) -> StoredMessage | None:
        """A message of active; None when it cannot be read, and then all that is to be done about it is done or pending."""
        try:
            return self._spool.load(Queue.ACTIVE, queue_id)
        except UNREADABLE as fault:
            self.misread(Queue.ACTIVE, queue_id, fault)
            return None

    def arrived_whole(self, queue_id: str, age: float) -> bool:
        """Whether a file in incoming that nobody is at work on is a message; what will never be one is done away with.

        ``age`` in seconds: what is younger than one may just be between two steps of its receiver.
        """
        try:
            self._spool.load(Queue.INCOMING, queue_id)
        except QueueFileUnfinished:
            if age > 1.0 and self._sweep(queue_id):
                self._events.swept(queue_id)
        except (QueueFileDamaged, OSError) as fault:
            self.misread(Queue.INCOMING, queue_id, fault)
        else:
            return True
        return False

    def note(self, message: ActiveMessage, attempt: Attempt) -> None:
        """Append why recipients are deferred; it is for `mtaq` only, so a disk that refuses is no reason to stop.

        Raises:
            QueueFileDamaged, QueueFileUnfinished: the file is no longer what it was.
        """
        try:
            self._spool.append(Queue.ACTIVE, message.id, attempt)
        except OSError as fault:
            self._events.warning(f"{message.id}: cannot note why it is deferred: {fault.strerror or fault}")

    def write_down(self, message: ActiveMessage) -> bool:
        """Append what a delivery process could not; for `Moves.do`.

        Raises:
            OSError: the disk still refuses.
        """
        try:
            with self._spool.open(Queue.ACTIVE, message.id) as opened:
                opened.append(*message.unwritten, durable=True)
        except FileNotFoundError:
            pass  # an administrator has removed it
        except (QueueFileDamaged, QueueFileUnfinished):
            pass  # whoever reads it next finds out, and before it leaves this system somebody must
        message.unwritten.clear()
        return True

    def tell_doubts(self, envelope: Envelope, states: Sequence[RecipientState], recipients: Iterable[int]) -> None:
        """Say which of these recipients may have the message already."""
        for index in recipients:
            if states[index].doubt:
                self._events.in_doubt(envelope.id, envelope.recipients[index].address, states[index].doubt)

    def misread(self, queue: Queue, name: str, fault: Exception) -> None:
        """A file could not be read: do what the module says."""
        if isinstance(fault, FileNotFoundError):
            return
        if isinstance(fault, OSError) and not isinstance(fault, PermissionError):
            self._events.warning(f"{name}: cannot read it in {queue.value}: {fault.strerror or fault}")
            if queue is Queue.ACTIVE:  # the others are found by the scan again
                self._moves.later(name, lambda: self._restore_later(name))
            return

        def condemned(moved: bool) -> None:
            if moved:
                self._events.damaged(name, queue, str(fault))

        self._moves.do(name, lambda: self._spool.condemn(queue, name), condemned)

    def _restore_later(self, queue_id: str) -> None:
        if not self._restore(queue_id):
            self._moves.later(queue_id, lambda: self._restore_later(queue_id))

    def _sweep(self, queue_id: str) -> bool:
        try:
            return self._spool.sweep(queue_id)
        except OSError as fault:
            self._events.warning(f"{queue_id}: cannot remove what was never finished: {fault.strerror or fault}")
            return False
