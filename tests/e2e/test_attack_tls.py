"""ATTACKS section 2 against the running daemon, as octets: hellos that no library would send, AUTH where it must not be.

What comes before and after a handshake is in `test_tls_attacks`; certificates of next hops are in `test_smtp_tls`.
"""

from __future__ import annotations

import base64
import shutil
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from mtad.config import Limits
from mtad.passwords import change_password, make_keys
from tests.e2e.tls_site import CA, TlsClient, s_client, tls_site
from tests.peers.mx import Mx, Script
from tests.site import DOMAIN, Site
from tests.unit.tls_aid import Issued, issue

PASSWORD: Final = "open sesame"
PLAIN: Final = base64.b64encode(f"\0alice\0{PASSWORD}".encode()).decode()
DEFAULT: Final = issue(f"mx.{DOMAIN}", by=CA)
OTHER: Final = issue("other.test", by=CA)
LATE: Final = issue("late.test", by=CA, days=(-30, -1))

ALERT: Final = 0x15
HANDSHAKE: Final = 0x16


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content


def server_name(name: bytes) -> bytes:
    """RFC 6066 section 3."""
    entry = b"\0" + len(name).to_bytes(2, "big") + name
    return extension(0, len(entry).to_bytes(2, "big") + entry)


#: For TLS 1.2: groups, point formats, signature algorithms.
USUAL: Final = extension(10, b"\0\4\0\x1d\0\x17") + extension(11, b"\1\0") + extension(13, b"\0\x0a\4\3\5\3\6\3\x08\4\4\1")


def hello(*extensions: bytes, version: int = 0x0303, compressions: bytes = b"\0", padding: int = 0) -> bytes:
    """A ClientHello (RFC 5246 section 7.4.1.2) in as many records as it takes."""
    ciphers = bytes.fromhex("c02bc02cc02fc030cca8c009c013000a002f0035")
    more = b"".join(extensions) + (extension(21, bytes(padding)) if padding else b"")
    body = (
        version.to_bytes(2, "big") + bytes(range(32)) + b"\0" + len(ciphers).to_bytes(2, "big") + ciphers
        + bytes([len(compressions)]) + compressions + len(more).to_bytes(2, "big") + more
    )  # fmt: skip
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    outer = min(version, 0x0301).to_bytes(2, "big")
    pieces = [message[at : at + 16384] for at in range(0, len(message), 16384)]
    return b"".join(bytes([HANDSHAKE]) + outer + len(piece).to_bytes(2, "big") + piece for piece in pieces)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("tls")
    site = tls_site(root, certificate=DEFAULT, deliver=False, limits={"tls_timeout": "5s"})
    both = ["127.0.0.1:0", "[::1]:0"]
    site.listeners.append({"name": "submission", "service": "submission", "address": both, "tls": "starttls"})
    site.configure()
    with open(site.config_path, "a", encoding="utf-8") as file:
        for name, issued in (("other", OTHER), ("late", LATE)):
            pair = issued.write(root, name)
            file.write(f'\n[[tls.sni]]\ncertificate = "{pair.certificate}"\nkey = "{pair.key}"\n')
    change_password(str(root / "passwords"), "alice", make_keys(PASSWORD))
    with site:
        yield site


@pytest.fixture(params=["inbound", "smtps"])
def client(site: Site, request: pytest.FixtureRequest) -> Iterator[TlsClient]:
    """One whose next octets are those of a handshake."""
    with TlsClient(site.address(request.param)) as client:
        if request.param == "inbound":
            client.begin("EHLO client.test", "STARTTLS")
        yield client


def records(client: TlsClient) -> Iterator[tuple[int, bytes]]:
    """Type and content of each record that the server sends, until it closes or the handshake is up to the client."""
    data = b""
    while True:
        while len(data) < 5 or len(data) < 5 + int.from_bytes(data[3:5], "big"):
            more = client.socket.recv(65536)
            if not more:
                return
            data += more
        end = 5 + int.from_bytes(data[3:5], "big")
        yield data[0], data[5:end]
        if data[0] == HANDSHAKE and data[:end].endswith(b"\x0e\0\0\0"):  # ServerHelloDone
            return
        data = data[end:]


def served(client: TlsClient, sent: bytes) -> bytes:
    """The flight of a server that takes the hello: its handshake messages up to ServerHelloDone, in TLS 1.2."""
    client.send(sent)
    flight = list(records(client))
    assert {kind for kind, _ in flight} == {HANDSHAKE}, flight
    return b"".join(content for _, content in flight)


def alerted(client: TlsClient, sent: bytes) -> int:
    """The description of the fatal alert that is the server's only word; then it has closed."""
    client.send(sent)
    (only,) = records(client)
    assert only[0] == ALERT
    level, description = only[1]
    assert level == 2
    return description


