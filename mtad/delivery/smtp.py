"""Delivery over SMTP: one task to the mail exchangers of its destination (RFC 5321 sections 3.3, 4.5.4 and 5.1).

One attempt goes over the hosts that `mtad.routing` names, in their order:

- The first server that takes the message ends the search, for the recipients that it takes.
- A host that cannot be reached, or that refuses to talk (greeting 4yz or 5yz, EHLO and HELO refused), is passed over.
- A 4yz reply leaves the recipients concerned to the next host; a 5yz reply is the end for them.
- After `SESSION_LIMIT` servers that did talk, the rest waits for the next attempt (Postfix: smtp_mx_session_limit).
- When the connection breaks after the final dot and before its reply, nobody knows whether the server has the message.
  The recipients wait for the next attempt then: another host at once would make a duplicate likely instead of possible
  (RFC 1047).

A connection that was kept from an earlier message and turns out to be dead, or to be closed with 421, before the server
answered MAIL, was never used: a new one takes its place, and no attempt is recorded.

Invariants: every recipient of the task has an outcome in the attempts returned; one that was delivered or failed is never
named to another host. ``in_doubt`` is called before the final dot leaves, each time.

Errors: nothing that a server, a network or the DNS does is raised. Texts are Postfix's, for those who read its logs.

Later parts have their places: TLS and AUTH in `_open`, conversion for servers without 8BITMIME or SMTPUTF8 in `_transact`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from mtad.config import Delivery
from mtad.delivery.connections import ConnectionCache, Session, Timeouts
from mtad.delivery.transport import Content, Task
from mtad.errors import MtadError
from mtad.net.connection import ConnectFailed, ConnectionLost, Stream, TimedOut, connect
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.reply import Reply
from mtad.routing import Host
from mtad.smtp.client import PHASES, After, Phase, Transaction, Verdict, greet, sendable
from mtad.smtp.replies import ProtocolFault
from mtad.smtp.wire import dot_stuff

#: Servers with which a dialogue came about, in one attempt (Postfix: smtp_mx_session_limit).
SESSION_LIMIT: Final = 2

#: Characters of a reply that are kept in outcomes: a report with a thousand of them is still a readable document.
REPLY_LIMIT: Final = 1000


class Route(Protocol):
    """What the transport needs of `mtad.routing.Router`."""

    def key(self, destination: str) -> str:
        """What connections are shared by."""

    def hops(self, destination: str) -> Iterator[Host | Deferred | Failed]:
        """The hosts to try, or the reason why there are none."""


class SmtpTransport:
    """Delivers to other hosts; a `mtad.delivery.transport.Transport`. One instance serves all threads of a process."""

    def __init__(
        self,
        hostname: str,
        settings: Delivery,
        router: Route,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        dial: Callable[[str, int, float], Stream] = connect,
    ) -> None:
        """Prepare.

        Args:
            hostname: our name in EHLO.
            settings: time-outs in seconds, recipients in one transaction, how long connections are kept.
            router: finds the hosts.
            clock: seconds since the epoch.
            monotonic: seconds, for durations.
            dial: opens a connection to (address, port) within so many seconds; raises `ConnectFailed`.
        """
        self._hostname = hostname
        self._settings = settings
        self._router = router
        self._clock = clock
        self._monotonic = monotonic
        self._dial = dial
        self._timeouts = Timeouts(settings)
        self.cache = ConnectionCache(float(settings.connection_idle))

    def deliver(self, task: Task, content: Content, in_doubt: Callable[[str], None]) -> list[Attempt]:
        """See `mtad.delivery.transport.Transport.deliver`."""
        attempts: list[Attempt] = []
        sound = self._sort_out(task, attempts)
        limit = self._settings.destination_recipients
        for first in range(0, len(sound), limit):
            delivery = _Delivery(task, sound[first : first + limit], content, in_doubt)
            self._deliver(delivery)
            attempts.extend(delivery.attempts)
        return attempts

    def expire(self) -> int:
        """Close connections that have been idle for too long; how many that were. To be called once a second or so."""
        return self.cache.expire(self._monotonic())

    def close(self) -> None:
        """Close all idle connections; those in use are closed when they are done."""
        self.cache.close_all()

    def _sort_out(self, task: Task, attempts: list[Attempt]) -> Sequence[int]:
        """The recipients that can be named in a command; the others fail here, and all do if the sender cannot be named."""
        addresses = task.envelope.recipients
        refusals = {index: _unsendable(addresses[index].address) for index in task.recipients}
        sender = _unsendable(task.envelope.sender)
        failed = tuple((index, refusal or sender) for index, refusal in refusals.items() if refusal or sender)
        if failed:
            attempts.append(Attempt(self._clock(), tuple((index, why) for index, why in failed if why is not None)))
        return [index for index, refusal in refusals.items() if not (refusal or sender)]

    def _deliver(self, delivery: _Delivery) -> None:
        """Server after server, until every recipient is decided or there is none left."""
        key = self._router.key(delivery.task.destination)
        delivery.begin(self._clock(), self._monotonic())
        while (session := self.cache.take(key, self._monotonic())) is not None:
            if self._transact(delivery, session):
                break
        if delivery.over:
            return
        for hop in self._router.hops(delivery.task.destination):
            if not isinstance(hop, Host):
                if not delivery.attempts:
                    delivery.record(delivery.all(hop), self._monotonic())
                return
            for address in hop.addresses:
                if (address, hop.port) in delivery.tried:
                    continue
                opened = self._open(delivery, key, hop, address)
                if opened is not None:
                    self._transact(delivery, opened)
                if delivery.over:
                    return

    def _open(self, delivery: _Delivery, key: str, host: Host, address: str) -> Session | None:
        """Connect and exchange greetings; None, and an attempt recorded, when that fails."""
        delivery.tried.add((address, host.port))
        if delivery.attempts:
            delivery.begin(self._clock(), self._monotonic())
        at = _Place(host.name, address, host.port)
        whole = delivery.sessions == 0
        try:
            stream = self._dial(address, host.port, float(self._settings.connect_timeout))
        except ConnectFailed as error:
            outcome = Deferred("4.4.1", f"connect to {at}:{host.port}: {error}", destination=whole)
            delivery.record(delivery.all(outcome), self._monotonic(), at)
            return None
        session = Session(stream, key, host.name, host.port, self._timeouts, now=self._monotonic())
        try:
            greeting = session.play(greet(self._hostname))
        except (TimedOut, ConnectionLost, ProtocolFault) as error:
            session.close(quit_first=False)
            outcome = _broken(error, at, session.phase, whole)
        else:
            if greeting.refusal is None:
                session.capabilities = greeting.capabilities
                return session
            session.close(quit_first=greeting.refusal.reply.code != 421)
            outcome = _refused(greeting.refusal, at, whole)
        delivery.record(delivery.all(outcome), self._monotonic(), at)
        return None

    def _transact(self, delivery: _Delivery, session: Session) -> bool:
        """One transaction over an open session; False when it was a kept one that turned out to be dead."""
        at = _Place(session.host, session.address, session.port, session.tls)
        stood = self._monotonic()
        indexes = tuple(delivery.pending)
        addresses = delivery.task.envelope.recipients
        transaction = Transaction(
            delivery.task.envelope.sender,
            [addresses[index].address for index in indexes],
            delivery.content.size,
            session.capabilities,
            reset=session.needs_reset,
        )
        steps = transaction.steps(dot_stuff(delivery.content.chunks()))
        broken: Deferred | None = None
        try:
            session.play(steps, lambda: delivery.in_doubt(session.host))
        except (TimedOut, ConnectionLost, ProtocolFault) as error:
            broken = _broken(error, at, session.phase, whole=False)
        except BaseException:  # not the server's doing: the content could not be read, or the doubt not be recorded
            session.close(quit_first=False)
            raise
        if session.messages and not transaction.answered:
            session.close(quit_first=False)
            return False
        undecided = broken or Deferred("4.5.0", f"protocol error of {at}", at.host)
        outcomes = {
            index: undecided if verdict is None else _outcome(verdict, at)
            for index, verdict in zip(indexes, transaction.verdicts, strict=True)
        }
        delivery.tried.add((at.address, at.port))
        delivery.sessions += 1
        delivery.uncertain = session.phase is Phase.DOT and None in transaction.verdicts
        delivery.record(outcomes, self._monotonic(), at, stood)
        session.messages += 1
        session.needs_reset = transaction.after is After.RESET
        if broken is not None or transaction.after is After.CLOSED:
            session.close(quit_first=False)
        else:
            self.cache.put(session, self._monotonic())
        return True


class _Place(msgspec.Struct, frozen=True):
    """A server: as texts name it, and as attempts record it."""

    host: str = ""
    address: str = ""
    port: int = 0
    tls: str = ""

    def __str__(self) -> str:
        return f"{self.host}[{self.address}]"

    @property
    def peer(self) -> str:
        """``192.0.2.1:25`` or ``[2001:db8::1]:25``; "" for no server."""
        if not self.address:
            return ""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


_NOWHERE: Final = _Place()


class _Delivery:
    """One task on its way: what is still open, what has been tried. Lives as long as one call of `deliver`."""

    __slots__ = (
        "_begun",
        "_started",
        "attempts",
        "content",
        "in_doubt",
        "pending",
        "sessions",
        "task",
        "tried",
        "uncertain",
    )

    def __init__(self, task: Task, pending: Sequence[int], content: Content, in_doubt: Callable[[str], None]) -> None:
        self.task = task
        self.pending = list(pending)
        self.content = content
        self.in_doubt = in_doubt
        self.attempts: list[Attempt] = []
        self.tried: set[tuple[str, int]] = set()
        self.sessions = 0
        self.uncertain = False
        self._started = self._begun = 0.0

    @property
    def over(self) -> bool:
        """No other server is to be tried."""
        return not self.pending or self.sessions >= SESSION_LIMIT or self.uncertain

    def begin(self, started: float, now: float) -> None:
        """An attempt begins: ``started`` since the epoch, ``now`` on the monotonic clock."""
        self._started, self._begun = started, now

    def all(self, outcome: Outcome) -> Mapping[int, Outcome]:
        """The same for each recipient that is still open."""
        return dict.fromkeys(self.pending, outcome)

    def record(
        self, outcomes: Mapping[int, Outcome], now: float, at: _Place = _NOWHERE, stood: float | None = None
    ) -> None:
        """An attempt ends; what is deferred stays open. ``stood``: since when there was a session, if there was one."""
        connected = now if stood is None else stood
        self.attempts.append(
            Attempt(
                self._started,
                tuple(outcomes.items()),
                at.host,
                at.peer,
                at.tls,
                connection=connected - self._begun,
                transmission=now - connected,
            )
        )
        self.pending = [index for index, outcome in outcomes.items() if isinstance(outcome, Deferred)]


def _outcome(verdict: Verdict, at: _Place) -> Outcome:
    """What a server's word means for a recipient."""
    said = _cut(verdict.reply)
    if verdict.accepted:
        return Delivered(_status(verdict.reply, "2"), said, at.host, said)
    text = f"host {at} said: {said} (in reply to {PHASES[verdict.phase].request})"
    if verdict.permanent:
        return Failed(_status(verdict.reply, "5"), text, at.host, said)
    return Deferred(_status(verdict.reply, "4"), text, at.host, said)


