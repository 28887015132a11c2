"""Whose jobs may take the places of the delivery processes: the dead must not take those of the living.

A job for a host that swallows everything holds a place until its connect is given up. Forty such destinations with five
jobs each would hold all that there are, and mail for everybody else would wait. So:

- Lanes that failed last, and have not succeeded since, share a quarter of the places.
- Those and the lanes of which nothing is known yet share three quarters. Once they hold a quarter, each gets one at a time.
- The rest is kept for lanes that have worked.

A lane that may not start a job for that reason stands *aside* until places of its kind are free. It is no limit of its own,
and costs nothing as long as there is room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from enum import Enum

from mtad.scheduler.lane import Lane


class Standing(Enum):
    """What is known of a lane, when it wants a place."""

    WORKS = "it has worked"
    FAILS = "it failed last"
    FRESH = "nothing is known"
    AGAIN = "nothing is known, and it has a place already"


class Places:
    """Counts the places; used by `mtad.scheduler.lanes`."""

    def __init__(self, places: int) -> None:
        """``places``: jobs that all delivery processes together take."""
        quarter = max(1, places // 4)
        self._most = {Standing.FAILS: quarter, Standing.FRESH: max(2, places - quarter), Standing.AGAIN: quarter}
        self._failing = 0
        self._doubtful = 0
        self._aside: dict[Standing, OrderedDict[Lane, None]] = {standing: OrderedDict() for standing in self._most}

    def put_aside(self, lane: Lane) -> bool:
        """Whether there is no place for a job of this lane now; then it stands aside."""
        standing = self._standing(lane)
        if standing is Standing.WORKS or self._free(standing) > 0:
            return False
        self._aside[standing][lane] = None
        lane.aside = standing.value
        return True

    def start(self, lane: Lane) -> str:
        """A job takes its place; what `end` is to be told."""
        standing = self._standing(lane)
        self._failing += standing is Standing.FAILS
        self._doubtful += standing is not Standing.WORKS
        return standing.value

    def end(self, standing: str) -> None:
        """A job has left the place that it took with this standing."""
        self._failing -= standing == Standing.FAILS.value
        self._doubtful -= standing != Standing.WORKS.value

    def free(self) -> Iterator[Lane]:
        """The lanes that need not stand aside any more."""
        for kind, lanes in self._aside.items():
            for _ in range(min(len(lanes), self._free(kind))):
                lane, _ = lanes.popitem(last=False)
                lane.aside = ""
                yield lane

    def leave(self, lane: Lane) -> None:
        """A lane need not stand aside: it has worked, or has nothing to do."""
        if lane.aside:
            del self._aside[Standing(lane.aside)][lane]
            lane.aside = ""

    def _free(self, standing: Standing) -> int:
        return self._most[standing] - (self._failing if standing is Standing.FAILS else self._doubtful)

    @staticmethod
    def _standing(lane: Lane) -> Standing:
        if lane.works or lane.shared is not None or lane.key.transport != "smtp":
            return Standing.WORKS
        if lane.failing:
            return Standing.FAILS
        return Standing.AGAIN if lane.budget.in_flight else Standing.FRESH
