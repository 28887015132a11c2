"""Threads of sessions: nobody waits for one, and they are used again."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest

from mtad.listener import threads as module
from mtad.listener.threads import SessionThreads
from tests.site import await_value


class Sessions:
    """Work that lasts until it is told to end, and remembers in which thread it was."""

    def __init__(self) -> None:
        self.began: SimpleQueue[tuple[str, int]] = SimpleQueue()
        self.ends: dict[str, threading.Event] = {}
        self.threads = SessionThreads(self.work)

    def work(self, name: str) -> None:
        self.began.put((name, threading.get_ident()))
        self.ends[name].wait(10)

    def start(self, name: str) -> int:
        """Begin a session and wait until it runs; its thread."""
        self.ends[name] = threading.Event()
        self.threads.start(name)
        began, thread = self.began.get(timeout=10)
        assert began == name
        return thread

    def end(self, name: str) -> None:
        idle = self.threads._idle
        self.ends[name].set()
        await_value(lambda: self.threads._idle == idle + 1, what="the thread is idle")


def test_sessions_at_the_same_time_have_a_thread_each() -> None:
    sessions = Sessions()
    names = [f"s{number}" for number in range(20)]
    assert len({sessions.start(name) for name in names}) == 20
    for name in names:
        sessions.ends[name].set()


def test_one_after_the_other_they_share_a_thread() -> None:
    sessions = Sessions()
    seen = set()
    for number in range(10):
        seen.add(sessions.start(f"s{number}"))
        sessions.end(f"s{number}")
    assert len(seen) == 1


def test_an_idle_thread_ends_after_a_while_and_the_next_session_gets_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE", 0.5)
    sessions = Sessions()
    sessions.start("first")
    sessions.end("first")
    await_value(lambda: sessions.threads._idle == 0, what="the idle thread has ended")
    sessions.start("second")
    sessions.ends["second"].set()


def test_a_promise_holds_however_the_waiting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handing over races with the end of the wait; no session may be lost between the two."""
    monkeypatch.setattr(module, "_IDLE", 0.0005)
    done: SimpleQueue[int] = SimpleQueue()
    threads = SessionThreads(done.put)
    for number in range(2000):
        threads.start(number)
        if number % 3 == 0:
            threading.Event().wait(0.0005)
    assert {done.get(timeout=10) for _ in range(2000)} == set(range(2000))
