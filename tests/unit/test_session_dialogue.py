"""One client's dialogue against a spool in memory: what is stored, what is said when that fails, what is reported."""

from __future__ import annotations

import errno
import tracemalloc
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.config import Limits, Size
from mtad.envelope import Envelope, Recipient
from mtad.reply import reply
from mtad.session.state import Client
from tests.dialogue_engine import Engine, MemoryLogins, octets, whole
from tests.unit.test_wire import SEQUENCES

Cut = Callable[[bytes], Iterable[bytes]]

OPENING = ("EHLO client.example.net", "MAIL FROM:<a@example.net>", "RCPT TO:<alice@example.org>")
MESSAGE = b"Subject: x\r\nMessage-ID: <1@example.net>\r\n\r\nhello\r\n"


def at_data(engine: Engine) -> Engine:
    assert engine.say(*OPENING, "DATA")[-1].startswith("354 ")
    return engine


def deliver(engine: Engine, content: bytes) -> str:
    """Send content and its end; the one line that comes back."""
    engine._unread = b""
    engine.send(content + b".\r\n")
    (line,) = engine._unread.decode().splitlines()
    return line


def test_envelope_and_report() -> None:
    engine = at_data(Engine(client=Client("192.0.2.1", "host.example")))
    assert deliver(engine, MESSAGE) == "250 2.0.0 Ok: queued as ID0001"
    (entry,) = engine.spool.committed
    assert entry.envelope == Envelope(
        id="ID0001",
        arrival=1_700_000_000.0,
        sender="a@example.net",
        recipients=(Recipient("alice@example.org"),),
        client="host.example[192.0.2.1]",
        helo="client.example.net",
        protocol="ESMTP",
    )
    assert entry.content.startswith(b"Received: from client.example.net (host.example [192.0.2.1])\r\n")
    assert entry.content.endswith(b"\r\n" + MESSAGE)
    assert engine.log.events == [f"accepted ID0001 size {len(MESSAGE)} nrcpt 1 id <1@example.net>"]


def test_message_id_for_the_log_is_printable() -> None:
    engine = at_data(Engine())
    deliver(engine, b"Message-ID: <a\x1b[2J\xff\tb>\r\n\r\n")
    assert engine.log.events[0].isprintable()


def test_commit_comes_before_250() -> None:
    engine = at_data(Engine())
    engine.send(MESSAGE + b".\r")
    assert engine.spool.committed == []
    engine.send(b"\n")
    assert len(engine.spool.committed) == 1


def test_waiting_and_in_content() -> None:
    engine = Engine()
    dialogue = engine.dialogue
    seen = []
    for line in (*OPENING, "DATA", "x", ".", "QUIT"):
        engine.say(line)
        seen.append((dialogue.waiting, dialogue.in_content, dialogue.closing))
    inside, content = (False, False, False), (False, True, False)
    assert seen == [(True, False, False), inside, inside, content, content, (True, False, False), (True, False, True)]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("cut", [whole, octets])
@pytest.mark.parametrize("before", [b"", b"X", b"X\r\n"])
@pytest.mark.parametrize("sequence", SEQUENCES, ids=repr)
def test_smuggling_sm1_to_sm25(sequence: bytes, before: bytes, cut: Cut, strict: bool) -> None:
    """The oracle is what is stored: never two messages, never the smuggler's sender, and all or nothing."""
    attack = b"MAIL FROM:<smuggled@a>\r\nRCPT TO:<bob@example.org>\r\nDATA\r\nS: x\r\n\r\nsmug\r\n.\r\n"
    engine = at_data(Engine(cut=cut, strict_order=strict))
    engine.send(before + sequence + attack)
    stored = engine.stored()
    if SEQUENCES[sequence]:
        # This is a true end of data, and what follows is a client's second transaction, not a smuggled one. It does not
        # wait for its 354, as one that was smuggled would not.
        senders = [message.sender for message in stored]
        if strict and cut is whole:
            assert senders in ([], ["a@example.net"])
            assert engine.dialogue.closing
        else:
            assert senders in (["smuggled@a"], ["a@example.net", "smuggled@a"])
        return
    assert len(stored) <= 1
    assert all(message.sender == "a@example.net" for message in stored)
    bare = any(octet in sequence.replace(b"\r\n", b"") for octet in (b"\r", b"\n"))
    assert (stored == []) == bare
    assert engine.say("NOOP") == ["250 2.0.0 Ok"], "the dialogue is in step"


def test_smuggling_after_too_big_sm26() -> None:
    """S-SM26: reading goes on to the true end."""
    for sequence, ends in SEQUENCES.items():
        if ends:
            continue
        engine = at_data(Engine(limits=Limits(message_size=Size(100))))
        answer = deliver(engine, b"x" * 200 + sequence + b"MAIL FROM:<smuggled@a>\r\n")
        assert answer.startswith("552 5.3.4 "), sequence
        assert engine.spool.committed == []
        assert engine.say("NOOP") == ["250 2.0.0 Ok"]


