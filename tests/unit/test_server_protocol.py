"""The server's protocol engine: commands, refused lines, content, and commands again."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from mtad.smtp.grammar import Command
from mtad.smtp.server import (
    ChunkEnded,
    CommandReceived,
    ContentEnded,
    ContentReceived,
    Event,
    LineRefused,
    ResponseReceived,
    ResponseRefused,
    ServerProtocol,
)
from mtad.smtp.wire import LineFault


def drive(chunks: Iterable[bytes]) -> list[Event]:
    """All events, content in one piece, with content after every DATA."""
    protocol = ServerProtocol()
    events: list[Event] = []
    for chunk in chunks:
        protocol.receive(chunk)
        while (event := protocol.next_event()) is not None:
            if isinstance(event, ContentReceived):
                assert event.content
                if events and isinstance(events[-1], ContentReceived):
                    event = ContentReceived(events.pop().content + event.content)  # type: ignore[union-attr]
            events.append(event)
            if isinstance(event, CommandReceived) and event.command.verb == "DATA":
                protocol.start_content()
                assert protocol.in_content
            if isinstance(event, ContentEnded):
                assert not protocol.in_content
    return events


SESSION = (
    b"EHLO c\r\nNO\nOP\r\n\r\nDATA\r\nA: b\r\n..\r\n.\r\nDATA\r\n.\r\nDATA\r\na\nb\r\n.\r\n" + b"x" * 3000 + b"\r\nQUIT\r\n"
)
EVENTS: list[Event] = [
    CommandReceived(Command("EHLO", "c")),
    LineRefused("lines must end with CRLF"),
    LineRefused("expected a command"),
    CommandReceived(Command("DATA", "")),
    ContentReceived(b"A: b\r\n.\r\n"),
    ContentEnded(bare=False),
    CommandReceived(Command("DATA", "")),
    ContentEnded(bare=False),
    CommandReceived(Command("DATA", "")),
    ContentReceived(b"a\nb\r\n"),
    ContentEnded(bare=True),
    LineRefused("line too long"),
    CommandReceived(Command("QUIT", "")),
]


def test_a_session_whole() -> None:
    assert drive([SESSION]) == EVENTS


def test_a_session_octet_by_octet() -> None:
    assert drive(SESSION[i : i + 1] for i in range(len(SESSION))) == EVENTS


def test_a_session_cut_everywhere() -> None:
    for place in range(len(SESSION)):
        assert drive([SESSION[:place], SESSION[place:]]) == EVENTS, place


def test_content_waits_for_the_word() -> None:
    """Octets after DATA are commands until somebody says that they are content."""
    protocol = ServerProtocol()
    protocol.receive(b"DATA\r\nNOOP\r\n.\r\n")
    assert protocol.next_event() == CommandReceived(Command("DATA", ""))
    assert not protocol.in_content
    assert protocol.next_event() == CommandReceived(Command("NOOP", ""))
    protocol.start_content()
    assert protocol.next_event() == ContentEnded(bare=False)
    assert protocol.next_event() is None


def test_nothing_in_nothing_out() -> None:
    protocol = ServerProtocol()
    assert protocol.next_event() is None
    protocol.receive(b"")
    assert protocol.next_event() is None
    protocol.start_content()
    assert protocol.next_event() is None
    protocol.receive(b".")
    assert protocol.next_event() is None


def test_chunks_and_responses() -> None:
    protocol = ServerProtocol()
    protocol.receive(b"BDAT 5\r\n\r\n.\r\nAUTH X\r\n" + b"=" * 3000 + b"\r\nNO\nOP\r\nNOOP\r\nBDAT 0\r\n")
    assert protocol.next_event() == CommandReceived(Command("BDAT", "5"))
    assert protocol.ahead
    protocol.start_chunk(5, last=True)
    assert protocol.in_content
    assert protocol.next_event() == ContentReceived(b"\r\n.\r\n")
    assert protocol.in_content
    assert protocol.next_event() == ChunkEnded(last=True)
    assert not protocol.in_content
    assert protocol.next_event() == CommandReceived(Command("AUTH", "X"))
    protocol.expect_response()
    assert protocol.next_event() == ResponseReceived(b"=" * 3000)
    protocol.expect_response()
    assert protocol.next_event() == ResponseRefused(LineFault.BARE_NEWLINE)
    assert protocol.next_event() == CommandReceived(Command("NOOP", ""))
    assert protocol.next_event() == CommandReceived(Command("BDAT", "0"))
    assert not protocol.ahead
    protocol.start_chunk(0, last=False)
    assert protocol.next_event() == ChunkEnded(last=False)
    assert protocol.next_event() is None


def test_limits_of_a_response() -> None:
    """RFC 4954 section 4: 12288 octets with CRLF; the line after it is a command again, with a command's limit."""
    for length, event in ((12286, ResponseReceived(b"x" * 12286)), (12287, ResponseRefused(LineFault.TOO_LONG))):
        protocol = ServerProtocol()
        protocol.expect_response()
        protocol.receive(b"x" * length + b"\r\n" + b"y" * 2049 + b"\r\n")
        assert protocol.next_event() == event
        assert protocol.next_event() == LineRefused("line too long")


@given(st.lists(st.binary(max_size=20), max_size=6), st.integers(1, 9))
def test_chunks_do_not_depend_on_cuts(chunks: list[bytes], size: int) -> None:
    """Invariant: each chunk comes out as it went in, whatever it looks like and however it was cut."""
    stream = b"".join(b"BDAT %d\r\n%s" % (len(chunk), chunk) for chunk in chunks)
    protocol, got = ServerProtocol(), []
    for at in range(0, len(stream), size):
        protocol.receive(stream[at : at + size])
        while (event := protocol.next_event()) is not None:
            match event:
                case CommandReceived(command=command):
                    protocol.start_chunk(int(command.argument), last=False)
                    got.append(b"")
                case ContentReceived(content=content):
                    got[-1] += content
    assert got == chunks
    assert not protocol.in_content


pieces = st.lists(
    st.sampled_from([b"DATA\r\n", b"DATA", b"\r\n.\r\n", b"\r\n", b"\n", b"\r", b".", b"x" * 2048, b"NOOP\r\n", b"\xff"]),
    max_size=25,
)


@settings(deadline=None)  # single octets of many long lines: on a busy machine an example may take long
@given(pieces, st.randoms(use_true_random=False))
def test_events_do_not_depend_on_cuts(parts: list[bytes], random: object) -> None:
    """Invariant: the same events for the whole, for the pieces, and for single octets."""
    data = b"".join(parts)
    reference = drive([data])
    assert drive(parts) == reference
    assert drive(data[i : i + 1] for i in range(len(data))) == reference
