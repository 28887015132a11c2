"""Where the scheduler tells what happened; `mtad.scheduler.report` makes lines of the log of it."""

from __future__ import annotations

from typing import Protocol

from mtad.desk import OrderName
from mtad.outcome import Attempt
from mtad.progress import Reported
from mtad.scheduler.active import ActiveMessage
from mtad.spool.queues import Queue


class Events(Protocol):
    """What a scheduler says; none of it may raise."""

    def active(self, message: ActiveMessage) -> None:
        """A message was taken in hand."""

    def removed(self, queue_id: str) -> None:
        """A message is done."""

    def ordered(self, queue_id: str, what: OrderName) -> None:
        """An administrator's order was carried out."""

    def expired(self, message: ActiveMessage) -> None:
        """The life of a message is over; a report follows."""

    def deferred(self, message: ActiveMessage, attempt: Attempt) -> None:
        """Recipients were deferred without a delivery."""

    def reported(self, message: ActiveMessage, reported: Reported) -> None:
        """The sender, or postmaster, was told, or did not want to be."""

    def in_doubt(self, queue_id: str, recipient: str, host: str, held: bool) -> None:
        """A recipient may already have the message, and is kept for a human, or else will get it (again)."""

    def damaged(self, queue_id: str, queue: Queue, why: str) -> None:
        """A file went to corrupt/."""

    def held(self, queue_id: str, why: str) -> None:
        """A message waits for a human."""

    def swept(self, queue_id: str) -> None:
        """What was never finished, and never acknowledged, is gone."""

    def warning(self, text: str) -> None:
        """Something odd."""
