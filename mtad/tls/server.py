"""TLS of the server: certificates that may change while it runs, and the choice among them.

What it is for: `ServerTls` is made by the master before it forks, so that a certificate that cannot be used keeps the
server from starting, and is used by every session thread of every listener. Each process looks for changed files by
itself, once in `CHECK_INTERVAL` at most and only when there is a handshake.

Choice (SNI, RFC 6066 section 3): the certificate that has the name that the client asks for, else one with a wildcard in
place of the first label, else the first one; a name that is nonsense is a name that nobody has. Nobody is refused for it.
One that has expired proves no name: the next one in that order is served, and the first one whatever its age.

Invariants: a handshake uses the certificates as they were when it began. All pairs are exchanged together, or none.

Errors: `CertificateFault` when it is made; later a fault goes to ``warn``, once for each change, and what was read before
stays. `TlsFailed` from a handshake.

Ciphers: all with forward secrecy (RFC 9325 section 4.2). Those with CBC and SHA-1 are last: a sender that has nothing
better would send in clear text otherwise.

Standards: RFC 6066 section 3 (SNI), RFC 9325 (BCP 195), RFC 8996.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Final

from mtad.net.connection import Connection
from mtad.tls.certificates import Certificate, CertificateFault, Pair, inspect
from mtad.tls.connection import TlsConnection, shake_hands

#: How long, in seconds, a change of the files may go unnoticed.
CHECK_INTERVAL: Final = 1.0

_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AES:!aNULL:!eNULL:!AESCCM"

#: What tells one state of a file from another; None when there is none.
_Signature = tuple[int, ...] | None


class _Store:
    """Certificates that were read together. Never changed."""

    __slots__ = ("_by_name", "end_points", "first")

    def __init__(self, loaded: Sequence[tuple[ssl.SSLContext, Certificate]]) -> None:
        self.first = loaded[0][0]
        self.end_points = {id(context): certificate.end_point for context, certificate in loaded}
        self._by_name: dict[str, list[tuple[ssl.SSLContext, float]]] = {}
        for context, certificate in loaded:
            for name in certificate.names:
                self._by_name.setdefault(name, []).append((context, certificate.not_after))
        if len(loaded) > 1:
            self.first.sni_callback = self._choose

    def _choose(self, handshake: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        if name:
            name = name.lower()
            now = time.time()
            for known in (name, "*." + name.partition(".")[2]):
                for context, not_after in self._by_name.get(known, ()):
                    if now <= not_after:
                        handshake.context = context
                        return


class ServerTls:
    """The server's side of TLS. Thread-safe; a process with one thread may fork with it."""

    def __init__(self, pairs: Sequence[Pair], warn: Callable[[str], None]) -> None:
        """Read the certificates.

        Args:
            pairs: the first is for clients that do not say whom they want.
            warn: called with one line for a fault that is found later, and for a certificate that has expired.

        Raises:
            CertificateFault: one of them cannot be used.
        """
        self._pairs = tuple(pairs)
        self._warn = warn
        self._lock = Lock()
        self._told = ""
        self._signatures = self._look()
        self._store = self._load()
        self._checked = time.monotonic()

    def handshake(self, connection: Connection, timeout: float) -> TlsConnection:
        """The server's handshake, within ``timeout`` seconds.

        Raises:
            TlsFailed: it failed; ``connection`` is good for `close` only.
        """
        if time.monotonic() - self._checked >= CHECK_INTERVAL:
            self.refresh()
        store = self._store
        return shake_hands(
            connection,
            store.first,
            timeout,
            server=True,
            end_point=lambda handshake: store.end_points[id(handshake.context)],
        )

    def refresh(self) -> None:
        """Read files that have changed; while one thread is at it, the others go on with what there is."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._checked = time.monotonic()
            # Looked at before the reading: a change in between is then found by the next look.
            found = self._look()
            if found != self._signatures:
                self._signatures = ()  # until they could be read: tried again at the next look
                self._store = self._load()
                self._signatures = found
                self._told = ""
        except CertificateFault as fault:
            if str(fault) != self._told:
                self._told = str(fault)
                self._warn(f"{fault}; the certificates read before stay in use")
        finally:
            self._lock.release()

    def _load(self) -> _Store:
        loaded = []
        for pair in self._pairs:
            certificate = inspect(pair)
            loaded.append((_context(pair), certificate))
            if certificate.not_after < time.time():
                what = "another is served in its place" if loaded[1:] else "it is used all the same"
                self._warn(f"{pair.certificate}: has expired; {what}")
        return _Store(loaded)

    def _look(self) -> tuple[_Signature, ...]:
        return tuple(_signature(path) for pair in self._pairs for path in (pair.certificate, pair.key))


def _context(pair: Pair) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_ciphers(_CIPHERS)
    try:
        # A key with a passphrase must not make OpenSSL ask the terminal for it.
        context.load_cert_chain(pair.certificate, pair.key, password=lambda: b"")
    except OSError as error:  # ssl.SSLError is one
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        raise CertificateFault(f"{pair.certificate}: {str(reason).replace('_', ' ').lower()}") from None
    return context


def _signature(path: str) -> _Signature:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev)
