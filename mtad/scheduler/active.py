"""A message that the scheduler has in hand: its envelope, where its recipients stand, and how many jobs are open for it."""

from __future__ import annotations

from collections.abc import Sequence

from mtad.desk import OrderName
from mtad.envelope import Envelope
from mtad.outcome import Attempt, Failed, Outcome
from mtad.progress import Doubt, Event, Named, RecipientState, Reported, attempted, doubted, found, told


class ActiveMessage:
    """One message in active/."""

    __slots__ = (
        "claimed",
        "deaths",
        "envelope",
        "flying",
        "open_jobs",
        "order",
        "reporting",
        "size",
        "states",
        "unwritten",
        "urgent",
    )

    def __init__(
        self, envelope: Envelope, states: Sequence[RecipientState], size: int, claimed: float, urgent: bool
    ) -> None:
        """``claimed`` is when it was taken in hand, ``size`` octets of content; ``urgent``: somebody asked for it."""
        self.envelope = envelope
        self.states = list(states)
        self.size = size
        self.claimed = claimed
        self.urgent = urgent
        self.open_jobs = 0
        self.flying = 0
        """Jobs that a delivery process has."""
        self.order: OrderName | None = None
        """What is to be done with it when none is flying any more; until then none is started."""
        self.reporting = False
        """Its sender is being told what became of recipients."""
        self.deaths = 0
        """How many delivery processes died with it."""
        self.unwritten: list[Event] = []
        """What was done, or found, and could not be written down; to be written before the message leaves active/."""

    @property
    def id(self) -> str:
        """Its queue id."""
        return self.envelope.id

    def anew(self) -> ActiveMessage:
        """The same message without any job: those that wait for the old one are nobody's."""
        fresh = ActiveMessage(self.envelope, self.states, self.size, self.claimed, self.urgent)
        fresh.deaths = self.deaths
        fresh.unwritten = self.unwritten
        return fresh

    def due(self) -> list[int]:
        """The recipients for whom something can be tried: neither done nor failed nor held."""
        return [
            index
            for index, state in enumerate(self.states)
            if not (state.settled or state.held or isinstance(state.outcome, Failed))
        ]

    def replay_unwritten(self) -> None:
        """The states were read from the file: add what it does not have."""
        for event in self.unwritten:
            if isinstance(event, Attempt):
                self.record(event.outcomes)
            elif isinstance(event, (Doubt, Named)):
                self.found(event)
            elif isinstance(event, Reported):
                self.told(event)

    def record(self, outcomes: Sequence[tuple[int, Outcome]]) -> None:
        """Take note of what an attempt brought."""
        for index, outcome in outcomes:
            self.states[index] = attempted(self.states[index], outcome)

    def found(self, event: Doubt | Named) -> None:
        """Take note that recipients are in doubt, or that it was said."""
        for index in event.recipients:
            state = self.states[index]
            self.states[index] = doubted(state, event.host) if isinstance(event, Doubt) else found(state, event)

    def told(self, reported: Reported) -> None:
        """Take note that the sender knows."""
        for index in reported.recipients:
            self.states[index] = told(self.states[index], reported)
