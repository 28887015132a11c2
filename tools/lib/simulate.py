"""The simulator: the real scheduler, a clock that jumps, destinations that follow a script.

What is real: every decision, that is `mtad.scheduler.scheduler.Scheduler` with its lanes, agenda and waits, and
`mtad.retry`. What is played: the disk (`sim_spool`), the deliveries and the world (`sim_world`). Nothing sleeps, so a day
takes minutes. The same seed gives the same day.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, cast

import msgspec

from mtad.config import Config, Delivery
from mtad.delivery.jobs import Job, Result
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Attempt, Deferred, Delivered, Outcome
from mtad.progress import Reported
from mtad.scheduler.scheduler import Scheduler
from mtad.spool.queue_id import encode
from mtad.spool.queues import Queue, Spool
from tools.lib.sim_spool import MemorySpool
from tools.lib.sim_world import Destination, Kind, make

START: Final = 1_700_000_000.0
#: Seconds between two rounds of the scheduler's housekeeping, as in `mtad.scheduler.process`.
HOUSEKEEPING: Final = 10.0
#: A job that is ready for longer than this (seconds) and is not started, while its destination is well, has starved.
STARVED: Final = 600.0
#: Recipients of a mailing; there are `MAILINGS` of them, to one steady destination each.
MAILING: Final = 1000
MAILINGS: Final = 5


class Plan(msgspec.Struct, frozen=True):
    """What is simulated."""

    seed: int
    messages: int = 1_000_000
    domains: int = 10_000
    hours: float = 24.0
    without: frozenset[Kind] = frozenset()
    """Kinds of destinations that are steady instead, to compare."""
    config: Config = Config(hostname="mx.example.org")


class Waits:
    """How long the recipients of one kind of destination waited, in seconds, from arrival to delivery."""

    def __init__(self) -> None:
        self.seconds = array("f")
        self.deferred = 0
        self.bounced = 0
        self.starved = 0
        self.ready = 0.0
        """The longest that a job was ready and not started."""

    def at(self, part: float) -> float:
        """The wait within which this part of all were done; 0 when there were none."""
        if not self.seconds:
            return 0.0
        ordered = sorted(self.seconds)
        return float(ordered[min(len(ordered) - 1, math.ceil(part * len(ordered)) - 1)])


class Silent:
    """`mtad.scheduler.events.Events`; warnings are kept, for there should be none."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def _nothing(self, *_: object) -> None:
        pass

    active = removed = expired = deferred = reported = in_doubt = damaged = held = swept = ordered = _nothing

    def warning(self, text: str) -> None:
        """Something odd."""
        self.warnings.append(text)


