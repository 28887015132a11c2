"""BDAT: chunks of known length, taken or refused, and always read to their end (RFC 3030)."""

from __future__ import annotations

import errno
import tracemalloc
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.config import Limits, Size
from tests.dialogue_engine import Engine, octets, whole

Cut = Callable[[bytes], Iterable[bytes]]
OPENING = ("EHLO client.example.net", "MAIL FROM:<a@example.net>", "RCPT TO:<alice@example.org>")
every_cut = pytest.mark.parametrize("cut", [whole, octets])


def begun(*, parameters: str = "", **settings: object) -> Engine:
    """A client with a sender and a recipient, at its first chunk."""
    engine = Engine(**settings)  # type: ignore[arg-type]
    mail = f"{OPENING[1]}{parameters}"
    cut, engine.cut = engine.cut, whole
    assert engine.say(OPENING[0], mail, OPENING[2])[-1] == "250 2.1.5 Ok"
    engine.cut = cut
    return engine


def bdat(*chunks: bytes, last: bool = True) -> bytes:
    """Chunks as they go over the wire."""
    return b"".join(
        b"BDAT %d%s\r\n%s" % (len(chunk), b" LAST" if last and number == len(chunks) - 1 else b"", chunk)
        for number, chunk in enumerate(chunks)
    )


def answers(engine: Engine, sent: bytes) -> list[str]:
    engine._unread = b""
    engine.send(sent)
    return [line[:9] for line in engine._unread.decode().splitlines()]


def content(engine: Engine) -> bytes:
    """What is stored of one message, without our own field."""
    (entry,) = engine.spool.committed
    return entry.content.partition(b"; ")[2].partition(b"\r\n")[2]


MESSAGE = b"Subject: x\r\n\r\n.\r\nMAIL FROM:<smuggled@a>\r\n..\r\n.\r\n"


@every_cut
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_message_in_chunks_sm40(size: int, cut: Cut) -> None:
    """A dot has no meaning in a chunk, and a CRLF may be cut in two."""
    engine = begun(cut=cut)
    chunks = [MESSAGE[at : at + size] for at in range(0, len(MESSAGE), size)]
    assert answers(engine, bdat(*chunks)) == ["250 2.0.0"] * len(chunks)
    assert content(engine) == MESSAGE
    assert engine.dialogue.session.transaction is None
    assert engine.log.events == [f"accepted ID0001 size {len(MESSAGE)} nrcpt 1 id "]


def test_what_is_said() -> None:
    engine = begun()
    engine._unread = b""
    engine.send(b"BDAT 12\r\nSubject: x\r\n" + b"BDAT 0 LAST\r\n")
    assert engine._unread == b"250 2.0.0 Ok: 12 octets received\r\n250 2.0.0 Ok: queued as ID0001\r\n"
    assert engine.dialogue.session.commands["BDAT"] == (2, 2)
    assert answers(engine, b"MAIL FROM:<b@example.net>\r\n") == ["250 2.1.0"]


@pytest.mark.parametrize(("sent", "stored"), [(b"BDAT 0 LAST\r\n", b""), (b"BDAT 0\r\nBDAT 0\r\nBDAT 0 LAST\r\n", b"")])
def test_empty_chunks_s_pa12(sent: bytes, stored: bytes) -> None:
    engine = begun()
    assert set(answers(engine, sent)) == {"250 2.0.0"}
    assert content(engine) == stored


def test_a_last_line_without_its_end() -> None:
    """The house counts on whole lines; binary content is left alone."""
    engine = begun()
    answers(engine, bdat(b"Subject: x\r\n\r\nno end"))
    assert content(engine) == b"Subject: x\r\n\r\nno end\r\n"
    engine = begun(parameters=" BODY=BINARYMIME")
    answers(engine, bdat(b"Subject: x\r\n\r\nno end"))
    assert content(engine) == b"Subject: x\r\n\r\nno end"


