"""`mtaq why`, the command: what it finds out, what it prints on 80 columns, and what programs get."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mtad.desk import AskLanes, AskMessages, JobView, Lanes, MessageView
from mtad.outcome import Attempt
from mtad.spool.queues import Queue
from tests.unit.queue_aid import GONE, LANE, LATER, SENT, SUSPENDED, Clerk, Stock, tried


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stock]:
    monkeypatch.setenv("COLUMNS", "80")
    stock = Stock(tmp_path)
    yield stock
    stock.spool.close()


def test_the_print(stock: Stock) -> None:
    now = time.time()
    recipients = [f"u{number}@y.test" for number in range(9)]
    outcomes = Attempt(now - 61, tuple((index, LATER) for index in range(8)), "mx.y.test", "192.0.2.1:25")
    queue_id = stock.put(Queue.DEFERRED, recipients, outcomes, tried(at=now), due=now + 182)
    view = MessageView(queue_id, known=False, due=now + 182)
    with Clerk(stock.spool, [view]):
        printed = stock.run("why", queue_id).stdout
    clock = r"(?:\w{3} [ \d]\d )?\d\d:\d\d:\d\d"
    expected = rf"""{queue_id}  from a@x.test
  deferred; 9 recipients; arrived {clock}, 1h ago

  u0@y.test
  u1@y.test
  u2@y.test
  and 5 more recipients
    mx.y.test did not want it yet.
    reply         mx.y.test: 450 4.2.1 Busy
    last attempt  {clock}, 1m [1-4]s ago
    next attempt  {clock}, in [23]m \d+s \(1 attempt so far\)
    expires       {clock}, in (?:1h|59m \d+s); then it goes back to its
                  sender
    you can type  mtad-flush {queue_id}  tries it now
                  mtaq bounce {queue_id}  sends it back to its sender now

  u8@y.test
    It was not tried yet, and waits for its time.
    next attempt  {clock}, in [23]m \d+s
    expires       {clock}, in (?:1h|59m \d+s); then it goes back to its
                  sender
    you can type  mtad-flush {queue_id}  tries it now
