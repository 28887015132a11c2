"""The format of a queue file: what is written is read, what is damaged is never taken for another message."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtad.envelope import Envelope, Recipient
from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.outcome import Attempt, Deferred, Delivered, Failed
from mtad.progress import Doubt, Event, Reported
from mtad.spool import queue_file
from mtad.spool.message import OpenMessage, read_message
from tests.unit.spool_aid import CONTENT, EVENTS, envelope, store

GOLDEN: Final = Path(__file__).parents[1] / "golden"
NAMES: Final = sorted(path.relative_to(GOLDEN).with_suffix("").as_posix() for path in GOLDEN.glob("v*/*.queue"))

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_seconds = st.floats(min_value=0, max_value=1e11)
_outcomes = st.one_of(
    st.builds(Delivered, _text, _text, _text, _text),
    st.builds(Deferred, _text, _text, _text, _text, st.booleans()),
    st.builds(Failed, _text, _text, _text, _text),
)
_index = st.integers(0, 4)
_indexes = st.lists(_index, max_size=5).map(tuple)
_events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Attempt, _seconds, st.lists(st.tuples(_index, _outcomes), max_size=3).map(tuple), _text, _text, _text),
    st.builds(Doubt, _seconds, _indexes, _text),
    st.builds(Reported, _seconds, _indexes, _text),
)
_envelopes = st.builds(
    Envelope,
    id=_text,
    arrival=_seconds,
    sender=_text,
    recipients=st.lists(st.builds(Recipient, _text), max_size=5).map(tuple),
    client=_text,
    helo=_text,
    protocol=_text,
    kind=st.sampled_from(["mail", "bounce", "double-bounce"]),
)


def _encode(message: Envelope, size: int = 0, crc: int = 0) -> bytes:
    head = queue_file.encode_envelope(message)
    return queue_file.encode_preamble(head, size, crc) + head + b"\n"


def _plain(value: object) -> Any:
    return json.loads(msgspec.json.encode(value))


class InMemory:
    """A queue file without a disk, to be read thousands of times."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.fd = os.memfd_create("queue file")
        os.write(self.fd, data)

    def read(self) -> tuple[Envelope, bytes, tuple[Event, ...]]:
        """All that is in it, as a delivery reads it."""
        message, first = read_message(self.fd)
        return message.envelope, b"".join(OpenMessage(self.fd, message, first).chunks()), message.events


@pytest.fixture
def small(tmp_path: Path) -> Iterator[InMemory]:
    """A small file with four events."""
    memory = InMemory(store(tmp_path, envelope(), events=EVENTS).read_bytes())
    yield memory
    os.close(memory.fd)


@given(_envelopes, st.integers(0, 2**40), st.integers(0, 2**32 - 1))
def test_a_head_is_read_as_it_was_written(message: Envelope, size: int, crc: int) -> None:
    data = _encode(message, size, crc)
    head = queue_file.parse_head(data + b"content that happens to be there")
    assert (head.envelope, head.content_size, head.content_crc) == (message, size, crc)
    assert head.content_offset == len(data)
    assert head.events_offset == len(data) + size


@given(_envelopes, st.integers(0, 2**40), st.integers(0, 2**32 - 1))
def test_a_wakeup_carries_the_whole_head_on_one_line(message: Envelope, size: int, crc: int) -> None:
    encoded = queue_file.encode_envelope(message)
    preamble = queue_file.encode_preamble(encoded, size, crc)
    line = queue_file.encode_wakeup(preamble, encoded)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    expected = queue_file.parse_head(preamble + encoded + b"\n")
    assert queue_file.parse_wakeup(line) == queue_file.parse_wakeup(line[:-1]) == expected


@given(st.binary(max_size=300))
def test_a_wakeup_that_is_none_is_refused(line: bytes) -> None:
    with pytest.raises((QueueFileDamaged, QueueFileUnfinished)):
        queue_file.parse_wakeup(line)


@given(st.lists(_events, max_size=8))
def test_promise_4_the_history_is_read_as_it_was_written(events: list[Event]) -> None:
    assert queue_file.parse_events(b"".join(map(queue_file.encode_event, events)), 5) == events


@given(st.lists(_events, min_size=2, max_size=4), st.data())
def test_a_torn_event_spoils_neither_the_one_before_nor_the_one_after(events: list[Event], data: st.DataObject) -> None:
    *before, torn, after = events
    encoded = queue_file.encode_event(torn)
    # Without its last octet, the line feed, an event is whole.
    cut = data.draw(st.integers(0, len(encoded) - 2))
    crashed = b"".join(map(queue_file.encode_event, before)) + encoded[:cut]
    assert queue_file.parse_events(crashed, 5) == before
    assert queue_file.parse_events(crashed + queue_file.encode_event(after), 5) == [*before, after]


