"""The scheduler's events as lines of the log."""

from __future__ import annotations

from mtad import log
from mtad.outcome import Attempt
from mtad.scheduler.active import ActiveMessage
from mtad.spool.queues import Queue


class LogEvents:
    """Satisfies `mtad.scheduler.scheduler.Events`."""

    def active(self, message: ActiveMessage) -> None:
        """A message was taken in hand."""
        log.queue_active(message.envelope, message.size)

    def removed(self, queue_id: str) -> None:
        """A message is done."""
        log.removed(queue_id)

    def deferred(self, message: ActiveMessage, attempt: Attempt) -> None:
        """Recipients were deferred without a delivery."""
        for index, outcome in attempt.outcomes:
            recipient = message.envelope.recipients[index].address
            log.delivery(message.envelope, recipient, attempt, outcome, message.claimed)

    def reported(self, message: ActiveMessage, report: str) -> None:
        """The sender, or postmaster, was told."""
        log.bounced(message.envelope.id, report, "sender" if message.envelope.sender else "postmaster")

    def in_doubt(self, queue_id: str, recipient: str, host: str) -> None:
        """A recipient may already have the message, and will get it (again)."""
        log.warning(f"in doubt: {host} may have taken this message for <{recipient}> before; delivering it again", queue_id)

    def damaged(self, queue_id: str, queue: Queue, why: str) -> None:
        """A file went to corrupt/."""
        log.warning(f"damaged: moved from {queue.value} to corrupt: {why}", queue_id)

    def held(self, queue_id: str, why: str) -> None:
        """A message waits for a human."""
        log.warning(f"placed on hold: {why}", queue_id)

    def swept(self, queue_id: str) -> None:
        """What was never finished, and never acknowledged, is gone."""
        log.info("removed: its receiver died before it was complete; it was never acknowledged", queue_id)

    def warning(self, text: str) -> None:
        """Something odd."""
        log.warning(text)
