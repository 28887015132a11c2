"""Servers that lie about what they can, and servers that hold us up: D-9, D-10 and D-11 of the list of attacks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from mtad.config import Duration
from mtad.delivery import connections
from mtad.outcome import Deferred, Delivered, Failed
from tests.peers.mx import STALL, Raw, Say
from tests.peers.outbound import SHORT, Site, only
from tests.unit.test_smtp_esmtp import RECEIVED, offer


@pytest.fixture
def site() -> Iterator[Site]:
    with ExitStack() as stack:
        site = Site(stack)
        site.domain("127.0.0.5")
        yield site


# --- D-10: servers that lie ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelining", [True, False])
def test_d10_a_server_that_does_not_know_its_bdat_gets_data_and_never_a_strangers_line(
    site: Site, pipelining: bool
) -> None:
    mx = site.mx(script=offer("CHUNKING", *["PIPELINING"] * pipelining, unknown=frozenset({"BDAT"})))
    body = RECEIVED + b"Subject: x\r\n\r\nRSET\r\nMAIL FROM:<smuggled@a>\r\nRCPT TO:<u@x>\r\nDATA\r\nsmug\r\n.\r\n"
    assert isinstance(only(site.send(body=body)), Delivered)
    assert len(site.attempts) == 1
    (message,) = mx.messages
    assert (message.content, message.sender) == (body, "a@me.test")
    assert "smuggled" not in str(mx.commands)
    assert mx.connections == 2


def test_d10_a_server_that_does_not_know_its_pipelining_costs_a_time_out_and_no_more(site: Site) -> None:
    site.make(short=True)
    site.domain("127.0.0.5", "127.0.0.6")
    # it throws away what came behind a command
    site.mx(script=offer("PIPELINING", mail=Raw(b"250 ok\r\n"), rcpt=Raw(b""), data=Raw(b"")))
    second = site.mx("127.0.0.6")
    assert isinstance(only(site.send()), Delivered)
    assert len(second.messages) == 1


@pytest.mark.parametrize("reply", ["555 5.5.4 BODY?", "501 5.5.4 SIZE?"])
def test_d10_parameters_that_it_offers_and_refuses_are_accounted_for(site: Site, reply: str) -> None:
    mx = site.mx(script=offer("SIZE", "8BITMIME", "PIPELINING", mail=Say(reply)))
    outcome = only(site.send(body=RECEIVED + b"\r\n\xff\r\n"))
    assert (isinstance(outcome, Failed), outcome.reply) == (True, reply)
    assert mx.messages == []


def test_d9_354_without_waiting_is_a_fault_at_once(site: Site) -> None:
    mx = site.mx(script=offer("PIPELINING", mail=Raw(b"354 go\r\n250 ok\r\n250 ok\r\n")))
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert outcome.status == "4.5.0"
    assert mx.messages == []


# --- D-11: servers that hold us up --------------------------------------------------------------------------------------


def test_d11_a_server_that_stops_reading_is_left(site: Site) -> None:
    site.make(short=True)
    site.mx(script=offer("PIPELINING", read_content=0, dot=STALL))
    start = time.monotonic()
    outcome = only(site.send(body=(b"x" * 998 + b"\r\n") * 20_000))
    assert isinstance(outcome, Deferred)
    assert "timed out while sending message body" in outcome.text
    assert time.monotonic() - start < 10 * SHORT
    assert site.doubts == []


def test_d11_a_server_that_reads_too_slowly_is_left(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SLOWEST", 100_000_000)
    site.make(data_xfer_timeout=Duration(0.5))
    site.mx(script=offer("PIPELINING", read_slowly=2000))
    start = time.monotonic()
    outcome = only(site.send(body=(b"x" * 998 + b"\r\n") * 20_000))
    assert isinstance(outcome, Deferred)
    assert "timed out while sending message body" in outcome.text
    assert 0.4 < time.monotonic() - start < 5


def test_d11_replies_that_each_come_in_time_do_not_go_on_for_ever(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "DIALOGUE_LIMIT", 0.5)
    mx = site.mx(script=offer(rcpt=Say("250 ok", delay=0.1)))
    start = time.monotonic()
    outcomes = site.send(*[f"r{number}@x.test" for number in range(50)])
    assert {outcome.status for outcome in outcomes.values()} == {"4.4.2"}
    assert time.monotonic() - start < 2
    mx.await_closed()