@given(st.lists(_events, min_size=2, max_size=4), st.data())
def test_nuls_that_a_power_cut_left_spoil_no_other_event(events: list[Event], data: st.DataObject) -> None:
    # The file has its new length, but what was appended last was never flushed: it reads as NUL, from any octet on, to its
    # end or, where the disk wrote what came later, to the end of a sector.
    *before, torn, after = events
    start = b"".join(map(queue_file.encode_event, before))
    encoded = queue_file.encode_event(torn)
    cut = data.draw(st.integers(0, len(encoded) - 2))
    end = data.draw(st.one_of(st.just(len(encoded)), st.integers(cut + 1, len(encoded))))
    crashed = start + encoded[:cut] + bytes(end - cut) + encoded[end:]
    offset = -len(start + encoded[:end]) % 512
    assert queue_file.parse_events(crashed, 5, offset) == before
    assert queue_file.parse_events(crashed + queue_file.encode_event(after), 5, offset) == [*before, after]
    assert queue_file.parse_events(start + bytes(9), 5, 77) == before


def test_a_nul_elsewhere_is_damage() -> None:
    data = bytearray(queue_file.encode_event(EVENTS[0]))
    data[30] = 0
    with pytest.raises(QueueFileDamaged, match="NUL"):
        queue_file.parse_events(bytes(data), 2, 1)


@given(st.binary(max_size=400))
@settings(max_examples=300)
def test_octets_that_are_no_queue_file_are_refused(data: bytes) -> None:
    for start in (b"", queue_file.MAGIC):
        with pytest.raises((QueueFileDamaged, QueueFileUnfinished)):
            queue_file.parse_head(start + data)


def test_promise_6_a_flipped_bit_never_makes_another_message(small: InMemory) -> None:
    # Invariant: a single flipped bit is read the same, or refused. No event may vanish: its recipients would be sent
    # the message again.
    expected = small.read()
    wrong = []
    for place, octet in enumerate(small.data):
        for bit in range(8):
            os.pwrite(small.fd, bytes([octet ^ 1 << bit]), place)
            try:
                if small.read() != expected:
                    wrong.append((place, bit))
            except (QueueFileDamaged, QueueFileUnfinished):
                pass
        os.pwrite(small.fd, bytes([octet]), place)
    assert wrong == []
    assert small.read() == expected


def test_promise_6_a_truncated_file_loses_at_most_the_torn_event(small: InMemory) -> None:
    message, content, events = small.read()
    ends = [small.data.index(content) + len(content)]
    for event in events:
        ends.append(ends[-1] + len(queue_file.encode_event(event)))
    for size in reversed(range(len(small.data))):
        os.ftruncate(small.fd, size)
        whole = sum(end - 1 <= size for end in ends[1:])  # the last octet of an event is a line feed, and can be missed
        if size >= ends[0]:
            assert small.read() == (message, content, events[:whole])
        else:
            with pytest.raises((QueueFileDamaged, QueueFileUnfinished)):
                small.read()


def test_promise_6_zeroes_where_data_should_be_are_never_read_as_a_message(small: InMemory) -> None:
    # What some file systems show after a power cut: the length is right, blocks are not.
    expected = small.read()
    size = len(small.data)
    for start in range(0, size - 16, 7):
        os.pwrite(small.fd, small.data, 0)
        os.pwrite(small.fd, bytes(16), start)
        try:
            found = small.read()
        except (QueueFileDamaged, QueueFileUnfinished):
            continue
        # Behind the content it may be an event that was never flushed: as if it had not been written.
        assert start + 16 > small.data.index(CONTENT) + len(CONTENT)
        assert found[:2] == expected[:2]
        assert found[2] in [expected[2][:index] + expected[2][index + 1 :] for index in range(len(expected[2]))]
    os.pwrite(small.fd, small.data, 0)
    assert small.read() == expected


def test_promise_2_an_unfinished_file_stays_unfinished_wherever_it_is_cut() -> None:
    encoded = queue_file.encode_envelope(envelope())
    memory = InMemory(queue_file.UNFINISHED + encoded + b"\n" + CONTENT)
    for size in reversed(range(len(memory.data) + 1)):
        os.ftruncate(memory.fd, size)
        with pytest.raises(QueueFileUnfinished):
            memory.read()
    os.close(memory.fd)


