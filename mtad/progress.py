"""How far a message has come: one state per recipient, folded from the records of its queue file.

The records are events (`Attempt`, `Doubt`, `Reported`), appended one after the other; `replay` folds them. Nothing is ever
taken back: a delivered or reported recipient stays so, whatever follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from mtad.outcome import Attempt, Delivered, Outcome


class Doubt(msgspec.Struct, frozen=True, tag="doubt"):
    """Recipients that are about to pass the point of no return; the attempt that follows resolves it.

    A doubt that no attempt follows means that the process died in between: the recipients may have got the message.
    """

    at: float
    recipients: tuple[int, ...]
    host: str


#: The host of a doubt about a report: whether it is in the spool already, when a process died before it was marked.
REPORT: Final = "report"


class Reported(msgspec.Struct, frozen=True, omit_defaults=True, tag="reported"):
    """The sender was told what became of these recipients; ``report`` is the queue id of that, "" if none was wanted."""

    at: float
    recipients: tuple[int, ...]
    report: str
    kind: Literal["failure", "success", "delay"] = "failure"


Event = Attempt | Doubt | Reported


class RecipientState(msgspec.Struct, frozen=True):
    """Where one recipient stands."""

    outcome: Outcome | None = None
    """The last outcome; None when it was never tried."""
    reported: bool = False
    """A failure of which the sender has been told."""
    announced: bool = False
    """A success of which the sender has been told, as it asked for."""
    warned: bool = False
    """A delay of which the sender has been told."""
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
                    states[index] = attempted(states[index], outcome)
            case Doubt():
                for index in event.recipients:
                    if not states[index].settled:
                        states[index] = msgspec.structs.replace(states[index], doubt=event.host)
            case Reported():
                for index in event.recipients:
                    states[index] = told(states[index], event)
    return tuple(states)


def attempted(state: RecipientState, outcome: Outcome) -> RecipientState:
    """The state after an attempt."""
    return state if state.settled else RecipientState(outcome, warned=state.warned)


def told(state: RecipientState, event: Reported) -> RecipientState:
    """The state after its sender was told; being told of a success or a delay takes nothing back."""
    if event.kind == "failure":
        return RecipientState(state.outcome, reported=True)
    if event.kind == "success":
        return msgspec.structs.replace(state, announced=True)
    return msgspec.structs.replace(state, warned=True)