"""
    # A date stands before the time when it is not today's, and then a line may break elsewhere.
    spaced = re.sub(r"(?<!\[)\s+", r"\\s+", expected)
    assert re.fullmatch(spaced, printed), printed
    assert "\n  u8@y.test\n    It was not tried yet, and waits for its time.\n" in printed
    assert "\n    reply         mx.y.test: 450 4.2.1 Busy\n" in printed


def test_no_line_is_longer_than_the_terminal(stock: Stock) -> None:
    lane = msgspec.structs.replace(SUSPENDED, suspended_since=time.time() - 720, suspended_until=time.time() + 48)
    deferred = stock.put(Queue.DEFERRED, ["b@y.test"], tried(LATER), due=time.time() + 60)
    held = stock.put(Queue.HOLD, ["b@y.test"], tried(LATER))
    lanes = Lanes((lane,), 1, 1, 0, 0, 0, 0)
    with Clerk(stock.spool, [MessageView(deferred, known=False, due=1.0)], lanes):
        printed = stock.run("why", deferred, held).stdout
    assert "has been suspended for 12 minutes" in printed
    assert max(map(len, printed.splitlines())) <= 80, printed


def test_a_suspended_lane_is_asked_for_by_its_name(stock: Stock) -> None:
    queue_id = stock.put(Queue.DEFERRED, ["b@y.test", "c@here.test"], tried(LATER, LATER), due=time.time() + 60)
    with Clerk(stock.spool, [MessageView(queue_id, known=False, due=9.0)], Lanes((SUSPENDED,), 1, 1, 0, 0, 0, 0)) as clerk:
        [row] = stock.json("why", queue_id)
    assert clerk.asked == [AskMessages((queue_id,)), AskLanes(100, ("y.test",))]
    assert [one["cause"] for one in row["recipients"]] == ["suspended", "due"]


def test_for_programs(stock: Stock) -> None:
    job = JobView((0,), LANE, "delivering", time.time(), pid=99)
    queue_id = stock.put(Queue.ACTIVE, ["b@y.test", "c@y.test"], tried(LATER, SENT))
    with Clerk(stock.spool, [MessageView(queue_id, known=True, jobs=(job,))]):
        [row] = stock.json("why", queue_id)
    first, second = row.pop("recipients")
    assert row.pop("arrival_time") < time.time()
    assert row == {
        "queue_id": queue_id, "queue_name": "active", "sender": "a@x.test", "kind": "mail", "scheduler": "running"
    }  # fmt: skip
    assert (first["recipient"], first["cause"], first["process"]) == ("b@y.test", "delivering", 99)
    assert first["advice"] == [{"command": f"mtaq show {queue_id}", "effect": "shows each attempt so far"}]
    assert second["cause"] == "delivered"


def test_many_messages_in_questions_of_fifty(stock: Stock) -> None:
    ids = [stock.put(Queue.DEFERRED, ["b@y.test"], due=time.time() + 60) for _ in range(120)]
    with Clerk(stock.spool) as clerk:
        rows = stock.json("why", *ids)
    assert [row["queue_id"] for row in rows] == ids
    assert [len(asked.ids) for asked in clerk.asked if isinstance(asked, AskMessages)] == [50, 50, 20]


# -- nobody answers ---------------------------------------------------------------------------------------------------


def test_no_server(stock: Stock) -> None:
    queue_id = stock.put(Queue.DEFERRED, ["b@y.test"], tried(LATER), due=time.time() + 60)
    [row] = stock.json("why", queue_id)
    assert (row["scheduler"], row["recipients"][0]["cause"]) == ("down", "stopped")
    assert row["recipients"][0]["reply"] == "450 4.2.1 Busy"


def test_a_server_without_a_scheduler(stock: Stock) -> None:
    queue_id = stock.put(Queue.ACTIVE, ["b@y.test"])
    lock = stock.spool.lock("master.lock")
    [row] = stock.json("why", queue_id)
    os.close(lock)
    assert row["recipients"][0]["cause"] == "starting"


def test_a_scheduler_without_a_desk(stock: Stock) -> None:
    queue_id = stock.put(Queue.ACTIVE, ["b@y.test"])
    lock = stock.spool.lock()
    [row] = stock.json("why", queue_id)
    os.close(lock)
    assert (row["scheduler"], row["recipients"][0]["cause"]) == ("silent", "silent")
    assert f"process {os.getpid()}" in row["recipients"][0]["text"]


def test_a_message_that_a_process_has_open(stock: Stock) -> None:
    queue_id = stock.put(Queue.ACTIVE, ["b@y.test"])
    with Clerk(stock.spool), stock.spool.open(Queue.ACTIVE, queue_id):
        assert stock.json("why", queue_id)[0]["recipients"][0]["cause"] == "earlier"


def test_a_configuration_with_faults_hides_no_message(stock: Stock) -> None:
    queue_id = stock.put(Queue.HOLD, ["b@y.test"], tried(LATER))
    stock.config.write_text(f'hostname = "mx.x.test"\nspool = "{stock.path}"\nnonsense = 1\n')
    [row] = stock.json("why", queue_id)
    assert row["recipients"][0]["cause"] == "held"
    assert row["recipients"][0]["expires"] == 0


# -- no such message --------------------------------------------------------------------------------------------------


def test_no_such_message(stock: Stock) -> None:
    there = stock.put(Queue.HOLD, ["b@y.test"])
    gone = there[:-1] + "9"
    printed = stock.run("why", gone, "../../etc/passwd", there, code=1).stdout
    assert f"{gone}\n  It is not in the queue: it was delivered, returned or deleted, and the log" in printed
    assert "../../etc/passwd\n  That is no queue id.\n" in printed
    assert "  It is held" in printed, "the others are told all the same"
    assert [row["cause"] if "cause" in row else row["queue_name"] for row in stock.json("why", gone, there, code=1)] == [
        "missing",
        "hold",
    ]


def test_damaged(stock: Stock) -> None:
    queue_id = stock.put(Queue.DEFERRED, ["b@y.test"])
    file = stock.path / "deferred" / queue_id
    file.write_bytes(b"rubbish" * 100)
    [row] = stock.json("why", queue_id, code=1)
    assert row["cause"] == "damaged"
    assert row["text"].startswith("Its file in deferred is damaged: ")
    os.rename(file, stock.path / "corrupt" / f"{queue_id}.1")
    [row] = stock.json("why", queue_id, code=1)
    assert row["text"].startswith(f"It is damaged, and kept for you to look at: {stock.path}/corrupt/{queue_id}.1.")


def test_being_received(stock: Stock) -> None:
    queue_id = stock.put(Queue.INCOMING, ["b@y.test"])
    whole = stock.path / "incoming" / queue_id
    envelope = stock.spool.load(Queue.INCOMING, queue_id).envelope
    whole.unlink()
    incoming = stock.spool.enter(envelope)
    incoming.write(b"x" * 100_000)
    assert stock.json("why", queue_id, code=1)[0]["cause"] == "receiving"
    half = whole.read_bytes()
    incoming.discard()
    whole.write_bytes(half)
    assert stock.json("why", queue_id, code=1)[0]["cause"] == "unfinished"


def test_a_message_that_failed_for_one_and_waits_for_another(stock: Stock) -> None:
    queue_id = stock.put(Queue.DEFERRED, ["b@y.test", "c@y.test"], tried(GONE, LATER), due=time.time() + 60)
    with Clerk(stock.spool, [MessageView(queue_id, known=False, due=9.0)]):
        first, second = stock.json("why", queue_id)[0]["recipients"]
    assert (first["cause"], second["cause"]) == ("report", "due")
