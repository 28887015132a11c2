"""The format of a queue file at its borders, and what is said about damage: an administrator reads it in the log."""

from __future__ import annotations

import zlib

import pytest

from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.progress import Doubt
from mtad.spool.queue_file import (
    MAX_ENVELOPE,
    PREAMBLE_SIZE,
    UNFINISHED,
    Head,
    encode_envelope,
    encode_event,
    encode_preamble,
    encode_wakeup,
    parse_events,
    parse_head,
    parse_preamble,
    parse_wakeup,
    was_cut,
)
from tests.unit.spool_aid import EVENTS, envelope

ENCODED = encode_envelope(envelope())
PREAMBLE = encode_preamble(ENCODED, 5, 77)
EVENT = encode_event(EVENTS[0])


def record(encoded: bytes, size: int | None = None, crc: int | None = None) -> bytes:
    """A record, by default with the right length and checksum."""
    length = len(encoded) if size is None else size
    return b"\n%08x %08x %b\n" % (length, zlib.crc32(encoded) if crc is None else crc, encoded)


def test_the_first_line_says_where_things_are() -> None:
    assert (
        b"mtad-queue 1 %08x 000000000005 %08x 0000004d %b\n"
        % (
            len(ENCODED),
            zlib.crc32(ENCODED),
            b"%08x" % zlib.crc32(PREAMBLE[:-9]),
        )
        == PREAMBLE
    )
    assert parse_preamble(PREAMBLE + b"rest") == (len(ENCODED), 5, zlib.crc32(ENCODED), 77)
    head = parse_head(PREAMBLE + ENCODED + b"\n")
    assert head == Head(envelope(), PREAMBLE_SIZE + len(ENCODED) + 1, 5, 77)
    assert head.events_offset == PREAMBLE_SIZE + len(ENCODED) + 6


@pytest.mark.parametrize("size", [MAX_ENVELOPE, MAX_ENVELOPE + 1])
def test_the_largest_envelope_that_is_believed(size: int) -> None:
    line = b"mtad-queue 1 %08x 000000000000 00000000 00000000 " % size
    line += b"%08x\n" % zlib.crc32(line)
    if size > MAX_ENVELOPE:
        with pytest.raises(QueueFileDamaged, match=rf"^the envelope claims {size} octets$"):
            parse_preamble(line)
    else:
        assert parse_preamble(line)[0] == size


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"x" * PREAMBLE_SIZE, "the first line is not that of a queue file"),
        (PREAMBLE[:-2] + b"g\n", "the first line is not that of a queue file"),
        (PREAMBLE.replace(b" 000000000005 ", b" 000000000006 "), "the checksum of the first line is wrong"),
        (PREAMBLE + ENCODED + b" ", "the checksum of the envelope is wrong"),
        (PREAMBLE + ENCODED, "the checksum of the envelope is wrong"),
        (PREAMBLE + ENCODED[:-1] + b" \n", "the checksum of the envelope is wrong"),
    ],
)
def test_damage_of_the_head_is_told(data: bytes, told: str) -> None:
    with pytest.raises(QueueFileDamaged) as caught:
        parse_head(data)
    assert str(caught.value) == told


@pytest.mark.parametrize("data", [b"", b"mtad", UNFINISHED[:-1], UNFINISHED, UNFINISHED + ENCODED])
def test_an_unfinished_file_is_told(data: bytes) -> None:
    with pytest.raises(QueueFileUnfinished, match=r"^never finished by its receiver$"):
        parse_head(data)


def test_an_envelope_that_does_not_decode_is_told_in_few_words() -> None:
    encoded = b'{"kind":"' + b"q" * 1000 + b'"}'
    with pytest.raises(QueueFileDamaged) as caught:
        parse_head(encode_preamble(encoded, 0, 0) + encoded + b"\n")
    words = str(caught.value)
    head = "the envelope does not decode: "
    assert words.startswith(head)
    assert len(head) < len(words) <= len(head) + 200
    assert caught.value.__cause__ is not None


