"""mtaq: the table that Postfix prints, the names that postqueue -j has, whatever lies in the spool."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mtad.cli.mtaq import main
from mtad.cli.queue_list import Row, print_json, print_table, rows
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.progress import CUT, REPORT, Doubt, Event, Named
from mtad.spool.queue_id import encode
from mtad.spool.queues import Queue, Spool
from tests.peers.postfix_queue import PostfixQueue, needs_postfix

ARRIVAL = 1_700_000_000
EMPTY = "Mail queue is empty\n"


class Stock:
    """A spool and its messages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spool = Spool(str(root / "spool"), create=True)
        self._ids = 0

    def put(self, queue: Queue, size: int, sender: str, reasons: Mapping[str, Outcome | None], *events: Event) -> str:
        """A message of ``size`` octets with one outcome (or none yet) for each recipient; its queue id."""
        self._ids += 1
        queue_id = encode(ARRIVAL * 1_000_000 + self._ids, 7)
        envelope = Envelope(queue_id, ARRIVAL, sender, tuple(map(Recipient, reasons)))
        incoming = self.spool.enter(envelope)
        incoming.write(b"x" * size)
        incoming.commit()
        os.rename(self.path(Queue.INCOMING, queue_id), self.path(queue, queue_id))
        outcomes = tuple((index, outcome) for index, outcome in enumerate(reasons.values()) if outcome)
        for event in (*([Attempt(ARRIVAL, outcomes)] if outcomes else []), *events):
            self.spool.append(queue, queue_id, event)
        return queue_id

    def path(self, queue: Queue, queue_id: str) -> Path:
        return self.root / "spool" / queue.value / queue_id

    def table(self) -> str:
        out = io.StringIO()
        print_table(rows(self.spool), out)
        return out.getvalue()

    def objects(self) -> list[dict[str, Any]]:
        out = io.StringIO()
        print_json(rows(self.spool), out)
        return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stock]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    stock = Stock(tmp_path)
    yield stock
    stock.spool.close()


def later(text: str) -> Deferred:
    return Deferred("4.4.1", text, "mx.y.test")


REFUSED = "connect to y.test[127.0.0.1]:25: Connection refused"
LONG = "a very long reason that is longer than the seventy-six columns which Postfix has for it, as they often are"
#: Queue, size, sender and reasons by recipient, of messages whose show is compared with Postfix's.
MESSAGES: list[tuple[Queue, int, str, dict[str, str]]] = [
    (Queue.ACTIVE, 5, "a@x.test", {"b@y.test": ""}),
    (Queue.ACTIVE, 1023, "", {"b@y.test": "", "c@y.test": ""}),
    (Queue.HOLD, 1024, "long" * 20 + "@x.test", {"b@y.test": ""}),
    (Queue.DEFERRED, 400_000, "a@x.test", {"b@y.test": REFUSED}),
    (Queue.DEFERRED, 1, "a@x.test", {"b@y.test": REFUSED, "c@y.test": REFUSED, "d@z.test": LONG}),
    (Queue.DEFERRED, 1, "a@x.test", {"b@y.test": LONG, "c@y.test": REFUSED, "d@y.test": LONG}),
    (Queue.DEFERRED, 12345678, "a@x.test", {"b" * 60 + "@y.test": "x" * 75, "c@y.test": "x" * 76, "d@y.test": "x" * 77}),
]


def both(stock: Stock) -> PostfixQueue:
    """The same messages in both queues."""
    postfix = PostfixQueue(stock.root)
    for queue, size, sender, reasons in MESSAGES:
        given = {address: later(reason) if reason else None for address, reason in reasons.items()}
        queue_id = stock.put(queue, size, sender, given)
        postfix.add(queue.value, queue_id, size, ARRIVAL, sender, reasons)
    return postfix


def entries(table: str) -> tuple[str, list[str], str]:
    """The heading of a table, its entries in an order of their own, and its last line."""
    heading, _, rest = table.partition("\n")
    *found, total = rest.split("\n\n")
    return heading, sorted(found), total


@needs_postfix
def test_the_table_is_postfixs_octet_for_octet(stock: Stock) -> None:
    theirs = both(stock).show("-p")
    assert entries(stock.table()) == entries(theirs)
    assert len(entries(theirs)[1]) == len(MESSAGES)


