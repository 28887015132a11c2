"""`mtaq watch`: the picture, what it says of each lane, with the server up and down, and on a terminal."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from mtad.cli.queue_facts import Look
from mtad.cli.queue_picture import name_of, picture, state_of
from mtad.desk import AskLanes, Lanes, LaneView
from mtad.spool.queues import Queue
from tests.unit.queue_aid import LANE, NOW, SUSPENDED, Clerk, Stock

QUEUES = {"incoming": 0, "active": 20, "deferred": 12345}


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stock]:
    monkeypatch.setenv("COLUMNS", "100")
    stock = Stock(tmp_path)
    yield stock
    stock.spool.close()


def lanes(*found: LaneView, **more: Any) -> Lanes:
    given: dict[str, Any] = {
        "count": len(found), "suspended": 1, "active": 20, "waiting": 13, "in_flight": 5, "deferred": 12345,
        "processes": (81, 82), "delivered": 1000, "deferrals": 30, "failed": 2, "started": NOW - 60,
    }  # fmt: skip
    return Lanes(found, **given | more)


def drawn(look: Look, before: Look | None = None, rows: int = 10, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(picture(look, before, rows, width))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def look(seen: Lanes | None, at: float = NOW, **more: Any) -> Look:
    given: dict[str, Any] = {"at": at, "state": "running", "pid": 80, "lanes": seen, "queues": QUEUES}
    return Look(**given | more)


def test_the_picture() -> None:
    other = msgspec.structs.replace(LANE, destination="z.test", done=7, oldest=NOW - 65)
    assert drawn(look(lanes(LANE, SUSPENDED, other))) == [
        "mtad runs for 1m; scheduler 80, deliveries in 81, 82",
        "queues     incoming 0, active 20, deferred 12,345",
        "in hand    20 messages; 5 in delivery, 13 waiting; 3 lanes, 1 suspended",
        "so far     1,000 delivered, 30 put off, 2 failed",
        "",
        "lane                state                          done     open waiting  oldest",
        "y.test              open                              0  5/20/20      13",
        "y.test              suspended 12m, probe 48s          0   0/0/20       0",
        "  421 4.3.2 No",
        "z.test              open                              7  5/20/20      13   1m 5s",
    ]


def test_the_rates_are_those_since_the_picture_before() -> None:
    first = look(lanes(LANE), NOW - 2)
    after = lanes(msgspec.structs.replace(LANE, done=50), delivered=1040)
    text = drawn(look(after), first)
    assert "so far     1,040 delivered, 30 put off, 2 failed; 20/s delivered now" in text
    assert "y.test              open                           25/s  5/20/20      13" in text
    slow = drawn(look(lanes(LANE, delivered=1001)), first)
    assert "so far     1,001 delivered, 30 put off, 2 failed; 30/min delivered now" in slow
    restarted = drawn(look(lanes(LANE, delivered=3, started=NOW - 1)), first)
    assert "so far     3 delivered, 30 put off, 2 failed" in restarted, "nothing is less than before"


def test_more_lanes_than_there_is_room_for() -> None:
    many = [msgspec.structs.replace(LANE, destination=f"d{number}.test") for number in range(5)]
    text = drawn(look(lanes(*many, count=1000)), rows=3)
    assert sum("test" in line for line in text) == 3
    assert text[-1] == "and 997 more lanes"
    # What went wrong takes a line as well.
    troubled = drawn(look(lanes(SUSPENDED, SUSPENDED, count=2)), rows=3)
    assert [line[:6] for line in troubled[-3:]] == ["y.test", "  421 ", "and 1 "]


def test_nobody_answers() -> None:
    assert drawn(look(None, state="down")) == [
        "mtad is not running, so nothing is delivered (mtad start)",
        "queues     incoming 0, active 20, deferred 12,345",
    ]
    assert drawn(look(None, state="silent"))[0] == "mtad runs, but its scheduler does not answer (see its log)"
    assert drawn(look(None, state="starting"))[0] == "mtad runs, but has no scheduler at this moment"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "open"),
        ({"in_flight": 20}, "full"),
        ({"in_flight": 3, "window": 3}, "opening"),
        ({"in_flight": 0, "waiting": 0}, "idle"),
        ({"rate": "100/1m", "next_start": NOW + 3}, "rate 100/1m, next in 3s"),
        ({"rate": "100/1m"}, "open"),
        ({"ipv4_until": NOW + 3600}, "open, IPv4 only"),
        ({"suspended_since": NOW - 60, "suspended_until": NOW - 1}, "suspended 1m, probe next"),
    ],
)
def test_the_state_of_a_lane(change: dict[str, Any], words: str) -> None:
    assert state_of(msgspec.structs.replace(LANE, **change), NOW)[0] == words


def test_the_names_of_lanes() -> None:
    assert [name_of(msgspec.structs.replace(LANE, transport=name, destination="")) for name in ("local", "bounce")] == [
        "mailboxes here",
        "reports",
    ]
    assert name_of(msgspec.structs.replace(LANE, group=".outlook.com")) == "y.test (.outlook.com)"


def test_what_a_server_said_is_no_markup_and_breaks_no_line() -> None:
    said = "421 [bold red]no[/bold red] [/nonsense] " + "x" * 300
    text = drawn(look(lanes(msgspec.structs.replace(SUSPENDED, reply=said, destination="[red]" + "y" * 300))), width=80)
    assert text[-2:] == [
        "[red]yyyyyyyyyyyyy… suspended 12m, probe 48s          0   0/0/20       0",
        "  421 [bold red]no[/bold red] [/nonsense] " + "x" * 37 + "…",
    ]


def test_one_picture(stock: Stock) -> None:
    stock.put(Queue.DEFERRED, ["b@y.test"])
    with Clerk(stock.spool, lanes=lanes(LANE, started=time.time() - 90)) as clerk:
        text = stock.run("watch", "--once").stdout
    assert text.startswith(f"mtad runs for 1m 30s; scheduler {os.getpid()}, deliveries in 81, 82\n")
    assert "deferred 1" in text
    assert "y.test" in text
    assert clerk.asked == [AskLanes(100)]


def test_one_picture_with_the_server_down(stock: Stock) -> None:
    text = stock.run("watch").stdout
    assert text == (
        "mtad is not running, so nothing is delivered (mtad start)\n"
        "queues     incoming 0, active 0, deferred 0, hold 0, corrupt 0\n"
    )


def test_a_scheduler_without_a_desk(stock: Stock) -> None:
    lock = stock.spool.lock()
    assert "does not answer" in stock.run("watch", "--once").stdout
    os.close(lock)


def test_on_a_terminal_it_goes_on_until_ctrl_c(stock: Stock) -> None:
    ours, theirs = pty.openpty()
    command = [f"{Path(sys.executable).parent}/mtaq", "watch", "--interval", "0.2", "-c", str(stock.config)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    seen = b""
    with Clerk(stock.spool, lanes=lanes(LANE)) as clerk:
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        deadline = time.monotonic() + 30
        while len(clerk.asked) < 3 and time.monotonic() < deadline:
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        try:
            while more := os.read(ours, 65536):
                seen += more
        except OSError:
            pass  # its end of the terminal is closed
        assert process.wait(30) == 0
    os.close(ours)
    assert seen.count(b"y.test") >= 2
    assert b"Traceback" not in seen
    assert clerk.asked[0] == AskLanes(21), "as many as there is room for"
