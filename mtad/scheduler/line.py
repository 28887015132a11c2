"""The line of jobs that wait in one lane: by arrival, and a message with many jobs in turn with all the others.

The first job of each message stands in the order of arrival. The *further* jobs of a message, when it has more recipients
than one transaction takes, stand aside, each message's by themselves. One of the first and one of the further ones are
served alternately, and of these one of each message in turn. So whoever sends to ten thousand people delays a single
message by as much again as stood before it, at most, and a mailing has half of the lane for itself, or its share of it,
however many single messages keep coming.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping

import msgspec

from mtad.scheduler.active import ActiveMessage


class LaneJob(msgspec.Struct, eq=False):
    """A job in a lane: which recipients of which message. Times are of the scheduler's monotonic clock, in seconds."""

    message: ActiveMessage
    recipients: tuple[int, ...]
    further: bool = False
    """The message has other jobs in this lane, and this is not the first."""
    since: float = 0.0
    """When it began to wait."""
    started: float = 0.0
    """When it was taken to be delivered."""
    standing: str = ""
    """With which standing of its lane it was started, see `mtad.scheduler.places`."""
    shared: object = None
    """The group among whose jobs it counts while it is under way."""


class Line:
    """Jobs that wait; see the module. Iterates over all, in no order that matters."""

    __slots__ = ("_back", "_first", "_further", "_length", "_turn")

    def __init__(self) -> None:
        """An empty line."""
        self._first: deque[LaneJob] = deque()
        self._further: OrderedDict[ActiveMessage, deque[LaneJob]] | None = None
        self._back: list[LaneJob] = []
        self._turn = False  # of the further ones
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[LaneJob]:
        yield from self._back
        yield from self._first
        for jobs in (self._further or {}).values():
            yield from jobs

    def append(self, job: LaneJob) -> None:
        """A job begins to wait."""
        self._length += 1
        if not job.further:
            self._first.append(job)
            return
        if self._further is None:
            self._further = OrderedDict()
        self._further.setdefault(job.message, deque()).append(job)

    def popleft(self) -> LaneJob:
        """Take out the next; IndexError when there is none."""
        if self._back:
            self._length -= 1
            return self._back.pop()
        if self._further and (self._turn or not self._first):
            message, jobs = self._further.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self._further[message] = jobs
            self._turn = False
        else:
            job = self._first.popleft()
            self._turn = bool(self._further)
        self._length -= 1
        return job

    def put_back(self, job: LaneJob) -> None:
        """Undo `popleft`: the job is the next again."""
        self._back.append(job)
        self._length += 1

    def empty(self) -> list[LaneJob]:
        """Take out all, those that have come first before the others."""
        found = [*reversed(self._back), *self._first]
        for jobs in (self._further or {}).values():
            found.extend(jobs)
        self._first.clear()
        self._further = None
        self._back = []
        self._length = 0
        return found

    def oldest(self) -> float:
        """When the job that has waited the longest began to; 0: none waits."""
        heads = [*self._back, *([self._first[0]] if self._first else ())]
        heads += [jobs[0] for jobs in (self._further or {}).values()]
        return min((job.since for job in heads), default=0.0)

    def of(self, message: ActiveMessage) -> list[tuple[LaneJob, int]]:
        """The jobs of a message that wait here, each with how many others come before it if nothing else arrives."""
        found = [(job, place) for place, job in enumerate(reversed(self._back)) if job.message is message]
        further: Mapping[ActiveMessage, deque[LaneJob]] = self._further or {}
        count = sum(map(len, further.values()))
        # Of those aside so many come before the first one in order, and the other way round: they alternate.
        before = len(self._back)
        for place, job in enumerate(self._first):
            if job.message is message:
                found.append((job, before + place + min(count, place + self._turn)))
        if message in further:
            ahead = [0] * len(further[message])
            earlier = True
            for other, jobs in further.items():
                earlier = earlier and other is not message
                for turn in range(len(ahead)):
                    ahead[turn] += min(len(jobs), turn + earlier)
            for job, place in zip(further[message], ahead, strict=True):
                found.append((job, before + place + min(len(self._first), place + (not self._turn))))
        return found