@pytest.mark.parametrize("cut", [whole, octets])
def test_message_size(cut: Cut) -> None:
    limits = Limits(message_size=Size(1000))
    assert deliver(at_data(Engine(limits=limits, cut=cut)), b"x" * 998 + b"\r\n").startswith("250 ")
    # What is measured is the content, not what transparency added to it.
    assert deliver(at_data(Engine(limits=limits, cut=cut)), b"." * 999 + b"\r\n").startswith("250 ")
    engine = at_data(Engine(limits=limits, cut=cut))
    assert deliver(engine, b"x" * 999 + b"\r\n").startswith("552 5.3.4 ")
    assert [entry.state for entry in engine.spool.entries] == ["discarded"]
    assert engine.log.events == ["discarded ID0001 552 5.3.4"]
    assert engine.dialogue.waiting


def test_too_big_costs_no_memory() -> None:
    engine = at_data(Engine(limits=Limits(message_size=Size(1000))))
    chunk = b"y" * 65536
    tracemalloc.start()
    for _ in range(160):
        engine.send(chunk)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * len(chunk)


LOOP = b"Received: x\r\n" * 51
BIG = b"\r\n" + b"x" * 2000 + b"\r\n"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (LOOP + b"\r\n", "554 5.4.6"),
        (b"Received: x\r\n" * 50 + b"\r\n", "250 2.0.0"),
        (LOOP + b"\n\r\n", "554 5.4.6"),
        (LOOP + BIG, "552 5.3.4"),
        (b"\n" + BIG, "552 5.3.4"),
        (b"a\nb\r\n", "550 5.5.2"),
    ],
)
@pytest.mark.parametrize("cut", [whole, octets])
def test_reasons_do_not_depend_on_cuts(content: bytes, code: str, cut: Cut) -> None:
    engine = at_data(Engine(limits=Limits(message_size=Size(1500)), cut=cut))
    assert deliver(engine, content).startswith(code)
    assert engine.spool.open_entries == []


FAILURES = [
    (errno.ENOSPC, "452 4.3.1"),
    (errno.EDQUOT, "452 4.3.1"),
    (errno.EIO, "451 4.3.0"),
    (errno.EACCES, "451 4.3.0"),
    (errno.EMFILE, "451 4.3.0"),
]


@pytest.mark.parametrize(("number", "code"), FAILURES)
@pytest.mark.parametrize("step", ["enter", "write 1"])
def test_a_spool_that_fails_at_once_refuses_data(step: str, number: int, code: str) -> None:
    engine = Engine()
    engine.spool.faults[step] = OSError(number, "fault")
    assert engine.say(*OPENING, "DATA")[-1].startswith(code)
    assert not engine.dialogue.in_content
    assert engine.spool.open_entries == []
    # The transaction is still there: the client may try again.
    engine.spool.faults.clear()
    assert engine.say("DATA")[-1].startswith("354 ")
    assert deliver(engine, MESSAGE).startswith("250 ")


@pytest.mark.parametrize(("number", "code"), FAILURES)
@pytest.mark.parametrize("step", ["write 2", "write 3", "commit"])
def test_a_spool_that_fails_later_is_never_a_250(step: str, number: int, code: str) -> None:
    engine = Engine()
    engine.spool.faults[step] = OSError(number, "fault")
    at_data(engine)
    for _ in range(5):
        engine.send(b"line\r\nRSET\r\n")
    assert deliver(engine, b"").startswith(code)
    assert [entry.state for entry in engine.spool.entries] == ["discarded"]
    engine.spool.faults.clear()
    assert engine.say("RSET", "MAIL FROM:<a@b>") == ["250 2.0.0 Ok", "250 2.1.0 Ok"]


def test_a_discard_that_fails_changes_nothing() -> None:
    engine = Engine(limits=Limits(message_size=Size(10)))
    engine.spool.faults["discard"] = OSError(errno.EIO, "fault")
    assert deliver(at_data(engine), b"x" * 20 + b"\r\n").startswith("552 ")
    assert engine.say("NOOP") == ["250 2.0.0 Ok"]


def test_lost_in_content_discards() -> None:
    engine = at_data(Engine())
    engine.send(b"half a mess")
    engine.dialogue.lost()
    engine.dialogue.lost()
    assert [entry.state for entry in engine.spool.entries] == ["discarded"]
    assert engine.log.events == ["lost connection after DATA"]
    assert engine.dialogue.closing


@pytest.mark.parametrize(
    ("lines", "where"), [((), "CONNECT"), (OPENING, "RCPT"), (("FOO",), "UNKNOWN"), (("NOOP",), "NOOP")]
)
def test_where_a_session_was_lost(lines: tuple[str, ...], where: str) -> None:
    engine = Engine()
    engine.say(*lines)
    engine.dialogue.lost()
    assert engine.log.events[-1] == f"lost connection after {where}"


def test_end_says_goodbye_once() -> None:
    engine = at_data(Engine())
    engine.send(b"x\r\n")
    assert engine.dialogue.end(reply(421, "4.4.2", "mx.example.org Error: timeout exceeded")) == (
        b"421 4.4.2 mx.example.org Error: timeout exceeded\r\n"
    )
    assert engine.dialogue.closing
    assert engine.spool.open_entries == []
    assert engine.log.events == ["timeout after DATA"]
    assert engine.dialogue.receive(b"\r\n.\r\n") == b""
    assert engine.spool.committed == []
    engine.dialogue.lost()
    assert engine.log.events == ["timeout after DATA"]


