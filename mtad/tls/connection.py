"""An encrypted connection: the methods of `mtad.net.connection.Stream`, TLS underneath, the same for both roles.

What it is for: sessions and transports need not know whether a connection is encrypted. OpenSSL never sees the socket. It
turns octets into octets in memory, and a `Connection` moves them, so that all that a `Connection` promises about time holds
here as well: a handshake, a `receive` and a `send` each end within their time-out, however slowly the peer feeds octets.

Invariants: nothing that came in clear text is read as if it came through TLS, and nothing after the peer's close_notify is
read at all. Renegotiation, compression and early data (0-RTT) are off; the versions are TLS 1.2 and 1.3 (RFC 8996, RFC
9325). What the octets of one `send` become leaves in as few system calls as the clear text would.

Errors: `TlsFailed` from a handshake, whatever its reason, with `TlsFailed.timed_out` and `TlsFailed.unverified` to tell the
reasons apart; the peer is sent the alert first, and the connection is good for `close` only. Later faults (a damaged
record, an alert) are `ConnectionLost`, with `TimedOut` as in clear text. A peer that hangs up without close_notify ends the
stream like any other, ``b""``, and `TlsConnection.truncated` tells: what was incomplete then must not be taken for
complete (RFC 8446 section 6.1).

Channel bindings: Python's ssl does not export keying material, so that ``tls-exporter`` (RFC 9266) cannot be offered. There
are ``tls-server-end-point`` for every version and ``tls-unique`` for TLS 1.2 (both RFC 5929).

Standards: RFC 8446, RFC 5246, RFC 5929, RFC 9325.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from threading import Lock
from time import monotonic
from typing import Final

from mtad.errors import MtadError
from mtad.net.connection import SHORTEST, Connection, ConnectionLost, TimedOut

#: Octets of clear text that are encrypted before they are handed on: 16 records of 16 KiB (RFC 8446 section 5.1).
_PIECE: Final = 256 * 1024

#: Octets of records that are taken at a time, once the first of one have come.
_RECORDS: Final = 65536

#: Seconds for an alert or a close_notify to be taken: there is room in the buffer, or the peer is dead.
_FAREWELL: Final = 0.01

#: What the SCRAM mechanisms know a connection by: the names of the bindings (RFC 5929), and their octets.
ChannelBindings = Mapping[str, bytes]
EndPoint = Callable[[ssl.SSLObject], bytes]
Verify = Callable[[ssl.SSLObject], bool]


class TlsFailed(MtadError):
    """No encrypted connection came about; the text is the reason.

    ``timed_out``: the peer was too slow. ``unverified``: its certificate is the reason, all else was well.
    """

    def __init__(self, reason: str, *, timed_out: bool = False, unverified: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out
        self.unverified = unverified


class TlsConnection:
    """An encrypted connection. See `mtad.net.connection.Stream`; made by `shake_hands`."""

    __slots__ = (
        "_closed",
        "_connection",
        "_end_point",
        "_ended",
        "_incoming",
        "_lock",
        "_object",
        "_outgoing",
        "_verify",
        "address",
        "bits",
        "cipher",
        "port",
        "tls",
        "truncated",
        "version",
    )

    def __init__(
        self,
        connection: Connection,
        context: ssl.SSLContext,
        server_name: str | None,
        *,
        server: bool,
        end_point: EndPoint,
        verify: Verify | bool,
    ) -> None:
        """No octet is exchanged yet: see `shake_hands`."""
        self._connection = connection
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=server, server_hostname=server_name)
        # OpenSSL's objects must not be entered by two threads, and `close` may come from another one.
        self._lock = Lock()
        self._closed = True
        self._ended = False
        self._end_point = end_point
        self._verify = verify
        self.address = connection.address
        self.port = connection.port
        self.tls = ""
        #: ``TLSv1.2`` or ``TLSv1.3``.
        self.version = ""
        #: The cipher's name, and the length of its key.
        self.cipher = ""
        self.bits = 0
        #: Whether the peer hung up without saying that it was done.
        self.truncated = False

    @property
    def local(self) -> tuple[str, int]:
        """Our own address and port; ("", 0) once the connection is closed."""
        return self._connection.local

    @property
    def verified(self) -> bool:
        """Whether the server's certificate is trusted and has the server's name; found out when first asked.

        Without meaning for the server's own end, which does not ask clients for certificates.
        """
        if not isinstance(self._verify, bool):
            self._verify = self._verify(self._object)
        return self._verify

    @property
    def channel_bindings(self) -> ChannelBindings:
        """What SCRAM-...-PLUS may bind to: ``tls-server-end-point``, with TLS 1.2 ``tls-unique`` as well."""
        found: dict[str, bytes] = {}
        end_point = self._end_point(self._object)
        if end_point:
            found["tls-server-end-point"] = end_point
        # In TLS 1.3 there is a value, too, and it is worthless: RFC 9266 section 3.
        unique = self._object.get_channel_binding("tls-unique") if self.version == "TLSv1.2" else None
        if unique:
            found["tls-unique"] = unique
        return found

    def fileno(self) -> int:
        """The descriptor, for select and poll; -1 when closed."""
        return self._connection.fileno()

    def receive(self, timeout: float, limit: int = 65536) -> bytes:
        """See `Stream.receive`. At most one record, 16 KiB, at a time.

        Raises:
            TimedOut: no record was complete within ``timeout`` seconds.
            ConnectionLost: the connection broke, or what came is not TLS.
        """
        if self._ended:
            return b""
        end = monotonic() + timeout
        remaining = timeout
        much = limit  # who waits for little holds a small buffer
        while True:
            if self._incoming.pending or self._object.pending():
                data = self._decrypt(limit)
                if self._outgoing.pending:  # the answer to a KeyUpdate (RFC 8446 section 4.6.3)
                    self._flush(max(_FAREWELL, end - monotonic()))
                if data is not None:
                    self._ended = not data
                    return data
                remaining = end - monotonic()
                if remaining <= 0:
                    raise TimedOut("no record came to its end in time")
            raw = self._connection.receive(remaining, much)
            much = _RECORDS
            if not raw:
                self._ended = self.truncated = True
                return b""
            self._incoming.write(raw)

    def send(self, data: bytes, timeout: float) -> None:
        """See `Stream.send`.

        Raises:
            TimedOut: not all of it was taken within ``timeout`` seconds.
            ConnectionLost: the connection broke.
        """
        if len(data) <= _PIECE:
            self._encrypt(data)
            self._flush(timeout)
            return
        end = monotonic() + timeout
        rest = memoryview(data)
        while rest:
            self._encrypt(rest[:_PIECE])
            self._flush(max(0.0, end - monotonic()))
            rest = rest[_PIECE:]

    def close(self) -> None:
        """See `Stream.close`. Says close_notify first, unless another thread is at work on the connection."""
        if not self._closed and self._lock.acquire(blocking=False):
            self._closed = True
            try:
                self._object.unwrap()
            except ssl.SSLError:
                pass  # the peer has not said it yet, which is nothing to wait for, or the connection is broken anyway
            finally:
                self._lock.release()
            self._say_farewell()
        self._connection.close()

    def shutdown(self) -> None:
        """End a connection that another thread may be waiting on: its call returns or raises at once."""
        self._connection.shutdown()

    def stop_reading(self) -> None:
        """Let a thread that waits in `receive`, now or later, find the end; it can still send a last word."""
        self._connection.stop_reading()

    def _decrypt(self, limit: int) -> bytes | None:
        """The content of the next record, ``b""`` after close_notify, or None when it is not complete yet."""
        try:
            with self._lock:
                return self._object.read(limit)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLError as error:
            self._ended = self.truncated = True
            self._say_farewell()
            raise ConnectionLost(_reason(error)) from None

    def _encrypt(self, data: bytes | memoryview) -> None:
        try:
            with self._lock:
                written = self._object.write(data) if data else 0
                while written < len(data):
                    written += self._object.write(memoryview(data)[written:])
        except ssl.SSLError as error:
            raise ConnectionLost(_reason(error)) from None

    def _flush(self, timeout: float) -> None:
        with self._lock:
            data = self._outgoing.read()
        if data:
            self._connection.send(data, timeout)

    def _say_farewell(self) -> None:
        """Hand over a last alert; nobody may be there to take it."""
        try:
            self._flush(_FAREWELL)
        except MtadError:
            pass  # gone already

    def _handshake(self, timeout: float) -> None:
        end = monotonic() + timeout
        remaining = timeout
        done = False
        while True:
            try:
                self._object.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                pass
            self._flush(max(SHORTEST, end - monotonic()))
            if done:
                break
            raw = self._connection.receive(remaining)
            if not raw:
                raise ConnectionLost("lost connection")
            self._incoming.write(raw)
            remaining = end - monotonic()
            if remaining <= 0:
                raise TimedOut("too slow")
        # The version beside the cipher's name is the one that brought the cipher, not the one that is spoken.
        self.cipher, _, self.bits = self._object.cipher() or ("", "", 0)
        self.version = self._object.version() or ""
        self.tls = f"{self.version} with cipher {self.cipher} ({self.bits}/{self.bits} bits)"
        self._closed = False


def shake_hands(
    connection: Connection,
    context: ssl.SSLContext,
    timeout: float,
    *,
    server: bool,
    server_name: str | None = None,
    end_point: EndPoint,
    verify: Verify | bool = False,
) -> TlsConnection:
    """Shake hands within ``timeout`` seconds, all of it; ``connection`` belongs to the result from then on.

    Args:
        connection: nothing of the peer's TLS may have been read from it.
        context: which certificates, ciphers and checks.
        timeout: in seconds.
        server: which role is ours.
        server_name: whom a client asks for.
        end_point: gives the octets of ``tls-server-end-point`` of a finished handshake, ``b""`` for none.
        verify: whether the server's certificate is what it should be, or how to find out.

    Raises:
        TlsFailed: it failed, or took too long.
    """
    secured = TlsConnection(connection, context, server_name, server=server, end_point=end_point, verify=verify)
    try:
        secured._handshake(timeout)
    except ssl.SSLCertVerificationError as error:
        secured._say_farewell()
        raise TlsFailed(f"certificate not verified: {error.verify_message}", unverified=True) from None
    except ssl.SSLError as error:
        secured._say_farewell()
        raise TlsFailed(_reason(error)) from None
    except TimedOut:
        raise TlsFailed("Connection timed out", timed_out=True) from None
    except ConnectionLost as error:
        raise TlsFailed(str(error)) from None
    return secured


def _reason(error: ssl.SSLError) -> str:
    """What OpenSSL found, in its words: ``wrong version number``, ``tlsv1 alert protocol version``."""
    return (error.reason or str(error)).replace("_", " ").lower()
