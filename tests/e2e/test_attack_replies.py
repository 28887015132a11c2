"""What another server's reply is made to carry: the client's half of S-EN2 of the attacks (CVE-2020-8794 and its kin)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import pytest

from mtad.outcome import Deferred
from mtad.spool.queues import Queue
from tests.e2e.attack_aid import MIB, Memory, assert_printable
from tests.e2e.world import World
from tests.peers.mx import Raw, Script
from tests.site import await_value


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("world"), delivery={"processes": 1}) as world:
        yield world


def deferred(world: World, queue_id: str) -> Deferred:
    """The outcome of the one recipient as the queue file has it; there is nothing in it that does not print."""
    [(_, outcome)] = world.attempts(Queue.DEFERRED, queue_id)[-1].outcomes
    assert isinstance(outcome, Deferred)
    assert_printable(outcome.text)
    assert_printable(outcome.reply)
    return outcome


#: What a server says that is no reply at all.
NO_REPLIES: Final = {
    "CVE-2020-8794, an odd last line": Raw(b"550-a\r\n550-b\r\n55", close=True),
    "an odd last line with its end": Raw(b"550-a\r\n550-b\r\n55\r\n"),
    "a last line of nothing": Raw(b"550-a\r\n550-b\r\n\r\n"),
    "no last line": Raw(b"550-a\r\n550-b\r\n", close=True),
    "a line within a line": Raw(b"550-a\nQ: type: mda\n550 b\r\n", close=True),
    "no number": Raw(b"5x0 a\r\n"),
    "a number too long": Raw(b"5500 a\r\n"),
    "a number too large": Raw(b"999 a\r\n"),
    "a number too small": Raw(b"000 a\r\n"),
    "numbers that are not ASCII": Raw("\u0665\u0665\u0660 a\r\n".encode()),
    "numbers that differ": Raw(b"550-a\r\n250 b\r\n"),
    "a positive end": Raw(b"450-a\r\n450-b\r\n250 c\r\n"),
    "lines without end": Raw(b"250-x\r\n" * 1000, endless=True),
    "a line without end": Raw(b"550 " + b"x" * MIB, endless=True),
    "a line of 1 MiB": Raw(b"550 " + b"x" * MIB + b"\r\n"),
    "a NUL first": Raw(b"\x00550 a\r\n"),
    "nothing": Raw(b"\r\n"),
    "a blank": Raw(b" 550 a\r\n"),
}

PLACES: Final = ["greeting", "ehlo", "mail", "data", "dot"]
ELSEWHERE: Final = ["CVE-2020-8794, an odd last line", "no number", "numbers that differ", "a line of 1 MiB", "a NUL first"]
CASES: Final = [("rcpt", name) for name in NO_REPLIES] + [(place, name) for place in PLACES for name in ELSEWHERE]


@pytest.mark.parametrize(("place", "name"), CASES)
def test_s_en2_a_reply_that_is_none_is_no_verdict(world: World, place: str, name: str) -> None:
    """The message stays, with a reason that can be shown to anybody; nothing of it gets into the structure of the queue."""
    site = world.site
    hop = world.mx(Script(**{place: NO_REPLIES[name]}))  # type: ignore[arg-type]
    first = world.mx()
    world.send(f"b@{world.domain(first)}")
    first.await_messages(1)  # so there is a process
    with Memory(site.deliveries()) as memory:
        queue_id = world.send(f"b@{world.domain(hop)}")
        await_value(lambda: queue_id in site.files("deferred"), what="it is deferred")
    assert memory.growth < 4 * MIB
    assert hop.messages == []
    outcome = deferred(world, queue_id)
    assert outcome.status in {"4.4.2", "4.5.0"}
    assert len(outcome.text) < 2000
    assert_printable(site.log())


def test_s_en2_the_queue_can_be_shown_to_anybody(world: World) -> None:
    """All that was deferred above, and one more."""
    hop = world.mx(Script(rcpt=NO_REPLIES["a line within a line"]))
    queue_id = world.send(f"b@{world.domain(hop)}")
    assert world.reason(queue_id).startswith("4.5.0 protocol error of ")
    for options in ((), ("--json",)):
        shown = world.site.run("mtaq", *options).stdout
        assert queue_id in shown
        assert_printable(shown)


ODD: Final = [b"\r", b"\n550-", b"\0", b"\x1b[2J", b"\x07", b"\x7f", b"\x85", b"\xc2\x85", b"\xe2\x80\xa8", b"\t", b"\xff"]


@pytest.mark.parametrize("odd", ODD)
def test_s_en2_a_reply_that_is_one_is_shown_without_what_does_not_print(world: World, odd: bytes) -> None:
    """In the queue file, in the log, and in a report."""
    site = world.site

    def reply(code: bytes) -> Raw:
        text = b"%b-%b.1.1 a" + odd + b"b\r\n%b-%b.1.1 c" + odd + b"Diagnostic-Code: d\r\n%b e\r\n"
        return Raw(text.replace(b"\n550-", b"\n%b-" % code) % (code, code[:1], code, code[:1], code))

    before = len(site.mailbox("alice"))
    queue_id = world.send(f"b@{world.domain(world.mx(Script(rcpt=reply(b'450'))))}")
    await_value(lambda: queue_id in site.files("deferred"), what="it is deferred")
    assert deferred(world, queue_id).reply.startswith("450 4.1.1 a")
    world.send(f"b@{world.domain(world.mx(Script(rcpt=reply(b'550'))))}")
    report = site.await_mail("alice", before + 1)[-1]
    assert_printable(report)
    assert re.search(rb"550[ -]5\.1\.1 a", report)
    assert report.count(b"\nDiagnostic-Code: ") == 1
    assert_printable(site.log())