def still_serves(site: Site) -> None:
    with TlsClient(site.address("smtps")) as other:
        other.secure().begin("EHLO other.test")


def der(issued: Issued) -> bytes:
    return ssl.PEM_cert_to_DER_cert(issued.pem.decode())


@pytest.mark.parametrize("version", [0x0300, 0x0301, 0x0302], ids=["SSLv3", "TLS 1.0", "TLS 1.1"])
def test_s_tl6_old_versions_are_off(client: TlsClient, version: int) -> None:
    assert alerted(client, hello(USUAL, version=version)) in {40, 70}, "handshake_failure, protocol_version"


def test_s_tl6_version_2_of_ssl_is_off(client: TlsClient) -> None:
    """Its hello has a form of its own: whatever is said to it, it is no handshake."""
    body = b"\x01\x00\x02\x00\x06\x00\x00\x00\x10" + bytes.fromhex("0100800700c0") + bytes(range(16))
    client.send(bytes([0x80, len(body)]) + body)
    assert [kind for kind, _ in records(client)] in ([ALERT], [])


@pytest.mark.parametrize("compressions", [b"\x01\0", b"\0\x01\x40", b"\x01\x40\xff\0"])
def test_s_tl6_compression_is_off(client: TlsClient, compressions: bytes) -> None:
    """CRIME: whatever the client would like, the server chooses none."""
    flight = served(client, hello(USUAL, compressions=compressions))
    assert flight[0] == 2, "ServerHello"
    session_id = flight[38]
    assert flight[39 + session_id + 2] == 0, "compression_method null"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_s_tl6_no_early_data(site: Site, tmp_path: Path) -> None:
    """What is sent before the handshake is done can be replayed: a session may be resumed, but with no octet ahead."""
    session, early = str(tmp_path / "session"), tmp_path / "early"
    early.write_bytes(b"EHLO early.test\r\n")
    code, output = s_client(site.address("smtps"), "-tls1_3", "-sess_out", session, say=["QUIT"])
    assert code == 0
    assert "Max Early Data: 0" in output
    code, output = s_client(site.address("smtps"), "-tls1_3", "-sess_in", session, "-early_data", str(early), say=["QUIT"])
    assert code == 0
    assert "Reused, TLSv1.3" in output
    assert "Early data was not sent" in output
    assert "early.test" not in site.log()


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (b"\x02h2\x04smtp", True),
        (b"\x08\x01garbage", True),
        (b"\xff" + b"x" * 255, True),
        (b"\0", False),
        (b"\x09short", False),
        (b"", False),
    ],
    ids=repr,
)
def test_s_tl6_alpn(site: Site, client: TlsClient, names: bytes, taken: bool) -> None:
    """RFC 7301: protocols that nobody knows are passed over, what is malformed is refused."""
    sent = hello(USUAL, extension(16, len(names).to_bytes(2, "big") + names))
    if taken:
        served(client, sent)
    else:
        assert alerted(client, sent) == 50, "decode_error"
    still_serves(site)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, DEFAULT),
        (b"unknown.test", DEFAULT),
        (b"late.test", DEFAULT),
        (b"other.test", OTHER),
        (b"OTHER.test", OTHER),
        (b"../../etc/passwd", DEFAULT),
        (b"..\\..\\cert.key", DEFAULT),
        (b"other.test/../late.test", DEFAULT),
        (b"trailing.backslash\\", DEFAULT),
        (b"%00.other.test", DEFAULT),
        (b"*", DEFAULT),
        (b".", DEFAULT),
        (b"", DEFAULT),
        (b"x" * 255, DEFAULT),
        (b"other.test\0.evil.test", None),
        (b"\0", None),
        (b"x" * 256, None),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, bytes) else "",
)
def test_s_tl6_server_name(site: Site, client: TlsClient, name: bytes | None, expected: Issued | None) -> None:
    """An unknown name gets the first certificate, that of an expired one, too; a name that can be none is refused."""
    sent = hello(USUAL) if name is None else hello(USUAL, server_name(name))
    if expected is None:
        assert alerted(client, sent) in {50, 112, 80}, "decode_error, unrecognized_name, internal_error"
    else:
        flight = served(client, sent)
        assert [issued for issued in (DEFAULT, OTHER, LATE) if der(issued) in flight] == [expected]
    still_serves(site)


@pytest.mark.parametrize("name", [b"m\xc3\xa4il.test", b"\xff\xfe"], ids=repr)
def test_s_tl6_a_server_name_that_is_no_ascii(site: Site, client: TlsClient, name: bytes) -> None:
    client.send(hello(USUAL, server_name(name)))
    assert {kind for kind, _ in records(client)} <= {ALERT, HANDSHAKE}
    still_serves(site)


