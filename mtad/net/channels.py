"""How the processes of one server, and its commands, talk to each other on this machine.

- `packet_pair`: two ends of a channel that keeps message boundaries (scheduler and delivery process).
- `Mailslot`: a named socket for datagrams (the scheduler's, for `mtad-flush`).
- `Counter`: a named socket where one question gets one answer (the master's, for `mtad status`).
- `mtad.net.desk`: the same with questions that say something (the scheduler's, for `mtaq`).
- `WakePipe`: from the receivers to the scheduler, about each new message.
- `Lifeline`: from the master to its children, about its death.
- `notify`: the service manager's socket (sd_notify).

Socket names are limited to some hundred octets; the directory is opened and named by its descriptor instead.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: The longest packet that we send: a job with 50 recipients, and the answer to it with 50 outcomes, stay far below.
MAX_PACKET: Final = 192 * 1024
#: What the wake-up pipe holds, in octets: the most that Linux gives to unprivileged users by default.
_PIPE_SIZE: Final = 1024 * 1024
#: How long a question of `mtad status` may take.
ANSWER_TIMEOUT: Final = 5.0
#: Seconds of rest when there is no descriptor for a visitor.
_OUT_OF_RESOURCES: Final = 0.1

PacketSocket = socket.socket


def packet_pair() -> tuple[PacketSocket, PacketSocket]:
    """Two connected ends; each send arrives as one recv, and the end of one is an empty recv at the other."""
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (first, second):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_PACKET)
    return first, second


class PacketRoom:
    """Room for the largest packet, for one thread; of the memory that it names it takes only what was ever written into.

    A `recv` of `MAX_PACKET` octets would make such an object for each small packet, anywhere between the others, until most
    of the memory that they ever had been in is in use: delivery processes grew by that, ever more slowly, for hours.
    """

    def __init__(self) -> None:
        """Nothing is in it."""
        self._room = memoryview(mmap.mmap(-1, MAX_PACKET, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def receive(self, channel: PacketSocket) -> bytes:
        """The next packet; b"" when the other end is closed.

        Raises:
            OSError: as recv(2); BlockingIOError when nothing is there, and the channel does not wait.
        """
        return bytes(self._room[: channel.recv_into(self._room)])


def wait_at_most(channel: PacketSocket, seconds: float) -> None:
    """Let whoever reads from it wait no longer than that at a time, and then get a BlockingIOError."""
    timeval = struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)


def hung_up(channel: PacketSocket) -> bool:
    """Whether the other end is closed, also while packets lie there still."""
    line = select.poll()
    line.register(channel, select.POLLRDHUP)
    return bool(line.poll(0))


@contextmanager
def short_name(path: str) -> Iterator[str]:
    directory = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def bind(path: str, kind: int) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        with short_name(path) as name:
            bound.bind(name)
        os.chmod(path, 0o600)
    except BaseException:
        bound.close()
        raise
    return bound


class Mailslot:
    """A named socket for datagrams, which may be lost: whoever sends does not wait."""

    def __init__(self, path: str) -> None:
        """Bind to ``path``; one that a dead process left behind is replaced.

        Raises:
            OSError: it cannot be made.
        """
        self._socket = bind(path, socket.SOCK_DGRAM)

    def fileno(self) -> int:
        """For a poll."""
        return self._socket.fileno()

    def receive(self) -> bytes | None:
        """The next datagram, None when there is none."""
        try:
            return self._socket.recv(MAX_PACKET)
        except BlockingIOError:
            return None

    def close(self) -> None:
        """Close this process's descriptor."""
        self._socket.close()

    @staticmethod
    def send(path: str, data: bytes) -> bool:
        """Send a datagram to the socket at ``path``; False when nobody listens there, or not fast enough."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(ANSWER_TIMEOUT)
            try:
                with short_name(path) as name:
                    sender.sendto(data, name)
            except OSError:
                return False
        return True


class Counter:
    """A named socket where whoever connects gets one answer."""

    def __init__(self, path: str) -> None:
        """Bind to ``path``; one that a dead process left behind is replaced.

        Raises:
            OSError: it cannot be made.
        """
        self._socket = bind(path, socket.SOCK_STREAM)
        self._socket.listen(16)

    def fileno(self) -> int:
        """For a poll."""
        return self._socket.fileno()

    def answer(self, data: bytes) -> None:
        """Give ``data`` to the next one in the line. The master must not wait: what does not fit the buffer is cut."""
        try:
            visitor, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor: the visitor is still there, and must not keep us busy
            time.sleep(_OUT_OF_RESOURCES)
            return
        with visitor:
            visitor.setblocking(False)
            try:
                visitor.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(data) + MAX_PACKET)
                visitor.send(data)
            except OSError:
                pass  # the visitor has gone

    def close(self) -> None:
        """Close this process's descriptor."""
        self._socket.close()

    @staticmethod
    def ask(path: str) -> bytes | None:
        """The answer of the counter at ``path``; None when nobody answers there."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as visitor:
            visitor.settimeout(ANSWER_TIMEOUT)
            try:
                with short_name(path) as name:
                    visitor.connect(name)
                parts = []
                while data := visitor.recv(MAX_PACKET):
                    parts.append(data)
            except OSError:
                return None
        return b"".join(parts)


def notify(state: str) -> None:
    """Tell the service manager, when there is one: ``READY=1`` and the like (sd_notify(3), NOTIFY_SOCKET)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    if path.startswith("@"):
        path = "\0" + path[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(state.encode(), path)
    except OSError:
        pass  # a service manager that went away, or no descriptor for it, is no reason to stop


def end_sending(channel: PacketSocket) -> None:
    """Say that nothing more will be sent; the other end reads it as the end, and may still send."""
    try:
        channel.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other end is gone already


class WakePipe:
    """The way from the receivers to the scheduler: lines, whole or not at all, and nobody ever waits.

    Made by the master and inherited, so a new scheduler reads on where the one before it died. A line that does not fit
    what POSIX writes in one piece is replaced by its queue id; one that finds the pipe full is lost, and the scan finds
    the message.
    """

    def __init__(self) -> None:
        """A pipe that holds some thousand lines.

        Raises:
            OSError: no descriptors are left.
        """
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.fcntl(self._write, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:
            pass  # above the limit for unprivileged users: it holds fewer
        self._rest = b""

    def fileno(self) -> int:
        """For a poll, in the scheduler."""
        return self._read

    def send(self, queue_id: str, line: bytes) -> None:
        """Tell the scheduler about a committed message."""
        if len(line) > select.PIPE_BUF:
            line = b"%s\n" % queue_id.encode()
        try:
            os.write(self._write, line)
        except OSError:
            pass  # full, or nobody reads: the scan finds it

    def receive(self) -> list[bytes]:
        """The lines that have come, without line feeds: heads, or bare queue ids."""
        try:
            data = os.read(self._read, MAX_PACKET)
        except BlockingIOError:
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines


class Lifeline:
    """A pipe of which only the master holds the writing end: when it can be read, the master is gone."""

    def __init__(self) -> None:
        """Make it, in the master."""
        self._read, self._write = os.pipe2(os.O_CLOEXEC)

    def fileno(self) -> int:
        """For a poll, in a child: readable at the master's end."""
        return self._read

    def hold(self) -> None:
        """To be called in each child after the fork."""
        os.close(self._write)