class Simulation:
    """One run; see the module."""

    def __init__(self, plan: Plan, progress: Callable[[float], None] | None = None) -> None:
        """``progress`` is told how far the day has come, 0 to 1, now and then."""
        self.plan = plan
        self.span = plan.hours * 3600.0
        self.now = 0.0
        self.spool = MemorySpool()
        self.events = Silent()
        self.destinations = make(plan.domains, random.Random(f"{plan.seed} world"), self.span, without=plan.without)
        self._of = {destination.name: destination for destination in self.destinations}
        self.waits: dict[str, Waits] = {}
        self.arrived = 0
        self.delivered = 0
        self.bounced = 0
        self.attempts = 0
        self.most: Counter[str] = Counter()
        """The most jobs that were in flight at a time, by destination."""
        self.probes: dict[str, list[float]] = {}
        """When attempts at a dead destination began, by its name."""
        self._progress = progress
        self._in_flight: Counter[str] = Counter()
        self._free = plan.config.delivery.processes * plan.config.delivery.threads
        self._ends: list[tuple[float, int, Job, tuple[Outcome, ...]]] = []
        self._numbers = itertools.count(1)
        self._outcomes = random.Random(f"{plan.seed} outcomes")
        self.scheduler = Scheduler(
            plan.config, cast(Spool, self.spool), self.events, lambda: START + self.now, lambda: self.now
        )
        self.scheduler._settling.random = random.Random(f"{plan.seed} jitter")

    def run(self) -> None:
        """The day, and as long after it as something is left in the queue."""
        coming = self._arrivals()
        following = next(coming, None)
        housekeeping = HOUSEKEEPING
        told = 0.0
        while True:
            while self.scheduler.turn():
                self.scheduler.dispatch(self)
            self.scheduler.dispatch(self)
            times = [housekeeping]
            if following is not None:
                times.append(following.arrival - START)
            if self._ends:
                times.append(self._ends[0][0])
            if (wait := self.scheduler.wait()) is not None:
                times.append(self.now + wait)
            elif len(times) == 1 and not self.spool.entries:
                return
            self.now = max(self.now, min(times))
            while following is not None and following.arrival - START <= self.now:
                self._arrive(following)
                following = next(coming, None)
            while self._ends and self._ends[0][0] <= self.now:
                self._end(heapq.heappop(self._ends))
            if self.now >= housekeeping:
                housekeeping = self.now + HOUSEKEEPING
                self.scheduler.keep_house()
            if self._progress is not None and self.now >= told:
                told = self.now + self.span / 200
                self._progress(min(1.0, self.now / self.span))

    @property
    def left(self) -> int:
        """Messages that are still in the queue."""
        return len(self.spool.entries)

    # -- what comes in ------------------------------------------------------------------------------------------------

    def _arrivals(self) -> Iterator[Envelope]:
        """The messages in their order; more by day than by night, few destinations with most of them."""
        rng = random.Random(f"{self.plan.seed} mail")
        names = [destination.name for destination in self.destinations]
        rng.shuffle(names)
        total = list(itertools.accumulate(1.0 / (rank + 10) for rank in range(len(names))))
        whole = make(self.plan.domains, random.Random(f"{self.plan.seed} world"), self.span)
        steady = [one.name for one in whole if one.kind == "steady"]
        mailings = {int(self.plan.messages * (n + 0.5) / MAILINGS): steady[n % len(steady)] for n in range(MAILINGS)}
        mean = self.span / self.plan.messages
        at = 0.0
        for number in range(self.plan.messages):
            at += rng.expovariate(1.0) * mean / (1.0 + 0.8 * math.sin(2 * math.pi * at / self.span))
            if number in mailings:
                recipients = tuple(Recipient(f"r{n}@{mailings[number]}") for n in range(MAILING))
            else:
                count = 1 if rng.random() < 0.98 else rng.randint(2, 20)
                domains = rng.choices(names, cum_weights=total, k=count)
                recipients = tuple(Recipient(f"r{n}@{domain}") for n, domain in enumerate(domains))
            yield Envelope(encode(int((START + at) * 1e6), number % 1_000_000), START + at, "a@example.org", recipients)

    def _arrive(self, envelope: Envelope) -> None:
        self.arrived += len(envelope.recipients)
        self.scheduler.arrived(self.spool.add(envelope, 4096))

    # -- deliveries ---------------------------------------------------------------------------------------------------

    def dispatch(self, job: Job) -> int | None:
        """Start a job; see `mtad.scheduler.scheduler.Dispatcher`."""
        if not self._free:
            return None
        self._free -= 1
        number = next(self._numbers)
        job = msgspec.structs.replace(job, number=number)
        if job.transport == "bounce":
            heapq.heappush(self._ends, (self.now + 0.01, number, job, ()))
            return number
        self.attempts += 1
        destination = self._of[job.destination]
        self._note_start(destination, job)
        duration, outcomes = destination.attempt(self.now, job.queue_id, len(job.recipients), self._outcomes)
        heapq.heappush(self._ends, (self.now + duration, number, job, tuple(outcomes)))
        return number

    def _note_start(self, destination: Destination, job: Job) -> None:
        name = destination.name
        self._in_flight[name] += 1
        self.most[name] = max(self.most[name], self._in_flight[name])
        waits = self._waits(destination)
        ready = START + self.now - job.active
        waits.ready = max(waits.ready, ready)
        waits.starved += ready > STARVED and destination.healthy(self.now)
        if destination.kind == "dead" and not destination.healthy(self.now):
            self.probes.setdefault(name, []).append(self.now)

    def _end(self, end: tuple[float, int, Job, tuple[Outcome, ...]]) -> None:
        _, number, job, outcomes = end
        self._free += 1
        if job.transport == "bounce":
            self._report(job, number)
            return
        self._in_flight[job.destination] -= 1
        pairs = tuple(zip(job.recipients, outcomes, strict=True))
        self.spool.append(Queue.ACTIVE, job.queue_id, Attempt(START + self.now, pairs))
        waits = self._waits(self._of[job.destination])
        arrival = self.spool.load(Queue.ACTIVE, job.queue_id).envelope.arrival
        for outcome in outcomes:
            if isinstance(outcome, Delivered):
                self.delivered += 1
                waits.seconds.append(START + self.now - arrival)
            elif isinstance(outcome, Deferred):
                waits.deferred += 1
        self.scheduler.result(Result(number, pairs))

    def _report(self, job: Job, number: int) -> None:
        reported = Reported(START + self.now, job.recipients, "report")
        self.spool.append(Queue.ACTIVE, job.queue_id, reported)
        envelope = self.spool.load(Queue.ACTIVE, job.queue_id).envelope
        for index in job.recipients:
            self._waits(self._of[envelope.recipients[index].address.partition("@")[2]]).bounced += 1
        self.bounced += len(job.recipients)
        self.scheduler.result(Result(number, reports=(reported,)))

    def _waits(self, destination: Destination) -> Waits:
        return self.waits.setdefault(destination.kind, Waits())


def delivery(**settings: object) -> Config:
    """A configuration with these settings of ``[delivery]``."""
    return Config(hostname="mx.example.org", delivery=msgspec.structs.replace(Delivery(), **settings))
