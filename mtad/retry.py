"""When to try again, when to give up, and what follows from the outcomes of an attempt: pure functions.

The wait before the next attempt is the time already spent in the queue, held between a minimum and a maximum; so it doubles
by itself, and no counter has to be kept. Jitter is added, so that what was deferred together does not come back together.

A server that says when it wants us back (`mtad.smtp.hints.retry_after`) is asked again then, within `SHORTEST_HINT` and
`LONGEST_HINT`. The hint that comes with every reply for ever must not keep us busy: after `HINTS` replies for a recipient
it can lengthen the wait, and not shorten it any more. A message comes back when the first of its recipients is due.

`settle` is the scheduler's one decision. A recipient is settled when it was delivered, or when its sender was told that it
failed. A message without unsettled recipients is done; recipients that failed, or are deferred beyond the lifetime of the
message, are to be reported first; what is left then waits for its next attempt. A recipient that is held because it is in
doubt is neither tried nor given up: when nobody else is left, the message is kept for a human.

Invariants: every recipient is settled, or held, or in `Bounce.failed`, or the reason for a `RetryAt`. All times are seconds
since the epoch, all durations seconds. Errors: ValueError is the caller's fault.
Standards: RFC 5321 section 4.5.4.1 (retry and give-up times), RFC 3461 section 4.1 (NOTIFY), RFC 3463 section 3.5
(4.4.7, delivery time expired).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from mtad.config import DAY, HOUR, MINUTE, Retry
from mtad.envelope import Envelope, Notify, Recipient
from mtad.outcome import Deferred, Delivered, Failed
from mtad.progress import RecipientState
from mtad.smtp.hints import retry_after

#: The largest part of the wait that jitter adds.
JITTER: Final = 0.1

#: Seconds within which a server's hint is taken at its word.
SHORTEST_HINT: Final = 30.0
LONGEST_HINT: Final = 3600.0

#: Replies for one recipient after which a hint does not shorten the wait any more: greylisting is over long before.
HINTS: Final = 20


class Done(msgspec.Struct, frozen=True):
    """Nothing is left to do: the message goes."""


class RetryAt(msgspec.Struct, frozen=True):
    """Some recipients wait; ``when`` is the time of the next attempt."""

    when: float


class Kept(msgspec.Struct, frozen=True):
    """What is left waits for a human: the message goes on hold."""


class Bounce(msgspec.Struct, frozen=True):
    """Something is to be told to the sender; ``then`` follows once the reports are committed and recorded.

    Each pairs the index of a recipient with what became of it, in the order of the envelope: ``failed`` for those that
    failed and nobody was told yet (whether the sender wants to know or not), ``delivered`` for those of whose success it
    asked to hear, ``delayed`` for those that wait longer than ``warn_after``. At least one of them has an entry.
    """

    failed: tuple[tuple[int, Failed], ...]
    then: Done | RetryAt | Kept
    delivered: tuple[tuple[int, Delivered], ...] = ()
    delayed: tuple[tuple[int, Deferred], ...] = ()


Decision = Done | RetryAt | Kept | Bounce


def lifetime(envelope: Envelope, retry: Retry) -> float:
    """How long, in seconds after its arrival, this message may stay in the queue. A null sender makes it a report."""
    report = envelope.kind != "mail" or not envelope.sender
    return retry.bounce_lifetime if report else retry.lifetime


def expired(envelope: Envelope, now: float, retry: Retry) -> bool:
    """True when the message has been in the queue for its lifetime."""
    # The sum, as in `settle`, not the difference: rounding must not make the attempt at the expiry the last but one.
    return now >= envelope.arrival + lifetime(envelope, retry)


def next_attempt(arrival: float, now: float, retry: Retry, jitter: float, expiry: float | None = None) -> float:
    """The time of the next attempt: ``now`` plus the time spent in the queue, clamped, plus up to 10 % of that.

    Args:
        arrival: of the message.
        now: the end of the attempt before.
        retry: minimum and maximum of the wait.
        jitter: a random number, 0 <= jitter < 1.
        expiry: the end of the message's life, at which the last attempt is made; None takes ``retry.lifetime``.

    Returns:
        Never before ``now``, and never after ``expiry`` unless that is past.
    """
    wait = min(max(now - arrival, retry.minimum), retry.maximum)
    wait += wait * JITTER * jitter
    return max(now, min(now + wait, arrival + retry.lifetime if expiry is None else expiry))


def settle(envelope: Envelope, states: Sequence[RecipientState], now: float, retry: Retry, jitter: float) -> Decision:
    """What to do with a message after an attempt.

    Args:
        envelope: the message's.
        states: one for each of its recipients, in the same order.
        now: the time.
        retry: waits and lifetimes.
        jitter: a random number, 0 <= jitter < 1.

    Raises:
        ValueError: there are more or fewer states than recipients.
    """
    if len(states) != len(envelope.recipients):
        raise ValueError(f"{envelope.id}: {len(states)} states for {len(envelope.recipients)} recipients")
    over = expired(envelope, now, retry)
    failed: list[tuple[int, Failed]] = []
    delivered: list[tuple[int, Delivered]] = []
    delayed: list[tuple[int, Deferred]] = []
    waiting: list[RecipientState] = []
    held = False
    for index, (state, recipient) in enumerate(zip(states, envelope.recipients, strict=True)):
        outcome = state.outcome
        if state.settled:
            if isinstance(outcome, Delivered) and _announces(envelope, recipient, state, outcome):
                delivered.append((index, outcome))
        elif isinstance(outcome, Failed):
            failed.append((index, outcome))
        elif state.held:
            held = True
        elif over:
            failed.append((index, _gave_up(state, now - envelope.arrival)))
        else:
            waiting.append(state)
            if isinstance(outcome, Deferred) and _warns(envelope, recipient, state, now, retry):
                delayed.append((index, outcome))
    then: Done | RetryAt | Kept = Kept() if held else Done()
    if waiting:
        expiry = envelope.arrival + lifetime(envelope, retry)
        regular = next_attempt(envelope.arrival, now, retry, jitter, expiry)
        then = RetryAt(min(max(now, min(_due(state, now, regular, jitter), expiry)) for state in waiting))
    if failed or delivered or delayed:
        return Bounce(tuple(failed), then, tuple(delivered), tuple(delayed))
    return then


def _due(state: RecipientState, now: float, regular: float, jitter: float) -> float:
    """When a waiting recipient is to be tried again: when the server says so, or else at the ``regular`` time."""
    outcome = state.outcome
    hint = retry_after(outcome.reply) if isinstance(outcome, Deferred) and outcome.reply else None
    if hint is None:
        return regular
    wait = min(max(hint, SHORTEST_HINT), LONGEST_HINT)
    asked = now + wait + wait * JITTER * jitter
    return asked if state.put_off <= HINTS else max(asked, regular)


def wants(recipient: Recipient, what: Notify) -> bool:
    """Whether the sender wants a report of this kind (RFC 3461 section 4.1); without NOTIFY, of failure and delay."""
    return what in recipient.notify if recipient.notify else what in {"failure", "delay"}


def _announces(envelope: Envelope, recipient: Recipient, state: RecipientState, outcome: Delivered) -> bool:
    """Whether a success is ours to tell: asked for, not told yet, and the next hop will not tell it."""
    asked = bool(envelope.sender) and wants(recipient, "success")
    return asked and not state.reported and not state.announced and not outcome.dsn


def _warns(envelope: Envelope, recipient: Recipient, state: RecipientState, now: float, retry: Retry) -> bool:
    late = 0 < retry.warn_after <= now - envelope.arrival
    return late and bool(envelope.sender) and envelope.kind == "mail" and not state.warned and wants(recipient, "delay")


def _gave_up(state: RecipientState, age: float) -> Failed:
    """The failure that an unfinished recipient becomes when its time is over; what was last in the way is kept."""
    text = f"message expired after {in_words(age)}"
    if isinstance(state.outcome, Deferred):
        last = state.outcome
        return Failed(status="4.4.7", text=f"{text}; last: {last.text}", remote=last.remote, reply=last.reply)
    return Failed(status="4.4.7", text=f"{text}; it was never tried")


def in_words(seconds: float) -> str:
    """A duration for people, in its largest unit and rounded down: ``5 days``, ``1 hour``, ``30 seconds``."""
    for unit, length in (("day", DAY), ("hour", HOUR), ("minute", MINUTE)):
        if seconds >= length:
            return _plural(int(seconds // length), unit)
    return _plural(max(0, int(seconds)), "second")


def _plural(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
