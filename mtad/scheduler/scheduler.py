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
the next one reads active/ (`restore`), waits for deliveries that still hold a file, and goes on. When a delivery process
could not write down what it did, the message does not leave active/ before that is made good.

Two clocks: when messages are due and expire is the wall's, as the files have it; pauses are measured on a clock that nobody
sets, and a next attempt further away than any policy wants (a clock was wrong) is brought near.

Errors: a damaged file is moved to corrupt/ and logged. A move that the disk refuses is tried again, see
`mtad.scheduler.moves`; the message stays in hand meanwhile, and nothing else stops for it.
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
from mtad.nexthop import Rules
from mtad.outcome import Attempt, Deferred, Failed
from mtad.progress import RecipientState
from mtad.retry import JITTER, Bounce, Done, RetryAt, settle
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.agenda import Agenda
from mtad.scheduler.events import Events
from mtad.scheduler.files import UNREADABLE, Files
from mtad.scheduler.lanes import Lane, LaneJob, LaneKey, Lanes, destination_failure
from mtad.scheduler.moves import Moves
from mtad.spool.queue_file import Head
from mtad.spool.queues import Queue, Spool

#: More than this many messages in hand, and deferred ones wait (new ones never do). Postfix's qmgr_message_active_limit.
ACTIVE_LIMIT: Final = 20000
#: Messages of each kind that one turn of the loop takes: deferred ones that are due, ones of a suspended lane.
TURN: Final = 50
#: A message with which so many delivery processes died is perhaps the cause and not the victim, and is deferred.
_DEATHS: Final = 2


class Dispatcher(Protocol):
    """Whoever takes jobs to the delivery processes."""

    def dispatch(self, job: Job) -> int | None:
        """Give the job a number and send it to a process; None when none can take it now."""


