"""Real clients with TLS and AUTH (issue 3): swaks and msmtp over every way in, by every mechanism that they have."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Final

import pytest

from tests.peers.ours import CA, NAME, PASSWORD, other, ours, trace
from tests.site import DOMAIN, PATIENCE, Site
from tests.unit.tls_aid import authority

#: Each listener with the options of swaks for it, and what our trace calls it without AUTH.
WAYS: Final = {
    "plain": ([], "ESMTP"),
    "inbound": (["--tls"], "ESMTPS"),
    "smtps": (["--tlsc"], "ESMTPS"),
    "relay": (["--tls"], "ESMTPS"),
}
LOGIN_WAYS: Final = {
    "loopback": ([], "ESMTPA"),
    "submission": (["--tls"], "ESMTPSA"),
    "submissions": (["--tlsc"], "ESMTPSA"),
    "inbound": (["--tls"], "ESMTPSA"),
    "smtps": (["--tlsc"], "ESMTPSA"),
}
networks: Final = count(1)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ours(tmp_path_factory.mktemp("encrypted")) as site:
        yield site


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False).stdout


SWAKS: Final = _output("swaks", "--support")
needs_swaks = pytest.mark.skipif("TLS supported" not in SWAKS, reason="swaks is not installed, or has no TLS")
MSMTP: Final = _output("msmtp", "--version")
needs_msmtp = pytest.mark.skipif("TLS/SSL library: " not in MSMTP, reason="msmtp is not installed, or has no TLS")


class Done:
    """How a program of another ended."""

    def __init__(self, *command: str, stdin: str = "") -> None:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=2 * PATIENCE, check=False, encoding="utf-8"
        )
        self.code = done.returncode
        self.text = done.stdout + done.stderr


def swaks(site: Site, listener: str, *options: str, to: str = f"bob@{DOMAIN}", body: str = "hello") -> Done:
    """One message; ``options`` may override."""
    host, port = site.address(listener)
    command = ["swaks", "--server", host, "--port", str(port), "--helo", "laptop.test", "--timeout", "15"]
    command += ["--from", f"alice@{DOMAIN}", "--to", to, "--body", body]
    return Done(*command, *options)


def as_alice(*mechanism: str, password: str = PASSWORD, option: str = "--auth") -> list[str]:
    return [option, *mechanism, "--auth-user", "alice", "--auth-password", password]


# -- swaks ------------------------------------------------------------------------------------------------------------


@needs_swaks
@pytest.mark.parametrize("listener", WAYS)
def test_swaks_over_each_way_in(site: Site, listener: str) -> None:
    """The certificate is checked where there is TLS, and the trace names the cipher that swaks saw."""
    options, protocol = WAYS[listener]
    before = len(site.mailbox("bob"))
    done = swaks(site, listener, *options, "--tls-verify", "--tls-ca-path", str(site.root / "ca.pem"), body=listener)
    assert done.code == 0, done.text
    content = site.await_mail("bob", before + 1)[-1]
    assert content.rstrip().endswith(listener.encode())
    found = trace(content)
    assert found.protocol == protocol
    seen = re.search(r"=== TLS started with cipher (\S+):(\S+):\d+", done.text)
    assert found.cipher == (f"{seen[1]} with cipher {seen[2]}" if seen else "")
    assert bool(seen) is bool(options)


@needs_swaks
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
@pytest.mark.parametrize("listener", LOGIN_WAYS)
def test_swaks_logs_in_over_each_way_in(site: Site, listener: str, mechanism: str) -> None:
    options, protocol = LOGIN_WAYS[listener]
    before = len(site.mailbox("bob"))
    done = swaks(site, listener, *options, *as_alice(mechanism))
    assert done.code == 0, done.text
    assert re.search(r"<[~-]  235 2\.7\.0 ", done.text)
    assert trace(site.await_mail("bob", before + 1)[-1]).protocol == protocol


@needs_swaks
def test_swaks_takes_what_both_have(site: Site) -> None:
    """Without a wish it finds a mechanism; asked for those that we do not have, it ends by itself or goes on without."""
    before = len(site.mailbox("bob"))
    done = swaks(site, "submission", "--tls", *as_alice())
    assert done.code == 0, done.text
    for mechanism in ("CRAM-MD5", "CRAM-SHA1"):
        if f"AUTH {mechanism} supported" in SWAKS:
            done = swaks(site, "submission", "--tls", *as_alice(mechanism))
            assert done.code == 28, done.text
            assert "AUTH" not in "".join(line for line in done.text.splitlines() if line.startswith(" ~>")), done.text
    done = swaks(site, "inbound", "--tls", *as_alice("CRAM-MD5", option="--auth-optional"))
    assert done.code == 0, done.text
    site.await_mail("bob", before + 2)  # none of them shall come in the midst of another test


@needs_swaks
@pytest.mark.parametrize("option", ["--tls-optional", "--tls-optional-strict"])
def test_swaks_takes_tls_where_it_is_offered(site: Site, option: str) -> None:
    for listener, protocol in (("inbound", "ESMTPS"), ("plain", "ESMTP")):
        before = len(site.mailbox("bob"))
        done = swaks(site, listener, option)
        assert done.code == 0, done.text
        assert trace(site.await_mail("bob", before + 1)[-1]).protocol == protocol


@needs_swaks
@pytest.mark.parametrize("version", ["tlsv1_2", "tlsv1_3"])
@pytest.mark.parametrize("listener", ["submission", "submissions"])
def test_swaks_chooses_the_version(site: Site, listener: str, version: str) -> None:
    before = len(site.mailbox("bob"))
    done = swaks(site, listener, *LOGIN_WAYS[listener][0], "--tls-protocol", version, "--tls-sni", NAME, *as_alice("PLAIN"))
    assert done.code == 0, done.text
    name = {"tlsv1_2": "TLSv1.2", "tlsv1_3": "TLSv1.3"}[version]
    assert trace(site.await_mail("bob", before + 1)[-1]).cipher.startswith(f"{name} with cipher ")


@needs_swaks
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
@pytest.mark.parametrize("listener", ["loopback", "submission", "submissions"])
def test_swaks_has_the_wrong_password(site: Site, listener: str, mechanism: str) -> None:
    """It is told so, nothing is sent, and the password is in no log."""
    before = len(site.mailbox("bob"))
    options = [*LOGIN_WAYS[listener][0], "--local-interface", other(next(networks)), "--auth-user", f"who{next(networks)}"]
    done = swaks(site, listener, *as_alice(mechanism, password="swordfish"), *options)
    assert done.code == 28, done.text
    assert re.search(r"<[~*]\* 535 5\.7\.8 ", done.text)
    assert len(site.mailbox("bob")) == before
    assert "swordfish" not in site.log()


@needs_swaks
def test_swaks_is_told_to_log_in_and_to_encrypt_first(site: Site) -> None:
    assert re.search(r"<~\* 530 5\.7\.0 ", swaks(site, "submission", "--tls").text)
    done = swaks(site, "submission", *as_alice("PLAIN"))
    assert done.code == 28, done.text
    assert PASSWORD not in done.text
    assert re.search(
        r"550 5\.7\.1 ", swaks(site, "submission", "--tls", *as_alice("PLAIN"), "--from", f"bob@{DOMAIN}").text
    )


@needs_swaks
@pytest.mark.parametrize("listener", ["inbound", "smtps"])
def test_swaks_trusts_no_other_authority(site: Site, tmp_path: Path, listener: str) -> None:
    (tmp_path / "other.pem").write_bytes(authority("Another CA").pem)
    done = swaks(site, listener, *WAYS[listener][0], "--tls-verify", "--tls-ca-path", str(tmp_path / "other.pem"))
    assert done.code == 29, done.text
    assert "certificate verify failed" in done.text


# -- msmtp ------------------------------------------------------------------------------------------------------------


def msmtp(site: Site, root: Path, listener: str, *settings: str, to: str = f"bob@{DOMAIN}") -> Done:
    """One message; ``settings`` are lines of its configuration, the last one of a name wins."""
    host, port = site.address(listener)
    lines = ["account default", f"host {host}", f"port {port}", f"from alice@{DOMAIN}", "domain laptop.test", "timeout 15"]
    if listener not in {"plain", "loopback"}:
        lines += ["tls on", f"tls_trust_file {root / 'trust.pem'}", f"tls_host_override {NAME}"]
        lines.append(f"tls_starttls {'off' if listener in {'smtps', 'submissions'} else 'on'}")
    (root / "trust.pem").write_bytes(CA.pem)
    (root / "msmtprc").write_text("\n".join([*lines, *settings]) + "\n", encoding="utf-8")
    (root / "msmtprc").chmod(0o600)
    letter = f"From: Alice <alice@{DOMAIN}>\nTo: {to}\nSubject: msmtp\n\n.\nGr\u00fc\u00dfe \u00fcber {listener}\n..\n"
    return Done("msmtp", "-C", str(root / "msmtprc"), "-v", to, stdin=letter)


def password(mechanism: str, login: str = "alice", secret: str = PASSWORD) -> list[str]:
    return [f"auth {mechanism}", f"user {login}", f'password "{secret}"']


@needs_msmtp
@pytest.mark.parametrize("listener", WAYS)
def test_msmtp_over_each_way_in(site: Site, tmp_path: Path, listener: str) -> None:
    before = len(site.mailbox("bob"))
    done = msmtp(site, tmp_path, listener)
    assert done.code == 0, done.text
    content = site.await_mail("bob", before + 1)[-1]
    assert content.endswith(f"\n\n.\nGr\u00fc\u00dfe \u00fcber {listener}\n..\n".encode())
    assert trace(content).protocol == WAYS[listener][1]


@needs_msmtp
@pytest.mark.parametrize("mechanism", ["plain", "login", "scram-sha-256", "on"])
@pytest.mark.parametrize("listener", ["submission", "submissions"])
def test_msmtp_logs_in(site: Site, tmp_path: Path, listener: str, mechanism: str) -> None:
    """Also by SCRAM-SHA-256, which proves the server, too; "on" takes the best that both have."""
    if mechanism not in {"on", *MSMTP.split()}:
        pytest.skip(f"this msmtp has no {mechanism}")
    before = len(site.mailbox("bob"))
    done = msmtp(site, tmp_path, listener, *password(mechanism))
    assert done.code == 0, done.text
    found = trace(site.await_mail("bob", before + 1)[-1])
    assert found.protocol == "ESMTPSA"
    assert found.cipher.startswith("TLSv1.3 ")
    if mechanism != "on":
        site.await_log(rf"sasl_method={mechanism.upper()}, sasl_username=alice")
    assert "sasl_username=alice" in site.log()


@needs_msmtp
@pytest.mark.parametrize("mechanism", ["plain", "login", "scram-sha-256"])
def test_msmtp_has_the_wrong_password(site: Site, tmp_path: Path, mechanism: str) -> None:
    if mechanism not in MSMTP.split():
        pytest.skip(f"this msmtp has no {mechanism}")
    before = len(site.mailbox("bob"))
    stranger = password(mechanism, f"who{next(networks)}", "swordfish")
    done = msmtp(site, tmp_path, "submissions", *stranger, f"source_ip {other(next(networks))}")
    assert done.code == 77, "EX_NOPERM"
    assert "535 5.7.8" in done.text
    assert len(site.mailbox("bob")) == before
    assert "swordfish" not in site.log()


@needs_msmtp
@pytest.mark.parametrize("listener", ["submission", "submissions"])
@pytest.mark.parametrize("wrong", ["authority", "name"])
def test_msmtp_shows_a_stranger_no_password(site: Site, tmp_path: Path, listener: str, wrong: str) -> None:
    """A certificate that another authority signed, or that is for another name, ends it before AUTH."""
    (tmp_path / "other.pem").write_bytes(authority("Another CA").pem)
    setting = f"tls_trust_file {tmp_path / 'other.pem'}" if wrong == "authority" else "tls_host_override mail.example.net"
    done = msmtp(site, tmp_path, listener, *password("plain"), setting)
    assert done.code != 0
    assert "certificate" in done.text
    assert "AUTH PLAIN " not in done.text


# -- curl -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(" smtps" not in _output("curl", "--version"), reason="curl is not installed, or has no SMTP with TLS")
@pytest.mark.parametrize("listener", ["submission", "submissions"])
def test_curl_checks_the_certificate(site: Site, tmp_path: Path, listener: str) -> None:
    """With our authority it sends; with another one it says nothing more after the handshake."""
    host, port = site.address(listener)
    scheme = "smtp" if listener == "submission" else "smtps"
    (tmp_path / "mail").write_text(f"From: alice@{DOMAIN}\r\nSubject: curl\r\n\r\nhello\r\n")
    (tmp_path / "other.pem").write_bytes(authority("Another CA").pem)
    before = len(site.mailbox("bob"))
    command = [
        "curl",
        "-sS",
        "--ssl-reqd",
        f"{scheme}://localhost:{port}/laptop.test",
        "--resolve",
        f"localhost:{port}:{host}",
    ]
    command += ["-u", f"alice:{PASSWORD}", "--mail-from", f"alice@{DOMAIN}", "--mail-rcpt", f"bob@{DOMAIN}", "-m", "20"]
    command += ["--upload-file", str(tmp_path / "mail"), "--cacert"]
    assert Done(*command, str(tmp_path / "other.pem")).code == 60
    assert len(site.mailbox("bob")) == before
    done = Done(*command, str(site.root / "ca.pem"))
    assert done.code == 0, done.text
    assert trace(site.await_mail("bob", before + 1)[-1]).protocol == "ESMTPSA"
