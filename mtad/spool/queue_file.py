"""The format of a queue file: one message, its envelope, and all that happened to it.

::

    mtad-queue 1 <envelope length> <content length> <CRC of envelope> <CRC of content> <CRC of this line so far> LF
    <envelope, JSON> LF
    <content: octets as received, trace header first, lines ended by CRLF>
    LF <length> <CRC> SP <event, JSON> LF          any number of times

Numbers are hexadecimal and of fixed width, so the first line always has the same length. Envelope and content are written
once. Events are appended, each by a single ``write`` in append mode, and each framed by line feeds on both sides: what a
crash cuts off can spoil neither the event before nor the one after.

- **Unfinished** (`QueueFileUnfinished`): the first line says so, or was cut off before it could say anything, as in an
  empty file. The message was never acknowledged.
- **Damaged** (`QueueFileDamaged`): anything else that does not fit its length or checksum.
- An event that is shorter than it says is the trace of a crash and is passed over; one whose checksum is wrong is damage.
- NUL octets, which no event has, are the trace of a power cut where they reach to the end of the file, of the line or of a
  sector: a file system may keep the new length of a file and not the octets that were appended and never flushed. They end
  an event that is shorter than it says.

A version that reads 2 will still read 1; ``tests/golden`` keeps files of each.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Final

import msgspec

from mtad.envelope import Envelope
from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.outcome import Attempt
from mtad.progress import Event, Instructed, RecipientState, replay

MAGIC: Final = b"mtad-queue 1 "
#: Octets of the first line, line feed included.
PREAMBLE_SIZE: Final = len(MAGIC) + 8 + 1 + 12 + 1 + 8 + 1 + 8 + 1 + 8 + 1
#: The first line of a file that is still being received.
UNFINISHED: Final = MAGIC + b"unfinished".ljust(PREAMBLE_SIZE - len(MAGIC) - 1) + b"\n"
#: An envelope of 1,000 recipients of 320 octets fits ten times; a length past this is damage, not an allocation.
MAX_ENVELOPE: Final = 4 * 1024 * 1024

_PREAMBLE: Final = re.compile(
    rb"mtad-queue 1 ([0-9a-f]{8}) ([0-9a-f]{12}) ([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{8})\n",
)
_EVENT_HEAD: Final = re.compile(rb"([0-9a-f]{8}) ([0-9a-f]{8}) ")
_EVENT_HEAD_SIZE: Final = 18
_NULS: Final = re.compile(rb"\0+")
#: Octets that a disk writes at once, at the least: what was not flushed is missing from, or up to, a multiple of it.
_SECTOR: Final = 512
_EVENT_HEAD_START: Final = re.compile(rb"[0-9a-f]{0,8}|[0-9a-f]{8} [0-9a-f]{0,8}")

#: What msgspec raises for JSON that is none: also text that is no UTF-8, and lists in lists without end.
_UNDECODABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
#: Characters of its words that are told: they may quote the file, and with it whoever wrote it.
_FAULT_WORDS: Final = 200

_encoder: Final = msgspec.json.Encoder()
_envelope_decoder: Final = msgspec.json.Decoder(Envelope)
_event_decoder: Final = msgspec.json.Decoder(Event)


class Head(msgspec.Struct, frozen=True):
    """What stands before the content: the envelope and where the content is."""

    envelope: Envelope
    content_offset: int
    content_size: int
    content_crc: int

    @property
    def events_offset(self) -> int:
        """Where the first event stands."""
        return self.content_offset + self.content_size


def encode_envelope(envelope: Envelope) -> bytes:
    """The envelope's JSON, on one line without its end."""
    return _encoder.encode(envelope)


def encode_preamble(envelope: bytes, content_size: int, content_crc: int) -> bytes:
    """The first line of a finished file, for an encoded envelope."""
    line = b"%s%08x %012x %08x %08x " % (MAGIC, len(envelope), content_size, zlib.crc32(envelope), content_crc)
    return b"%s%08x\n" % (line, zlib.crc32(line))


def parse_preamble(data: bytes) -> tuple[int, int, int, int]:
    """Take the first line apart: envelope length, content length, CRC of envelope, CRC of content.

    Raises:
        QueueFileUnfinished: the receiver had not finished.
        QueueFileDamaged: it is no first line of a queue file that this version reads.
    """
    if UNFINISHED.startswith(data[:PREAMBLE_SIZE]):
        raise QueueFileUnfinished("never finished by its receiver")
    match = _PREAMBLE.match(data)
    if match is None:
        raise QueueFileDamaged("the first line is not that of a queue file")
    if zlib.crc32(data[: match.start(5)]) != int(match[5], 16):
        raise QueueFileDamaged("the checksum of the first line is wrong")
    size = int(match[1], 16)
    if size > MAX_ENVELOPE:
        raise QueueFileDamaged(f"the envelope claims {size} octets")
    return size, int(match[2], 16), int(match[3], 16), int(match[4], 16)


