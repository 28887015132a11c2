"""One client's dialogue: octets in, octets out, messages into the spool.

What it is for: it drives `mtad.smtp.server` and `mtad.session.commands` and streams content into a queue entry. The world
(ids, clock, spool, log) is handed in, so that the whole receiving half runs in a test without a socket, and a listener has
nothing to do but to move octets and to watch deadlines.

How to use it: send `greeting`; for all that is received send what `receive` returns; close when `closing`. At a deadline or
a stop send what `end` returns and close. When the client is gone, or anything raised, call `lost`; it is always safe.

Invariants: ``250`` after content is returned only after `Entry.commit` returned. Replies come in the order of the commands,
and are the same however the octets were cut. An entry is committed or discarded, once, on every way out. After a refusal
the content is read on to its end, and memory does not grow with it.

Errors: an `OSError` of the spool is a reply, 452 4.3.1 when the disk or a quota is full and else 451 4.3.0, never a
``250``: to DATA when the entry cannot be made, else to the end of the content. Everything else that the world's objects
raise goes through; the listener logs it and ends the session.

Standards: RFC 5321 sections 3.3, 4.1.1.4, 4.2.5, 6.1 (responsibility), 6.3 (loops).
"""

from __future__ import annotations

import errno
from typing import Final, Protocol

from mtad.envelope import Envelope, Recipient
from mtad.errors import SyntaxFault
from mtad.reply import Reply, reply
from mtad.session.commands import TOO_BIG, dispatch, settle_account
from mtad.session.state import Client, Session, Site, open_session
from mtad.session.trace import received_field
from mtad.smtp.grammar import Command, parse_rcpt
from mtad.smtp.server import CommandReceived, ContentEnded, ContentReceived, Event, LineRefused, ServerProtocol
from mtad.smtp.wire import HeaderScanner

#: Received: fields above which a message is taken to be in a loop. RFC 5321 section 6.3 says "normally at least 100"; this
#: is Postfix's hopcount_limit, which mail has lived with for decades.
HOP_LIMIT: Final = 50

_LOOP: Final = reply(554, "5.4.6", "Error: too many hops")
_BARE: Final = reply(550, "5.5.2", "Error: bare CR or LF in message")
_TROUBLE: Final = reply(451, "4.3.0", "Error: queue file write error")
_FULL: Final = reply(452, "4.3.1", "Error: insufficient system storage")


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
    """Who is told what happened, for log and metrics. What is handed over holds no control characters."""

    def refused(self, session: Session, command: str, answer: Reply, /) -> None:
        """A command got a 4yz or 5yz; "" stands for a line that was none."""

    def rejected(self, session: Session, recipient: str, answer: Reply, /) -> None:
        """A recipient got a 4yz or 5yz; it is a mailbox, or the argument as it came when it was none."""

    def accepted(self, session: Session, envelope: Envelope, size: int, message_id: str, /) -> None:
        """A message is ours; ``size`` in octets as the client sent it, ``message_id`` the header field, or ""."""

    def discarded(self, session: Session, envelope: Envelope, size: int, answer: Reply, /) -> None:
        """A message was refused at its end."""

    def lost(self, session: Session, where: str, why: str, /) -> None:
        """The session ended without QUIT: after which command, and how (``lost connection``, ``timeout``)."""


class _Intake:
    """The content of one message while it streams in. Knows nothing of framing: BDAT would use it as DATA does."""

    __slots__ = ("_entry", "_failure", "_header", "_limit", "envelope", "size")

    def __init__(self, envelope: Envelope, entry: Entry, limit: int) -> None:
        self.envelope = envelope
        self.size = 0
        self._entry: Entry | None = entry
        self._limit = limit
        self._header = HeaderScanner()
        self._failure: Reply | None = None

    @property
    def message_id(self) -> str:
        text = self._header.message_id.decode("ascii", "replace")
        return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)

    def write(self, content: bytes) -> None:
        self.size += len(content)
        self._header.feed(content)
        if self._entry is None:
            return
        if self.size > self._limit or self._header.received > HOP_LIMIT:
            self.drop()
            return
        try:
            self._entry.write(content)
        except OSError as error:
            self._failure = storage_failure(error)
            self.drop()

    def finish(self, bare: bool) -> Reply | None:
        """Make the message durable; returns why not, or None when it is ours.

        The reasons stand in an order of their own, not in that of their discovery, which hangs on how octets were cut.
        """
        refusal = self._failure
        if self.size > self._limit:
            refusal = TOO_BIG
        elif self._header.received > HOP_LIMIT:
            refusal = _LOOP
        elif bare:
            refusal = _BARE
        if refusal is None and self._entry is not None:
            try:
                self._entry.commit()
            except OSError as error:
                refusal = storage_failure(error)
            else:
                self._entry = None
                return None
        self.drop()
        return refusal

    def drop(self) -> None:
        """Discard the entry, unless it is committed or gone already."""
        entry, self._entry = self._entry, None
        if entry is not None:
            try:
                entry.discard()
            except OSError:
                pass  # what stays behind was never committed and is swept at the next start


