"""TLS of the server and the encrypted stream, over real sockets, against Python's own TLS and against ourselves."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from mtad.net.connection import ConnectionLost, TimedOut
from mtad.tls.certificates import Pair, end_point
from mtad.tls.client import ClientTls
from mtad.tls.connection import TlsConnection
from mtad.tls.server import ServerTls
from tests.unit.tls_aid import Greeting, at_once, authority, ends, issue, new_key, python_client

CA = authority()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return issue("mx.example.org", by=CA).write(tmp_path)


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def server(pair: Pair, warnings: list[str]) -> ServerTls:
    return ServerTls([pair], warnings.append)


@pytest.fixture
def greet() -> Iterator[Greeting]:
    greeting = Greeting()
    yield greeting
    greeting.close()


# -- the stream -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_octets_go_both_ways_in_postfix_s_words(server: ServerTls, greet: Greeting, version: ssl.TLSVersion) -> None:
    ours, theirs = greet(server, partial(python_client, version=version))
    ours.send(b"220 mx\r\n", 1.0)
    assert theirs.recv(100) == b"220 mx\r\n"
    theirs.sendall(b"EHLO x\r\n")
    assert ours.receive(1.0) == b"EHLO x\r\n"
    name, _, bits = theirs.cipher() or ("", "", 0)
    assert ours.tls == f"{theirs.version()} with cipher {name} ({bits}/{bits} bits)"
    assert (ours.version, ours.cipher, ours.bits) == (theirs.version(), name, bits)
    assert (ours.address, ours.port) == theirs.getsockname()[:2]
    assert ours.local == theirs.getpeername()[:2]
    assert theirs.compression() is None


@pytest.mark.parametrize("size", [0, 1, 16384, 16385, 65536, 262144, 262145, 3_000_000])
def test_everything_arrives_as_it_was_sent(server: ServerTls, greet: Greeting, size: int) -> None:
    ours, theirs = greet(server)
    data = os.urandom(size)
    got: list[bytes] = []

    def read() -> None:
        while sum(map(len, got)) < size:
            got.append(theirs.recv(65536))

    thread = threading.Thread(target=read)
    thread.start()
    ours.send(data, 5.0)
    thread.join(10)
    assert b"".join(got) == data

    thread = threading.Thread(target=theirs.sendall, args=(data,))
    thread.start()
    back = bytearray()
    while len(back) < size:
        back += ours.receive(5.0)
    thread.join(10)
    assert bytes(back) == data


def test_a_limit_holds_and_nothing_is_lost(server: ServerTls, greet: Greeting) -> None:
    ours, theirs = greet(server)
    theirs.sendall(b"abcdef")
    assert ours.receive(1.0, limit=4) == b"abcd"
    assert ours.receive(1.0, limit=4) == b"ef"
    with pytest.raises(TimedOut):
        ours.receive(0.02)


def test_a_record_may_come_octet_by_octet(server: ServerTls) -> None:
    far, near = ends()
    ours, theirs = at_once(partial(server.handshake, far, 5.0), lambda: ClientTls().handshake(near, "mx", False, 5.0))
    assert isinstance(ours, TlsConnection)
    assert isinstance(theirs, TlsConnection)
    theirs._encrypt(b"NOOP\r\n")
    record = theirs._outgoing.read()

    def trickle() -> None:
        for octet in record:
            near.send(bytes([octet]), 1.0)

    thread = threading.Thread(target=trickle)
    thread.start()
    assert ours.receive(5.0) == b"NOOP\r\n"
    thread.join(5)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("piece", [1, 7, 60, 100_000])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_it_matters_not_how_the_handshake_is_cut(server: ServerTls, version: ssl.TLSVersion, piece: int) -> None:
    """Nor that the first words come in one segment with its end."""
    far, near = ends()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = version
    peer = context.wrap_bio(incoming, outgoing)

    def flush() -> None:
        data = outgoing.read()
        for first in range(0, len(data), piece):
            near.send(data[first : first + piece], 1.0)

    def speak() -> bytes:
        while True:
            try:
                peer.do_handshake()
            except ssl.SSLWantReadError:
                flush()
                incoming.write(near.receive(5.0))
            else:
                break
        peer.write(b"EHLO client.test\r\n")
        peer.write(b"NOOP\r\n")
        flush()
        return near.receive(5.0)

    def listen() -> TlsConnection:
        secured = server.handshake(far, 5.0)
        assert secured.receive(5.0) == b"EHLO client.test\r\n"
        assert secured.receive(5.0) == b"NOOP\r\n"
        secured.send(b"250 ok\r\n", 1.0)
        return secured

    ours, answer = at_once(listen, speak)
    assert isinstance(ours, TlsConnection), ours
    assert isinstance(answer, bytes), answer
    ours.close()
    near.close()


def test_a_trickling_record_does_not_move_the_deadline(server: ServerTls) -> None:
    far, near = ends()
    ours, theirs = at_once(partial(server.handshake, far, 5.0), lambda: ClientTls().handshake(near, "mx", False, 5.0))
    assert isinstance(ours, TlsConnection)
    assert isinstance(theirs, TlsConnection)
    theirs._encrypt(b"x" * 1000)
    record = theirs._outgoing.read()
    done = threading.Event()

    def trickle() -> None:
        for octet in record[:-1]:
            if done.wait(0.02):
                return
            near.send(bytes([octet]), 1.0)

    thread = threading.Thread(target=trickle)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(TimedOut):
        ours.receive(0.2)
    assert 0.15 < time.monotonic() - begin < 0.8
    done.set()
    thread.join(5)
    ours.close()
    theirs.close()


def test_a_peer_that_does_not_read_times_out(server: ServerTls, greet: Greeting) -> None:
    ours, _ = greet(server)
    begin = time.monotonic()
    with pytest.raises(TimedOut):
        ours.send(bytes(20_000_000), 0.2)
    assert time.monotonic() - begin < 2


def test_close_notify_is_the_end_and_is_answered(server: ServerTls, greet: Greeting) -> None:
    ours, theirs = greet(server)
    theirs.settimeout(5)
    thread = threading.Thread(target=theirs.unwrap)
    thread.start()
    assert ours.receive(1.0) == b""
    assert not ours.truncated
    ours.close()
    thread.join(5)
    assert not thread.is_alive(), "the client still waits for our close_notify"
    ours.close()
    with pytest.raises(ConnectionLost):
        ours.send(b"x", 1.0)


def test_clear_text_behind_close_notify_is_never_read(server: ServerTls, greet: Greeting) -> None:
    """S-TL7, the shape of CVE-2026-45185."""
    ours, theirs = greet(server)
    theirs.settimeout(0)
    with pytest.raises(ssl.SSLWantReadError):
        theirs.unwrap()  # it has said close_notify, and does not wait for ours
    with socket.socket(fileno=os.dup(theirs.fileno())) as raw:
        raw.settimeout(5)
        raw.sendall(b"\r\n.\r\nMAIL FROM:<evil@example.org>\r\n")
        raw.shutdown(socket.SHUT_WR)
    assert ours.receive(1.0) == b""
    assert ours.receive(1.0) == b""
    assert not ours.truncated


def test_an_end_without_close_notify_is_told(server: ServerTls, greet: Greeting) -> None:
    """S-TL8."""
    ours, theirs = greet(server)
    theirs.sendall(b"Subject: half")
    theirs.shutdown(socket.SHUT_RDWR)
    assert ours.receive(1.0) == b"Subject: half"
    assert ours.receive(1.0) == b""
    assert ours.truncated
    assert ours.receive(1.0) == b""


def test_clear_text_in_the_midst_is_a_lost_connection(server: ServerTls, greet: Greeting) -> None:
    ours, theirs = greet(server)
    with socket.socket(fileno=os.dup(theirs.fileno())) as raw:
        raw.sendall(b"QUIT\r\n" * 10)
    with pytest.raises(ConnectionLost, match="wrong version number"):
        ours.receive(1.0)
    assert ours.receive(1.0) == b""


def test_stop_reading_leaves_the_last_word(server: ServerTls, greet: Greeting) -> None:
    ours, theirs = greet(server)
    ours.stop_reading()
    assert ours.receive(5.0) == b""
    ours.send(b"421 bye\r\n", 1.0)
    assert theirs.recv(100) == b"421 bye\r\n"


def test_shutdown_wakes_the_thread_that_waits(server: ServerTls, greet: Greeting) -> None:
    ours, _ = greet(server)
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(ours.receive(30.0)))
    thread.start()
    ours.shutdown()
    thread.join(5)
    assert got == [b""]


# -- the handshake ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_are_refused(server: ServerTls, greet: Greeting, version: ssl.TLSVersion) -> None:
    """S-TL6."""
    client = partial(python_client, version=version, ciphers="ALL:@SECLEVEL=0")
    assert "unsupported protocol" in str(greet.failing(server, client))


@pytest.mark.parametrize("ciphers", ["AES256-SHA", "AES128-GCM-SHA256", "NULL-SHA256:@SECLEVEL=0", "aNULL:@SECLEVEL=0"])
def test_ciphers_without_secrecy_are_refused(server: ServerTls, greet: Greeting, ciphers: str) -> None:
    client = partial(python_client, version=ssl.TLSVersion.TLSv1_2, ciphers=ciphers)
    assert "no shared cipher" in str(greet.failing(server, client))


def test_a_client_that_says_nothing_times_out(server: ServerTls, greet: Greeting) -> None:
    begin = time.monotonic()
    fault = greet.failing(server, lambda near: near.recv(1), 0.2)
    assert fault.timed_out
    assert str(fault) == "Connection timed out"
    assert time.monotonic() - begin < 2


def test_an_octet_now_and_then_does_not_hold_the_server(server: ServerTls, greet: Greeting) -> None:
    """S-TL6: the ClientHello of a slow loris."""

    def trickle(near: socket.socket) -> None:
        for octet in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600):
            time.sleep(0.02)
            near.sendall(bytes([octet]))

    begin = time.monotonic()
    assert greet.failing(server, trickle, 0.3).timed_out
    assert time.monotonic() - begin > 0.25


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"EHLO client.test\r\n", "wrong version number"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "http request"),
        (bytes(100), "wrong version number"),
        (b"\x16\x03\x01\xff\xff" + b"\x01" * 65535, "packet length too long"),
        (b"", "lost connection"),
        (b"\x16\x03\x01", "lost connection"),
    ],
    ids=["plain SMTP", "HTTP", "zeros", "length", "nothing", "half a record"],
)
def test_what_is_no_hello_is_told_so(server: ServerTls, greet: Greeting, sent: bytes, reason: str) -> None:
    def speak(near: socket.socket) -> None:
        near.sendall(sent)
        near.shutdown(socket.SHUT_WR)
        while near.recv(1000):
            pass

    fault = greet.failing(server, speak)
    assert not fault.timed_out
    assert str(fault) == reason


def test_a_hello_of_64_kib_is_no_harm(server: ServerTls, greet: Greeting) -> None:
    hello = b"\x01" + (65536).to_bytes(3, "big") + b"\x03\x03" + bytes(65534)
    records = b"".join(
        b"\x16\x03\x01" + len(hello[at : at + 16384]).to_bytes(2, "big") + hello[at : at + 16384]
        for at in range(0, len(hello), 16384)
    )

    def speak(near: socket.socket) -> None:
        near.sendall(records)
        near.shutdown(socket.SHUT_WR)

    assert not greet.failing(server, speak).timed_out


def test_unknown_protocols_in_alpn_are_passed_over(server: ServerTls, greet: Greeting) -> None:
    client = partial(python_client, adjust=lambda context: context.set_alpn_protocols(["h2", "\x01garbage", "smtp"]))
    _, theirs = greet(server, client)
    assert theirs.selected_alpn_protocol() is None


# -- channel bindings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_ends_have_the_same_bindings(server: ServerTls, version: ssl.TLSVersion) -> None:
    far, near = ends()
    tls = ClientTls()
    tls._opportunistic.maximum_version = version
    ours, theirs = at_once(partial(server.handshake, far, 5.0), lambda: tls.handshake(near, "mx", False, 5.0))
    assert isinstance(ours, TlsConnection)
    assert isinstance(theirs, TlsConnection)
    assert ours.channel_bindings == theirs.channel_bindings
    assert ("tls-unique" in ours.channel_bindings) == (version is ssl.TLSVersion.TLSv1_2)
    assert len(ours.channel_bindings["tls-server-end-point"]) == 32
    ours.close()
    theirs.close()


def test_tls_unique_is_what_python_says(server: ServerTls, greet: Greeting) -> None:
    ours, theirs = greet(server, partial(python_client, version=ssl.TLSVersion.TLSv1_2))
    assert ours.channel_bindings["tls-unique"] == theirs.get_channel_binding("tls-unique")
    der = theirs.getpeercert(True)
    assert der is not None
    assert ours.channel_bindings["tls-server-end-point"] == hashlib.sha256(der).digest()


def test_a_signature_without_a_hash_has_no_end_point() -> None:
    """RFC 5929 section 4.1 leaves it undefined."""
    certificate = issue("mx.example.org", key=new_key("ed25519")).certificate
    assert end_point(certificate.public_bytes(serialization.Encoding.DER)) == b""
    assert end_point(b"garbage") == b""
