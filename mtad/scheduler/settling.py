"""What follows when all jobs of a message are done: it goes, waits, or its sender is told. `mtad.retry.settle` decides.

Invariants: a message leaves active/ only after everything that was done for it stands in its file. It stays in hand until
the disk lets it go, so nobody else picks it up. An order that was given meanwhile is carried out before anything else.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from mtad.config import Retry
from mtad.delivery.jobs import Result
from mtad.desk import Order
from mtad.outcome import Failed
from mtad.retry import Bounce, Done, Kept, RetryAt, settle
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.files import Files
from mtad.scheduler.hand import Hand
from mtad.scheduler.lane import LaneKey
from mtad.scheduler.leaps import Leaps
from mtad.scheduler.line import LaneJob
from mtad.scheduler.orders import Orders
from mtad.spool.queues import Queue


class Settling:
    """The last steps of the messages of one scheduler."""

    def __init__(
        self,
        retry: Retry,
        hand: Hand,
        files: Files,
        orders: Orders,
        queue: Callable[[LaneKey, LaneJob], None],
        leaps: Leaps,
    ) -> None:
        """``hand`` is the scheduler's own; ``queue`` gives a job to its lane."""
        self._retry = retry
        self._spool = hand.spool
        self._events = hand.events
        self._moves = hand.moves
        self._files = files
        self._messages = hand.messages
        self._agenda = hand.agenda
        self._orders = orders
        self._queue = queue
        self._leaps = leaps
        self._clock = hand.clock
        self.random = random.Random()
        """For the jitter of next attempts."""

    def when_complete(self, message: ActiveMessage) -> None:
        """Settle a message if nothing is under way for it any more."""
        complete = message.open_jobs == 0 or (message.order is not None and not message.flying)
        if complete and self._messages.get(message.id) is message and message.id not in self._moves:
            self.settle(message)

    def settle(self, message: ActiveMessage) -> None:
        """All jobs of a message are done: what now?"""
        envelope = self._leaps.aged(message.envelope)
        verdict = settle(envelope, message.states, self._clock(), self._retry, self.random.random())
        if message.unwritten and not isinstance(verdict, Done):
            # What a later attempt, or the report, does not find in the file would be done again, or not be told.
            self._moves.do(message.id, lambda: self._files.write_down(message), lambda _: self.when_complete(message))
            return
        if message.order and not isinstance(verdict, Done):
            self._orders.carry_out(message)
            return
        match verdict:
            case Done():
                self._leave(message, lambda: self._spool.remove(message.id), lambda _: self._events.removed(message.id))
            case RetryAt(when=when):
                self.defer(message, when)
            case Kept():
                self._hold(message, f"who is left is in doubt; to have it sent: mtaq release {message.id}")
            case Bounce():
                self._tell(message, verdict)

    def defer(self, message: ActiveMessage, when: float) -> None:
        """A message waits until ``when``, in seconds since the epoch."""

        def deferred(moved: bool) -> None:
            if moved:
                self._agenda.set(message.id, when)

        self._leave(message, lambda: self._spool.defer(message.id, when), deferred)

    def told(self, message: ActiveMessage, result: Result) -> None:
        """The job that tells the sender is done."""
        message.reporting = False
        if result.unwritten:
            message.unwritten.extend(result.reports)
        for reported in result.reports:
            message.told(reported)
            self._events.reported(message, reported)
        if result.reports:
            self.when_complete(message)
        else:
            # The report could not be stored: the message stays and says so again when it is next due.
            self.defer(message, self._clock() + self._retry.minimum)

    def _leave(self, message: ActiveMessage, move: Callable[[], bool], then: Callable[[bool], None]) -> None:
        """Do the last move of a message. It stays in hand until the disk lets it go: nobody else may pick it up."""

        def left(moved: bool) -> None:
            del self._messages[message.id]
            then(moved)
            if message.order:  # it came while the disk refused to let it go
                self._orders.give(Order(message.order, (message.id,)))

        self._moves.do(message.id, move, left)

    def _hold(self, message: ActiveMessage, why: str) -> None:
        def held(moved: bool) -> None:
            if moved:
                self._events.held(message.id, why)

        self._leave(message, lambda: self._spool.hold(Queue.ACTIVE, message.id), held)

    def _tell(self, message: ActiveMessage, verdict: Bounce) -> None:
        """Have the sender told what became of recipients; `told` goes on."""
        if any(not isinstance(message.states[index].outcome, Failed) for index, _ in verdict.failed):
            self._events.expired(message)
        if message.envelope.kind == "double-bounce":
            self._hold(message, "a notice to postmaster about an undeliverable report cannot be delivered itself")
            return
        message.reporting = True
        about = (*verdict.failed, *verdict.delivered, *verdict.delayed)
        self._queue(LaneKey("bounce", ""), LaneJob(message, tuple(index for index, _ in about)))
