"""Connections that the SMTP transport keeps: when they are used again, and that a dead one costs nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from mtad.config import Duration
from mtad.delivery.connections import AGE_LIMIT, MESSAGE_LIMIT, ConnectionCache, Session, Timeouts
from mtad.envelope import Envelope, Recipient
from mtad.net.connection import connect
from mtad.outcome import Delivered, Outcome
from tests.peers.mx import CLOSE, RESET, Action, Raw, Say, Script
from tests.peers.outbound import Site, only


@pytest.fixture
def site() -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack)


def test_a_connection_is_kept_for_the_next_message_to_the_same_destination(site: Site) -> None:
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")
    site.domain("127.0.0.5", name="y.test")
    for _ in range(3):
        site.send()
    assert mx.connections == 1
    assert mx.verbs() == ["EHLO"] + ["MAIL", "RCPT", "DATA"] * 3
    assert site.attempts[0].connection < 0.1
    site.send("b@y.test", domain="y.test")
    assert mx.connections == 2


def test_connections_to_a_smarthost_serve_all_destinations(site: Site) -> None:
    mx = site.mx("127.0.0.5")
    site.make(next_hop="[127.0.0.5]")
    site.send("b@x.test", domain="x.test")
    site.send("b@y.test", domain="y.test")
    assert mx.connections == 1
    assert len(mx.messages) == 2


@pytest.mark.parametrize("script", [Script(rcpt=Say("450 4.2.0 later")), Script(data=Say("451 4.3.0 later"))])
def test_an_open_transaction_is_reset_together_with_the_next_one(site: Site, script: Script) -> None:
    mx = site.mx("127.0.0.5", script)
    site.domain("127.0.0.5")
    site.send()
    mx.script = Script()
    assert isinstance(only(site.send()), Delivered)
    assert mx.connections == 1
    assert [data for _, data in mx.reads][-2].startswith(b"RSET\r\nMAIL FROM:")


def test_a_kept_connection_that_the_server_closed_costs_no_attempt(site: Site) -> None:
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")
    site.send()
    mx.drop()
    assert isinstance(only(site.send()), Delivered)
    assert len(site.attempts) == 1
    assert mx.connections == 2
    assert len(mx.messages) == 2


@pytest.mark.parametrize(
    "action", [Say("421 4.4.2 idle for too long", close=True), CLOSE, RESET, Raw(b"garbage\r\n", close=True)]
)
def test_a_kept_connection_that_fails_at_mail_costs_no_attempt(site: Site, action: Action) -> None:
    usual = Say("250 2.1.0 Ok")
    mx = site.mx("127.0.0.5", Script(mail=[usual, action, usual]))
    site.domain("127.0.0.5")
    site.send()
    assert isinstance(only(site.send()), Delivered)
    assert len(site.attempts) == 1
    assert (mx.connections, len(mx.messages)) == (2, 2)


def test_a_kept_connection_that_said_421_while_idle_costs_no_attempt(site: Site) -> None:
    mx = site.mx("127.0.0.5", Script(dot=[Raw(b"250 2.0.0 Ok\r\n421 4.4.2 bye\r\n", close=True), Say("250 2.0.0 Ok")]))
    site.domain("127.0.0.5")
    assert isinstance(only(site.send()), Delivered)
    assert isinstance(only(site.send()), Delivered)
    assert len(site.attempts) == 1
    assert mx.connections == 2


def test_a_kept_connection_that_refuses_mail_counts_and_is_not_tried_twice(site: Site) -> None:
    usual = Say("250 2.1.0 Ok")
    first = site.mx("127.0.0.5", Script(mail=[usual, Say("450 4.3.2 later")]))
    second = site.mx("127.0.0.6")
    site.domain("127.0.0.5", "127.0.0.6")
    site.send()
    assert isinstance(only(site.send()), Delivered)
    assert [attempt.host for attempt in site.attempts] == ["mx1.x.test", "mx2.x.test"]
    assert (first.connections, second.connections) == (1, 1)


def test_idle_connections_are_closed_with_quit(site: Site) -> None:
    site.make(connection_idle=Duration(0.05))
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")
    site.send()
    deadline = time.monotonic() + 5
    while not site.transport.expire():
        assert time.monotonic() < deadline
    mx.await_closed()
    assert mx.verbs()[-1] == "QUIT"


def test_close_closes_what_is_idle_and_what_comes_back(site: Site) -> None:
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")
    site.send()
    site.transport.close()
    mx.await_closed()
    assert isinstance(only(site.send()), Delivered)
    mx.await_closed()
    assert len(mx.messages) == 2


def test_nothing_is_kept_when_idle_is_zero(site: Site) -> None:
    site.make(connection_idle=Duration(0.0))
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")
    site.send()
    mx.await_closed()
    assert len(site.transport.cache) == 0


def test_a_connection_carries_a_limited_number_of_messages(site: Site) -> None:
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")
    for _ in range(MESSAGE_LIMIT + 1):
        site.send()
    assert mx.connections == 2
    assert len(mx.messages) == MESSAGE_LIMIT + 1


def test_many_threads_share_the_connections_and_each_uses_its_own(site: Site) -> None:
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")
    lost: list[Outcome] = []
    envelope = Envelope("Q1", 0.0, "a@me.test", (Recipient("b@x.test"),))

    def work(number: int) -> None:
        for turn in range(20):
            body = b"Subject: %d.%d\r\n\r\nx\r\n" % (number, turn)
            for attempt in site.deliver(envelope, body, "x.test"):
                lost.extend(outcome for _, outcome in attempt.outcomes if not isinstance(outcome, Delivered))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not lost
    assert len({message.content for message in mx.await_messages(160)}) == 160
    assert mx.connections <= 16


# --- the cache alone ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sessions(site: Site) -> Iterator[Callable[..., Session]]:
    mx = site.mx("127.0.0.5")
    timeouts = Timeouts(site.settings)
    made: list[Session] = []

    def make(key: str = "x.test", now: float = 0.0) -> Session:
        made.append(Session(connect("127.0.0.5", mx.port, 5.0), key, "mx", mx.port, timeouts, now=now))
        return made[-1]

    yield make
    for session in made:
        session.close()


def test_the_cache_hands_out_the_youngest_of_a_destination_once(sessions: Callable[..., Session]) -> None:
    cache = ConnectionCache(2.0)
    first, second, other = sessions(), sessions(), sessions("y.test")
    for now, session in enumerate((first, second, other)):
        cache.put(session, now / 10)
    assert cache.take("x.test", 1.0) is second
    assert cache.take("x.test", 1.0) is first
    assert cache.take("x.test", 1.0) is None
    assert len(cache) == 1
    cache.close_all()
    assert len(cache) == 0


def test_the_cache_forgets_by_idle_time_age_and_number(sessions: Callable[..., Session]) -> None:
    cache = ConnectionCache(2.0, limit=2)
    cache.put(sessions(), 0.0)
    assert cache.take("x.test", 2.0) is None
    cache.put(sessions(), AGE_LIMIT)  # created at 0: too old
    assert len(cache) == 0
    kept = [sessions(now=1000.0), sessions(now=1000.0), sessions("y.test", now=1000.0)]
    for number, session in enumerate(kept):
        cache.put(session, 1000.0 + number / 10)
    assert len(cache) == 2
    assert cache.take("x.test", 1000.3) is kept[1]
    assert cache.expire(1002.1) == 0
    assert cache.expire(1002.2) == 1
    assert len(cache) == 0
