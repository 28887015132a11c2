"""`mtaq show`: the envelope, every attempt of every recipient, the header, the content, and the object for programs."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtad.cli.queue_facts import Site
from mtad.cli.queue_show import standing
from mtad.envelope import Recipient
from mtad.outcome import Attempt, Deferred, Delivered, Failed
from mtad.progress import CUT, REPORT, Doubt, Event, Instructed, Named, RecipientState, Reported
from mtad.spool.queues import Queue
from tests.unit.queue_aid import GONE, HOUR, LATER, SENT, Stock

CONTENT = b"Received: x\r\nSubject: \xc3\xa9\x1b[2J\r\n\r\nhello\r\n.dot\r\n"
CLOCK = r"(?:\w{3} [ \d]\d )?\d\d:\d\d:\d\d"


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stock]:
    monkeypatch.setenv("COLUMNS", "80")
    stock = Stock(tmp_path)
    yield stock
    stock.spool.close()


def history(begun: float) -> list[Any]:
    """Two attempts for two recipients, the second one in doubt before it was known; and an order."""
    return [
        Attempt(
            begun + 12,
            ((0, LATER), (1, LATER)),
            "mx.y.test",
            "192.0.2.1:25",
            "TLSv1.3 TLS_AES_256_GCM_SHA384",
            connection=0.25,
            transmission=1.5,
            active=begun + 10,
        ),
        Instructed(begun + 60, "requeue", done=True),
        Doubt(begun + 301, (0,), "mx2.y.test"),
        Attempt(begun + 300, ((0, SENT),), "mx2.y.test", "[2001:db8::1]:25", connection=0.5, transmission=0.25),
        Attempt(begun + 302, ((1, Failed("4.4.7", "message expired after 5 minutes; last: x")),)),
        Reported(begun + 303, (1,), "4BzR5k2jL0z9"),
    ]


def test_the_print(stock: Stock) -> None:
    begun = time.time() - HOUR
    queue_id = stock.put(
        Queue.DEFERRED,
        ["b@y.test", "c@y.test"],
        *history(begun),
        content=CONTENT,
        due=time.time() + 182,
        arrival=begun,
        client="client.x.test[192.0.2.7]",
        helo="client.x.test",
        protocol="ESMTPSA",
        login="alice",
        body="8bitmime",
        smtputf8=True,
        ret="hdrs",
        envid="e1",
    )
    printed = stock.run("show", queue_id).stdout
    expected = rf"""{queue_id}  deferred
  from          a@x.test
  arrived       {CLOCK}, 1h ago
  client        from client.x.test\[192.0.2.7\], helo client.x.test, ESMTPSA,
                login alice
  size          45 octets: header 32, body 13
  parameters    BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=e1
  next attempt  {CLOCK}, in 3m \d+s
  recipients    2

  b@y.test
    delivered
    {CLOCK}      deferred 4.2.1, mx.y.test\[192.0.2.1\]:25
                  450 4.2.1 Busy
                  10 s in the queue, 2 s in its lane, 0.25 s to open, 1.5 s to
                  send; TLS TLSv1.3 TLS_AES_256_GCM_SHA384
    {CLOCK}      an administrator's order: requeue
    {CLOCK}      about to be sent to mx2.y.test
    {CLOCK}      delivered 2.0.0, mx2.y.test\[2001:db8::1\]:25
                  250 ok
                  0.5 s to open, 0.25 s to send; clear text

  c@y.test
    failed, and its sender was told
    {CLOCK}      deferred 4.2.1, mx.y.test\[192.0.2.1\]:25
                  450 4.2.1 Busy
                  10 s in the queue, 2 s in its lane, 0.25 s to open, 1.5 s to
                  send; TLS TLSv1.3 TLS_AES_256_GCM_SHA384
    {CLOCK}      an administrator's order: requeue
    {CLOCK}      failed 4.4.7, at no host
                  message expired after 5 minutes; last: x
    {CLOCK}      its sender was told of failure, by 4BzR5k2jL0z9
