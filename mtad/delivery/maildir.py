"""Local delivery: one file per message in the user's Maildir.

A message is written to ``tmp/``, flushed, moved to ``new/`` by a rename, and then the directory is flushed: whoever reads
the mailbox sees a whole message or none, and what is recorded as delivered survives a power cut. Lines end in LF there, as
programs on this system expect; Return-Path: and Delivered-To: come first (RFC 5321 section 4.4).

The mailbox is made when it is missing, for its owner only. Directories are opened one below the other without following
links, so a link in the place of a mailbox leads nowhere; and one that belongs to somebody else gets no mail: where a mail
root is open to others by mistake, they could have made it (attack L-2).

Errors: whatever the disk or the rights refuse defers the recipient with the reason; nothing bounces for a local fault. A
user who is no longer known fails with 5.1.1.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from mtad.address import Address
from mtad.delivery.transport import Content, Interrupted, Task
from mtad.envelope import Envelope
from mtad.errors import QueueFileDamaged
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.spool.message import write_all
from mtad.stable import flush

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

#: RFC 3463: 4.2.2 mailbox full, 4.3.1 system full, 4.2.0 other mailbox status.
_STATUS: Final = {errno.ENOSPC: "4.3.1", errno.EDQUOT: "4.2.2", errno.EFBIG: "4.2.2"}


class Users(Protocol):
    """Who has a mailbox here."""

    def lookup(self, address: Address) -> str | None:
        """The user whose mailbox takes mail for an address."""


class MaildirTransport:
    """The transport "local"; satisfies `mtad.delivery.transport.Transport`."""

    def __init__(self, mail_root: str, hostname: str, users: Users) -> None:
        """``mail_root`` has one Maildir per user; ``hostname`` ends the files' names."""
        self._mail_root = mail_root
        # maildir(5): a host name in a file name has neither of these.
        self._host = hostname.replace("/", r"\057").replace(":", r"\072")
        self._users = users
        # Not from 1: where a clock was set back and a process id comes again, a name must not, for a rename would replace.
        self._counter = itertools.count(int.from_bytes(os.urandom(4)))

    def deliver(self, task: Task, content: Content, in_doubt: Callable[[str], None]) -> Sequence[Attempt]:
        """Store one copy for each recipient; see `mtad.delivery.transport.Transport`."""
        started = time.time()
        clock = time.monotonic()
        in_doubt("local")
        outcomes: list[tuple[int, Outcome]] = []
        try:
            for index in task.recipients:
                outcomes.append((index, self._deliver_one(task.envelope, index, content)))
        except Exception as fault:
            if not outcomes or isinstance(fault, QueueFileDamaged):
                raise
            raise Interrupted(fault, [Attempt(started, tuple(outcomes), host="local")]) from fault  # those before have it
        return [Attempt(started, tuple(outcomes), host="local", transmission=time.monotonic() - clock)]

    def _deliver_one(self, envelope: Envelope, index: int, content: Content) -> Outcome:
        recipient = envelope.recipients[index].address
        local, _, domain = recipient.rpartition("@")
        user = self._users.lookup(Address(_unquote(local), domain))
        if user is None:
            return Failed("5.1.1", f'unknown user: "{recipient}"')
        trace = f"Return-Path: <{envelope.sender}>\r\nDelivered-To: {recipient}\r\n".encode()
        # In a BINARYMIME body a CRLF may be anything (RFC 3030 section 3).
        line_end = b"\r\n" if envelope.body == "binarymime" else b"\n"
        try:
            self._store(user, itertools.chain([trace], content.chunks()), line_end)
        except OSError as fault:
            reason = f"cannot store in the mailbox of {user}: {fault.strerror or fault}"
            return Deferred(_STATUS.get(fault.errno or 0, "4.2.0"), reason)
        return Delivered("2.0.0", "delivered to maildir")

    def _store(self, user: str, chunks: Iterator[bytes], line_end: bytes) -> None:
        name = self._unique_name()
        mailbox = self._open_mailbox(user)
        try:
            _expect_ours(mailbox)
            tmp, new = _open_parts(mailbox)
        finally:
            os.close(mailbox)
        try:
            _expect_ours(tmp)
            _expect_ours(new)
            self._write(name, tmp, new, chunks if line_end == b"\r\n" else to_unix_lines(chunks))
        finally:
            os.close(tmp)
            os.close(new)

    def _write(self, name: str, tmp: int, new: int, pieces: Iterator[bytes]) -> None:
        fd = os.open(name, _FILE, 0o600, dir_fd=tmp)
        try:
            try:
                pending: list[bytes] = []
                for piece in pieces:
                    pending.append(piece)
                    if len(piece) > 32768:
                        write_all(fd, b"".join(pending))
                        pending.clear()
                write_all(fd, b"".join(pending))
                flush(fd)
            finally:
                os.close(fd)
            os.rename(name, name, src_dir_fd=tmp, dst_dir_fd=new)
        except BaseException:
            try:
                os.unlink(name, dir_fd=tmp)
            except OSError:
                pass  # the disk that refused to store may refuse this, too; tmp/ is swept by mail readers
            raise
        try:
            flush(new)
        except OSError:
            # It counts as not delivered, and comes again: what nobody has read yet must not be there twice then.
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=new)
            raise

    def _open_mailbox(self, user: str) -> int:
        try:
            return os.open(os.path.join(self._mail_root, user), _DIRECTORY)
        except FileNotFoundError:
            _make_root(self._mail_root)
        root = os.open(self._mail_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return _open_directory(user, root)
        finally:
            os.close(root)

    def _unique_name(self) -> str:
        seconds, fraction = divmod(time.time_ns() // 1000, 1_000_000)
        # next() of a count is one step of the interpreter: all threads of the process share it without a lock.
        return f"{seconds}.M{fraction}P{os.getpid()}Q{next(self._counter)}.{self._host}"


def _make_root(path: str) -> None:
    """Make the directory of all mailboxes, and those above it, with their names on stable storage."""
    missing = []
    while path and not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            pass  # another delivery was faster
        parent = os.open(os.path.dirname(directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flush(parent)
        finally:
            os.close(parent)


def _expect_ours(directory: int) -> None:
    """Go on if an open directory is ours or root's.

    Raises:
        PermissionError: it is not.
    """
    if os.fstat(directory).st_uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, "a directory of it belongs to another user")


def _open_parts(mailbox: int) -> tuple[int, int]:
    """``tmp`` and ``new`` of a mailbox, made when they are missing, and ``cur`` with them."""
    try:
        tmp = os.open("tmp", _DIRECTORY, dir_fd=mailbox)
    except FileNotFoundError:
        os.close(_open_directory("cur", mailbox))
        os.close(_open_directory("new", mailbox))
        tmp = _open_directory("tmp", mailbox)  # last, so that a mailbox which has it has all three
    try:
        return tmp, _open_directory("new", mailbox)
    except BaseException:
        os.close(tmp)
        raise


def _open_directory(name: str, parent: int) -> int:
    """Open a directory below an open one, making it (and its name durable) when it is missing."""
    try:
        return os.open(name, _DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            pass  # another delivery was faster
        flush(parent)
        return os.open(name, _DIRECTORY, dir_fd=parent)


def _unquote(local: str) -> str:
    if not local.startswith('"'):
        return local
    plain = []
    characters = iter(local[1:-1])
    for character in characters:
        plain.append(next(characters, "") if character == "\\" else character)
    return "".join(plain)


def to_unix_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """CRLF to LF, wherever the pieces are cut; a CR alone stays."""
    held = b""
    for chunk in chunks:
        data = held + chunk if held else chunk
        held = b""
        if data.endswith(b"\r"):
            data, held = data[:-1], b"\r"
        yield data.replace(b"\r\n", b"\n")
    if held:
        yield held
