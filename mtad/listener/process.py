"""The listener process: accepts connections from the inherited sockets and gives each a thread.

What a dialogue does not decide is decided here: how many connections there may be, of the whole server and of one client
(421 4.7.0), counted over all listeners in `Occupancy`. What happens in a connection's thread is `mtad.listener.visit`'s.

Under stress (`mtad.listener.deadlines`) all sessions have short deadlines and less patience is had with refused commands.
Sessions that have been silent for too long are looked for once a second then.

SIGTERM, or the master's death: no new connections; a session that has no transaction under way gets 421 4.3.2, the others
finish theirs first, up to ``processes.stop_timeout``.

Errors: when there is room for no further session (`mtad.listener.room`), or no thread for it, it gets 421 4.3.2, and those
that there are go on. When not even a connection can be taken to be told so, accepting pauses for a moment instead of
spinning. An exception in a session is a bug; it is logged as panic and ends that session only.
"""

from __future__ import annotations

import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec
from setproctitle import setproctitle

from mtad import log
from mtad.config import Limits
from mtad.errors import MtadError
from mtad.host import stay_on_processor, words
from mtad.listener.deadlines import Stress
from mtad.listener.observer import LogObserver, SpoolServices
from mtad.listener.room import Reserve, Room
from mtad.listener.threads import SessionThreads
from mtad.listener.visit import Conversation, Visit
from mtad.net.connection import Connection
from mtad.net.listening import ListeningSocket
from mtad.occupancy import Occupancy
from mtad.reply import Reply, reply
from mtad.runtime import Runtime
from mtad.session.dialogue import Dialogue
from mtad.session.site import site_of
from mtad.session.state import Client, Site
from mtad.signals import Signals
from mtad.spool.queues import Spool
from mtad.tls.connection import TlsConnection

#: Connections taken from one socket before the others are looked at.
_BATCH: Final = 64
#: Seconds without accepting after the process has run out of descriptors or memory.
_OUT_OF_RESOURCES: Final = 0.1
#: Seconds between two complaints about that.
_COMPLAIN_AGAIN: Final = 30.0
#: Stacks of session threads. Address space only; what is used of it is some 20 KiB.
_STACK: Final = 256 * 1024

#: Seconds between two looks at how full the server is, as long as there are sessions.
_LOOK: Final = 1.0

_NO_ROOM: Final = reply(421, "4.3.2", "Error: server is too busy, try again later")


class Service(msgspec.Struct, frozen=True):
    """One socket, and what its clients find there."""

    socket: ListeningSocket
    site: Site
    patience: float | None
    """Seconds for which the greeting is held back to see whether the client waits for it; None: it need not."""


