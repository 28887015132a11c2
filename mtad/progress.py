"""How far a message has come: one state per recipient, folded from the records of its queue file.

The records are events (`Attempt`, `Doubt`, `Named`, `Reported`, `Instructed`), appended one after the other; `replay`
folds them. Nothing is ever taken back: a delivered or reported recipient stays so, whatever follows.

A recipient is *in doubt* from its `Doubt` until what the host said is recorded: between the two a process can die. An
attempt that came to no host (a suspended destination, no DNS) says nothing about that, and the doubt stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from mtad.desk import OrderName
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome


class Doubt(msgspec.Struct, frozen=True, tag="doubt"):
    """Recipients that are about to pass the point of no return; the attempt at a host that follows resolves it.

    A doubt that none follows means that the process died in between: the recipients may have got the message.
    """

    at: float
    recipients: tuple[int, ...]
    host: str


#: The host of a doubt about a report: whether it is in the spool already, when a process died before it was marked.
REPORT: Final = "report"

#: The host of a doubt that no delivery wrote: the machine stopped, and with it may have gone what one had written.
CUT: Final = "cut"


class Named(msgspec.Struct, frozen=True, omit_defaults=True, tag="named"):
    """Recipients in doubt that the scheduler came upon and named in the log.

    ``hold``: they are kept for a human, who lets them go by an order to release the message (``retry.on_doubt``).
    """

    at: float
    recipients: tuple[int, ...]
    hold: bool = False


class Reported(msgspec.Struct, frozen=True, omit_defaults=True, tag="reported"):
    """The sender was told what became of these recipients; ``report`` is the queue id of that, "" if none was wanted."""

    at: float
    recipients: tuple[int, ...]
    report: str
    kind: Literal["failure", "success", "delay"] = "failure"


class Instructed(msgspec.Struct, frozen=True, omit_defaults=True, tag="instructed"):
    """An administrator's order, see `ordered`. Of the states it changes only what a release ends, `Named.hold`."""

    at: float
    what: OrderName
    done: bool = False
    """It was carried out; False: it waits for the end of a delivery."""


Event = Attempt | Doubt | Named | Reported | Instructed


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
    """The host that may or may not have the message, when a process died between final dot and recorded reply; or `CUT`.

    `REPORT`: its sender may or may not have been told of a failure, or of a delay."""
    named: bool = False
    """The log has named the doubt."""
    held: bool = False
    """It is kept for a human because of the doubt."""
    released: bool = False
    """A human wants it to be sent in spite of the doubt."""
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
                    states[index] = attempted(states[index], outcome, at_host=event.host != "")
            case Doubt():
                for index in event.recipients:
                    states[index] = doubted(states[index], event.host)
            case Named():
                for index in event.recipients:
                    states[index] = found(states[index], event)
            case Instructed(what="release"):
                states = [released(state) for state in states]
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


def attempted(state: RecipientState, outcome: Outcome, *, at_host: bool = True) -> RecipientState:
    """The state after an attempt; ``at_host``: it came to a host."""
    if state.settled:
        return state
    again = isinstance(outcome, Deferred) and outcome.reply != ""
    if state.doubt and not at_host and isinstance(outcome, Deferred):
        return msgspec.structs.replace(state, outcome=outcome, put_off=state.put_off + again)
    return RecipientState(outcome, warned=state.warned, put_off=state.put_off + again)


def doubted(state: RecipientState, host: str) -> RecipientState:
    """The state before the point of no return. Whatever was said about an earlier doubt is not said of this one.

    That a host may have the message is not forgotten for a report of a delay.
    """
    if state.settled or (host == REPORT and state.doubt not in ("", REPORT) and not isinstance(state.outcome, Failed)):
        return state
    return msgspec.structs.replace(state, doubt=host, named=False, held=False, released=False)


def found(state: RecipientState, event: Named) -> RecipientState:
    """The state of a recipient whose doubt has been named."""
    if state.settled or not state.doubt:
        return state
    return msgspec.structs.replace(state, named=True, held=event.hold)


def released(state: RecipientState) -> RecipientState:
    """The state after an order to release the message."""
    return msgspec.structs.replace(state, held=False, released=True) if state.doubt and not state.settled else state


def told(state: RecipientState, event: Reported) -> RecipientState:
    """The state after its sender was told; being told of a success or a delay takes nothing back."""
    if event.kind == "failure":
        return RecipientState(state.outcome, reported=True)
    if state.doubt == REPORT:  # the sender has been told, for certain
        state = msgspec.structs.replace(state, doubt="", named=False)
    if event.kind == "success":
        return msgspec.structs.replace(state, announced=True)
    return msgspec.structs.replace(state, warned=True)
