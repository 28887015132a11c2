"""TLS over real sockets, against the running daemon: clients of others, versions, certificates that change, SNI."""

from __future__ import annotations

import os
import re
import shutil
import smtplib
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.tls_site import CA, TlsClient, s_client, tls_site
from tests.site import DOMAIN, PATIENCE, Site, await_value
from tests.unit.tls_aid import issue

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def _swaks_has_tls() -> bool:
    if shutil.which("swaks") is None:
        return False
    found = subprocess.run(["swaks", "--support"], capture_output=True, text=True, timeout=30, check=False).stdout
    return re.search(r"^\*\*\* Basic TLS not available|TLS.*not available", found, re.M) is None


needs_swaks = pytest.mark.skipif(not _swaks_has_tls(), reason="swaks is not installed, or has no TLS")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with tls_site(tmp_path_factory.mktemp("tls")) as site:
        yield site


def verifying(site: Site) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(site.root / "ca.pem"))


def received(content: bytes) -> str:
    """Our own Received: field, on one line."""
    header = re.sub(r"\r?\n\s+", " ", content.decode())
    return next(line for line in header.splitlines() if line.startswith("Received:"))


# -- clients ----------------------------------------------------------------------------------------------------------


def test_smtplib_with_starttls(site: Site) -> None:
    """Delivered, and the trace says ESMTPS (RFC 3848) with version and cipher."""
    before = len(site.mailbox("alice"))
    host, port = site.address("inbound")
    with smtplib.SMTP(host, port, "client.test", PATIENCE) as client:
        client._host = f"mx.{DOMAIN}"  # type: ignore[attr-defined]  # the name to check
        client.starttls(context=verifying(site))
        client.ehlo()
        assert "starttls" not in client.esmtp_features
        client.sendmail("a@sender.test", f"alice@{DOMAIN}", b"Subject: starttls\r\n\r\nhello\r\n")
    field = received(site.await_mail("alice", before + 1)[-1])
    assert " with ESMTPS id " in field
    assert re.search(r"TLSv1\.3 with cipher TLS_AES_256_GCM_SHA384 \(256/256 bits\)", field)
    site.await_log(r"Anonymous TLS connection established from unknown\[127\.0\.0\.1\]: TLSv1\.3 with cipher TLS_AES_256")


@pytest.mark.parametrize("family", ["4", "6"])
def test_smtplib_with_tls_from_the_first_octet(site: Site, family: str) -> None:
    before = len(site.mailbox("bob"))
    host, port = site.address("smtps", family)
    context = verifying(site)
    context.check_hostname = False
    line = b"0123456789abcdef" * 4 + b"\r\n"
    with smtplib.SMTP_SSL(host, port, local_hostname="client.test", timeout=PATIENCE, context=context) as client:
        client.ehlo()
        assert "starttls" not in client.esmtp_features
        client.sendmail("a@sender.test", f"bob@{DOMAIN}", b"Subject: big\r\n\r\n" + line * 20000)
    content = site.await_mail("bob", before + 1)[-1]
    assert " with ESMTPS id " in received(content)
    assert content.count(line.rstrip()) == 20000


