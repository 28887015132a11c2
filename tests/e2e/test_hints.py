"""Hints in replies (issue 4), end to end: a server that says when to come back is asked again then.

``A hint in the reply ("try again in 180 seconds", greylisting's usual wordings) sets the next attempt, clamped to
30 s - 1 h.``
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtad.retry import JITTER
from mtad.spool.queues import Queue
from tests.e2e.world import World
from tests.peers.mx import Say, Script
from tests.site import PATIENCE


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("hints")) as world:
        yield world


@pytest.mark.parametrize(
    ("reply", "wait"),
    [
        ("451 4.7.1 Greylisted, please try again in 45 seconds", 45),
        ("451 4.7.1 Greylisting in action, please come back in 00:15:00", 900),
        ("450 4.2.0 <b@x.test>: Recipient address rejected: Greylisted for 1 seconds", 30),
        ("450 4.7.1 Rate limit exceeded, retry after 6 hours", 3600),
        ("451 4.7.1 Greylisted, see http://postgrey.example/help", 300),
    ],
)
def test_a_hint_sets_the_next_attempt(world: World, reply: str, wait: float) -> None:
    before = time.time()
    mx = world.mx(Script(rcpt=Say(reply)))
    queue_id = world.send(f"b@{world.domain(mx)}")
    row = world.site.await_deferred(queue_id)
    assert row["recipients"][0]["delay_reason"].count(reply[4:]) == 1
    due = (world.site.spool_path / "deferred" / queue_id).stat().st_mtime
    assert before + wait <= due <= before + PATIENCE + wait * (1 + JITTER)


def test_the_history_tells_when_the_message_was_taken_in_hand(world: World) -> None:
    before = time.time()
    queue_id = world.send(f"b@{world.domain(world.mx(Script(rcpt=Say('450 4.7.1 later'))))}")
    world.site.await_deferred(queue_id)
    [attempt] = world.attempts(Queue.DEFERRED, queue_id)
    assert before <= attempt.active <= attempt.started <= time.time()


def test_a_flush_does_not_wait_for_the_time_that_a_hint_has_set(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        mx = world.mx(Script(rcpt=[Say("451 4.7.1 Greylisted, try again in 30 seconds"), Say("250 ok")]))
        queue_id = world.send(f"b@{world.domain(mx)}")
        world.site.await_deferred(queue_id)
        world.site.run("mtad-flush", queue_id)
        mx.await_messages(1)
        world.site.await_empty_queue()
