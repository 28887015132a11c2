"""What `mtaq why` and `mtaq show` find out about a message: out of its file, and from the scheduler.

The file says what happened, the scheduler what is in the way now. A message may move on between the two looks; where they
do not fit each other it is looked at once more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal

import msgspec

from mtad.address import domain_of
from mtad.cli.common import Source
from mtad.config import Config
from mtad.desk import (
    DESK_SOCKET,
    MOST_ASKED,
    Answer,
    AskLanes,
    AskMessages,
    Lanes,
    LaneView,
    Messages,
    MessageView,
    Question,
)
from mtad.errors import ConfigError, MtadError, QueueFileDamaged, QueueFileUnfinished
from mtad.net.desk import ask
from mtad.nexthop import Rules
from mtad.queue_causes import Facts, QueueName, SchedulerState
from mtad.spool.queue_file import StoredMessage
from mtad.spool.queue_id import is_queue_id
from mtad.spool.queues import LIVE, MASTER_LOCK, SCHEDULER_LOCK, Queue, Spool

#: Destinations that one question about lanes names: an answer has room for so many lanes.
_MOST_LANES: Final = 100

_NAMES: Final[Mapping[Queue, QueueName]] = {
    Queue.INCOMING: "incoming",
    Queue.ACTIVE: "active",
    Queue.DEFERRED: "deferred",
    Queue.HOLD: "hold",
}

Absence = Literal["missing", "damaged", "receiving", "unfinished", "unreadable"]


class Absent(msgspec.Struct, frozen=True):
    """There is no message to tell about."""

    queue_id: str
    cause: Absence
    text: str


class Found(msgspec.Struct, frozen=True):
    """A message, and where it lies; ``due`` is its file's time."""

    queue: Queue
    message: StoredMessage
    due: float


class Desk:
    """The scheduler of a spool, as far as it answers."""

    def __init__(self, spool: Spool) -> None:
        """Find out whether there is one."""
        self._path = os.path.join(spool.root, DESK_SOCKET)
        self.pid = spool.holder(SCHEDULER_LOCK) or 0
        self.state: SchedulerState = "running"
        if spool.holder(SCHEDULER_LOCK) is None:
            self.state = "down" if spool.holder(MASTER_LOCK) is None else "starting"

    def ask(self, question: Question) -> Answer | None:
        """The scheduler's answer; None when there is none. One who does not answer in time is not asked again."""
        answer = ask(self._path, question) if self.state == "running" else None
        if answer is None and self.state == "running":
            self.state = "silent"
        return answer

    def views(self, queue_ids: Sequence[str]) -> dict[str, MessageView]:
        """What the scheduler knows about these messages."""
        answer = self.ask(AskMessages(tuple(queue_ids))) if queue_ids else None
        return {view.id: view for view in answer.messages} if isinstance(answer, Messages) else {}

    def lanes(self, destinations: Iterable[str] = (), most: int = _MOST_LANES) -> Lanes | None:
        """How the lanes are: those to these destinations, or the busiest."""
        answer = self.ask(AskLanes(most, tuple(destinations)))
        return answer if isinstance(answer, Lanes) else None


class Look(msgspec.Struct, frozen=True):
    """What was seen at one moment, in seconds since the epoch."""

    at: float
    state: SchedulerState
    pid: int
    lanes: Lanes | None
    queues: Mapping[str, int]
    """Messages by queue."""


