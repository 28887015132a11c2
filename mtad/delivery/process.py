"""The delivery process: threads that take jobs from one channel, deliver, write down what they did, and answer.

Per job: open the queue file (whose shared lock says that it is in work), compare the content with its checksum, deliver,
append the attempts, log, answer. The first thread takes no jobs but keeps house: it shows the scheduler a sign of life,
closes connections that nobody has reused, lets the watchdog look after deliveries that make no progress, and thins out the
threads (`mtad.delivery.crew`).

A job whose scheduler has hung up before the file was locked is left alone. The next scheduler gets the spool only after
this one has hung up, and asks for the lock of each file: so a job is done by one of the two, whatever lay in the channel.

Errors: a damaged file is reported as such. Whatever a transport raises is a bug: logged as panic, and the recipients are
deferred. A queue file that cannot be written (disk full) delays nothing: the answer carries the outcome, and says that the
file does not have it. Only where recipients in doubt are held (``retry.on_doubt``) is nothing sent before the doubt is on
stable storage: whoever may have got the message is then known, even after a power cut.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from typing import Final

import msgspec
from setproctitle import setproctitle

from mtad import log
from mtad.delivery.bounce import BounceTransport
from mtad.delivery.crew import QUIET, Crew
from mtad.delivery.jobs import HEARTBEAT, Job, Result, job_decoder, job_encoder, sign_of_life
from mtad.delivery.maildir import MaildirTransport
from mtad.delivery.rescue import rescued
from mtad.delivery.smtp import SmtpTransport
from mtad.delivery.transport import Interrupted, Task, Transport
from mtad.delivery.watchdog import Watchdog, longest_wait
from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.host import give_back_memory
from mtad.net.channels import MAX_PACKET, PacketSocket, hung_up
from mtad.net.listening import is_own_address, split_address
from mtad.nexthop import Rules
from mtad.outcome import Attempt, Deferred, Outcome
from mtad.progress import REPORT, Doubt, Reported
from mtad.resolver import Resolver
from mtad.routing import Router
from mtad.runtime import Runtime
from mtad.spool.message import OpenMessage
from mtad.spool.queues import Queue, Spool

#: Stacks of delivery threads: TLS and DNS need some, and there may be hundreds.
_STACK: Final = 512 * 1024
#: Seconds between two looks for connections that nobody has reused.
_TICK: Final = 1.0


class _Unnoted(OSError):
    """The queue file does not take what must stand in it before the message is sent."""


class Worker:
    """The jobs of one delivery process."""

    def __init__(self, runtime: Runtime, channel: PacketSocket) -> None:
        """Build the transports; nothing is delivered yet."""
        config = runtime.config
        self._channel = channel
        self._spool = Spool(config.spool)
        self._spool.wake = runtime.wake.send
        resolver = Resolver(config.dns.servers, config.dns.timeout)
        router = Router(
            resolver,
            config.hostname,
            Rules(config.delivery),
            is_own=OwnAddresses([socket.bound for _, socket in runtime.sockets]),
        )
        self._cautious = config.retry.on_doubt == "hold"
        self._watchdog = Watchdog(longest_wait(config))
        self._smtp = SmtpTransport(config.hostname, config.delivery, router, follow=self._watchdog.follow)
        self._transports: dict[str, Transport] = {
            "smtp": self._smtp,
            "local": MaildirTransport(config.local.mail_root, config.hostname, runtime.users),
        }
        domain = config.local.domains[0] if config.local.domains else config.hostname
        self._bounce = BounceTransport(self._spool, config.hostname, f"postmaster@{domain}", config.retry)
        self._crew = Crew(channel, lambda packet: self._answer(job_decoder.decode(packet)))

    def run(self) -> None:
        """Serve until the scheduler closes the channel and the last job is done."""
        shown = thinned = time.monotonic()
        while self._crew.muster() and not self._crew.ended.wait(min(_TICK, HEARTBEAT)):
            self._smtp.expire()
            now = time.monotonic()
            if now - thinned >= QUIET:
                thinned = now
                if self._crew.thin_out():
                    give_back_memory()
            if now - shown >= HEARTBEAT:
                shown = now
                self._show_life()
        self._smtp.close()

    def _show_life(self) -> None:
        try:
            self._channel.send(sign_of_life(self._watchdog.look()))
        except OSError:
            pass  # no scheduler any more, or the next sign gets through

    def _answer(self, job: Job) -> None:
        self._watchdog.begin(job.number, job.queue_id)
        try:
            result = self.work(job)
        except Exception as bug:
            log.panic("a job failed in a way that nobody thought of", bug, job.queue_id)
            result = _all_deferred(job, f"internal error: {type(bug).__name__}")
        finally:
            self._watchdog.end()
        if result is not None:
            try:
                self._channel.send(_fit(result))
            except OSError:
                # Without a scheduler: it stands in the queue file. With one, which would wait for it for ever, as when
                # there is no memory for a packet, the end of this process says that its jobs must be taken back.
                if not hung_up(self._channel):
                    raise

    def work(self, job: Job) -> Result | None:
        """Do one job; None when it is no longer ours."""
        try:
            with self._spool.open(Queue.ACTIVE, job.queue_id) as message:
                if hung_up(self._channel):
                    return None
                message.verify()
                if job.transport == "bounce":
                    return self._report(job, message)
                return self._deliver(job, message)
        except (QueueFileDamaged, QueueFileUnfinished) as fault:
            return Result(job.number, damaged=str(fault))
        except OSError as fault:
            log.warning(f"cannot open the queue file: {fault}", job.queue_id)
            return _all_deferred(job, f"queue file: {fault.strerror or fault}")

    def _deliver(self, job: Job, message: OpenMessage) -> Result:
        envelope = message.message.envelope
        attempts = self._attempt(job, message)
        outcomes = {index: outcome for attempt in attempts for index, outcome in attempt.outcomes}
        attempts = [msgspec.structs.replace(attempt, active=job.active) for attempt in attempts]
        # A message that lives on for other recipients must not forget, not even in a power cut, who has it already.
        written = _note(message, *attempts, durable=len(job.recipients) < len(envelope.recipients))
        for attempt in attempts:
            for index, outcome in attempt.outcomes:
                log.delivery(envelope, envelope.recipients[index].address, attempt, outcome, job.active)
        unwritten = not written and any(not isinstance(outcome, Deferred) for outcome in outcomes.values())
        tried = next((attempt.host for attempt in attempts if attempt.host), "") if job.transport == "smtp" else ""
        return Result(
            job.number,
            tuple(outcomes.items()),
            unwritten=unwritten,
            host=tried,
            ipv4=len(attempts) > 1 and rescued(attempts),
        )

    def _attempt(self, job: Job, message: OpenMessage) -> list[Attempt]:
        """Deliver. Whatever breaks, there is an outcome for each recipient, and who was decided before stays so.

        Raises:
            QueueFileDamaged: the content is not what its checksum says.
        """

        def in_doubt(host: str) -> None:
            noted = _note(message, Doubt(time.time(), job.recipients, host), durable=self._cautious)
            if self._cautious and not noted:
                raise _Unnoted

        started = time.time()
        task = Task(message.message.envelope, job.recipients, job.destination, job.ipv4)
        try:
            attempts = list(self._transports[job.transport].deliver(task, message, in_doubt))
            told = {index for attempt in attempts for index, _ in attempt.outcomes}
            if missing := [index for index in job.recipients if index not in told]:
                silence = RuntimeError(f"transport {job.transport} told nothing about recipients {missing}")
                raise Interrupted(silence, attempts)
        except Exception as broken:
            fault, before = (broken.fault, broken.attempts) if isinstance(broken, Interrupted) else (broken, ())
            if isinstance(fault, QueueFileDamaged):
                raise fault from None
            decided = {
                index for attempt in before for index, outcome in attempt.outcomes if not isinstance(outcome, Deferred)
            }
            deferred = _blame(job, fault)
            rest = tuple((index, deferred) for index in job.recipients if index not in decided)
            return [*before, Attempt(started, rest)]
        return attempts

    def _report(self, job: Job, message: OpenMessage) -> Result:
        # A kill between the report's commit and the record of it leaves nobody who knows that the sender was told.
        _note(message, Doubt(time.time(), job.recipients, REPORT))
        written = True

        def mark(reported: Reported) -> None:
            # The report is on its way: that the disk does not take the record of it must not send another one.
            nonlocal written
            written = _note(message, reported, durable=True) and written

        try:
            reports = self._bounce.report(message, job.recipients, mark, arrival=job.arrival)
        except OSError as fault:
            log.warning(f"cannot store the report to its sender: {fault}", job.queue_id)
            return Result(job.number)
        return Result(job.number, unwritten=not written, reports=tuple(reports))


def _note(message: OpenMessage, *events: Attempt | Doubt | Reported, durable: bool = False) -> bool:
    """Append to the history; a disk that refuses, answered by False, must not keep mail from going out."""
    try:
        message.append(*events, durable=durable)
    except (OSError, ValueError) as fault:  # ValueError: text that cannot be encoded
        log.warning(f"cannot be noted in the queue file: {fault}", message.message.envelope.id)
        return False
    return True


def _blame(job: Job, fault: Exception) -> Deferred:
    """What is said of recipients whose delivery broke off."""
    if isinstance(fault, _Unnoted):
        return Deferred("4.3.0", "not sent: the spool does not take that it is about to be")
    if isinstance(fault, OSError):  # what a transport asks of the world it answers for: this was the queue file
        log.warning(f"cannot read the queue file: {fault}", job.queue_id)
        return Deferred("4.3.0", f"queue file: {fault.strerror or fault}")
    log.panic("delivery failed in a way that nobody thought of", fault, job.queue_id)
    return Deferred("4.3.0", f"internal error: {type(fault).__name__}")


def _all_deferred(job: Job, why: str) -> Result:
    outcome: Outcome = Deferred("4.3.0", why)
    return Result(job.number, tuple((index, outcome) for index in job.recipients))


def _fit(result: Result) -> bytes:
    """The packet of a result; long texts, which stand in the queue file, are cut when it would be too big."""
    packet = job_encoder.encode(result)
    if len(packet) <= MAX_PACKET:
        return packet
    room = MAX_PACKET // (2 * len(result.outcomes)) // 8
    cut = tuple(
        (index, msgspec.structs.replace(outcome, text=outcome.text[:room], reply="", remote=outcome.remote[:room]))
        for index, outcome in result.outcomes
    )
    return job_encoder.encode(msgspec.structs.replace(result, outcomes=cut))


class OwnAddresses:
    """Whether a connection to an address and port would come back to this server (RFC 5321 section 5.1)."""

    def __init__(self, listening: Sequence[str]) -> None:
        """``listening`` are the addresses on which this server listens."""
        self._exact = frozenset(split_address(address) for address in listening)
        self._any = frozenset((":" in host, port) for host, port in self._exact if host in {"0.0.0.0", "::"})

    def __call__(self, host: str, port: int) -> bool:
        """Whether that is us."""
        return (host, port) in self._exact or ((":" in host, port) in self._any and is_own_address(host))


def run_delivery(runtime: Runtime, channel: PacketSocket) -> None:
    """What a delivery process does, from its fork to its end."""
    setproctitle("mtad: delivery")
    log.become("smtp")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # it ends when its channel does
    signal.set_wakeup_fd(-1)
    threading.stack_size(_STACK)
    Worker(runtime, channel).run()
