"""TLS of the client: who is believed, and who is talked to all the same. ATTACKS C-TL3, row by row."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trustme
from cryptography import x509

from mtad.net.connection import Connection
from mtad.tls.client import ClientTls
from mtad.tls.connection import TlsConnection, TlsFailed
from mtad.tls.server import ServerTls
from tests.unit.tls_aid import Issued, at_once, authority, bare_ends, ends, issue, new_key

CA = authority()
STRANGER = authority("Nobody's CA")
NAME = "mx.example.org"


@pytest.fixture(scope="module")
def tls() -> ClientTls:
    return ClientTls()


@pytest.fixture
def ca_file(tmp_path: Path) -> str:
    return CA.write(tmp_path, "ca").certificate


class Meeting:
    """Handshakes with servers that have this or that certificate."""

    def __init__(self, tls: ClientTls, directory: Path, ca_file: str) -> None:
        self._tls = tls
        self._directory = directory
        self._ca_file = ca_file
        self._open: list[Connection | TlsConnection] = []

    def __call__(
        self, server: Issued, name: str = NAME, *, verify: bool, chain: tuple[Issued, ...] = ()
    ) -> TlsConnection | TlsFailed:
        listening = ServerTls([server.write(self._directory, "server", chain)], lambda _: None)
        far, near = ends()
        self._open += [far, near]

        def ask() -> TlsConnection:
            try:
                return self._tls.handshake(near, name, verify, 5.0, self._ca_file)
            except TlsFailed:
                near.close()
                raise

        _, theirs = at_once(partial(listening.handshake, far, 5.0), ask)
        assert isinstance(theirs, TlsConnection | TlsFailed), theirs
        return theirs

    def close(self) -> None:
        for one in self._open:
            one.close()


@pytest.fixture
def meet(tls: ClientTls, tmp_path: Path, ca_file: str) -> Iterator[Meeting]:
    meeting = Meeting(tls, tmp_path, ca_file)
    yield meeting
    meeting.close()


GOOD = {
    "its name": (issue(NAME, by=CA), NAME),
    "one of its names": (issue("a.test", NAME, by=CA), NAME),
    "letter case": (issue("MX.Example.org", by=CA), "mx.EXAMPLE.org"),
    "a final dot is no part of it": (issue(NAME, by=CA), NAME + "."),
    "wildcard": (issue("*.example.org", by=CA), NAME),
    "A-label": (issue("mx.xn--mn-xka.example", by=CA), "mx.xn--mn-xka.example"),
    "address": (issue(x509.IPAddress(ipaddress.ip_address("192.0.2.1")), by=CA), "192.0.2.1"),
    "IPv6 address": (issue(x509.IPAddress(ipaddress.ip_address("2001:db8::1")), by=CA), "2001:DB8:0::1"),
    "RSA": (issue(NAME, by=CA, key=new_key("rsa")), NAME),
    "Ed25519": (issue(NAME, by=CA, key=new_key("ed25519")), NAME),
}


@pytest.mark.parametrize("row", GOOD)
def test_a_server_that_can_prove_its_name(meet: Meeting, row: str) -> None:
    server, name = GOOD[row]
    verified = meet(server, name, verify=True)
    assert isinstance(verified, TlsConnection), verified
    assert verified.verified
    assert verified.tls.startswith("TLSv1.3 with cipher ")
    opportunistic = meet(server, name, verify=False)
    assert isinstance(opportunistic, TlsConnection)
    assert opportunistic.verified


BAD = {
    "expired": (issue(NAME, by=CA, days=(-30, -1)), "certificate has expired"),
    "not yet valid": (issue(NAME, by=CA, days=(1, 30)), "not yet valid"),
    "self-signed": (issue(NAME), "self-signed certificate"),
    "signed by a stranger": (issue(NAME, by=STRANGER), "unable to get local issuer certificate"),
    "signed by a certificate that may not": (issue(NAME, by=issue("a.test", by=CA)), "unable to get local issuer"),
    "wrong name": (issue("mx.example.com", by=CA), "Hostname mismatch"),
    "name above it": (issue("example.org", by=CA), "Hostname mismatch"),
    "common name only": (issue(by=CA, common_name=NAME), "Hostname mismatch"),
    "common name beside another": (issue("a.test", by=CA, common_name=NAME), "Hostname mismatch"),
    "wildcard for a top level": (issue("*.org", by=CA), "Hostname mismatch"),
    "wildcard for two labels": (issue("*.org", "*.*.org", by=CA), "Hostname mismatch"),
    "wildcard for no label": (issue("*.mx.example.org", by=CA), "Hostname mismatch"),
    "partial wildcard": (issue("m*.example.org", "*x.example.org", by=CA), "Hostname mismatch"),
    "wildcard alone": (issue("*", by=CA), "Hostname mismatch"),
    "NUL in the name": (issue("mx.example.org\0.evil.test", by=CA), "Hostname mismatch"),
    "address instead of name": (issue(x509.IPAddress(ipaddress.ip_address("192.0.2.1")), by=CA), "Hostname mismatch"),
    "mail address instead of name": (issue(x509.RFC822Name("a@mx.example.org"), by=CA), "Hostname mismatch"),
    "URI instead of name": (issue(x509.UniformResourceIdentifier("smtp://mx.example.org"), by=CA), "Hostname mismatch"),
}


@pytest.mark.parametrize("row", BAD)
def test_c_tl3_a_server_that_cannot(meet: Meeting, row: str) -> None:
    server, why = BAD[row]
    fault = meet(server, verify=True)
    assert isinstance(fault, TlsFailed)
    assert why in str(fault)
    assert str(fault).startswith("certificate not verified: ")
    assert (fault.unverified, fault.timed_out) == (True, False)
    opportunistic = meet(server, verify=False)
    assert isinstance(opportunistic, TlsConnection), "any certificate will do"
    assert not opportunistic.verified


def test_c_tl3_addresses_are_compared_as_addresses(meet: Meeting) -> None:
    for server in (issue("192.0.2.1", by=CA), issue(x509.IPAddress(ipaddress.ip_address("192.0.2.2")), by=CA)):
        fault = meet(server, "192.0.2.1", verify=True)
        assert isinstance(fault, TlsFailed)
        assert "IP address mismatch" in str(fault)


def test_a_chain_of_several(meet: Meeting) -> None:
    middle = authority("Middle", by=CA)
    server = issue(NAME, by=middle)
    assert isinstance(meet(server, verify=True, chain=(middle,)), TlsConnection)
    found = meet(server, verify=False, chain=(middle,))
    assert isinstance(found, TlsConnection)
    assert found.verified
    fault = meet(server, verify=True)
    assert isinstance(fault, TlsFailed), "the server keeps the middle of the chain to itself"
    assert "unable to get local issuer" in str(fault)
    found = meet(server, verify=False)
    assert isinstance(found, TlsConnection)
    assert not found.verified


def test_certificates_that_others_make(tls: ClientTls, tmp_path: Path) -> None:
    """trustme's, and a server that is Python's own."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(NAME).configure_cert(context)
    for verify in (True, False):
        far, near = ends()
        peer = socket.socket(fileno=os.dup(far.fileno()))
        far.close()
        thread = threading.Thread(target=lambda peer=peer: context.wrap_socket(peer, server_side=True).close())
        thread.start()
        found = tls.handshake(near, NAME, verify, 5.0, str(tmp_path / "ca.pem"))
        thread.join(5)
        assert found.verified
        assert found.receive(5.0) == b""
        found.close()


