"""Real clients: nodemailer of Node, over every way in, with AUTH, attachments, DSN and a pool (issue 3)."""

from __future__ import annotations

import base64
import email
import email.message
import email.policy
from collections.abc import Iterator
from itertools import count
from typing import Any, Final

import pytest

from tests.e2e.world import Report
from tests.peers.nodemailer import Nodemailer, nodemailer
from tests.peers.ours import CA, NAME, PASSWORD, other, ours, trace
from tests.site import DOMAIN, Site, await_value
from tests.unit.tls_aid import authority

__all__ = ["nodemailer"]

ALICE: Final = f"alice@{DOMAIN}"
BOB: Final = f"bob@{DOMAIN}"
networks: Final = count(100)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    users = ("root", "alice", "bob", "carol", "m\u00fcller")
    with ours(tmp_path_factory.mktemp("nodemailer"), users=users) as site:
        yield site


def transport(site: Site, listener: str, **options: Any) -> dict[str, Any]:
    """Its options for a listener; TLS where there is some, with the certificate checked."""
    host, port = site.address(listener)
    found: dict[str, Any] = {"host": host, "port": port, "name": "laptop.test", "connectionTimeout": 15000}
    if listener in {"smtps", "submissions"}:
        found["secure"] = True
    elif listener not in {"plain", "loopback"}:
        found["requireTLS"] = True
    return found | {"tls": {"ca": CA.pem.decode(), "servername": NAME}} | options


def login(method: str = "", user: str = "alice", password: str = PASSWORD) -> dict[str, Any]:
    return {"auth": {"user": user, "pass": password} | ({"method": method} if method else {})}


def letter(**fields: Any) -> dict[str, Any]:
    return {"from": ALICE, "to": BOB, "subject": "a test", "text": "hello"} | fields


def arrived(site: Site, user: str, count: int) -> email.message.EmailMessage:
    """The last of ``count`` messages."""
    found = email.message_from_bytes(site.await_mail(user, count)[-1], policy=email.policy.default)
    assert isinstance(found, email.message.EmailMessage)
    return found


@pytest.mark.parametrize(
    ("listener", "protocol"), [("plain", "ESMTP"), ("inbound", "ESMTPS"), ("smtps", "ESMTPS"), ("relay", "ESMTPS")]
)
def test_over_each_way_in(site: Site, nodemailer: Nodemailer, listener: str, protocol: str) -> None:
    before = len(site.mailbox("bob"))
    [result] = nodemailer.send(transport(site, listener), letter())
    assert result["response"].startswith("250 2.0.0 Ok: queued as ")
    assert result["accepted"] == [BOB]
    found = trace(site.await_mail("bob", before + 1)[-1])
    assert found.protocol == protocol
    assert found.cipher.startswith("TLSv1.3 ") is (protocol == "ESMTPS")
    assert "from laptop.test " in found.field


@pytest.mark.parametrize("method", ["", "PLAIN", "LOGIN"])
@pytest.mark.parametrize("listener", ["loopback", "submission", "submissions", "inbound"])
def test_it_logs_in(site: Site, nodemailer: Nodemailer, listener: str, method: str) -> None:
    """By its own choice, too, although the best that we offer is nothing that it knows."""
    before = len(site.mailbox("bob"))
    [result] = nodemailer.send(transport(site, listener, **login(method)), letter())
    assert result.get("response", "").startswith("250 2.0.0 "), result
    protocol = "ESMTPA" if listener == "loopback" else "ESMTPSA"
    assert trace(site.await_mail("bob", before + 1)[-1]).protocol == protocol


@pytest.mark.parametrize("method", ["PLAIN", "LOGIN"])
def test_it_has_the_wrong_password(site: Site, nodemailer: Nodemailer, method: str) -> None:
    options = login(method, f"who{next(networks)}", "swordfish") | {"localAddress": other(next(networks))}
    [result] = nodemailer.send(transport(site, "submissions", **options), letter())
    assert (result["code"], result["status"]) == ("EAUTH", 535)
    assert "535 5.7.8" in result["error"]
    assert "swordfish" not in site.log()


def test_it_trusts_no_other_authority(site: Site, nodemailer: Nodemailer) -> None:
    options = {"tls": {"ca": authority("Another CA").pem.decode(), "servername": NAME}, **login()}
    for listener in ("submission", "submissions"):
        [result] = nodemailer.send(transport(site, listener, **options), letter())
        assert "unable to verify the first certificate" in result["error"] or "self-signed" in result["error"], result