def test_a_wakeup_is_the_head_on_one_line() -> None:
    line = encode_wakeup(PREAMBLE, ENCODED)
    assert line == PREAMBLE[:-1] + b" " + ENCODED + b"\n"
    head = parse_head(PREAMBLE + ENCODED + b"\n")
    assert parse_wakeup(line) == head
    assert parse_wakeup(line[:-1]) == head


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\nno record\n", "what follows the content is no record"),
        (b"\n0000000g\n", "what follows the content is no record"),
        (b"\n000000000\n", "what follows the content is no record"),
        (record(b"{}", crc=0), "the checksum of a record is wrong"),
        (record(b"{}", size=1), "the checksum of a record is wrong"),
        (record(b"{}", size=3), "the checksum of a record is wrong"),
        (record(b'{"type":"reported","at":1,"recipients":[2],"report":"x"}'), None),
        (b"\n%08x \0%b" % (5, b"x"), "NUL octets stand in a record"),
    ],
)
def test_damage_of_the_history_is_told(data: bytes, told: str | None) -> None:
    with pytest.raises(QueueFileDamaged) as caught:
        parse_events(EVENT + data, 2)
    assert told is None or str(caught.value) == told


def test_recipients_of_a_record_are_those_of_the_envelope() -> None:
    # The highest index that each names.
    for event, last in ((EVENTS[0], 1), (EVENTS[1], 1), (EVENTS[3], 1), (Doubt(1.0, (0,), "x"), 0)):
        assert parse_events(encode_event(event), last + 1) == [event]
        with pytest.raises(QueueFileDamaged, match=r"^a record names a recipient that is not in the envelope$"):
            parse_events(encode_event(event), last)


def test_a_record_that_does_not_decode_is_told_in_few_words() -> None:
    with pytest.raises(QueueFileDamaged) as caught:
        parse_events(record(b'{"type":"' + b"q" * 1000 + b'"}'), 2)
    head = "a record does not decode: "
    assert str(caught.value).startswith(head)
    assert len(head) < len(str(caught.value)) <= len(head) + 200


@pytest.mark.parametrize(
    "torn", [b"\n0", b"\n0000001", b"\n00000010", b"\n00000010 ", b"\n00000010 00000000", b"\n00000010 00000000 {"]
)
def test_a_torn_record_is_passed_over(torn: bytes) -> None:
    assert parse_events(EVENT + torn, 2) == [EVENTS[0]]
    assert parse_events(torn + EVENT, 2) == [EVENTS[0]]
    assert parse_events(EVENT + torn + EVENT, 2) == [EVENTS[0], EVENTS[0]]


def test_nuls_are_those_of_a_power_cut_up_to_the_end_of_a_sector_only() -> None:
    torn = b"\n00000010 00000000 {"
    for offset in (0, 100, 511):
        gap = 512 - (offset + len(EVENT) + len(torn)) % 512
        whole = EVENT + torn + b"\0" * gap
        assert parse_events(whole + b"x" + EVENT, 2, offset) == [EVENTS[0], EVENTS[0]]
        assert parse_events(whole[:-1], 2, offset) == [EVENTS[0]]
        assert parse_events(whole[:-1] + EVENT, 2, offset) == [EVENTS[0], EVENTS[0]]
        with pytest.raises(QueueFileDamaged, match=r"^NUL octets stand in a record$"):
            parse_events(whole[:-1] + b"x" + EVENT, 2, offset)


def test_a_cut_is_one_until_something_is_written_behind_it() -> None:
    assert not was_cut(b"")
    assert not was_cut(EVENT)
    assert was_cut(EVENT + b"\0\0")
    assert was_cut(EVENT + b"\n0000\0\0\n")
    assert was_cut(b"\0")
    assert not was_cut(EVENT + b"\n0000\0\0" + EVENT)
    assert was_cut(b"\n0000\0\0" + EVENT + b"\0")
