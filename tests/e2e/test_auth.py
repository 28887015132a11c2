"""AUTH and submission over real sockets, against the running daemon: other people's clients, and those who guess."""

from __future__ import annotations

import base64
import re
import secrets
import shutil
import smtplib
import ssl
import subprocess
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest

from mtad.passwords import change_password, make_keys
from mtad.smtp.sasl import PLUS, SCRAM, decode, encode
from mtad.smtp.sasl_client import client_mechanism
from tests.client import Client
from tests.dialogue_script import DIALOGUES, Script, load, play
from tests.e2e.test_dialogues_live import Live
from tests.e2e.tls_site import TlsClient, tls_site
from tests.peers.mx import Mx
from tests.site import DOMAIN, PATIENCE, Site, await_value

PASSWORD: Final = "open sesame"
BOTH: Final = ["127.0.0.1:0", "[::1]:0"]
LISTENERS: Final[list[dict[str, Any]]] = [
    {"name": "submission", "service": "submission", "address": BOTH, "tls": "starttls"},
    {"name": "submissions", "service": "submission", "address": BOTH, "tls": "implicit"},
    {"name": "loopback", "service": "submission", "address": BOTH, "tls": "none", "auth_without_tls": "loopback"},
    {"name": "inbound", "service": "mx", "address": BOTH, "tls": "starttls"},
    {"name": "relay", "service": "relay", "address": BOTH},
]
SPECIAL: Final = [load(path) for path in sorted((DIALOGUES / "special").glob("*.txt"))]

needs = {
    name: pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed") for name in ("swaks", "curl")
}


def auth_site(root: Path, **options: Any) -> Site:
    """A site where alice and bob have passwords."""
    site = tls_site(root, **options)
    site.listeners = [dict(row) for row in LISTENERS]
    site.configure()
    for login in ("alice", "bob"):
        change_password(str(root / "passwords"), login, make_keys(PASSWORD))
    return site


@pytest.fixture(scope="module")
def mx() -> Iterator[Mx]:
    with Mx("127.0.0.1") as mx:
        yield mx


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, mx: Mx) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("auth")
    hop = {"next_hop": f"[127.0.0.1]:{mx.port}", "tls": "none"}
    with auth_site(root, delivery=hop, limits={"wrong_passwords": 1000}) as site:
        yield site


def unchecked() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def header(content: bytes) -> str:
    return re.sub(r"\r?\n[ \t]+", " ", content.decode())


@pytest.mark.parametrize("mechanism", ["plain", "login"])
@pytest.mark.parametrize("listener", ["submission", "submissions", "loopback", "inbound"])
def test_smtplib(site: Site, listener: str, mechanism: str) -> None:
    before = len(site.mailbox("bob"))
    host, port = site.address(listener)
    implicit = listener == "submissions"
    with (
        smtplib.SMTP_SSL(host, port, "laptop", timeout=PATIENCE, context=unchecked())
        if implicit
        else smtplib.SMTP(host, port, "laptop", PATIENCE)
    ) as client:
        if listener in {"submission", "inbound"}:
            client.ehlo()
            assert "auth" not in client.esmtp_features
            client.starttls(context=unchecked())
        client.ehlo()
        client.user, client.password = "alice", PASSWORD
        client.auth(mechanism, getattr(client, f"auth_{mechanism}"))
        client.sendmail(f"alice@{DOMAIN}", f"bob@{DOMAIN}", f"From: alice@{DOMAIN}\r\nSubject: x\r\n\r\nhello\r\n")
    content = header(site.await_mail("bob", before + 1)[-1])
    assert f" with ESMTP{'' if listener == 'loopback' else 'S'}A id " in content
    added = listener != "inbound"
    assert (re.search(r"^Message-ID: <\d{14}\.\w+@", content, re.M) is not None) is added
    assert (re.search(r"^Date: \w{3}, ", content, re.M) is not None) is added
    site.await_log(rf"client=unknown\[127\.0\.0\.1\], sasl_method={mechanism.upper()}, sasl_username=alice")


@pytest.mark.parametrize("name", [SCRAM, PLUS])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_scram(site: Site, name: str, version: ssl.TLSVersion) -> None:
    """The end point binds to the certificate in either version, tls-unique to the connection in TLS 1.2."""
    with TlsClient(site.address("submissions")) as client:
        client.secure(version=version)
        assert name in client.begin("EHLO laptop").say("EHLO laptop")
        assert isinstance(client.socket, ssl.SSLSocket)
        bindings = {}
        if name == PLUS and version is ssl.TLSVersion.TLSv1_2:
            bindings = {"tls-unique": client.socket.get_channel_binding("tls-unique") or b""}
        elif name == PLUS:
            bindings = {"tls-server-end-point": sha256(client.certificate).digest()}
        mechanism = client_mechanism(name, "alice", PASSWORD, bindings, nonce=secrets.token_hex(12))
        answer = client.say(f"AUTH {name} {encode(mechanism.initial or b'')}")
        while answer.startswith("334 "):
            answer = client.say(encode(mechanism.respond(decode(answer[4:]))))
        assert answer.startswith("235 2.7.0")
        assert mechanism.complete