def test_unfinished_and_finished_first_lines_have_one_length() -> None:
    encoded = queue_file.encode_envelope(envelope())
    assert len(queue_file.UNFINISHED) == len(queue_file.encode_preamble(encoded, 2**40, 1)) == queue_file.PREAMBLE_SIZE


def test_a_length_that_is_too_big_does_not_hide_an_event() -> None:
    data = bytearray(b"".join(map(queue_file.encode_event, EVENTS)))
    data[1] = ord("1")  # the first digit of the first event's length: 256 MiB more than there are
    with pytest.raises(QueueFileDamaged, match="record"):
        queue_file.parse_events(bytes(data), 2)


@pytest.mark.parametrize(
    "event",
    [
        Attempt(1.0, ((2, Delivered("2.0.0", "")),)),
        Attempt(1.0, ((-1, Delivered("2.0.0", "")),)),
        Doubt(1.0, (0, 2), ""),
        Reported(1.0, (-1,), ""),
    ],
)
def test_an_event_for_a_recipient_that_is_not_there_is_damage(event: Event) -> None:
    with pytest.raises(QueueFileDamaged, match="recipient"):
        queue_file.parse_events(queue_file.encode_event(event), 2)


@pytest.mark.parametrize("line", [b"hello", b"0000000g", b"00000001 00000000x", b"00000001-00000000 {}", b"\0\0\0\0x"])
def test_what_is_no_event_is_damage(line: bytes) -> None:
    with pytest.raises(QueueFileDamaged):
        queue_file.parse_events(b"\n" + line + b"\n", 2)


@pytest.mark.parametrize("encoded", [b"{}", b'{"type":"vanished","at":1.0}', b"[]", b'{"type":"doubt","at":"x"}'])
def test_an_event_of_another_shape_is_damage(encoded: bytes) -> None:
    crc = zlib.crc32(encoded)
    with pytest.raises(QueueFileDamaged, match="decode"):
        queue_file.parse_events(b"\n%08x %08x %s\n" % (len(encoded), crc, encoded), 2)


def test_an_envelope_of_another_shape_is_damage() -> None:
    with pytest.raises(QueueFileDamaged, match="decode"):
        queue_file.parse_head(queue_file.encode_preamble(b"{}", 0, 0) + b"{}\n")


def test_a_claim_of_a_huge_envelope_is_damage_and_no_allocation() -> None:
    huge = bytes(queue_file.MAX_ENVELOPE + 1)
    with pytest.raises(QueueFileDamaged, match="claims"):
        queue_file.parse_head(queue_file.encode_preamble(huge, 0, 0) + b"{}\n")


def test_a_version_of_the_future_is_refused() -> None:
    with pytest.raises(QueueFileDamaged):
        queue_file.parse_head(_encode(envelope()).replace(b"mtad-queue 1 ", b"mtad-queue 2 "))


@pytest.mark.parametrize("name", NAMES)
def test_promise_7_golden_files_of_every_version_are_read(name: str, tmp_path: Path) -> None:
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    memory = InMemory((GOLDEN / f"{name}.queue").read_bytes())
    if "error" in expected:
        with pytest.raises(QueueFileUnfinished):
            memory.read()
        os.close(memory.fd)
        return
    message, content, events = memory.read()
    states = read_message(memory.fd)[0].states
    os.close(memory.fd)
    assert _plain(message) == expected["envelope"]
    assert {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} == expected["content"]
    assert _plain(events) == expected["events"]
    # What a state has learnt to tell since the file was made is not in it.
    assert [{key: state[key] for key in old} for state, old in zip(_plain(states), expected["states"], strict=True)] == (
        expected["states"]
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("v1/")])
def test_promise_7_what_is_written_today_is_still_version_1(name: str, tmp_path: Path) -> None:
    data = (GOLDEN / f"{name}.queue").read_bytes()
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    if "error" in expected:
        assert data in {b"", queue_file.UNFINISHED + data[queue_file.PREAMBLE_SIZE :]}
        return
    message = msgspec.convert(expected["envelope"], Envelope)
    events = msgspec.convert(expected["events"], list[Event])
    offset = queue_file.parse_head(data).content_offset
    content = data[offset : offset + expected["content"]["size"]]
    written = store(tmp_path, message, content, events).read_bytes()
    assert written == data[: len(data) - expected["tail"]]


def test_promise_7_the_golden_files_show_what_can_be_in_a_file() -> None:
    later = {"orders", "reports", "held_in_doubt", "released_in_doubt", "named_in_doubt"}
    plain = later | {"plain", "many_events", "torn_tail", "doubt", "non_ascii", "recipients_1000", "big", "unfinished"}
    assert plain <= {Path(name).name for name in NAMES if name.startswith("v1/")}