def test_text_of_the_world_and_attachments(site: Site, nodemailer: Nodemailer) -> None:
    """A subject, a name and a file's name in UTF-8, a body with dots, a binary attachment: all as they were."""
    before = len(site.mailbox("bob"))
    octets = bytes(range(256)) * 300
    subject = " ".join(["Gr\u00fc\u00dfe \u2709 \u5c71\u7530"] * 8)
    message = letter(
        **{"from": {"name": "\u00c4lice \u2013 \u5c71\u7530", "address": ALICE}},
        subject=subject,
        text=".\n..\nh\u00e4\n.\n",
        html="<p>h\u00e4</p>",
        attachments=[
            {"filename": "\u00fcbersicht \u5c71.bin", "content": base64.b64encode(octets).decode(), "encoding": "base64"}
        ],
    )
    [result] = nodemailer.send(transport(site, "submission", **login()), message)
    assert result.get("response", "").startswith("250 "), result
    found = arrived(site, "bob", before + 1)
    assert found["Subject"] == subject
    assert found["From"].addresses[0].display_name == "\u00c4lice \u2013 \u5c71\u7530"
    body = found.get_body(("plain",))
    assert body is not None
    assert body.get_content() == ".\n..\nh\u00e4\n.\n"
    [attachment] = found.iter_attachments()
    assert attachment.get_filename() == "\u00fcbersicht \u5c71.bin"
    assert attachment.get_content() == octets


def test_an_address_in_utf8(site: Site, nodemailer: Nodemailer) -> None:
    """RFC 6531: it asks for SMTPUTF8 by itself, and the trace says so."""
    [result] = nodemailer.send(transport(site, "inbound"), letter(to=f"m\u00fcller@{DOMAIN}"))
    assert result.get("response", "").startswith("250 "), result
    assert trace(site.await_mail("m\u00fcller")[-1]).protocol == "UTF8SMTPS"


def test_dsn(site: Site, nodemailer: Nodemailer) -> None:
    """RFC 3461: a report of success with the id and the recipient as they were given, and the header only."""
    before = len(site.mailbox("alice"))
    wish = {"id": "order 66+7", "return": "headers", "notify": ["success", "failure", "delay"], "recipient": BOB}
    [result] = nodemailer.send(transport(site, "submission", **login()), letter(dsn=wish, subject="with DSN"))
    assert result.get("response", "").startswith("250 "), result
    report = Report(site.await_mail("alice", before + 1)[-1])
    assert report.about_message["Original-Envelope-Id"] == "order 66+7"
    [recipient] = report.recipients
    assert (recipient["Action"], recipient["Status"]) == ("delivered", "2.0.0")
    assert recipient["Original-Recipient"] == f"rfc822; {BOB}"
    assert report.original.get_content_type() == "text/rfc822-headers"
    assert "Subject: with DSN" in report.original.get_content()


def test_a_refused_recipient_among_others(site: Site, nodemailer: Nodemailer) -> None:
    before = len(site.mailbox("bob"))
    [result] = nodemailer.send(transport(site, "inbound"), letter(to=[BOB, f"nobody@{DOMAIN}"]))
    assert result["accepted"] == [BOB]
    assert result["rejected"] == [f"nobody@{DOMAIN}"]
    site.await_mail("bob", before + 1)


@pytest.mark.parametrize("listener", ["submission", "submissions"])
def test_a_pool(site: Site, nodemailer: Nodemailer, listener: str) -> None:
    """Forty messages over three connections at a time, ten on each: all arrive, once, over no more than it takes."""
    before = {path.name for path in site.mailbox("carol")}
    seen = len(site.log())
    options = {"pool": True, "maxConnections": 3, "maxMessages": 10, **login()}
    names = [f"{listener} {number}" for number in range(40)]
    messages = [letter(to=f"carol@{DOMAIN}", subject=name) for name in names]
    results = nodemailer.send(transport(site, listener, **options), *messages)
    assert [result.get("response", result)[:9] for result in results] == ["250 2.0.0"] * 40
    await_value(lambda: len(site.mailbox("carol")) >= len(before) + 40, what="all of them")
    stored = [path.read_bytes() for path in site.mailbox("carol") if path.name not in before]
    assert sorted(str(email.message_from_bytes(one)["Subject"]) for one in stored) == sorted(names)
    assert 4 <= site.log()[seen:].count(": connect from ") <= 6
