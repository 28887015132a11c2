"""One open TCP connection, blocking, with a time-out for each call; the same for both roles.

Speed decides the form. The time-outs are the kernel's own (SO_RCVTIMEO, SO_SNDTIMEO), set only when they change, so that a
`receive` is one system call; `socket.settimeout` would add a poll to each. Time-outs above `COARSE` are rounded up to whole
seconds for the same reason: a caller who counts down a deadline then changes the setting once a second, not once a call.

`Stream` is the seam to everything above: sessions and transports know its methods only, and a TLS connection is another
class with the same ones.

Invariants: a `send` that returns has handed over all of its bytes; one that raises has handed over an unknown part, and the
connection is good for `close` only. No call lasts longer than its time-out, however slowly the peer takes or gives bytes.
One thread uses a connection at a time; `close` may come from another.

Errors: `TimedOut`, `ConnectionLost` and `ConnectFailed` (the world's), texts in the words of strerror. A connection that
the peer closed in order is no error: `receive` returns ``b""``.
"""

from __future__ import annotations

import math
import os
import socket
import struct
from time import monotonic
from typing import Final, Protocol

from mtad.errors import MtadError

#: Seconds. Time-outs above it are rounded up to whole seconds.
COARSE: Final = 10.0

#: Seconds. The shortest time-out; 0 would mean "for ever" to the kernel.
SHORTEST: Final = 0.001

# struct timeval: seconds and microseconds, two longs on every platform with 64-bit time
_TIMEVAL: Final = struct.Struct("@ll")


class TimedOut(MtadError):
    """The peer did not give or take bytes in time."""


class ConnectionLost(MtadError):
    """The connection broke: reset by the peer, no route any more, or closed by us in another thread."""


class ConnectFailed(MtadError):
    """No connection came about; the text is the reason, such as ``Connection refused``."""


class Stream(Protocol):
    """What sessions and transports know of a connection."""

    address: str
    port: int
    tls: str
    """Protocol and cipher, or "" for clear text."""

    def receive(self, timeout: float, limit: int = 65536) -> bytes:
        """What has arrived, waiting up to ``timeout`` seconds for it; at most ``limit`` octets; ``b""`` at the end."""

    def send(self, data: bytes, timeout: float) -> None:
        """Hand over all of ``data`` within ``timeout`` seconds."""

    def shutdown(self) -> None:
        """End a connection that another thread may be waiting on; never raises."""

    def close(self) -> None:
        """Close; never raises, and may be called again."""


class Connection:
    """A TCP connection in clear text. See `Stream`."""

    __slots__ = ("_receive_timeout", "_send_timeout", "_socket", "address", "port", "tls")

    def __init__(self, connected: socket.socket, address: str, port: int) -> None:
        """Take over a connected socket, which becomes blocking; ``address`` and ``port`` are the peer's."""
        if connected.gettimeout() is not None:  # an accepted one blocks already; to say so again is a system call
            connected.settimeout(None)
        self._socket = connected
        self._receive_timeout = 0.0
        self._send_timeout = 0.0
        self.address = plain_address(address)
        self.port = port
        self.tls = ""

    @property
    def local(self) -> tuple[str, int]:
        """Our own address and port; ("", 0) once the connection is closed."""
        try:
            address, port = self._socket.getsockname()[:2]
        except OSError:
            return "", 0
        return plain_address(address), port

    def fileno(self) -> int:
        """The descriptor, for select and poll; -1 when closed."""
        return self._socket.fileno()

    def receive(self, timeout: float, limit: int = 65536) -> bytes:
        """See `Stream.receive`.

        Raises:
            TimedOut: nothing came within ``timeout`` seconds.
            ConnectionLost: the connection broke.
        """
        try:
            if timeout != self._receive_timeout:
                self._set_receive_timeout(timeout)
            return self._socket.recv(limit)
        except BlockingIOError:
            raise TimedOut(f"no data within {timeout:.0f} s") from None
        except OSError as error:
            raise ConnectionLost(reason(error)) from None

    def speaks(self, within: float) -> bool:
        """Whether the peer says anything within so many seconds, 0 for at once; it stays to be received."""
        try:
            if within > 0:
                self._set_receive_timeout(within)
                return bool(self._socket.recv(1, socket.MSG_PEEK))
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False  # nothing yet, or a connection whose end will be found by the next call

    def send(self, data: bytes, timeout: float) -> None:
        """See `Stream.send`. The time-out is for the whole, even when the peer takes it one octet at a time.

        Raises:
            TimedOut: not all of it was taken within ``timeout`` seconds.
            ConnectionLost: the connection broke.
        """
        end = monotonic() + timeout
        rest = memoryview(data)
        try:
            while True:
                if timeout != self._send_timeout:
                    self._set_send_timeout(timeout)
                sent = self._socket.send(rest)
                if sent == len(rest):
                    return
                # The kernel waited as long as it was told, or a signal came in between.
                rest = rest[sent:]
                timeout = end - monotonic()
                if timeout <= 0:
                    raise BlockingIOError
        except BlockingIOError:
            raise TimedOut(f"{len(rest)} octets not taken in time") from None
        except OSError as error:
            raise ConnectionLost(reason(error)) from None

    def close(self) -> None:
        """See `Stream.close`."""
        try:
            self._socket.close()
        except OSError:
            pass  # the peer was faster; closed it is

    def shutdown(self) -> None:
        """End a connection that another thread may be waiting on: its call returns or raises at once."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # not connected any more

    def stop_reading(self) -> None:
        """Let a thread that waits in `receive`, now or later, find the end; it can still send a last word."""
        try:
            self._socket.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # not connected any more

    def _set_receive_timeout(self, timeout: float) -> None:
        seconds = _rounded(timeout)
        if seconds != self._receive_timeout:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))
            self._receive_timeout = seconds

    def _set_send_timeout(self, timeout: float) -> None:
        seconds = _rounded(timeout)
        if seconds != self._send_timeout:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(seconds))
            self._send_timeout = seconds


def connect(address: str, port: int, timeout: float, source: str | None = None) -> Connection:
    """Connect to a numeric address within ``timeout`` seconds, from ``source`` when one is given.

    Nagle's algorithm is off (TCP_NODELAY): commands are small, and each waits for its reply.

    Raises:
        ConnectFailed: refused, out of reach, timed out, or not an address.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        )[0]
        connected = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConnectFailed(reason(error)) from None
    try:
        # A poll more than SO_SNDTIMEO would cost, but a signal cannot make it wait for ever.
        connected.settimeout(max(timeout, SHORTEST))
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if source is not None:
            connected.bind((source, 0))
        connected.connect(target)
        return Connection(connected, address, port)
    except OSError as error:
        connected.close()
        raise ConnectFailed(reason(error)) from None


def plain_address(address: str) -> str:
    """An address as logs show it: an IPv4 client on an IPv6 socket (``::ffff:192.0.2.1``) by its IPv4 address."""
    return address[7:] if address.startswith("::ffff:") and "." in address else address


def reason(error: OSError) -> str:
    """Why a call failed, as strerror says it: ``Connection refused``, ``Connection timed out``."""
    if isinstance(error, TimeoutError):
        return "Connection timed out"
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__


def _rounded(timeout: float) -> float:
    return float(math.ceil(timeout)) if timeout > COARSE else max(timeout, SHORTEST)


def _timeval(seconds: float) -> bytes:
    return _TIMEVAL.pack(*divmod(round(seconds * 1_000_000), 1_000_000))
