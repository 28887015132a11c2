"""A real Postfix as our client: in clear text, over TLS that it checks, with AUTH; and DSN there and back (issue 3)."""

from __future__ import annotations

import re
import shutil
import smtplib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.e2e.world import Report
from tests.peers.ours import NAME, PASSWORD, certificate, ours, trace
from tests.peers.postfix import Postfix, Relay, needs_postfix
from tests.site import DOMAIN, PATIENCE, Site, await_value
from tests.unit.tls_aid import authority

pytestmark = needs_postfix

HAS_SASL: Final = any(Path("/usr/lib").glob("**/sasl2/libplain.so"))
needs_sasl = pytest.mark.skipif(not HAS_SASL, reason="the SASL modules of libsasl2-modules are not installed")

ENCRYPT: Final = {"smtp_tls_security_level": "encrypt"}
SECURE: Final = {"smtp_tls_security_level": "secure", "smtp_tls_secure_cert_match": NAME}
WRAPPED: Final = {"smtp_tls_wrappermode": "yes"}


class Way(NamedTuple):
    """A listener of ours, how Postfix is to talk to it, and what our trace says then."""

    listener: str
    settings: Mapping[str, str]
    protocol: str
    cipher: str = "TLSv1.3 with cipher TLS_AES_256_GCM_SHA384"


#: By the mailbox that the mail is for.
WAYS: Final = {
    "clear": Way("plain", {"smtp_tls_security_level": "may"}, "ESMTP", ""),
    "none": Way("inbound", {"smtp_tls_security_level": "none"}, "ESMTP", ""),
    "may": Way("inbound", {"smtp_tls_security_level": "may"}, "ESMTPS"),
    "encrypt": Way("inbound", ENCRYPT, "ESMTPS"),
    "twelve": Way("inbound", ENCRYPT | {"smtp_tls_mandatory_protocols": "TLSv1.2"}, "ESMTPS", "TLSv1.2 with cipher ECDHE-"),
    "secure": Way("inbound", SECURE, "ESMTPS"),
    "wrapped": Way("smtps", SECURE | WRAPPED, "ESMTPS"),
}


def sasl(mechanism: str = "") -> dict[str, str]:
    filtered = {"smtp_sasl_mechanism_filter": mechanism} if mechanism else {}
    return {"smtp_sasl_auth_enable": "yes", "smtp_sasl_security_options": "noanonymous"} | filtered


LOGINS: Final = {
    "plain": Way("submission", SECURE | sasl("plain"), "ESMTPSA"),
    "login": Way("submission", SECURE | sasl("login"), "ESMTPSA"),
    "scram": Way("submission", SECURE | sasl("scram-sha-256"), "ESMTPSA"),
    "any": Way("submission", SECURE | sasl(), "ESMTPSA"),
    "implicit": Way("submissions", SECURE | WRAPPED | sasl(), "ESMTPSA"),
}
#: What must fail.
FAULTS: Final = {
    "stranger": Way("inbound", SECURE | {"smtp_tls_secure_cert_match": "mail.example.net"}, ""),
    "unvouched": Way("inbound", SECURE, ""),
    "no-tls": Way("plain", ENCRYPT, ""),
    "wrong": Way("submissions", SECURE | WRAPPED | sasl(), ""),
}
OTHERS: Final = ("root", "alice", "bob", "many", "m\u00fcller")


class Pair(NamedTuple):
    """Both servers, each of which can send to the other."""

    site: Site
    postfix: Postfix

    def send(self, sender: str, recipients: Sequence[str], content: str, *options: str, wishes: Sequence[str] = ()) -> None:
        """Give a message to Postfix; ``options`` are for MAIL, ``wishes`` for each RCPT."""
        with smtplib.SMTP(self.postfix.address, self.postfix.port, "user.test", PATIENCE) as client:
            client.ehlo()
            code, text = client.mail(sender, options)
            assert code == 250, text
            for recipient in recipients:
                code, text = client.rcpt(recipient, wishes)
                assert code == 250, text
            code, text = client.data(content.encode())
            assert code == 250, text

    def arrived(self, name: str, way: Way) -> bytes:
        """The one message for a mailbox, with the trace that it must have."""
        [content] = self.site.await_mail(name)
        found = trace(content)
        assert found.protocol == way.protocol
        assert found.cipher.startswith(way.cipher), found
        assert bool(found.cipher) is bool(way.cipher), found
        assert found.field.startswith("from next.test (")
        return content


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("postfix")
    postfix = Postfix("127.0.0.9", certificate=certificate("next.test").write(root, "next"))
    users = (*OTHERS, *WAYS, *LOGINS, *FAULTS)
    delivery = {"next_hop": f"[127.0.0.9]:{postfix.port}", "ca_file": str(root / "ca.pem")}
    with ours(root, users=users, delivery=delivery) as site:
        ca = (root / "ca.pem").read_text()
        postfix.relays(relays(site, postfix, postfix.keep("ca.pem", ca)))
        with postfix:
            yield Pair(site, postfix)


