"""A site with TLS, and clients for it."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

from tests.client import PATIENCE, Client
from tests.site import DOMAIN, Site
from tests.unit.tls_aid import Issued, authority, issue

CA: Final = authority()

LISTENERS: Final[list[dict[str, Any]]] = [
    {"name": "inbound", "service": "mx", "address": ["127.0.0.1:0", "[::1]:0"], "tls": "starttls"},
    {"name": "smtps", "service": "mx", "address": ["127.0.0.1:0", "[::1]:0"], "tls": "implicit"},
    {"name": "relay", "service": "relay", "address": ["127.0.0.1:0", "[::1]:0"], "tls": "starttls"},
    {"name": "plain", "service": "mx", "address": ["127.0.0.1:0", "[::1]:0"]},
]


def tls_site(root: Path, *, certificate: Issued | None = None, **options: Any) -> Site:
    """A site whose certificate is in ``root``: cert.pem and cert.key."""
    root.mkdir(parents=True, exist_ok=True)
    pair = (certificate or issue(f"mx.{DOMAIN}", by=CA)).write(root, chain=[CA])
    (root / "ca.pem").write_bytes(CA.pem)
    tls = {"certificate": pair.certificate, "key": pair.key}
    return Site(root, listeners=[dict(row) for row in LISTENERS], **{"tls": tls} | options)


class TlsClient(Client):
    """A `Client` that can shake hands; checks nobody's certificate."""

    def secure(
        self,
        *,
        name: str | None = None,
        version: ssl.TLSVersion | None = None,
    ) -> Self:
        """The handshake, at once."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if version is not None:
            context.minimum_version = context.maximum_version = version
        self.socket = context.wrap_socket(self.socket, server_hostname=name)
        self._unread = b""
        return self

    def starttls(self, **options: Any) -> Self:
        """Greeting, EHLO, STARTTLS, handshake."""
        self.begin("EHLO client.test", "STARTTLS")
        return self.secure(**options)

    @property
    def certificate(self) -> bytes:
        """The server's, in DER."""
        assert isinstance(self.socket, ssl.SSLSocket)
        return self.socket.getpeercert(True) or b""

    def say_close_notify(self) -> socket.socket:
        """Say it, do not wait for the server's; the bare connection underneath."""
        assert isinstance(self.socket, ssl.SSLSocket)
        self.socket.settimeout(0)
        try:
            self.socket.unwrap()
        except ssl.SSLWantReadError:
            pass  # said, and not answered yet
        return self.bare()

    def bare(self) -> socket.socket:
        """The connection without TLS. The encrypted one is of no more use."""
        bare = socket.socket(fileno=self.socket.detach())
        bare.settimeout(PATIENCE)
        return bare


def s_client(address: tuple[str, int], *options: str, say: Sequence[str] = (), timeout: float = 20.0) -> tuple[int, str]:
    """``openssl s_client``: its exit code and all that it wrote. It sends each line of ``say`` after the reply before."""
    process = subprocess.Popen(
        ["openssl", "s_client", "-connect", f"{address[0]}:{address[1]}", "-ign_eof", "-crlf", *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate("".join(f"{line}\n" for line in say), timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"s_client did not end: {output}") from None
    return process.returncode, output
