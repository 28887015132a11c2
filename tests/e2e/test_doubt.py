"""In doubt (issue 5): "A recipient whose final dot was sent and whose reply was not recorded when a process died is *in
doubt*: marked before the dot, found at recovery, named in the log and by `mtaq`, retried by default (`on_doubt = "retry" |
"hold"`). So duplicates are few, and known." """

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtad.progress import Doubt, Named
from mtad.spool.queues import Queue
from tests.e2e.world import World, await_gone
from tests.peers.mx import HANG, OK, Mx, Say, Script
from tests.procs import suspend
from tests.site import alive, await_value, children

HOLD = {"on_doubt": "hold"}
#: The final dot is never answered the first time, and taken the second.
DEAF = Script(dot=[HANG, OK])


def kill_deliveries(world: World) -> None:
    """All at once: the scheduler must not hand what the first one had to the second, which dies, too."""
    [scheduler] = world.site.pids("scheduler")
    suspend(scheduler)
    try:
        victims = children(scheduler)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        await_value(lambda: not any(map(alive, victims)))
    finally:
        os.kill(scheduler, signal.SIGCONT)


def kill_everything(world: World) -> None:
    for pid in world.site.processes():
        with contextlib.suppress(ProcessLookupError):  # its master is dead, and it may know already
            os.kill(pid, signal.SIGKILL)
    assert world.site.process is not None
    world.site.process.wait()
    world.site.process = None


def dotted(mx: Mx, count: int = 1) -> None:
    """Wait until the exchanger has seen a final dot, that many times."""
    mx.wait(lambda: len(mx.transactions) == count and bool(mx.transactions[-1].content))


def recipients(mx: Mx) -> list[list[str]]:
    """Those of each message that was taken."""
    return [message.recipients for message in mx.messages]