def test_quit_is_no_loss() -> None:
    engine = Engine()
    assert engine.say("QUIT", "NOOP") == ["221 2.0.0 Bye"]
    engine.dialogue.lost()
    assert engine.log.events == []


def test_what_is_reported_of_refusals() -> None:
    engine = Engine()
    engine.say("FOO bar", "EHLO", "EHLO c", "RCPT TO:<x@y>", "MAIL FROM:<a@b>")
    engine.say("RCPT TO: Nobody@Example.org", "RCPT TO:<x@y>", "RCPT TO:<x>", "DATA")
    engine.send(b"\0\r\n")
    assert engine.log.events == [
        "refused 'FOO bar' 502 5.5.1",
        "refused 'EHLO' 501 5.5.4",
        "refused 'RCPT TO:<x@y>' 503 5.5.1",
        "rejected Nobody@example.org 550 5.1.1 from a@b",
        "rejected x@y 550 5.7.1 from a@b",
        "rejected TO:<x> 501 5.1.3 from a@b",
        "refused 'DATA' 554 5.5.1",
        "refused '' 500 5.5.2",
    ]


def test_too_many_bad_messages_end_the_session() -> None:
    engine = Engine(limits=Limits(bad_commands=2))
    assert deliver(at_data(engine), b"a\nb\r\n").startswith("550 5.5.2")
    at_data(engine)
    assert deliver(engine, b"a\nb\r\n").startswith("421 4.7.0")
    assert engine.dialogue.closing


def test_a_message_makes_junk_forgotten() -> None:
    engine = Engine(limits=Limits(junk_commands=5, bad_commands_in_a_row=1))
    for _ in range(5):
        assert engine.say("NOOP", "RSET", "NOOP")[-1].startswith("250")
        assert deliver(at_data(engine), MESSAGE).startswith("250")


def test_endless_long_line_ends_the_session_s_pa1() -> None:
    engine = Engine()
    for _ in range(9):
        assert engine.say("x" * 3000)[-1].startswith("500 5.5.2")
    assert engine.say("x" * 3000)[-1].startswith("421 4.7.0")


def test_a_line_that_is_long_in_content_passes_s_pa2() -> None:
    engine = at_data(Engine())
    line = b"y" * 1_000_000 + b"\r\n"
    assert deliver(engine, line).startswith("250")
    assert engine.spool.committed[0].content.endswith(line)


fragments = st.sampled_from(
    [
        b"EHLO c\r\n",
        b"MAIL FROM:<a@b>\r\n",
        b"RCPT TO:<bob@example.org>\r\n",
        b"RCPT TO:<x@y>\r\n",
        b"DATA\r\n",
        b"RSET\r\n",
        b"BDAT 10\r\n",
        b"BDAT 0\r\n",
        b"BDAT 3 LAST\r\n",
        b"BDAT 0 LAST\r\n",
        b"BDAT 40 LAST\r\n",
        b"MAIL FROM:<a@b> BODY=BINARYMIME\r\n",
        b"AUTH LOGIN\r\n",
        b"AUTH PLAIN AGFsaWNlAG9wZW4gc2VzYW1l\r\n",
        b"AGFsaWNlAG9wZW4gc2VzYW1l\r\n",
        b"*\r\n",
        b"\r\n.\r\n",
        b".\r\n",
        b"\r\n",
        b"\n",
        b"\r",
        b".",
        b"text",
        b"\0",
        b"\xff",
        b"x" * 2100,
        b"Received: a\r\n" * 30,
    ]
)


@given(st.lists(fragments, max_size=40))
def test_any_stream_is_answered_alike_however_it_is_cut(parts: list[bytes]) -> None:
    """Invariant: transcript, messages and reports do not depend on cuts; every 250 to content has its message, and
    the other way round; no entry is left open."""
    stream = b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<bob@example.org>\r\n" + b"".join(parts)
    engines = [Engine(strict_order=False, tls="starttls", logins=MemoryLogins(), auth_without_tls=True) for _ in range(3)]
    engines[0].send(stream)
    for part in (b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<bob@example.org>\r\n", *parts):
        engines[1].send(part)
    engines[2].cut = octets
    engines[2].send(stream)
    for engine in engines:
        engine.dialogue.lost()
        assert engine.transcript == engines[0].transcript
        assert engine.stored() == engines[0].stored()
        assert engine.log.events == engines[0].log.events
        assert engine.transcript.count(b"queued as") == len(engine.spool.committed)
        assert engine.spool.open_entries == []


def test_what_is_under_way_is_given_up_also_when_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no memory for the line of the log: the queue file must not stay open, and locked, for ever."""
    engine = at_data(Engine())
    engine.send(b"Subject: x\r\n")

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(engine.log, "lost", fail)
    [entry] = engine.spool.entries
    with pytest.raises(MemoryError):
        engine.dialogue.lost()
    assert entry.state == "discarded"
