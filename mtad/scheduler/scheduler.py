"""The scheduler: owns the spool, decides who is due, and gives the work to the delivery processes.

One thread, one loop. What it does itself is short: a rename, an unlink, a few lines in a table; whatever waits for a
network or for a flush of the disk is done by a delivery process. Each turn of the loop takes a bounded slice of every
kind of work, so a new message for a healthy host is never behind a thousand that are not.

The life of a message here::

    wake-up or scan -> claim -> `_start`: one job per destination -> lanes -> delivery -> results -> `_settle`
        Done     the file is removed
        RetryAt  the file moves to deferred/, its mtime is the next attempt
        Bounce   a job for the transport "bounce"; when the report is committed, `_settle` again

What is known about a recipient stands in the queue file before it is known here, so a scheduler that dies loses nothing:
the next one reads active/ (`restore`), waits for deliveries that still hold a file, and goes on.

Errors: a damaged file is moved to corrupt/ and logged. A move that the disk refuses is tried again (`_STUBBORN`), and
nothing else stops for it.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from mtad.address import domain_of
from mtad.config import Config
from mtad.delivery.jobs import Job, Result
from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.outcome import Attempt, Deferred, Failed, Outcome
from mtad.progress import RecipientState
from mtad.retry import Bounce, Done, RetryAt, settle
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.agenda import Agenda
from mtad.scheduler.lanes import Lane, LaneJob, LaneKey, Lanes
from mtad.spool.queue_file import Head
from mtad.spool.queues import Queue, Spool

#: More than this many messages in hand, and deferred ones wait (new ones never do). Postfix's qmgr_message_active_limit.
ACTIVE_LIMIT: Final = 20000
#: Messages of each kind that one turn of the loop takes: deferred ones that are due, ones of a suspended lane.
TURN: Final = 50
#: Seconds until something that the disk refused is tried again.
_STUBBORN: Final = 10.0
#: A message whose delivery process died this often is not the victim but perhaps the cause, and waits as any deferred one.
_DEATHS: Final = 2


class Dispatcher(Protocol):
    """Whoever takes jobs to the delivery processes."""

    def dispatch(self, job: Job) -> int | None:
        """Give the job a number and send it to a process; None when none can take it now."""


class Events(Protocol):
    """Where the scheduler tells what happened; see `mtad.scheduler.report`."""

    def active(self, message: ActiveMessage) -> None: ...
    def removed(self, queue_id: str) -> None: ...
    def deferred(self, message: ActiveMessage, attempt: Attempt) -> None: ...
    def reported(self, message: ActiveMessage, report: str) -> None: ...
    def in_doubt(self, queue_id: str, recipient: str, host: str) -> None: ...
    def damaged(self, queue_id: str, queue: Queue, why: str) -> None: ...
    def held(self, queue_id: str, why: str) -> None: ...
    def swept(self, queue_id: str) -> None: ...
    def warning(self, text: str) -> None: ...


class Scheduler:
    """The decisions; the loop around them is `mtad.scheduler.process`. Times are seconds since the epoch."""

    def __init__(self, config: Config, spool: Spool, events: Events, clock: Callable[[], float] = time.time) -> None:
        """A scheduler with nothing in hand."""
        self._config = config
        self._local = frozenset(domain.lower() for domain in config.local.domains)
        self._smarthost = config.delivery.next_hop
        self._spool = spool
        self._events = events
        self._clock = clock
        self._random = random.Random()
        self._messages: dict[str, ActiveMessage] = {}
        self._jobs: dict[int, tuple[Lane, LaneJob, ActiveMessage]] = {}
        self._backlog: deque[tuple[LaneJob, Deferred]] = deque()
        self._again: deque[tuple[float, Callable[[], None]]] = deque()
        self._urgent: set[str] = set()
        self.agenda = Agenda()
        self.lanes = Lanes(config.delivery.destination_concurrency, config.retry.destination_pause)

    def __len__(self) -> int:
        """How many messages are in hand."""
        return len(self._messages)

    # -- what comes in ------------------------------------------------------------------------------------------------

    def arrived(self, head: Head) -> None:
        """A listener says that it has committed a message."""
        queue_id = head.envelope.id
        if self._try(lambda: self.arrived(head), lambda: self._spool.claim(Queue.INCOMING, queue_id)):
            states = [RecipientState()] * len(head.envelope.recipients)
            self._start(ActiveMessage(head.envelope, states, head.content_size, self._clock(), urgent=False))

    def found_incoming(self, queue_id: str, mtime: float) -> None:
        """A scan has found a file in incoming: a message without a wake-up, one in the making, or half of one."""
        if self._spool.in_work(Queue.INCOMING, queue_id):
            return
        try:
            self._spool.load(Queue.INCOMING, queue_id)
        except QueueFileUnfinished:
            if self._clock() - mtime > 1.0 and self._sweep(queue_id):
                self._events.swept(queue_id)
        except (QueueFileDamaged, OSError) as fault:
            self._misread(Queue.INCOMING, queue_id, fault)
        else:
            self._take(Queue.INCOMING, queue_id)

    def found_deferred(self, queue_id: str, mtime: float) -> None:
        """A scan has found a file in deferred."""
        if queue_id not in self._messages:
            self.agenda.set(queue_id, mtime)

    def found_stranger(self, queue: Queue, name: str) -> None:
        """A scan has found what does not belong in a queue."""
        self._misread(queue, name, QueueFileDamaged("not a queue file"))

    def restore(self, queue_id: str) -> bool:
        """Go on with a message that an earlier scheduler had in active.

        Returns:
            False when a delivery process of that scheduler is still at work on it: to be called again later.
        """
        if queue_id in self._messages:
            return True
        if self._spool.in_work(Queue.ACTIVE, queue_id):
            return False
        self._resume(queue_id)
        return True

    def flush(self, queue_ids: Sequence[str]) -> None:
        """Somebody wants these deferred messages to be tried now, also at a destination that is suspended."""
        now = self._clock()
        for queue_id in queue_ids:
            self._urgent.add(queue_id)
            self.agenda.set(queue_id, now)

    # -- one turn of the loop -----------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """Do a slice of the work that waits for nobody; whether there is more of it at once."""
        now = self._clock()
        while self._again and self._again[0][0] <= now:
            self._again.popleft()[1]()
        for _ in range(min(TURN, len(self._backlog))):
            self._postpone(*self._backlog.popleft())
        admitted = 0
        while admitted < TURN and len(self._messages) < ACTIVE_LIMIT and (queue_id := self.agenda.pop(now)) is not None:
            self._take(Queue.DEFERRED, queue_id)
            admitted += 1
        return bool(self._backlog) or admitted == TURN

    def next_time(self) -> float | None:
        """When `turn` has something to do next, if nothing happens before; None when never."""
        times = [self._again[0][0]] if self._again else []
        due = self.agenda.next_time()
        if due is not None and len(self._messages) < ACTIVE_LIMIT:
            times.append(due)
        return min(times, default=None)

    def dispatch(self, dispatcher: Dispatcher) -> None:
        """Start as many jobs as the lanes allow and the delivery processes take."""
        while (taken := self.lanes.take()) is not None:
            lane, lane_job = taken
            message = self._messages[lane_job.queue_id]
            number = dispatcher.dispatch(
                Job(0, lane_job.queue_id, lane.key.transport, lane.key.destination, lane_job.recipients, message.claimed)
            )
            if number is None:
                self.lanes.give_back(lane, lane_job)
                return
            self._jobs[number] = (lane, lane_job, message)

    # -- what comes back ----------------------------------------------------------------------------------------------

    def result(self, result: Result) -> None:
        """A delivery process has done a job; what it brought stands in the queue file."""
        lane, lane_job, message = self._jobs.pop(result.number)
        failure = _destination_failure(result.outcomes)
        for waiting in self.lanes.done(lane, failure, self._clock()):
            assert failure is not None
            self._backlog.append((waiting, failure))
        message.open_jobs -= 1
        if result.damaged:
            self._condemn(message, result.damaged)
            return
        if lane.key.transport == "bounce":
            self._bounced(message, lane_job, result)
            return
        message.record(result.outcomes)
        self._settle_when_complete(message)

    def died(self, jobs: Sequence[Job], how: str) -> None:
        """A delivery process is gone: its work is taken back, as far as the queue files say that it was not done."""
        for job in jobs:
            lane, lane_job, message = self._jobs.pop(job.number)
            self.lanes.done(lane, None, self._clock())
            message.open_jobs -= 1
            message.deaths += 1
            if message.envelope.id not in self._messages:
                continue
            if not self._reread(message):
                continue
            rest = [index for index in lane_job.recipients if index in message.due()]
            if not rest or job.transport == "bounce":
                self._settle_when_complete(message)
            elif message.deaths < _DEATHS:
                self._queue(message, lane.key, tuple(rest))
            else:
                outcome = Deferred("4.3.0", f"delivery process {how}")
                self._postpone(LaneJob(message.envelope.id, tuple(rest), self._clock()), outcome, open_job=False)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _take(self, queue: Queue, queue_id: str) -> None:
        """Claim a message of which only the name is known, and go on with it."""
        if self._try(lambda: self._take(queue, queue_id), lambda: self._spool.claim(queue, queue_id)):
            self.agenda.drop(queue_id)
            self._resume(queue_id)
        else:
            self._urgent.discard(queue_id)

    def _resume(self, queue_id: str) -> None:
        """Read a message of active and start what is left to do for it."""
        try:
            stored = self._spool.load(Queue.ACTIVE, queue_id)
        except (QueueFileDamaged, QueueFileUnfinished, OSError) as fault:
            self._misread(Queue.ACTIVE, queue_id, fault)
            return
        for state, recipient in zip(stored.states, stored.envelope.recipients, strict=True):
            if state.doubt:
                self._events.in_doubt(queue_id, recipient.address, state.doubt)
        urgent = queue_id in self._urgent
        self._urgent.discard(queue_id)
        self._start(ActiveMessage(stored.envelope, stored.states, stored.head.content_size, self._clock(), urgent))

    def _start(self, message: ActiveMessage) -> None:
        """Make one job for each destination of a message that is in active."""
        self._messages[message.envelope.id] = message
        self._events.active(message)
        destinations: dict[LaneKey, list[int]] = {}
        for index in message.due():
            destinations.setdefault(self._lane_key(message.envelope.recipients[index].address), []).append(index)
        size = self._config.delivery.destination_recipients
        message.open_jobs += 1  # held open: a job that ends at once must not settle the message before the last is made
        for key, indexes in destinations.items():
            for start in range(0, len(indexes), size):
                self._queue(message, key, tuple(indexes[start : start + size]))
        message.open_jobs -= 1
        self._settle_when_complete(message)

    def _lane_key(self, address: str) -> LaneKey:
        domain = domain_of(address)
        if domain in self._local or not domain:
            return LaneKey("local", "")
        return LaneKey("smtp", self._smarthost or domain)

    def _queue(self, message: ActiveMessage, key: LaneKey, recipients: tuple[int, ...]) -> None:
        now = self._clock()
        job = LaneJob(message.envelope.id, recipients, now)
        message.open_jobs += 1
        reason = self.lanes.add(key, job, now, urgent=message.urgent)
        if reason is not None:
            self._backlog.append((job, reason))

    def _postpone(self, job: LaneJob, reason: Deferred, *, open_job: bool = True) -> None:
        """Defer the recipients of a job that was not tried, because its destination is suspended."""
        message = self._messages.get(job.queue_id)
        if message is None:
            return
        text = reason.text
        if open_job:
            message.open_jobs -= 1
            text = "delivery temporarily suspended: " + text
        outcome = Deferred(reason.status, text, reason.remote, destination=True)
        attempt = Attempt(self._clock(), tuple((index, outcome) for index in job.recipients))
        try:
            self._spool.append(Queue.ACTIVE, job.queue_id, attempt)
        except (QueueFileDamaged, QueueFileUnfinished, OSError) as fault:
            self._events.warning(f"{job.queue_id}: cannot note why it is deferred: {fault}")
        message.record(attempt.outcomes)
        self._events.deferred(message, attempt)
        self._settle_when_complete(message)

    def _settle_when_complete(self, message: ActiveMessage) -> None:
        if message.open_jobs == 0 and message.envelope.id in self._messages:
            self._settle(message)

    def _settle(self, message: ActiveMessage) -> None:
        """All jobs of a message are done: what now? The decision is `mtad.retry.settle`'s."""
        queue_id = message.envelope.id
        verdict = settle(message.envelope, message.states, self._clock(), self._config.retry, self._random.random())
        match verdict:
            case Done():
                del self._messages[queue_id]
                self._finish(queue_id, lambda: self._spool.remove(queue_id))
                self._events.removed(queue_id)
            case RetryAt(when=when):
                del self._messages[queue_id]
                if self._finish(queue_id, lambda: self._spool.defer(queue_id, when)):
                    self.agenda.set(queue_id, when)
            case Bounce(failed=failed):
                self._bounce(message, failed)

    def _bounce(self, message: ActiveMessage, failed: Sequence[tuple[int, Failed]]) -> None:
        queue_id = message.envelope.id
        if message.envelope.kind == "double-bounce":
            del self._messages[queue_id]
            self._finish(queue_id, lambda: self._spool.hold(Queue.ACTIVE, queue_id))
            self._events.held(queue_id, "a notice to postmaster about an undeliverable report cannot be delivered itself")
            return
        self._queue(message, LaneKey("bounce", ""), tuple(index for index, _ in failed))

    def _bounced(self, message: ActiveMessage, job: LaneJob, result: Result) -> None:
        if message.envelope.id not in self._messages:
            return
        if result.report:
            message.reported(job.recipients)
            self._events.reported(message, result.report)
            self._settle_when_complete(message)
            return
        # The report could not be stored: the message stays and says so again when it is next due.
        del self._messages[message.envelope.id]
        when = self._clock() + self._config.retry.minimum
        if self._finish(message.envelope.id, lambda: self._spool.defer(message.envelope.id, when)):
            self.agenda.set(message.envelope.id, when)

    def _reread(self, message: ActiveMessage) -> bool:
        """Take over what a dead delivery process has written into the queue file; False when that is damaged."""
        queue_id = message.envelope.id
        try:
            message.states = list(self._spool.load(Queue.ACTIVE, queue_id).states)
        except (QueueFileDamaged, QueueFileUnfinished, OSError) as fault:
            self._messages.pop(queue_id, None)
            self._misread(Queue.ACTIVE, queue_id, fault)
            return False
        for state, recipient in zip(message.states, message.envelope.recipients, strict=True):
            if state.doubt:
                self._events.in_doubt(queue_id, recipient.address, state.doubt)
        return True

    def _condemn(self, message: ActiveMessage, why: str) -> None:
        if self._messages.pop(message.envelope.id, None) is not None:
            self._misread(Queue.ACTIVE, message.envelope.id, QueueFileDamaged(why))

    def _misread(self, queue: Queue, queue_id: str, fault: Exception) -> None:
        """A file could not be read: gone is nothing, damaged goes to corrupt/, the disk's fault is tried again."""
        if isinstance(fault, FileNotFoundError):
            return
        if isinstance(fault, OSError) and not isinstance(fault, PermissionError):
            self._events.warning(f"{queue_id}: cannot read it in {queue.value}: {fault.strerror or fault}")
            if queue is Queue.ACTIVE:
                self._later(lambda: self._resume(queue_id))
            return
        if self._finish(queue_id, lambda: self._spool.condemn(queue, queue_id)):
            self._events.damaged(queue_id, queue, str(fault))

    def _sweep(self, queue_id: str) -> bool:
        try:
            return self._spool.sweep(queue_id)
        except FileNotFoundError:
            return False
        except OSError as fault:
            self._events.warning(f"{queue_id}: cannot remove what was never finished: {fault.strerror or fault}")
            return False

    def _try(self, again: Callable[[], None], move: Callable[[], bool]) -> bool:
        """Do a move; when the disk refuses, say so and do ``again`` later."""
        try:
            return move()
        except OSError as fault:
            self._events.warning(f"the spool cannot be changed, trying again in {_STUBBORN:g} s: {fault}")
            self._later(again)
            return False

    def _finish(self, queue_id: str, move: Callable[[], bool]) -> bool:
        """Do the last move of a message; again and again until the disk lets it."""
        return self._try(lambda: void(self._finish(queue_id, move)), move)

    def _later(self, action: Callable[[], None]) -> None:
        self._again.append((self._clock() + _STUBBORN, action))


def void(_value: object) -> None:
    """Drop a value, where a callback has none."""


def _destination_failure(outcomes: Sequence[tuple[int, Outcome]]) -> Deferred | None:
    """Why a destination as a whole could not be reached, when that is what all its recipients say."""
    failure: Deferred | None = None
    for _, outcome in outcomes:
        if not isinstance(outcome, Deferred) or not outcome.destination:
            return None
        failure = outcome
    return failure