@needs_postfix
def test_the_objects_have_what_postfixs_have_in_its_order(stock: Stock) -> None:
    theirs = [json.loads(line) for line in both(stock).show("-j").splitlines()]
    ours = {row["queue_id"]: row for row in stock.objects()}
    assert len(theirs) == len(ours) == len(MESSAGES)
    for wanted in theirs:
        row = ours[wanted["queue_id"]]
        assert list(row)[: len(wanted)] == list(wanted)
        recipients = wanted.pop("recipients")
        assert {name: row[name] for name in wanted} == wanted
        pairs = list(zip(row["recipients"], recipients, strict=True))
        assert [{name: one[name] for name in other} for one, other in pairs] == recipients


# The same form for machines without Postfix: what it printed, kept.


def test_the_form_of_the_table(stock: Stock) -> None:
    active = stock.put(Queue.ACTIVE, 5, "", {"b@y.test": None})
    deferred = stock.put(Queue.DEFERRED, 2048, "a@x.test", {"b@y.test": later(REFUSED), "c@y.test": later(REFUSED)})
    held = stock.put(Queue.HOLD, 7, "a@x.test", {"d@z.test": None})
    date = time.strftime("%a %b %e %H:%M:%S", time.localtime(ARRIVAL))
    assert stock.table() == (
        "----Queue ID----- --Size-- ---Arrival Time---- --Sender/Recipient------\n"
        f"{active + '*':17}        5 {date} MAILER-DAEMON\n"
        "                                               b@y.test\n"
        "\n"
        f"{deferred:17}     2048 {date} a@x.test\n"
        f"                         ({REFUSED})\n"
        "                                               b@y.test\n"
        "                                               c@y.test\n"
        "\n"
        f"{held + '!':17}        7 {date} a@x.test\n"
        "                                               d@z.test\n"
        "\n"
        "-- 2 Kbytes in 3 Requests.\n"
    )


def test_one_request_is_singular(stock: Stock) -> None:
    stock.put(Queue.INCOMING, 5, "a@x.test", {"b@y.test": None})
    assert stock.table().endswith("-- 0 Kbytes in 1 Request.\n")


def test_an_empty_queue(stock: Stock) -> None:
    assert stock.table() == EMPTY
    assert stock.objects() == []


def test_only_recipients_with_something_left_to_do_are_shown(stock: Stock) -> None:
    sent, never = Delivered("2.0.0", "sent"), Failed("5.1.1", "no such user")
    stock.put(Queue.ACTIVE, 1, "a@x.test", {"sent@y.test": sent, "never@y.test": never, "new@y.test": None})
    [row] = stock.objects()
    assert row["recipients"] == [
        {"address": "never@y.test", "delay_reason": "no such user", "status": "5.1.1"},
        {"address": "new@y.test"},
    ]


def test_our_own_fields_come_after_postfixs(stock: Stock) -> None:
    queue_id = stock.put(Queue.DEFERRED, 1, "a@x.test", {"b@y.test": later("x")}, Attempt(2.0, ((0, later("y")),)))
    os.utime(stock.path(Queue.DEFERRED, queue_id), (1_800_000_000, 1_800_000_000))
    [row] = stock.objects()
    assert list(row)[7:] == ["next_attempt", "attempts", "kind"]
    assert (row["next_attempt"], row["attempts"], row["kind"]) == (1_800_000_000, 2, "mail")
    assert row["recipients"][0]["remote"] == "mx.y.test"


def test_a_recipient_in_doubt_is_shown_as_such(stock: Stock) -> None:
    stock.put(Queue.ACTIVE, 1, "a@x.test", {"b@y.test": later("busy")}, Doubt(1.0, (0,), "mx.y.test"))
    assert "(in doubt: mx.y.test may have it already; busy)" in stock.table()
    assert stock.objects()[0]["recipients"][0]["in_doubt"] == "mx.y.test"


def test_a_recipient_that_is_held_in_doubt_is_shown_as_such(stock: Stock) -> None:
    held = Named(2.0, (0,), hold=True)
    stock.put(Queue.DEFERRED, 1, "a@x.test", {"b@y.test": None, "c@y.test": later("busy")}, Doubt(1.0, (0,), "mx"), held)
    assert "(in doubt: mx may have it already, and is held)" in stock.table()
    first, second = stock.objects()[0]["recipients"]
    assert (first["in_doubt"], first["held"], "held" in second) == ("mx", True, False)


def test_a_recipient_in_doubt_since_the_machine_stopped(stock: Stock) -> None:
    stock.put(Queue.ACTIVE, 1, "a@x.test", {"b@y.test": None}, Doubt(1.0, (0,), CUT))
    assert "(in doubt: somebody may have it already)" in stock.table()


