"""Delivery over SMTP: one task to the mail exchangers of its destination (RFC 5321 sections 3.3, 4.5.4 and 5.1).

One attempt goes over the hosts that `mtad.routing` names, in their order:

- The first server that takes the message ends the search, for the recipients that it takes.
- A host that cannot be reached, or that refuses to talk (greeting 4yz or 5yz, EHLO and HELO refused, no TLS where it must
  be, AUTH refused), is passed over.
- A 4yz reply leaves the recipients concerned to the next host; a 5yz reply is the end for them.
- After `SESSION_LIMIT` servers that did talk, the rest waits for the next attempt (Postfix: smtp_mx_session_limit).
- A refusal that blames our IPv6 address is followed by the hosts' IPv4 addresses, whatever its code, and for that one more
  server may talk: see `mtad.delivery.rescue`.
- When the connection breaks after the final dot and before its reply, nobody knows whether the server has the message.
  The recipients wait for the next attempt then: another host at once would make a duplicate likely instead of possible
  (RFC 1047).

How a session comes about is in `mtad.delivery.opening`, what a message has to become for a host in
`mtad.delivery.conversion`. A server that announces LIMITS (RFC 9422) gets as many recipients in a transaction, and as many
transactions in a session, as it takes. One that offers CHUNKING and does not know BDAT gets the message by DATA, over a new
connection. A policy of the administrator's (`mtad.nexthop`) can ask for fewer of both.

A connection that was kept from an earlier message and turns out to be dead, or to be closed with 421, before the server
answered MAIL, was never used: a new one takes its place, and no attempt is recorded.

Invariants: every recipient of the task has an outcome in the attempts returned; one that was delivered or failed is never
named to another host. ``in_doubt`` is called before the end of the content leaves, each time.

Errors: nothing that a server, a network or the DNS does is raised. Texts are Postfix's, for those who read its logs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Final, Protocol

from mtad.config import Delivery
from mtad.delivery.connections import MESSAGE_LIMIT, ConnectionCache, Session
from mtad.delivery.conversion import Conversion, ConversionFailed, Fit
from mtad.delivery.opening import Handshake, Opener
from mtad.delivery.progress import Progress
from mtad.delivery.rescue import Rescue
from mtad.delivery.transport import Content, Interrupted, Task
from mtad.delivery.words import Place, broken, outcome_of
from mtad.net.connection import Connection, ConnectionLost, TimedOut, connect
from mtad.nexthop import Rule
from mtad.outcome import Attempt, Deferred, Failed, Outcome
from mtad.routing import Host
from mtad.smtp.client import Transaction
from mtad.smtp.dialogue import After, Phase, sendable
from mtad.smtp.replies import ProtocolFault

#: Servers with which a dialogue came about, in one attempt (Postfix: smtp_mx_session_limit).
SESSION_LIMIT: Final = 2


class Route(Protocol):
    """What the transport needs of `mtad.routing.Router`."""

    def rule(self, destination: str, host: str = "") -> Rule:
        """How to speak to the hosts, and to this one if it is known which it is."""

    def hops(self, destination: str) -> Iterator[Host | Deferred | Failed]:
        """The hosts to try, or the reason why there are none."""


class _Used(Enum):
    """What became of a session."""

    DONE = "done"
    DEAD = "dead"  # it was a kept one, and was closed before it was used
    LIED = "lied"  # the server does not know BDAT; it has not got anything


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
        dial: Callable[[str, int, float], Connection] = connect,
        tls: Handshake | None = None,
        follow: Callable[[Session | None], None] = lambda _session: None,
    ) -> None:
        """Prepare.

        Args:
            hostname: our name in EHLO.
            settings: time-outs in seconds, recipients in one transaction, how long connections are kept.
            router: finds the hosts.
            clock: seconds since the epoch.
            monotonic: seconds, for durations.
            dial: opens a connection to (address, port) within so many seconds; raises `ConnectFailed`.
            tls: encrypts connections.
            follow: is told over which session this thread goes on; None for none, or none any more.
        """
        self._settings = settings
        self._router = router
        self._clock = clock
        self._monotonic = monotonic
        self.follow = follow
        self._opener = Opener(hostname, settings, dial=dial, tls=tls, monotonic=monotonic, follow=follow)
        self.cache = ConnectionCache(float(settings.connection_idle))

    def deliver(self, task: Task, content: Content, in_doubt: Callable[[str], None]) -> list[Attempt]:
        """See `mtad.delivery.transport.Transport.deliver`."""
        attempts: list[Attempt] = []
        sound = self._sort_out(task, attempts)
        limit = self._router.rule(task.destination).recipients or self._settings.destination_recipients
        with Conversion(task.envelope, content) as conversion:
            for first in range(0, len(sound), limit):
                progress = Progress(sound[first : first + limit], self._clock, self._monotonic)
                try:
                    _Delivery(self, task, conversion, in_doubt, progress).run()
                except Exception as fault:
                    raise Interrupted(fault, [*attempts, *progress.attempts]) from fault
                attempts.extend(progress.attempts)
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
        failed = Failed("5.1.3", "control character in address")
        sender = sendable(task.envelope.sender, utf8=True)
        bad = {index for index in task.recipients if not sender or not sendable(addresses[index].address, utf8=True)}
        if bad:
            attempts.append(Attempt(self._clock(), tuple((index, failed) for index in sorted(bad))))
        return [index for index in task.recipients if index not in bad]

    # What a `_Delivery` needs: one instance of each for all of them.

    @property
    def router(self) -> Route:
        """Finds the hosts."""
        return self._router

    @property
    def opener(self) -> Opener:
        """Opens sessions."""
        return self._opener

    @property
    def now(self) -> float:
        """Seconds, monotonic."""
        return self._monotonic()


class _Delivery:
    """One task on its way. Lives as long as one call of `SmtpTransport.deliver`, or less."""

    def __init__(
        self,
        transport: SmtpTransport,
        task: Task,
        conversion: Conversion,
        in_doubt: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self._transport = transport
        self._task = task
        self._conversion = conversion
        self._in_doubt = in_doubt
        self._progress = progress
        self._rule = transport.router.rule(task.destination)
        hop = self._rule.hop
        self._key = self._rule.key if hop is not None else f"{task.destination}/{self._rule.key}"
        if task.ipv4:
            self._key += "/ipv4"
        self._rescue = Rescue(task.ipv4)
        self._sessions = 0

    @property
    def _over(self) -> bool:
        """No other server is to be tried."""
        limit = SESSION_LIMIT + self._rescue.blamed
        return not self._progress.pending or self._sessions >= limit or self._progress.uncertain

    def run(self) -> None:
        """Server after server, until every recipient is decided or there is none left."""
        progress, transport = self._progress, self._transport
        progress.begin()
        while (session := transport.cache.take(self._key, transport.now)) is not None:
            progress.turn_to_next()
            transport.follow(session)
            if self._use(session) is _Used.DONE:
                if not progress.unnamed:
                    progress.tried.add((session.address, session.port))
                break
        if self._over:
            return
        left_out: list[tuple[Host, str]] = []
        self._visit_all(left_out)
        if self._over:
            return
        progress.revise(self._rescue.over())
        for host, address in left_out if not self._rescue.tried else ():
            if self._over:
                return
            self._visit(host, address)

    def _visit_all(self, left_out: list[tuple[Host, str]]) -> None:
        """The servers of the destination in their order, without the addresses that the rescue leaves out."""
        progress = self._progress
        for hop in self._transport.router.hops(self._task.destination):
            self._transport.follow(None)
            if not isinstance(hop, Host):
                if not progress.attempts:
                    progress.record_all(hop)
                return
            for address in hop.addresses:
                if (address, hop.port) in progress.tried:
                    continue
                if self._rescue.skips(address):
                    left_out.append((hop, address))
                    continue
                self._visit(hop, address)
                if self._over:
                    return

    def _visit(self, host: Host, address: str) -> None:
        """One server: a session, or several when it takes only so many transactions in one."""
        progress = self._progress
        progress.tried.add((address, host.port))
        progress.turn_to_next()
        chunking = True
        first = True
        while progress.unnamed:
            progress.begin()
            opened = self._transport.opener.open(self._key, host, address, self._rule, whole=first and not self._sessions)
            if isinstance(opened, Deferred):
                self._rescue.look_at({-1: opened}, address)
                progress.record_rest(opened, Place(host.name, address, host.port))
                return
            if not chunking:
                opened.capabilities = opened.capabilities.without_chunking()
            before = len(progress.unnamed)
            used = self._use(opened, again=not first)
            if used is _Used.LIED:
                chunking = False
            elif len(progress.unnamed) == before:
                return  # cannot be: a new session names somebody, or says why not
            else:
                first = False

    def _use(self, session: Session, *, again: bool = False) -> _Used:
        """Transactions over an open session until everybody was named, or the session is at its end."""
        progress = self._progress
        at = Place(session.host, session.address, session.port, session.tls)
        stood = self._transport.now
        rule = self._transport.router.rule(self._task.destination, session.host)
        session.most = rule.messages or MESSAGE_LIMIT
        fit = self._fit(session, at)
        named = False
        while fit is not None and progress.unnamed:
            indexes = progress.batch(session.capabilities, self._task.envelope, rule.recipients)
            used = self._transact(session, at, fit, indexes, stood)
            if used is not _Used.DONE:
                return used
            if not named and not again:
                self._sessions += 1
            named = True
            if session.spent or not session.reusable(self._transport.now):
                break
            if progress.unnamed:
                progress.begin()
                stood = self._transport.now
        self._transport.follow(None)
        if not session.spent and self._rescue.blamed and ":" in session.address:
            session.close()  # nobody else is to come to the same end over it
        elif not session.spent:
            self._transport.cache.put(session, self._transport.now)
        return _Used.DONE

    def _fit(self, session: Session, at: Place) -> Fit | None:
        """What this server gets; None when nobody is left for whom it would get anything."""
        progress = self._progress
        try:
            fit = self._conversion.fit(session.capabilities, progress.unnamed, at)
        except ConversionFailed as fault:
            progress.record_rest(Deferred("4.3.0", str(fault)), at)
            return None
        except BaseException:  # the content could not be read
            session.close(quit_first=False)
            raise
        if fit.refused:
            progress.record(fit.refused, at)
        return fit

    def _transact(self, session: Session, at: Place, fit: Fit, indexes: Sequence[int], stood: float) -> _Used:
        """One transaction."""
        progress = self._progress
        transaction = Transaction(
            self._conversion.mail(fit, indexes), session.capabilities, fit.start, reset=session.needs_reset
        )
        fault: Deferred | None = None
        try:
            session.play(transaction.steps(fit.chunks()), lambda: self._in_doubt(session.host), fit.size)
        except (TimedOut, ConnectionLost, ProtocolFault) as error:
            fault = broken(error, at, session.phase, whole=False)
        except BaseException:  # not the server's doing: the content could not be read, or the doubt not be recorded
            session.close(quit_first=False)
            raise
        if transaction.lied or (session.messages and not transaction.answered):
            session.close(quit_first=False)
            return _Used.LIED if transaction.lied else _Used.DEAD
        undecided = fault or Deferred("4.5.0", f"protocol error of {at}", at.host)
        outcomes: dict[int, Outcome] = {
            index: undecided if verdict is None else outcome_of(verdict, at, dsn=session.capabilities.dsn)
            for index, verdict in zip(indexes, transaction.verdicts, strict=True)
        }
        progress.uncertain = session.phase is Phase.DOT and None in transaction.verdicts
        session.messages += 1
        session.needs_reset = transaction.after is After.RESET
        session.spent = fault is not None or transaction.after is After.CLOSED
        if session.spent:
            session.close(quit_first=False)
            # whoever was not named yet will not be named here
            said = [one for one in outcomes.values() if isinstance(one, Deferred)]
            reason = fault or (said[-1] if said else Deferred("4.4.2", f"lost connection with {at}", at.host))
            outcomes |= {index: reason for index in progress.unnamed if index not in outcomes}
        progress.record(self._rescue.look_at(outcomes, session.address), at, stood)
        if self._rescue.put_off:
            self._leave(at)
        return _Used.DONE

    def _leave(self, at: Place) -> None:
        """Our address is not liked here: whoever was not named yet is named to the next server."""
        if self._progress.unnamed:
            self._progress.record_rest(
                Deferred("4.7.0", f"host {at} does not like our address; going on over IPv4", at.host), at
            )
