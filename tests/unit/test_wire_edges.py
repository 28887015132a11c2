"""Framing at its limits: the last octet that is allowed, the first that is not, and what stands behind the end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mtad.smtp.wire import LINE_LIMIT, MESSAGE_ID_LIMIT, HeaderScanner, LineBuffer, LineFault
from tests.unit.test_wire import BARE, LONG, lines_of

FILLER = b"X-Filler: " + b"f" * 900 + b"\r\n"


def scanned(pieces: Sequence[bytes]) -> HeaderScanner:
    scanner = HeaderScanner()
    for piece in pieces:
        scanner.feed(piece)
    return scanner


def octets(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def test_a_fault_behind_lines_in_the_same_buffer() -> None:
    before = b"y" * 2000
    assert lines_of([before + b"\r\n" + before + b"\r\n" + b"x" * (LINE_LIMIT + 50) + b"\r\nNOOP\r\n"]) == [
        before,
        before,
        LONG,
        b"NOOP",
    ]
    assert lines_of([before + b"\r\nA\nB\r\nC\nD\r\nNOOP\r\n"]) == [before, BARE, BARE, b"NOOP"]
    assert lines_of([before + b"\r\nA\rB\r\nNOOP\r\n"]) == [before, BARE, b"NOOP"]


@pytest.mark.parametrize(("octet", "fault"), [(LINE_LIMIT - 1, BARE), (LINE_LIMIT, BARE), (LINE_LIMIT + 1, LONG)])
@pytest.mark.parametrize("end", [b"\n", b"\rx"])
def test_the_fault_that_comes_first_is_told(octet: int, fault: LineFault, end: bytes) -> None:
    data = b"x" * octet + end + b"\r\nNOOP\r\n"
    assert lines_of([data]) == [fault, b"NOOP"]
    assert lines_of(octets(data)) == [fault, b"NOOP"]


@pytest.mark.parametrize("limit", [1, 20])
def test_another_limit(limit: int) -> None:
    buffer = LineBuffer()
    buffer.limit = limit
    buffer.feed(b"x" * limit + b"\r\n" + b"x" * (limit + 1) + b"\r\n\r\n")
    assert [buffer.next_line() for _ in range(4)] == [b"x" * limit, LONG, b"", None]


def test_skipping_ends_at_the_crlf_wherever_it_is_cut() -> None:
    for rest in (
        [b"\r", b"\n", b"NOOP\r\n"],
        [b"a\r", b"\nNOOP\r\n"],
        [b"\r", b"\r", b"\n", b"NOOP\r\n"],
        [b"\r\nNOOP\r\n"],
    ):
        assert lines_of([b"A\n", *rest]) == [BARE, b"NOOP"], rest
    assert lines_of([b"A\n", b"\r", b"a\n", b"NOOP\r\n"]) == [BARE]


def test_take_gives_no_more_than_is_asked_for() -> None:
    buffer = LineBuffer()
    assert not buffer.waiting
    assert buffer.take(5) == b""
    buffer.feed(b"BDAT 5\r\nabcdefg\r\n")
    assert buffer.waiting
    assert buffer.next_line() == b"BDAT 5"
    assert [buffer.take(2), buffer.take(3)] == [b"ab", b"cde"]
    assert buffer.next_line() == b"fg"
    assert not buffer.waiting
    buffer.feed(b"hijk")
    assert [buffer.take(0), buffer.take(3), buffer.take(9), buffer.take(9)] == [b"", b"hij", b"k", b""]
    buffer.feed(b"NOOP\r\nNOOP\r\n")
    assert [buffer.next_line(), buffer.take(6), buffer.next_line()] == [b"NOOP", b"NOOP\r\n", None]


@pytest.mark.parametrize("before", [b"", FILLER, FILLER * 3], ids=["first", "second", "later"])
@pytest.mark.parametrize("name", [b"Message-ID:", b"message-id: ", b"MESSAGE-ID:\t"])
def test_the_longest_message_id(before: bytes, name: bytes) -> None:
    # The limit counts the line ends on both sides.
    longest = b"<" + b"i" * (MESSAGE_ID_LIMIT - len(name) - 6) + b">"
    for value, expected in ((longest, longest), (b"<" + longest, b"")):
        header = before + name + value + b"\r\nSubject: x\r\n\r\n"
        for pieces in ([header], octets(header)):
            assert scanned(pieces).message_id == expected


def test_a_message_id_that_is_too_long_is_none_and_the_next_is_not_taken() -> None:
    header = b"Message-ID: <" + b"i" * 5000 + b">\r\nMessage-ID: <second@x>\r\n\r\n"
    for pieces in ([header], octets(header)):
        assert scanned(pieces).message_id == b""


def test_blanks_around_a_message_id() -> None:
    for field in (
        b"Message-ID: \t <a@b>\r\n",
        b"Message-ID:<a@b> \t \r\n",
        b"Message-ID: \r\n <a@b>\r\n",
        b"Message-ID:\r\n\t<a@b>\t\r\n",
    ):
        for pieces in ([b"A: b\r\n" + field + b"\r\n"], octets(field + b"\r\n")):
            assert scanned(pieces).message_id == b"<a@b>", field
    assert scanned([b"Message-ID: <XaX>\r\n\r\n"]).message_id == b"<XaX>"
    assert scanned([b"Message-ID: X\r\n\r\n"]).message_id == b"X"


def test_what_looks_like_a_field_in_the_body_is_none() -> None:
    message = b"Received: a\r\nSubject: x\r\n\r\nReceived: b\r\nMessage-ID: <body@x>\r\n\r\nReceived: c\r\n\r\n"
    for pieces in ([message], octets(message), [message[:25], message[25:]], [message[:27], message[27:]]):
        scanner = scanned(pieces)
        assert (scanner.received, scanner.message_id, scanner.done) == (1, b"", True)


def test_a_message_id_that_the_end_of_the_header_cuts_off_is_none() -> None:
    message = b"Message-ID:\r\n\r\n <body@x>\r\n"
    for pieces in ([message], octets(message)):
        assert scanned(pieces).message_id == b""


def test_received_fields_are_counted_once_each() -> None:
    header = b"Received: a\r\n" * 7 + b"X-Received: b\r\nrEcEiVeD: c\r\nReceived : d\r\n"
    for size in range(1, 40):
        pieces = [header[at : at + size] for at in range(0, len(header), size)]
        scanner = scanned(pieces)
        assert (scanner.received, scanner.done) == (8, False), size
        scanner.feed(b"\r\n")
        assert scanner.done, size
