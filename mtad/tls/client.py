"""TLS of the client: with the checks that a security level asks for.

What it is for: *opportunistic* TLS encrypts with whoever answers, and any certificate will do, since the alternative is
clear text (RFC 7435); `TlsConnection.verified` tells whether the server could have proved itself. *Verified* TLS is for
mail that must not go to anybody else: the chain leads to a trusted authority, and the certificate has the name that was
asked for (RFC 6125): among its alternative names only, never the common name; a wildcard is the whole of the first label.

Authorities are those of the system, or those of a file. They are read when they are first needed, and again by a new
process only.

Errors: `TlsFailed`, also when the file of authorities cannot be read or the name is none.

Ciphers: verified TLS uses Python's choice, modern and with forward secrecy. Opportunistic TLS takes what OpenSSL takes at
its security level 1, which many an old mail server needs: a key of 1024 bits is worse than one of 2048, and better than
clear text.

Standards: RFC 6125 section 6.4, RFC 7435, RFC 9325, RFC 6066 section 3 (no SNI for addresses).
"""

from __future__ import annotations

import ipaddress
import ssl
import warnings
from threading import Lock
from typing import Any, Final

from cryptography import x509
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store

from mtad.net.connection import Connection
from mtad.tls.certificates import end_point
from mtad.tls.connection import TlsConnection, TlsFailed, shake_hands

_LEGACY_CIPHERS: Final = "DEFAULT:!aNULL:!eNULL:@SECLEVEL=1"

#: Our own look at a chain asks for what matters, and forgives what OpenSSL forgives, too.
_LEAF_POLICY: Final = ExtensionPolicy.permit_all().require_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
_CA_POLICY: Final = ExtensionPolicy.webpki_defaults_ca()


class ClientTls:
    """The client's side of TLS. Thread-safe; one for a process will do."""

    def __init__(self) -> None:
        """Nothing is read yet."""
        self._lock = Lock()
        self._opportunistic = _context()
        self._opportunistic.check_hostname = False
        self._opportunistic.verify_mode = ssl.CERT_NONE
        self._opportunistic.set_ciphers(_LEGACY_CIPHERS)
        self._verifying: dict[str, ssl.SSLContext] = {}
        self._roots: dict[str, Store | None] = {}

    def handshake(
        self, connection: Connection, server_name: str, verify: bool, timeout: float, ca_file: str = ""
    ) -> TlsConnection:
        """The client's handshake, within ``timeout`` seconds.

        Args:
            connection: on which nothing but the server's readiness for TLS is to be expected, or nothing at all.
            server_name: whom we want to talk to: a host name in ASCII, or an IP address without brackets.
            verify: whether the server must prove that it is; else everybody is welcome.
            timeout: in seconds, for all of it.
            ca_file: authorities in PEM, in place of the system's.

        Raises:
            TlsFailed: it failed; ``connection`` is good for `close` only. ``unverified``: because of the certificate.
        """
        name = server_name.removesuffix(".")
        sent = name if _is_askable(name) else None
        if not verify:
            return shake_hands(
                connection,
                self._opportunistic,
                timeout,
                server=False,
                server_name=sent,
                end_point=_end_point,
                verify=lambda handshake: self._would_verify(handshake, name, ca_file),
            )
        if sent is None:
            raise TlsFailed(f"{server_name!r} is no name that a certificate could have", unverified=True)
        context = self._verifying_context(ca_file)
        return shake_hands(connection, context, timeout, server=False, server_name=sent, end_point=_end_point, verify=True)

    def _verifying_context(self, ca_file: str) -> ssl.SSLContext:
        with self._lock:
            context = self._verifying.get(ca_file)
            if context is None:
                context = _context()
                context.hostname_checks_common_name = False
                try:
                    if ca_file:
                        context.load_verify_locations(ca_file)
                    else:
                        context.load_default_certs()
                except OSError as error:  # ssl.SSLError is one
                    why = getattr(error, "reason", None) or error.strerror
                    raise TlsFailed(f"authorities in {ca_file or 'the system'}: {why}", unverified=True) from None
                self._verifying[ca_file] = context
            return context

    def _would_verify(self, handshake: ssl.SSLObject, name: str, ca_file: str) -> bool:
        """Whether a verified handshake would have succeeded, as far as that can be told afterwards."""
        try:
            subject = x509.IPAddress(ipaddress.ip_address(name)) if _is_address(name) else x509.DNSName(name)
            leaf, *others = [x509.load_der_x509_certificate(der) for der in _chain(handshake)]
            store = self._trusted(ca_file)
            if store is None:
                return False
            builder = PolicyBuilder().store(store).extension_policies(ee_policy=_LEAF_POLICY, ca_policy=_CA_POLICY)
            builder.build_server_verifier(subject).verify(leaf, others)
        except Exception:
            # Strangers' certificates are odd in ways for which the library has exceptions of all kinds; what is asked for
            # here is a word for the log, for which no mail may wait.
            return False
        return True

    def _trusted(self, ca_file: str) -> Store | None:
        context = self._verifying_context(ca_file)
        with self._lock:
            if ca_file not in self._roots:
                roots = []
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", CryptographyDeprecationWarning)
                    for der in context.get_ca_certs(binary_form=True):
                        try:
                            roots.append(x509.load_der_x509_certificate(der))
                        except Exception:
                            pass  # a root that is not well-formed, in whatever way, is not one that we need
                self._roots[ca_file] = Store(roots) if roots else None
            return self._roots[ca_file]


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    return context


def _end_point(handshake: ssl.SSLObject) -> bytes:
    der = handshake.getpeercert(True)
    return end_point(der) if der else b""


def _chain(handshake: Any) -> list[bytes]:
    """What the server sent, its own certificate first, in DER. Public since Python 3.13."""
    if hasattr(handshake, "get_unverified_chain"):
        return list(handshake.get_unverified_chain())
    sent = handshake._sslobj.get_unverified_chain() or []
    return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in sent]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_askable(name: str) -> bool:
    """Whether Python's ssl takes a name: ASCII, labels of 1 to 63 octets."""
    if not name or not name.isascii() or name.startswith("."):
        return False
    try:
        return "\0" not in name.encode("idna").decode("ascii")
    except UnicodeError:
        return False