class Scheduler:
    """The decisions; the loop around them is `mtad.scheduler.process`."""

    def __init__(
        self,
        config: Config,
        spool: Spool,
        events: Events,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """A scheduler with nothing in hand. ``clock``: seconds since the epoch; ``monotonic``: seconds since any time."""
        self._config = config
        self._local = frozenset(domain.lower() for domain in config.local.domains)
        self._rules = Rules(config.delivery)
        self._spool = spool
        self._events = events
        self._clock = clock
        self._monotonic = monotonic
        self._random = random.Random()
        self._messages: dict[str, ActiveMessage] = {}
        self._jobs: dict[int, tuple[Lane, LaneJob]] = {}
        self._backlog: deque[tuple[LaneJob, Deferred]] = deque()
        self._moves = Moves(monotonic, events.warning)
        self._files = Files(spool, events, self._moves, self.restore)
        self._urgent: set[str] = set()
        self._agenda = Agenda()
        self._lanes = Lanes(config.delivery.destination_concurrency, config.retry.destination_pause)

    def __len__(self) -> int:
        """How many messages are in hand."""
        return len(self._messages)

    # -- what comes in ------------------------------------------------------------------------------------------------

    def arrived(self, head: Head) -> None:
        """A listener says that it has committed a message."""
        queue_id = head.envelope.id
        if self._handled(queue_id):
            return

        def claimed(moved: bool) -> None:
            if moved:  # else a scan was faster
                states = [RecipientState()] * len(head.envelope.recipients)
                self._start(ActiveMessage(head.envelope, states, head.content_size, self._clock(), urgent=False))

        self._moves.do(queue_id, lambda: self._spool.claim(Queue.INCOMING, queue_id), claimed)

    def found_incoming(self, queue_id: str, mtime: float) -> None:
        """A scan has found a file in incoming: a message without a wake-up, one in the making, or half of one."""
        if self._handled(queue_id) or self._spool.in_work(Queue.INCOMING, queue_id):
            return
        # Whole is not yet durable: a receiver that got hold of it in between is asked about once more.
        whole = self._files.arrived_whole(queue_id, self._clock() - mtime)
        if whole and not self._spool.in_work(Queue.INCOMING, queue_id):
            self._take(Queue.INCOMING, queue_id)

    def found_deferred(self, queue_id: str, mtime: float) -> None:
        """A scan has found a file in deferred."""
        if self._handled(queue_id):
            return
        latest = self._clock() + self._config.retry.maximum * (1 + JITTER)
        if mtime <= latest:
            self._agenda.set(queue_id, mtime)
        elif queue_id not in self._agenda:
            self._agenda.set(queue_id, latest)

    def found_stranger(self, queue: Queue, name: str) -> None:
        """A scan has found what does not belong in a queue."""
        if name not in self._moves:
            self._files.misread(queue, name, QueueFileDamaged("not a queue file"))

    def restore(self, queue_id: str) -> bool:
        """Go on with a message that an earlier scheduler had in active.

        Returns:
            False when a delivery process of that scheduler is still at work on it: to be called again later.
        """
        if self._handled(queue_id):
            return True
        if self._spool.in_work(Queue.ACTIVE, queue_id):
            return False
        self._resume(queue_id)
        return True

    def flush(self, queue_ids: Sequence[str]) -> None:
        """Somebody wants these deferred messages to be tried now, also at a destination that is suspended."""
        now = self._clock()
        for queue_id in queue_ids:
            if not self._handled(queue_id):
                self._urgent.add(queue_id)
                self._agenda.set(queue_id, now)

    # -- one turn of the loop -----------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """Do a slice of the work that waits for nobody; whether there is more of it at once."""
        more = self._moves.turn()
        for _ in range(min(TURN, len(self._backlog))):
            job, reason = self._backlog.popleft()
            job.message.open_jobs -= 1
            text = f"delivery temporarily suspended: {reason.text}"
            self._postpone(job, Deferred(reason.status, text, reason.remote, destination=True))
        now = self._clock()
        admitted = 0
        while admitted < TURN and len(self._messages) < ACTIVE_LIMIT and (queue_id := self._agenda.pop(now)) is not None:
            self._take(Queue.DEFERRED, queue_id)
            admitted += 1
        return more or bool(self._backlog) or admitted == TURN

    def wait(self) -> float | None:
        """Seconds until `turn` has something to do, if nothing happens before; None when never."""
        waits = [] if (pending := self._moves.wait()) is None else [pending]
        due = self._agenda.next_time()
        if due is not None and len(self._messages) < ACTIVE_LIMIT:
            waits.append(max(0.0, due - self._clock()))
        return min(waits, default=None)

    def dispatch(self, dispatcher: Dispatcher) -> None:
        """Start as many jobs as the lanes allow and the delivery processes take."""
        while (taken := self._lanes.take()) is not None:
            lane, job = taken
            message = job.message
            if not self._in_hand(message):  # damaged, as another job for it has found out
                self._lanes.release(lane, self._monotonic())
                continue
            number = dispatcher.dispatch(
                Job(0, message.id, lane.key.transport, lane.key.destination, job.recipients, message.claimed)
            )
            if number is None:
                self._lanes.give_back(lane, job)
                return
            self._jobs[number] = (lane, job)

    def keep_house(self) -> None:
        """Forget what is no longer needed; to be called now and then."""
        self._lanes.forget(self._monotonic())

    # -- what comes back ----------------------------------------------------------------------------------------------

    def result(self, result: Result) -> None:
        """A delivery process has done a job; what it brought stands in the queue file, unless it says otherwise."""
        lane, job = self._jobs.pop(result.number)
        message = job.message
        failure = destination_failure(result.outcomes)
        for waiting in self._lanes.done(lane, failure, self._monotonic()):
            assert failure is not None
            self._backlog.append((waiting, failure))
        message.open_jobs -= 1
        if not self._in_hand(message):
            return
        if result.damaged:
            self._let_go(message, QueueFileDamaged(result.damaged))
        elif lane.key.transport == "bounce":
            self._told(message, result)
        else:
            message.record(result.outcomes)
            if result.unwritten:
                message.unwritten.append(Attempt(self._clock(), result.outcomes))
            self._settle_when_complete(message)

    def died(self, jobs: Sequence[Job], how: str) -> None:
        """A delivery process is gone: its work is taken back, as far as the queue files say that it was not done."""
        struck: set[ActiveMessage] = set()
        for gone in jobs:
            lane, job = self._jobs.pop(gone.number)
            message = job.message
            self._lanes.release(lane, self._monotonic())
            message.open_jobs -= 1
            if message not in struck:
                struck.add(message)
                message.deaths += 1
            if self._in_hand(message) and self._reread(message, job.recipients):
                self._try_again(message, lane.key, job, how)

    def _try_again(self, message: ActiveMessage, key: LaneKey, job: LaneJob, how: str) -> None:
        due = set(message.due())
        rest = tuple(index for index in job.recipients if index in due)
        fatal = message.deaths >= _DEATHS
        if key.transport == "bounce" and fatal:
            self._defer(message, self._clock() + self._config.retry.minimum)
        elif key.transport == "bounce" or not rest:
            self._settle_when_complete(message)
        elif fatal:
            self._postpone(LaneJob(message, rest), Deferred("4.3.0", f"delivery process {how}"))
        else:
            self._queue(message, key, rest)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _handled(self, queue_id: str) -> bool:
        """Whether a message is in hand, or something that the disk refused is to be repeated for it."""
        return queue_id in self._messages or queue_id in self._moves

    def _in_hand(self, message: ActiveMessage) -> bool:
        return self._messages.get(message.id) is message

    def _take(self, queue: Queue, queue_id: str) -> None:
        """Claim a message of which only the name is known, and go on with it."""
        if self._handled(queue_id):
            return
        self._agenda.drop(queue_id)

        def claimed(moved: bool) -> None:
            if moved:
                self._resume(queue_id)
            else:
                self._urgent.discard(queue_id)

        self._moves.do(queue_id, lambda: self._spool.claim(queue, queue_id), claimed)

    def _resume(self, queue_id: str) -> None:
        """Read a message of active and start what is left to do for it."""
        urgent = queue_id in self._urgent
        self._urgent.discard(queue_id)
        stored = self._files.load(queue_id)
        if stored is not None:
            states, envelope = stored.states, stored.envelope
            self._files.tell_doubts(envelope, states, range(len(states)))
            self._start(ActiveMessage(envelope, states, stored.head.content_size, self._clock(), urgent))

    def _start(self, message: ActiveMessage) -> None:
        """Make one job for each destination of a message that is in active."""
        self._messages[message.id] = message
        self._events.active(message)
        destinations: dict[LaneKey, list[int]] = {}
        for index in message.due():
            destinations.setdefault(self._lane_key(message.envelope.recipients[index].address), []).append(index)
        size = self._config.delivery.destination_recipients
        for key, indexes in destinations.items():
            for start in range(0, len(indexes), size):
                self._queue(message, key, tuple(indexes[start : start + size]))
        self._settle_when_complete(message)

    def _lane_key(self, address: str) -> LaneKey:
        domain = domain_of(address)
        if domain in self._local or not domain:
            return LaneKey("local", "")
        return LaneKey("smtp", self._rules.lane(domain))

    def _queue(self, message: ActiveMessage, key: LaneKey, recipients: tuple[int, ...]) -> None:
        job = LaneJob(message, recipients)
        message.open_jobs += 1
        reason = self._lanes.add(key, job, self._monotonic(), urgent=message.urgent)
        if reason is not None:
            self._backlog.append((job, reason))

    def _postpone(self, job: LaneJob, outcome: Deferred) -> None:
        """Defer the recipients of a job that was not tried, or not to its end."""
        message = job.message
        if not self._in_hand(message):
            return
        attempt = Attempt(self._clock(), tuple((index, outcome) for index in job.recipients))
        try:
            self._files.note(message, attempt)
        except (QueueFileDamaged, QueueFileUnfinished) as fault:
            self._let_go(message, fault)
            return
        message.record(attempt.outcomes)
        self._events.deferred(message, attempt)
        self._settle_when_complete(message)

    def _settle_when_complete(self, message: ActiveMessage) -> None:
        if message.open_jobs == 0 and self._in_hand(message):
            self._settle(message)

    def _settle(self, message: ActiveMessage) -> None:
        """All jobs of a message are done: what now? The decision is `mtad.retry.settle`'s."""
        verdict = settle(message.envelope, message.states, self._clock(), self._config.retry, self._random.random())
        if message.unwritten and not isinstance(verdict, Done):
            # What a later attempt, or the report, does not find in the file would be done again, or not be told.
            self._moves.do(
                message.id, lambda: self._files.write_down(message), lambda _: self._settle_when_complete(message)
            )
            return
        match verdict:
            case Done():
                self._leave(message, lambda: self._spool.remove(message.id), lambda _: self._events.removed(message.id))
            case RetryAt(when=when):
                self._defer(message, when)
            case Bounce():
                self._tell(message, verdict)

    def _defer(self, message: ActiveMessage, when: float) -> None:
        def deferred(moved: bool) -> None:
            if moved:
                self._agenda.set(message.id, when)

        self._leave(message, lambda: self._spool.defer(message.id, when), deferred)

    def _leave(self, message: ActiveMessage, move: Callable[[], bool], then: Callable[[bool], None]) -> None:
        """Do the last move of a message. It stays in hand until the disk lets it go: nobody else may pick it up."""

        def left(moved: bool) -> None:
            del self._messages[message.id]
            then(moved)

        self._moves.do(message.id, move, left)

    def _tell(self, message: ActiveMessage, verdict: Bounce) -> None:
        """Have the sender told what became of recipients; `_told` goes on."""
        if any(not isinstance(message.states[index].outcome, Failed) for index, _ in verdict.failed):
            self._events.expired(message)
        if message.envelope.kind == "double-bounce":
            why = "a notice to postmaster about an undeliverable report cannot be delivered itself"
            self._leave(
                message,
                lambda: self._spool.hold(Queue.ACTIVE, message.id),
                lambda _: self._events.held(message.id, why),
            )
            return
        about = (*verdict.failed, *verdict.delivered, *verdict.delayed)
        self._queue(message, LaneKey("bounce", ""), tuple(index for index, _ in about))

    def _told(self, message: ActiveMessage, result: Result) -> None:
        for reported in result.reports:
            message.told(reported)
            self._events.reported(message, reported)
        if result.reports:
            self._settle_when_complete(message)
        else:
            # The report could not be stored: the message stays and says so again when it is next due.
            self._defer(message, self._clock() + self._config.retry.minimum)

    def _reread(self, message: ActiveMessage, recipients: Sequence[int]) -> bool:
        """Take over what a dead delivery process has written into the queue file; False when that cannot be read."""
        try:
            message.states = list(self._spool.load(Queue.ACTIVE, message.id).states)
        except UNREADABLE as fault:
            self._let_go(message, fault)
            return False
        for attempt in message.unwritten:
            message.record(attempt.outcomes)
        self._files.tell_doubts(message.envelope, message.states, recipients)
        return True

    def _let_go(self, message: ActiveMessage, fault: Exception) -> None:
        """A message in hand cannot be read: its other jobs are dropped as they come up."""
        del self._messages[message.id]
        self._files.misread(Queue.ACTIVE, message.id, fault)
