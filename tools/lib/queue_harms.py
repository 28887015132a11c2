"""Queue files made by hand, and all that can be wrong with what lies in a queue: for the sweep ``files``.

A harm makes one thing in a directory beside the queues, and tells what must become of it: it lies in corrupt/ in the end,
or it is swept (what was never finished, in incoming only), or it is a message all the same, for these recipients and no
other: a crash can cut off a record, and so can a harm.
"""

from __future__ import annotations

import os
import random
import socket
import stat
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from mtad.envelope import Envelope, Recipient
from mtad.outcome import Attempt, Deferred, Delivered
from mtad.spool.queue_file import MAGIC, UNFINISHED, encode_envelope, encode_event, encode_preamble
from mtad.spool.queue_id import encode
from mtad.spool.queues import Queue

#: The header field by which a message is known again.
CASE_FIELD: Final = "X-Case"
_NOBODY: Final = 65534


class Original(msgspec.Struct, frozen=True):
    """A good queue file in its parts; the first recipients are done already, one for each of ``records`` that says so."""

    id: str
    recipients: tuple[str, ...]
    done: tuple[int, ...]
    """For each record the recipient that is done with it; -1: it says something else."""
    head: bytes
    content: bytes
    records: tuple[bytes, ...]

    @property
    def data(self) -> bytes:
        """The whole file."""
        return self.head + self.content + b"".join(self.records)

    @property
    def content_end(self) -> int:
        """Where the records begin."""
        return len(self.head) + len(self.content)

    def due(self, size: int | None = None) -> frozenset[str]:
        """Who is still to get the message, when of the file only the first ``size`` octets are left."""
        gone = set()
        end = self.content_end
        for index, record in zip(self.done, self.records, strict=True):
            end += len(record)
            if size is None or end - 1 <= size:  # its last line feed may be missing
                gone.add(index)
        return frozenset(name for index, name in enumerate(self.recipients) if index not in gone)


class Expected(msgspec.Struct, frozen=True):
    """What must become of a harmed thing; ``due`` are the recipients that get the message."""

    fate: Literal["corrupt", "swept", "message"]
    due: frozenset[str] = frozenset()


CORRUPT: Final = Expected("corrupt")


