"""One client's dialogue: octets in, octets out, messages into the spool.

What it is for: it drives `mtad.smtp.server` and `mtad.session.commands` and streams content into a queue entry. The world
(ids, clock, spool, log) is handed in, so that the whole receiving half runs in a test without a socket, and a listener has
nothing to do but to move octets, to shake hands and to watch deadlines.

How to use it: send `greeting`, or `spoke_early` when the client did not wait for it; for all that is received send what
`receive` returns, after ``pause`` seconds; close when `closing`. When `wants_tls` after that, shake hands, and call
`secured`; where TLS comes first, call it before the greeting. At a deadline or a stop send what `end` returns and close.
When the client is gone, or anything raised, call `lost`; it is always safe.

Invariants: ``250`` after content is returned only after `Entry.commit` returned. Replies come in the order of the commands,
and, unless the client sent ahead where it must not, are the same however the octets were cut. An entry is committed or
discarded, once, on every way out. After a refusal the content is read on to its end, and memory does not grow with it.
Nothing that came before a handshake is looked at after it.

Errors: an `OSError` of the spool is a reply, 452 4.3.1 when the disk or a quota is full and else 451 4.3.0, never a
``250``: to DATA when the entry cannot be made, else to the end of the content or of the chunk. Everything else that the
world's objects raise goes through; the listener logs it and ends the session.

Standards: RFC 5321 sections 3.3, 4.1.1.4; RFC 3030 section 2; RFC 3207 section 4; RFC 4954 section 4; RFC 6409 section 8.
"""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import Final

from mtad.address import Address
from mtad.envelope import Envelope
from mtad.errors import SyntaxFault
from mtad.reply import Reply, reply
from mtad.session import auth
from mtad.session.commands import COMMANDS, cut_off, dispatch, out_of_step, settle_account
from mtad.session.intake import Intake, storage_failure
from mtad.session.state import Client, Site, TlsFacts, open_session, secured_session
from mtad.session.submission import SubmittedHeader
from mtad.session.trace import received_field
from mtad.session.world import Observer, Services
from mtad.smtp.grammar import Command, parse_rcpt
from mtad.smtp.server import (
    ChunkEnded,
    CommandReceived,
    ContentEnded,
    ContentReceived,
    Event,
    LineRefused,
    ResponseReceived,
    ResponseRefused,
    ServerProtocol,
)
from mtad.smtp.wire import LineEnds

#: The first octet of a TLS record with a handshake in it (RFC 8446 section 5.1); no command begins so.
_HANDSHAKE: Final = b"\x16"


