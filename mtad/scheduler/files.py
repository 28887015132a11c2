"""The queue files in the hands of the scheduler: reading them, and what follows when one cannot be read or written.

Gone is nothing: an administrator has removed it. Damaged, or not ours to read: it moves to corrupt/, is logged, and stays
there for a human. What the disk refuses is tried again later, see `mtad.scheduler.moves`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

from mtad.envelope import Envelope
from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.outcome import Attempt, Failed
from mtad.progress import CUT, REPORT, Doubt, Event, Named, RecipientState
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.events import Events
from mtad.scheduler.moves import Moves
from mtad.spool.queue_file import StoredMessage
from mtad.spool.queues import Queue, Spool

#: What reading a queue file may raise.
UNREADABLE: Final = (QueueFileDamaged, QueueFileUnfinished, OSError)


class Files:
    """Reads and appends for one scheduler."""

    def __init__(
        self, spool: Spool, events: Events, moves: Moves, restore: Callable[[str], bool], *, hold: bool = False
    ) -> None:
        """``restore`` goes on with a message of active that could not be read before; False: it is in work, ask again.

        With ``hold``, recipients in doubt are kept for a human.
        """
        self._hold = hold
        self.cut = 0.0
        """Until when a power cut may have taken what was written, in seconds since the epoch; see `LifeMark`."""
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
        self._make_good(message.id, message.unwritten)
        message.unwritten.clear()
        return True

    def last_word(self, queue_id: str, events: Sequence[Event]) -> None:
        """Append what was done with a message of active; when the disk still refuses, the log has it and nobody else."""
        try:
            self._make_good(queue_id, events)
        except OSError as fault:
            self._events.warning(
                f"{queue_id}: cannot be noted in the queue file, who has the message may get it again: "
                f"{fault.strerror or fault}"
            )

    def _make_good(self, queue_id: str, events: Sequence[Event]) -> None:
        try:
            with self._spool.open(Queue.ACTIVE, queue_id) as opened:
                opened.append(*events, durable=True)
        except FileNotFoundError:
            pass  # an administrator has removed it
        except (QueueFileDamaged, QueueFileUnfinished):
            pass  # whoever reads it next finds out, and before it leaves this system somebody must

    def unchanged_since_cut(self, envelope: Envelope) -> bool:
        """Whether a message of active may have been delivered, without a trace, before a power cut."""
        if envelope.arrival > self.cut:
            return False
        try:
            # A move keeps the time; whatever is written, and each new time of an attempt, sets it.
            return self._spool.changed(Queue.ACTIVE, envelope.id) <= self.cut
        except OSError:
            return False

    def find_doubts(self, message: ActiveMessage, recipients: Collection[int], now: float, *, cut: bool = False) -> None:
        """Say, once, which of these recipients may have the message already, and hold them if that is wanted.

        With ``cut`` a power cut has taken the end of the history: those may have it for whom something is left to try.
        """
        lost = tuple(index for index in message.due() if not message.states[index].doubt) if cut else ()
        if lost:
            self._remember(message, Doubt(now, lost, CUT))
        for hold in (True, False):
            fresh = tuple(index for index in recipients if self._is_new(message.states[index], hold=hold))
            if not fresh:
                continue
            for index in fresh:
                address = message.envelope.recipients[index].address
                self._events.in_doubt(message.id, address, message.states[index].doubt, hold)
            self._remember(message, Named(now, fresh, hold))

    def _remember(self, message: ActiveMessage, event: Doubt | Named) -> None:
        message.found(event)
        try:
            self._spool.append(Queue.ACTIVE, message.id, event)
        except (QueueFileDamaged, QueueFileUnfinished):
            pass  # whoever reads it next finds out
        except OSError:
            message.unwritten.append(event)

    def _is_new(self, state: RecipientState, *, hold: bool) -> bool:
        """Whether something is to be said about a doubt: that it is held from now on, or that there is one."""
        # A second report is a smaller evil than none; and who was refused in the meantime gets nothing any more.
        holds = self._hold and state.doubt != REPORT and not state.released and not isinstance(state.outcome, Failed)
        known = state.held if holds else state.held or state.named
        return bool(state.doubt) and not state.settled and holds is hold and not known

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
