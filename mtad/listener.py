"""The listener process: accepts connections from the inherited sockets and gives each a thread.

A thread moves octets between its connection and a `Dialogue` and watches deadlines: one for each command, and one for the
whole of a message's content. A client that sends a byte a minute does not move either. What the dialogue does not decide is
decided here: how many connections there may be, of the whole server and of one client (421 4.7.0), counted over all
listeners in `Occupancy`.

SIGTERM, or the master's death: no new connections; a session that has no transaction under way gets 421 4.3.2, the others
finish theirs first, up to ``processes.stop_timeout``.

Errors: when the process or the machine runs out of descriptors, accepting pauses for a moment instead of spinning. An
exception in a session is a bug; it is logged as panic and ends that session only.
"""

from __future__ import annotations

import _thread
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Final

from setproctitle import setproctitle

from mtad import log
from mtad.config import Limits
from mtad.envelope import Envelope
from mtad.errors import MtadError
from mtad.net.connection import Connection, ConnectionLost, TimedOut
from mtad.net.listening import ListeningSocket
from mtad.occupancy import Occupancy
from mtad.policy import Policy
from mtad.reply import Reply, reply
from mtad.runtime import Runtime
from mtad.session.dialogue import Dialogue
from mtad.session.state import Client, Session, Site
from mtad.signals import Signals
from mtad.spool.message import IncomingFile
from mtad.spool.queues import Spool

#: Connections taken from one socket before the others are looked at.
_BATCH: Final = 64
#: Seconds without accepting after the process has run out of descriptors or memory.
_OUT_OF_RESOURCES: Final = 0.1
#: Stacks of session threads. Address space only; what is used of it is some 20 KiB.
_STACK: Final = 256 * 1024
#: Seconds for a last word to a client that may not listen.
_LAST_WORD: Final = 5.0

#: Whom a relay trusts that names nobody: it may be bound to loopback only.
LOOPBACK: Final = ("127.0.0.0/8", "::1/128")

_TOO_MANY: Final = reply(421, "4.7.0", "Error: too many connections, try again later")
_TOO_MANY_OF_YOU: Final = reply(421, "4.7.0", "Error: too many connections from you, try again later")
_TIMEOUT: Final = reply(421, "4.4.2", "Error: timeout exceeded")
_STOPPING: Final = reply(421, "4.3.2", "Service shutting down, try again later")
_BUG: Final = reply(421, "4.3.0", "Error: internal error, try again later")


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
        self._reject(session, verb or "UNKNOWN", answer, argument)

    def rejected(self, session: Session, recipient: str, answer: Reply) -> None:
        """A recipient was refused."""
        self._reject(session, "RCPT", answer, recipient, recipient)

    def accepted(self, _session: Session, envelope: Envelope, _size: int, message_id: str) -> None:
        """A message is ours."""
        log.client(envelope.id, envelope.client)
        log.message_id(envelope.id, message_id)

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


class Visit:
    """One connection and its dialogue, as the main thread sees it."""

    __slots__ = ("connection", "dialogue")

    def __init__(self, connection: Connection, dialogue: Dialogue) -> None:
        self.connection = connection
        self.dialogue = dialogue


