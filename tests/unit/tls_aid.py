"""Certificates of every kind, and two ends of a connection that shake hands."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from mtad.net.connection import Connection
from mtad.tls.certificates import Pair
from mtad.tls.connection import TlsConnection, TlsFailed
from mtad.tls.server import ServerTls

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | Ed25519PrivateKey
T = TypeVar("T")
R = TypeVar("R")

#: Seconds that anything here may take.
PATIENCE: Final = 10.0


class Issued(NamedTuple):
    """A certificate with its key, and what signs with it."""

    certificate: x509.Certificate
    key: Key

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def write(self, directory: Path, name: str = "cert", chain: Iterable[Issued] = ()) -> Pair:
        """Put it into files, and the certificates of ``chain`` behind it."""
        certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
        key.touch(mode=0o600)
        key.write_bytes(self.key_pem)
        certificate.write_bytes(self.pem + b"".join(above.pem for above in chain))
        return Pair(str(certificate), str(key))


def new_key(kind: Literal["ec", "rsa", "ed25519"] = "ec") -> Key:
    """A private key."""
    if kind == "ec":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(65537, 2048) if kind == "rsa" else Ed25519PrivateKey.generate()


def issue(
    *names: str | x509.GeneralName,
    by: Issued | None = None,
    common_name: str = "",
    ca: bool = False,
    days: tuple[int, int] = (-1, 30),
    key: Key | None = None,
) -> Issued:
    """A certificate.

    Args:
        names: alternative names; a text is a DNS name.
        by: who signs; by itself without.
        common_name: of the subject.
        ca: whether it may sign others.
        days: from when until when it is valid, counted from today.
        key: else a new one.
    """
    key = key or new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])
    now = datetime.now(UTC)
    signer = by.key if by else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.certificate.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if ca:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    if names:
        general = [x509.DNSName(name) if isinstance(name, str) else name for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=not common_name)
    algorithm = None if isinstance(signer, Ed25519PrivateKey) else hashes.SHA256()
    return Issued(builder.sign(signer, algorithm), key)


def authority(name: str = "Test CA", by: Issued | None = None) -> Issued:
    """Somebody who signs."""
    return issue(common_name=name, ca=True, by=by)


def ends() -> tuple[Connection, Connection]:
    """The server's and the client's end of one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, peer = listener.accept()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(far, *peer), Connection(near, *near.getpeername())


def bare_ends() -> tuple[Connection, socket.socket]:
    """The server's end, and the client's bare socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname(), PATIENCE)
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far, peer = listener.accept()
    return Connection(far, *peer), near


def at_once(
    server: Callable[[], TlsConnection], client: Callable[[], T], failed: Callable[[], None] = lambda: None
) -> tuple[TlsConnection | Exception, T | Exception]:
    """Both sides of a handshake at the same time; what each gave or raised. ``failed`` is called when the server did."""

    def catch(call: Callable[[], R], failed: Callable[[], None]) -> R | Exception:
        try:
            return call()
        except Exception as error:
            failed()
            return error

    with ThreadPoolExecutor(2) as pool:
        theirs = pool.submit(catch, client, lambda: None)
        ours = pool.submit(catch, server, failed)
        return ours.result(PATIENCE), theirs.result(PATIENCE)


def python_client(
    near: socket.socket,
    *,
    name: str | None = None,
    version: ssl.TLSVersion | None = None,
    ciphers: str = "",
    adjust: Callable[[ssl.SSLContext], None] | None = None,
) -> ssl.SSLSocket:
    """Python's own TLS as the client, which checks nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if version is not None:
        context.minimum_version = context.maximum_version = version
    if ciphers:
        context.set_ciphers(ciphers)
    if adjust:
        adjust(context)
    return context.wrap_socket(near, server_hostname=name)


class Session(NamedTuple):
    """Both ends after a handshake; the client is Python's."""

    ours: TlsConnection
    theirs: ssl.SSLSocket

    @property
    def certificate(self) -> x509.Certificate:
        der = self.theirs.getpeercert(True)
        assert der is not None
        return x509.load_der_x509_certificate(der)


class Greeting:
    """Opens sessions, and closes them at the end."""

    def __init__(self) -> None:
        self._open: list[Connection | TlsConnection | socket.socket] = []

    def __call__(self, server: ServerTls, client: Callable[[socket.socket], ssl.SSLSocket] = python_client) -> Session:
        far, near = bare_ends()
        ours, theirs = at_once(partial(server.handshake, far, 5.0), partial(client, near))
        self._open += [far, near]
        if isinstance(theirs, ssl.SSLSocket):
            self._open.append(theirs)
        if isinstance(ours, TlsConnection):
            self._open.append(ours)
        for end in (ours, theirs):
            if isinstance(end, Exception):
                raise end
        assert isinstance(theirs, ssl.SSLSocket)
        assert isinstance(ours, TlsConnection)
        return Session(ours, theirs)

    def failing(self, server: ServerTls, client: Callable[[socket.socket], object], timeout: float = 5.0) -> TlsFailed:
        """What the server says of a client that does something else."""
        far, near = bare_ends()
        self._open += [far, near]
        ours, _ = at_once(partial(server.handshake, far, timeout), partial(client, near), far.close)
        assert isinstance(ours, TlsFailed), ours
        return ours

    def close(self) -> None:
        for one in self._open:
            one.close()
