"""Retry times and the decision about a message."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.config import DAY, Duration, Retry
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.progress import RecipientState, replay
from mtad.retry import HINTS, Bounce, Done, Kept, RetryAt, expired, in_words, lifetime, next_attempt, settle

RETRY = Retry()
NOW = 1_700_000_000.0
SENT = Delivered("2.0.0", "ok")
LATER = Deferred("4.3.0", "try later", remote="mx.example", reply="450 4.3.0 try later")
NEVER = Failed("5.1.1", "no such user")


def envelope(count: int, age: float = 0.0, sender: str = "a@b.example", kind: str = "mail") -> Envelope:
    recipients = tuple(Recipient(f"r{number}@c.example") for number in range(count))
    return Envelope("ID", NOW - age, sender, recipients, kind=kind)  # type: ignore[arg-type]  # any of the three kinds


def states(*outcomes: Outcome | None) -> tuple[RecipientState, ...]:
    return tuple(RecipientState(outcome) for outcome in outcomes)


def test_the_wait_is_the_age_of_the_message_within_bounds() -> None:
    assert next_attempt(NOW, NOW, RETRY, 0) == NOW + 300
    assert next_attempt(NOW - 1000, NOW, RETRY, 0) == NOW + 1000
    assert next_attempt(NOW - 50_000, NOW, RETRY, 0) == NOW + 4000
    assert next_attempt(NOW - 1000, NOW, RETRY, 0.5) == NOW + 1050
    assert next_attempt(NOW + 500, NOW, RETRY, 0) == NOW + 300, "a clock that was set back"


def test_the_last_attempt_is_at_the_expiry() -> None:
    assert next_attempt(NOW - 5 * DAY + 100, NOW, RETRY, 0.9) == NOW + 100
    assert next_attempt(NOW - 6 * DAY, NOW, RETRY, 0) == NOW
    assert next_attempt(NOW, NOW, RETRY, 0, expiry=NOW + 7) == NOW + 7


def test_the_gaps_double_until_the_maximum() -> None:
    now, gaps = NOW, []
    for _ in range(8):
        when = next_attempt(NOW, now, RETRY, 0)
        gaps.append(when - now)
        now = when
    assert gaps == [300, 300, 600, 1200, 2400, 4000, 4000, 4000]


def test_lifetimes() -> None:
    retry = Retry(lifetime=Duration(100), bounce_lifetime=Duration(10))
    assert lifetime(envelope(1), retry) == 100
    assert lifetime(envelope(1, sender=""), retry) == 10
    assert lifetime(envelope(1, kind="bounce"), retry) == 10
    assert lifetime(envelope(1, kind="double-bounce"), retry) == 10
    assert not expired(envelope(1, 99.9), NOW, retry)
    assert expired(envelope(1, 100), NOW, retry)
    assert expired(envelope(1, 10, sender=""), NOW, retry)


def test_done() -> None:
    reported = RecipientState(NEVER, reported=True)
    assert settle(envelope(3), (*states(SENT, SENT), reported), NOW, RETRY, 0) == Done()


def test_one_deferred_or_untried_recipient_waits() -> None:
    assert settle(envelope(2, 1000), states(SENT, LATER), NOW, RETRY, 0) == RetryAt(NOW + 1000)
    assert settle(envelope(2, 1000), states(SENT, None), NOW, RETRY, 0) == RetryAt(NOW + 1000)
    doubt = RecipientState(None, doubt="mx.example")
    assert settle(envelope(1, 1000), (doubt,), NOW, RETRY, 0) == RetryAt(NOW + 1000)


def test_a_failure_is_reported_and_then_the_rest_goes_on() -> None:
    assert settle(envelope(2), states(SENT, NEVER), NOW, RETRY, 0) == Bounce(((1, NEVER),), Done())
    assert settle(envelope(2), states(NEVER, LATER), NOW, RETRY, 0) == Bounce(((0, NEVER),), RetryAt(NOW + 300))


def test_an_expired_recipient_fails_with_what_was_last_in_the_way() -> None:
    decision = settle(envelope(3, 5 * DAY), states(SENT, LATER, None), NOW, RETRY, 0)
    assert decision == Bounce(
        (
            (1, Failed("4.4.7", "message expired after 5 days; last: try later", "mx.example", "450 4.3.0 try later")),
            (2, Failed("4.4.7", "message expired after 5 days; it was never tried")),
        ),
        Done(),
    )


def test_the_attempt_at_the_expiry_is_the_last() -> None:
    message = envelope(1, 5 * DAY - 10)
    decision = settle(message, states(LATER), NOW, RETRY, 0.7)
    assert isinstance(decision, RetryAt)
    assert isinstance(settle(message, states(LATER), decision.when, RETRY, 0.7), Bounce)


def test_a_report_expires_by_its_own_lifetime() -> None:
    retry = Retry(bounce_lifetime=Duration(60))
    assert settle(envelope(1, 10, sender=""), states(LATER), NOW, retry, 0) == RetryAt(NOW + 50)
    assert isinstance(settle(envelope(1, 60, sender=""), states(LATER), NOW, retry, 0), Bounce)


def test_who_is_held_is_kept_when_nobody_else_is_left() -> None:
    held = RecipientState(None, doubt="mx.example", held=True)
    assert settle(envelope(2, 6 * DAY), (*states(SENT), held), NOW, RETRY, 0) == Kept()
    assert settle(envelope(2), (*states(NEVER), held), NOW, RETRY, 0) == Bounce(((0, NEVER),), Kept())
    assert settle(envelope(2), (held, *states(LATER)), NOW, RETRY, 0) == RetryAt(NOW + 300)


def test_a_report_waits_no_longer_than_its_own_lifetime_even_if_that_is_the_longer_one() -> None:
    retry = Retry(lifetime=Duration(100), bounce_lifetime=Duration(5000))
    assert settle(envelope(1, 50, sender=""), states(LATER), NOW, retry, 0) == RetryAt(NOW + 300)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (DAY, "1 day"),
        (DAY - 1, "23 hours"),
        (3600, "1 hour"),
        (3599.5, "59 minutes"),
        (60, "1 minute"),
        (59.9, "59 seconds"),
        (1, "1 second"),
        (0, "0 seconds"),
        (-5, "0 seconds"),
    ],
)
def test_the_unit_changes_where_it_is_full(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_a_wrong_number_of_states_is_the_callers_fault() -> None:
    with pytest.raises(ValueError, match="ID: 1 states for 2 recipients"):
        settle(envelope(2), states(SENT), NOW, RETRY, 0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 seconds"), (-5, "0 seconds"), (1, "1 second"), (90, "1 minute"), (7200, "2 hours"), (5.5 * DAY, "5 days")],
)
def test_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


outcomes = st.sampled_from([None, SENT, LATER, NEVER])
recipient_states = st.builds(RecipientState, outcomes, st.booleans(), st.sampled_from(["", "mx"]))
retries = st.builds(
    lambda least, more, life, bounce: Retry(Duration(least), Duration(least + more), Duration(life), Duration(bounce)),
    *(st.floats(0.001, 1e4), st.floats(0, 1e5), st.floats(0, 1e6), st.floats(0, 1e6)),
)
jitters = st.floats(0, 1, exclude_max=True)


@given(
    st.lists(recipient_states, min_size=1, max_size=8),
    st.floats(-1e3, 2e6),
    retries,
    jitters,
    st.sampled_from(["mail", "bounce", "double-bounce"]),
)
def test_no_recipient_is_lost(all_states: list[RecipientState], age: float, retry: Retry, jitter: float, kind: str) -> None:
    # Invariant: settled, reported now, or waiting for a time that comes; never two of these, never none.
    message = envelope(len(all_states), age, kind=kind)
    decision = settle(message, all_states, NOW, retry, jitter)
    failed = [index for index, _ in decision.failed] if isinstance(decision, Bounce) else []
    then = decision.then if isinstance(decision, Bounce) else decision
    open_ones = [index for index, state in enumerate(all_states) if not state.settled]
    waiting = [index for index in open_ones if index not in failed]
    assert failed == sorted(set(failed))
    assert set(failed) <= set(open_ones)
    assert isinstance(then, RetryAt) == bool(waiting)
    assert all(not isinstance(all_states[index].outcome, Failed) for index in waiting)
    if expired(message, NOW, retry):
        assert not waiting
    if isinstance(decision, Bounce):
        assert decision.failed
    if isinstance(then, RetryAt):
        assert NOW <= then.when <= max(NOW, message.arrival + lifetime(message, retry))
        assert then.when - NOW <= retry.maximum * 1.1 + 1e-6


@given(st.floats(0, 4e5), retries, jitters)
def test_times_are_within_bounds(age: float, retry: Retry, jitter: float) -> None:
    # Invariant: never early, never late, and never after the expiry while that is ahead.
    when = next_attempt(NOW - age, NOW, retry, jitter)
    expiry = NOW - age + retry.lifetime
    assert when >= NOW
    assert when - NOW <= retry.maximum * 1.1 + 1e-6
    if expiry > NOW:
        assert when <= expiry
        assert when >= min(NOW + retry.minimum, expiry) - 1e-6


# -- what a server asks for ---------------------------------------------------------------------------------------------


def asked(reply: str) -> Deferred:
    return Deferred("4.7.1", "x", "mx.example", reply)


def due(age: float, *outcomes: Outcome | None, jitter: float = 0.0, put_off: int = 1) -> float:
    """In how many seconds a message of this age is tried again."""
    told = tuple(RecipientState(outcome, put_off=put_off) for outcome in outcomes)
    verdict = settle(envelope(len(told), age), told, NOW, RETRY, jitter)
    then = verdict.then if isinstance(verdict, Bounce) else verdict
    assert isinstance(then, RetryAt)
    return then.when - NOW


@pytest.mark.parametrize(
    ("reply", "wait"),
    [
        ("451 4.7.1 Greylisted, try again in 45 seconds", 45),
        ("451 4.7.1 Greylisted, try again in 5 seconds", 30),
        ("451 4.7.1 Greylisted, try again in 0 seconds", 30),
        ("450 4.7.1 rate limited for 20 minutes", 1200),
        ("450 4.7.1 try again in 5 hours", 3600),
        ("451 4.7.1 Greylisted", 300),
    ],
)
@pytest.mark.parametrize("age", [0, 100, 250])
def test_a_hint_sets_the_next_attempt(reply: str, wait: float, age: float) -> None:
    assert due(age, asked(reply)) == wait


def test_nobody_comes_before_the_time_that_was_asked_for() -> None:
    assert due(0, asked("450 try again in 60 seconds"), jitter=0.5) == 63


def test_a_hint_shortens_the_wait_of_an_old_message_a_few_times_only() -> None:
    hint = asked("450 try again in 60 seconds")
    assert due(20_000, hint) == 60
    assert due(20_000, hint, put_off=HINTS) == 60
    assert due(20_000, hint, put_off=HINTS + 1) == 4000
    assert due(0, asked("450 try again in 900 seconds"), put_off=HINTS + 1) == 900, "a longer one is always heard"


def test_the_recipient_who_is_due_first_decides() -> None:
    soon, late = asked("450 try again in 60 seconds"), asked("450 try again in 1 hour")
    assert due(0, soon, late) == 60
    assert due(0, late, LATER) == 300
    assert due(0, late, None) == 300
    assert due(0, late, SENT) == 3600
    assert due(0, late, NEVER) == 3600


def test_the_last_attempt_is_at_the_expiry_whatever_a_server_asks_for() -> None:
    late = asked("450 try again in 1 hour")
    assert due(RETRY.lifetime - 100, late) == 100


def test_only_what_a_server_said_is_a_hint() -> None:
    assert due(0, Deferred("4.4.1", "the log says: try again in 45 seconds")) == 300


def test_a_recipient_is_put_off_each_time_that_a_server_says_so() -> None:
    silent = Deferred("4.4.1", "connection refused", destination=True)
    (state,) = replay(1, [Attempt(1.0, ((0, outcome),)) for outcome in (LATER, silent, LATER)])
    assert state.put_off == 2
