"""Lanes: one queue of jobs per destination, served in turn. Pure data, no clock and no I/O of its own.

All times are seconds of one monotonic clock: a clock that is set back must not keep a destination suspended.

A lane is a transport and a next hop. Lanes that have work and may start it stand in a ring and are served one job at a
time, so a destination with a thousand messages takes its turn like one with a single message. Which job of a lane is the
next is said in `mtad.scheduler.line`, how many may be under way, and how many may start in a time, in
`mtad.scheduler.budgets`.

When failures of the destination have closed the window of a lane, it is *suspended*: what waits in it is handed back, to be
deferred together with the reason, and for a pause nothing is tried. Then one job is let through as a probe, and the window
opens again, one by one. A destination that refuses to talk to a single job, because that were too much, and does so
`REFUSALS` times in a row, is suspended as well.

Lanes whose mail is taken by the hosts of one policy (`mtad.nexthop.Group`) share a second budget, and have one place in the
ring together: to those hosts they are one destination. Which host takes the mail of a domain comes with the first result;
before, one job at a time goes there, and what it took is put on the account of the group afterwards. It is remembered for
`REMEMBERED`, as is that a destination wants our mail over IPv4 only.

No more wait in a lane than its rate lets go until a deferred message comes back, nor in a group: what is more is to be
deferred, so that it does not take the places of mail for others.

A lane that waits for its rate stands in no ring, only in a heap by time, so it costs nothing; nor does one that has no
place left. Who may take the places of the delivery processes is said in `mtad.scheduler.places`. A lane that has been idle
for a while is forgotten, so memory goes with the work, not with the history; one that failed after a longer while, or its
window would have to be closed anew by each message that comes back.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from mtad.config import DAY, HOUR
from mtad.nexthop import Group, Rules
from mtad.outcome import Deferred, Outcome
from mtad.scheduler.budgets import Budget
from mtad.scheduler.lane import Lane, LaneKey, Shared
from mtad.scheduler.line import LaneJob
from mtad.scheduler.memory import Memory
from mtad.scheduler.places import Places

#: Seconds after which an idle lane is forgotten, and with it how far its window had opened.
IDLE_LANE: Final = 60.0
#: The same for one that failed last: longer than the longest wait of a deferred message.
DEAD_LANE: Final = 2 * HOUR
#: Refusals in a row, each of one job at a time, that suspend a lane.
REFUSALS: Final = 5
#: Jobs that may wait for a rate in any case.
WAITING: Final = 100
#: Seconds for which it is remembered who takes the mail of a domain, and which destinations want IPv4.
REMEMBERED: Final = DAY
#: Of so many destinations each, some 300 octets for one.
MEMORY: Final = 20_000


class Lanes:
    """All lanes and the ring of those that can be served now."""

    def __init__(self, rules: Rules, pause: float, horizon: float = DAY, places: int = 1000) -> None:
        """Prepare.

        Args:
            rules: the limits.
            pause: how long a suspended lane is left alone, in seconds.
            horizon: after how many seconds a deferred message comes back at the latest.
            places: jobs that all delivery processes together take.
        """
        self._places = Places(places)
        self._rules = rules
        self._pause = pause
        self._horizon = horizon
        self._lanes: dict[LaneKey, Lane] = {}
        self._ring: OrderedDict[Lane | Shared, None] = OrderedDict()
        self._shared: dict[str, Shared] = {}
        self._timers: list[tuple[float, int, Lane | Shared]] = []
        self._numbers = itertools.count()
        self._hosts: Memory[LaneKey, str] = Memory(MEMORY, REMEMBERED)
        self.ipv4: Memory[LaneKey, bool] = Memory(MEMORY, REMEMBERED)
        """Who wants our mail over IPv4 only."""

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def get(self, key: LaneKey) -> Lane | None:
        """The lane, if there is one."""
        return self._lanes.get(key)

    def recipients(self, key: LaneKey, now: float) -> int:
        """How many recipients one job of this lane may have."""
        host = (self._hosts.get(key, now) or "") if self._rules.grouped else ""
        return self._rules.recipients(key.destination, host)

    def add(self, key: LaneKey, job: LaneJob, now: float, *, urgent: bool = False) -> Deferred | None:
        """Put a job at the end of its lane; or answer why it must be deferred: the lane is suspended, or has too much.

        An ``urgent`` job (somebody asked for it) is put there in any case.
        """
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = self._new(key, now)
        if lane.suspended:
            if not urgent and (now < lane.suspended_until or lane.budget.in_flight):
                return lane.reason
            lane.budget.window = 1  # the probe
        if not urgent and (over := self._overfull(lane)) is not None:
            return over
        job.since = now
        lane.waiting.append(job)
        if lane.shared is not None:
            lane.shared.waiting += 1
        lane.last_used = now
        self._refresh(lane)
        return None

    def take(self, now: float) -> tuple[Lane, LaneJob] | None:
        """The next job to start, or None when no lane may start one.

        `done`, `release`, or at once `give_back` or `cancel` must follow.
        """
        self._wake(now)
        taken = self._take(now)
        if taken is None:
            self._call_back()  # a lane that was called before the last one may have had no use for its place
            taken = self._take(now)
        return taken

    def _take(self, now: float) -> tuple[Lane, LaneJob] | None:
        while self._ring:
            turn, _ = self._ring.popitem(last=False)
            lane = None if self._waits(turn, now) else turn if isinstance(turn, Lane) else self._lane_of(turn, now)
            if lane is None or self._places.put_aside(lane):
                continue
            job = lane.waiting.popleft()
            job.started = now
            job.shared = lane.shared
            job.standing = self._places.start(lane)
            lane.budget.start(now)
            if lane.shared is not None:
                lane.shared.waiting -= 1
                lane.shared.budget.start(now)
            self._refresh(lane)
            return lane, job
        return None

    def wait(self, now: float) -> float | None:
        """Seconds until `take` has perhaps something that it has not now, if nothing happens before; None: never."""
        return max(0.0, self._timers[0][0] - now) if self._timers else None

    def done(
        self,
        lane: Lane,
        job: LaneJob,
        now: float,
        *,
        failure: Deferred | None = None,
        less: Outcome | None = None,
        host: str = "",
    ) -> list[LaneJob]:
        """A job has ended.

        Args:
            lane: from `take`.
            job: from `take`.
            now: the time.
            failure: why the destination as a whole could not be reached, if so.
            less: the reply by which it asks for less at a time, if it does.
            host: who takes the mail of this destination; "" when that was not found out.

        Returns:
            the jobs that wait in the lane, when this failure has suspended it: they are no longer in it.
        """
        self._end(lane, job, now)
        if host:
            self._learn(lane, job, host, now)
        self._judge(lane, job, now, failure, less)
        if lane.works:
            self._places.leave(lane)
        returned: list[LaneJob] = []
        if lane.suspended:
            lane.suspended_since = lane.suspended_since or now
            lane.suspended_until = now + self._pause
            returned = lane.waiting.empty()
            if lane.shared is not None:
                lane.shared.waiting -= len(returned)
        elif failure is None or less is not None:
            lane.suspended_since = 0.0
        self._refresh(lane)
        return returned

    def release(self, lane: Lane, job: LaneJob, now: float) -> None:
        """A job has ended in a way that says nothing about the destination."""
        self._end(lane, job, now)
        self._refresh(lane)

    def give_back(self, lane: Lane, job: LaneJob) -> None:
        """Undo the last `take`: the job was not started, and its lane is the next in the ring again."""
        self._undo(lane, job)
        lane.waiting.put_back(job)
        if lane.shared is not None:
            lane.shared.waiting += 1
        self._refresh(lane)
        if lane.shared is not None:
            lane.shared.ring.move_to_end(lane, last=False)
        self._ring.move_to_end(lane if lane.shared is None else lane.shared, last=False)

    def cancel(self, lane: Lane, job: LaneJob) -> None:
        """Undo the last `take` and drop the job: nobody wants it done any more."""
        self._undo(lane, job)
        self._refresh(lane)

    def forget(self, now: float) -> None:
        """Drop the lanes that have long been idle, are not suspended (any more), and have no rate to keep account of."""
        dead = DEAD_LANE if len(self._lanes) <= MEMORY else IDLE_LANE
        stale = [
            lane.key
            for lane in self._lanes.values()
            if lane.idle
            and now > max(lane.last_used, lane.suspended_until) + (dead if lane.failing else IDLE_LANE)
            and (lane.budget.bucket is None or now >= lane.budget.bucket.full)
        ]
        for key in stale:
            del self._lanes[key]
        self._hosts.forget(now)
        self.ipv4.forget(now)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _new(self, key: LaneKey, now: float) -> Lane:
        if key.transport != "smtp":
            return Lane(key, Budget(self._rules.concurrency))
        rule = self._rules.of(key.destination)
        budget = Budget(rule.concurrency or self._rules.concurrency, rule.rate)
        if not self._rules.grouped:
            return Lane(key, budget)
        host = self._hosts.get(key, now)
        group = self._rules.group(key.destination, host or "")
        return Lane(key, budget, self._shared_of(group), unknown=host is None and group is None)

    def _shared_of(self, group: Group | None) -> Shared | None:
        if group is None:
            return None
        shared = self._shared.get(group.name)
        if shared is None:
            budget = Budget(group.concurrency or self._rules.concurrency, group.rate)
            shared = self._shared[group.name] = Shared(group, budget)
        return shared

    def _overfull(self, lane: Lane) -> Deferred | None:
        """Why no other job may wait in a lane, if so."""
        waiting = [(lane.budget.bucket, len(lane.waiting))]
        if lane.shared is not None:
            waiting.append((lane.shared.budget.bucket, lane.shared.waiting))
        for bucket, count in waiting:
            if bucket is not None and count >= max(WAITING, bucket.within(self._horizon)):
                text = (
                    f"the rate of {bucket.rate.text} for {lane.key.destination} is used up: {count} messages wait before it"
                )
                return Deferred("4.4.5", text)
        return None

    def _learn(self, lane: Lane, job: LaneJob, host: str, now: float) -> None:
        """Who takes the mail of a lane is known, and so is whether it is in a group."""
        if not self._rules.grouped or lane.key.transport != "smtp":
            return
        self._hosts.learn(lane.key, host, now)
        lane.unknown = False
        shared = self._shared_of(self._rules.group(lane.key.destination, host))
        if shared is lane.shared:
            return
        self._places.leave(lane)
        for ring in (self._ring, lane.shared.ring if lane.shared else {}):
            ring.pop(lane, None)
        if lane.shared is not None:
            lane.shared.waiting -= len(lane.waiting)
            self._refresh_shared(lane.shared)
        lane.shared = shared
        if shared is None:
            return
        shared.waiting += len(lane.waiting)
        if job.shared is not shared and shared.budget.bucket is not None:
            shared.budget.bucket.take(now)  # it has been started already

    @staticmethod
    def _judge(lane: Lane, job: LaneJob, now: float, failure: Deferred | None, less: Outcome | None) -> None:
        """Change the windows of a lane, and of its group, for what a job brought."""
        shared = lane.shared.budget if lane.shared is not None else None
        lane.reason = failure or lane.reason
        if less is not None:
            alone = lane.budget.asked_for_less(less, job.started, now)
            if failure is None:
                lane.refusals = 0
            elif alone:
                lane.refusals += 1
                lane.budget.window = int(lane.refusals < REFUSALS)
            if shared is not None:
                shared.asked_for_less(less, job.started, now)
        elif failure is not None:
            lane.works = False
            lane.budget.failed(failure, 0)
            if shared is not None:
                shared.failed(failure, 1)  # one dead domain does not suspend all the others of its group
        else:
            lane.refusals = 0
            lane.works = True
            lane.budget.succeeded(now)
            if shared is not None:
                shared.succeeded(now)

    def _end(self, lane: Lane, job: LaneJob, now: float) -> None:
        lane.last_used = now
        lane.done += 1
        lane.budget.end()
        self._leave_place(lane, job)
        if isinstance(job.shared, Shared):
            job.shared.budget.end()
            self._refresh_shared(job.shared)

    def _leave_place(self, lane: Lane, job: LaneJob) -> None:
        self._places.end(job.standing)
        self._places.leave(lane)  # it stands otherwise now, and goes back where it belongs
        self._call_back()

    def _call_back(self) -> None:
        for lane in self._places.free():
            self._refresh(lane)

    def _undo(self, lane: Lane, job: LaneJob) -> None:
        lane.budget.undo()
        self._leave_place(lane, job)
        if isinstance(job.shared, Shared):
            job.shared.budget.undo()
        job.started = 0.0
        job.shared = None

    def _lane_of(self, shared: Shared, now: float) -> Lane | None:
        """The next lane of a group; None when all of them wait for rates of their own."""
        while shared.ring:
            lane, _ = shared.ring.popitem(last=False)
            if not self._waits(lane, now):
                return lane
        return None

    def _waits(self, turn: Lane | Shared, now: float) -> bool:
        """Whether its rate makes it wait; then it is waited for."""
        opens = turn.budget.opens
        if opens <= now:
            return False
        turn.timed = True
        heapq.heappush(self._timers, (opens, next(self._numbers), turn))
        return True

    def _wake(self, now: float) -> None:
        """Whoever has waited for a rate long enough gets back into the ring."""
        while self._timers and self._timers[0][0] <= now:
            turn = heapq.heappop(self._timers)[2]
            turn.timed = False
            if isinstance(turn, Lane):
                self._refresh(turn)
            else:
                self._refresh_shared(turn)

    def _refresh(self, lane: Lane) -> None:
        """Let the lane stand in the ring exactly when it may start a job; at its end when it enters."""
        shared = lane.shared
        ring: OrderedDict[Lane, None] | OrderedDict[Lane | Shared, None] = self._ring if shared is None else shared.ring
        if not (lane.waiting and lane.room and not lane.timed):
            self._places.leave(lane)
            ring.pop(lane, None)
        elif not lane.aside:
            ring.setdefault(lane, None)
        if shared is not None:
            self._refresh_shared(shared)

    def _refresh_shared(self, shared: Shared) -> None:
        if shared.ring and shared.budget.room and not shared.timed:
            self._ring.setdefault(shared, None)
        else:
            self._ring.pop(shared, None)