class ListenerProcess:
    """One listener process from start to end."""

    def __init__(self, runtime: Runtime, row: int, spool: Spool, signals: Signals) -> None:
        """``row`` is this process's in the occupancy table."""
        config = runtime.config
        self._runtime = runtime
        self._limits: Limits = config.limits
        self._occupancy: Occupancy = runtime.occupancy
        self._row = row
        self._reserve = Reserve()
        self._room = Room()
        self._stress = Stress(config.limits)
        self._signals = signals
        self._services = SpoolServices(spool)
        self._observer = LogObserver()
        self._services_of: dict[int, Service] = {}
        sites = [
            site_of(config, listener, runtime.users, runtime.passwords, runtime.throttle, lambda: self._stress.on)
            for listener in config.listener
        ]
        for index, socket in runtime.sockets:
            listener = config.listener[index]
            # Where TLS comes first it is the client's turn; what it says too early is no use to it.
            watched = listener.service == "mx" and listener.tls != "implicit"
            patience = float(config.limits.greeting_delay) if watched else None
            self._services_of[socket.fileno()] = Service(socket, sites[index], patience)
        self._lock = threading.Lock()
        self._visits: set[Visit] = set()
        self._draining = False
        self._conversation = Conversation(self._stress, runtime.tls, lambda: self._draining)
        self._threads = SessionThreads(self._serve)
        self._complaint_due = 0.0
        self._look_due = 0.0
        self._too_many = reply(421, "4.7.0", f"{config.hostname} Error: too many connections")

    def run(self) -> None:
        """Accept until told to end, then let sessions finish."""
        poll = select.poll()
        for fd in self._services_of:
            poll.register(fd, select.POLLIN)
        poll.register(self._signals.fileno(), select.POLLIN)
        poll.register(self._runtime.lifeline.fileno(), select.POLLIN)
        while not self._draining:
            try:
                self._turn(poll)
            except MemoryError:  # those who are there are served all the same
                time.sleep(_OUT_OF_RESOURCES)
        self._drain()

    def _turn(self, poll: select.poll) -> None:
        """Wait for something to happen, and deal with it."""
        for fd, _ in poll.poll(_LOOK * 1000 if self._visits else None):
            if fd in self._services_of:
                self._accept(self._services_of[fd])
            elif fd == self._runtime.lifeline.fileno() or signal.SIGTERM in self._signals.take():
                self._draining = True
        if time.monotonic() >= self._look_due:
            self._look()

    def _accept(self, service: Service) -> None:
        for _ in range(_BATCH):
            try:
                if not self._take(service):
                    return
            except (OSError, MemoryError) as fault:
                # No descriptor, no memory: connections wait in the kernel until there is.
                self._complain(f"connections on {service.socket.bound} have to wait: {words(fault)}")
                time.sleep(_OUT_OF_RESOURCES)
                return

    def _take(self, service: Service) -> bool:
        """Take a connection, and when there is a descriptor for no other send it away; False when nobody waits.

        Raises:
            OSError, MemoryError: none can be taken, not even in place of the reserve.
        """
        short = False
        try:
            accepted = service.socket.accept()
        except OSError:
            if not self._reserve.give_up():
                self._reserve.restore()
                raise
            try:
                accepted = service.socket.accept()
            finally:
                short = not self._reserve.restore()
        if accepted is None:
            return False
        connection = Connection(*accepted)
        if not short:
            self._admit(connection, service)
            return True
        self._complain("new sessions are refused: no descriptor left")
        log.reject(str(Client(connection.address)), "CONNECT", _NO_ROOM)
        self._turn_away(connection, _NO_ROOM)
        connection.close()
        self._reserve.restore()
        return True

    def _complain(self, text: str) -> None:
        now = time.monotonic()
        if now >= self._complaint_due:
            self._complaint_due = now + _COMPLAIN_AGAIN
            log.warning(text)

    def _admit(self, connection: Connection, service: Service) -> None:
        slot = self._occupancy.slot(connection.address)
        with self._lock:
            self._occupancy.add(self._row, slot)
        try:
            self._let_in(connection, service, slot)
        except BaseException:  # no memory for one more: it must not count as one for ever
            self._leave(connection, slot)
            raise

    def _let_in(self, connection: Connection, service: Service, slot: int) -> None:
        """A session begins in a thread, or is refused; it is counted already."""
        refusal: Reply | None = None
        total = self._occupancy.total()
        if self._stress.note(total):
            self._tell_stress(total)
        if total > self._limits.connections:
            refusal = self._too_many
        elif self._occupancy.of_client(slot) > self._limits.connections_per_client:
            refusal = reply(421, "4.7.0", f"{self._too_many.lines[0]} from {connection.address}")
        elif lack := self._room.lack(len(self._visits), time.monotonic(), inherits=self._threads.idle):
            self._complain(f"new sessions are refused: {lack}")
            refusal = _NO_ROOM
        client = Client(connection.address)
        if refusal is not None:
            log.reject(str(client), "CONNECT", refusal)
            self._turn_away(connection, refusal)
            self._leave(connection, slot)
            return
        dialogue = Dialogue(service.site, client, self._services, self._observer)
        visit = Visit(connection, dialogue, service.patience, slot)
        with self._lock:
            self._visits.add(visit)
        try:
            self._threads.start(visit)
        except (RuntimeError, MemoryError) as fault:
            self._complain(f"new sessions are refused: {words(fault) or 'out of memory'}")
            log.reject(str(client), "CONNECT", _NO_ROOM)
            self._turn_away(connection, _NO_ROOM)
            self._leave(connection, slot, visit)

    def _turn_away(self, connection: Connection, refusal: Reply) -> None:
        try:
            connection.send(refusal.encode(), 0.01)  # its buffer is empty: this does not wait
        except MtadError:
            pass  # gone already

    def _leave(self, connection: Connection | TlsConnection, slot: int, visit: Visit | None = None) -> None:
        try:
            connection.close()
        finally:
            with self._lock:
                self._occupancy.subtract(self._row, slot)
                if visit is not None:
                    self._visits.discard(visit)

    def _serve(self, visit: Visit) -> None:
        """In the session's thread."""
        try:
            self._conversation.hold(visit)
        finally:
            self._leave(visit.connection, visit.slot, visit)

    # -- stress -------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """See how full the server is, and under stress end the sessions that have been silent for too long."""
        now = time.monotonic()
        self._look_due = now + _LOOK
        total = self._occupancy.total()
        if self._stress.note(total):
            self._tell_stress(total)
        if not self._stress.on:
            return
        latest = now - self._stress.allowance.command
        with self._lock:
            visits = list(self._visits)
        for visit in visits:
            if visit.waits_since < latest:
                visit.cut = True
                visit.connection.stop_reading()
            elif visit.hangs_since < latest:
                visit.connection.shutdown()

    def _tell_stress(self, total: int) -> None:
        of_all = f"{total} of {self._limits.connections} connections are in use"
        if self._stress.on:
            log.warning(f"{of_all}: deadlines are short, until there are fewer")
        else:
            log.info(f"{of_all}: deadlines are as they were")

    # -- the end ------------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        for service in self._services_of.values():
            service.socket.close()
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


def _ignored(what: sys.UnraisableHookArgs) -> None:
    """An exception that nobody could catch. Python's ssl has one for host names (SNI) that are not ASCII; all is well."""
    if not isinstance(what.exc_value, UnicodeDecodeError):
        log.panic("exception that nobody could catch", what.exc_value)


def run_listener(runtime: Runtime, row: int, spool: Spool, signals: Signals) -> None:
    """What a listener process does, from its fork to its end."""
    setproctitle("mtad: listener")
    log.become("smtpd")
    threading.stack_size(_STACK)
    if runtime.config.processes.processors == "one":
        stay_on_processor(row)
    sys.unraisablehook = _ignored
    ListenerProcess(runtime, row, spool, signals).run()
