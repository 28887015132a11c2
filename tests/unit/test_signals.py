"""Signals as something to be read."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable

import pytest

from mtad.signals import OURS, Signals, held_back, how_ended, let_through


def _in_child(act: Callable[[], bool]) -> bool:
    """Whether ``act`` says so in a process of its own, whose handlers may be changed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if act() else 2
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def _readable(signals: Signals, seconds: float = 0.0) -> bool:
    return bool(select.select([signals], [], [], seconds)[0])


def test_wanted_signals_are_noted_and_wake_a_poll() -> None:
    def act() -> bool:
        signals = Signals({signal.SIGTERM, signal.SIGHUP})
        quiet = not _readable(signals) and signals.take() == set()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        woken = _readable(signals)
        return quiet and woken and signals.take() == {signal.SIGTERM, signal.SIGHUP} and not _readable(signals)

    assert _in_child(act)


def test_others_are_ignored() -> None:
    def act() -> bool:
        signals = Signals({signal.SIGTERM})
        for number in OURS:
            if number is not signal.SIGTERM:
                os.kill(os.getpid(), number)
        return signals.take() == set() and signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL

    assert _in_child(act)


def test_more_signals_than_the_pipe_holds() -> None:
    def act() -> bool:
        signals = Signals({signal.SIGUSR1})
        for _ in range(100_000):
            os.kill(os.getpid(), signal.SIGUSR1)
        return signals.take() == {signal.SIGUSR1} and not _readable(signals)

    assert _in_child(act)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_signal_between_fork_and_the_childs_own_handlers_is_the_childs(*, replaced: bool) -> None:
    """Without `held_back` it would be noted in a copy of the parent's `Signals`, which nobody reads."""

    def act() -> bool:
        parents = Signals({signal.SIGTERM, signal.SIGCHLD})
        go, tell = os.pipe()
        with held_back():
            pid = os.fork()
            if pid == 0:
                os.read(go, 1)  # the parent's SIGTERM is pending by now
                mine = Signals({signal.SIGTERM}) if replaced else parents
                let_through()
                os._exit(0 if _readable(mine, 5.0) and signal.SIGTERM in mine.take() else 3)
        os.kill(pid, signal.SIGTERM)
        os.write(tell, b"x")
        told = os.waitpid(pid, 0)[1] == 0
        return told and _readable(parents, 5.0) and parents.take() == {signal.SIGCHLD}

    assert _in_child(act)


def test_signals_are_let_through_again() -> None:
    def act() -> bool:
        signals = Signals({signal.SIGTERM})
        with held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            before = signals.take()
        return before == set() and signals.take() == {signal.SIGTERM}

    assert _in_child(act)


def test_close() -> None:
    def act() -> bool:
        before = set(os.listdir("/proc/self/fd"))
        first = Signals({signal.SIGTERM})
        second = Signals({signal.SIGTERM})
        first.close()
        os.kill(os.getpid(), signal.SIGTERM)
        return second.take() == {signal.SIGTERM} and len(set(os.listdir("/proc/self/fd")) - before) == 2

    assert _in_child(act)


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exited with 0"), (70, "exited with 70"), (-9, "killed by SIGKILL"), (-40, "killed by signal 40")],
)
def test_how_a_process_ended(code: int, words: str) -> None:
    assert how_ended(code) == words
