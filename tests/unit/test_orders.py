"""Orders about messages, on their files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from mtad.desk import Ordered, OrderName
from mtad.errors import QueueFileUnfinished
from mtad.outcome import Attempt, Deferred, Failed
from mtad.progress import Instructed, ordered
from mtad.spool.orders import Unfit, carry_out, collect, failures, give, remember
from mtad.spool.queues import LIVE, Queue
from tests.unit.scheduler_aid import LATER, NEVER, OK, World
from tests.unit.spool_aid import needs_root

ALL: tuple[OrderName, ...] = get_args(OrderName)
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    world = World(tmp_path)
    yield world
    world.spool.close()


def tried(world: World, *outcomes: Any) -> Attempt:
    return Attempt(world.clock.wall, tuple(enumerate(outcomes)))


# -- on the file ------------------------------------------------------------------------------------------------------


def do(world: World, what: OrderName, queue: Queue, queue_id: str) -> Queue | None:
    return carry_out(world.spool, what, queue, queue_id, world.clock.wall + 60)


@pytest.mark.parametrize(
    ("what", "places"),
    [
        ("hold", {"incoming": "hold", "active": "hold", "deferred": "hold", "hold": "hold"}),
        ("release", {"hold": "deferred"}),
        ("delete", dict.fromkeys(("incoming", "active", "deferred", "hold"), "")),
        ("requeue", {"incoming": "incoming", "active": "active", "deferred": "deferred"}),
        ("expire", {"incoming": "incoming", "active": "active", "deferred": "deferred", "hold": "deferred"}),
        ("bounce", {"incoming": "incoming", "active": "active", "deferred": "deferred", "hold": "deferred"}),
    ],
)
def test_where_a_message_is_afterwards(world: World, what: OrderName, places: dict[str, str]) -> None:
    for queue in LIVE:
        queue_id = world.place(queue, events=[tried(world, LATER)])
        if queue.value not in places:
            with pytest.raises(Unfit, match="on hold"):
                do(world, what, queue, queue_id)
            assert world.where(queue_id) == [queue.value]
            continue
        there = do(world, what, queue, queue_id)
        assert (there.value if there else "") == places[queue.value]
        assert world.where(queue_id) == ([there.value] if there else [])
        if there is Queue.DEFERRED:
            assert world.path(there, queue_id).stat().st_mtime == world.clock.wall + 60


@pytest.mark.parametrize("what", ALL)
def test_what_is_gone_and_what_is_no_message_yet(world: World, what: OrderName) -> None:
    for queue in LIVE:
        if queue is Queue.HOLD and what in ("requeue", "hold"):
            continue  # it does not look
        with pytest.raises(FileNotFoundError):
            do(world, what, queue, "4jYZxd5Snjz5fB")
    envelope = world.envelope()
    entry = world.spool.enter(envelope)
    entry.write(b"x" * 100_000)
    with pytest.raises(QueueFileUnfinished):
        do(world, what, Queue.INCOMING, envelope.id)
    assert collect([envelope.id, "../x"], lambda name: give(world.spool, what, name, 1.0)).missing == (envelope.id, "../x")
    entry.commit()
    assert world.where(envelope.id) == ["incoming"]


@pytest.mark.parametrize(("what", "status"), [("expire", "4.4.7"), ("bounce", "5.7.0")])
def test_only_what_is_left_fails_and_says_what_was_last_in_the_way(world: World, what: OrderName, status: str) -> None:
    said = Deferred("4.2.0", "host mx said: busy", "mx.far.test", "450 4.2.0 busy")
    queue_id = world.place(Queue.DEFERRED, *"abcd", events=[tried(world, OK, NEVER, said)])
    do(world, what, Queue.DEFERRED, queue_id)
    sent, never, busy, new = (state.outcome for state in world.load(Queue.DEFERRED, queue_id).states)
    assert (sent, never) == (OK, NEVER)
    assert isinstance(busy, Failed)
    assert isinstance(new, Failed)
    assert (busy.status, busy.remote, busy.reply) == (status, said.remote, said.reply)
    assert busy.text.endswith(" after 1 minute, by order of an administrator; last: host mx said: busy")
    assert new.text.endswith("it was never tried")
    events = world.load(Queue.DEFERRED, queue_id).events
    do(world, what, Queue.DEFERRED, queue_id)
    assert world.load(Queue.DEFERRED, queue_id).events == events, "given twice it adds nothing"
    assert failures(world.load(Queue.DEFERRED, queue_id), what, 0.0) is None


@pytest.mark.parametrize("what", ["expire", "bounce"])
def test_of_a_notice_to_postmaster_nobody_can_be_told(world: World, what: OrderName) -> None:
    queue_id = world.place(Queue.HOLD, kind="double-bounce", sender="")
    with pytest.raises(Unfit, match="mtaq delete"):
        do(world, what, Queue.HOLD, queue_id)
    with pytest.raises(Unfit, match="mtaq delete"):
        remember(world.spool, what, Queue.HOLD, queue_id, 1.0)
    assert world.load(Queue.HOLD, queue_id).events == ()


def test_since_when_it_is_on_hold_stands_in_the_file(world: World) -> None:
    queue_id = world.place(Queue.DEFERRED)
    do(world, "hold", Queue.DEFERRED, queue_id)
    do(world, "release", Queue.HOLD, queue_id)
    when = world.clock.wall + 60
    assert world.load(Queue.DEFERRED, queue_id).events == (
        Instructed(when, "hold", True),
        Instructed(when, "release", True),
    )
    assert ordered(world.load(Queue.DEFERRED, queue_id).events) is None


def test_a_full_disk_keeps_no_message_from_being_held_or_released(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    queue_id = world.place(Queue.DEFERRED)

    def full(*_: object, **__: object) -> None:
        raise NO_SPACE

    monkeypatch.setattr("mtad.spool.message.OpenMessage.append", full)
    assert do(world, "hold", Queue.DEFERRED, queue_id) is Queue.HOLD
    assert do(world, "release", Queue.HOLD, queue_id) is Queue.DEFERRED
    with pytest.raises(OSError, match="No space"):
        do(world, "expire", Queue.DEFERRED, queue_id)
    answer = collect([queue_id], lambda name: give(world.spool, "bounce", name, 1.0))
    assert answer.refused == ((queue_id, "the spool cannot be changed: No space left on device"),)
    assert world.where(queue_id) == ["deferred"]


def test_the_last_order_that_waits_holds(world: World) -> None:
    queue_id = world.place(Queue.ACTIVE)

    def note(what: OrderName) -> OrderName | None:
        remember(world.spool, what, Queue.ACTIVE, queue_id, 1.0)
        return ordered(world.load(Queue.ACTIVE, queue_id).events)

    with pytest.raises(Unfit, match="not on hold"):
        note("release")
    assert note("requeue") is None
    assert world.load(Queue.ACTIVE, queue_id).events == ()
    assert [note(what) for what in ("hold", "hold", "delete", "hold")] == ["hold", "hold", "delete", "hold"]
    assert len(world.load(Queue.ACTIVE, queue_id).events) == 3
    with pytest.raises(Unfit, match="on hold"):
        note("requeue")
    assert note("release") is None
    assert note("bounce") == "bounce"
    assert note("requeue") is None
    note("hold")
    assert do(world, "release", Queue.ACTIVE, queue_id) is Queue.ACTIVE
    assert ordered(world.load(Queue.ACTIVE, queue_id).events) is None


def test_a_message_in_work_is_left_alone_without_a_scheduler(world: World) -> None:
    queue_id = world.place(Queue.ACTIVE)
    with world.spool.open(Queue.ACTIVE, queue_id):
        answer = collect([queue_id], lambda name: give(world.spool, "hold", name, 1.0))
    assert answer == Ordered(later=(queue_id,))
    assert world.where(queue_id) == ["active"]
    world.scheduler.restore(queue_id)
    assert world.run() == []
    assert world.where(queue_id) == ["hold"]


# -- what commands rely on --------------------------------------------------------------------------------------------


def test_an_order_is_durable_when_the_command_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr(os, "sync", lambda: synced.append("all"))
    queue_id = world.place(Queue.HOLD)
    synced.clear()
    world.spool.sync([queue_id, "4jYZxd5Snjz5fB"])
    assert sorted(synced) == sorted([queue_id, *(queue.value for queue in Queue)])
    synced.clear()
    world.spool.sync([queue_id] * 1000)
    assert synced == ["all", *(queue.value for queue in Queue)], "which says, unlike the first, when it has failed"


@needs_root
def test_a_lock_that_root_makes_belongs_to_the_owner_of_the_spool(world: World) -> None:
    os.chown(world.root, 12345, 12346)
    path = world.root / "scheduler.lock"
    os.close(world.spool.lock())
    status = path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12345, 12346, 0o600)
    elsewhere = world.root / "elsewhere"
    path.unlink()
    path.symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic links"):
        world.spool.lock()
    assert not elsewhere.exists()