@every_cut
@pytest.mark.parametrize("text", [b"a\nb\r\n", b"a\rb\r\n", b"\n", b"\r", b"a\r", b"\n.\n", b"a\r\r\n", b"\r\n\n"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_bare_line_ends_in_text_are_refused(text: bytes, size: int, cut: Cut) -> None:
    engine = begun(cut=cut)
    chunks = [text[at : at + size] for at in range(0, len(text), size)]
    assert answers(engine, bdat(*chunks)) == ["250 2.0.0"] * (len(chunks) - 1) + ["550 5.5.2"]
    assert engine.spool.committed == []
    assert engine.spool.open_entries == []
    assert engine.say("NOOP") == ["250 2.0.0 Ok"]


@every_cut
def test_binary_content_is_kept_as_it_is(cut: Cut) -> None:
    binary = bytes(range(256)) * 3 + b"\r\n.\r\n\n.\n\r.\r\0"
    engine = begun(cut=cut, parameters=" BODY=BINARYMIME")
    assert answers(engine, bdat(binary[:5], binary[5:])) == ["250 2.0.0"] * 2
    assert content(engine) == binary
    assert engine.spool.committed[0].envelope.body == "binarymime"


def test_eight_bit_text_is_marked() -> None:
    engine = begun(parameters=" BODY=8BITMIME")
    answers(engine, bdat(b"\xff\r\n"))
    assert engine.spool.committed[0].envelope.body == "8bitmime"


@every_cut
@pytest.mark.parametrize(
    ("before", "code"),
    [
        ((), "503 5.5.1"),
        (OPENING[:1], "503 5.5.1"),
        (OPENING[:2], "503 5.5.1"),
        ((*OPENING[:2], "RCPT TO:<nobody@example.org>"), "554 5.5.1"),
    ],
)
def test_a_chunk_out_of_order_is_swallowed_s_pa12(before: tuple[str, ...], code: str, cut: Cut) -> None:
    """Not an octet of it is a command, whatever it looks like."""
    for last in (False, True):
        engine = Engine()
        engine.say(*before)
        engine.cut = cut
        payload = b"RSET\r\nMAIL FROM:<smuggled@a>\r\n.\r\nBDAT 3\r\nQUIT\r\n"
        assert answers(engine, bdat(payload, last=last) + b"NOOP\r\n") == [code, "250 2.0.0"]
        assert engine.spool.entries == []
        assert not engine.dialogue.in_content


@every_cut
def test_too_big_s_pa12(cut: Cut) -> None:
    """The chunk that goes over the limit is swallowed and refused, and so are those that were sent behind it."""
    engine = begun(cut=cut, limits=Limits(message_size=Size(1000)))
    chunk = b"x" * 398 + b"\r\n"
    assert answers(engine, bdat(chunk, chunk, chunk, chunk)) == ["250 2.0.0"] * 2 + ["552 5.3.4"] * 2
    assert [entry.state for entry in engine.spool.entries] == ["discarded"]
    assert engine.log.events == ["discarded ID0001 552 5.3.4"]
    assert engine.dialogue.session.transaction is None, "LAST ends the transaction"
    assert answers(engine, b"MAIL FROM:<b@example.net>\r\n") == ["250 2.1.0"]


def test_one_chunk_that_is_too_big_costs_no_memory() -> None:
    engine = begun(limits=Limits(message_size=Size(1000)))
    engine.send(b"BDAT 10000000 LAST\r\n")
    piece = b"y" * 50_000
    tracemalloc.start()
    for _ in range(200):
        assert engine.dialogue.in_content
        engine.send(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * len(piece)
    assert engine.line()
    assert engine._unread.endswith(b"552 5.3.4 Error: message size exceeds fixed limit\r\n")


def test_what_is_not_allowed_between_chunks() -> None:
    engine = begun()
    assert answers(engine, bdat(b"a\r\n", last=False)) == ["250 2.0.0"]
    for line in ("DATA", "MAIL FROM:<b@c>", "RCPT TO:<bob@example.org>"):
        assert engine.say(line) == ["503 5.5.1 Error: the message has begun with BDAT"]
    assert engine.say("NOOP") == ["250 2.0.0 Ok"]
    assert answers(engine, bdat(b"b\r\n")) == ["250 2.0.0"]
    assert content(engine) == b"a\r\nb\r\n"


@pytest.mark.parametrize("line", ["RSET", "EHLO c", "HELO c", "QUIT"])
def test_what_gives_the_message_up_s_pa12(line: str) -> None:
    engine = begun()
    answers(engine, bdat(b"a\r\n", last=False))
    engine.say(line)
    assert [entry.state for entry in engine.spool.entries] == ["discarded"]
    if line != "QUIT":
        assert engine.say("DATA")[0].startswith("503 5.5.1")
        assert answers(engine, bdat(b"b\r\n")) == ["503 5.5.1"]
    assert engine.spool.committed == []


def test_the_client_goes_away_in_a_chunk_s_pa12() -> None:
    engine = begun()
    engine.send(b"BDAT 100 LAST\r\nhalf of it\r\n")
    assert engine.dialogue.in_content
    assert not engine.dialogue.waiting
    engine.dialogue.lost()
    assert [entry.state for entry in engine.spool.entries] == ["discarded"]
    assert engine.log.events == ["lost connection after BDAT"]


def test_a_chunk_within_a_chunk_s_pa12() -> None:
    """CVE-2017-16943 in Exim: a second BDAT in the payload of the first."""
    engine = begun()
    assert answers(engine, b"BDAT 11\r\nBDAT 1000\r\nNOOP\r\n") == ["250 2.0.0"] * 2
    assert answers(engine, b"BDAT 10\r\nBDAT 1000\r\nNOOP\r\nNOOP\r\n") == ["250 2.0.0", "500 5.5.2", "250 2.0.0"]


def test_no_end_in_sight_s_pa12() -> None:
    """CVE-2017-16944 in Exim: a dot in a chunk that never ends."""
    engine = begun()
    engine.send(b"BDAT 2000000000\r\n.\r\n")
    for _ in range(100):
        assert engine.dialogue.receive(b".\r\n") == b""
    assert engine.dialogue.in_content


@pytest.mark.parametrize(
    "argument", [b"xx", b"-1 LAST", b"1a", b"18446744073709551616", b"4294967297", b"10 LAST LAST", b""]
)
def test_after_a_malformed_bdat_nothing_is_a_command_s_pa12(argument: bytes) -> None:
    engine = begun()
    (answer,) = answers(engine, b"BDAT " + argument + b"\r\nRSET\r\nMAIL FROM:<smuggled@a>\r\nQUIT\r\n")
    assert answer in {"501 5.5.4", "552 5.3.4"}
    assert engine.dialogue.closing
    assert engine.spool.open_entries == []


FAILURES = [(errno.ENOSPC, "452 4.3.1"), (errno.EIO, "451 4.3.0")]


@pytest.mark.parametrize(("number", "code"), FAILURES)
@pytest.mark.parametrize("step", ["enter", "write 1", "write 2"])
def test_a_spool_that_fails(step: str, number: int, code: str) -> None:
    engine = begun()
    engine.spool.faults[step] = OSError(number, "fault")
    assert answers(engine, bdat(b"a\r\n", b"b\r\n", b"c\r\n")) == [code] * 3
    assert engine.spool.committed == []
    assert engine.spool.open_entries == []
    engine.spool.faults.clear()
    assert engine.say("MAIL FROM:<b@c>") == ["250 2.1.0 Ok"]


@pytest.mark.parametrize(("number", "code"), FAILURES)
def test_a_commit_that_fails(number: int, code: str) -> None:
    engine = begun()
    engine.spool.faults["commit"] = OSError(number, "fault")
    assert answers(engine, bdat(b"a\r\n", b"b\r\n")) == ["250 2.0.0", code]
    assert [entry.state for entry in engine.spool.entries] == ["discarded"]


def test_a_loop_is_seen_at_its_chunk() -> None:
    engine = begun()
    assert answers(engine, bdat(b"Received: x\r\n" * 51, b"\r\n")) == ["554 5.4.6"] * 2
    assert engine.spool.open_entries == []


def test_empty_chunks_lead_nowhere_s_pa10() -> None:
    """EHLO was the first that led nowhere."""
    engine = begun(limits=Limits(junk_commands=5, bad_commands_in_a_row=3))
    assert answers(engine, b"BDAT 0\r\n" * 8) == ["250 2.0.0"] * 6 + ["421 4.7.0"]
    assert engine.spool.open_entries == []


def test_chunks_that_are_refused_are_bad_commands() -> None:
    engine = Engine(limits=Limits(bad_commands_in_a_row=3))
    assert answers(engine, bdat(b"a", last=False) * 5) == ["503 5.5.1"] * 2 + ["421 4.7.0"]
    assert engine.dialogue.closing


def test_data_in_the_same_session() -> None:
    engine = begun()
    answers(engine, bdat(b"a\r\n"))
    engine.say(*OPENING[1:], "DATA", "b", ".")
    assert len(engine.spool.committed) == 2


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=8), st.booleans())
def test_any_content_in_any_chunks(chunks: list[bytes], binary: bool) -> None:
    """Invariant: binary content is kept to the octet; text is kept, with a line end at its end, or refused for a bare
    one; neither depends on how chunks or segments were cut."""
    whole_content = b"".join(chunks)
    bare = whole_content.replace(b"\r\n", b"")
    refused = not binary and (b"\r" in bare or b"\n" in bare)
    for cut in (whole, octets):
        engine = begun(cut=cut, parameters=" BODY=BINARYMIME" if binary else "")
        assert answers(engine, bdat(*chunks) + b"NOOP\r\n")[-2:] == ["550 5.5.2" if refused else "250 2.0.0", "250 2.0.0"]
        if refused:
            assert engine.spool.committed == []
        else:
            line_end = b"" if binary or not whole_content or whole_content.endswith(b"\r\n") else b"\r\n"
            assert content(engine) == whole_content + line_end
