"""What a listener gives its dialogues: the spool to put mail into, and somebody to tell what happens."""

from __future__ import annotations

import time
from collections.abc import Callable

from mtad import log
from mtad.envelope import Envelope
from mtad.reply import Reply
from mtad.session.state import Session
from mtad.spool.message import IncomingFile
from mtad.spool.queues import Spool


class SpoolServices:
    """The world of the dialogues (`mtad.session.dialogue.Services`): ids, clock and spool."""

    def __init__(self, spool: Spool) -> None:
        self.enter: Callable[[Envelope], IncomingFile] = spool.enter
        self.new_queue_id = spool.ids.new
        self.now = time.time


class LogObserver:
    """What happens in dialogues, as lines of the log (`mtad.session.dialogue.Observer`)."""

    def refused(self, session: Session, command: str, answer: Reply) -> None:
        """A command was refused."""
        verb, _, argument = command.partition(" ")
        if verb == "AUTH" and session.claimed and answer.code in {421, 535}:
            log.login_failed(str(session.client), session.mechanism, answer, session.claimed)
            return
        self._reject(session, verb or "UNKNOWN", answer, argument)

    def rejected(self, session: Session, recipient: str, answer: Reply) -> None:
        """A recipient was refused."""
        self._reject(session, "RCPT", answer, recipient, recipient)

    def accepted(self, session: Session, envelope: Envelope, _size: int, message_id: str) -> None:
        """A message is ours."""
        log.accepted(envelope.id, envelope.client, envelope.login, session.mechanism, message_id)

    def discarded(self, session: Session, envelope: Envelope, _size: int, answer: Reply) -> None:
        """A message was refused at its end."""
        self._reject(session, "END-OF-MESSAGE", answer, "", queue_id=envelope.id)

    def lost(self, session: Session, where: str, why: str) -> None:
        """A session ended early."""
        log.lost(str(session.client), where, timeout=why == "timeout")

    def _reject(
        self,
        session: Session,
        command: str,
        answer: Reply,
        about: str,
        recipient: str | None = None,
        queue_id: str = "NOQUEUE",
    ) -> None:
        log.reject(
            str(session.client),
            command,
            answer,
            about=about,
            sender=str(session.transaction.sender) if session.transaction else None,
            recipient=recipient,
            protocol=session.protocol,
            helo=session.helo,
            queue_id=queue_id,
        )
