"""The spool: the queue directories and the moves between them. Directory = state, rename = move.

==========  =========================================================================================
incoming/   being received, or received and not yet claimed
active/     claimed by the scheduler: in delivery, or waiting for its turn
deferred/   waiting for the next attempt, whose time is the file's mtime
hold/       waiting for a human
corrupt/    damaged files, kept for a human; never deleted, never read again
==========  =========================================================================================

A verb means one thing everywhere: *enter* (a new file in incoming), *claim* (incoming or deferred to active), *defer*
(active to deferred), *restore* (what a scheduler finds in active at its start), *hold*, *condemn* (to corrupt), *remove*.

No move overwrites a file. Of two with one queue id (somebody has put a copy back) the one in active stays, for it knows
best who has the message already; the other goes to corrupt, and `Spool.displaced` is told.

There is one scheduler at a time: `lock`. A move whose file is gone answers False instead of raising: an administrator's
command may have been faster. Other OSErrors are the world's and go to the caller.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from typing import Final

from mtad.envelope import Envelope
from mtad.errors import MtadError, QueueFileDamaged, QueueFileUnfinished, SpoolBusy
from mtad.progress import Event
from mtad.spool import listing
from mtad.spool.message import IncomingFile, OpenMessage
from mtad.spool.queue_file import PREAMBLE_SIZE, StoredMessage, parse_preamble
from mtad.spool.queue_id import QueueIds, is_queue_id
from mtad.stable import flush, flush_data

#: Name of the lock that the scheduler holds, and of the one that the master holds.
SCHEDULER_LOCK: Final = "scheduler.lock"
MASTER_LOCK: Final = "master.lock"
#: Name of the socket where the scheduler takes requests.
MAILSLOT: Final = "scheduler.sock"


class Queue(Enum):
    """The queue directories."""

    INCOMING = "incoming"
    ACTIVE = "active"
    DEFERRED = "deferred"
    HOLD = "hold"
    CORRUPT = "corrupt"


#: The queues whose messages are still to be delivered, in the order in which `mtaq` shows them.
LIVE: Final = (Queue.INCOMING, Queue.ACTIVE, Queue.DEFERRED, Queue.HOLD)

#: What a disk says that is full, or our share of it.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
#: What is said when there is no file that anybody could be at work on.
_NOTHING: Final = frozenset({errno.ENOENT, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO, errno.ENODEV})
#: More files than this to be made durable, and the whole machine's are.
_SINGLY: Final = 200


def _nobody(_queue_id: str, _line: bytes) -> None:
    """For a spool whose messages are found by the scan alone."""


def _unseen(_queue: Queue, _name: str) -> None:
    """For a spool where nobody wants to know of files in the way."""


def _sync(path: str) -> None:
    """Make the entries of a directory durable: a message is only as safe as the directories above it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return  # a parent that we may pass but not read; it was there before us
    try:
        flush(fd)
    finally:
        os.close(fd)