class Site:
    """A configuration, as far as it can be read, with its spool and its scheduler."""

    def __init__(self, source: Source) -> None:
        """Open the spool.

        Raises:
            MtadError: there is none.
        """
        self.spool = Spool(source.spool())
        self.config: Config | None = None
        self._rules: Rules | None = None
        self._local: frozenset[str] = frozenset()
        try:
            self.config = source.read()
            self._local = frozenset(name.lower() for name in self.config.local.domains)
            self._rules = Rules(self.config.delivery)
        except (ConfigError, MtadError):
            pass  # a running server must be seen even then
        self.desk = Desk(self.spool)

    def lane_of(self, address: str) -> str:
        """What deliveries to this address are counted by; "" for the mailboxes here."""
        domain = domain_of(address)
        if domain in self._local:
            return ""
        return domain if self._rules is None else self._rules.lane(domain)

    def look(self, queue_id: str) -> Found | Absent:
        """Find a message by its id."""
        if not is_queue_id(queue_id):
            return Absent(queue_id, "missing", "That is no queue id.")
        for _ in range(2):  # it may move on into a queue that was looked at before
            for queue in LIVE:
                try:
                    message = self.spool.load(queue, queue_id)
                except FileNotFoundError:
                    continue
                except QueueFileUnfinished:
                    return self._unfinished(queue, queue_id)
                except QueueFileDamaged as fault:
                    text = f"Its file in {queue.value} is damaged: {fault}. A running mtad moves it to corrupt."
                    return Absent(queue_id, "damaged", text)
                except OSError as fault:
                    return Absent(queue_id, "unreadable", f"Its file in {queue.value} cannot be read: {fault.strerror}.")
                return Found(queue, message, self._due(queue, queue_id))
        return self._gone(queue_id)

    def _due(self, queue: Queue, queue_id: str) -> float:
        if queue is not Queue.DEFERRED:
            return 0.0
        try:
            return self.spool.due(queue_id)
        except OSError:
            return 0.0

    def _unfinished(self, queue: Queue, queue_id: str) -> Absent:
        if self.spool.in_work(queue, queue_id):
            return Absent(queue_id, "receiving", "It is being received: its client has not sent all of it.")
        text = "Its client went away before it was complete, and was never told 250. Soon its file is removed."
        return Absent(queue_id, "unfinished", text)

    def _gone(self, queue_id: str) -> Absent:
        for name in self.spool.names(Queue.CORRUPT):
            if name.partition(".")[0] == queue_id:
                path = os.path.join(self.spool.root, Queue.CORRUPT.value, name)
                text = f"It is damaged, and kept for you to look at: {path}. It is not delivered, and nobody was told."
                return Absent(queue_id, "damaged", text)
        text = "It is not in the queue: it was delivered, returned or deleted, and the log says which."
        return Absent(queue_id, "missing", text)

    def gather(self, queue_ids: Sequence[str]) -> Iterator[Facts | Absent]:
        """What there is to know about these messages, in their order."""
        for start in range(0, len(queue_ids), MOST_ASKED):
            batch = queue_ids[start : start + MOST_ASKED]
            found = {queue_id: self.look(queue_id) for queue_id in batch}
            views = self.desk.views([name for name, one in found.items() if isinstance(one, Found)])
            moved = [name for name, one in found.items() if isinstance(one, Found) and _misfit(one, views.get(name))]
            if moved:
                found |= {queue_id: self.look(queue_id) for queue_id in moved}
                views |= self.desk.views(moved)
            lanes = self._lanes(found.values(), views)
            for queue_id in batch:
                one = found[queue_id]
                yield one if isinstance(one, Absent) else self._facts(one, views.get(queue_id), lanes)

    def _lanes(self, found: Iterable[Found | Absent], views: Mapping[str, MessageView]) -> dict[str, LaneView]:
        """The lanes of deferred recipients, by destination."""
        wanted: set[str] = set()
        for one in found:
            if isinstance(one, Found) and one.queue is Queue.DEFERRED and not _known(views.get(one.message.envelope.id)):
                pairs = zip(one.message.envelope.recipients, one.message.states, strict=True)
                wanted |= {self.lane_of(recipient.address) for recipient, state in pairs if not state.settled}
        names = sorted(wanted - {""})
        lanes: dict[str, LaneView] = {}
        for start in range(0, len(names), _MOST_LANES):
            answer = self.desk.lanes(names[start : start + _MOST_LANES])
            if answer is not None:
                lanes |= {lane.destination: lane for lane in answer.lanes if lane.transport == "smtp"}
        return lanes

    def _facts(self, found: Found, view: MessageView | None, lanes: Mapping[str, LaneView]) -> Facts:
        envelope = found.message.envelope
        places = [self.lane_of(recipient.address) for recipient in envelope.recipients] if lanes else []
        queue_id = envelope.id
        active = found.queue in {Queue.INCOMING, Queue.ACTIVE} and not _known(view)
        return Facts(
            queue=_NAMES[found.queue],
            envelope=envelope,
            states=found.message.states,
            events=found.message.events,
            now=time.time(),
            scheduler=self.desk.state,
            due=found.due,
            view=view,
            lanes={index: lanes[place] for index, place in enumerate(places) if place in lanes},
            retry=self.config.retry if self.config else None,
            in_work=active and self.spool.in_work(found.queue, queue_id),
            spool=self.spool.root,
            scheduler_pid=self.desk.pid,
        )


def _known(view: MessageView | None) -> bool:
    return view is not None and view.known


def _misfit(found: Found, view: MessageView | None) -> bool:
    """Whether a message has moved on between the look at its file and the scheduler's answer."""
    in_hand = found.queue in {Queue.INCOMING, Queue.ACTIVE}
    return view is not None and view.known is not in_hand and found.queue is not Queue.HOLD
