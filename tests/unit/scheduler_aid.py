"""What the tests of the scheduler share: a real spool, clocks that stand still, deliveries that the test plays."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mtad.config import Config, Delivery, Duration, Local, Retry
from mtad.delivery.jobs import Job, Result
from mtad.desk import OrderName
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.progress import Event, Reported
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.scheduler import Scheduler
from mtad.spool.queue_file import StoredMessage
from mtad.spool.queue_id import encode
from mtad.spool.queues import Queue, Spool

START = 1_700_000_000.0
RETRY = Retry(minimum=Duration(300), maximum=Duration(4000), lifetime=Duration(86400), bounce_lifetime=Duration(43200))
OK: Outcome = Delivered("2.0.0", "sent")
LATER = Deferred("4.2.0", "mailbox busy")
DEAD = Deferred("4.4.1", "connect to mx: refused", destination=True)
NEVER: Outcome = Failed("5.1.1", "no such user")


class Clock:
    """The wall's clock and the monotonic one; `advance` moves both."""

    def __init__(self) -> None:
        self.wall = START
        self.monotonic = 1000.0

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


class Recorder:
    """`mtad.scheduler.events.Events` that remembers what it was told: name, then what the event is about."""

    def __init__(self) -> None:
        self.said: list[tuple[str, ...]] = []

    def active(self, message: ActiveMessage) -> None:
        self.said.append(("active", message.id))

    def removed(self, queue_id: str) -> None:
        self.said.append(("removed", queue_id))

    def ordered(self, queue_id: str, what: OrderName) -> None:
        self.said.append(("ordered", queue_id, what))

    def expired(self, message: ActiveMessage) -> None:
        self.said.append(("expired", message.id))

    def deferred(self, message: ActiveMessage, attempt: Attempt) -> None:
        self.said.append(("deferred", message.id, *sorted({outcome.text for _, outcome in attempt.outcomes})))

    def reported(self, message: ActiveMessage, reported: Reported) -> None:
        self.said.append(("reported", message.id, reported.report))

    def in_doubt(self, queue_id: str, recipient: str, host: str, held: bool) -> None:
        self.said.append(("in_doubt", queue_id, recipient, host, *(["held"] if held else [])))

    def damaged(self, queue_id: str, queue: Queue, why: str) -> None:
        self.said.append(("damaged", queue_id, queue.value, why))

    def held(self, queue_id: str, why: str) -> None:
        self.said.append(("held", queue_id, why))

    def swept(self, queue_id: str) -> None:
        self.said.append(("swept", queue_id))

    def warning(self, text: str) -> None:
        self.said.append(("warning", text))

    def about(self, kind: str) -> list[tuple[str, ...]]:
        return [said[1:] for said in self.said if said[0] == kind]


class Deliveries:
    """A `Dispatcher` that keeps the jobs until the test says what became of them."""

    def __init__(self, capacity: int = 1000) -> None:
        self.capacity = capacity
        self.jobs: list[Job] = []
        self.log: list[Job] = []
        self._number = 0

    def dispatch(self, job: Job) -> int | None:
        if len(self.jobs) >= self.capacity:
            return None
        self._number += 1
        numbered = msgspec.structs.replace(job, number=self._number)
        self.jobs.append(numbered)
        self.log.append(numbered)
        return self._number


class World:
    """A scheduler and all around it."""

    def __init__(self, root: Path, **settings: Any) -> None:
        """``settings`` replace those of the configuration."""
        config = Config(
            hostname="mx.example.org",
            local=Local(domains=("Example.org",)),
            delivery=Delivery(destination_concurrency=20),
            retry=RETRY,
        )
        self.config = msgspec.structs.replace(config, **settings)
        self.root = root / "spool"
        self.spool = Spool(str(self.root), create=True)
        self.clock = Clock()
        self.events = Recorder()
        self.deliveries = Deliveries()
        self._ids = 0
        self.start()

    def start(self) -> None:
        """A scheduler begins (anew)."""
        self.deliveries.jobs.clear()
        self.scheduler = Scheduler(
            self.config, self.spool, self.events, lambda: self.clock.wall, lambda: self.clock.monotonic
        )

    # -- messages -----------------------------------------------------------------------------------------------------

    def envelope(self, *recipients: str, sender: str = "a@sender.test", **more: Any) -> Envelope:
        self._ids += 1
        return Envelope(
            id=encode(int(START * 1e6) + self._ids, 7),
            arrival=more.pop("arrival", self.clock.wall),
            sender=sender,
            recipients=tuple(Recipient(address) for address in recipients or ("b@far.test",)),
            **more,
        )

    def enter(self, *recipients: str, wake: bool = True, **more: Any) -> str:
        """Put a message into incoming and tell the scheduler; its queue id."""
        envelope = self.envelope(*recipients, **more)
        incoming = self.spool.enter(envelope)
        incoming.write(b"Subject: x\r\n\r\nhello\r\n")
        incoming.commit()
        if wake:
            self.scheduler.arrived(self.spool.load(Queue.INCOMING, envelope.id).head)
        return envelope.id

    def place(self, queue: Queue, *recipients: str, events: Sequence[Event] = (), **more: Any) -> str:
        """Put a message with a history into a queue and say nothing; its queue id."""
        queue_id = self.enter(*recipients, wake=False, **more)
        os.rename(self.path(Queue.INCOMING, queue_id), self.path(queue, queue_id))
        for event in events:
            self.spool.append(queue, queue_id, event)
        return queue_id

    def path(self, queue: Queue, queue_id: str) -> Path:
        return self.root / queue.value / queue_id

    def where(self, queue_id: str) -> list[str]:
        """The queues in which the file lies."""
        return [queue.value for queue in Queue if self.path(queue, queue_id).exists()]

    def load(self, queue: Queue, queue_id: str) -> StoredMessage:
        return self.spool.load(queue, queue_id)

    # -- deliveries ---------------------------------------------------------------------------------------------------

    def run(self) -> list[Job]:
        """Turn until nothing is left to do at once, and start what may start; the jobs under way."""
        while self.scheduler.turn():
            pass
        self.scheduler.dispatch(self.deliveries)
        return self.deliveries.jobs

    def finish(self, job: Job, *outcomes: Outcome, **more: Any) -> None:
        """A delivery ends: one outcome for each of the job's recipients, or one for all. It is written down first."""
        self.deliveries.jobs.remove(job)
        given = outcomes * len(job.recipients) if len(outcomes) == 1 else outcomes
        pairs = tuple(zip(job.recipients, given, strict=bool(outcomes)))
        if pairs and not more.get("unwritten"):
            self.spool.append(Queue.ACTIVE, job.queue_id, Attempt(self.clock.wall, pairs))
        self.scheduler.result(Result(job.number, pairs, **more))

    def report(self, job: Job, report: str = "report") -> None:
        """A bounce job ends well."""
        reported = Reported(self.clock.wall, job.recipients, report)
        self.spool.append(Queue.ACTIVE, job.queue_id, reported)
        self.finish(job, reports=(reported,))

    def deliver(self, *outcomes: Outcome) -> None:
        """Run, and finish every job that is under way then."""
        for job in list(self.run()):
            self.finish(job, *outcomes)


def refuse(spool: Spool, name: str, error: OSError) -> Callable[[], None]:
    """Let a method of a spool raise, as a disk that refuses would; the answer undoes it."""

    def refusing(*_: object, **__: object) -> bool:
        raise error

    setattr(spool, name, refusing)
    return lambda: delattr(spool, name)
