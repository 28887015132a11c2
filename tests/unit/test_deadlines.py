"""How long a client may take: deadlines, the least rate of content, and what stress makes of them."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.config import Duration, Limits
from mtad.listener.deadlines import Allowance, Deadline, Stress, allowance

LIMITS = Limits(
    connections=30,
    command_timeout=Duration(300),
    data_timeout=Duration(1800),
    tls_timeout=Duration(30),
    data_rate=500,
    data_window=Duration(120),
    stress_timeout=Duration(10),
)
CALM = allowance(LIMITS)
STRESSED = allowance(LIMITS, stressed=True)


def _in_content(now: float = 1000.0, allowed: Allowance = CALM) -> Deadline:
    deadline = Deadline(now, allowed)
    deadline.begin(now, allowed, object(), in_content=True)
    return deadline


def _trickle(deadline: Deadline, octets: int, seconds: float, allowed: Allowance = CALM, now: float = 1000.0) -> float:
    """So many octets in so many seconds, again and again; how long the client lasts."""
    start = now
    while seconds <= deadline.wait:
        now += seconds
        deadline.received(now, octets, allowed)
    return now + deadline.wait - start


def test_the_allowances() -> None:
    assert Allowance(300, 30, 1800, 120, 1 / 500) == CALM
    assert Allowance(10, 10, 1800, 10, 1 / 500) == STRESSED


def test_without_a_rate_content_has_its_own_deadline_only_and_under_stress_may_not_be_silent() -> None:
    limits = Limits(data_rate=0, stress_timeout=Duration(10))
    calm, stressed = allowance(limits), allowance(limits, stressed=True)
    assert _trickle(_in_content(allowed=calm), 1, 100.0, calm) == pytest.approx(1800)
    assert _in_content(allowed=calm).wait == 1800
    assert _in_content(allowed=stressed).wait == 10
    assert _trickle(_in_content(allowed=stressed), 1, 9.0, stressed) == pytest.approx(1800)


def test_stress_never_has_more_patience_than_calm() -> None:
    limits = Limits(command_timeout=Duration(5), tls_timeout=Duration(5), data_window=Duration(5))
    assert allowance(limits) == allowance(limits, stressed=True)


def test_a_command_has_a_deadline_that_octets_do_not_move() -> None:
    deadline = Deadline(1000.0, CALM)
    assert deadline.wait == 300
    deadline.received(1100.0, 400, CALM)
    assert deadline.wait == 200
    assert deadline.since == 1000.0, "nothing was complete"
    deadline.silence(1300.0)
    assert deadline.wait <= 0
    deadline.begin(1300.0, CALM, None, in_content=False)
    assert deadline.wait == 300


@pytest.mark.parametrize(("octets", "seconds", "lasts"), [(1, 10.0, 120), (1, 100.0, 120), (2500, 10.0, 240)])
def test_content_that_comes_too_slowly_is_over_when_the_credit_is(octets: int, seconds: float, lasts: float) -> None:
    """A byte in ten seconds ends at the window; half the rate lasts twice as long."""
    assert lasts - 10 <= _trickle(_in_content(), octets, seconds) <= lasts + 1


@pytest.mark.parametrize(("octets", "seconds"), [(5000, 10.0), (1_000_000, 1.0), (60_000, 119.0)])
def test_content_at_the_least_rate_has_all_of_its_time(octets: int, seconds: float) -> None:
    """Also when it comes in bursts."""
    assert _trickle(_in_content(), octets, seconds) == pytest.approx(1800, abs=1)


def test_what_came_fast_is_no_credit_for_later() -> None:
    deadline = _in_content()
    deadline.received(1001.0, 100_000_000, CALM)
    assert deadline.wait == 120, "the very same number, so that nothing is to be set"
    assert _trickle(deadline, 1, 10.0, now=1001.0) <= 121


def test_silence_in_content_is_over_when_the_credit_is() -> None:
    deadline = _in_content()
    deadline.silence(1100.0)
    assert deadline.wait == 20
    deadline.silence(1120.0)
    assert deadline.wait == 0


def test_the_deadline_of_content_is_for_all_of_its_chunks() -> None:
    """However fast each is, and however long the pauses between them are."""
    deadline = Deadline(1000.0, CALM)
    transaction = object()
    now = 1000.0
    while now < 5000 and deadline.wait > 0:
        deadline.begin(now, CALM, transaction, in_content=True)
        now += 1
        deadline.begin(now, CALM, transaction, in_content=False)
        now += min(250.0, deadline.wait)
        if deadline.wait < 250:
            deadline.silence(now)
    assert now <= 2800


def test_another_message_has_its_own_deadline() -> None:
    """Also when it follows in the same octets."""
    deadline = Deadline(1000.0, CALM)
    for number in range(100):
        deadline.begin(1000.0 + 100 * number, CALM, object(), in_content=True)
        assert deadline.wait == 120
        deadline.received(1099.0 + 100 * number, 1_000_000, CALM)
        assert deadline.wait == 120


def test_stress_in_the_middle_of_content_shortens_what_is_left() -> None:
    deadline = _in_content()
    deadline.received(1001.0, 1000, STRESSED)
    assert deadline.wait == 10
    deadline.received(1002.0, 1_000_000, CALM)
    assert deadline.wait == 120, "and it goes back by itself"


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 100_000)), max_size=50))
def test_nobody_lasts_longer_than_the_deadline_and_nobody_fast_is_cut(pieces: list[tuple[float, int]]) -> None:
    """Whatever comes: never past the end, never with more than the window to go, and the wait is never a surprise."""
    deadline = _in_content()
    now, credit = 1000.0, 120.0
    for seconds, octets in pieces:
        now += seconds
        credit = min(120.0, credit - seconds + octets / 500)
        deadline.received(now, octets, CALM)
        assert deadline.wait == pytest.approx(min(credit, 2800.0 - now))
        if deadline.wait <= 0:
            break


def test_stress_begins_above_two_thirds_and_ends_below_half() -> None:
    stress = Stress(LIMITS)
    seen = [(sessions, stress.note(sessions), stress.on) for sessions in (20, 21, 30, 18, 15, 14, 20, 21)]
    assert [on for _, _, on in seen] == [False, True, True, True, True, False, False, True]
    assert [changed for _, changed, _ in seen] == [False, True, False, False, False, True, False, True]
    assert stress.allowance == STRESSED


@pytest.mark.parametrize("connections", [1, 2, 3])
def test_stress_ends_when_nobody_is_left_however_few_there_may_be(connections: int) -> None:
    stress = Stress(Limits(connections=connections))
    stress.note(connections)
    assert stress.on
    stress.note(0)
    assert not stress.on
    assert stress.allowance.octet < inf