"""
    assert re.fullmatch(re.sub(r"(?<!\[)\s+", r"\\s+", expected), printed), printed
    assert max(map(len, printed.splitlines())) <= 80


def test_recipients_with_the_same_history_are_shown_together(stock: Stock) -> None:
    recipients = [f"u{number}@y.test" for number in range(1000)]
    attempt = Attempt(time.time(), tuple((index, LATER) for index in range(999)), "mx.y.test", "192.0.2.1:25")
    printed = stock.run("show", stock.put(Queue.ACTIVE, recipients, attempt)).stdout
    assert "  and 995 more recipients\n    deferred\n" in printed
    assert printed.count("450 4.2.1 Busy") == 1
    assert "  u999@y.test\n    not tried yet\n" in printed


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (RecipientState(), "not tried yet"),
        (RecipientState(LATER), "deferred"),
        (RecipientState(LATER, warned=True), "deferred, and its sender was told of the delay"),
        (RecipientState(GONE), "failed"),
        (RecipientState(GONE, reported=True), "failed, and its sender was told"),
        (RecipientState(SENT, announced=True), "delivered, and its sender was told so"),
        (RecipientState(doubt="mx.y.test"), "not tried yet; in doubt: mx.y.test may have it"),
        (RecipientState(GONE, doubt=REPORT), "failed; in doubt: a report may have gone out"),
        (RecipientState(doubt=CUT), "not tried yet; in doubt: somebody may have it"),
        (
            RecipientState(doubt="mx", held=True),
            "not tried yet; in doubt: mx may have it, and held until somebody releases it",
        ),
    ],
)
def test_where_a_recipient_stands(state: RecipientState, words: str) -> None:
    assert standing(state) == words


def test_doubts_are_part_of_the_story(stock: Stock) -> None:
    doubts: list[Event] = [
        Doubt(1.0, (0,), "mx.y.test"),
        Named(2.0, (0,), hold=True),
        Doubt(1.0, (1,), CUT),
        Named(2.0, (1,)),
    ]
    queue_id = stock.put(Queue.DEFERRED, ["b@y.test", "c@y.test"], *doubts)
    printed = " ".join(stock.run("show", queue_id).stdout.split())
    for words in (
        "about to be sent to mx.y.test",
        "no answer was written down: in doubt, and held",
        "the machine has stopped, and with it went what was written last",
        "no answer was written down: in doubt, and to be done again",
    ):
        assert words in printed
    [row] = stock.json("show", queue_id)
    assert [(one["doubt"], one["held"]) for one in row["recipients"]] == [("mx.y.test", True), (CUT, False)]


def test_what_the_sender_asked_for(stock: Stock) -> None:
    queue_id = stock.put(Queue.HOLD, ["b@y.test"])
    envelope = stock.spool.load(Queue.HOLD, queue_id).envelope
    asked = Recipient("b@y.test", ("failure", "delay"), "rfc822;b@z.test")
    (stock.path / "hold" / queue_id).unlink()
    incoming = stock.spool.enter(type(envelope)(queue_id, envelope.arrival, "", (asked,), kind="bounce"))
    incoming.write(b"Subject: x\r\n\r\n")
    incoming.commit()
    printed = stock.run("show", queue_id).stdout
    assert "    not tried yet; NOTIFY=FAILURE,DELAY; ORCPT=rfc822;b@z.test\n" in printed
    assert "  from          MAILER-DAEMON, a bounce\n" in printed


def test_for_programs(stock: Stock) -> None:
    begun = time.time() - HOUR
    queue_id = stock.put(Queue.ACTIVE, ["b@y.test", "c@y.test"], *history(begun), content=CONTENT, arrival=begun)
    [row] = stock.json("show", queue_id)
    first, second = row.pop("recipients")
    assert row == {
        "queue_id": queue_id, "queue_name": "active", "arrival": begun, "sender": "a@x.test", "message_size": 45,
        "header_size": 32,
    }  # fmt: skip
    assert (first["address"], first["state"], first["settled"], first["doubt"]) == ("b@y.test", "delivered", True, "")
    assert [step["what"] for step in first["history"]] == ["deferred", "requeue", "about to be sent", "delivered"]
    tried, _, _, sent = first["history"]
    assert tried == {
        "at": begun + 12, "what": "deferred", "host": "mx.y.test", "address": "192.0.2.1:25", "status": "4.2.1",
        "tls": "TLSv1.3 TLS_AES_256_GCM_SHA384", "text": LATER.text, "reply": "450 4.2.1 Busy",
        "delays": [pytest.approx(10), pytest.approx(2), 0.25, 1.5],
    }  # fmt: skip
    assert sent["delays"] == [None, None, 0.5, 0.25], "what is not known is not made up"
    assert [step["what"] for step in second["history"]] == ["deferred", "requeue", "failed", "told of failure"]
    assert second["history"][-1]["report"] == "4BzR5k2jL0z9"


def test_the_header_and_the_content_are_given_as_they_are(stock: Stock) -> None:
    large = CONTENT + b"x" * 200_000 + b"\r\n"
    queue_id = stock.put(Queue.ACTIVE, ["b@y.test"], content=large)
    assert stock.run("show", "--headers", queue_id).stdout_bytes == CONTENT[:32]
    assert stock.run("show", "--content", queue_id).stdout_bytes == large
    assert stock.run("show", "--headers", "--content", queue_id, code=2).stdout == ""
    assert stock.json("show", "--headers", queue_id)[0]["headers"] == CONTENT[:32].decode()
    assert stock.json("show", "--content", queue_id)[0]["content"] == large.decode()


def test_a_message_without_a_body_is_a_header(stock: Stock) -> None:
    queue_id = stock.put(Queue.ACTIVE, ["b@y.test"], content=b"Subject: x\r\n")
    assert stock.run("show", "--headers", queue_id).stdout_bytes == b"Subject: x\r\n"
    empty = stock.put(Queue.ACTIVE, ["b@y.test"], content=b"")
    assert "  size          0 octets\n" in stock.run("show", empty).stdout


def test_nothing_in_a_message_steers_a_terminal(stock: Stock) -> None:
    """Attack: a header with escape sequences, looked at by an administrator."""
    queue_id = stock.put(Queue.ACTIVE, ["b@y.test"], content=CONTENT)
    script = (
        "import os, pty, sys\n"
        "done = pty.spawn(sys.argv[1:])\n"
        "sys.exit(os.waitstatus_to_exitcode(done))\n"
    )  # fmt: skip
    command = [sys.executable, "-c", script, f"{Path(sys.executable).parent}/mtaq", "show", "--content", queue_id]
    run = subprocess.run([*command, "-c", str(stock.config)], capture_output=True, check=True, timeout=60)
    assert b"Subject: \xc3\xa9\\x1b[2J\r\n\r\nhello\r\n" in run.stdout
    assert b"\x1b" not in run.stdout


def test_a_damaged_content_is_told(stock: Stock) -> None:
    queue_id = stock.put(Queue.ACTIVE, ["b@y.test"], content=CONTENT)
    file = stock.path / "active" / queue_id
    file.write_bytes(file.read_bytes().replace(b"hello", b"hallo"))
    run = stock.run("show", "--content", queue_id, code=1)
    assert "checksum" in run.stderr


def test_no_such_message(stock: Stock) -> None:
    there = stock.put(Queue.ACTIVE, ["b@y.test"])
    run = stock.run("show", "4BzR5k2jL0z9", there, code=1)
    assert (
        run.stderr
        == "mtad: 4BzR5k2jL0z9: It is not in the queue: it was delivered, returned or deleted, and the log says which.\n"
    )
    assert there in run.stdout
    assert stock.json("show", "4BzR5k2jL0z9", code=1)[0]["cause"] == "missing"


def test_a_message_that_leaves_while_it_is_looked_at(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    queue_id = stock.put(Queue.ACTIVE, ["b@y.test"], Attempt(1.0, ((0, Deferred("4.0.0", "x")),)))
    look = Site.look

    def look_and_lose(site: Site, name: str) -> Any:
        found = look(site, name)
        (stock.path / "active" / queue_id).unlink()
        return found

    monkeypatch.setattr(Site, "look", look_and_lose)
    assert "It has just left" in stock.run("show", queue_id, code=1).stderr


def test_a_delivery_to_a_mailbox(stock: Stock) -> None:
    stored = Attempt(time.time(), ((0, Delivered("2.0.0", "delivered to maildir")),), "local", transmission=0.02)
    printed = stock.run("show", stock.put(Queue.ACTIVE, ["b@here.test"], stored)).stdout
    assert (
        "delivered 2.0.0, local\n                  delivered to maildir\n                  0 s to open, 0.02 s to send\n"
        in printed
    )
