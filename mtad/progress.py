"""How far a message has come: one state per recipient, folded from the records of its queue file.

The records are events (`Attempt`, `Doubt`, `Reported`, `Instructed`), appended one after the other; `replay` folds them.
Nothing is ever taken back: a delivered or reported recipient stays so, whatever follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from mtad.desk import OrderName
from mtad.outcome import Attempt, Deferred, Delivered, Outcome


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


class Instructed(msgspec.Struct, frozen=True, omit_defaults=True, tag="instructed"):
    """An administrator's order. It changes no state by itself, see `ordered`."""

    at: float
    what: OrderName
    done: bool = False
    """It was carried out; False: it waits for the end of a delivery."""


Event = Attempt | Doubt | Reported | Instructed


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
    put_off: int = 0
    """How often a server has said "not now" so far."""

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


def ordered(events: Iterable[Event]) -> OrderName | None:
    """The order that is still to be carried out; a later one takes the place of one before."""
    last: Instructed | None = None
    for event in events:
        if isinstance(event, Instructed):
            last = event
    return None if last is None or last.done else last.what


def attempted(state: RecipientState, outcome: Outcome) -> RecipientState:
    """The state after an attempt."""
    if state.settled:
        return state
    again = isinstance(outcome, Deferred) and outcome.reply != ""
    return RecipientState(outcome, warned=state.warned, put_off=state.put_off + again)


def told(state: RecipientState, event: Reported) -> RecipientState:
    """The state after its sender was told; being told of a success or a delay takes nothing back."""
    if event.kind == "failure":
        return RecipientState(state.outcome, reported=True)
    if event.kind == "success":
        return msgspec.structs.replace(state, announced=True)
    return msgspec.structs.replace(state, warned=True)