def why(world: World, queue_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(world.site.run("mtaq", "why", queue_id, "--json").stdout)["recipients"]
    return found


def doubts(world: World) -> list[str]:
    return re.findall(r"in doubt: .*?<(.*?)> before; (?:\w+)", world.site.log())


def in_queue(world: World, queue_id: str, queue: str) -> None:
    await_value(lambda: queue_id in world.site.files(queue), what=f"{queue_id} is in {queue}")


# -- retry: the default -----------------------------------------------------------------------------------------------


def test_it_is_marked_before_the_dot(tmp_path: Path) -> None:
    """marked before the dot"""
    with World(tmp_path, processes={"stop_timeout": "100ms"}) as world:
        mx = world.mx(DEAF)
        domain = world.domain(mx)
        queue_id = world.send(f"b@{domain}")
        dotted(mx)
        [mark] = [event for event in world.site.history(Queue.ACTIVE, queue_id) if isinstance(event, Doubt)]
        assert (mark.recipients, mark.host) == ((0,), f"mx1.{domain}")


def test_it_is_found_named_everywhere_and_tried_again(tmp_path: Path) -> None:
    """found at recovery, named in the log and by `mtaq`, retried by default"""
    with World(tmp_path) as world:
        mx = world.mx(Script(dot=[HANG, HANG, OK]))
        domain = world.domain(mx)
        queue_id, host = world.send(f"b@{domain}"), f"mx1.{domain}"
        dotted(mx)
        kill_everything(world)
        [row] = world.site.queue()
        assert row["recipients"][0]["in_doubt"] == host
        [told] = why(world, queue_id)
        assert told["text"] == f"mtad is not running, so nothing is delivered. In doubt: {host} may have it already."
        world.site.start()
        dotted(mx, 2)
        about = f"{host} may have taken this message for <b@{domain}> before"
        world.site.await_log(re.escape(f"{queue_id}: warning: in doubt: {about}; delivering it again"))
        assert f"(in doubt: {host} may have it already)" in world.site.run("mtaq").stdout
        [told] = why(world, queue_id)
        assert told["cause"] == "delivering"
        assert f"in doubt: {host} may have it" in " ".join(world.site.run("mtaq", "show", queue_id).stdout.split())
        kill_deliveries(world)
        mx.await_messages(1)
        await_gone(world, queue_id)
        assert len(doubts(world)) == 2


def test_a_doubt_in_which_nothing_has_happened_is_not_named_again(tmp_path: Path) -> None:
    """named in the log: once for each time that it may have gone out, however often mtad is started or reloaded"""
    with World(tmp_path, start=False) as world:
        hole = world.blackhole()
        domain = world.domain(hole)
        queue_id = world.place(Queue.ACTIVE, f"b@{domain}", events=[Doubt(1.0, (0,), "mx.x.test")])
        world.site.configure(processes={"stop_timeout": "50ms"})
        for stop in (world.site.stop, lambda: kill_everything(world)):
            world.site.start()
            await_value(lambda: any(isinstance(one, Named) for one in world.site.history(Queue.ACTIVE, queue_id)))
            await_value(lambda: why(world, queue_id)[0]["cause"] == "delivering")
            world.site.reload()
            await_value(lambda: why(world, queue_id)[0]["cause"] in {"delivering", "earlier"})
            stop()
        assert doubts(world) == [f"b@{domain}"]


# -- hold -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [kill_deliveries, kill_everything])
def test_only_the_recipients_in_doubt_are_held_and_a_release_lets_them_go(
    tmp_path: Path, kill: Callable[[World], None]
) -> None:
    """`on_doubt = "hold"`: the other recipients of the message go on as usual"""
    with World(tmp_path, retry=HOLD | {"minimum": "1s", "maximum": "2s"}) as world:
        deaf, quick = world.mx(DEAF), world.mx()
        late = world.mx(Script(rcpt={"c@late.test": (Say("450 4.2.1 later"), Say("450 4.2.1 later"), OK)}))
        domain, good = world.domain(deaf), world.domain(quick)
        world.domain(late, name="late.test")
        queue_id = world.send(f"a@{good}", f"b@{domain}", "c@late.test")
        quick.await_messages(1)
        dotted(deaf)
        await_value(lambda: len(world.attempts(Queue.ACTIVE, queue_id)) == 2)
        kill(world)
        if world.site.process is None:
            world.site.start()
        world.site.await_log(rf"in doubt: mx1.{domain} .*<b@{domain}> before; held until you say: mtaq release {queue_id}$")
        late.await_messages(1)
        in_queue(world, queue_id, "hold")
        world.site.await_log(rf"{queue_id}: warning: placed on hold: who is left is in doubt")
        assert recipients(late) == [["c@late.test"]]
        assert recipients(quick) == [[f"a@{good}"]]
        assert "in doubt: " in world.site.run("mtaq").stdout
        told = why(world, queue_id)[1]
        assert (told["cause"], told["advice"][0]["command"]) == ("held", f"mtaq release {queue_id}")
        assert world.site.run("mtaq", "release", queue_id).stdout == "released 1 message\n"
        deaf.await_messages(1)
        await_gone(world, queue_id)
        assert queue_id not in world.site.files("hold")
        assert recipients(deaf) == [[f"b@{domain}"]]
        assert doubts(world) == [f"b@{domain}"]


def test_what_is_held_is_held_over_restarts_and_reloads_with_either_setting(tmp_path: Path) -> None:
    """reload-safe, survives restarts"""
    with World(tmp_path, retry=HOLD) as world:
        deaf = world.mx(DEAF)
        domain = world.domain(deaf)
        queue_id = world.send(f"b@{domain}", f"c@{world.domain(world.mx(Script(rcpt=Say('450 4.2.1 later'))))}")
        dotted(deaf)
        await_value(lambda: world.attempts(Queue.ACTIVE, queue_id))
        kill_deliveries(world)
        in_queue(world, queue_id, "deferred")
        world.site.configure(retry={"on_doubt": "retry"})
        world.site.reload()
        world.site.run("mtad-flush", queue_id)
        await_value(lambda: world.site.log().count("status=deferred") == 2)
        in_queue(world, queue_id, "deferred")
        world.site.stop()
        world.site.start()
        held, other = world.site.queue()[0]["recipients"]
        assert (held["held"], held["in_doubt"], "held" in other) == (True, f"mx1.{domain}", False)
        text = why(world, queue_id)[0]["text"]
        assert text.startswith(f"In doubt, and held: mx1.{domain} may have it already")
        assert text.endswith("It is not sent again before somebody releases it. The other recipients go on.")
        assert deaf.messages == []
        assert world.site.run("mtaq", "release", queue_id).stdout == "released 1 message\n"
        deaf.await_messages(1)


def test_it_can_be_released_while_mtad_is_down(tmp_path: Path) -> None:
    """`mtaq release` lets the held ones be tried"""
    with World(tmp_path, retry=HOLD) as world:
        deaf = world.mx(DEAF)
        queue_id = world.send(f"b@{world.domain(deaf)}")
        dotted(deaf)
        kill_deliveries(world)
        in_queue(world, queue_id, "hold")
        world.site.stop()
        assert "tried when it starts" in world.site.run("mtaq", "release", queue_id).stdout
        world.site.start()
        deaf.await_messages(1)
        await_gone(world, queue_id)


def test_mail_for_a_mailbox_here_is_held_too(tmp_path: Path) -> None:
    """a Maildir has no reply, and the record of it may be missing all the same"""
    with World(tmp_path, start=False, retry=HOLD) as world:
        queue_id = world.place(Queue.ACTIVE, "alice@example.org", events=[Doubt(1.0, (0,), "local")])
        world.site.start()
        in_queue(world, queue_id, "hold")
        assert why(world, queue_id)[0]["text"].startswith("In doubt, and held: the mailbox here may have it already")
        assert world.site.mailbox("alice") == []
        world.site.run("mtaq", "release", queue_id)
        world.site.await_mail("alice")


# -- a power cut ------------------------------------------------------------------------------------------------------


def test_who_may_have_a_message_since_a_power_cut_took_its_record_is_named(tmp_path: Path) -> None:
    """duplicates after a power cut are named: the file has the length of the record, and NUL octets in its place"""
    with World(tmp_path, start=False) as world:
        mx = world.mx()
        domain = world.domain(mx)
        queue_id = world.place(Queue.ACTIVE, f"b@{domain}")
        with (world.site.spool_path / "active" / queue_id).open("ab") as file:
            file.write(bytes(80))
        world.site.start()
        mx.await_messages(1)
        await_gone(world, queue_id)
        assert f"{queue_id}: warning: in doubt: the machine stopped, and somebody may have taken" in world.site.log()
        assert doubts(world) == [f"b@{domain}"]


def test_what_was_in_hand_when_the_machine_went_down_is_named(tmp_path: Path) -> None:
    """Duplicates after a power cut are named: a message whose removal was lost looks as if it was never tried."""
    with World(tmp_path, start=False) as world:
        mx = world.mx()
        domain, then = world.domain(mx), time.time() - 1000
        world.site.start()
        mark = world.site.spool_path / "scheduler.boot"
        await_value(mark.exists)
        kill_everything(world)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        mark.write_text(mark.read_text().replace(boot, "another"))
        os.utime(mark, (then, then))
        before = world.place(Queue.ACTIVE, f"b@{domain}", arrival=then, due=then)
        after = world.place(Queue.INCOMING, f"c@{domain}")
        for _ in range(2):
            world.site.start()
            world.site.await_empty_queue()
            world.site.stop()
        mx.await_messages(2)
        assert f"{before}: warning: in doubt: the machine stopped, and somebody may have taken" in world.site.log()
        assert f"{after}: warning" not in world.site.log()
        assert doubts(world) == [f"b@{domain}"]