def test_the_system_s_authorities_do_not_know_ours(tls: ClientTls, tmp_path: Path) -> None:
    listening = ServerTls([issue(NAME, by=CA).write(tmp_path)], lambda _: None)
    for verify in (True, False):
        far, near = ends()
        _, theirs = at_once(partial(listening.handshake, far, 5.0), lambda: tls.handshake(near, NAME, verify, 5.0))  # noqa: B023
        if verify:
            assert isinstance(theirs, TlsFailed)
        else:
            assert isinstance(theirs, TlsConnection)
            assert not theirs.verified
            theirs.close()
        far.close()
        near.close()


@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_authorities_that_cannot_be_read_verify_nobody(tls: ClientTls, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "authorities.pem"
    if content is not None:
        path.write_bytes(content)
    far, near = ends()
    with pytest.raises(TlsFailed, match=r"authorities in .*authorities\.pem") as caught:
        tls.handshake(near, NAME, True, 1.0, str(path))
    assert caught.value.unverified
    near.close()
    assert far.receive(1.0) == b"", "not an octet was sent"
    far.close()


@pytest.mark.parametrize("name", ["", ".", ".example.org", "a..b", "x" * 64 + ".test", "mün.de", "a\0b.test"])
def test_a_name_that_no_certificate_could_have(meet: Meeting, name: str) -> None:
    server = issue(NAME, by=CA)
    fault = meet(server, name, verify=True)
    assert isinstance(fault, TlsFailed)
    assert fault.unverified
    opportunistic = meet(server, name, verify=False)
    assert isinstance(opportunistic, TlsConnection)
    assert not opportunistic.verified


# -- servers that do not shake hands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
def test_a_server_that_stalls(tls: ClientTls, verify: bool) -> None:
    near, far = bare_ends()
    begin = time.monotonic()
    with far, pytest.raises(TlsFailed, match="Connection timed out") as caught:
        tls.handshake(near, NAME, verify, 0.2)
    assert caught.value.timed_out
    assert 0.15 < time.monotonic() - begin < 2
    near.close()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "lost connection"),
        (b"250-evil\r\n250 AUTH PLAIN\r\n", "wrong version number"),
        (b"\x15\x03\x03\x00\x02\x02\x28", "sslv3 alert handshake failure"),
        (b"\x15\x03\x03\x00\x02\x02\x46", "tlsv1 alert protocol version"),
    ],
    ids=["hangs up", "C-TL1: goes on in clear text", "handshake_failure", "protocol_version"],
)
def test_a_server_that_says_something_else(tls: ClientTls, sent: bytes, reason: str) -> None:
    near, far = bare_ends()
    far.sendall(sent)
    far.shutdown(socket.SHUT_WR)
    with far, pytest.raises(TlsFailed, match=reason) as caught:
        tls.handshake(near, NAME, False, 5.0)
    assert (caught.value.timed_out, caught.value.unverified) == (False, False)
    near.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_servers_are_not_talked_to(tls: ClientTls, tmp_path: Path) -> None:
    """RFC 8996: nobody is spoken to in TLS 1.1, not even opportunistically."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair = issue(NAME, key=new_key("rsa")).write(tmp_path)
    context.load_cert_chain(pair.certificate, pair.key)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1

    def serve(far: socket.socket) -> None:
        try:
            context.wrap_socket(far, server_side=True).close()
        except OSError:
            pass  # as expected

    near, far = bare_ends()
    thread = threading.Thread(target=serve, args=(far,))
    thread.start()
    with pytest.raises(TlsFailed, match=r"protocol version|unsupported protocol"):
        tls.handshake(near, NAME, False, 5.0)
    near.close()
    thread.join(5)
    far.close()


def test_weak_ciphers_are_for_opportunists_only(tls: ClientTls, tmp_path: Path, ca_file: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair = issue(NAME, by=CA, key=new_key("rsa")).write(tmp_path)
    context.load_cert_chain(pair.certificate, pair.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES128-SHA:@SECLEVEL=0")

    def serve(far: socket.socket) -> None:
        try:
            context.wrap_socket(far, server_side=True).close()
        except OSError:
            pass  # as expected

    for verify in (False, True):
        near, far = bare_ends()
        thread = threading.Thread(target=serve, args=(far,))
        thread.start()
        if verify:
            with pytest.raises(TlsFailed, match="handshake failure"):
                tls.handshake(near, NAME, True, 5.0, ca_file)
        else:
            found = tls.handshake(near, NAME, False, 5.0, ca_file)
            assert found.tls == "TLSv1.2 with cipher AES128-SHA (128/128 bits)"
            assert found.verified
            found.close()
        near.close()
        thread.join(5)
        far.close()


@pytest.mark.parametrize("version", [1, 3])
def test_an_odd_certificate_is_not_verified_and_mail_goes_through_it_all_the_same(
    tls: ClientTls, tmp_path: Path, version: int
) -> None:
    """A version that there is not: OpenSSL takes it, and the library that looks at it has an exception of its own."""
    issued = issue(NAME)
    pair = issued.write(tmp_path)
    der = ssl.PEM_cert_to_DER_cert(Path(pair.certificate).read_text())
    assert der.count(b"\xa0\x03\x02\x01\x02") == 1
    odd = der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01" + bytes([version]))
    Path(pair.certificate).write_text(ssl.DER_cert_to_PEM_cert(odd))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    client, far = bare_ends()
    ours, server = at_once(
        partial(tls.handshake, client, NAME, False, 5.0, pair.certificate),
        partial(context.wrap_socket, far, server_side=True),
    )
    assert isinstance(ours, TlsConnection)
    assert not ours.verified
    ours.close()
    if isinstance(server, ssl.SSLSocket):
        server.close()
