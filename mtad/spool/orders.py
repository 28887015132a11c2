"""An administrator's orders about a message, carried out on its queue file.

======== ==========================================================================================================
hold     the file moves to hold/, and stays there until it is released
release  from hold/ to deferred/, due now; recipients that are held because they are in doubt are tried, too
delete   the file goes, nobody is told
requeue  it is due now
expire   as at the end of its life: what is left of its recipients fails (4.4.7), its sender is told
bounce   the same, because the administrator says so (5.7.0)
======== ==========================================================================================================

`carry_out` is for a message that nobody has in work, and for whoever has the scheduler's lock: the scheduler, or a command
while there is none. A message in delivery is left alone; `remember` puts the order into its file, where the scheduler that
has it in hand, or one that comes after a crash, finds it (`mtad.progress.ordered`).

Every order may be given twice, and be cut short anywhere: what was written says only what is true, and the last step is one
rename or unlink. Of expire and bounce the report is the scheduler's to write, with the failures that the file has then.

Nothing here waits for the disk; whoever promises that an order stands calls `Spool.sync` before.

Errors: FileNotFoundError, the message has gone meanwhile; Unfit, this cannot be done with it; QueueFileUnfinished, it is no
message yet; QueueFileDamaged; other OSErrors are the world's, and the order is not carried out.
Standards: RFC 3463 sections 3.5 (4.4.7, delivery time expired) and 3.8 (5.7.0, other security status).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Final, Literal

from mtad.desk import Ordered, OrderName
from mtad.errors import MtadError, QueueFileDamaged, QueueFileUnfinished
from mtad.outcome import Attempt, Deferred, Failed
from mtad.progress import Instructed, RecipientState, ordered
from mtad.retry import in_words
from mtad.spool.message import OpenMessage
from mtad.spool.queue_file import StoredMessage
from mtad.spool.queue_id import is_queue_id
from mtad.spool.queues import Queue, Spool

#: What an order is that ends the life of a message: status and the words between which its age stands in each failure.
_ENDS: Final = {
    "expire": ("4.4.7", "message expired after {age}, by order of an administrator"),
    "bounce": ("5.7.0", "message returned after {age}, by order of an administrator"),
}

HELD: Final = "it is on hold; mtaq release tries it now"
NOT_HELD: Final = "it is not on hold"


class Unfit(MtadError):
    """With this message the order cannot be carried out; the text says why, and what can be done."""


#: What becomes of an order about one message.
Answer = Literal["done", "later", "missing"]


def collect(ids: Iterable[str], give: Callable[[str], Answer]) -> Ordered:
    """Give an order about each of these messages; what became of them. ``give`` raises what this module raises."""
    found: dict[Answer, list[str]] = {"done": [], "later": [], "missing": []}
    refused: list[tuple[str, str]] = []
    for queue_id in ids:
        try:
            answer = give(queue_id) if is_queue_id(queue_id) else "missing"
        except (FileNotFoundError, QueueFileUnfinished):
            answer = "missing"
        except (Unfit, QueueFileDamaged) as why:
            refused.append((queue_id, str(why)))
            continue
        except OSError as why:
            refused.append((queue_id, f"the spool cannot be changed: {why.strerror or why}"))
            continue
        found[answer].append(queue_id)
    return Ordered(tuple(found["done"]), tuple(found["later"]), tuple(found["missing"]), tuple(refused))


def give(
    spool: Spool, what: OrderName, queue_id: str, now: float, follow: Callable[[Queue | None], None] | None = None
) -> Answer:
    """Do this with a message, wherever it is, that no scheduler has in hand.

    ``follow`` is told where it is now when the order has been carried out. Raises as the module says.
    """
    queue = spool.find(queue_id)
    if queue is None:
        return "missing"
    if queue in (Queue.INCOMING, Queue.ACTIVE) and spool.in_work(queue, queue_id):
        if queue is Queue.INCOMING:
            return "missing"  # its receiver has not said 250 yet, or does so now
        remember(spool, what, queue, queue_id, now)
        return "later"
    where = carry_out(spool, what, queue, queue_id, now)
    if follow is not None:
        follow(where)
    return "done"


def carry_out(spool: Spool, what: OrderName, queue: Queue, queue_id: str, now: float) -> Queue | None:
    """Do this with the message of a queue; ``now`` in seconds since the epoch.

    Returns:
        the queue where it is now; None when it is deleted. What is to be tried now is in incoming, in active, or in
        deferred with this time.

    Raises:
        see the module.
    """
    if queue is Queue.INCOMING:
        spool.load(queue, queue_id)  # raises for what is not a message yet
    match what:
        case "hold":
            return _hold(spool, queue, queue_id, now)
        case "release":
            return _release(spool, queue, queue_id, now)
        case "delete":
            _must(spool.remove(queue_id, queue), queue_id)
            return None
        case "requeue":
            if queue is Queue.HOLD:
                raise Unfit(HELD)
            return _due(spool, queue, queue_id, now)
        case "expire" | "bounce":
            with spool.open(queue, queue_id) as opened:
                _fail(opened, what, now)
            return _due(spool, queue, queue_id, now)


def remember(spool: Spool, what: OrderName, queue: Queue, queue_id: str, now: float) -> None:
    """Write the order into the file of a message that is in work, to be carried out when that has ended.

    Release and requeue only take back what was to be carried out then: the message is tried now as it is.

    Raises:
        see the module.
    """
    with spool.open(queue, queue_id) as opened:
        _refuse(opened.message, what)
        pending = ordered(opened.message.events)
        frees = what == "release" and any_held(opened.message)
        if what == "release" and pending != "hold" and not frees:
            raise Unfit(NOT_HELD)
        if what == "requeue" and pending == "hold":
            raise Unfit(HELD)
        tried = what in ("release", "requeue")
        if frees or pending != (None if tried else what):
            opened.append(Instructed(now, what, done=tried))


def any_held(message: StoredMessage) -> bool:
    """Whether recipients are held because they are in doubt."""
    return any(state.held for state in message.states)


def failures(message: StoredMessage, what: OrderName, now: float) -> Attempt | None:
    """How the recipients fail for whom something was left to try, by expire or bounce; None when there are none."""
    status, words = _ENDS[what]
    text = words.format(age=in_words(now - message.envelope.arrival))
    outcomes = [
        (index, Failed(status, f"{text}; {_last(state)}", *_said(state)))
        for index, state in enumerate(message.states)
        if not state.settled and not isinstance(state.outcome, Failed)
    ]
    return Attempt(now, tuple(outcomes)) if outcomes else None


def _last(state: RecipientState) -> str:
    return f"last: {state.outcome.text}" if state.outcome is not None else "it was never tried"


def _said(state: RecipientState) -> tuple[str, str]:
    outcome = state.outcome
    return (outcome.remote, outcome.reply) if isinstance(outcome, Deferred) else ("", "")


def _refuse(message: StoredMessage, what: OrderName) -> None:
    if what in _ENDS and message.envelope.kind == "double-bounce":
        raise Unfit("it is a notice to postmaster, and nobody can be told about it; mtaq delete ends it")


def _fail(opened: OpenMessage, what: OrderName, now: float) -> None:
    _refuse(opened.message, what)
    failed = failures(opened.message, what, now)
    pending = [Instructed(now, what, done=True)] if ordered(opened.message.events) else []
    if failed is not None or pending:
        opened.append(*([failed] if failed else []), *pending)


def _hold(spool: Spool, queue: Queue, queue_id: str, now: float) -> Queue:
    if queue is Queue.HOLD:
        return queue
    # That it is on hold says the directory; since when and why, the note, which a full disk may refuse.
    with spool.open(queue, queue_id) as opened, contextlib.suppress(OSError):
        opened.append(Instructed(now, "hold", done=True))
    _must(spool.hold(queue, queue_id), queue_id)
    return Queue.HOLD


def _release(spool: Spool, queue: Queue, queue_id: str, now: float) -> Queue:
    with spool.open(queue, queue_id) as opened:
        pending, frees = ordered(opened.message.events), any_held(opened.message)
        if queue is not Queue.HOLD and pending != "hold" and not frees:
            raise Unfit(NOT_HELD)
        try:
            opened.append(Instructed(now, "release", done=True))
        except OSError:
            if pending is not None or frees:
                raise  # whoever takes it next would hold it again
    return _due(spool, queue, queue_id, now)


def _due(spool: Spool, queue: Queue, queue_id: str, now: float) -> Queue:
    """Have the message tried now: those of incoming and active are without that."""
    if queue is Queue.HOLD:
        _must(spool.release(queue_id, now), queue_id)
        return Queue.DEFERRED
    spool.touch(queue, queue_id, now)
    return queue


def _must(moved: bool, queue_id: str) -> None:
    if not moved:
        raise FileNotFoundError(queue_id)
