"""ATTACKS section 2, STARTTLS and TLS, row by row over the socket."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Iterator

import pytest

from tests.e2e.tls_site import TlsClient, tls_site
from tests.site import DOMAIN, Site, await_value

RCPT = f"RCPT TO:<alice@{DOMAIN}>"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with tls_site(tmp_path_factory.mktemp("tls"), deliver=False, limits={"tls_timeout": "1s"}) as site:
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[TlsClient]:
    with TlsClient(site.address("inbound")) as client:
        yield client


@pytest.mark.parametrize(
    "rest",
    [
        "NOOP FAKE\r\n", "NOOP FAKE\r\n" * 3, "NOOP FAKE\r\n" * 100, "RSET\r\n", "MAIL FROM:<evil@sender.test>\r\n",
        "AUTH PLAIN AGEAYg==\r\n", "EHLO evil.test\r\n", "NOO", "\r\n", "\x16\x03\x01",
    ],
)  # fmt: skip
def test_s_tl1_nothing_that_came_before_the_handshake_is_obeyed(site: Site, client: TlsClient, rest: str) -> None:
    """CVE-2011-0411: pipelined behind STARTTLS. The client is told off, once, and loses the connection."""
    client.begin("EHLO client.test")
    client.send(b"STARTTLS\r\n" + rest.encode())
    assert client.reply() == "554 5.5.1 Error: commands pipelined after STARTTLS"
    assert client.closed()
    assert "evil" not in site.log()


def test_s_tl1_a_command_between_the_reply_and_the_handshake(site: Site, client: TlsClient) -> None:
    client.begin("EHLO client.test", "STARTTLS")
    client.send(b"NOOP FAKE\r\n")
    with pytest.raises((ssl.SSLError, ConnectionResetError)):  # the connection may be gone before the alert is read
        client.secure()
    site.await_log(r"SSL_accept error from unknown\[127\.0\.0\.1\]: wrong version number\n.*lost connection after STARTTLS")
    site.await_log(r"disconnect from unknown\[127\.0\.0\.1\] ehlo=1 starttls=0/1 commands=1/2")


def test_s_tl2_everything_is_forgotten(client: TlsClient) -> None:
    client.begin("EHLO client.test", "MAIL FROM:<a@sender.test>", RCPT, "STARTTLS").secure()
    assert client.say("DATA").startswith("503 ")
    assert client.say("MAIL FROM:<a@sender.test>").startswith("503 ")
    assert client.say("EHLO client.test").startswith("250-")
    assert client.say("DATA").startswith("503 ")
    assert client.say("MAIL FROM:<b@sender.test>").startswith("250 ")


def test_s_tl3_starttls_is_offered_once_and_takes_no_argument(client: TlsClient) -> None:
    client.begin()
    assert "\n250-STARTTLS" in client.say("EHLO client.test")
    assert client.say("STARTTLS now").startswith("501 ")
    assert client.say("STARTTLS").startswith("220 ")
    client.secure()
    assert "STARTTLS" not in client.say("EHLO client.test")
    assert client.say("STARTTLS").startswith("503 ")
    assert client.say("NOOP").startswith("250 ")


def test_s_tl3_starttls_where_there_is_none(site: Site) -> None:
    with TlsClient(site.address("plain")) as client:
        client.begin()
        assert "STARTTLS" not in client.say("EHLO client.test")
        assert client.say("STARTTLS")[:3] in {"500", "502"}
    with TlsClient(site.address("smtps")) as client:
        client.secure().begin()
        assert "STARTTLS" not in client.say("EHLO client.test")
        assert client.say("STARTTLS").startswith("503 ")


def test_s_tl4_session_fixation(client: TlsClient) -> None:
    client.begin("EHLO client.test", "MAIL FROM:<a@sender.test>", "STARTTLS").secure()
    assert client.say("EHLO client.test").startswith("250-")
    assert client.say(RCPT).startswith("503 ")


def test_s_tl5_auth_is_not_offered_in_clear(client: TlsClient) -> None:
    client.begin()
    assert "AUTH" not in client.say("EHLO client.test")
    assert client.say("AUTH PLAIN AGEAYg==")[:3] in {"500", "502", "503", "530", "538"}


@pytest.mark.parametrize("listener", ["inbound", "smtps"])
@pytest.mark.parametrize("trickle", [False, True])
def test_s_tl6_a_stalled_handshake_ends_in_time(site: Site, listener: str, trickle: bool) -> None:
    """Also when an octet comes now and then; and others are served meanwhile."""
    with TlsClient(site.address(listener)) as client:
        begin = time.monotonic()
        if listener == "inbound":
            client.begin("EHLO client.test", "STARTTLS")
        client.socket.settimeout(0.1)
        hello = iter(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500))
        while True:
            if trickle:
                client.send(bytes([next(hello)]))
            with TlsClient(site.address(listener)) as other:
                (other.secure() if listener == "smtps" else other).begin("EHLO other.test")
            try:
                assert client.socket.recv(100) == b""
                break
            except TimeoutError:
                assert time.monotonic() - begin < 5
        assert time.monotonic() - begin > 0.8
    site.await_log(r"SSL_accept error from unknown\[127\.0\.0\.1\]: Connection timed out")


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"EHLO client.test\r\n", "wrong version number"),
        (b"GET / HTTP/1.1\r\n\r\n", "http request"),
        (bytes(200), "wrong version number"),
        (b"\x16\x03\x01\xff\xff" + bytes(65535), "packet length too long"),
    ],
    ids=["plain SMTP", "HTTP", "zeros", "64 KiB"],
)
def test_s_tl6_what_is_no_hello(site: Site, sent: bytes, reason: str) -> None:
    before = site.log().count(reason)
    with TlsClient(site.address("smtps")) as client:
        client.send(sent)
        rest = client.socket.recv(100) if reason != "packet length too long" else b""
        assert rest[:1] in {b"\x15", b""}, "an alert, if anything"
    await_value(lambda: site.log().count(reason) > before, what="the reason is in the log")


def test_s_tl6_tls_where_smtp_is_spoken(site: Site) -> None:
    with TlsClient(site.address("inbound")) as client:
        client.begin()
        with pytest.raises(ssl.SSLError):
            client.secure()
    with TlsClient(site.address("plain")) as client, pytest.raises(ssl.SSLError):
        client.secure()
    site.await_log(r"reject: .* from unknown\[127\.0\.0\.1\]: 5")


def begin_content(client: TlsClient, how: str) -> None:
    """A message within TLS, and the first half of its content."""
    client.starttls().say("EHLO client.test")
    for line in ("MAIL FROM:<a@sender.test>", RCPT):
        assert client.say(line).startswith("250 ")
    if how == "DATA":
        assert client.say("DATA").startswith("354 ")
    client.send({"DATA": b"", "BDAT": b"BDAT 1000 LAST\r\n"}[how] + b"Subject: half\r\n\r\nhello\r\n")


def check_nothing_is_kept(site: Site, bare: socket.socket, before: int) -> bytes:
    """The session ends and has left nothing; what the server said last, encrypted or not."""
    said = b""
    with bare:
        try:
            bare.shutdown(socket.SHUT_WR)
            while data := bare.recv(65536):
                said += data
        except OSError:
            pass  # closed by us, or by the server with our clear text unread
    await_value(lambda: site.status().sessions == 0, what="the session has ended")
    assert len(site.taken()) == len(site.files("incoming")) == before
    assert "evil@sender.test" not in site.log()
    return said


@pytest.mark.parametrize("how", ["DATA", "BDAT"])
@pytest.mark.parametrize("behind", [b"", b".\r\n", b"x" * 1000], ids=["nothing", "a dot", "a chunk"])
def test_s_tl7_close_notify_in_a_message(site: Site, client: TlsClient, how: str, behind: bytes) -> None:
    """CVE-2026-45185 has this shape: clear text behind it is not the rest of the message, and no command."""
    before = len(site.taken())
    ended = site.log().count(f"lost connection after {how} from")
    begin_content(client, how)
    bare = client.say_close_notify()
    if behind:
        bare.sendall(
            behind + b"\r\n.\r\nMAIL FROM:<evil@sender.test>\r\n" + RCPT.encode() + b"\r\nDATA\r\nx\r\n.\r\nQUIT\r\n"
        )
    said = check_nothing_is_kept(site, bare, before)
    assert said[:1] in {b"", b"\x17", b"\x15"}, "no reply in clear text"
    await_value(lambda: site.log().count(f"lost connection after {how} from") > ended, what="the log says so")


@pytest.mark.parametrize("how", ["DATA", "BDAT"])
@pytest.mark.parametrize("end", ["FIN", "RST"])
def test_s_tl8_an_end_without_close_notify_in_a_message(site: Site, client: TlsClient, how: str, end: str) -> None:
    """Anybody on the way can send these: what came before them is half a message."""
    before = len(site.taken())
    ended = site.log().count(f"lost connection after {how} from")
    begin_content(client, how)
    bare = client.bare()
    if end == "RST":
        bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        bare.close()
    check_nothing_is_kept(site, bare, before)
    await_value(lambda: site.log().count(f"lost connection after {how} from") > ended, what="the log says so")


def test_s_tl8_the_whole_message_came_and_then_the_end(site: Site, client: TlsClient) -> None:
    """The dot was there: the message is ours, whatever became of the connection."""
    before = len(site.taken())
    begin_content(client, "DATA")
    client.send(b".\r\n")
    client.bare().close()
    await_value(lambda: len(site.taken()) == before + 1, what="it is kept")


def test_what_is_said_before_the_greeting(site: Site) -> None:
    """S-PA: mx only; whoever waits, and whoever is trusted, is served."""
    site.configure(limits={"tls_timeout": "1s", "greeting_delay": "300ms"})
    site.renew()
    with TlsClient(site.address("inbound")) as client:
        client.send(b"EHLO early.test\r\n")
        assert client.reply().startswith("554 5.5.0 mx.example.org Error: you spoke before the greeting")
        assert client.closed()
    site.await_log(r"reject: CONNECT from unknown\[127\.0\.0\.1\]: 554 5\.5\.0")
    with TlsClient(site.address("inbound")) as client:
        begin = time.monotonic()
        client.begin("EHLO patient.test")
        assert time.monotonic() - begin > 0.25
    with TlsClient(site.address("relay")) as client:
        client.send(b"EHLO early.test\r\n")
        assert client.reply().startswith("220 ")
        assert client.reply().startswith("250-")
    with TlsClient(site.address("inbound")) as client:
        client.socket.shutdown(socket.SHUT_WR)
        client.reply()
        assert client.closed()
