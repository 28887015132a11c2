"""`mtaq --by`: groups, their counts and ages, and ten thousand messages in seconds."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mtad.cli.mtaq import main
from mtad.cli.queue_groups import COLUMNS, By, grouped, print_groups
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.progress import Reported
from mtad.spool.queue_file import encode_envelope, encode_event, encode_preamble
from mtad.spool.queue_id import encode
from mtad.spool.queues import Queue, Spool

NOW = 1_700_000_000.0
MINUTE = 60.0


def busy(host: str, address: str) -> Deferred:
    return Deferred("4.2.1", f"host {host}[192.0.2.1] said: 450 4.2.1 <{address}>: Busy, wait 17 s", host)


class Stock:
    """A spool and its messages, written as they are when they are finished."""

    def __init__(self, root: Path) -> None:
        self.path = root / "spool"
        self.spool = Spool(str(self.path), create=True)
        self.count = 0

    def put(
        self, queue: Queue, minutes: float, sender: str, outcomes: dict[str, Outcome | None], *, told: bool = False
    ) -> str:
        """A message that arrived so many minutes ago."""
        self.count += 1
        queue_id = encode(1_600_000_000_000_000 + self.count, 7)
        arrival = NOW - minutes * MINUTE
        envelope = encode_envelope(Envelope(queue_id, arrival, sender, tuple(map(Recipient, outcomes))))
        data = encode_preamble(envelope, 0, 0) + envelope + b"\n"
        known = tuple((number, outcome) for number, outcome in enumerate(outcomes.values()) if outcome)
        if known:
            data += encode_event(Attempt(arrival, known))
        if told:
            data += encode_event(Reported(arrival, tuple(range(len(outcomes))), ""))
        (self.path / queue.value / queue_id).write_bytes(data)
        return queue_id

    def groups(self, by: By) -> dict[str, tuple[int, int]]:
        """Messages and recipients by group."""
        return {name: (one.messages, one.recipients) for name, one in grouped(self.spool, by, NOW).groups.items()}

    def table(self, by: By) -> list[str]:
        out = io.StringIO()
        print_groups(grouped(self.spool, by, NOW), by, NOW, out)
        return out.getvalue().splitlines()


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stock]:
    monkeypatch.setenv("COLUMNS", "80")
    stock = Stock(tmp_path)
    yield stock
    stock.spool.close()


def test_by_destination_what_is_settled_does_not_count(stock: Stock) -> None:
    gone = Delivered("2.0.0", "ok")
    stock.put(Queue.DEFERRED, 1, "a@x.test", {"b@Y.test": None, "c@y.test": busy("mx", "c"), "d@z.test": gone})
    stock.put(Queue.ACTIVE, 1, "a@x.test", {"b@y.test": None, "b@z.test": None})
    stock.put(Queue.HOLD, 1, "", {"b@w.test": Failed("5.0.0", "no")})
    stock.put(Queue.HOLD, 1, "", {"b@v.test": Failed("5.0.0", "no")}, told=True)
    assert stock.groups("destination") == {"y.test": (2, 3), "z.test": (1, 1), "w.test": (1, 1)}


def test_by_sender(stock: Stock) -> None:
    stock.put(Queue.INCOMING, 1, "a@x.test", {"b@y.test": None, "c@y.test": None})
    stock.put(Queue.DEFERRED, 1, "a@x.test", {"b@y.test": None})
    stock.put(Queue.DEFERRED, 1, "", {"a@x.test": None})
    assert stock.groups("sender") == {"a@x.test": (2, 3), "MAILER-DAEMON": (1, 1)}


def test_by_reason_what_is_different_each_time_does_not_split_a_group(stock: Stock) -> None:
    for number in range(5):
        stock.put(Queue.DEFERRED, 1, "a@x.test", {"b@y.test": busy(f"mx{number}.y.test", f"b{number}@y.test")})
    refused = f"connect to mx{number}.y.test[192.0.2.1]:25: Connection refused"
    stock.put(Queue.DEFERRED, 1, "a@x.test", {"b@y.test": Deferred("4.4.1", refused)})
    stock.put(Queue.DEFERRED, 1, "a@x.test", {"b@y.test": Deferred("4.4.1", f"delivery temporarily suspended: {refused}")})
    stock.put(Queue.ACTIVE, 1, "a@x.test", {"b@y.test": None})
    assert stock.groups("reason") == {
        "host HOST said: 450 4.2.1 <ADDRESS>: Busy, wait N s": (5, 5),
        "connect to HOST: Connection refused": (2, 2),
        "not tried yet": (1, 1),
    }


def test_the_ages_are_in_qshapes_columns(stock: Stock) -> None:
    edges = [0, 5, 5.1, 10, 20, 40, 80, 160, 320, 640, 1280, 1281, 5000]
    for minutes in edges:
        stock.put(Queue.DEFERRED, minutes, "a@x.test", {"b@y.test": None})
    stock.put(Queue.DEFERRED, -3, "a@x.test", {"b@y.test": None})  # from before the clock was set back
    group = grouped(stock.spool, "destination", NOW).groups["y.test"]
    assert dict(zip(COLUMNS, group.ages, strict=True)) == {
        "5": 3, "10": 2, "20": 1, "40": 1, "80": 1, "160": 1, "320": 1, "640": 1, "1280": 1, "1280+": 2
    }  # fmt: skip
    assert (group.messages, group.oldest) == (len(edges) + 1, NOW - 5000 * MINUTE)


def test_the_table(stock: Stock) -> None:
    for _ in range(12):
        stock.put(Queue.DEFERRED, 7, "a@x.test", {"b@y.test": None})
    stock.put(Queue.DEFERRED, 2000, "a@x.test", {"b@z.test": None, "c@y.test": None})
    assert stock.table("destination") == [
        " T 5 10 20 40 80 160 320 640 1280 1280+ oldest  destination",
        "13 0 12  0  0  0   0   0   0    0     1  1d 9h  TOTAL",
        "13 0 12  0  0  0   0   0   0    0     1  1d 9h  y.test",
        " 1 0  0  0  0  0   0   0   0    0     1  1d 9h  z.test",
    ]


def test_a_name_that_does_not_fit_stands_above_its_numbers(stock: Stock) -> None:
    reason = "host mx.y.test[192.0.2.1] said: 450 4.7.1 Some words that are too many to stand beside the numbers"
    stock.put(Queue.DEFERRED, 7, "a@x.test", {"b@y.test": Deferred("4.7.1", reason)})
    table = stock.table("reason")
    assert table[-2:] == [
        "host HOST said: 450 4.7.1 Some words that are too many to stand beside the numbers",
        "1 0  1  0  0  0   0   0   0    0     0     7m",
    ]


def test_the_command(stock: Stock, tmp_path: Path) -> None:
    config = tmp_path / "mtad.toml"
    config.write_text(f'hostname = "mx.x.test"\nspool = "{stock.path}"\n')

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["-c", str(config), *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert run("--by", "reason") == "Mail queue is empty\n"
    assert run("--by", "reason", "--json") == ""
    stock.put(Queue.DEFERRED, 7, "a@x.test", {"b@y.test": None, "c@y.test": None})
    assert run("--by", "sender").splitlines()[-1].endswith("  a@x.test")
    [row] = [json.loads(line) for line in run("--by", "destination", "--json").splitlines()]
    ages: dict[str, Any] = row.pop("ages")
    assert row == {"destination": "y.test", "messages": 1, "recipients": 2, "oldest": NOW - 7 * MINUTE}
    assert list(ages) == list(COLUMNS)
    assert sum(ages.values()) == 1
    assert CliRunner().invoke(main, ["--by", "colour"]).exit_code == 2


def test_a_damaged_file_is_told_of_and_does_not_end_it(
    stock: Stock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = stock.put(Queue.DEFERRED, 7, "a@x.test", {"b@y.test": None})
    stock.put(Queue.DEFERRED, 7, "a@x.test", {"b@y.test": None})
    (stock.path / "deferred" / bad).write_bytes(b"rubbish" * 100)
    assert stock.groups("destination") == {"y.test": (1, 1)}
    assert f"mtaq: deferred/{bad}: not counted" in capsys.readouterr().err


def test_ten_thousand_messages_are_grouped_in_seconds(stock: Stock) -> None:
    many = int(os.environ.get("MTAD_TEST_GROUPED", "10000"))
    for number in range(many):
        address = f"b{number}@d{number % 10}.test"
        stock.put(Queue.DEFERRED, number / 10, f"a{number % 7}@x.test", {address: busy(f"mx{number}.test", address)})
    begun = time.monotonic()
    assert stock.groups("reason") == {"host HOST said: 450 4.2.1 <ADDRESS>: Busy, wait N s": (many, many)}
    assert time.monotonic() - begun < 10
    assert len(stock.groups("destination")) == 10
