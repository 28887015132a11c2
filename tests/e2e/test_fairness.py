"""Deciding (issue 2): "Destinations are served fairly: a thousand messages for a dead host never delay the one for a live
host." Dead in each of the ways in which a host can be."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtad.envelope import Envelope, Recipient
from mtad.spool.queues import Queue, Spool
from tests.e2e.world import MESSAGE, SENDER, World
from tests.peers.dns import SILENT
from tests.peers.mx import HANG, Script
from tests.site import await_value

#: Seconds that the message for the live host may take on a busy machine; the dead host's time-outs are 30 s and more.
SOON = 10.0


def fill(world: World, domains: list[str], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put ``count`` messages for these domains, in turns, into incoming of a server that does not run yet."""
    spool = Spool(str(world.site.spool_path), create=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _fd: None)
        for number in range(count):
            to = (Recipient(f"u{number}@{domains[number % len(domains)]}"),)
            incoming = spool.enter(Envelope(spool.ids.new(), time.time(), SENDER, to))
            incoming.write(MESSAGE)
            incoming.commit()
    spool.close()


def refuses(world: World) -> str:
    return world.domain(world.address())


def never_greets(world: World) -> str:
    return world.domain(world.blackhole())


def hangs_after_the_dot(world: World) -> str:
    return world.domain(world.mx(Script(dot=HANG)))


def dns_is_silent(world: World) -> str:
    world.dns.set("silent.test", {"MX": SILENT})
    return "silent.test"


@pytest.mark.parametrize(
    ("dead", "count"), [(refuses, 1000), (never_greets, 1000), (hangs_after_the_dot, 200), (dns_is_silent, 200)]
)
def test_a_thousand_messages_for_a_dead_host_never_delay_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: Callable[[World], str], count: int
) -> None:
    """a thousand messages for a dead host never delay the one for a live host"""
    with World(tmp_path, start=False, processes={"stop_timeout": "100ms"}, delivery={"connect_timeout": "30s"}) as world:
        mx = world.mx()
        alive = world.domain(mx)
        fill(world, [dead(world)], count, monkeypatch)
        world.site.start()
        # Some at the very start, when all of the others are being looked at, and some later.
        for number in range(1, 9):
            before = time.monotonic()
            world.send(f"b@{alive}")
            mx.await_messages(number)
            assert time.monotonic() - before < SOON
        world.site.send("a@sender.test", "bob@example.org", MESSAGE)
        world.site.await_mail("bob", timeout=SOON)
        if dead is refuses:
            await_value(lambda: len(world.site.files("deferred")) == count, what="all are deferred, and tried or not")
            reasons = [recipient["delay_reason"] for row in world.site.queue() for recipient in row["recipients"]]
            tried = [reason for reason in reasons if reason.startswith("connect to ")]
            assert 5 <= len(tried) <= 20
            assert all(
                reason.startswith("delivery temporarily suspended: connect to ") for reason in set(reasons) - set(tried)
            )
        else:
            await_value(lambda: len(world.site.files("active")) >= count - 20, what="all are taken up")


def test_many_dead_destinations_do_not_use_up_the_deliveries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Destinations are served fairly: thirty dead ones with fifteen messages each"""
    with World(tmp_path, start=False, processes={"stop_timeout": "100ms"}) as world:
        hole = world.blackhole()
        fill(world, [world.domain(hole) for _ in range(30)], 450, monkeypatch)
        mx = world.mx()
        alive = world.domain(mx)
        world.site.start()
        await_value(lambda: len(world.site.files("incoming")) < 50)
        before = time.monotonic()
        world.send(f"b@{alive}")
        mx.await_messages(1)
        assert time.monotonic() - before < SOON


def test_a_destination_with_much_mail_takes_turns_with_one_that_has_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Destinations are served fairly: a slow one with much mail, and another"""
    with World(tmp_path, start=False, delivery={"processes": 1, "threads": 2}) as world:
        big, small = world.mx(), world.mx()
        fill(world, [world.domain(big)], 300, monkeypatch)
        little = world.domain(small)
        world.site.start()
        big.await_messages(1)
        world.send(f"b@{little}")
        small.await_messages(1)
        assert len(big.messages) < 290, "the one message did not wait for all of the others"
        big.await_messages(300)


def test_a_message_for_a_live_and_a_dead_host_reaches_the_live_one(tmp_path: Path) -> None:
    """a thousand messages for a dead host never delay [...]: nor does a dead recipient its neighbour in the envelope"""
    with World(tmp_path, processes={"stop_timeout": "100ms"}) as world:
        mx = world.mx()
        queue_id = world.send(f"a@{world.domain(world.blackhole())}", f"b@{world.domain(mx)}")
        [taken] = mx.await_messages(1)
        assert len(taken.recipients) == 1
        assert world.site.files("active") == [queue_id]
        assert world.site.history(Queue.ACTIVE, queue_id)
