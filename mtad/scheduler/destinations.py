"""Where the recipients of a message go, as jobs in lanes, and what a job's result says about where it went.

Recipients with the same transport and next hop are one job, or as many as it takes when they are more than the destination
gets in one transaction. A result tells of its destination: that it was out of reach, that it wants less at a time, who
takes its mail, and that it wants it over IPv4. All that is kept by `mtad.scheduler.lanes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mtad.address import domain_of
from mtad.delivery.jobs import Job, Result
from mtad.nexthop import Rules
from mtad.outcome import Deferred, Outcome
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.lane import Lane, LaneKey
from mtad.scheduler.lanes import Lanes
from mtad.scheduler.line import LaneJob
from mtad.smtp.hints import asks_for_less


class Destinations:
    """The destinations of one scheduler."""

    def __init__(self, rules: Rules, local: Sequence[str], lanes: Lanes, monotonic: Callable[[], float]) -> None:
        """``local`` are the domains whose mail is stored here; ``monotonic`` is the clock of the lanes."""
        self._rules = rules
        self._local = frozenset(domain.lower() for domain in local)
        self._lanes = lanes
        self._monotonic = monotonic

    def key(self, address: str) -> LaneKey:
        """The lane of a recipient."""
        domain = domain_of(address)
        if domain in self._local or not domain:
            return LaneKey("local", "")
        return LaneKey("smtp", self._rules.lane(domain))

    def jobs(self, message: ActiveMessage) -> Iterator[tuple[LaneKey, LaneJob]]:
        """What is to be done for the recipients that are left, those of one destination one after the other.

        Nothing, when an order waits for the message.
        """
        destinations: dict[LaneKey, list[int]] = {}
        for index in () if message.order else message.due():
            destinations.setdefault(self.key(message.envelope.recipients[index].address), []).append(index)
        for key, indexes in destinations.items():
            size = self._lanes.recipients(key, self._monotonic())
            for start in range(0, len(indexes), size):
                yield key, LaneJob(message, tuple(indexes[start : start + size]), further=start > 0)

    def job(self, lane: Lane, job: LaneJob, arrival: float) -> Job:
        """What a delivery process is told of a job from a lane; it has no number yet. ``arrival`` is for its age."""
        message, key = job.message, lane.key
        ipv4 = self._lanes.ipv4.get(key, self._monotonic()) is not None
        since = arrival if key.transport == "bounce" else 0.0
        return Job(0, message.id, key.transport, key.destination, job.recipients, message.claimed, ipv4, since)

    def done(self, lane: Lane, job: LaneJob, result: Result) -> list[tuple[LaneJob, Deferred]]:
        """A job has ended: what that says about its destination is taken note of.

        Returns:
            the jobs that are not to be tried now, because the destination is suspended, each with the reason.
        """
        now = self._monotonic()
        if result.ipv4:
            self._lanes.ipv4.learn(lane.key, True, now)
        failure, less = destination_failure(result.outcomes), less_wanted(result.outcomes)
        waiting = self._lanes.done(lane, job, now, failure=failure, less=less, host=result.host)
        return [(other, lane.reason) for other in waiting if lane.reason is not None]


def destination_failure(outcomes: Sequence[tuple[int, Outcome]]) -> Deferred | None:
    """Why a destination as a whole could not be reached, when that is what all its recipients say."""
    failure: Deferred | None = None
    for _, outcome in outcomes:
        if not isinstance(outcome, Deferred) or not outcome.destination:
            return None
        failure = outcome
    return failure


def less_wanted(outcomes: Sequence[tuple[int, Outcome]]) -> Outcome | None:
    """The outcome that says that the destination wants less at a time, if there is one."""
    return next((outcome for _, outcome in outcomes if asks_for_less(outcome)), None)
