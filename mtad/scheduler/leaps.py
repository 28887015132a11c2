"""Leaps of the wall's clock while a scheduler lives: what waits neither grows old by them nor waits longer.

The clock of a machine may be set: by an administrator, by NTP after a start with a wrong one. The files have times of the
wall's clock, and cannot say which of these were right. A scheduler that lives through a leap can: it compares the wall's
clock with the monotonic one in each turn, of which there is one in five seconds at the least.

- Forward: a message that had arrived before has not been here any longer for it, so nothing expires by a leap. What is
  deferred becomes due by the wall's clock, and is tried.
- Back: what is on the agenda is due after as long as before the leap.

A clock that is slewed, by a second or so at a time, is followed without a word. What the next scheduler finds it takes as
the files and its own clock say, and each message has one more attempt before it expires.

Errors: none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from mtad.envelope import Envelope
from mtad.scheduler.agenda import Agenda

#: Seconds by which the clock must be off at once to have been set.
LEAST: Final = 10.0


class Leaps:
    """Those that one scheduler has lived through."""

    def __init__(
        self,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        agenda: Agenda,
        warn: Callable[[str], None],
    ) -> None:
        """``clock``: seconds since the epoch; ``monotonic``: seconds since any time; ``warn`` is told of each leap."""
        self._clock = clock
        self._monotonic = monotonic
        self._agenda = agenda
        self._warn = warn
        self._offset = clock() - monotonic()
        self._forward: list[tuple[float, float]] = []

    def look(self) -> None:
        """Has it been set? To be called in each turn."""
        wall = self._clock()
        offset = wall - self._monotonic()
        leap, self._offset = offset - self._offset, offset
        if abs(leap) < LEAST:
            return
        how = "ahead" if leap > 0 else "back"
        self._warn(f"the clock was set {how} by {abs(leap):.0f} s; nothing expires sooner, or waits longer, for it")
        if leap > 0:
            self._forward.append((wall - leap, leap))
        else:
            self._agenda.shift(leap)
            self._take_back(-leap)

    def aged(self, envelope: Envelope) -> Envelope:
        """The envelope with the arrival that makes it as old as it is."""
        arrival = envelope.arrival
        for before, leap in self._forward:
            if arrival <= before:
                arrival += leap
        return envelope if arrival == envelope.arrival else msgspec.structs.replace(envelope, arrival=arrival)

    def _take_back(self, back: float) -> None:
        """A clock that is set back again undoes what was set ahead last."""
        while back > 0 and self._forward:
            before, leap = self._forward.pop()
            if leap > back:
                self._forward.append((before, leap - back))
            back -= leap