class ListenerProcess:
    """One listener process from start to end."""

    def __init__(self, runtime: Runtime, row: int, spool: Spool, signals: Signals) -> None:
        """``row`` is this process's in the occupancy table."""
        config = runtime.config
        self._runtime = runtime
        self._limits: Limits = config.limits
        self._occupancy: Occupancy = runtime.occupancy
        self._row = row
        self._signals = signals
        self._services = SpoolServices(spool)
        self._observer = LogObserver()
        self._sockets: dict[int, tuple[ListeningSocket, Site]] = {}
        sites = [
            Site(
                config.hostname,
                config.limits,
                Policy(runtime.users, config.local.domains, listener.service, listener.trusted or LOOPBACK),
            )
            for listener in config.listener
        ]
        for index, socket in runtime.sockets:
            self._sockets[socket.fileno()] = (socket, sites[index])
        self._lock = threading.Lock()
        self._visits: set[Visit] = set()
        self._draining = False

    def run(self) -> None:
        """Accept until told to end, then let sessions finish."""
        poll = select.poll()
        for fd in self._sockets:
            poll.register(fd, select.POLLIN)
        poll.register(self._signals.fileno(), select.POLLIN)
        poll.register(self._runtime.lifeline.fileno(), select.POLLIN)
        while not self._draining:
            for fd, _ in poll.poll():
                if fd in self._sockets:
                    self._accept(*self._sockets[fd])
                elif fd == self._runtime.lifeline.fileno() or signal.SIGTERM in self._signals.take():
                    self._draining = True
        self._drain()

    def _accept(self, socket: ListeningSocket, site: Site) -> None:
        for _ in range(_BATCH):
            try:
                accepted = socket.accept()
                if accepted is None:
                    return
                connection = Connection(*accepted)
                self._admit(connection, site)
            except (OSError, RuntimeError) as fault:
                # No descriptor, no memory, no thread: connections wait in the kernel until there is.
                log.warning(f"cannot take a connection on {socket.address}, pausing: {fault}")
                time.sleep(_OUT_OF_RESOURCES)
                return

    def _admit(self, connection: Connection, site: Site) -> None:
        slot = self._occupancy.slot(connection.address)
        with self._lock:
            self._occupancy.add(self._row, slot)
        refusal: Reply | None = None
        if self._occupancy.total() > self._limits.connections:
            refusal = _TOO_MANY
        elif self._occupancy.of_client(slot) > self._limits.connections_per_client:
            refusal = _TOO_MANY_OF_YOU
        try:
            if refusal is None:
                _thread.start_new_thread(self._serve, (connection, site, slot))
                return
            log.reject(f"unknown[{connection.address}]", "CONNECT", refusal)
            connection.send(refusal.encode(), 0.01)  # its buffer is empty: this does not wait
        except MtadError:
            pass  # gone already
        except RuntimeError:
            self._leave(connection, slot)
            raise
        self._leave(connection, slot)

    def _leave(self, connection: Connection, slot: int) -> None:
        connection.close()
        with self._lock:
            self._occupancy.subtract(self._row, slot)

    # -- in the session's thread --------------------------------------------------------------------------------------

    def _serve(self, connection: Connection, site: Site, slot: int) -> None:
        client = Client(connection.address)
        visit = Visit(connection, Dialogue(site, client, self._services, self._observer))
        with self._lock:
            self._visits.add(visit)
        try:
            log.connect(str(client))
            self._converse(visit)
        except MtadError:
            visit.dialogue.lost()
        except Exception as bug:
            log.panic(f"session with {client} ended", bug)
            self._last_word(visit, _BUG, "internal error")
        finally:
            with self._lock:
                self._visits.discard(visit)
            self._leave(connection, slot)
            log.disconnect(str(client), {})

    def _converse(self, visit: Visit) -> None:
        """The dialogue, until it is over.

        Raises:
            ConnectionLost, TimedOut: the client is gone, or does not take our replies.
        """
        connection, dialogue = visit.connection, visit.dialogue
        reply_timeout = self._limits.command_timeout
        connection.send(dialogue.greeting(), reply_timeout)
        in_content = False
        timeout: float = self._limits.command_timeout
        deadline = time.monotonic() + timeout
        while not dialogue.closing:
            if self._draining and dialogue.waiting:
                self._last_word(visit, _STOPPING, "shutdown")
                return
            try:
                data = connection.receive(timeout)
            except TimedOut:
                self._last_word(visit, _TIMEOUT, "timeout")
                return
            if not data:
                if self._draining:
                    self._last_word(visit, _STOPPING, "shutdown")
                else:
                    dialogue.lost()
                return
            answer = dialogue.receive(data)
            if answer:
                connection.send(answer, reply_timeout)
            if answer or dialogue.in_content is not in_content:
                in_content = dialogue.in_content
                timeout = self._limits.data_timeout if in_content else self._limits.command_timeout
                deadline = time.monotonic() + timeout
            else:
                timeout = max(0.001, deadline - time.monotonic())

    def _last_word(self, visit: Visit, answer: Reply, why: str) -> None:
        try:
            visit.connection.send(visit.dialogue.end(answer, why), _LAST_WORD)
        except (ConnectionLost, TimedOut):
            pass  # it was said into the void

    # -- the end ------------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        for socket, _ in self._sockets.values():
            socket.close()
        deadline = time.monotonic() + self._runtime.config.processes.stop_timeout
        self._end_sessions(lambda visit: visit.dialogue.waiting)
        while self._visits and time.monotonic() < deadline:
            time.sleep(0.02)
        if self._visits:
            log.warning(f"{len(self._visits)} sessions did not finish in time and are ended")
            self._end_sessions(lambda _: True)
            deadline = time.monotonic() + 1.0
            while self._visits and time.monotonic() < deadline:
                time.sleep(0.02)

    def _end_sessions(self, which: Callable[[Visit], bool]) -> None:
        with self._lock:
            visits = list(self._visits)
        for visit in visits:
            if which(visit):
                visit.connection.stop_reading()


def run_listener(runtime: Runtime, row: int, spool: Spool, signals: Signals) -> None:
    """What a listener process does, from its fork to its end."""
    setproctitle("mtad: listener")
    log.become("smtpd")
    threading.stack_size(_STACK)
    ListenerProcess(runtime, row, spool, signals).run()