@pytest.mark.parametrize("size", [16000, 65000])
def test_s_tl6_a_hello_of_64_kib(site: Site, client: TlsClient, size: int) -> None:
    """Well-formed and padded (RFC 7685): taken or refused, at once; nobody else waits for it."""
    client.send(hello(USUAL, padding=size))
    assert {kind for kind, _ in records(client)} <= {ALERT, HANDSHAKE}
    still_serves(site)


def test_s_tl6_a_handshake_has_half_a_minute_at_most() -> None:
    """That the limit holds is in `test_tls_attacks`; this is how long it is."""
    assert 0 < Limits().tls_timeout <= 30


@pytest.mark.parametrize("listener", ["inbound", "submission"])
def test_s_tl5_no_auth_before_tls_on_25_and_587(site: Site, listener: str) -> None:
    """Not offered, refused with the right password, too, and after all of that nobody is logged in."""
    with TlsClient(site.address(listener)) as client:
        client.begin()
        assert "AUTH" not in client.say("EHLO client.test")
        for line in (f"AUTH PLAIN {PLAIN}", "AUTH PLAIN", "AUTH LOGIN", "AUTH SCRAM-SHA-256 biwsbj11c2VyLHI9eA=="):
            assert client.say(line)[:4] in {"538 ", "503 "}
        assert client.say(f"MAIL FROM:<alice@{DOMAIN}>").startswith("250 " if listener == "inbound" else "530 5.7.0")
        assert client.say("RCPT TO:<b@elsewhere.test>")[:4] in {"550 ", "503 "}
        client.say("RSET")
        assert client.say("STARTTLS").startswith("220 ")
        client.secure()
        assert "\n250-AUTH " in client.say("EHLO client.test")
        assert client.say(f"AUTH PLAIN {PLAIN}").startswith("235 ")
    assert site.taken() == []
    assert PASSWORD not in site.log()
    assert PLAIN not in site.log()


SECRETS: Final = (PASSWORD, PLAIN, base64.b64encode(PASSWORD.encode()).decode())

#: What a server, or somebody between, offers for AUTH in clear text; and whether STARTTLS is left in.
DOWNGRADES: Final = {
    "PLAIN only": ("AUTH PLAIN",),
    "SCRAM stripped": ("AUTH PLAIN LOGIN XOAUTH2",),
    "SCRAM left in": ("AUTH PLAIN SCRAM-SHA-256",),
    "the old form": ("AUTH=PLAIN LOGIN",),
    "both forms": ("AUTH PLAIN", "AUTH=PLAIN LOGIN"),
    "TLS is offered, and does not come": ("STARTTLS", "AUTH PLAIN LOGIN SCRAM-SHA-256"),
}


def test_c_tl4_no_credential_for_whoever_takes_tls_away(tmp_path: Path) -> None:
    """Mail for a smarthost with a password waits, in each case; not an octet of the password is sent or written down."""
    with ExitStack() as stack:
        site = tls_site(tmp_path / "site", delivery={"credentials": str(tmp_path / "credentials")})
        (tmp_path / "credentials").touch(0o600)
        hops: list[Mx] = []
        for number, extensions in enumerate(DOWNGRADES.values()):
            script = Script(extensions=extensions, unknown=frozenset({"STARTTLS"}))
            hops.append(stack.enter_context(Mx("127.0.0.1", script=script, logins={"alice": PASSWORD})))
            hop = f"[127.0.0.1]:{hops[-1].port}"
            with open(tmp_path / "credentials", "a", encoding="utf-8") as file:
                file.write(f"{hop} : alice : {PASSWORD}\n")
            with open(site.config_path, "a", encoding="utf-8") as file:
                file.write(f'\n[[delivery.policy]]\ndomain = ["case{number}.test"]\nnext_hop = "{hop}"\n')
        stack.enter_context(site)
        sent = [site.send("a@sender.test", f"b@case{number}.test", b"Subject: x\r\n") for number in range(len(hops))]
        for queue_id, mx in zip(sent, hops, strict=True):
            assert site.await_deferred(queue_id)["recipients"][0]["status"] == "4.7.4"
            mx.await_closed()
            assert mx.transactions == []
            assert set(mx.verbs()) <= {"EHLO", "STARTTLS", "QUIT"}
            assert mx.verbs()[0] == "EHLO"
            said = b"".join(data for _, data in mx.reads)
            assert not [secret for secret in SECRETS if secret.encode() in said]
        assert not [secret for secret in SECRETS if secret in site.log()]