class Spool:
    """One spool, by descriptors of its directories; may be used by several threads, and inherited by a fork."""

    def __init__(self, root: str, *, create: bool = False) -> None:
        """Open the spool at ``root``; with ``create`` make what is missing, readable by its owner only.

        Raises:
            MtadError: it is no spool (a directory is missing or no directory).
            OSError: the world's.
        """
        self.root = root
        self.ids = QueueIds()
        self.wake: Callable[[str, bytes], None] = _nobody
        self.displaced: Callable[[Queue, str], None] = _unseen
        self._directories: dict[Queue, int] = {}
        if create:
            os.makedirs(root, mode=0o700, exist_ok=True)
        for queue in Queue:
            path = os.path.join(root, queue.value)
            if create:
                os.makedirs(path, mode=0o700, exist_ok=True)
            try:
                self._directories[queue] = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except (FileNotFoundError, NotADirectoryError) as fault:
                self.close()
                raise MtadError(f"{root} is not a spool: {fault.strerror}: {path}") from fault
        if create:
            for path in (root, os.path.dirname(os.path.abspath(root))):
                _sync(path)

    def close(self) -> None:
        """Close the directories."""
        for fd in self._directories.values():
            os.close(fd)
        self._directories.clear()

    def lock(self, name: str = SCHEDULER_LOCK) -> int:
        """Become the only holder of a lock of this spool; the descriptor to keep.

        It goes with the process, and with the last of its children that was forked since and has not closed it.

        Raises:
            SpoolBusy: somebody else is; the text has the process id that they left there.
            OSError: the disk does not let it be written, as one that is read-only; nobody holds the lock then.
        """
        path = os.path.join(self.root, name)
        fd = self._lock_file(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Held open for reading only: a file that is open for writing keeps a disk from being remounted read-only.
            writer = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.write(writer, b"%d\n" % os.getpid())
            except OSError as fault:
                # Who holds it is for people. On a full disk, which deliveries would empty, it must be held all the same.
                if fault.errno not in _FULL:
                    raise
            finally:
                os.close(writer)
        except BlockingIOError as fault:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "?"
            os.close(fd)
            raise SpoolBusy(f"{self.root} is in use by process {holder}") from fault
        except OSError:
            os.close(fd)
            raise
        return fd

    @staticmethod
    def _lock_file(path: str) -> int:
        """Open a lock; one that root makes, with a command, belongs to the owner of the spool, who must open it later."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return os.open(path, flags)
        owner = os.stat(os.path.dirname(path))
        if owner.st_uid != os.geteuid() == 0:
            os.fchown(fd, owner.st_uid, owner.st_gid)
        return fd

    def holder(self, name: str = MASTER_LOCK) -> int | None:
        """The process id of whoever holds a lock of this spool; None when nobody does."""
        try:
            fd = os.open(os.path.join(self.root, name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(fd, 32, 0).strip()
            return int(text) if text.isdigit() else 0
        finally:
            os.close(fd)
        return None

    def enter(self, envelope: Envelope) -> IncomingFile:
        """Begin a new message, whose id is the envelope's; see `IncomingFile`."""
        return IncomingFile(self._directories[Queue.INCOMING], envelope, self.wake)

    def claim(self, queue: Queue, queue_id: str) -> bool:
        """Move a message to active."""
        return self._move(queue, Queue.ACTIVE, queue_id)

    def defer(self, queue_id: str, when: float) -> bool:
        """Move a message from active to deferred, to be tried again at ``when`` (seconds since the epoch)."""
        try:
            self.touch(Queue.ACTIVE, queue_id, when)
        except FileNotFoundError:
            return False
        return self._move(Queue.ACTIVE, Queue.DEFERRED, queue_id)

    def touch(self, queue: Queue, queue_id: str, when: float) -> None:
        """Set the time of the next attempt.

        Raises:
            FileNotFoundError: the message is not in this queue.
        """
        os.utime(queue_id, (when, when), dir_fd=self._directories[queue], follow_symlinks=False)

    def due(self, queue_id: str) -> float:
        """When a deferred message is to be tried again, in seconds since the epoch.

        Raises:
            FileNotFoundError: the message is not deferred.
        """
        return self.changed(Queue.DEFERRED, queue_id)

    def changed(self, queue: Queue, queue_id: str) -> float:
        """The time of a file: when it was written to last, or the time of its next attempt.

        Raises:
            FileNotFoundError: the message is not in this queue.
        """
        return os.stat(queue_id, dir_fd=self._directories[queue], follow_symlinks=False).st_mtime

    def hold(self, queue: Queue, queue_id: str) -> bool:
        """Keep a message for a human."""
        return self._move(queue, Queue.HOLD, queue_id)

    def release(self, queue_id: str, when: float) -> bool:
        """Move a message from hold to deferred, to be tried at ``when`` (seconds since the epoch)."""
        try:
            self.touch(Queue.HOLD, queue_id, when)
        except FileNotFoundError:
            return False
        return self._move(Queue.HOLD, Queue.DEFERRED, queue_id)

    def condemn(self, queue: Queue, name: str) -> bool:
        """Move a damaged file, or whatever else lies in a queue, to corrupt/ under a name that is free there."""
        target = name
        for number in range(1, 10_000):
            if not self._exists(Queue.CORRUPT, target):
                return self._move(queue, Queue.CORRUPT, name, target)
            target = f"{name[:60]}.{number}"  # 60 characters are at most 240 octets, of the 255 that a name may have
        return False

    def remove(self, queue_id: str, queue: Queue = Queue.ACTIVE) -> bool:
        """Delete a message of active that is done, or one that an administrator wants gone."""
        return self._unlink(queue, queue_id)

    def find(self, queue_id: str) -> Queue | None:
        """In which of the live queues a message is; None: in none. For whoever has the scheduler's lock."""
        return next((queue for queue in LIVE if self._exists(queue, queue_id)), None)

    def sync(self, queue_ids: Collection[str] = ()) -> None:
        """Make durable which messages are in which queue, which are gone, and what stands in the files of some."""
        if len(queue_ids) > _SINGLY:
            os.sync()
            queue_ids = ()
        for queue_id in queue_ids:
            with contextlib.suppress(OSError):  # it has moved on, and whoever moved it had read what was to be kept
                if queue := self.find(queue_id):
                    self._sync_file(queue, queue_id)
        for fd in self._directories.values():
            flush(fd)

    def _sync_file(self, queue: Queue, queue_id: str) -> None:
        fd = os.open(queue_id, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._directories[queue])
        try:
            flush_data(fd)
        finally:
            os.close(fd)

    def open(self, queue: Queue, queue_id: str) -> OpenMessage:
        """Open a message to work on it.

        Raises:
            OSError, QueueFileUnfinished, QueueFileDamaged: see `OpenMessage.open`.
        """
        return OpenMessage.open(queue_id, self._directories[queue])

    def peek(self, queue: Queue, queue_id: str) -> OpenMessage:
        """Open a message to read it, for as long as that takes: nobody waits for a reader.

        Raises:
            OSError, QueueFileUnfinished, QueueFileDamaged: see `OpenMessage.open`.
        """
        return OpenMessage.open(queue_id, self._directories[queue], share=False)

    def load(self, queue: Queue, queue_id: str) -> StoredMessage:
        """Read head and history of a message.

        Raises:
            OSError, QueueFileUnfinished, QueueFileDamaged: see `OpenMessage.open`.
        """
        with self.peek(queue, queue_id) as opened:
            return opened.message

    def append(self, queue: Queue, queue_id: str, event: Event) -> None:
        """Add to the history of a message that nobody has open."""
        with self.open(queue, queue_id) as opened:
            opened.append(event)

    def in_work(self, queue: Queue, queue_id: str) -> bool:
        """Whether a process holds the file locked: its receiver, or a delivery. So it is as long as nobody can tell."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(queue_id, flags, dir_fd=self._directories[queue])
        except OSError as fault:
            return fault.errno not in _NOTHING
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    def sweep(self, queue_id: str) -> bool:
        """Remove a file of incoming that was never finished and that nobody is at work on.

        The lock is taken first: a receiver that has just made the file either holds it, or will see that it is gone. Then
        the file is looked at again: its receiver may have committed since the caller saw it unfinished, and let go.
        """
        directory = self._directories[Queue.INCOMING]
        try:
            fd = os.open(queue_id, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return False
            parse_preamble(os.pread(fd, PREAMBLE_SIZE, 0))
        except QueueFileUnfinished:
            return self._unlink(Queue.INCOMING, queue_id)
        except (BlockingIOError, QueueFileDamaged):
            return False
        finally:
            os.close(fd)
        return False

    def names(self, queue: Queue) -> Iterator[str]:
        """The names of a queue's files, in no order, one by one."""
        return listing.names(self._directories[queue])

    def entries(
        self, queue: Queue, broken: Callable[[str, OSError], None] = lambda _name, _fault: None
    ) -> Iterator[tuple[str, float | None]]:
        """The names in a queue with their mtime, in no order, one by one; nothing is opened.

        The time is None for what does not belong there: a link, FIFO or directory, or a file whose name is no queue id.
        What the disk tells nothing about is left out, and ``broken`` is told; it must not hide the others.
        """
        return listing.entries(self._directories[queue], broken)

    def times(self, queue: Queue) -> Iterator[tuple[str, float]]:
        """The queue ids of a queue's messages with their mtime; see `entries`."""
        return ((name, mtime) for name, mtime in self.entries(queue) if mtime is not None)

    def count(self, queue: Queue) -> int:
        """How many files a queue has."""
        return sum(1 for name in self.names(queue) if not name.startswith("."))

    def _unlink(self, queue: Queue, name: str) -> bool:
        try:
            os.unlink(name, dir_fd=self._directories[queue])
        except FileNotFoundError:
            return False
        return True

    def _exists(self, queue: Queue, name: str) -> bool:
        # Asked before each move, and nearly always answered by no: a stat would cost an exception each time.
        return os.access(name, os.F_OK, dir_fd=self._directories[queue], follow_symlinks=False)

    def _move(self, source: Queue, target: Queue, name: str, new_name: str | None = None) -> bool:
        if target not in (source, Queue.CORRUPT) and self._exists(target, name) and self._exists(source, name):
            loser = source if target is Queue.ACTIVE else target
            if self.condemn(loser, name):
                self.displaced(loser, name)
            if loser is source:
                return False
        try:
            os.rename(
                name,
                new_name or name,
                src_dir_fd=self._directories[source],
                dst_dir_fd=self._directories[target],
            )
        except OSError as fault:
            if fault.errno == errno.ENOENT:
                return False
            raise
        return True
