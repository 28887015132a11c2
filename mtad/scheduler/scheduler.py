"""The scheduler: owns the spool, decides who is due, and gives the work to the delivery processes.

One thread, one loop. What it does itself is short: a rename, an unlink, a few lines in a table; whatever waits for a
network or for a flush of the disk is done by a delivery process. Each turn of the loop takes a bounded slice of every
kind of work, so a new message for a healthy host is never behind a thousand that are not.

The life of a message here::

    wake-up or scan -> claim -> `_start`: one job per destination -> lanes -> delivery -> results -> `_settle`
        Done     the file is removed
        RetryAt  the file moves to deferred/, its mtime is the next attempt
        Kept     the file moves to hold/: all that is left is in doubt, and held for a human
        Bounce   a job for the transport "bounce"; when the report is committed, `_settle` again

What is known about a recipient stands in the queue file before it is known here, so a scheduler that dies loses nothing:
the next one reads active/ (`restore`), waits for deliveries that still hold a file, and goes on. When a delivery process
could not write down what it did, the message does not leave active/ before that is made good.

Two clocks: when messages are due and expire is the wall's, as the files have it, but for leaps (`mtad.scheduler.leaps`);
pauses are measured on a clock that nobody sets, and a next attempt further away than any policy wants is brought near.

Errors: a damaged file is moved to corrupt/ and logged. A move that the disk refuses is tried again, see
`mtad.scheduler.moves`; the message stays in hand meanwhile, and nothing else stops for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from mtad.config import Config
from mtad.delivery.jobs import Job, Result
from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.nexthop import Rules
from mtad.outcome import Attempt, Deferred
from mtad.progress import Event, RecipientState, ordered
from mtad.retry import JITTER, LONGEST_HINT, expired
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.desk import Clerk
from mtad.scheduler.destinations import Destinations
from mtad.scheduler.events import Events
from mtad.scheduler.files import UNREADABLE, Files
from mtad.scheduler.hand import Hand
from mtad.scheduler.lane import Lane, LaneKey
from mtad.scheduler.lanes import Lanes
from mtad.scheduler.leaps import Leaps
from mtad.scheduler.line import LaneJob
from mtad.scheduler.orders import Orders
from mtad.scheduler.settling import Settling
from mtad.spool.queue_file import Head
from mtad.spool.queues import Queue, Spool

#: More than this many messages in hand, and deferred ones wait (new ones never do). Postfix's qmgr_message_active_limit.
ACTIVE_LIMIT: Final = 20000
#: Messages of each kind that one turn of the loop takes: deferred ones that are due, ones of a suspended lane.
TURN: Final = 50
#: Seconds in hand for a last attempt of a message whose time is over.
_LAST_WAIT: Final = 60.0
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
        hand = Hand(spool, events, clock, monotonic)
        self._config = config
        self._spool = spool
        self._events = events
        self._clock = clock
        self._monotonic = monotonic
        self._messages = hand.messages
        self._moves = hand.moves
        self._urgent = hand.urgent
        self._agenda = hand.agenda
        self._jobs: dict[int, tuple[Lane, LaneJob]] = {}
        self._backlog: deque[tuple[LaneJob, Deferred]] = deque()
        self._files = Files(spool, events, self._moves, self.restore, hold=config.retry.on_doubt == "hold")
        self._leaps = Leaps(clock, monotonic, self._agenda, events.warning)
        rules = Rules(config.delivery)
        places = config.delivery.processes * config.delivery.threads
        self._lanes = Lanes(rules, config.retry.destination_pause, config.retry.maximum, places)
        self._destinations = Destinations(rules, config.local.domains, self._lanes, monotonic)
        self._orders = Orders(hand, self._files, self._resume, self._take)
        self._settling = Settling(config.retry, hand, self._files, self._orders, self._queue, self._leaps)
        self.clerk = Clerk(self._orders, hand, self._jobs, self._lanes, self._destinations.key)

    def __len__(self) -> int:
        """How many messages are in hand."""
        return len(self._messages)

    def begin(self, cut: float) -> None:
        """What has not changed since ``cut``, a time of the wall's clock, may have been delivered; see `LifeMark`."""
        self._files.cut = cut

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
        latest = self._clock() + max(self._config.retry.maximum, LONGEST_HINT) * (1 + JITTER)
        # Sooner on the agenda already: the clock was set back since.
        if queue_id not in self._agenda or mtime < self._agenda.time_of(queue_id):
            self._agenda.set(queue_id, min(mtime, latest))

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
        self._leaps.look()
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
        """Seconds until `turn` or `dispatch` has something to do, if nothing happens before; None when never."""
        waits = [wait for wait in (self._moves.wait(), self._lanes.wait(self._monotonic())) if wait is not None]
        due = self._agenda.next_time()
        if due is not None and len(self._messages) < ACTIVE_LIMIT:
            waits.append(max(0.0, due - self._clock()))
        return min(waits, default=None)

    def dispatch(self, dispatcher: Dispatcher) -> None:
        """Start as many jobs as the lanes allow and the delivery processes take."""
        now = self._monotonic()
        while (taken := self._lanes.take(now)) is not None:
            lane, job = taken
            message = job.message
            if not self._in_hand(message) or message.order:  # damaged, or not to be delivered (by this job)
                self._lanes.cancel(lane, job)
                message.open_jobs -= 1
                continue
            arrival = self._leaps.aged(message.envelope).arrival
            number = dispatcher.dispatch(self._destinations.job(lane, job, arrival))
            if number is None:
                self._lanes.give_back(lane, job)
                return
            self._jobs[number] = (lane, job)
            message.flying += 1

    def keep_house(self) -> None:
        """To be called now and then: forget what is no longer needed, give up what waits in a lane beyond its life."""
        self._lanes.forget(self._monotonic())
        now, retry = self._clock(), self._config.retry
        for message in list(self._messages.values()):
            waits = message.open_jobs and not (message.flying or message.order or message.reporting)
            if waits and now >= message.claimed + _LAST_WAIT and expired(self._leaps.aged(message.envelope), now, retry):
                self._messages[message.id] = message.anew()
                self._settling.settle(self._messages[message.id])

    # -- what comes back ----------------------------------------------------------------------------------------------

    def result(self, result: Result) -> None:
        """A delivery process has done a job; what it brought stands in the queue file, unless it says otherwise."""
        lane, job = self._jobs.pop(result.number)
        message = job.message
        self._backlog.extend(self._destinations.done(lane, job, result))
        message.open_jobs -= 1
        message.flying -= 1
        self.clerk.count(result.outcomes)
        if not self._in_hand(message):
            return
        if result.damaged:
            self._let_go(message, QueueFileDamaged(result.damaged))
        elif lane.key.transport == "bounce":
            self._settling.told(message, result)
        else:
            message.record(result.outcomes)
            if result.unwritten:
                message.unwritten.append(Attempt(self._clock(), result.outcomes))
            self._settling.when_complete(message)

    def late(self, job: Job, result: Result) -> None:
        """A delivery process has done a job, and the spool is another scheduler's by now, who goes by the file."""
        if not result.unwritten:
            return
        events: list[Event] = [Attempt(self._clock(), result.outcomes)] if result.outcomes else []
        events += result.reports
        self._files.last_word(job.queue_id, events)

    def put_down(self) -> None:
        """It ends: write down, for the last time, what delivery processes could not, and the files do not say yet."""
        for message in self._messages.values():
            if message.unwritten:
                self._files.last_word(message.id, message.unwritten)

    def died(self, jobs: Sequence[Job], how: str) -> None:
        """A delivery process is gone: its work is taken back, as far as the queue files say that it was not done."""
        struck: set[ActiveMessage] = set()
        for gone in jobs:
            lane, job = self._jobs.pop(gone.number)
            message = job.message
            self._lanes.release(lane, job, self._monotonic())
            message.open_jobs -= 1
            message.flying -= 1
            if message not in struck:
                struck.add(message)
                message.deaths += 1
            if self._in_hand(message) and self._reread(message, job.recipients):
                self._try_again(message, lane.key, job, how)

    def _try_again(self, message: ActiveMessage, key: LaneKey, job: LaneJob, how: str) -> None:
        due = set(message.due())
        rest = tuple(index for index in job.recipients if index in due)
        fatal = message.deaths >= _DEATHS
        if message.order:
            self._settling.when_complete(message)
        elif key.transport == "bounce" and fatal:
            self._settling.defer(message, self._clock() + self._config.retry.minimum)
        elif key.transport == "bounce" or not rest:
            self._settling.when_complete(message)
        elif fatal:
            self._postpone(LaneJob(message, rest), Deferred("4.3.0", f"delivery process {how}"))
        else:
            self._queue(key, LaneJob(message, rest))

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
            message = ActiveMessage(stored.envelope, stored.states, stored.head.content_size, self._clock(), urgent)
            cut = stored.cut or self._files.unchanged_since_cut(stored.envelope)
            self._files.find_doubts(message, range(len(message.states)), self._clock(), cut=cut)
            message.order = ordered(stored.events)
            self._start(message)

    def _start(self, message: ActiveMessage) -> None:
        """Make one job for each destination of a message that is in active."""
        self._messages[message.id] = message
        self._events.active(message)
        message.order = self._orders.remembered(message.id) or message.order
        for key, job in self._destinations.jobs(message):
            self._queue(key, job)
        self._settling.when_complete(message)

    def _queue(self, key: LaneKey, job: LaneJob) -> None:
        message = job.message
        message.open_jobs += 1
        reason = self._lanes.add(key, job, self._monotonic(), urgent=message.urgent)
        if reason is not None:
            self._backlog.append((job, reason))

    def _postpone(self, job: LaneJob, outcome: Deferred) -> None:
        """Defer the recipients of a job that was not tried, or not to its end."""
        message = job.message
        if not self._in_hand(message):
            return
        told = tuple((index, outcome) for index in job.recipients)
        attempt = Attempt(self._clock(), told, active=message.claimed)
        try:
            self._files.note(message, attempt)
        except (QueueFileDamaged, QueueFileUnfinished) as fault:
            self._let_go(message, fault)
            return
        message.record(attempt.outcomes)
        self.clerk.count(attempt.outcomes)
        self._events.deferred(message, attempt)
        self._settling.when_complete(message)

    def _reread(self, message: ActiveMessage, recipients: Sequence[int]) -> bool:
        """Take over what a dead delivery process has written into the queue file; False when that cannot be read."""
        try:
            message.states = list(self._spool.load(Queue.ACTIVE, message.id).states)
        except UNREADABLE as fault:
            self._let_go(message, fault)
            return False
        message.replay_unwritten()
        self._files.find_doubts(message, recipients, self._clock())
        return True

    def _let_go(self, message: ActiveMessage, fault: Exception) -> None:
        """A message in hand cannot be read: its other jobs are dropped as they come up."""
        del self._messages[message.id]
        self._files.misread(Queue.ACTIVE, message.id, fault)
