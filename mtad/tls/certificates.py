"""Certificates and keys in files: what is in them, whether they belong together, and how to make one.

What it is for: the server chooses among its certificates by their names; `mtad check` says what is wrong with one before a
client finds out; a run without a configuration makes its own.

Invariants: a private key that is written here is readable for its owner only from the first moment on. Nothing here keeps
or tells a key.

Errors: `CertificateFault` is the administrator's: a file that cannot be read, or does not hold what it should; the text
names the file. OSError from `make_self_signed` is the world's.

Standards: RFC 5280 (certificates), RFC 6125 section 6.4 (names), RFC 5929 section 4.1 (tls-server-end-point).
"""

from __future__ import annotations

import os
import warnings
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mtad.errors import MtadError

# Certificates of strangers, and some of the world's roots, break RFC 5280 in small ways: nothing that our user could mend.
warnings.filterwarnings("ignore", category=CryptographyDeprecationWarning)

#: What asking a certificate that was read raises when a piece of it is wrong.
_DAMAGED: Final = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    x509.InvalidVersion,
)
#: How long a certificate that we made ourselves lasts: for development, where nobody renews it.
_SELF_SIGNED_DAYS: Final = 3650


class CertificateFault(MtadError):
    """A certificate or key cannot be used. ``of_key``: the fault is the key's."""

    def __init__(self, reason: str, *, of_key: bool = False) -> None:
        super().__init__(reason)
        self.of_key = of_key


class Pair(msgspec.Struct, frozen=True):
    """The paths of a certificate chain, the host's own first, and of its private key; both in PEM."""

    certificate: str
    key: str


class Certificate(msgspec.Struct, frozen=True):
    """What is in a certificate."""

    names: tuple[str, ...]
    """The host names it is for, in lower case, such as ``*.example.org``."""
    not_before: float
    """In seconds since the epoch, as all times."""
    not_after: float
    end_point: bytes
    """The channel binding ``tls-server-end-point``; ``b""`` when the signature has no hash to make it with."""


def inspect(pair: Pair) -> Certificate:
    """Read a certificate and its key.

    Raises:
        CertificateFault: one cannot be read, or they do not belong together.
    """
    try:
        leaf = x509.load_pem_x509_certificates(_read(pair.certificate))[0]
    except (ValueError, x509.InvalidVersion):
        raise CertificateFault(f"{pair.certificate}: no certificate in PEM") from None
    try:
        key = serialization.load_pem_private_key(_read(pair.key, of_key=True), None)
    except TypeError:
        raise CertificateFault(f"{pair.key}: needs a passphrase, and nobody is there to give it", of_key=True) from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateFault(f"{pair.key}: no private key in PEM", of_key=True) from None
    try:
        public = _public(leaf.public_key())
        certificate = Certificate(
            _names(leaf), leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp(), _hash(leaf)
        )
    except _DAMAGED as fault:  # read on demand, piece by piece
        raise CertificateFault(f"{pair.certificate}: damaged, or of a kind that is not known here: {fault}") from None
    if _public(key.public_key()) != public:
        raise CertificateFault(f"{pair.key}: is not the key of {pair.certificate}", of_key=True)
    return certificate


def read_authorities(path: str) -> int:
    """How many certificates a file has that others can lead to.

    Raises:
        CertificateFault: it cannot be read, or has none.
    """
    try:
        return len(x509.load_pem_x509_certificates(_read(path)))
    except (ValueError, x509.InvalidVersion):
        raise CertificateFault(f"{path}: no certificate in PEM") from None


def end_point(der: bytes) -> bytes:
    """The channel binding ``tls-server-end-point`` of a certificate (RFC 5929 section 4.1); ``b""`` when it has none."""
    try:
        return _hash(x509.load_der_x509_certificate(der))
    except _DAMAGED:
        return b""


def make_self_signed(pair: Pair, hostname: str, now: float) -> None:
    """Make a key and a certificate for ``hostname`` and ``localhost``, signed by itself, and write both; mode 0600.

    Raises:
        OSError: a file cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hostname[:64])])
    begin = datetime.fromtimestamp(now, UTC) - timedelta(days=1)  # for clocks that are slow
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=_SELF_SIGNED_DAYS))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(one) for one in dict.fromkeys((hostname, "localhost"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(pair.key, private)
    _write(pair.certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _read(path: str, *, of_key: bool = False) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CertificateFault(f"{path}: {error.strerror}", of_key=of_key) from None


def _write(path: str, data: bytes) -> None:
    """Put a file there as a whole, never half of it."""
    draft = f"{path}.{os.getpid()}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(draft, path)


def _public(key: object) -> bytes:
    assert hasattr(key, "public_bytes")
    data: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return data


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    """The names by which a client may ask for it; the common name only when it has none of the newer sort."""
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = alternatives.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, ValueError):
        names = []
    if not names:
        names = [str(one.value) for one in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return tuple(dict.fromkeys(name.lower() for name in names))


def _hash(certificate: x509.Certificate) -> bytes:
    """RFC 5929 section 4.1: with the hash of the signature; SHA-256 in place of MD5 and SHA-1; undefined without a hash."""
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return b""
    if algorithm is None:
        return b""
    weak = isinstance(algorithm, hashes.MD5 | hashes.SHA1)
    return certificate.fingerprint(hashes.SHA256() if weak else algorithm)