def relays(site: Site, postfix: Postfix, ca: str) -> dict[str, Relay]:
    found = {}
    other = postfix.keep("other.pem", authority("Another CA").pem.decode())
    for name, way in {**WAYS, **LOGINS, **FAULTS}.items():
        hop = "[{}]:{}".format(*site.address(way.listener))
        settings = {"smtp_tls_CAfile": other if name == "unvouched" else ca, **way.settings}
        if "smtp_sasl_auth_enable" in settings:
            password = "swordfish" if name == "wrong" else PASSWORD
            settings["smtp_sasl_password_maps"] = postfix.keep(f"password-{name}", f"{hop} alice:{password}\n", "texthash:")
        found[f"{name}@{DOMAIN}"] = Relay(hop, settings)
    host, port = site.address("inbound")
    found[DOMAIN] = Relay(f"[{host}]:{port}", SECURE | {"smtp_tls_CAfile": ca})
    return found


@pytest.mark.parametrize("name", WAYS)
def test_over_each_way_in(pair: Pair, name: str) -> None:
    """The message is as it was, and our trace names protocol and cipher; Postfix has checked what it was told to."""
    body = f"Subject: {name}\r\n\r\n.\r\nGr\u00fc\u00dfe\r\n..\r\n.hidden\r\n"
    pair.send("a@x.test", [f"{name}@{DOMAIN}"], body, "BODY=8BITMIME")
    content = pair.arrived(name, WAYS[name])
    assert content.endswith("\n\n.\nGr\u00fc\u00dfe\n..\n.hidden\n".encode())
    assert content.startswith(f"Return-Path: <a@x.test>\nDelivered-To: {name}@{DOMAIN}\n".encode())
    pair.postfix.await_log(f"to=<{name}@{DOMAIN}>")
    if name in {"secure", "wrapped"}:
        assert re.search(
            r"Verified TLS connection established to \S+: TLSv1\.3 with cipher TLS_AES_256", pair.postfix.log()
        )


@needs_sasl
@pytest.mark.parametrize("name", LOGINS)
def test_it_logs_in(pair: Pair, name: str) -> None:
    """By each mechanism that Cyrus SASL and we have, and by the one that it takes without being told."""
    pair.send(f"alice@{DOMAIN}", [f"{name}@{DOMAIN}"], "Subject: login\r\n\r\nhello\r\n")
    content = pair.arrived(name, LOGINS[name])
    queue_id = trace(content).field.partition(" id ")[2].split()[0].rstrip(";")
    method = {"plain": "PLAIN", "login": "LOGIN", "scram": "SCRAM-SHA-256"}.get(name, r"\S+")
    pair.site.await_log(rf"{queue_id}: client=\S+, sasl_method={method}, sasl_username=alice$")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("stranger", "Server certificate not verified"),
        ("unvouched", "Server certificate not (trusted|verified)"),
        ("no-tls", "TLS is required, but was not offered by host"),
        pytest.param("wrong", "SASL authentication failed; server .* said: 535 5.7.8 ", marks=needs_sasl),
    ],
)
def test_it_keeps_what_it_may_not_send(pair: Pair, name: str, told: str) -> None:
    pair.send(f"alice@{DOMAIN}", [f"{name}@{DOMAIN}"], "Subject: kept\r\n\r\nhello\r\n")
    pair.postfix.await_line(rf"to=<{name}@{DOMAIN}>, .* status=deferred \({told}")
    assert not pair.site.mailbox(name)


