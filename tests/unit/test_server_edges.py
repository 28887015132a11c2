"""The server's engine at its borders: chunks of no octets, the longest response, and what waits for a reply."""

from __future__ import annotations

import pytest

from mtad.smtp.grammar import Command
from mtad.smtp.server import (
    RESPONSE_LIMIT,
    ChunkEnded,
    CommandReceived,
    ContentEnded,
    ContentReceived,
    LineRefused,
    ResponseReceived,
    ResponseRefused,
    ServerProtocol,
)
from mtad.smtp.wire import LINE_LIMIT, LineFault

NOOP = CommandReceived(Command("NOOP", ""))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_chunk_and_the_next(last: bool, size: int) -> None:
    protocol = ServerProtocol()
    assert not protocol.in_content
    for octets in (b"", b"NOOP\r\n", b"\r\n.\r\n"):
        protocol.start_chunk(len(octets), last)
        content = b""
        data = octets + b"NOOP\r\n"
        protocol.receive(data[:size])
        at = size
        while not isinstance(event := protocol.next_event(), ChunkEnded):
            assert protocol.in_content
            if isinstance(event, ContentReceived):
                assert event.content
                content += event.content
            else:
                assert event is None
                protocol.receive(data[at : at + size])
                at += size
        assert (content, event) == (octets, ChunkEnded(last))
        assert not protocol.in_content
        protocol.receive(data[at:])
        assert protocol.next_event() == NOOP
        assert protocol.next_event() is None


def test_an_empty_chunk_ends_without_an_octet() -> None:
    protocol = ServerProtocol()
    protocol.start_chunk(0, last=True)
    assert protocol.in_content
    assert protocol.next_event() == ChunkEnded(last=True)
    assert protocol.next_event() is None


def test_what_is_sent_ahead_waits() -> None:
    protocol = ServerProtocol()
    assert not protocol.ahead
    protocol.receive(b"NOOP\r\nNOOP\r\n")
    assert protocol.ahead
    assert protocol.next_event() == NOOP
    assert protocol.ahead
    assert protocol.next_event() == NOOP
    assert not protocol.ahead


def test_what_follows_the_content_in_one_piece_is_commands() -> None:
    protocol = ServerProtocol()
    protocol.start_content()
    assert protocol.in_content
    assert protocol.next_event() is None
    protocol.receive(b"a\r\n.\r\nNOOP\r\n")
    assert protocol.next_event() == ContentReceived(b"a\r\n")
    assert protocol.in_content
    assert protocol.ahead
    assert protocol.next_event() == ContentEnded(bare=False)
    assert not protocol.in_content
    assert protocol.next_event() == NOOP


def test_content_that_cannot_be_told_from_its_end_waits() -> None:
    protocol = ServerProtocol()
    protocol.start_content()
    protocol.receive(b".")
    assert protocol.next_event() is None
    protocol.receive(b"\r")
    assert protocol.next_event() is None
    protocol.receive(b"\n")
    assert protocol.next_event() == ContentEnded(bare=False)
    assert protocol.next_event() is None
    assert not protocol.in_content


def test_responses_may_be_longer_than_commands() -> None:
    protocol = ServerProtocol()
    long = b"x" * RESPONSE_LIMIT
    for response, event in (
        (b"x" * (LINE_LIMIT + 1), ResponseReceived(b"x" * (LINE_LIMIT + 1))),
        (long, ResponseReceived(long)),
        (long + b"x", ResponseRefused(LineFault.TOO_LONG)),
        (b"a\rb", ResponseRefused(LineFault.BARE_NEWLINE)),
        (b"", ResponseReceived(b"")),
        (b"NOOP", ResponseReceived(b"NOOP")),
    ):
        protocol.expect_response()
        protocol.receive(response + b"\r\n")
        assert protocol.next_event() == event
        protocol.receive(b"NOOP\r\n")
        assert protocol.next_event() == NOOP
        assert protocol.next_event() is None


def test_after_a_response_commands_have_their_own_limit_again() -> None:
    protocol = ServerProtocol()
    protocol.expect_response()
    protocol.receive(b"*\r\n" + b"x" * (LINE_LIMIT + 1) + b"\r\n")
    assert protocol.next_event() == ResponseReceived(b"*")
    assert protocol.next_event() == LineRefused("line too long")


def test_a_limit_of_responses_is_that_of_the_standard() -> None:
    # RFC 4954 section 4: 12288 octets with CRLF.
    assert 12288 - len(b"\r\n") == RESPONSE_LIMIT


@pytest.mark.parametrize("line", [b"N\xd6\xd6P", b"", b" NOOP", b"N\0OP"])
def test_a_line_that_is_no_command_is_refused_in_words(line: bytes) -> None:
    protocol = ServerProtocol()
    protocol.receive(line + b"\r\nNOOP\r\n")
    event = protocol.next_event()
    assert isinstance(event, LineRefused)
    assert event.why.isascii()
    assert event.why not in {"", "None"}
    assert protocol.next_event() == NOOP
