"""What the tests of lanes share: outcomes, jobs of messages that have nothing but a name, and taking what may start."""

from __future__ import annotations

from mtad.config import Delivery, DeliveryPolicy
from mtad.envelope import Envelope
from mtad.nexthop import Rules
from mtad.outcome import Deferred
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.lane import Lane, LaneKey
from mtad.scheduler.lanes import Lanes
from mtad.scheduler.line import LaneJob

DEAD = Deferred("4.4.1", "refused", destination=True)
BUSY = Deferred("4.7.0", "too many connections", "mx.test", "421 4.7.0 Too many connections", destination=True)
SLOWER = Deferred("4.7.28", "slow down", "mx.test", "450 4.7.28 slow down")


def key(name: str) -> LaneKey:
    return LaneKey("smtp", name)


def job(name: str = "m") -> LaneJob:
    return LaneJob(ActiveMessage(Envelope(name, 0.0, "", ()), (), 0, 0.0, urgent=False), (0,))


def mailing(name: str, count: int) -> list[LaneJob]:
    """The jobs of a message with many recipients."""
    message = job(name).message
    return [LaneJob(message, (number,), further=number > 0) for number in range(count)]


def lanes_of(limit: int, pause: float = 60.0, *policy: DeliveryPolicy) -> Lanes:
    return Lanes(Rules(Delivery(destination_concurrency=limit, policy=policy)), pause, places=10_000)


def take(lanes: Lanes, now: float = 0.0) -> tuple[Lane, LaneJob]:
    taken = lanes.take(now)
    assert taken is not None
    return taken


def drain(lanes: Lanes, now: float = 0.0) -> list[tuple[Lane, LaneJob]]:
    """Take all that may start."""
    found = []
    while (taken := lanes.take(now)) is not None:
        found.append(taken)
    return found
