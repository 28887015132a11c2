"""Queue files that are open: `IncomingFile` for the receiver, `OpenMessage` for whoever reads or delivers it.

Both hold a lock (flock) on the file as long as they work on it. That is how others tell a file in work from one whose
process died: a receiver holds it alone, deliveries share it, and a kill lets go of it.

Errors: an OSError is the world's (disk full, no descriptor) and leaves nothing committed; QueueFileDamaged is the file's.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Final, Self

from mtad.envelope import Envelope
from mtad.errors import QueueFileDamaged
from mtad.progress import Event
from mtad.spool.leftovers import LEFTOVERS, undo
from mtad.spool.queue_file import (
    MAX_ENVELOPE,
    PREAMBLE_SIZE,
    UNFINISHED,
    Head,
    StoredMessage,
    encode_envelope,
    encode_event,
    encode_preamble,
    encode_wakeup,
    parse_events,
    parse_head,
    parse_preamble,
    was_cut,
)
from mtad.stable import flush, flush_data

#: Octets read or kept in memory at a time. The content of a message up to this size is written, and read, at once.
CHUNK: Final = 64 * 1024
#: Pieces of content kept apart: a client may send two octets at a time, and each object has a head of its own.
_PIECES: Final = 256
#: History beyond this is damage: 1,000 recipients with 500 attempts of 300 octets.
MAX_EVENTS: Final = 256 * 1024 * 1024
#: A power cut leaves NUL octets where an event was not flushed, which is shorter; this is a hole, and may be huge.
MAX_NULS: Final = 1024 * 1024


def write_all(fd: int, data: bytes) -> None:
    """Write all of it; a disk that fills up or a signal may take only a part at a time."""
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, data[written:])


class IncomingFile:
    """A message on its way in. The file appears when the content outgrows memory, or at the commit.

    Exactly one of `commit` and `discard` ends it.
    """

    def __init__(self, directory: int, envelope: Envelope, committed: Callable[[str, bytes], None]) -> None:
        """Nothing is written yet. ``directory`` is a descriptor of incoming/; ``committed`` gets queue id and wake-up line.

        Raises:
            OSError: EMSGSIZE, the envelope is larger than a reader would believe.
        """
        self.envelope = envelope
        self._directory = directory
        self._encoded = encode_envelope(envelope)
        if len(self._encoded) > MAX_ENVELOPE:
            raise OSError(errno.EMSGSIZE, "the envelope is too large for a queue file")
        self._committed = committed
        self._pending = [UNFINISHED, self._encoded, b"\n"]
        self._pending_size = 0
        self._size = 0
        self._crc = 0
        self._fd = -1
        self._ended = False

    def write(self, data: bytes) -> None:
        """Add content, CRLF lines, cut anywhere.

        Raises:
            OSError: it could not be stored, and the message is discarded: whatever follows raises, too.
        """
        self._check()
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        self._pending.append(data)
        self._pending_size += len(data)
        if len(self._pending) > _PIECES:
            self._pending = [b"".join(self._pending)]
        if self._pending_size > CHUNK:
            try:
                self._flush()
            except BaseException:
                self.discard()
                raise

    def commit(self) -> None:
        """Make it durable: when this returns, the file and its name are on stable storage.

        Raises:
            OSError: it is not; nothing is left behind.
        """
        self._check()
        preamble = encode_preamble(self._encoded, self._size, self._crc)
        try:
            self._flush()
            # Last and by itself, small as the message may be: a kill can cut a write of several pages short.
            if os.pwrite(self._fd, preamble, 0) != PREAMBLE_SIZE:
                raise OSError(errno.EIO, "short write")  # within one block that exists: never seen
            flush(self._fd)
            flush(self._directory)
        except BaseException:
            self.discard()
            raise
        self._ended = True
        self._close()
        try:
            self._committed(self.envelope.id, encode_wakeup(preamble, self._encoded))
        except OSError:
            pass  # the message is safe, and the scan finds it

    def discard(self) -> None:
        """Forget it: the file is removed, or can never be taken for a message. After a commit: nothing."""
        self._ended = True
        self._pending.clear()
        if self._fd < 0:
            return
        if undo(self._directory, self.envelope.id, self._fd):
            self._close()
        else:
            LEFTOVERS.keep(self._directory, self.envelope.id, self._fd)
            self._fd = -1

    def _check(self) -> None:
        # An OSError, so that a receiver which overlooked a failure answers 4yz and never 250.
        if self._ended:
            raise OSError(errno.EBADF, "the message is already committed or discarded")

    def _create(self) -> None:
        # Between open and flock a sweep may take the file for a dead one, and a probe may hold its lock for a moment: wait
        # for the lock, and if the name is gone then, begin again. Nothing is written before the lock is ours.
        if LEFTOVERS and not LEFTOVERS.clear():
            raise OSError(errno.EIO, "what failed before cannot be removed yet")
        while True:
            self._fd = os.open(
                self.envelope.id,
                os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC,
                0o600,
                dir_fd=self._directory,
            )
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if os.fstat(self._fd).st_nlink:
                return
            self._close()

    def _flush(self) -> None:
        if self._fd < 0:
            self._create()
        data = b"".join(self._pending)
        self._pending.clear()
        self._pending_size = 0
        if data:
            write_all(self._fd, data)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        try:
            os.close(fd)
        except OSError:
            pass  # the descriptor is gone all the same, and what counts was synced before


class OpenMessage:
    """A committed queue file, open for reading its content and appending its history; a context manager.

    Satisfies `mtad.delivery.transport.Content`.
    """

    def __init__(self, fd: int, message: StoredMessage, first: bytes) -> None:
        """Use `open` instead. ``first`` is the start of the content, whole when the message is small."""
        self._fd = fd
        self._first = first
        self.message = message

    @classmethod
    def open(cls, name: str, directory: int, *, share: bool = True) -> Self:
        """Open the file ``name`` in a queue directory and read head and history.

        With ``share`` a shared lock says that somebody works on it.

        Raises:
            OSError: not there, not readable, no regular file (ELOOP for a link).
            QueueFileUnfinished, QueueFileDamaged: see `mtad.spool.queue_file`; QueueFileDamaged also for a file that
                belongs to neither us, nor root, nor whom the directory belongs to: none of us has put it there.
        """
        flags = (os.O_RDWR | os.O_APPEND) if share else os.O_RDONLY
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            owner = os.fstat(fd).st_uid
            if owner not in (os.geteuid(), 0) and owner != os.fstat(directory).st_uid:
                raise QueueFileDamaged("the file belongs to another user")
            if share:
                fcntl.flock(fd, fcntl.LOCK_SH)  # others hold it exclusively for a moment only, see Spool.in_work
            message, first = read_message(fd)
            if message.envelope.id != name:
                raise QueueFileDamaged(f"the file of {name} holds message {message.envelope.id}")
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, message, first)

    @property
    def size(self) -> int:
        """Octets of content."""
        return self.message.head.content_size

    def chunks(self) -> Iterator[bytes]:
        """The content from its start, in pieces of at most `CHUNK` octets; the last one only if the checksum is right.

        Raises:
            QueueFileDamaged: the content is shorter than it says, or not what its checksum says.
        """
        if len(self._first) == self.size:  # its checksum was compared when it was read
            if self._first:
                yield self._first
            return
        crc = 0
        position = self.message.head.content_offset
        while position < self.message.head.events_offset:
            data = os.pread(self._fd, min(CHUNK, self.message.head.events_offset - position), position)
            if not data:
                raise QueueFileDamaged("the content is shorter than it says")
            position += len(data)
            crc = zlib.crc32(data, crc)
            if position == self.message.head.events_offset and crc != self.message.head.content_crc:
                raise QueueFileDamaged("the checksum of the content is wrong")
            yield data

    def verify(self) -> None:
        """Compare the content with its checksum.

        Raises:
            QueueFileDamaged: they differ.
        """
        for _ in self.chunks():
            pass

    def append(self, *events: Event, durable: bool = False) -> None:
        """Add to the history, in one write; with ``durable`` it is on stable storage when this returns.

        Raises:
            OSError: it could not be written.
        """
        data = b"".join(encode_event(event) for event in events)
        # A short write (disk full) leaves the trace of a crash; its rest would not be safe from another's event in between.
        while os.write(self._fd, data) != len(data):
            pass
        if durable:
            flush_data(self._fd)

    def close(self) -> None:
        """Let go of the file and its lock."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Room(threading.local):
    """Where a thread reads a file of unknown size into: an object of `CHUNK` octets for each would fragment the memory."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, CHUNK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


_room: Final = _Room()


def read_message(fd: int) -> tuple[StoredMessage, bytes]:
    """Read head and history of an open queue file, and as much of its content as came with the first read.

    Raises:
        OSError, QueueFileUnfinished, QueueFileDamaged: see `OpenMessage.open`.
    """
    data = bytes(_room.memory[: os.preadv(fd, [_room.memory], 0)])
    if len(data) == CHUNK:
        envelope_size = parse_preamble(data)[0]
        if PREAMBLE_SIZE + envelope_size + 1 > CHUNK:
            data = os.pread(fd, PREAMBLE_SIZE + envelope_size + 1, 0)
    head = parse_head(data)
    first = data[head.content_offset : head.events_offset]
    if len(first) == head.content_size and zlib.crc32(first) != head.content_crc:
        raise QueueFileDamaged("the checksum of the content is wrong")
    whole = len(first) == head.content_size and len(data) < CHUNK
    events = data[head.events_offset :] if whole else _read_events(fd, head)
    history = tuple(parse_events(events, len(head.envelope.recipients), head.events_offset))
    return StoredMessage(head, history, was_cut(events)), first


def _read_events(fd: int, head: Head) -> bytes:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise QueueFileDamaged("not a regular file")
    size = status.st_size - head.events_offset
    if size < 0:
        raise QueueFileDamaged("the content is shorter than it says")
    if size > MAX_EVENTS:
        raise QueueFileDamaged(f"{size} octets follow the content")
    parts = []
    position = head.events_offset
    nuls = 0
    while data := os.pread(fd, CHUNK, position):
        nuls = nuls + len(data) if data.count(0) == len(data) else 0
        if nuls > MAX_NULS:
            raise QueueFileDamaged(f"more than {MAX_NULS} NUL octets follow the content")
        parts.append(data)
        position += len(data)
    return b"".join(parts)
