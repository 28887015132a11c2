"""mtaq's filters: which messages --domain and its kin choose."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mtad.cli.queue_filter import Filter
from mtad.outcome import Deferred, Delivered, Failed
from mtad.progress import Reported
from mtad.spool.queues import LIVE, Queue
from tests.unit.orders_aid import BUSY, Stock


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stock]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    stock = Stock(tmp_path)
    yield stock
    stock.spool.close()


def test_a_domain_is_that_of_a_recipient_who_is_left(stock: Stock) -> None:
    both = stock.put("b@Y.test", "c@z.test", outcomes=(BUSY, BUSY))
    stock.put("b@y.test", "c@z.test", outcomes=(Delivered("2.0.0", "sent"),))
    told = stock.put("b@y.test", "c@z.test", outcomes=(Failed("5.0.0", "no"),), events=(Reported(1.0, (0,), "R"),))
    untold = stock.put("b@y.test", outcomes=(Failed("5.0.0", "no"),))
    stock.put("b@sub.y.test", "y.test@z.test")
    assert stock.chosen(domain="Y.TEST.") == stock.chosen(domain="@y.test") == [*_ordered(stock, both, untold)]
    assert told in stock.chosen(domain="z.test")


def _ordered(stock: Stock, *ids: str) -> list[str]:
    """These in the order of the directories."""
    return [queue_id for queue in LIVE for queue_id in stock.spool.names(queue) if queue_id in ids]


def test_senders(stock: Stock) -> None:
    address = stock.put(sender="News@X.test")
    other = stock.put(sender="other@x.test")
    report = stock.put(sender="", kind="bounce")
    stock.put(sender="news@sub.x.test")
    assert stock.chosen(sender="news@x.TEST") == stock.chosen(sender="<news@x.test>") == [address]
    assert stock.chosen(sender="@x.test") == _ordered(stock, address, other)
    assert stock.chosen(sender="<>") == stock.chosen(sender="MAILER-DAEMON") == [report]


def test_reasons_are_those_of_recipients_who_are_left(stock: Stock) -> None:
    busy = stock.put("b@y.test", "c@z.test", outcomes=(BUSY, Deferred("4.4.1", "timed out")))
    stock.put(outcomes=(Delivered("2.0.0", "sent; the mailbox is busy"),))
    stock.put()
    for text in ("mailbox IS busy", "HOST mx.y.test", "said: 450 4.2.0 The Mailbox is busy"):
        assert stock.chosen(reason=text) == [busy], text
    assert stock.chosen(reason="timed out", domain="z.test") == [busy]
    assert stock.chosen(reason="timed out", domain="y.test") == [], "both are of one recipient"


def test_ages(stock: Stock) -> None:
    old, new = stock.put(age=7201), stock.put(age=7200)
    assert stock.chosen(older_than=7200.0) == [old]
    assert stock.chosen(older_than=0.0) == _ordered(stock, old, new)


def test_all_must_fit(stock: Stock) -> None:
    wanted = stock.put("b@y.test", sender="a@x.test", age=100, outcomes=(BUSY,))
    stock.put("b@z.test", sender="a@x.test", age=100, outcomes=(BUSY,))
    stock.put("b@y.test", sender="a@w.test", age=100, outcomes=(BUSY,))
    stock.put("b@y.test", sender="a@x.test", age=10, outcomes=(BUSY,))
    stock.put("b@y.test", sender="a@x.test", age=100)
    assert stock.chosen(domain="y.test", sender="@x.test", reason="busy", older_than=50.0) == [wanted]


def test_what_cannot_be_read_fits_nothing(stock: Stock) -> None:
    good, damaged = stock.put(), stock.put()
    stock.path(Queue.DEFERRED, damaged).write_bytes(b"garbage")
    assert stock.chosen(domain="y.test") == [good]
    assert set(stock.chosen()) == {good, damaged}


@pytest.mark.parametrize("option", ["domain", "sender", "reason"])
def test_an_empty_filter_is_a_mistake(stock: Stock, option: str) -> None:
    with pytest.raises(click.UsageError, match=f"--{option} is empty"):
        stock.chosen(**{option: " "})
    assert Filter().empty


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("domain", "@"),
        ("domain", "."),
        ("domain", "@."),
        ("sender", "@"),
        ("sender", "@."),
        ("sender", ">"),
        ("sender", "<"),
    ],
)
def test_a_filter_with_an_empty_variable_in_it_is_a_mistake(stock: Stock, option: str, text: str) -> None:
    """As in a script: --sender "@$DOMAIN". It must not become the null sender, nor any domain."""
    with pytest.raises(click.UsageError, match=f"--{option} is empty"):
        stock.chosen(**{option: text, "older_than": 1.0})
