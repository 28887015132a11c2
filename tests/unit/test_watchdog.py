"""The watchdog: a delivery that makes no progress is interrupted, and one that does not even then end is named."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from mtad.config import Config, Delivery, Dns, Duration
from mtad.delivery.jobs import ALIVE, Job, sign_of_life, stuck_jobs
from mtad.delivery.smtp import SmtpTransport
from mtad.delivery.transport import Content, Task
from mtad.delivery.watchdog import MARGIN, Watchdog, longest_wait
from mtad.net.channels import MAX_PACKET
from mtad.nexthop import Rules
from mtad.outcome import Attempt, Deferred, Outcome
from mtad.resolver import Resolver
from mtad.routing import Router
from tests.peers.mx import HANG, Script
from tests.peers.outbound import Site
from tests.site import await_value
from tests.unit.delivery_aid import SENT, World, giving
from tests.unit.tls_aid import issue

LIMIT = 100.0


class Line:
    """A session that counts its interruptions."""

    def __init__(self) -> None:
        self.host = "mx.test"
        self.moved = 0.0
        self.interrupted = 0

    def interrupt(self) -> None:
        self.interrupted += 1


class Watched:
    """A watchdog with a clock of the test's."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.dog = Watchdog(LIMIT, lambda: self.now)

    def after(self, seconds: float) -> list[int]:
        self.now += seconds
        return self.dog.look()


def test_a_job_that_does_not_move_is_interrupted_once_and_then_named(capfd: pytest.CaptureFixture[str]) -> None:
    watched, line = Watched(), Line()
    watched.dog.begin(7, "Q1")
    watched.dog.follow(line)
    assert watched.after(LIMIT - 1) == []
    assert line.interrupted == 0
    assert watched.after(1) == []
    assert line.interrupted == 1
    assert "Q1: warning: a delivery has made no progress for 100 s, with mx.test; its connection" in capfd.readouterr().err
    assert watched.after(LIMIT - 1) == []
    assert watched.after(1) == [7]
    assert watched.after(1) == [7], "as long as it is there"
    assert line.interrupted == 1
    watched.dog.end()
    assert watched.after(1) == []


def test_octets_and_steps_are_progress() -> None:
    watched, line = Watched(), Line()
    watched.dog.begin(7, "Q1")
    watched.dog.follow(line)
    for _ in range(10):
        watched.after(LIMIT - 1)
        line.moved = watched.now
    watched.after(LIMIT - 1)
    watched.dog.follow(line)
    watched.after(LIMIT - 1)
    assert line.interrupted == 0


def test_a_job_that_moves_again_is_forgiven() -> None:
    watched, line = Watched(), Line()
    watched.dog.begin(7, "Q1")
    watched.dog.follow(line)
    watched.after(LIMIT)
    line.moved = watched.now
    assert watched.after(LIMIT - 1) == []
    assert watched.after(1) == []
    assert line.interrupted == 2


def test_a_session_that_was_given_back_is_let_alone(capfd: pytest.CaptureFixture[str]) -> None:
    watched, line = Watched(), Line()
    watched.dog.begin(7, "Q1")
    watched.dog.follow(line)
    watched.dog.follow(None)
    watched.after(LIMIT)
    assert line.interrupted == 0
    assert "without a connection" in capfd.readouterr().err


def test_threads_have_jobs_of_their_own() -> None:
    watched, line = Watched(), Line()

    def other() -> None:
        watched.dog.begin(8, "Q2")
        watched.dog.follow(line)

    watched.dog.begin(7, "Q1")
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    watched.now += LIMIT / 2
    watched.dog.follow(None)
    watched.after(LIMIT / 2)
    assert line.interrupted == 1
    watched.dog.end()
    assert watched.after(LIMIT) == [8]
    watched.dog.follow(line)  # of a thread without a job, such as a test of a transport


def test_the_limit_is_above_every_time_out() -> None:
    config = Config(hostname="mx.example.org")
    longest = longest_wait(config)
    names = [name for name in Delivery.__struct_fields__ if name.endswith("_timeout")]
    assert len(names) >= 9
    assert longest >= max(float(getattr(config.delivery, name)) for name in names) + MARGIN
    for name in names:
        patient = msgspec.structs.replace(config.delivery, **{name: Duration(7000.0)})
        assert longest_wait(msgspec.structs.replace(config, delivery=patient)) == 7000 + MARGIN, name
    slow = msgspec.structs.replace(config, dns=Dns(timeout=Duration(300.0)))
    assert longest_wait(slow) > longest


def test_the_sign_of_life_names_what_is_stuck() -> None:
    assert sign_of_life() == ALIVE
    assert stuck_jobs(ALIVE) == frozenset()
    assert stuck_jobs(sign_of_life([7, 12])) == {7, 12}


# -- with real connections -------------------------------------------------------------------------------------------


def transport(site: Site, dog: Watchdog) -> SmtpTransport:
    """A transport whose time-outs are a day, so that only the watchdog ends a wait."""
    day = {name: Duration(86400.0) for name in Delivery.__struct_fields__ if name.endswith("_timeout")}
    settings = Delivery(port=site.port, **day)  # type: ignore[arg-type]
    router = Router(Resolver([site.dns.address], 1.0), "me.test", Rules(settings))
    return SmtpTransport("me.test", settings, router, follow=dog.follow)


@pytest.mark.parametrize(
    ("script", "tls"),
    [
        (Script(greeting=HANG), False),
        (Script(ehlo=HANG), False),
        (Script(mail=HANG), False),
        (Script(dot=HANG), False),
        (Script(dot=HANG, extensions=["STARTTLS"]), True),
    ],
)
def test_a_thread_that_waits_for_ever_comes_back(script: Script, tls: bool, tmp_path: Path) -> None:
    with ExitStack() as stack:
        site = Site(stack)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        if context is not None:
            pair = issue("mx1.x.test").write(tmp_path)
            context.load_cert_chain(pair.certificate, pair.key)
        mx = site.mx("127.0.0.5", script, tls=context)
        site.domain("127.0.0.5")
        dog = Watchdog(0.2)
        site.transport = transport(site, dog)
        outcomes: list[Outcome] = []

        def job() -> None:
            dog.begin(7, "Q1")
            outcomes.extend(site.send().values())
            dog.end()

        thread = threading.Thread(target=job)
        thread.start()
        mx.await_connections(1)
        await_value(lambda: [dog.look()] and not thread.is_alive())
        assert len(mx.secured) == tls
        [outcome] = outcomes
        assert isinstance(outcome, Deferred)
        assert outcome.text.startswith("lost connection with mx1.x.test[127.0.0.5] while ")


# -- in the delivery process -----------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def test_a_job_that_hangs_is_named_in_the_sign_of_life(world: World) -> None:
    gate, begun = threading.Event(), threading.Event()

    def hang(task: Task, content: Content, in_doubt: Callable[[str], None]) -> Sequence[Attempt]:
        begun.set()
        assert gate.wait(20)
        return giving(SENT)(task, content, in_doubt)

    world.script(hang)
    world.worker._watchdog._limit = 0.01
    thread = threading.Thread(target=world.worker._answer, args=(Job(12, world.message(), "smtp", "far.test", (0,)),))
    thread.start()
    try:
        assert begun.wait(10)

        def named() -> bytes:
            world.worker._show_life()
            packet = world.channel.recv(MAX_PACKET)
            return packet if stuck_jobs(packet) else b""

        assert await_value(named) == sign_of_life([12])
    finally:
        gate.set()
        thread.join(10)
    world.worker._show_life()
    assert world.hear().number == 12
    assert world.channel.recv(MAX_PACKET) == ALIVE