@needs_swaks
@pytest.mark.parametrize(
    ("listener", "options"),
    [
        ("inbound", ["--tls"]),
        ("relay", ["--tls"]),
        ("smtps", ["--tlsc"]),
        ("inbound", ["--tls", "--tls-protocol", "tlsv1_2"]),
        ("smtps", ["--tlsc", "--tls-protocol", "tlsv1_2"]),
    ],
)
def test_swaks(site: Site, listener: str, options: list[str]) -> None:
    before = len(site.mailbox("alice"))
    host, port = site.address(listener)
    command = ["swaks", "--server", host, "--port", str(port), "--from", "a@sender.test", "--to", f"alice@{DOMAIN}"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "=== TLS started with cipher" in result.stdout
    site.await_mail("alice", before + 1)


@needs_swaks
def test_swaks_finds_no_tls_where_there_is_none(site: Site) -> None:
    host, port = site.address("plain")
    command = ["swaks", "--server", host, "--port", str(port), "--to", f"alice@{DOMAIN}", "--tls"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "Host did not advertise STARTTLS" in result.stderr
    assert result.returncode != 0


# -- versions ---------------------------------------------------------------------------------------------------------


@needs_openssl
@pytest.mark.parametrize("listener", ["inbound", "smtps"])
@pytest.mark.parametrize(
    ("option", "version"), [("-tls1", None), ("-tls1_1", None), ("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")]
)
def test_s_client(site: Site, listener: str, option: str, version: str | None) -> None:
    """S-TL6: TLS 1.0 and 1.1 are refused, 1.2 and 1.3 are spoken."""
    how = ["-starttls", "smtp"] if listener == "inbound" else []
    code, output = s_client(site.address(listener), *how, option, "-cipher", "ALL:@SECLEVEL=0", say=["QUIT"])
    if version is None:
        assert code != 0
        assert "alert protocol version" in output
        site.await_log(r"SSL_accept error from unknown\[127\.0\.0\.1\]: unsupported protocol")
    else:
        assert code == 0, output
        assert re.search(rf"New, {re.escape(version)}, Cipher is", output) or version in output
        assert "221 2.0.0 Bye" in output
        assert "Compression: NONE" in output or version == "TLSv1.3"


@needs_openssl
def test_s_tl6_renegotiation_is_refused(site: Site) -> None:
    process = subprocess.Popen(
        ["openssl", "s_client", "-connect", "{}:{}".format(*site.address("smtps")), "-tls1_2"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    seen = b""
    while b"ESMTP mtad" not in seen:
        seen += os.read(process.stdout.fileno(), 65536)
    process.stdin.write(b"R\n")
    process.stdin.flush()
    rest, _ = process.communicate(timeout=20)
    assert b"RENEGOTIATING" in rest
    assert b"no renegotiation" in rest
    assert process.returncode != 0


# -- certificates -----------------------------------------------------------------------------------------------------


def certificate(site: Site, listener: str = "smtps", name: str | None = None) -> bytes:
    """What a new client gets, in DER."""
    with TlsClient(site.address(listener)) as client:
        return (client.secure(name=name) if listener == "smtps" else client.starttls(name=name)).certificate


def der(pem: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pem.decode())


def test_certificates_change_without_a_restart(tmp_path: Path) -> None:
    """The new pair serves the next handshake, in each listener process; a broken one is told, and the old one stays."""
    old, new, newest = (issue(f"{name}.{DOMAIN}") for name in ("old", "new", "newest"))
    with tls_site(tmp_path, certificate=old) as site:
        pids = site.processes()
        assert certificate(site) == certificate(site, "inbound") == der(old.pem)
        new.write(tmp_path)
        await_value(lambda: {certificate(site) for _ in range(6)} == {der(new.pem)}, what="all listeners have the new one")
        assert certificate(site, "inbound") == der(new.pem)
        assert "warning" not in site.log()

        (tmp_path / "cert.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nnonsense\n")
        await_value(lambda: certificate(site) == der(new.pem) and "stay in use" in site.log(), what="the fault is told")
        assert re.search(r"warning: \S+/cert\.pem: no certificate in PEM; the certificates read before stay", site.log())
        (tmp_path / "cert.pem").write_bytes(newest.pem)
        await_value(lambda: certificate(site) == der(new.pem) and "is not the key of" in site.log(), what="it is told")
        (tmp_path / "cert.key").write_bytes(newest.key_pem)
        await_value(lambda: {certificate(site) for _ in range(6)} == {der(newest.pem)}, what="all listeners have it")
        assert site.processes()[:1] == pids[:1]


def test_a_broken_certificate_keeps_it_from_starting_and_from_reloading(tmp_path: Path) -> None:
    site = tls_site(tmp_path)
    key = tmp_path / "cert.key"
    good = key.read_bytes()
    key.write_bytes(issue("x.test").key_pem)
    refused = site.run("mtad", "start", "--foreground")
    assert refused.returncode == 78
    assert re.search(rf"mtad\.toml:\d+: tls\.key: {key}: is not the key of {tmp_path}/cert\.pem", refused.stderr)
    key.write_bytes(good)
    with site:
        served = certificate(site)
        key.unlink()
        refused = site.reload()
        assert refused.returncode == 78
        assert f"tls.key: {key} does not exist" in refused.stderr
        assert certificate(site) == served
        key.write_bytes(good)
        os.chmod(key, 0o600)
        assert site.reload().returncode == 0
        assert certificate(site) == served


def test_a_reload_takes_other_files(tmp_path: Path) -> None:
    other = issue("other.test")
    with tls_site(tmp_path) as site:
        pair = other.write(tmp_path, "other")
        site.configure(tls={"certificate": pair.certificate, "key": pair.key})
        site.renew()
        assert certificate(site) == certificate(site, "inbound") == der(other.pem)


def test_several_certificates_by_sni(tmp_path: Path) -> None:
    first, wild = issue(f"mx.{DOMAIN}"), issue("mail.example.com", "*.wild.test", by=CA)
    pair = wild.write(tmp_path, "wild")
    site = tls_site(tmp_path, certificate=first)
    with open(site.config_path, "a", encoding="utf-8") as file:
        file.write(f'\n[[tls.sni]]\ncertificate = "{pair.certificate}"\nkey = "{pair.key}"\n')
    with site:
        for listener in ("smtps", "inbound"):
            for name in (None, f"mx.{DOMAIN}", "nobody.test", "a.b.wild.test"):
                assert certificate(site, listener, name) == der(first.pem)
            for name in ("mail.example.com", "MAIL.example.com", "a.wild.test"):
                assert certificate(site, listener, name) == der(wild.pem)
        hello = odd_hello(b"m\xc3\xa4il.example.com")
        with TlsClient(site.address("smtps")) as client:
            client.send(hello)
            assert client.socket.recv(1) == b"\x15", "an alert"
        site.await_log("SSL_accept error from .*callback failed")
        assert certificate(site, "smtps") == der(first.pem)
    assert "Traceback" not in (site.root / "output").read_text(), "something is written past the log"


def odd_hello(name: bytes) -> bytes:
    """A ClientHello that asks for a name that Python would not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="a" * len(name)).do_handshake()
    return outgoing.read().replace(b"a" * len(name), name, 1)


# -- stopping ---------------------------------------------------------------------------------------------------------


def test_a_stop_does_not_wait_for_handshakes(tmp_path: Path) -> None:
    with (
        tls_site(tmp_path) as site,
        TlsClient(site.address("smtps")) as silent,
        TlsClient(site.address("inbound")) as idle,
    ):
        idle.starttls()
        assert idle.say("EHLO client.test").startswith("250")
        await_value(lambda: site.status().sessions == 2, what="both are there")
        begin = time.monotonic()
        site.stop()
        assert time.monotonic() - begin < 4
        assert idle.reply().startswith("421 4.3.2")
        assert silent.closed()
