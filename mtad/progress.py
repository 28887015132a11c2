"""How far a message has come: one state per recipient, folded from the records of its queue file.

The records are events (`Attempt`, `Doubt`, `Reported`), appended one after the other; `replay` folds them. Nothing is ever
taken back: a delivered or reported recipient stays so, whatever follows.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mtad.outcome import Attempt, Delivered, Outcome


class Doubt(msgspec.Struct, frozen=True, tag="doubt"):
    """Recipients that are about to pass the point of no return; the attempt that follows resolves it.

    A doubt that no attempt follows means that the process died in between: the recipients may have got the message.
    """

    at: float
    recipients: tuple[int, ...]
    host: str


class Reported(msgspec.Struct, frozen=True, tag="reported"):
    """The sender was told that these recipients failed; ``report`` is the queue id of that report, "" if none was due."""

    at: float
    recipients: tuple[int, ...]
    report: str


Event = Attempt | Doubt | Reported


class RecipientState(msgspec.Struct, frozen=True):
    """Where one recipient stands."""

    outcome: Outcome | None = None
    """The last outcome; None when it was never tried."""
    reported: bool = False
    """A failure of which the sender has been told."""
    doubt: str = ""
    """The host that may or may not have the message, when a process died between final dot and recorded reply."""

    @property
    def settled(self) -> bool:
        """Nothing more is to be done for this recipient."""
        return self.reported or isinstance(self.outcome, Delivered)


def replay(count: int, events: Iterable[Event]) -> tuple[RecipientState, ...]:
    """Fold the events of a message with ``count`` recipients into their states.

    Raises:
        IndexError: an event names a recipient that the envelope does not have.
    """
    states = [RecipientState()] * count
    for event in events:
        match event:
            case Attempt():
                for index, outcome in event.outcomes:
                    if not states[index].settled:
                        states[index] = RecipientState(outcome)
            case Doubt():
                for index in event.recipients:
                    if not states[index].settled:
                        states[index] = RecipientState(states[index].outcome, doubt=event.host)
            case Reported():
                for index in event.recipients:
                    states[index] = RecipientState(states[index].outcome, reported=True)
    return tuple(states)
