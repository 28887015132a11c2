"""Wrong passwords, counted for networks and logins, over processes."""

from __future__ import annotations

import os

import pytest

from mtad.throttle import LOGIN_FACTOR, LONGEST_PAUSE, WINDOW, Throttle


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def throttle(clock: Clock) -> Throttle:
    return Throttle(b"k" * 16, 5, clock)


def test_each_try_takes_longer_s_pa13(throttle: Throttle) -> None:
    assert not throttle.refused("192.0.2.1", "alice")
    assert [throttle.failed("192.0.2.1", f"user{n}") for n in range(5)] == [1.0, 2.0, 4.0, 8.0, LONGEST_PAUSE]
    assert throttle.refused("192.0.2.1")
    assert throttle.refused("192.0.2.1", "anybody")
    assert not throttle.refused("192.0.2.2", "alice")


def test_an_ipv6_client_is_its_64(throttle: Throttle) -> None:
    for n in range(5):
        throttle.failed(f"2001:db8::{n}", f"user{n}")
    assert throttle.refused("2001:db8::ffff")
    assert not throttle.refused("2001:db8:0:1::1")


def test_a_login_guessed_at_from_everywhere_s_pa13(throttle: Throttle) -> None:
    """Its owner still gets in; who was wrong once does not try again."""
    for n in range(5 * LOGIN_FACTOR):
        throttle.failed(f"192.0.2.{n}", "alice")
    assert throttle.refused("192.0.2.1", "ALICE")
    assert not throttle.refused("192.0.2.1", "bob")
    assert not throttle.refused("192.0.2.1")
    assert not throttle.refused("198.51.100.1", "alice")
    assert throttle.failed("198.51.100.1", "alice") == LONGEST_PAUSE
    assert throttle.refused("198.51.100.1", "alice")


def test_it_is_forgotten_after_the_last_failure(throttle: Throttle, clock: Clock) -> None:
    for _ in range(5):
        throttle.failed("192.0.2.1", "alice")
        clock.now += WINDOW / 2
    clock.now += WINDOW / 2 - 1
    assert throttle.refused("192.0.2.1")
    clock.now += 2
    assert not throttle.refused("192.0.2.1")
    assert throttle.failed("192.0.2.1", "alice") == 1.0


def test_a_clock_that_is_set_back_forgets_nothing(throttle: Throttle, clock: Clock) -> None:
    for _ in range(5):
        throttle.failed("192.0.2.1", "alice")
    clock.now -= 10_000
    assert throttle.refused("192.0.2.1")


def test_all_processes_count_together(throttle: Throttle) -> None:
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            try:
                throttle.failed("192.0.2.1", "alice")
            finally:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    assert throttle.refused("192.0.2.1")


def test_a_reload_keeps_the_counts(throttle: Throttle) -> None:
    for _ in range(3):
        throttle.failed("192.0.2.1", "alice")
    assert throttle.limited(3).refused("192.0.2.1")
    assert not throttle.refused("192.0.2.1")
    throttle.limited(9).failed("192.0.2.1", "alice")
    throttle.failed("192.0.2.1", "alice")
    assert throttle.refused("192.0.2.1")


def test_odd_names_are_counted_like_others(throttle: Throttle) -> None:
    for login in ("", "\ud800", "x" * 100_000, "a\0b", "ü"):
        assert throttle.failed("192.0.2.9", login) > 0
    assert throttle.refused("192.0.2.9")
