"""Orders about messages (issue 4), given to a real server that is up, down, at work on the message, or killed."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtad.cli.queue_orders import Giver, Report, execute
from mtad.desk import OrderName
from mtad.spool.queues import Queue
from tests.e2e.world import World, await_gone
from tests.peers.mx import HANG, Mx, Say, Script
from tests.site import BIN, alive, await_value

BUSY = Script(rcpt=Say("450 4.2.0 The mailbox is busy"))
ALL = ("hold", "release", "delete", "requeue", "expire", "bounce")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    users = ("root", "alice", *ALL, *(f"down-{what}" for what in ALL), "late")
    with World(tmp_path_factory.mktemp("world"), users=users) as world:
        yield world


def order(world: World, *words: str, code: int = 0) -> dict[str, Any]:
    """``mtaq WORDS --json``; what it prints."""
    run = world.site.run("mtaq", *words, "--json")
    assert run.returncode == code, run.stderr
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


def where(world: World, queue_id: str) -> list[str]:
    return [queue.value for queue in Queue if queue_id in world.site.files(queue.value)]


def await_where(world: World, queue_id: str, *queues: str) -> None:
    await_value(lambda: where(world, queue_id) == list(queues), what=f"{queue_id} in {queues}")


def deferred(world: World, sender: str = "alice@example.org") -> tuple[Mx, str]:
    """A message whose server is busy, and that server."""
    mx = world.mx(BUSY)
    queue_id = world.send(f"b@{world.domain(mx)}", sender=sender)
    world.site.await_deferred(queue_id)
    return mx, queue_id


def under_way(world: World, sender: str = "alice@example.org") -> tuple[Mx, str]:
    """A message in delivery, for as long as its server says nothing."""
    mx = world.mx(Script(data=HANG))
    queue_id = world.send(f"b@{world.domain(mx)}", sender=sender)
    await_value(lambda: "DATA" in mx.verbs(), what="the delivery is under way")
    return mx, queue_id


def await_attempts(mx: Mx, count: int) -> None:
    await_value(lambda: mx.verbs().count("RCPT") >= count, what=f"{count} attempts")
    assert mx.verbs().count("RCPT") == count


def at_once(world: World, what: OrderName, queue_id: str) -> Report:
    """An order without the time that a command takes to start."""
    spool = world.site.spool()
    try:
        return execute(Giver(spool), what, [queue_id])
    finally:
        spool.close()


# -- up, and nobody has it in hand ------------------------------------------------------------------------------------


def test_hold_keeps_a_message_over_a_restart_and_release_tries_it_now(world: World) -> None:
    mx, queue_id = deferred(world)
    assert order(world, "hold", queue_id)["done"] == [queue_id]
    assert order(world, "hold", queue_id)["done"] == [queue_id]
    assert where(world, queue_id) == ["hold"]
    assert f"{queue_id}!" in world.site.run("mtaq").stdout
    world.site.stop()
    assert where(world, queue_id) == ["hold"]
    world.site.start()
    mx.script = Script()
    assert where(world, queue_id) == ["hold"]
    assert order(world, "release", queue_id)["done"] == [queue_id]
    [taken] = mx.await_messages(1)
    assert b"hello" in taken.content
    await_gone(world, queue_id)
    world.site.await_log(rf"{queue_id}: placed on hold by order of an administrator")
    world.site.await_log(rf"{queue_id}: released from hold by order of an administrator")


def test_delete_leaves_nothing(world: World) -> None:
    mx, queue_id = deferred(world, "delete@example.org")
    connections = mx.connections
    assert order(world, "delete", queue_id)["done"] == [queue_id]
    assert where(world, queue_id) == []
    assert order(world, "delete", queue_id, code=1)["missing"] == [queue_id]
    assert order(world, "release", queue_id, code=1)["missing"] == [queue_id]
    world.site.await_log(rf"{queue_id}: removed")
    assert world.site.mailbox("delete") == []
    assert mx.connections == connections


def test_requeue_tries_it_now_as_often_as_it_is_said(world: World) -> None:
    mx, queue_id = deferred(world)
    for count in (2, 3):
        assert order(world, "requeue", queue_id)["done"] == [queue_id]
        await_attempts(mx, count)
        await_where(world, queue_id, "deferred")
    mx.script = Script()
    order(world, "requeue", queue_id)
    mx.await_messages(1)
    await_gone(world, queue_id)


@pytest.mark.parametrize(("what", "status"), [("expire", "4.4.7"), ("bounce", "5.7.0")])
@pytest.mark.parametrize("held", [False, True])
def test_expire_and_bounce_end_in_one_report(world: World, what: str, status: str, held: bool) -> None:
    sender = f"{what}@example.org"
    reports = len(world.site.mailbox(what))
    mx, queue_id = deferred(world, sender)
    if held:
        order(world, "hold", queue_id)
    assert order(world, what, queue_id)["done"] == [queue_id]
    report = world.report(what, reports + 1)
    await_gone(world, queue_id)
    [recipient] = report.recipients
    assert recipient["Status"] == status
    assert recipient["Action"] == "failed"
    assert "The mailbox is busy" in recipient["Diagnostic-Code"]
    assert order(world, what, queue_id, code=1)["missing"] == [queue_id]
    assert len(world.site.mailbox(what)) == reports + 1
    assert mx.verbs().count("RCPT") == 1


# -- up, and in delivery ----------------------------------------------------------------------------------------------


def test_a_hold_during_a_delivery_is_done_when_that_has_ended(world: World) -> None:
    mx, queue_id = under_way(world)
    assert order(world, "hold", queue_id)["later"] == [queue_id]
    assert order(world, "hold", queue_id)["later"] == [queue_id]
    assert where(world, queue_id) == ["active"]
    assert "in delivery: held when that has ended" in world.site.run("mtaq", "hold", queue_id).stdout
    mx.drop()
    await_where(world, queue_id, "hold")
    mx.script = Script()
    order(world, "release", queue_id)
    mx.await_messages(1)
    await_gone(world, queue_id)
    assert len(mx.messages) == 1


def test_a_release_takes_back_a_hold_that_waits(world: World) -> None:
    mx, queue_id = under_way(world)
    assert "not on hold" in order(world, "release", queue_id, code=1)["refused"][queue_id]
    order(world, "hold", queue_id)
    assert "on hold" in order(world, "requeue", queue_id, code=1)["refused"][queue_id]
    assert order(world, "release", queue_id)["later"] == [queue_id]
    mx.script = Script()
    mx.drop()
    mx.await_messages(1)
    await_gone(world, queue_id)


@pytest.mark.parametrize("what", ["delete", "expire", "bounce"])
def test_an_end_during_a_delivery_comes_when_that_has_ended(world: World, what: str) -> None:
    before = len(world.site.mailbox(what))
    mx, queue_id = under_way(world, f"{what}@example.org")
    assert order(world, what, queue_id)["later"] == [queue_id]
    assert where(world, queue_id) == ["active"]
    mx.drop()
    await_gone(world, queue_id)
    assert where(world, queue_id) == []
    if what != "delete":
        world.report(what, before + 1)
    assert len(world.site.mailbox(what)) == before + (what != "delete")
    assert mx.messages == []


def test_a_delivery_that_succeeds_makes_an_order_void(world: World) -> None:
    mx = world.mx(Script(dot=Say("250 2.0.0 Ok", delay=0.5)))
    queue_id = world.send(f"b@{world.domain(mx)}", sender="late@example.org")
    await_value(lambda: "DATA" in mx.verbs())
    assert at_once(world, "bounce", queue_id).later == [queue_id]
    mx.await_messages(1)
    await_gone(world, queue_id)
    assert where(world, queue_id) == []
    assert world.site.mailbox("late") == []


def test_an_order_that_waits_survives_the_scheduler(world: World) -> None:
    mx, queue_id = under_way(world)
    assert order(world, "hold", queue_id)["later"] == [queue_id]
    [pid] = world.site.pids("scheduler")
    os.kill(pid, signal.SIGKILL)
    await_value(lambda: not alive(pid))
    mx.drop()
    await_where(world, queue_id, "hold")
    assert len(mx.verbs()) == len(mx.verbs(1)), "it was not tried again"
    order(world, "delete", queue_id)


def test_an_order_during_a_delivery_of_the_scheduler_before_a_reload(world: World) -> None:
    mx, queue_id = under_way(world)
    assert world.site.reload().returncode == 0
    assert order(world, "hold", queue_id)["later"] == [queue_id]
    assert where(world, queue_id) == ["active"]
    mx.drop()
    await_where(world, queue_id, "hold")
    assert order(world, "delete", "--domain", mx_domain(world, queue_id))["done"] == [queue_id]
    assert where(world, queue_id) == []


def test_an_order_while_the_server_is_stopping(tmp_path: Path) -> None:
    with World(tmp_path / "world", processes={"stop_timeout": "1s"}) as world:
        mx, queue_id = under_way(world)
        [scheduler] = world.site.pids("scheduler")
        stopping = threading.Thread(target=world.site.stop)
        stopping.start()
        report = at_once(world, "hold", queue_id)
        assert report.later == [queue_id]
        assert (report.running, alive(scheduler)) == (True, True)
        stopping.join()
        mx.drop()
        world.site.start()
        await_where(world, queue_id, "hold")
        assert len(mx.verbs()) == len(mx.verbs(1)), "it was not tried again"


def mx_domain(world: World, queue_id: str) -> str:
    """Where a message goes."""
    [row] = [row for row in world.site.queue() if row["queue_id"] == queue_id]
    return str(row["recipients"][0]["address"]).rpartition("@")[2]


def test_a_storm_of_orders_leaves_one_message(world: World) -> None:
    """Whatever comes in between, it is delivered once, and lies in one place."""
    script = Script(rcpt=[Say("450 4.2.0 Later", delay=0.01)] * 30 + [Say("250 2.1.5 Ok")])
    mx = world.mx(script)
    queue_id = world.send(f"b@{world.domain(mx)}")

    def give(words: tuple[OrderName, ...]) -> None:
        for word in words * 40:
            at_once(world, word, queue_id)

    threads = [threading.Thread(target=give, args=(words,)) for words in (("hold", "requeue"), ("release", "requeue"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mx.script = Script()

    def delivered() -> bool:
        # A hold may still wait for the end of a delivery.
        at_once(world, "release", queue_id)
        at_once(world, "requeue", queue_id)
        return bool(mx.messages)

    await_value(delivered, what="it is delivered after all")
    await_gone(world, queue_id)
    assert len(mx.messages) == 1
    assert where(world, queue_id) == []


# -- filters and the question -----------------------------------------------------------------------------------------


def test_filters_choose_and_combine(world: World) -> None:
    mx = world.mx(BUSY)
    domain, other = world.domain(mx), world.domain(mx)
    wanted = world.send(f"b@{domain}", f"c@{other}", sender="s@x.test")
    others = [world.send(f"b@{domain}", sender="s@y.test"), world.send(f"b@{other}", sender="s@x.test")]
    for queue_id in (wanted, *others):
        world.site.await_deferred(queue_id)
    filters = ("--domain", domain, "--sender", "@x.test", "--reason", "MAILBOX is busy")
    assert order(world, "hold", *filters, "--older-than", "1h")["done"] == []
    assert order(world, "hold", *filters, "--older-than", "1ms")["done"] == [wanted]
    assert order(world, "delete", "--reason", "mailbox is busy", "--sender", "s@x.test")["done"] == [others[1], wanted]
    assert order(world, "delete", "--domain", domain)["done"] == [others[0]]
    assert "no messages fit" in world.site.run("mtaq", "delete", "--domain", domain).stdout


def typing(world: World, answer: str, *words: str) -> tuple[int, str]:
    """A command of mtaq on a terminal, with what is typed there; exit code and all that it said."""
    master, slave = pty.openpty()
    command = [str(BIN / "mtaq"), *words]
    with subprocess.Popen(
        command, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=world.site.environment(), text=True
    ) as process:
        os.close(slave)
        os.write(master, answer.encode())
        said, _ = process.communicate(timeout=60)
        os.close(master)
        return process.returncode, said


def test_on_a_terminal_it_asks(world: World) -> None:
    mx = world.mx(BUSY)
    domain = world.domain(mx)
    ids = [world.send(f"b{number}@{domain}") for number in range(7)]
    for queue_id in ids:
        world.site.await_deferred(queue_id)
    code, said = typing(world, "n\n", "delete", "--domain", domain)
    assert code == 1
    assert "delete 7 messages? [y/N]" in said
    assert "... and 2 more" in said
    assert sum(f"{queue_id}  " in said for queue_id in ids) == 5
    assert f"@{domain}> (" in said
    assert "nothing was done" in said
    assert all(where(world, queue_id) == ["deferred"] for queue_id in ids)
    code, said = typing(world, "", "delete", ids[0])
    assert (code, said) == (0, "deleted 1 message\n")
    code, said = typing(world, "y\n", "delete", "--domain", domain)
    assert code == 0
    assert "deleted 6 messages" in said
    assert not any(where(world, queue_id) for queue_id in ids)
    code, said = typing(world, "", "hold", "--domain", domain, "--yes")
    assert (code, said) == (0, "no messages fit\n")


# -- down -------------------------------------------------------------------------------------------------------------


def test_all_orders_work_while_the_server_is_down(tmp_path: Path) -> None:
    users = ("root", "alice", "expire", "bounce")
    with World(tmp_path / "world", start=False, users=users) as world:
        mx = world.mx()
        domain = world.domain(mx)
        later = time.time() + 3600

        def place(queue: Queue, sender: str = "alice") -> str:
            return world.place(queue, f"{sender}@{domain}", sender=f"{sender}@example.org", due=later)

        ids = {what: place(Queue.HOLD if what == "release" else Queue.DEFERRED, what) for what in ALL}
        new, claimed, sleeping = place(Queue.INCOMING, "new"), place(Queue.ACTIVE, "claimed"), place(Queue.DEFERRED)
        for what, queue_id in ids.items():
            answer = order(world, what, queue_id)
            assert (answer["done"], answer["running"]) == ([queue_id], False)
        run = world.site.run("mtaq", "expire", ids["expire"])
        assert run.stdout == "expired 1 message; mtad is not running: their senders are told when it starts\n"
        assert order(world, "hold", new, claimed)["done"] == [new, claimed]
        assert [where(world, queue_id) for queue_id in (ids["hold"], new, claimed)] == [["hold"]] * 3
        assert where(world, ids["delete"]) == []
        world.site.start()
        mx.await_messages(2)
        assert sorted(taken.recipients[0] for taken in mx.messages) == [f"release@{domain}", f"requeue@{domain}"]
        assert world.report("expire").failed == {f"expire@{domain}": "4.4.7"}
        assert world.report("bounce").failed == {f"bounce@{domain}": "5.7.0"}
        for what in ("release", "requeue", "expire", "bounce"):
            await_gone(world, ids[what])
        assert [where(world, queue_id) for queue_id in (ids["hold"], new, claimed)] == [["hold"]] * 3
        assert where(world, sleeping) == ["deferred"]
        assert order(world, "delete", "--all")["running"] is True
        assert world.site.files("hold") == world.site.files("deferred") == []


def test_a_server_that_starts_while_orders_are_given_loses_none(tmp_path: Path) -> None:
    with World(tmp_path / "world", start=False) as world:
        ids = [world.place(Queue.DEFERRED, "b@far.test", due=time.time() + 3600) for _ in range(60)]
        world.site.launch()
        answers = [order(world, "hold", *ids[start : start + 20]) for start in (0, 20, 40)]
        world.site.await_up()
        assert [queue_id for answer in answers for queue_id in answer["done"]] == ids
        assert sorted(world.site.files("hold")) == sorted(ids)
