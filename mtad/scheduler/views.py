"""Lanes and their jobs as they are told at the desk: values of `mtad.desk`, made of `mtad.scheduler.lanes`.

The lanes measure with a monotonic clock and the desk tells seconds since the epoch, so every function takes both times:
``now`` of the one and ``wall`` of the other. What a job waits for is right when the scheduler has just started all that it
could, that is between two turns of its loop.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Literal

import msgspec

from mtad.desk import JobView, LaneView
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.budgets import Budget
from mtad.scheduler.lane import Lane, LaneKey
from mtad.scheduler.lanes import Lanes
from mtad.scheduler.line import LaneJob


def view_lane(lanes: Lanes, lane: Lane, now: float, wall: float) -> LaneView:
    """One lane."""
    shared = lane.shared
    budgets = [lane.budget] if shared is None else [lane.budget, shared.budget]
    slowest = max((budget for budget in budgets if budget.bucket), key=lambda budget: budget.opens, default=lane.budget)
    why = lane.reason if lane.suspended_since else next((budget.reason for budget in budgets if budget.reason), None)

    def told(when: float) -> float:
        return when - now + wall if when else 0.0

    return LaneView(
        lane.key.transport,
        lane.key.destination,
        waiting=len(lane.waiting),
        in_flight=lane.budget.in_flight,
        window=min(lane.budget.window, 1) if lane.unknown else lane.budget.window,
        limit=lane.budget.limit,
        group="" if shared is None else shared.group.name,
        suspended_since=told(lane.suspended_since),
        suspended_until=told(lane.suspended_until) if lane.suspended_since else 0.0,
        reason="" if why is None else f"{why.status} {why.text}",
        reply="" if why is None else why.reply,
        rate=slowest.bucket.rate.text if slowest.bucket else "",
        next_start=told(slowest.opens) if slowest.opens > now else 0.0,
        ipv4_until=told(lanes.ipv4.until(lane.key, now)),
        done=lane.done,
        oldest=told(lane.waiting.oldest()),
    )


def view_lanes(
    lanes: Lanes, now: float, wall: float, most: int, destinations: Iterable[str] = ()
) -> tuple[tuple[LaneView, ...], int, int, int]:
    """The busiest lanes, or those to some destinations; and over all lanes how many are suspended, wait, and are in flight.

    Waiting and in flight are jobs.
    """
    suspended = waiting = in_flight = 0
    for lane in lanes:
        suspended += bool(lane.suspended_since)
        waiting += len(lane.waiting)
        in_flight += lane.budget.in_flight
    wanted = frozenset(destinations)
    chosen = [lane for lane in lanes if lane.key.destination in wanted] if wanted else lanes
    busiest = heapq.nlargest(
        most, chosen, key=lambda lane: (len(lane.waiting) + lane.budget.in_flight, lane.suspended_since > 0)
    )
    return tuple(view_lane(lanes, lane, now, wall) for lane in busiest), suspended, waiting, in_flight


def view_delivering(lanes: Lanes, lane: Lane, job: LaneJob, pid: int, now: float, wall: float) -> JobView:
    """A job that the delivery process ``pid`` has."""
    return JobView(job.recipients, view_lane(lanes, lane, now, wall), "delivering", job.started - now + wall, pid=pid)


def view_waiting(lanes: Lanes, keys: Iterable[LaneKey], message: ActiveMessage, now: float, wall: float) -> list[JobView]:
    """The jobs of a message that wait in these lanes. Costs time in proportion to what waits there."""
    found: list[JobView] = []
    for key in keys:
        lane = lanes.get(key)
        jobs = lane.waiting.of(message) if lane is not None else []
        if lane is None or not jobs:
            continue
        blocked, by = _obstacle(lane, now)
        view = view_lane(lanes, lane, now, wall)
        if by is lane.budget:
            view = msgspec.structs.replace(view, group="")
        else:
            view = msgspec.structs.replace(view, in_flight=by.in_flight, window=by.window, limit=by.limit)
        found += [
            JobView(job.recipients, view, "waiting", job.since - now + wall, ahead=ahead, blocked=blocked)
            for job, ahead in jobs
        ]
    return found


def _obstacle(lane: Lane, now: float) -> tuple[Literal["rate", "concurrency", "processes"], Budget]:
    """What the jobs of a lane wait for, and whose limit that is."""
    budgets = [lane.budget] if lane.shared is None else [lane.budget, lane.shared.budget]
    slowest = max(budgets, key=lambda budget: budget.opens)
    if slowest.opens > now:
        return "rate", slowest
    if not lane.room:
        return "concurrency", lane.budget
    full = next((budget for budget in budgets if not budget.room), None)
    return ("processes", lane.budget) if full is None else ("concurrency", full)