def _refused(refusal: Verdict, at: _Place, whole: bool) -> Deferred:
    """A server that does not want to talk: always temporary, another one may want to (Postfix: smtp_skip_5xx_greeting)."""
    said = _cut(refusal.reply)
    text = f"host {at} refused to talk to me: {said}"
    return Deferred(_status(refusal.reply, "4"), text, at.host, said, destination=whole)


def _broken(error: MtadError, at: _Place, phase: Phase, whole: bool) -> Deferred:
    """A dialogue that did not come to its end."""
    activity = PHASES[phase].activity
    if isinstance(error, TimedOut):
        return Deferred("4.4.2", f"conversation with {at} timed out while {activity}", at.host, destination=whole)
    if isinstance(error, ConnectionLost):
        return Deferred("4.4.2", f"lost connection with {at} while {activity}", at.host, destination=whole)
    return Deferred("4.5.0", f"protocol error of {at} while {activity}: {error}", at.host, destination=whole)


def _unsendable(address: str) -> Failed | None:
    """Why an address cannot stand in a command, if so."""
    if sendable(address):
        return None
    if address.isascii():
        return Failed("5.1.3", "control character in address")
    return Failed("5.6.7", "address is not US-ASCII, and SMTPUTF8 is not supported")


def _status(reply: Reply, kind: str) -> str:
    """The enhanced status of a reply in the class that the reply is taken for."""
    return kind + (reply.enhanced[1:] or ".0.0")


def _cut(reply: Reply) -> str:
    return reply.text[:REPLY_LIMIT]