def test_a_report_in_doubt_is_told_apart(stock: Stock) -> None:
    never = Failed("5.1.1", "no such user")
    stock.put(Queue.ACTIVE, 1, "a@x.test", {"b@y.test": never}, Doubt(1.0, (0,), REPORT))
    assert "(in doubt: its sender may have been told already; no such user)" in stock.table()


def test_a_message_that_moves_on_meanwhile_is_shown_once(stock: Stock) -> None:
    queue_id = stock.put(Queue.ACTIVE, 1, "a@x.test", {"b@y.test": None})
    found: list[Row] = []
    for row in rows(stock.spool):
        found.append(row)
        if row.queue_name == "active":
            stock.spool.defer(queue_id, time.time())
    assert [row.queue_name for row in found] == ["active"]


def test_a_message_that_goes_meanwhile_is_no_fault(stock: Stock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        stock.put(Queue.DEFERRED, 1, "a@x.test", {"b@y.test": None})
    found = []
    for row in rows(stock.spool):
        found.append(row)
        for name in os.listdir(stock.root / "spool" / "deferred"):
            stock.path(Queue.DEFERRED, name).unlink()
    assert len(found) == 1
    assert capsys.readouterr().err == ""


def test_what_cannot_be_read_is_named_and_the_rest_is_shown(
    stock: Stock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = stock.put(Queue.DEFERRED, 1, "a@x.test", {"b@y.test": None})
    damaged = stock.put(Queue.DEFERRED, 1, "a@x.test", {"b@y.test": None})
    stock.path(Queue.DEFERRED, damaged).write_bytes(b"garbage")
    stock.path(Queue.INCOMING, encode(ARRIVAL * 1_000_000, 8)).write_bytes(b"")
    os.mkfifo(stock.path(Queue.DEFERRED, encode(ARRIVAL * 1_000_000, 9)))
    assert [row["queue_id"] for row in stock.objects()] == [good]
    assert capsys.readouterr().err.startswith(f"mtaq: deferred/{damaged}: damaged: ")

    def forbid(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(stock.spool, "load", forbid)
    assert stock.objects() == []
    assert f"mtaq: deferred/{good}: cannot be read: Permission denied" in capsys.readouterr().err


def test_hostile_text_in_the_queue_does_not_break_the_lines(stock: Stock) -> None:
    stock.put(Queue.DEFERRED, 1, "a@x.test", {"ü@y.test": later("naïve")})
    text = stock.table()
    assert "ü@y.test\n" in text
    assert text.count("\n") == 6


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(stock: Stock) -> str:
    path = stock.root / "mtad.toml"
    path.write_text(f'hostname = "mx.example.org"\nspool = "{stock.root}/spool"\n')
    return str(path)


def test_the_command(stock: Stock, config: str) -> None:
    stock.put(Queue.DEFERRED, 1, "a@x.test", {"b@y.test": None})
    run = CliRunner().invoke(main, ["-c", config])
    assert (run.exit_code, run.stdout) == (0, stock.table())
    run = CliRunner().invoke(main, ["-c", config, "--json"])
    assert (run.exit_code, [json.loads(line) for line in run.stdout.splitlines()]) == (0, stock.objects())


def test_a_configuration_by_the_environment(stock: Stock, config: str) -> None:
    run = CliRunner().invoke(main, [], env={"MTAD_CONFIG": config})
    assert (run.exit_code, run.stdout) == (0, EMPTY)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("spool = 3", 78, "mtad.toml"),
        ('hostname = "x"\nspool = "/nonexistent"', 1, "/nonexistent is not a spool"),
    ],
)
def test_what_cannot_be_shown_says_why(tmp_path: Path, text: str, code: int, said: str) -> None:
    path = tmp_path / "mtad.toml"
    path.write_text(text)
    run = CliRunner().invoke(main, ["-c", str(path)])
    assert run.exit_code == code
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def test_usage() -> None:
    assert CliRunner().invoke(main, ["--nonsense"]).exit_code == 2
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0
    assert CliRunner().invoke(main, ["--version"]).stdout.startswith("mtad ")


def test_a_reader_who_has_seen_enough_ends_it_quietly(stock: Stock, config: str) -> None:
    for _ in range(600):  # more than a pipe holds
        stock.put(Queue.DEFERRED, 1, "a@x.test", {"b@y.test": later(LONG)})
    command = f"{os.path.dirname(sys.executable)}/mtaq -c {config} --json | head -1"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert run.stdout.count("\n") == 1
    assert run.stderr == ""
