"""The scheduler's events as lines of the log."""

from __future__ import annotations

from typing import Final

from mtad import log
from mtad.desk import OrderName
from mtad.outcome import Attempt
from mtad.progress import CUT, REPORT, Reported
from mtad.scheduler.active import ActiveMessage
from mtad.spool.queues import Queue

#: Orders as Postfix's postsuper logs them.
_ORDERS: Final[dict[OrderName, str]] = {
    "hold": "placed on hold",
    "release": "released from hold",
    "delete": "deleted",
    "requeue": "requeued",
    "expire": "expired",
    "bounce": "returned to its sender",
}


class LogEvents:
    """Satisfies `mtad.scheduler.events.Events`."""

    def active(self, message: ActiveMessage) -> None:
        """A message was taken in hand."""
        log.queue_active(message.envelope, message.size)

    def removed(self, queue_id: str) -> None:
        """A message is done."""
        log.removed(queue_id)

    def ordered(self, queue_id: str, what: OrderName) -> None:
        """An administrator's order was carried out."""
        log.info(f"{_ORDERS[what]} by order of an administrator", queue_id)

    def expired(self, message: ActiveMessage) -> None:
        """The life of a message is over; a report follows."""
        log.expired(message.id, message.envelope.sender)

    def deferred(self, message: ActiveMessage, attempt: Attempt) -> None:
        """Recipients were deferred without a delivery."""
        for index, outcome in attempt.outcomes:
            recipient = message.envelope.recipients[index].address
            log.delivery(message.envelope, recipient, attempt, outcome, message.claimed)

    def reported(self, message: ActiveMessage, reported: Reported) -> None:
        """The sender, or postmaster, was told."""
        if reported.report:
            log.notified(message.id, reported.report, "sender" if message.envelope.sender else "postmaster", reported.kind)
        else:
            log.info("no notification: the sender did not want one", message.id)

    def in_doubt(self, queue_id: str, recipient: str, host: str, held: bool) -> None:
        """A recipient may already have the message, and is kept for a human, or else will get it (again)."""
        if host == REPORT:
            log.warning(f"in doubt: its sender may have been told about <{recipient}> before; telling again", queue_id)
            return
        then = f"held until you say: mtaq release {queue_id}" if held else "delivering it again"
        who = "the machine stopped, and somebody" if host == CUT else host
        log.warning(f"in doubt: {who} may have taken this message for <{recipient}> before; {then}", queue_id)

    def damaged(self, queue_id: str, queue: Queue, why: str) -> None:
        """A file went to corrupt/."""
        log.warning(_writable(f"damaged: moved from {queue.value} to corrupt: {why}"), _writable(queue_id))

    def held(self, queue_id: str, why: str) -> None:
        """A message waits for a human."""
        log.warning(f"placed on hold: {why}", queue_id)

    def swept(self, queue_id: str) -> None:
        """What was never finished, and never acknowledged, is gone."""
        log.info("removed: its receiver died before it was complete; it was never acknowledged", queue_id)

    def warning(self, text: str) -> None:
        """Something odd."""
        log.warning(_writable(text))


def _writable(text: str) -> str:
    """A text with file names in it, as a log can have it: they may be control characters, and octets that are no UTF-8."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
