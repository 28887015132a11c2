"""An SMTP client that does what its test says, octet by octet, and nothing by itself.

with Client(site.address()) as client:
    assert client.reply() == "220 mx.example.org ESMTP mtad"
    assert client.say("EHLO client.test").startswith("250-")
"""

from __future__ import annotations

import socket
import struct
import time
from types import TracebackType
from typing import Final, Self

#: Seconds that a reply may take.
PATIENCE: Final = 20.0


class Client:
    """One connection; a context manager that closes it."""

    def __init__(self, address: tuple[str, int], source: str = "", timeout: float = PATIENCE) -> None:
        """Connect, from the address ``source`` when one is given."""
        self.socket = socket.create_connection(address, timeout, (source, 0) if source else None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.socket.close()

    def __del__(self) -> None:
        # A test that has failed already need not be told that it left its connections open.
        if hasattr(self, "socket"):
            self.socket.close()

    def send(self, data: bytes) -> None:
        """Send octets; that the server has closed already is found out by reading."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def line(self) -> bytes:
        """The next line, without CRLF.

        Raises:
            EOFError: the server has closed the connection.
        """
        while b"\r\n" not in self._unread:
            data = self._receive()
            if not data:
                raise EOFError
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\r\n")
        return line

    def reply(self) -> str:
        """The next reply, its lines joined by line feeds; "" when the server has closed instead."""
        lines = []
        try:
            while True:
                lines.append(self.line().decode())
                if lines[-1][3:4] != "-":
                    return "\n".join(lines)
        except EOFError:
            return "\n".join(lines)

    def say(self, line: str) -> str:
        """Send a line; the reply to it."""
        self.send(line.encode() + b"\r\n")
        return self.reply()

    def begin(self, *lines: str) -> Self:
        """Read the greeting and say each of ``lines``, all of which must be taken."""
        for line in ("", *lines):
            answer = self.say(line) if line else self.reply()
            assert answer[:1] in {"2", "3"}, f"{line}: {answer}"
        return self

    def closed(self) -> bool:
        """Whether the server has closed the connection, with nothing left to read; waits for it."""
        return not self._unread and not self._receive()

    def seconds_until_closed(self) -> float:
        """How long it takes from now."""
        before = time.monotonic()
        assert self.closed(), "the server said something instead"
        return time.monotonic() - before

    def quiet(self, seconds: float = 0.1) -> bool:
        """Whether nothing comes within that time."""
        self.socket.settimeout(seconds)
        try:
            return not self._unread and not self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(PATIENCE)

    def reset(self) -> None:
        """End the connection with a RST instead of in order."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(65536)
        except ConnectionResetError:
            return b""


def is_refused(address: tuple[str, int]) -> bool:
    """Whether nobody listens there."""
    try:
        Client(address).socket.close()
    except ConnectionRefusedError:
        return True
    return False
