"""`mtaq why` (issue 4): each cause, made for real with a running server, and what is said of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtad.outcome import Attempt, Deferred
from mtad.progress import Doubt
from mtad.spool.queues import MASTER_LOCK, SCHEDULER_LOCK, Queue
from tests.e2e.world import World
from tests.peers.dns import SERVFAIL
from tests.peers.mx import CLOSE, HANG, Mx, Say, Script
from tests.procs import suspend
from tests.site import await_value, children

HASTE: dict[str, Any] = {"processes": {"stop_timeout": "100ms"}}


def answers(world: World, queue_id: str) -> list[dict[str, Any]]:
    """What `mtaq why` says about the recipients of a message; nothing when it is not there."""
    run = world.site.run("mtaq", "why", queue_id, "--json")
    found: list[dict[str, Any]] = json.loads(run.stdout).get("recipients", [])
    assert run.returncode == (0 if found else 1), run.stderr
    return found


def await_cause(world: World, queue_id: str, cause: str, recipient: int = 0) -> dict[str, Any]:
    """Wait until that is the cause."""
    last: list[Any] = []

    def found() -> dict[str, Any] | None:
        last[:] = answers(world, queue_id)
        return last[recipient] if last and last[recipient]["cause"] == cause else None

    try:
        return await_value(found, what=f"the cause is {cause}")
    except AssertionError:
        print(last)
        raise


def typed(answer: dict[str, Any]) -> list[str]:
    return [advice["command"] for advice in answer["advice"]]


# -- it is at work ----------------------------------------------------------------------------------------------------


def test_in_delivery_and_waiting_for_its_turn(tmp_path: Path) -> None:
    """in delivery by which process since when; lane limit"""
    with World(tmp_path, delivery={"destination_concurrency": 1}, **HASTE) as world:
        domain = world.domain(world.mx(Script(mail=HANG)))
        begun = time.time()
        first = world.send(f"a@{domain}")
        found = await_cause(world, first, "delivering")
        assert found["process"] in world.site.deliveries()
        assert begun <= found["since"] <= time.time()
        assert found["text"].startswith(f"It is in delivery to {domain}, by process {found['process']} for ")
        second, third = world.send(f"b@{domain}"), world.send(f"c@{domain}")
        found = await_cause(world, second, "concurrency")
        assert found["text"] == (f"It waits for its turn: 1 of 1 deliveries to {domain} are under way. It is the next one.")
        assert await_cause(world, third, "concurrency")["ahead"] == 1
        assert typed(found) == ["mtad reload"]


def test_a_rate(tmp_path: Path) -> None:
    """rate"""
    with World(tmp_path, delivery={"policy": [{"domain": ["slow.test"], "rate": "1/1h"}]}, **HASTE) as world:
        mx = world.mx()
        world.domain(mx, name="slow.test")
        world.send("a@slow.test")
        mx.await_messages(1)
        found = await_cause(world, world.send("b@slow.test"), "rate")
        assert found["text"].startswith("It waits for its turn: mail to slow.test may go at a rate of 1/1h.")
        assert 3000 < found["until"] - time.time() <= 3600


def test_no_free_delivery_process(tmp_path: Path) -> None:
    """waits for a free delivery process"""
    with World(tmp_path, delivery={"processes": 1, "threads": 1}, **HASTE) as world:
        hung, other = world.domain(world.mx(Script(mail=HANG))), world.domain(world.mx())
        await_cause(world, world.send(f"a@{hung}"), "delivering")
        found = await_cause(world, world.send(f"b@{other}"), "processes")
        assert found["text"].startswith("It waits for a free delivery process")


def test_the_rest_of_its_message(tmp_path: Path) -> None:
    with World(tmp_path, **HASTE) as world:
        hung = world.domain(world.mx(Script(mail=HANG)))
        rcpt = {f"{name}@mixed.test": Say(reply) for name, reply in (("later", "450 4.2.1 Busy"), ("gone", "550 5.1.1 No"))}
        world.domain(world.mx(Script(rcpt=rcpt)), name="mixed.test")
        queue_id = world.send(f"a@{hung}", "later@mixed.test", "gone@mixed.test", "taken@mixed.test")
        assert await_cause(world, queue_id, "others", 1)["reply"] == "450 4.2.1 Busy"
        assert await_cause(world, queue_id, "report", 2)["reply"] == "550 5.1.1 No"
        assert await_cause(world, queue_id, "delivered", 3)["text"].startswith("Delivered to mx1.mixed.test[")
        assert await_cause(world, queue_id, "delivering", 0)["destination"] == hung


def test_a_failure_of_which_its_sender_was_told(tmp_path: Path) -> None:
    with World(tmp_path, **HASTE) as world:
        rcpt = {"later@mixed.test": Say("450 4.2.1 Busy"), "gone@mixed.test": Say("550 5.1.1 No")}
        world.domain(world.mx(Script(rcpt=rcpt)), name="mixed.test")
        queue_id = world.send("later@mixed.test", "gone@mixed.test")
        world.site.await_deferred(queue_id)
        assert [one["cause"] for one in answers(world, queue_id)] == ["reply", "returned"]


def test_an_order_that_waits_for_the_end_of_a_delivery(tmp_path: Path) -> None:
    with World(tmp_path, **HASTE) as world:
        domain = world.domain(world.mx(Script(mail=HANG)))
        queue_id = world.send(f"a@{domain}")
        await_cause(world, queue_id, "delivering")
        world.site.run("mtaq", "hold", queue_id)
        await_value(lambda: answers(world, queue_id)[0]["text"].endswith(" After that it is held."))


# -- it waits for its time --------------------------------------------------------------------------------------------


def test_a_suspended_destination(tmp_path: Path) -> None:
    """suspended lane and since when and which reply did it"""
    with World(tmp_path, delivery={"destination_concurrency": 1}, **HASTE) as world:
        domain = world.domain(world.mx(Script(greeting=Say("554 5.3.2 Not today", close=True))))
        begun = time.time()
        first = world.send(f"a@{domain}")
        found = await_cause(world, first, "suspended")
        assert found["reply"] == "554 5.3.2 Not today"
        assert begun <= found["since"] <= time.time()
        assert found["until"] == pytest.approx(found["since"] + 60, abs=15)
        assert found["next_attempt"] >= begun + 299
        assert found["expires"] == pytest.approx(begun + 5 * 86400, abs=20)
        assert typed(found) == [f"mtad explain --to a@{domain} --probe", f"mtad-flush {first}"]
        second = world.send(f"b@{domain}")
        world.site.await_deferred(second)
        found = await_cause(world, second, "suspended")
        assert (found["reply"], found["attempts"]) == ("554 5.3.2 Not today", 0), "without a connection of its own"
        text = world.site.run("mtaq", "why", second).stdout
        assert "  reply         mx1." in text
        assert "554 5.3.2 Not today" in text


Make = Callable[[World], str]


def scripted(**script: Any) -> Make:
    return lambda world: world.domain(world.mx(Script(**script)))


def nowhere(world: World) -> str:
    return world.domain(world.address())


def without_dns(world: World) -> str:
    world.dns.set("broken.test", SERVFAIL)
    return "broken.test"


def without_tls(world: World) -> str:
    return world.domain(world.mx(), name="tls.test")


def with_a_wrong_password(world: World) -> str:
    mx = world._stack.enter_context(Mx(world.address(), world.port, logins={"mtad": "another"}))
    return world.domain(mx, name="login.test")


@pytest.mark.parametrize(
    ("cause", "make", "text", "reason"),
    [
        ("dns", without_dns, "The DNS does not say where mail for broken.test goes.", "Name service error"),
        ("tls", without_tls, "Mail to tls.test must be encrypted, and mx1.tls.test was not up to that.", "was not offered"),
        ("login", with_a_wrong_password, "The next hop mx1.login.test does not take our login.", "authentication failed"),
        ("connect", nowhere, "No server of {domain} took the connection.", "Connection refused"),
        ("broken", scripted(mail=CLOSE), "The dialogue with mx1.{domain} broke off.", "lost connection"),
        ("greylisted", scripted(rcpt=Say("451 4.7.1 Greylisted, wait")), "Greylisted: mx1.{domain} wants", "Greylisted"),
        (
            "limited",
            scripted(mail=Say("452 4.7.0 Rate limit exceeded")),
            "mx1.{domain} takes no more from us at the moment.",
            "Rate limit",
        ),
        ("reply", scripted(dot=Say("451 4.3.0 Not now")), "mx1.{domain} did not want it yet.", "451 4.3.0 Not now"),
    ],
)  # fmt: skip
def test_why_it_was_put_off(tmp_path: Path, cause: str, make: Make, text: str, reason: str) -> None:
    """DNS, TLS policy, waiting for its time after which reply"""
    credentials = tmp_path / "credentials"
    credentials.write_text("mx1.login.test : mtad : secret\n")
    credentials.chmod(0o600)
    delivery = {
        "auth_without_tls": "loopback",
        "policy": [
            {"domain": ["tls.test"], "tls": "required"},
            {"domain": ["login.test"], "credentials": str(credentials)},
        ],
    }
    with World(tmp_path / "site", delivery=delivery, **HASTE) as world:
        domain = make(world)
        begun = time.time()
        queue_id = world.send(f"a@{domain}")
        world.site.await_deferred(queue_id)
        [found] = answers(world, queue_id)
        assert found["cause"] == cause
        assert found["text"].startswith(text.format(domain=domain))
        assert reason in found["reason"]
        assert found["attempts"] == 1
        assert begun <= found["since"] <= time.time()
        assert begun + 29 <= found["next_attempt"] <= time.time() + 400
        assert f"mtad-flush {queue_id}" in typed(found)


def test_a_mailbox_that_cannot_be_written(tmp_path: Path) -> None:
    with World(tmp_path, **HASTE) as world:
        world.site.mail_root.mkdir(exist_ok=True)
        (world.site.mail_root / "alice").write_text("in the way")
        queue_id = world.send("alice@example.org")
        world.site.await_deferred(queue_id)
        [found] = answers(world, queue_id)
        assert (found["cause"], found["text"]) == ("mailbox", "It could not be stored in the mailbox here.")
        assert "cannot store in the mailbox of alice" in found["reason"]


def test_a_process_that_was_killed(tmp_path: Path) -> None:
    with World(tmp_path, **HASTE) as world:
        mx = world.mx(Script(mail=HANG))
        queue_id = world.send(f"a@{world.domain(mx)}")
        for number in (1, 2):  # the second time it is perhaps the message's own fault
            mx.await_command("MAIL", number)
            os.kill(await_cause(world, queue_id, "delivering")["process"], signal.SIGKILL)
        world.site.await_deferred(queue_id)
        [found] = answers(world, queue_id)
        assert found["cause"] == "machine"
        assert "delivery process killed by SIGKILL" in found["reason"]


def test_in_doubt_held_expired_due_and_never_tried(tmp_path: Path) -> None:
    """in doubt; held; what an administrator has put there"""
    with World(tmp_path, **HASTE) as world:
        failed = Deferred("4.2.1", "busy")

        def asked() -> tuple[list[str], list[dict[str, Any]]] | None:  # a scan in between takes some of them up
            now = time.time()
            ids = [
                world.place(Queue.DEFERRED, "a@x.test", events=[Doubt(now, (0,), "mx.x.test")], due=now + 900),
                world.place(
                    Queue.DEFERRED,
                    "a@x.test",
                    events=[Attempt(now - 60, ((0, failed),))],
                    arrival=now - 6 * 86400,
                    due=now + 900,
                ),
                world.place(Queue.DEFERRED, "a@x.test", due=now - 90),
                world.place(Queue.DEFERRED, "a@x.test", due=now + 900),
                world.place(Queue.HOLD, "a@x.test"),
                world.place(Queue.ACTIVE, "a@x.test"),
            ]
            run = world.site.run("mtaq", "why", *ids, "--json")
            found = [row.get("recipients", [{"cause": "gone"}])[0] for row in map(json.loads, run.stdout.splitlines())]
            scanned = {"gone", "delivering", "turn", "arrived"} & {row["cause"] for row in found}
            return None if scanned else (ids, found)

        (doubt, old, due, fresh, held, _), rows = await_value(asked)
        assert [row["cause"] for row in rows] == ["doubt", "expired", "due", "untried", "held", "unread"]
        assert rows[0]["text"].startswith("In doubt: mx.x.test may have it already")
        assert [typed(row)[0] for row in rows[:5]] == [
            f"mtad-flush {doubt}", f"mtad-flush {old}", f"mtad-flush {due}", f"mtad-flush {fresh}", f"mtaq release {held}"
        ]  # fmt: skip
        assert world.site.run("mtaq", "hold", fresh).returncode == 0
        [found] = answers(world, fresh)
        assert (found["cause"], found["since"]) == ("held", pytest.approx(time.time(), abs=20))


def test_what_it_says_can_be_typed(tmp_path: Path) -> None:
    with World(tmp_path, **HASTE) as world:
        mx = world.mx(Script(rcpt=Say("450 4.2.1 Busy")))
        queue_id = world.send(f"a@{world.domain(mx)}")
        world.site.await_deferred(queue_id)
        [found] = answers(world, queue_id)
        mx.script = Script()
        program, *arguments = typed(found)[0].split()
        assert world.site.run(program, *arguments).returncode == 0
        mx.await_messages(1)


# -- nobody is at work ------------------------------------------------------------------------------------------------


def test_the_disk_refuses(tmp_path: Path) -> None:
    """the disk refuses"""
    with World(tmp_path, **HASTE) as world:
        mx = world.mx(Script(mail=HANG))
        queue_id = world.send(f"a@{world.domain(mx)}")
        mx.await_command("MAIL")
        file = str(world.site.spool_path / "active" / queue_id)
        if subprocess.run(["chattr", "+i", file], check=False, capture_output=True).returncode:
            pytest.skip("this file system has no immutable files")
        try:
            mx.script = Script()
            mx.drop()
            found = await_cause(world, queue_id, "disk")
        finally:
            subprocess.run(["chattr", "-i", file], check=True)
        assert "Operation not permitted" in found["text"]
        assert typed(found)[0].startswith("df -h ")


def test_no_server_and_no_scheduler(tmp_path: Path) -> None:
    """no scheduler runs"""
    with World(tmp_path, **HASTE) as world:
        mx = world.mx(Script(rcpt=Say("450 4.2.1 Busy"), mail=[HANG, HANG]))
        waiting = world.place(Queue.DEFERRED, "a@x.test", due=time.time() + 900)
        active = world.send(f"a@{world.domain(mx)}")
        await_cause(world, active, "delivering")
        [master], [scheduler] = [world.site.master()], world.site.pids("scheduler")
        assert master is not None
        suspend(scheduler)
        try:
            run = world.site.run("mtaq", "why", active, waiting, "--json")
            assert "the scheduler does not answer: nothing is delivered" in world.site.run("mtad", "status").stdout
        finally:
            os.kill(scheduler, signal.SIGCONT)
        first, second = [json.loads(line)["recipients"][0] for line in run.stdout.splitlines()]
        assert first["cause"] == "silent"
        assert f"The scheduler (process {scheduler}) does not answer" in first["text"]
        assert second["cause"] == "untried", "it waits for its time all the same"
        await_cause(world, active, "delivering")
        suspend(master)
        try:
            doomed = children(scheduler)
            os.kill(scheduler, signal.SIGKILL)
            found = await_cause(world, active, "starting")
            assert typed(found) == ["mtad status"]
        finally:
            os.kill(master, signal.SIGCONT)
        assert doomed
        await_value(lambda: world.site.spool().holder(SCHEDULER_LOCK), what="the next scheduler has begun")
        await_value(lambda: answers(world, active)[0]["cause"] in {"delivering", "earlier"})
        world.site.stop()
        assert world.site.spool().holder(MASTER_LOCK) is None
        for queue_id in (waiting, active):
            [found] = answers(world, queue_id)
            assert (found["cause"], typed(found)) == ("stopped", ["mtad start"])
        assert "mtad is not running, so nothing is delivered." in world.site.run("mtaq", "why", active).stdout
        world.site.start()


def test_in_work_since_before_a_reload(tmp_path: Path) -> None:
    with World(tmp_path, **HASTE) as world:
        mx = world.mx(Script(mail=HANG))
        queue_id = world.send(f"a@{world.domain(mx)}")
        mx.await_command("MAIL")
        assert world.site.reload().returncode == 0
        await_cause(world, queue_id, "earlier")
        mx.script = Script()
        mx.drop()


def test_just_arrived_and_being_received(tmp_path: Path) -> None:
    with World(tmp_path, **HASTE) as world:

        def seen() -> bool:  # a scan may be faster
            queue_id = world.place(Queue.INCOMING, "a@x.test")
            return [one["cause"] for one in answers(world, queue_id)] == ["arrived"]

        await_value(seen)
        world.site.await_empty_queue()  # the scan has found it, and its report has passed through incoming, too
        with world.site.client("relay") as client:
            client.ehlo()
            client.mail("a@x.test")
            client.rcpt("b@x.test")
            client.docmd("DATA")
            client.send(b"x" * 70 + b"\r\n")
            for _ in range(3000):
                client.send(b"x" * 70 + b"\r\n")
            [name] = await_value(
                lambda: [
                    name
                    for name in world.site.files("incoming")
                    if os.path.getsize(world.site.spool_path / "incoming" / name)
                ]
            )
            run = world.site.run("mtaq", "why", name)
            assert run.returncode == 1
            assert run.stdout == f"{name}\n  It is being received: its client has not sent all of it.\n"
            client.close()