def parse_head(data: bytes) -> Head:
    """Read the head of a queue file from its first octets, which must reach to the end of the envelope.

    Raises:
        QueueFileUnfinished, QueueFileDamaged: see the module.
    """
    size, content_size, envelope_crc, content_crc = parse_preamble(data)
    encoded = data[PREAMBLE_SIZE : PREAMBLE_SIZE + size]
    if zlib.crc32(encoded) != envelope_crc or data[PREAMBLE_SIZE + size : PREAMBLE_SIZE + size + 1] != b"\n":
        raise QueueFileDamaged("the checksum of the envelope is wrong")
    try:
        envelope = _envelope_decoder.decode(encoded)
    except _UNDECODABLE as fault:
        raise QueueFileDamaged(f"the envelope does not decode: {str(fault)[:_FAULT_WORDS]}") from fault
    return Head(envelope, PREAMBLE_SIZE + size + 1, content_size, content_crc)


def encode_wakeup(preamble: bytes, envelope: bytes) -> bytes:
    """A head on one line, as a listener sends it to the scheduler; `parse_wakeup` reads it."""
    return b"%s %s\n" % (preamble[:-1], envelope)


def parse_wakeup(line: bytes) -> Head:
    """Read a line of `encode_wakeup`, with or without its line feed.

    Raises:
        QueueFileUnfinished, QueueFileDamaged: it is none.
    """
    return parse_head(b"%s\n%s\n" % (line[: PREAMBLE_SIZE - 1], line[PREAMBLE_SIZE:].rstrip(b"\n")))


def encode_event(event: Event) -> bytes:
    """An event as it is appended."""
    encoded = _encoder.encode(event)
    return b"\n%08x %08x %s\n" % (len(encoded), zlib.crc32(encoded), encoded)


def parse_events(data: bytes, recipients: int, offset: int = 0) -> list[Event]:
    """Read the events from the octets behind the content; ``offset`` is where in the file they begin.

    Raises:
        QueueFileDamaged: a checksum is wrong, or an event names a recipient that the envelope does not have.
    """
    events: list[Event] = []
    lines = data.split(b"\n")
    if b"\0" in data:
        _expect_power_cut(data, offset)
        lines = [line.partition(b"\0")[0] for line in lines]
    for line in lines:
        if not line:
            continue
        match = _EVENT_HEAD.match(line)
        encoded = line[_EVENT_HEAD_SIZE:]
        if match is None:
            if _EVENT_HEAD_START.fullmatch(line) is None:
                raise QueueFileDamaged("what follows the content is no record")
            continue
        size, crc = int(match[1], 16), zlib.crc32(encoded)
        if len(encoded) < size and crc != int(match[2], 16):
            continue
        # A whole event under a length that is too big is damage: passed over, its recipients would get the message again.
        if len(encoded) != size or crc != int(match[2], 16):
            raise QueueFileDamaged("the checksum of a record is wrong")
        try:
            event = _event_decoder.decode(encoded)
        except _UNDECODABLE as fault:
            raise QueueFileDamaged(f"a record does not decode: {str(fault)[:_FAULT_WORDS]}") from fault
        if any(not 0 <= index < recipients for index in _indexes(event)):
            raise QueueFileDamaged("a record names a recipient that is not in the envelope")
        events.append(event)
    return events


def _expect_power_cut(data: bytes, offset: int) -> None:
    """Accept NUL octets where a power cut leaves them; see the module.

    Raises:
        QueueFileDamaged: some are elsewhere.
    """
    for match in _NULS.finditer(data):
        end = match.end()
        if data[end : end + 1] not in (b"", b"\n") and (offset + end) % _SECTOR:
            raise QueueFileDamaged("NUL octets stand in a record")


def was_cut(data: bytes) -> bool:
    """Whether the octets behind the content end in the trace of a power cut, and no event was written since."""
    return b"\0" in data and b"\0" in data.rstrip(b"\n").rpartition(b"\n")[2]


def _indexes(event: Event) -> Sequence[int]:
    if isinstance(event, Attempt):
        return [index for index, _ in event.outcomes]
    return () if isinstance(event, Instructed) else event.recipients


class StoredMessage(msgspec.Struct, frozen=True):
    """A queue file as read: head and history."""

    head: Head
    events: tuple[Event, ...]
    cut: bool = False
    """A power cut has taken what was written last: perhaps that the message was about to be sent."""

    @property
    def envelope(self) -> Envelope:
        """The envelope."""
        return self.head.envelope

    @property
    def states(self) -> tuple[RecipientState, ...]:
        """Where each recipient stands, in the order of the envelope."""
        return replay(len(self.head.envelope.recipients), self.events)
