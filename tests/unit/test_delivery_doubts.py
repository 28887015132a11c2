"""What a delivery process writes before the final dot, and what that is worth (issue 5, in doubt)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest

from mtad.config import Retry
from mtad.delivery.jobs import Result
from mtad.delivery.transport import Content, Task
from mtad.outcome import Attempt, Deferred
from mtad.progress import Doubt, Event
from mtad.spool.message import OpenMessage
from tests.unit.delivery_aid import SENT, World, giving


@pytest.fixture(params=["retry", "hold"])
def on_doubt(request: pytest.FixtureRequest) -> Literal["retry", "hold"]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_doubt: Literal["retry", "hold"]) -> Iterator[World]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    world = World(tmp_path, Retry(on_doubt=on_doubt))
    yield world
    world.close()


def test_the_doubt_is_on_stable_storage_before_the_dot_where_that_is_wanted(
    world: World, monkeypatch: pytest.MonkeyPatch, on_doubt: str
) -> None:
    queue_id = world.message()
    synced: list[list[Event]] = []
    monkeypatch.setattr(os, "fdatasync", lambda _fd: synced.append(world.events(queue_id)))
    at_the_dot: list[int] = []

    def deliver(task: Task, content: Content, in_doubt: Callable[[str], None]) -> Sequence[Attempt]:
        attempts = giving(SENT)(task, content, in_doubt)
        at_the_dot.append(len(synced))
        return attempts

    world.script(deliver)
    assert world.work(queue_id).outcomes == ((0, SENT),)
    assert at_the_dot == [1 if on_doubt == "hold" else 0]
    assert [type(event) for events in synced for event in events] == ([Doubt] if on_doubt == "hold" else [])


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def append(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OpenMessage, "append", append)


def test_nothing_is_sent_that_could_not_be_marked_where_it_would_be_held(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], on_doubt: str
) -> None:
    queue_id = world.message()
    sent: list[str] = []

    def deliver(task: Task, content: Content, in_doubt: Callable[[str], None]) -> Sequence[Attempt]:
        in_doubt("mx")
        sent.append("the final dot")
        return giving(SENT)(task, content, lambda _host: None)

    world.script(deliver)
    refuse(monkeypatch)
    result = world.work(queue_id)
    if on_doubt == "retry":
        assert (sent, result.outcomes, result.unwritten) == (["the final dot"], ((0, SENT),), True)
    else:
        deferred = Deferred("4.3.0", "not sent: the spool does not take that it is about to be")
        assert (sent, result) == ([], Result(7, ((0, deferred),)))
    said = capfd.readouterr().err
    assert "cannot be noted in the queue file" in said
    assert "panic" not in said


def test_no_mail_is_stored_here_that_could_not_be_marked(
    world: World, monkeypatch: pytest.MonkeyPatch, on_doubt: str
) -> None:
    queue_id = world.message("alice@example.org")
    refuse(monkeypatch)
    world.work(queue_id, transport="local")
    new = world.mail / "alice" / "new"
    assert (len(list(new.iterdir())) if new.exists() else 0) == (1 if on_doubt == "retry" else 0)
