"""What the queue and the lanes look like (issue 4): `mtaq show`, `mtaq --by`, `mtaq watch`, `mtad status`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.e2e.world import World
from tests.peers.mx import HANG, Say, Script
from tests.site import await_value

HASTE: dict[str, Any] = {"processes": {"stop_timeout": "100ms"}}


def test_show_watch_groups_and_status(tmp_path: Path) -> None:
    """`mtaq show ID`, `mtaq --by`, `mtaq watch`, `mtad status` the same as numbers"""
    with World(tmp_path, delivery={"destination_concurrency": 1}, **HASTE) as world:
        dead = world.domain(world.mx(Script(greeting=Say("554 5.3.2 Not today", close=True))))
        domain = world.domain(world.mx(Script(rcpt={"later@live.test": Say("450 4.2.1 Busy")})), name="live.test")
        suspended, later = world.send(f"a@{dead}"), world.send(f"taken@{domain}", f"later@{domain}")
        for queue_id in (suspended, later):
            world.site.await_deferred(queue_id)
        row = json.loads(world.site.run("mtaq", "show", later, "--json").stdout)
        taken, busy = row["recipients"]
        assert (taken["state"], busy["state"]) == ("delivered", "deferred")
        step = busy["history"][-1]
        assert (step["reply"], step["host"]) == ("450 4.2.1 Busy", "mx1.live.test")
        assert len(step["delays"]) == 4
        assert all(0 <= delay < 20 for delay in step["delays"]), "a, b, c and d are known"
        text = world.site.run("mtaq", "show", later).stdout
        assert (
            "    delivered 2.0.0, mx1.live.test[" in text.replace(text[:0], "") or "delivered 2.0.0, mx1.live.test[" in text
        )
        assert world.site.run("mtaq", "show", later, "--headers").stdout.endswith("Subject: a test\n\n")
        groups = [json.loads(line) for line in world.site.run("mtaq", "--by", "destination", "--json").stdout.splitlines()]
        assert sorted((row["destination"], row["messages"]) for row in groups) == sorted([(dead, 1), ("live.test", 1)])
        picture = world.site.run("mtaq", "watch", "--once").stdout
        assert f"{dead} " in picture
        assert "suspended" in picture
        assert "  554 5.3.2 Not today\n" in picture
        assert "1 delivered, 2 put off, 0 failed" in picture
        status = world.site.run("mtad", "status")
        assert ", 1 suspended; 0 in delivery, 0 waiting" in status.stdout
        assert "1 delivered, 2 put off, 0 failed" in status.stdout
        numbers = json.loads(world.site.run("mtad", "status", "--json").stdout)["scheduler"]
        assert (numbers["delivered"], numbers["deferrals"], numbers["failed"], numbers["suspended"]) == (1, 2, 0, 1)
        assert {lane["destination"]: lane["reply"] for lane in numbers["lanes"]}[dead] == "554 5.3.2 Not today"
        # History survives a restart, and is kept for the one who was delivered while the message lives.
        world.site.stop()
        assert json.loads(world.site.run("mtaq", "show", later, "--json").stdout)["recipients"] == row["recipients"]
        assert world.site.run("mtaq", "watch", "--once").stdout.startswith("mtad is not running")
        down = json.loads(world.site.run("mtad", "status", "--json").stdout)
        assert (down["running"], down["scheduler"]) == (False, None)
        world.site.start()


def test_a_picture_of_a_server_at_work(tmp_path: Path) -> None:
    """lanes, states, rates, ages"""
    limits = {"destination_concurrency": 1, "policy": [{"domain": ["slow.test"], "rate": "1/1h"}]}
    with World(tmp_path, delivery=limits, **HASTE) as world:
        hung = world.domain(world.mx(Script(mail=HANG)))
        slow = world.mx()
        world.domain(slow, name="slow.test")
        for number in range(3):
            world.send(f"u{number}@{hung}")
        world.send("first@slow.test")
        slow.await_messages(1)
        world.send("second@slow.test")

        def lanes() -> dict[str, list[str]]:
            lines = world.site.run("mtaq", "watch", "--once").stdout.splitlines()
            return {line.split()[0]: line.split()[1:] for line in lines if ".test " in line}

        seen = await_value(lambda: found if "rate" in (found := lanes()).get("slow.test", []) else None)
        assert seen[hung][:4] == ["full", "0", "1/1/1", "2"]
        assert seen["slow.test"][:4] == ["rate", "1/1h,", "next", "in"]
        assert seen["slow.test"][5:8] == ["1", "0/1/1", "1"]
