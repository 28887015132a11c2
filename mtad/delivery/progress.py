"""How far a delivery has come: which recipients are decided, which were named to the server at hand, and all attempts.

Three sets of recipients, by their index: ``pending`` are not decided (delivered or failed) yet; of these ``unnamed`` have
not been named to the server whose turn it is. An attempt is recorded for each group of recipients that heard something.

Invariants: a recipient that is decided is in none of the sets and never comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mtad.address import domain_of
from mtad.delivery.rescue import revised
from mtad.delivery.words import NOWHERE, Place
from mtad.envelope import Envelope
from mtad.outcome import Attempt, Deferred, Outcome
from mtad.smtp.capabilities import Capabilities


class Progress:
    """Of one delivery, in one thread."""

    __slots__ = (
        "_begun",
        "_clock",
        "_monotonic",
        "_recorded",
        "_started",
        "attempts",
        "pending",
        "tried",
        "uncertain",
        "unnamed",
    )

    def __init__(self, pending: Sequence[int], clock: Callable[[], float], monotonic: Callable[[], float]) -> None:
        """Nothing has been tried. ``clock``: seconds since the epoch; ``monotonic``: seconds, for durations."""
        self._clock = clock
        self._monotonic = monotonic
        self._recorded = True
        self._started = self._begun = 0.0
        self.pending = list(pending)
        self.unnamed: list[int] = []
        self.attempts: list[Attempt] = []
        self.tried: set[tuple[str, int]] = set()
        """Addresses and ports."""
        self.uncertain = False
        """Nobody knows whether the last server has the message."""

    def begin(self) -> None:
        """An attempt begins, unless one is under way of which nothing is recorded yet."""
        if self._recorded:
            self._recorded = False
            self._started, self._begun = self._clock(), self._monotonic()

    def turn_to_next(self) -> None:
        """It is the turn of another server: everybody who is pending may be named to it."""
        self.unnamed = list(self.pending)

    def batch(self, capabilities: Capabilities, envelope: Envelope, most: int = 0) -> Sequence[int]:
        """The next recipients to be named: as many as this server takes in one transaction (RFC 9422), and ``most``."""
        limits = [limit for limit in (capabilities.recipient_limit, most) if limit]
        batch = self.unnamed[: min(limits, default=None)]
        if not capabilities.domain_limit:
            return batch
        domains: set[str] = set()
        for number, index in enumerate(batch):
            domains.add(domain_of(envelope.recipients[index].address))
            if len(domains) > capabilities.domain_limit:
                return batch[:number]
        return batch

    def record_all(self, outcome: Outcome) -> None:
        """The same for each that is pending, without a server."""
        self.record(dict.fromkeys(self.pending, outcome))

    def record_rest(self, outcome: Outcome, at: Place) -> None:
        """The same for each that the server at hand has not been told of."""
        self.record(dict.fromkeys(self.unnamed, outcome), at)

    def record(self, outcomes: Mapping[int, Outcome], at: Place = NOWHERE, stood: float | None = None) -> None:
        """What became of some recipients. ``stood``: since when there was a session, if there was one."""
        self.begin()
        now = self._monotonic()
        connected = now if stood is None else stood
        self.attempts.append(
            Attempt(
                self._started,
                tuple(outcomes.items()),
                at.host,
                at.peer,
                at.tls,
                connection=max(0.0, connected - self._begun),
                transmission=now - connected,
            )
        )
        self._recorded = True
        self._forget(outcomes)

    def revise(self, outcomes: Mapping[int, Outcome]) -> None:
        """What became of some recipients in the end; it takes the place of what was recorded of them last."""
        self.attempts = revised(self.attempts, outcomes)
        self._forget(outcomes)

    def _forget(self, outcomes: Mapping[int, Outcome]) -> None:
        self.unnamed = [index for index in self.unnamed if index not in outcomes]
        self.pending = [index for index in self.pending if index not in outcomes or isinstance(outcomes[index], Deferred)]