@needs["swaks"]
@pytest.mark.parametrize("options", [["--auth", "PLAIN"], ["--auth", "LOGIN"]])
def test_swaks(site: Site, options: list[str]) -> None:
    host, port = site.address("loopback")
    command = [
        "swaks", "--server", host, "--port", str(port), "--helo", "laptop", *options,
        "--auth-user", "bob", "--auth-password", PASSWORD,
        "--from", f"bob@{DOMAIN}", "--to", f"alice@{DOMAIN}", "--timeout", "15",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([*command, "--auth-password", "wrong"], capture_output=True, text=True, timeout=40, check=False)
    assert "535 5.7.8" in done.stdout


@needs["curl"]
@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "SCRAM-SHA-256"])
def test_curl(site: Site, tmp_path: Path, scheme: str, mechanism: str) -> None:
    """curl has SCRAM when it was built with gsasl only."""
    host, port = site.address("submission" if scheme == "smtp" else "submissions")
    (tmp_path / "mail").write_text(f"From: Alice <alice@{DOMAIN}>\r\nSubject: {scheme} {mechanism}\r\n\r\nby curl\r\n")
    before = len(site.mailbox("alice"))
    done = subprocess.run(
        ["curl", "-sS", "-k", "--ssl-reqd", f"{scheme}://{host}:{port}/laptop", "--login-options", f"AUTH={mechanism}",
         "-u", f"alice:{PASSWORD}", "--mail-from", f"alice@{DOMAIN}", "--mail-rcpt", f"alice@{DOMAIN}",
         "--upload-file", str(tmp_path / "mail"), "-m", "20"],
        capture_output=True, text=True, timeout=40, check=False,
    )  # fmt: skip
    if mechanism.startswith("SCRAM") and done.returncode == 67 and "gsasl" not in _curl_version():
        pytest.skip("this curl has no SCRAM")
    assert done.returncode == 0, done.stderr
    assert b"by curl" in site.await_mail("alice", before + 1)[-1]


def _curl_version() -> str:
    return subprocess.run(["curl", "-V"], capture_output=True, text=True, timeout=10, check=False).stdout


def test_a_login_may_send_to_the_world_in_its_own_name(site: Site, mx: Mx) -> None:
    with Client(site.address("loopback")) as client:
        client.begin("EHLO laptop")
        assert client.say("MAIL FROM:<alice@example.org>").startswith("530 5.7.0")
        assert client.say(f"AUTH PLAIN {plain('alice')}").startswith("235 2.7.0")
        assert client.say("MAIL FROM:<bob@example.org>").startswith("550 5.7.1")
        for line in ("MAIL FROM:<alice@example.org>", "RCPT TO:<friend@example.com>", "DATA"):
            assert client.say(line)[:1] in {"2", "3"}
        client.send(b"Subject: to the world\r\n\r\nhi\r\n.\r\n")
        assert client.reply().startswith("250 2.0.0")
    received = await_value(
        lambda: [message for message in mx.messages if b"to the world" in message.content], what="it arrives"
    )
    assert b"Message-ID: <" in received[0].content


def plain(login: str, password: str = PASSWORD) -> str:
    return base64.b64encode(f"\0{login}\0{password}".encode()).decode()


@pytest.mark.parametrize("script", SPECIAL, ids=lambda script: script.name)
def test_dialogues(tmp_path_factory: pytest.TempPathFactory, quiet: Site, script: Script) -> None:
    names = {("submission", "starttls"): "submission", ("submission", "implicit"): "submissions", ("mx", "none"): "inbound"}
    name = names.get((script.service, script.tls), "inbound")
    with LiveTls(quiet, name) as live:
        if script.tls == "implicit":
            live.secure()
        play(script, live)


class LiveTls(Live):
    """A `Live` that chooses its listener by name."""

    def __init__(self, site: Site, listener: str) -> None:
        Client.__init__(self, site.address(listener))
        self._site = site
        self._before = {message.envelope.id for message in site.taken()}
        self._bytewise = False


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site that keeps what it takes."""
    with auth_site(tmp_path_factory.mktemp("quiet"), deliver=False, limits={"wrong_passwords": 1000}) as site:
        yield site


def test_who_guesses_is_slowed_down_and_shut_out_over_all_processes_s_pa13(tmp_path: Path) -> None:
    """S-PA13: few tries on a connection, slower each time; then none on any connection, to any process."""
    with auth_site(tmp_path, limits={"wrong_passwords": 3}, processes={"listeners": 3}) as site:
        started = time.monotonic()
        answers = []
        for number in range(3):
            with Client(site.address("loopback")) as client:
                client.begin("EHLO laptop")
                answers.append(client.say(f"AUTH PLAIN {plain('alice', f'sesame{number}')}")[:9])
        assert answers == ["535 5.7.8"] * 3
        assert time.monotonic() - started >= 1 + 2 + 4
        for _ in range(6):  # whichever process takes it
            with Client(site.address("loopback")) as client:
                client.begin("EHLO laptop")
                assert client.say(f"AUTH PLAIN {plain('alice')}").startswith("421 4.7.0")
                assert client.closed()
        with Client(site.address("loopback", "6")) as client:  # another network
            client.begin("EHLO laptop")
            assert client.say(f"AUTH PLAIN {plain('alice')}").startswith("235 ")
        site.await_log(r"warning: unknown\[127\.0\.0\.1\]: SASL PLAIN authentication failed: .*, sasl_username=alice")
        assert "sesame" not in site.log()
        assert plain("alice") not in site.log()


def test_a_new_password_holds_at_once(tmp_path: Path) -> None:
    with auth_site(tmp_path) as site:
        change_password(str(tmp_path / "passwords"), "carol", make_keys("new"))

        def can_log_in() -> bool:
            with Client(site.address("loopback")) as client:
                client.begin("EHLO laptop")
                return client.say(f"AUTH PLAIN {plain('carol', 'new')}").startswith("235 ")

        time.sleep(1.1)  # a change may go unnoticed for a second
        assert can_log_in()
