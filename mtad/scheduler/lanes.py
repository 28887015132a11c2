"""Lanes: one queue of jobs per destination, served in turn. Pure data, no clock and no I/O of its own.

All times are seconds of one monotonic clock: a clock that is set back must not keep a destination suspended.

A lane is a transport and a next hop. Lanes that have work and may start it stand in a ring and are served one job at a
time, so a destination with a thousand messages takes its turn like one with a single message. How many jobs of one lane
may be under way is its *window*: it starts small, opens by one with each success up to the limit, closes by one with each
failure of the destination itself. At zero the lane is *suspended*: what waits in it is handed back, to be deferred together
with the reason, and for a pause nothing is tried. Then one job is let through as a probe, and the window opens again.

A lane that has been idle for a while is forgotten, so memory goes with the work, not with the history.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from mtad.delivery.jobs import TransportName
from mtad.outcome import Deferred, Outcome
from mtad.scheduler.active import ActiveMessage

#: Window of a lane that has not been seen before; Postfix's initial_destination_concurrency.
INITIAL_WINDOW: Final = 5
#: Seconds after which an idle lane is forgotten, and with it how far its window had opened.
IDLE_LANE: Final = 60.0


class LaneKey(msgspec.Struct, frozen=True):
    """What makes a lane: the transport, and the domain or next hop; "" for transports without."""

    transport: TransportName
    destination: str


class LaneJob(msgspec.Struct, eq=False):
    """A job in a lane: which recipients of which message."""

    message: ActiveMessage
    recipients: tuple[int, ...]


class Lane:
    """One destination; see the module."""

    def __init__(self, key: LaneKey, window: int) -> None:
        """An empty lane."""
        self.key = key
        self.waiting: deque[LaneJob] = deque()
        self.in_flight = 0
        self.window = window
        self.suspended_until = 0.0
        self.last_used = 0.0
        self.reason: Deferred | None = None

    @property
    def suspended(self) -> bool:
        """The destination failed until nothing was left of the window, and no probe has succeeded since."""
        return self.reason is not None and self.window == 0

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is under way."""
        return not self.waiting and not self.in_flight


class Lanes:
    """All lanes and the ring of those that can be served now."""

    def __init__(self, limit: int, pause: float) -> None:
        """``limit`` bounds each window; ``pause`` is how long a suspended lane is left alone, in seconds."""
        self._limit = limit
        self._pause = pause
        self._lanes: dict[LaneKey, Lane] = {}
        self._ring: OrderedDict[LaneKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def add(self, key: LaneKey, job: LaneJob, now: float, *, urgent: bool = False) -> Deferred | None:
        """Put a job at the end of its lane; or, when the lane is suspended, answer why it must wait instead.

        An ``urgent`` job (somebody asked for it) ends the suspension.
        """
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(key, min(INITIAL_WINDOW, self._limit))
        if lane.suspended:
            if not urgent and (now < lane.suspended_until or lane.in_flight):
                return lane.reason
            lane.window = 1  # the probe
        lane.waiting.append(job)
        lane.last_used = now
        self._refresh(lane)
        return None

    def take(self) -> tuple[Lane, LaneJob] | None:
        """The next job to start, or None when no lane may start one; `done`, `release` or `give_back` must follow."""
        if not self._ring:
            return None
        key, _ = self._ring.popitem(last=False)
        lane = self._lanes[key]
        job = lane.waiting.popleft()
        lane.in_flight += 1
        self._refresh(lane)
        return lane, job

    def done(self, lane: Lane, failure: Deferred | None, now: float) -> list[LaneJob]:
        """A job of this lane has ended; ``failure`` is why the destination as a whole could not be reached, if so.

        Returns:
            the jobs that wait in the lane, when this failure has suspended it: they are no longer in it.
        """
        lane.in_flight -= 1
        lane.last_used = now
        returned: list[LaneJob] = []
        if failure is None:
            lane.window = min(self._limit, lane.window + 1)
            lane.reason = None
        else:
            lane.reason = failure
            lane.window = max(0, lane.window - 1)
            if lane.window == 0:
                lane.suspended_until = now + self._pause
                returned.extend(lane.waiting)
                lane.waiting.clear()
        self._refresh(lane)
        return returned

    def release(self, lane: Lane, now: float) -> None:
        """A job of this lane has ended in a way that says nothing about the destination."""
        lane.in_flight -= 1
        lane.last_used = now
        self._refresh(lane)

    def give_back(self, lane: Lane, job: LaneJob) -> None:
        """Undo `take`: the job was not started, and its lane is the next in the ring again."""
        lane.in_flight -= 1
        lane.waiting.appendleft(job)
        self._refresh(lane)
        self._ring.move_to_end(lane.key, last=False)

    def forget(self, now: float) -> None:
        """Drop the lanes that have long been idle and are not suspended (any more)."""
        stale = [
            lane.key
            for lane in self._lanes.values()
            if lane.idle and now > max(lane.last_used, lane.suspended_until) + IDLE_LANE
        ]
        for key in stale:
            del self._lanes[key]

    def _refresh(self, lane: Lane) -> None:
        """Let the lane stand in the ring exactly when it may start a job; at its end when it enters."""
        if lane.waiting and lane.in_flight < lane.window:
            self._ring.setdefault(lane.key, None)
        else:
            self._ring.pop(lane.key, None)


def destination_failure(outcomes: Sequence[tuple[int, Outcome]]) -> Deferred | None:
    """Why a destination as a whole could not be reached, when that is what all its recipients say."""
    failure: Deferred | None = None
    for _, outcome in outcomes:
        if not isinstance(outcome, Deferred) or not outcome.destination:
            return None
        failure = outcome
    return failure
