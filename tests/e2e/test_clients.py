"""Issue 2: real clients. swaks, Python's smtplib, `nc` fed from a file with one line a second, a hundred at once."""

from __future__ import annotations

import email.message
import email.policy
import os
import shutil
import signal
import smtplib
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.site import PATIENCE, Site

LINES = b"""\
HELO by-hand.test
MAIL FROM: a@sender.test
RCPT TO: bob@example.org
DATA
Subject: by hand
.
QUIT
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    limits = {"connections_per_client": 200}
    users = ("root", "alice", "bob", "carol", "dave")
    with Site(tmp_path_factory.mktemp("clients"), limits=limits, users=users) as site:
        yield site


@pytest.fixture(scope="module", autouse=True)
def slow_nc(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str] | None]:
    """`nc` at the pace of a human, while the other tests of this file run."""
    program = shutil.which("nc")
    if program is None:
        yield None
        return
    host, port = site.address()
    script = tmp_path_factory.mktemp("nc") / "lines"
    script.write_bytes(LINES.replace(b"\n", b"\r\n"))
    feed = f'while IFS= read -r line; do sleep 1; printf "%s\\n" "$line"; done < {script} | {program} {host} {port}'
    with subprocess.Popen(["sh", "-c", feed], stdout=subprocess.PIPE, text=True, start_new_session=True) as nc:
        yield nc
        if nc.poll() is None:
            os.killpg(nc.pid, signal.SIGKILL)


def _needs(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("4", ()),
        ("6", ()),
        ("4", ("--pipeline",)),
        ("4", ("--protocol", "SMTP")),
        ("4", ("--attach", "@/etc/hostname")),
    ],
    ids=str,
)
def test_swaks(site: Site, family: str, options: tuple[str, ...]) -> None:
    """Real clients: swaks, also with pipelining, with HELO and with an attachment, over both address families."""
    program = _needs("swaks")
    host, port = site.address(family=family)
    before = len(site.mailbox("alice"))
    command = [program, f"-{family}", "--server", host, "--port", str(port), "--helo", "swaks.test", *options]
    command += ["--from", "a@sender.test", "--to", "alice@example.org", "--body", "hello from swaks"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if result.returncode == 10:
        pytest.skip(f"this swaks cannot do it: {(result.stdout + result.stderr).strip()}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "<-  250 2.0.0 Ok: queued as " in result.stdout
    assert b"hello from swaks" in site.await_mail("alice", before + 1)[-1]


def test_swaks_is_refused(site: Site) -> None:
    """Real clients: swaks understands what it is told when a recipient is refused."""
    program = _needs("swaks")
    host, port = site.address()
    command = [program, "--server", host, "--port", str(port), "--from", "a@sender.test", "--to", "nobody@example.org"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 24, "no recipients were accepted"
    assert "550 5.1.1 <nobody@example.org>: Recipient address rejected: User unknown" in result.stdout


def test_smtplib(site: Site) -> None:
    """Real clients: Python's smtplib, several messages in a session, one with a recipient that is refused."""
    message = email.message.EmailMessage()
    message["From"], message["To"], message["Subject"] = "a@sender.test", "carol@example.org", "smtplib"
    message.set_content("Grüße\n.\n..\nein Punkt\n")
    with site.client() as client:
        assert client.send_message(message) == {}
        content = message.as_bytes(policy=email.policy.SMTP)
        refused = client.sendmail("a@sender.test", ["carol@example.org", "nobody@example.org"], content)
        assert refused == {
            "nobody@example.org": (550, b"5.1.1 <nobody@example.org>: Recipient address rejected: User unknown")
        }
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            client.sendmail("a@sender.test", "nobody@example.org", content)
        assert client.noop()[0] == 250
        assert client.rset()[0] == 250
        assert client.has_extn("pipelining")
        assert client.has_extn("8bitmime")
    first, second = site.await_mail("carol", 2)
    for stored in (first, second):
        assert email.message_from_bytes(stored).get_payload(decode=True) == "Grüße\n.\n..\nein Punkt\n".encode()


def test_a_hundred_at_once(site: Site) -> None:
    """Real clients: a hundred at once, connected before the first one says a word; each message arrives, once."""
    barrier = threading.Barrier(100)

    def send(number: int) -> None:
        with site_client(address) as client:
            barrier.wait(PATIENCE)
            client.sendmail(f"u{number}@sender.test", "dave@example.org", f"Subject: {number}\r\n\r\nhello\r\n")

    address = site.address()
    with ThreadPoolExecutor(100) as pool:
        list(pool.map(send, range(100)))
    stored = site.await_mail("dave", 100)
    assert len(stored) == 100
    senders = {message.split(b">", 1)[0].removeprefix(b"Return-Path: <") for message in stored}
    assert senders == {b"u%d@sender.test" % number for number in range(100)}


def site_client(address: tuple[str, int]) -> smtplib.SMTP:
    """A client of its own, without a question to the master for each."""
    return smtplib.SMTP(*address, local_hostname="client.test", timeout=PATIENCE)


def test_nc_at_the_pace_of_a_human(site: Site, slow_nc: subprocess.Popen[str] | None) -> None:
    """Real clients: `nc` fed from a file with one line a second."""
    if slow_nc is None:
        pytest.skip("nc is not installed")
    output = slow_nc.communicate(timeout=PATIENCE)[0]
    assert [line[:3] for line in output.splitlines()] == ["220", "250", "250", "250", "354", "250", "221"]
    [stored] = site.await_mail("bob")
    assert stored.startswith(b"Return-Path: <a@sender.test>\nDelivered-To: bob@example.org\nReceived: from by-hand.test ")
    assert stored.endswith(b"\nSubject: by hand\n")