def make(chance: random.Random, number: int, domain: str, now: float) -> Original:
    """A message with some history; its id is unique for each ``number``."""
    queue_id = encode(int(now * 1_000_000) + number, 4711)
    recipients = tuple(f"c{number}-{index}@{domain}" for index in range(chance.choice((1, 1, 2, 3))))
    size = chance.choice((0, 100, 100, 3000, 70_000, 140_000))
    body = b"".join(b"%d %s\r\n" % (line, chance.randbytes(20).hex().encode()) for line in range(size // 45))
    content = f"From: alice@example.org\r\n{CASE_FIELD}: {number}\r\n\r\n".encode() + body
    envelope = encode_envelope(Envelope(queue_id, now, "alice@example.org", tuple(map(Recipient, recipients))))
    head = encode_preamble(envelope, len(content), zlib.crc32(content)) + envelope + b"\n"
    records, done = [], []
    for index in range(chance.randint(0, len(recipients) - 1)):
        if chance.random() < 0.5:
            records.append(encode_event(Attempt(now, ((index, Deferred("4.2.0", "later", "mx", "450 later")),), host="mx")))
            done.append(-1)
        records.append(encode_event(Attempt(now, ((index, Delivered("2.0.0", "sent", "mx", "250 ok")),), host="mx")))
        done.append(index)
    return Original(queue_id, recipients, tuple(done), head, content, tuple(records))


class Bench:
    """Where a harm works: it makes ``path``, which will be moved into ``queue`` under the same name."""

    def __init__(self, chance: random.Random, path: Path, queue: Queue, other: Original) -> None:
        """``other`` is another message, of which nothing else lies anywhere."""
        self.chance = chance
        self.path = path
        self.queue = queue
        self.other = other

    def rename(self, name: str) -> None:
        """Call the thing otherwise."""
        self.path = self.path.with_name(name)


Harm = Callable[[Bench, Original], Expected]


def flip_bit(bench: Bench, good: Original) -> Expected:
    data = bytearray(good.data)
    data[bench.chance.randrange(len(data))] ^= 1 << bench.chance.randrange(8)
    bench.path.write_bytes(data)
    return CORRUPT


def flip_bit_in_records(bench: Bench, good: Original) -> Expected:
    data = bytearray(good.data)
    data[bench.chance.randrange(good.content_end, len(data)) if good.records else 20] ^= 1 << bench.chance.randrange(8)
    bench.path.write_bytes(data)
    return CORRUPT


def overwrite(bench: Bench, good: Original) -> Expected:
    """Some octets in a row are others."""
    data = bytearray(good.data[: good.content_end])
    start = bench.chance.randrange(len(data))
    for place in range(start, min(len(data), start + bench.chance.choice((2, 30, 512)))):
        data[place] ^= bench.chance.randrange(1, 256)
    bench.path.write_bytes(bytes(data) + b"".join(good.records))
    return CORRUPT


def truncate(bench: Bench, good: Original) -> Expected:
    return _cut(bench, good, bench.chance.randrange(len(good.data)))


def truncate_records(bench: Bench, good: Original) -> Expected:
    return _cut(bench, good, bench.chance.randint(good.content_end, len(good.data)))


def truncate_first_line(bench: Bench, good: Original) -> Expected:
    return _cut(bench, good, bench.chance.randrange(80))


def empty(bench: Bench, good: Original) -> Expected:
    return _cut(bench, good, 0)


def _cut(bench: Bench, good: Original, size: int) -> Expected:
    bench.path.write_bytes(good.data[:size])
    if size >= good.content_end:
        return Expected("message", good.due(size))
    return Expected("swept") if size <= len(MAGIC) and bench.queue is Queue.INCOMING else CORRUPT


def unfinished(bench: Bench, good: Original) -> Expected:
    bench.path.write_bytes(UNFINISHED + good.data[len(UNFINISHED) :])
    return Expected("swept") if bench.queue is Queue.INCOMING else CORRUPT


def splice(bench: Bench, good: Original) -> Expected:
    """It goes on as another file."""
    place = bench.chance.randrange(1, good.content_end)
    rest = bench.other.data[place:]
    bench.path.write_bytes(good.data[:place] + (rest or b"\0"))
    return CORRUPT


def another(bench: Bench, _: Original) -> Expected:
    """A good file under this one's name."""
    bench.path.write_bytes(bench.other.data)
    return CORRUPT


def foreign_content(bench: Bench, good: Original) -> Expected:
    """The envelope of one, the content of another."""
    bench.path.write_bytes(good.head + bench.other.content + b"".join(good.records))
    return CORRUPT


def appended(bench: Bench, good: Original) -> Expected:
    bench.path.write_bytes(good.data + bench.chance.choice((b"x", b"\nnonsense\n", b"\nff nonsense", good.data)))
    return CORRUPT


def power_cut(bench: Bench, good: Original) -> Expected:
    """What was appended last never reached the disk, but for the new length of the file."""
    size = bench.chance.randint(good.content_end, len(good.data))
    bench.path.write_bytes(good.data[:size].ljust(len(good.data) + bench.chance.choice((0, 1, 4000, 70_000)), b"\0"))
    return Expected("message", good.due(size))


def garbage(bench: Bench, _: Original) -> Expected:
    bench.path.write_bytes(b"\1" + bench.chance.randbytes(bench.chance.choice((1, 91, 5000))))
    return CORRUPT


def zeroes(bench: Bench, good: Original) -> Expected:
    """Blocks of it were never written."""
    data = bytearray(good.data)
    start = bench.chance.randrange(0, good.content_end, 512)
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    bench.path.write_bytes(data)
    return CORRUPT


def unix_lines(bench: Bench, good: Original) -> Expected:
    """A file transfer that meant it well."""
    bench.path.write_bytes(good.data.replace(b"\r\n", b"\n"))
    return CORRUPT


def sparse(bench: Bench, good: Original) -> Expected:
    bench.path.write_bytes(bench.chance.choice((b"", good.data)))
    os.truncate(bench.path, bench.chance.choice((10 << 30, 200 << 20)))
    return CORRUPT


def link(bench: Bench, good: Original) -> Expected:
    """A link: to a good file elsewhere, into a queue, to nowhere."""
    real = bench.path.with_name("linked-" + bench.path.name)
    real.write_bytes(good.data)
    target = bench.chance.choice((str(real), "/etc/passwd", "/nowhere", "/", bench.other.id, f"../active/{bench.other.id}"))
    bench.path.symlink_to(target)
    return CORRUPT


def fifo(bench: Bench, _: Original) -> Expected:
    os.mkfifo(bench.path)
    return CORRUPT


def directory(bench: Bench, good: Original) -> Expected:
    bench.path.mkdir()
    (bench.path / good.id).write_bytes(good.data)
    return CORRUPT


def device(bench: Bench, _: Original) -> Expected:
    os.mknod(bench.path, 0o600 | stat.S_IFCHR, os.makedev(1, bench.chance.choice((3, 5, 7))))  # null, zero, full
    return CORRUPT


def named_socket(bench: Bench, _: Original) -> Expected:
    place = os.open(bench.path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
            bound.bind(f"/proc/self/fd/{place}/{bench.path.name}")
    finally:
        os.close(place)
    return CORRUPT


def foreign_owner(bench: Bench, good: Original) -> Expected:
    bench.path.write_bytes(good.data)
    os.chown(bench.path, bench.chance.choice((_NOBODY, 1234)), _NOBODY)
    return CORRUPT


def wrong_name(bench: Bench, good: Original) -> Expected:
    end = str(bench.chance.randrange(10**9))
    names = ("a name ", "core.", "\x1b[2J\n", os.fsdecode(b"\xff\xfe"), "x" * 200, good.id[:10], good.id + "a")
    bench.rename(bench.chance.choice(names) + end)
    bench.path.write_bytes(good.data)
    return CORRUPT


def wrong_id(bench: Bench, good: Original) -> Expected:
    """Another id, which nobody has."""
    bench.rename(encode(int.from_bytes(bench.chance.randbytes(6)), 17))
    bench.path.write_bytes(good.data)
    return CORRUPT


def nothing(bench: Bench, good: Original) -> Expected:
    """Not harmed: the rest, which flows."""
    bench.path.write_bytes(good.data)
    return Expected("message", good.due())


def sealed(bench: Bench, good: Original) -> Expected:
    """The control: a forged recipient under checksums that are right, which no server can see."""
    size = len(encode_preamble(b"", 0, 0))
    envelope = good.head[size:-1].replace(b'"c', b'"w')
    head = encode_preamble(envelope, len(good.content), zlib.crc32(good.content)) + envelope + b"\n"
    bench.path.write_bytes(head + good.content + b"".join(good.records))
    return CORRUPT


HARMS: Final[Sequence[Harm]] = (
    flip_bit,
    flip_bit_in_records,
    overwrite,
    truncate,
    truncate_records,
    truncate_first_line,
    empty,
    unfinished,
    splice,
    another,
    foreign_content,
    appended,
    power_cut,
    garbage,
    zeroes,
    unix_lines,
    sparse,
    link,
    fifo,
    directory,
    device,
    named_socket,
    foreign_owner,
    wrong_name,
    wrong_id,
)