class Dialogue:
    """The dialogue with one client, from greeting to goodbye."""

    __slots__ = (
        "_answer",
        "_fresh",
        "_intake",
        "_observer",
        "_over",
        "_protocol",
        "_services",
        "session",
        "wants_tls",
    )

    def __init__(self, site: Site, client: Client, services: Services, observer: Observer) -> None:
        self.session = open_session(site, client)
        self.wants_tls = False
        """Whether the next octets are the client's side of a handshake."""
        self._services = services
        self._observer = observer
        self._protocol = ServerProtocol()
        self._intake: Intake | None = None
        self._answer: Reply | None = None
        self._fresh = True
        self._over = False

    @property
    def closing(self) -> bool:
        """Whether the connection is to be closed after what was returned last."""
        return self.session.closing

    @property
    def pause(self) -> float:
        """Seconds to wait before what was returned last is sent: wrong passwords are slow."""
        return self.session.pause

    @property
    def in_content(self) -> bool:
        """Whether content is being received: another deadline holds."""
        return self._protocol.in_content

    @property
    def waiting(self) -> bool:
        """Whether no transaction is under way: at a stop the session may be ended."""
        return self.session.transaction is None and not self._protocol.in_content

    def greeting(self) -> bytes:
        """What the server says first (RFC 5321 section 4.2: host name first)."""
        return reply(220, "", f"{self.session.site.hostname} ESMTP mtad").encode()

    def spoke_early(self) -> bytes:
        """What the server says first to a client that did not wait for it: goodbye, if the client is a stranger to us."""
        session = self.session
        if session.known or not session.site.strict_order:
            return self.greeting()
        answer = reply(554, "5.5.0", f"{session.site.hostname} Error: you spoke before the greeting")
        session.bad += 1
        self._observer.refused(session, "CONNECT", answer)
        self._finish()
        return answer.encode()

    def secured(self, tls: TlsFacts) -> None:
        """The handshake is done: everything begins anew (RFC 3207 section 4.2)."""
        self._drop()
        self.session = secured_session(self.session, tls)
        self._protocol = ServerProtocol()
        self._fresh = True
        self.wants_tls = False

    def receive(self, data: bytes) -> bytes:
        """Take what the client sent, cut anywhere, and return the replies to all that is complete; may be empty."""
        protocol = self._protocol
        self.session.pause = 0.0
        protocol.receive(data)
        answers: list[bytes] = []
        if self._fresh and data:
            self._fresh = False
            if data.startswith(_HANDSHAKE):
                answers.append(self._out_of_step("").encode())
        while not self.session.closing and not self.wants_tls:
            event = protocol.next_event()
            if event is None:
                break
            answer = self._handle(event)
            if answer is not None:
                answers.append(answer.encode())
        if self.session.closing:
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
        try:
            if not self._over:
                self._observer.lost(self.session, self.session.last_verb, why)
        finally:  # also when there is no memory to tell it
            self._finish()

    def _finish(self) -> None:
        self._over = True
        self.session.closing = True
        self._drop()

    def _drop(self) -> None:
        intake, self._intake = self._intake, None
        if intake is not None:
            intake.drop()

    def _handle(self, event: Event) -> Reply | None:
        match event:
            case ContentReceived(content=content):
                if self._intake is not None:
                    self._intake.write(content)
                return None
            case CommandReceived(command=command):
                return self._command(command)
            case ContentEnded(bare=bare):
                assert self._intake is not None
                return self._end_of_message(self._intake.finish(bare), "DATA")
            case ChunkEnded(last=last):
                return self._end_of_chunk(last)
            case LineRefused(why=why):
                answer = settle_account(self.session, reply(500, "5.5.2", f"Error: {why}"))
                self.session.tally("UNKNOWN", False)
                self._observer.refused(self.session, "", answer)
                return answer
            case ResponseReceived() | ResponseRefused():
                return self._response(event)

    def _command(self, command: Command) -> Reply | None:
        session = self.session
        answer = dispatch(session, command, self._protocol.ahead)
        if session.transaction is None:
            self._drop()
        if session.chunk is not None and not session.closing:
            self._begin_chunk(command, answer)
            return None
        if answer.code == 354:
            answer = self._open_intake() or answer
        if answer.code == 354:
            self._protocol.start_content()
        elif answer.code == 334:
            self._protocol.expect_response()
        else:
            session.tally(session.last_verb, answer.positive)
        if not answer.positive:
            self._report(command, answer)
        self.wants_tls = answer.code == 220
        return answer

    def _out_of_step(self, command: str) -> Reply:
        answer = cut_off(self.session)
        self._observer.refused(self.session, command, answer)
        return answer

    def _report(self, command: Command, answer: Reply) -> None:
        session = self.session
        row = COMMANDS.get(command.verb)
        if row is None and session.mechanism:
            # After AUTH a line that is no command may well be the password that somebody still owes us.
            self._observer.refused(session, "UNKNOWN", answer)
            return
        if row is not None and row.secret:
            self._observer.refused(session, f"{command.verb} {session.mechanism}".rstrip(), answer)
            return
        if command.verb != "RCPT" or session.transaction is None:
            self._observer.refused(session, f"{command.verb} {command.argument}".rstrip(), answer)
            return
        try:
            recipient = str(parse_rcpt(command.argument).address)
        except SyntaxFault:
            recipient = command.argument
        self._observer.rejected(session, recipient, answer)

    # -- AUTH ---------------------------------------------------------------------------------------------------------

    def _response(self, event: ResponseReceived | ResponseRefused) -> Reply:
        session = self.session
        if isinstance(event, ResponseRefused):  # what is ahead may be the rest of that line
            answer = auth.refuse(session, event.fault)
        elif self._protocol.ahead and out_of_step(session):
            session.exchange = None
            return self._out_of_step(f"AUTH {session.mechanism}")
        else:
            answer = auth.respond(session, event.line)
        if answer.code == 334:
            self._protocol.expect_response()
            return answer
        answer = settle_account(session, answer)
        session.tally("AUTH", answer.positive)
        if not answer.positive:
            self._observer.refused(session, f"AUTH {session.mechanism}", answer)
        return answer

    # -- content ------------------------------------------------------------------------------------------------------

    def _open_intake(self) -> Reply | None:
        """Open the queue entry; a spool that cannot take the message says so before it comes."""
        session, services = self.session, self._services
        transaction = session.transaction
        assert transaction is not None
        envelope = Envelope(
            id=services.new_queue_id(),
            arrival=services.now(),
            sender=str(transaction.sender),
            recipients=tuple(transaction.recipients.values()),
            client=str(session.client),
            helo=session.helo,
            protocol=session.protocol,
            login=session.login,
            body=transaction.body,
            smtputf8=transaction.smtputf8,
            ret=transaction.ret,
            envid=transaction.envid,
        )
        try:
            entry = services.enter(envelope)
        except OSError as error:
            return storage_failure(error)
        mends = session.known and session.site.bare_line_ends == "normalize"
        watched = transaction.body != "binarymime" and (transaction.chunks or mends)
        intake = Intake(
            envelope,
            entry,
            session.site.limits.message_size,
            ends=LineEnds(mend=mends) if watched else None,
            mends=mends,
            submitted=self._submitted(envelope) if session.login else None,
        )
        try:
            intake.trace(received_field(session, envelope))
        except OSError as error:
            intake.drop()
            return storage_failure(error)
        self._intake = intake
        return None

    def _submitted(self, envelope: Envelope) -> SubmittedHeader:
        site, login = self.session.site, self.session.login

        def owns(address: Address) -> bool:
            return site.policy.owns(login, address)

        if site.policy.service != "submission":
            return SubmittedHeader(owns)
        when = time.strftime("%Y%m%d%H%M%S", time.gmtime(envelope.arrival))
        date = formatdate(int(envelope.arrival), localtime=True)
        return SubmittedHeader(owns, date, f"<{when}.{envelope.id}@{site.hostname}>")

    def _begin_chunk(self, command: Command, answer: Reply) -> None:
        """What follows BDAT is read whatever became of it; the reply comes after it (RFC 3030 section 2)."""
        session = self.session
        chunk, transaction = session.chunk, session.transaction
        assert chunk is not None
        if not answer.positive:
            self._report(command, answer)
        elif transaction is not None and self._intake is None and transaction.failure is None:
            transaction.failure = self._open_intake()
            if transaction.failure is not None:
                self._report(command, transaction.failure)
        self._answer = answer
        self._protocol.start_chunk(chunk.octets, chunk.last)

    def _end_of_chunk(self, last: bool) -> Reply:
        session, intake, answer = self.session, self._intake, self._answer
        transaction, chunk = session.transaction, session.chunk
        assert answer is not None
        assert chunk is not None
        if not answer.positive or transaction is None:  # refused before it came, and counted then
            session.tally("BDAT", False)
            return answer
        if intake is not None and transaction.failure is None:
            if last:
                return self._end_of_message(intake.finish(), "BDAT")
            transaction.failure = intake.refusal
        if transaction.failure is None:
            answer = reply(250, "2.0.0", f"Ok: {chunk.octets} octets received")
            answer = settle_account(session, answer, junk=not chunk.octets)
        else:
            answer = settle_account(session, transaction.failure)
            if intake is not None:
                self._observer.discarded(session, intake.envelope, intake.size, answer)
                self._drop()
            if last:
                session.transaction = None
        session.tally("BDAT", answer.positive)
        return answer

    def _end_of_message(self, refusal: Reply | None, verb: str) -> Reply:
        """All content is here, and ``refusal`` is what became of it."""
        session, intake = self.session, self._intake
        assert intake is not None
        self._intake = None
        if refusal is not None:
            intake.drop()
            answer = settle_account(session, refusal)
            self._observer.discarded(session, intake.envelope, intake.size, answer)
        else:
            answer = reply(250, "2.0.0", f"Ok: queued as {intake.envelope.id}")
            session.junk = 0
            session.bad_in_a_row = 0
            self._observer.accepted(session, intake.envelope, intake.size, intake.message_id)
        session.tally(verb, answer.positive)
        session.transaction = None
        return answer
