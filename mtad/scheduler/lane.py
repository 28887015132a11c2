"""One lane, and what the lanes of a group share: what is known of a destination. `mtad.scheduler.lanes` moves it.

All times are seconds of one monotonic clock; 0 stands for never.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from mtad.delivery.jobs import TransportName
from mtad.nexthop import Group
from mtad.outcome import Deferred
from mtad.scheduler.budgets import Budget
from mtad.scheduler.line import Line


class LaneKey(msgspec.Struct, frozen=True):
    """What makes a lane: the transport, and the domain or next hop; "" for transports without."""

    transport: TransportName
    destination: str


class Shared:
    """What the lanes of a group share."""

    def __init__(self, group: Group, budget: Budget) -> None:
        """Nothing is under way."""
        self.group = group
        self.budget = budget
        self.ring: OrderedDict[Lane, None] = OrderedDict()
        """Its lanes that may start a job for all that they themselves know."""
        self.waiting = 0
        """Jobs that wait in its lanes."""
        self.timed = False
        """It waits for its rate."""


class Lane:
    """One destination."""

    def __init__(self, key: LaneKey, budget: Budget, shared: Shared | None = None, *, unknown: bool = False) -> None:
        """An empty lane. ``unknown``: whether it belongs to a group is to be found out."""
        self.key = key
        self.budget = budget
        self.shared = shared
        self.unknown = unknown
        self.waiting = Line()
        self.timed = False
        self.suspended_since = 0.0
        """When the window closed; 0 once a probe has succeeded."""
        self.suspended_until = 0.0
        self.last_used = 0.0
        self.refusals = 0
        """How often in a row it did not want to talk to one job at a time."""
        self.done = 0
        """Jobs ended."""
        self.reason: Deferred | None = None
        """What it was suspended for, last."""
        self.works = False
        """The last job that said anything about the destination succeeded."""
        self.aside = ""
        """Why it stands aside, see `mtad.scheduler.places`; "" when it does not."""

    @property
    def suspended(self) -> bool:
        """The destination failed until nothing was left of the window, and no probe is let through yet."""
        return self.budget.window == 0

    @property
    def failing(self) -> bool:
        """It failed last, and has not succeeded since."""
        return self.reason is not None and not self.works

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is under way."""
        return not self.waiting and not self.budget.in_flight

    @property
    def room(self) -> bool:
        """One more job may be under way."""
        return self.budget.room and not (self.unknown and self.budget.in_flight)