def storage_failure(error: OSError) -> Reply:
    """What the client is told when the spool failed: 452 4.3.1 for want of space, else 451 4.3.0."""
    return _FULL if error.errno in {errno.ENOSPC, errno.EDQUOT} else _TROUBLE


class Dialogue:
    """The dialogue with one client, from greeting to goodbye."""

    __slots__ = ("_intake", "_observer", "_over", "_protocol", "_services", "session")

    def __init__(self, site: Site, client: Client, services: Services, observer: Observer) -> None:
        self.session = open_session(site, client)
        self._services = services
        self._observer = observer
        self._protocol = ServerProtocol()
        self._intake: _Intake | None = None
        self._over = False

    @property
    def closing(self) -> bool:
        """Whether the connection is to be closed after what was returned last."""
        return self.session.closing

    @property
    def in_content(self) -> bool:
        """Whether content is being received: another deadline holds."""
        return self._intake is not None

    @property
    def waiting(self) -> bool:
        """Whether no transaction is under way: at a stop the session may be ended."""
        return self.session.transaction is None and self._intake is None

    def greeting(self) -> bytes:
        """What the server says first (RFC 5321 section 4.2: host name first)."""
        return reply(220, "", f"{self.session.site.hostname} ESMTP mtad").encode()

    def receive(self, data: bytes) -> bytes:
        """Take what the client sent, cut anywhere, and return the replies to all that is complete; may be empty."""
        protocol, session = self._protocol, self.session
        protocol.receive(data)
        answers: list[bytes] = []
        while not session.closing:
            event = protocol.next_event()
            if event is None:
                break
            answer = self._handle(event)
            if answer is not None:
                answers.append(answer.encode())
        if session.closing:
            self._finish()
        return b"".join(answers)

    def end(self, answer: Reply, why: str = "timeout") -> bytes:
        """End the session from our side: the octets to send before the connection is closed.

        Args:
            answer: usually a 421.
            why: for the log, such as ``timeout``.
        """
        self.lost(why)
        return answer.encode()

    def lost(self, why: str = "lost connection") -> None:
        """The client is gone, or must go: give up what was under way. Does nothing after a session has ended."""
        if not self._over:
            self._observer.lost(self.session, self.session.last_verb, why)
        self._finish()

    def _finish(self) -> None:
        self._over = True
        self.session.closing = True
        intake, self._intake = self._intake, None
        if intake is not None:
            intake.drop()

    def _handle(self, event: Event) -> Reply | None:
        if isinstance(event, CommandReceived):
            return self._command(event.command)
        if isinstance(event, LineRefused):
            answer = settle_account(self.session, reply(500, "5.5.2", f"Error: {event.why}"))
            self._observer.refused(self.session, "", answer)
            return answer
        assert self._intake is not None
        if isinstance(event, ContentReceived):
            self._intake.write(event.content)
            return None
        return self._end_of_content(self._intake, event)

    def _command(self, command: Command) -> Reply:
        answer = dispatch(self.session, command)
        if answer.code == 354:
            answer = self._begin_content() or answer
        if not answer.positive:
            self._report(command, answer)
        return answer

    def _report(self, command: Command, answer: Reply) -> None:
        if command.verb != "RCPT" or self.session.transaction is None:
            self._observer.refused(self.session, f"{command.verb} {command.argument}".rstrip(), answer)
            return
        try:
            recipient = str(parse_rcpt(command.argument).address)
        except SyntaxFault:
            recipient = command.argument
        self._observer.rejected(self.session, recipient, answer)

    def _begin_content(self) -> Reply | None:
        """Open the queue entry; a spool that cannot take the message says so before it comes."""
        session, services = self.session, self._services
        transaction = session.transaction
        assert transaction is not None
        envelope = Envelope(
            id=services.new_queue_id(),
            arrival=services.now(),
            sender=str(transaction.sender),
            recipients=tuple(Recipient(address) for address in transaction.recipients.values()),
            client=str(session.client),
            helo=session.helo,
            protocol=session.protocol,
        )
        try:
            entry = services.enter(envelope)
        except OSError as error:
            return storage_failure(error)
        intake = _Intake(envelope, entry, session.site.limits.message_size)
        try:
            entry.write(received_field(session, envelope))
        except OSError as error:
            intake.drop()
            return storage_failure(error)
        self._intake = intake
        self._protocol.start_content()
        return None

    def _end_of_content(self, intake: _Intake, event: ContentEnded) -> Reply:
        session = self.session
        refusal = intake.finish(event.bare)
        self._intake = None
        if refusal is not None:
            answer = settle_account(session, refusal)
            self._observer.discarded(session, intake.envelope, intake.size, answer)
        else:
            answer = reply(250, "2.0.0", f"Ok: queued as {intake.envelope.id}")
            session.junk = 0
            session.bad_in_a_row = 0
            self._observer.accepted(session, intake.envelope, intake.size, intake.message_id)
        session.transaction = None
        return answer