def test_an_address_in_utf8(pair: Pair) -> None:
    """RFC 6531: Postfix asks for SMTPUTF8, as it must for this mailbox, and the trace says so."""
    with smtplib.SMTP(pair.postfix.address, pair.postfix.port, "user.test", PATIENCE) as client:
        client.ehlo()
        client.command_encoding = "utf-8"
        client.sendmail("a@x.test", f"m\u00fcller@{DOMAIN}", "Subject: \u00fc\r\n\r\nhi\r\n".encode(), ["SMTPUTF8"])
    assert trace(pair.site.await_mail("m\u00fcller")[0]).protocol == "UTF8SMTPS"


def test_a_large_message_to_many(pair: Pair) -> None:
    """Several megabytes, for two at once, over TLS: one transaction, and every line as it was."""
    text = "".join(f"{number} {'.' * (number % 90)}\r\n" for number in range(60_000))
    before = len(pair.site.mailbox("alice")), len(pair.site.mailbox("bob"))
    pair.send("a@x.test", [f"alice@{DOMAIN}", f"bob@{DOMAIN}"], f"Subject: large\r\n\r\n{text}")
    for user, count in zip(("alice", "bob"), before, strict=True):
        content = pair.site.await_mail(user, count + 1)[-1]
        assert content.partition(b"\n\n")[2] == text.replace("\r\n", "\n").encode()


@pytest.mark.skipif(shutil.which("smtp-source") is None, reason="smtp-source is not installed")
def test_a_hundred_from_several_at_once(pair: Pair) -> None:
    """smtp-source fills Postfix, which sends over several connections: each message arrives once."""
    command = ["smtp-source", "-s", "5", "-m", "100", "-f", "a@x.test", "-t", f"many@{DOMAIN}", "-l", "2000"]
    command.append(f"inet:{pair.postfix.address}:{pair.postfix.port}")
    subprocess.run(command, check=True, timeout=PATIENCE, capture_output=True)
    assert len(pair.site.await_mail("many", 100, 2 * PATIENCE)) == 100
    await_value(lambda: pair.postfix.log().count(f"many@{DOMAIN}>, relay=") >= 100, what="all are marked")
    assert pair.postfix.log().count(f"many@{DOMAIN}>, relay=") == 100
    assert len(pair.site.mailbox("many")) == 100


# -- DSN, there and back ----------------------------------------------------------------------------------------------


def test_what_postfix_was_asked_to_tell_we_tell(pair: Pair) -> None:
    """RFC 3461: Postfix passes NOTIFY, RET, ENVID and ORCPT on to us; our report goes back through it to the sender."""
    before = len(pair.postfix.messages(0))
    wishes = ["NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;first+2Bbox@elsewhere.test"]
    text = "Subject: told\r\n\r\nthe body\r\n"
    pair.send("a@x.test", [f"alice@{DOMAIN}"], text, "RET=HDRS", "ENVID=Q+2B1", wishes=wishes)
    report = Report(pair.postfix.messages(before + 1)[-1])
    assert report.about_message["Reporting-MTA"] == f"dns; {NAME}"
    assert report.about_message["Original-Envelope-Id"] == "Q+1"
    [recipient] = report.recipients
    assert (recipient["Action"], recipient["Status"]) == ("delivered", "2.0.0")
    assert recipient["Original-Recipient"] == "rfc822; first+box@elsewhere.test"
    assert "the body" not in report.message.as_string()
    assert "delivery via" not in report.text, "Postfix itself reports nothing when the next hop will"


def test_what_we_were_asked_to_tell_postfix_tells(pair: Pair) -> None:
    """The other way: we pass it on to Postfix, say nothing ourselves, and its report comes back to us by TLS."""
    before = len(pair.site.mailbox("alice"))
    with pair.site.client("relay") as client:
        client.ehlo()
        for code, text in (
            client.mail(f"alice@{DOMAIN}", ["RET=FULL", "ENVID=Z1"]),
            client.rcpt("b@x.test", ["NOTIFY=SUCCESS", "ORCPT=rfc822;old@x.test"]),
            client.data(b"Subject: back\r\n\r\nthe body\r\n"),
        ):
            assert code == 250, text
    report = Report(pair.site.await_mail("alice", before + 1)[-1])
    assert report.about_message["Reporting-MTA"] == "dns; next.test"
    assert report.about_message["Original-Envelope-Id"] == "Z1"
    [recipient] = report.recipients
    assert recipient["Action"] == "delivered"
    assert recipient["Original-Recipient"] == "rfc822;old@x.test"
    pair.site.await_empty_queue()
    assert len(pair.site.mailbox("alice")) == before + 1
