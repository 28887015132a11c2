"""Deciding (issue 2): "On a restart everything in active goes on as if nothing had happened, the delivered recipients left
out." And what is left of the processes when they are killed at the worst moments."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtad.outcome import Attempt, Deferred, Delivered
from mtad.spool.queues import Queue
from tests.e2e.world import MESSAGE, World, await_gone
from tests.peers.mx import HANG, OK, Mx, Say, Script
from tests.procs import suspend
from tests.site import alive, await_value, children

SENT = Delivered("2.0.0", "sent")
BUSY = Deferred("4.2.0", "busy")


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # its master is dead, and it may know already
            os.kill(pid, signal.SIGKILL)


def kill_deliveries(world: World) -> None:
    """All at once: the scheduler must not hand what the first one had to the second, which dies, too."""
    [scheduler] = world.site.pids("scheduler")
    suspend(scheduler)
    try:
        victims = children(scheduler)
        kill(victims)
        await_value(lambda: not any(map(alive, victims)))
    finally:
        os.kill(scheduler, signal.SIGCONT)


def transactions(mx: Mx) -> list[list[str]]:
    """The accepted recipients of each message that was taken."""
    return [message.recipients for message in mx.messages]


# -- in order ---------------------------------------------------------------------------------------------------------


def test_a_delivered_recipient_gets_no_second_copy_after_a_restart(tmp_path: Path) -> None:
    """the delivered recipients left out: with an orderly stop and start between two attempts"""
    with World(tmp_path, start=False) as world:
        mx = world.mx()
        domain = world.domain(mx)
        late = Say("450 4.2.1 later"), OK
        mx.script = Script(rcpt={f"late@{domain}": late})
        world.site.start()
        queue_id = world.send(f"now@{domain}", f"late@{domain}")
        world.site.await_deferred(queue_id)
        world.site.stop()
        assert world.site.run("mtad-flush", queue_id).stdout == "1 message: mtad is not running: tried when it starts\n"
        world.site.start()
        mx.await_messages(2)
        await_gone(world, queue_id)
        assert transactions(mx) == [[f"now@{domain}"], [f"late@{domain}"]]


@pytest.mark.parametrize("count", [1, 120])
def test_everything_in_active_goes_on(tmp_path: Path, count: int) -> None:
    """On a restart everything in active goes on as if nothing had happened, the delivered recipients left out."""
    with World(tmp_path, start=False) as world:
        mx = world.mx()
        domain = world.domain(mx)
        history = [Attempt(time.time(), ((0, SENT), (1, BUSY)))]
        for number in range(count):
            names = [f"{kind}{number}@{domain}" for kind in ("done", "left", "new")]
            world.place(Queue.ACTIVE, *names, events=history)
        world.site.start()
        mx.await_messages(count)
        world.site.await_empty_queue()
        wanted = [[f"left{number}@{domain}", f"new{number}@{domain}"] for number in range(count)]
        assert sorted(transactions(mx)) == sorted(wanted)
        assert "in doubt" not in world.site.log()


def test_a_stop_waits_for_the_delivery_under_way(tmp_path: Path) -> None:
    """`mtad stop`: deliveries in progress are finished and settled"""
    with World(tmp_path) as world:
        mx = world.mx(Script(dot=Say("250 2.0.0 at last", delay=0.7)))
        queue_id = world.send(f"b@{world.domain(mx)}")
        mx.await_command("DATA")
        world.site.stop()
        assert world.site.files("active") == []
        assert f"{queue_id}: removed" in world.site.log()
        world.site.start()
        assert len(mx.messages) == 1


def test_a_stop_does_not_wait_for_ever_and_says_what_is_in_doubt(tmp_path: Path) -> None:
    """a crash can repeat at most the deliveries that were between final dot and recorded reply, and `mtad` says which"""
    with World(tmp_path, processes={"stop_timeout": "300ms"}) as world:
        mx = world.mx(Script(dot=[HANG, OK]))
        domain = world.domain(mx)
        queue_id = world.send(f"b@{domain}")
        mx.await_command("DATA")
        mx.wait(lambda: bool(mx.transactions[0].content))
        before = time.monotonic()
        world.site.stop()
        assert time.monotonic() - before < 4
        assert world.site.files("active") == [queue_id]
        [row] = world.site.queue()
        assert row["recipients"][0]["in_doubt"] == f"mx1.{domain}"
        assert f"(in doubt: mx1.{domain} may have it already)" in world.site.run("mtaq").stdout
        world.site.start()
        world.site.await_log(rf"{queue_id}: warning: in doubt: mx1\.{domain} may have taken this message for <b@{domain}>")
        mx.await_messages(1)
        await_gone(world, queue_id)


def test_a_reload_lets_a_long_delivery_finish_and_nothing_is_sent_twice(tmp_path: Path) -> None:
    """`mtad reload`: new workers with the new configuration, old ones drain"""
    with World(tmp_path, processes={"stop_timeout": "200ms"}) as world:
        slow = world.mx(Script(dot=Say("250 2.0.0 at last", delay=5.0)))
        quick = world.mx()
        queue_id = world.send(f"b@{world.domain(slow)}")
        slow.await_command("DATA")
        world.site.renew()
        other = world.send(f"c@{world.domain(quick)}")
        quick.await_messages(1)
        await_gone(world, other)
        assert world.site.files("active") == [queue_id]
        await_gone(world, queue_id)
        assert len(slow.messages) == len(slow.transactions) == 1
        assert "in doubt" not in world.site.log()


def test_reloads_under_load_send_nothing_twice(tmp_path: Path) -> None:
    """`mtad reload` [...]: what lay in the channels of the old ones is done by one of them, or by the new"""
    with World(tmp_path) as world:
        mx = world.mx()
        domains = [world.domain(mx) for _ in range(10)]
        for start in range(0, 200, 50):
            with world.site.client("relay") as client:
                for number in range(start, start + 50):
                    client.sendmail("alice@example.org", f"u{number}@{domains[number % 10]}", MESSAGE)
            world.site.renew()
        mx.await_messages(200)
        world.site.await_empty_queue()
        names = [name for message in mx.transactions for name in message.recipients]
        assert len(names) == len(set(names)) == 200


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def kill_all(world: World) -> None:
    kill(world.site.processes())
    assert world.site.process is not None
    world.site.process.wait()
    world.site.process = None


def test_a_killed_scheduler_leaves_its_deliveries_alone_and_the_next_one_waits_for_them(tmp_path: Path) -> None:
    """A delivery [...] takes nothing with it; nor does a scheduler: orphans finish, and nothing is sent twice"""
    with World(tmp_path) as world:
        mx = world.mx(Script(dot=Say("250 2.0.0 at last", delay=1.5)))
        queue_id = world.send(f"b@{world.domain(mx)}")
        mx.await_command("DATA")
        [scheduler] = world.site.pids("scheduler")
        kill([scheduler])
        await_value(lambda: scheduler not in (pids := world.site.pids("scheduler")) and pids)
        other = world.mx()
        world.send(f"c@{world.domain(other)}")
        other.await_messages(1)
        await_gone(world, queue_id)
        assert len(mx.transactions) == 1
        assert "in doubt" not in world.site.log()


def test_a_delivery_killed_before_the_dot_is_done_again(tmp_path: Path) -> None:
    """A delivery process that hangs, crashes or is killed takes nothing with it: the scheduler puts its messages back."""
    with World(tmp_path) as world:
        mx = world.mx(Script(rcpt=[HANG, OK], extensions=()))
        queue_id = world.send(f"b@{world.domain(mx)}")
        mx.await_command("RCPT")
        kill_deliveries(world)
        mx.await_messages(1)
        await_gone(world, queue_id)
        world.site.await_log(r"delivery process \d+ died \(killed by SIGKILL\); 1 deliveries are taken back")
        assert "in doubt" not in world.site.log()


def test_a_delivery_killed_after_the_dot_is_in_doubt(tmp_path: Path) -> None:
    """a crash can repeat at most the deliveries that were between final dot and recorded reply, and `mtad` says which"""
    with World(tmp_path, processes={"stop_timeout": "100ms"}) as world:
        mx = world.mx(Script(dot=[HANG, HANG]))
        domain = world.domain(mx)
        queue_id = world.send(f"b@{domain}")
        mx.wait(lambda: bool(mx.transactions and mx.transactions[0].content))
        kill_deliveries(world)
        world.site.await_log(rf"{queue_id}: warning: in doubt: mx1\.{domain} may have taken this message for <b@{domain}>")
        mx.wait(lambda: len(mx.transactions) == 2 and bool(mx.transactions[1].content))
        [row] = world.site.queue()
        assert (row["queue_name"], row["recipients"][0]["in_doubt"]) == ("active", f"mx1.{domain}")


def test_only_the_recipients_in_doubt_are_repeated(tmp_path: Path) -> None:
    """a crash can repeat at most [...]: who was delivered in the same message, and recorded, is left out"""
    with World(tmp_path) as world:
        quick, slow = world.mx(), world.mx(Script(dot=[HANG, OK]))
        queue_id = world.send(f"a@{world.domain(quick)}", f"b@{world.domain(slow)}")
        quick.await_messages(1)
        slow.wait(lambda: bool(slow.transactions and slow.transactions[0].content))
        world.site.await_log(rf"{queue_id}: to=<a@.*status=sent")
        kill_deliveries(world)
        slow.await_messages(1)
        await_gone(world, queue_id)
        assert len(quick.transactions) == 1


def test_a_message_with_which_delivery_processes_die_does_not_stop_the_others(tmp_path: Path) -> None:
    """A delivery process that [...] crashes [...] takes nothing with it"""
    with World(tmp_path, delivery={"processes": 1}) as world:
        killer = world.mx(Script(mail=HANG))
        mx = world.mx()
        queue_id = world.send(f"b@{world.domain(killer)}")
        for number in (1, 2):
            killer.await_connections(number)
            kill_deliveries(world)
        assert world.reason(queue_id).startswith("4.3.0 delivery process killed by SIGKILL")
        world.send(f"c@{world.domain(mx)}")
        mx.await_messages(1)


@pytest.mark.parametrize("victim", ["everything", "master"])
def test_a_message_that_got_its_250_survives_the_death_of(tmp_path: Path, victim: str) -> None:
    """Kill -9 [...]: each message that got its 250 is delivered, bounced or in the queue"""
    kills: dict[str, Callable[[World], None]] = {"everything": kill_all, "master": lambda world: world.site.kill()}
    with World(tmp_path, processes={"stop_timeout": "100ms"}) as world:
        mx = world.mx(Script(dot=[HANG, OK]))
        domain = world.domain(mx)
        client = world.site.client("relay")
        for number in range(20):
            client.sendmail("alice@example.org", f"u{number}@{domain}", MESSAGE)
        kills[victim](world)
        client.close()
        world.site.start()
        await_value(lambda: len({name for names in transactions(mx) for name in names}) == 20, what="twenty are delivered")
        world.site.await_empty_queue()
