"""The world as a dialogue sees it: what it needs (`Services`, `Entry`), and whom it tells what happened (`Observer`).

What it is for: a listener brings spool, clock and log; a test brings lists.

Errors: where it says so an `OSError` is expected and becomes a reply; everything else is a bug.
"""

from __future__ import annotations

from typing import Protocol

from mtad.envelope import Envelope
from mtad.reply import Reply
from mtad.session.state import Session


class Entry(Protocol):
    """A message on its way into the spool."""

    def write(self, data: bytes, /) -> None:
        """Append content; may raise `OSError`."""

    def commit(self) -> None:
        """Make it durable: when this returns, the message is ours. May raise `OSError`; then it is not."""

    def discard(self) -> None:
        """Forget it; also after an `OSError` of the others."""


class Services(Protocol):
    """The world, as far as a dialogue needs it. One object may serve many dialogues in many threads."""

    def new_queue_id(self) -> str:
        """A queue id that nobody else has."""

    def now(self) -> float:
        """Seconds since the epoch."""

    def enter(self, envelope: Envelope, /) -> Entry:
        """Begin a new message; may raise `OSError`."""


class Observer(Protocol):
    """Who is told what happened, for log and metrics. What is handed over holds no control characters and no secrets."""

    def refused(self, session: Session, command: str, answer: Reply, /) -> None:
        """A command got a 4yz or 5yz; "" stands for a line that was none. Of AUTH only the mechanism is told."""

    def rejected(self, session: Session, recipient: str, answer: Reply, /) -> None:
        """A recipient got a 4yz or 5yz; it is a mailbox, or the argument as it came when it was none."""

    def accepted(self, session: Session, envelope: Envelope, size: int, message_id: str, /) -> None:
        """A message is ours; ``size`` in octets as the client sent it, ``message_id`` the header field, or ""."""

    def discarded(self, session: Session, envelope: Envelope, size: int, answer: Reply, /) -> None:
        """A message was refused at its end."""

    def lost(self, session: Session, where: str, why: str, /) -> None:
        """The session ended without QUIT: after which command, and how (``lost connection``, ``timeout``)."""
