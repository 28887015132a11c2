"""The destinations of the simulator: how long an attempt takes there, and what comes of it.

Each kind is one function of the time and of what went before, and needs no more than a few numbers, so that there may be
ten thousand of them. Durations are seconds.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Final, Literal

from mtad.outcome import Deferred, Delivered, Outcome

Kind = Literal["steady", "slow", "dead", "greylisting", "limited", "flapping"]

#: How many of a hundred destinations are of each kind.
SHARES: Final[dict[Kind, int]] = {"steady": 82, "slow": 6, "dead": 4, "greylisting": 5, "limited": 2, "flapping": 1}

#: Seconds until a connect to a host that swallows everything is given up (delivery.connect_timeout).
CONNECT_TIMEOUT: Final = 30.0
#: Seconds for which a greylisting host turns a message away, and says so.
GREY: Final = 300
#: Attempts a minute that a limiting host takes.
PER_MINUTE: Final = 60
#: Seconds for which a flapping host is up, and then down.
FLAP: Final = 600.0

_OK: Final = Delivered("2.0.0", "250 2.0.0 Ok", "mx.test", "250 2.0.0 Ok")
_TIMED_OUT: Final = Deferred("4.4.1", "connect to mx.test[192.0.2.1]:25: Connection timed out", destination=True)
_REFUSED: Final = Deferred("4.4.1", "connect to mx.test[192.0.2.1]:25: Connection refused", destination=True)


def _said(reply: str, *, destination: bool = False) -> Deferred:
    status = reply.split()[1]
    return Deferred(status, f"host mx.test[192.0.2.1] said: {reply}", "mx.test", reply, destination=destination)


_GREY: Final = _said(f"450 4.7.1 Greylisted, please try again in {GREY} seconds")
_TOO_MANY: Final = _said("421 4.7.0 Too many connections from your host, slow down", destination=True)


class Destination:
    """One domain."""

    __slots__ = ("_hours", "_recent", "_seen", "kind", "name")

    def __init__(self, name: str, kind: Kind, rng: random.Random, span: float) -> None:
        """``span``: seconds that the simulation lasts; a dead one is dead for some hours of them."""
        self.name = name
        self.kind: Kind = kind
        length = rng.uniform(1, 8) * 3600
        start = rng.uniform(-length / 2, max(span - length / 2, 1.0))
        self._hours = (start, start + length, rng.random() < 0.5) if kind == "dead" else (0.0, 0.0, False)
        self._seen: dict[str, float] = {}
        self._recent: deque[float] = deque()

    def healthy(self, now: float) -> bool:
        """Whether it would take a message now, and at once."""
        if self.kind == "flapping":
            return now % (2 * FLAP) < FLAP
        return self.kind in {"steady", "slow"} or (self.kind == "dead" and not self._down(now))

    def attempt(self, now: float, queue_id: str, count: int, rng: random.Random) -> tuple[float, Sequence[Outcome]]:
        """How long an attempt with so many recipients takes, and what comes of each."""
        duration, outcome = self._one(now, queue_id, rng)
        return duration, [outcome] * count

    def _down(self, now: float) -> bool:
        return self._hours[0] <= now < self._hours[1]

    def _one(self, now: float, queue_id: str, rng: random.Random) -> tuple[float, Outcome]:
        quick = rng.uniform(0.05, 0.5)
        if self.kind == "slow":
            return rng.uniform(5.0, 20.0), _OK
        if self.kind == "dead" and self._down(now):
            return (CONNECT_TIMEOUT, _TIMED_OUT) if self._hours[2] else (0.02, _REFUSED)
        if self.kind == "flapping" and not self.healthy(now):
            return 0.02, _REFUSED
        if self.kind == "greylisting":
            first = self._seen.setdefault(queue_id, now)
            if now < first + GREY:
                return quick, _GREY
            del self._seen[queue_id]
        if self.kind == "limited":
            while self._recent and self._recent[0] < now - 60:
                self._recent.popleft()
            if len(self._recent) >= PER_MINUTE:
                return 0.05, _TOO_MANY
            self._recent.append(now)
        return quick, _OK


def make(count: int, rng: random.Random, span: float, *, without: frozenset[Kind] = frozenset()) -> list[Destination]:
    """So many destinations, of all kinds; those of the kinds in ``without`` are steady instead.

    Who is of which kind hangs on the seed alone, not on ``without``.
    """
    kinds = rng.choices(list(SHARES), list(SHARES.values()), k=count)
    made = [Destination(f"d{number}.test", kind, rng, span) for number, kind in enumerate(kinds)]
    for destination in made:
        if destination.kind in without:
            destination.kind = "steady"
    return made
