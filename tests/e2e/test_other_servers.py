"""Exim and OpenSMTPD, when they are present, as clients and as next hops of ours, over TLS and with AUTH (issue 3)."""

from __future__ import annotations

import email
import smtplib
import ssl
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from mtad.outcome import Deferred, Delivered
from tests.e2e.world import Report
from tests.peers.chamber import ALIAS, needs_chambers
from tests.peers.exim import Exim, EximRelay, exim_binary
from tests.peers.opensmtpd import OpenSmtpd, smtpd_binary
from tests.peers.ours import NAME, PASSWORD, certificate, ours, trace
from tests.peers.outbound import Site as Transport
from tests.peers.outbound import only
from tests.site import DOMAIN, PATIENCE, Site, await_value
from tests.unit.tls_aid import authority

pytestmark = needs_chambers

MISSING: Final = {
    "exim": "" if exim_binary() else "Exim is not there: neither in PATH nor where MTAD_EXIM says",
    "opensmtpd": "" if smtpd_binary() else "OpenSMTPD is not there: neither in PATH nor where MTAD_SMTPD says",
}
Server = Exim | OpenSmtpd


class Way(NamedTuple):
    """How the other server is to send: by URL as OpenSMTPD has it, and as Exim does; and what our trace says then."""

    listener: str
    scheme: str
    relay: EximRelay
    protocol: str
    login: str = ""


#: By the mailbox that the mail is for.
WAYS: Final = {
    "clear": Way("plain", "smtp", EximRelay(0), "ESMTP"),
    "none": Way("inbound", "smtp+notls", EximRelay(0, "none"), "ESMTP"),
    "may": Way("inbound", "smtp", EximRelay(0, "opportunistic", "ca"), "ESMTPS"),
    "required": Way("inbound", "smtp+tls", EximRelay(0, "required", "ca"), "ESMTPS"),
    "implicit": Way("smtps", "smtps", EximRelay(0, "implicit", "ca"), "ESMTPS"),
    "login": Way("submission", "smtp+tls", EximRelay(0, "required", "ca"), "ESMTPSA", PASSWORD),
    "logins": Way("submissions", "smtps", EximRelay(0, "implicit", "ca"), "ESMTPSA", PASSWORD),
}
#: What must fail, and what our log or theirs says of it.
FAULTS: Final = {
    "stranger": Way("inbound", "smtp+tls", EximRelay(0, "required", "ca", host=ALIAS), ""),
    "strangers": Way("smtps", "smtps", EximRelay(0, "implicit", "ca", host=ALIAS), ""),
    "untold": Way("plain", "smtp+tls", EximRelay(0, "required", "ca"), ""),
    "wrong": Way("submissions", "smtps", EximRelay(0, "implicit", "ca"), "", "swordfish"),
}


class Pair(NamedTuple):
    """Both servers; what is for x.test goes from ours to theirs."""

    site: Site
    server: Server

    def send(
        self, sender: str, recipient: str, content: bytes, options: Sequence[str] = (), wishes: Sequence[str] = ()
    ) -> None:
        """Give a message to the other server."""
        with smtplib.SMTP(self.server.address, self.server.port, "user.test", PATIENCE) as client:
            client.ehlo()
            for code, text in (client.mail(sender, options), client.rcpt(recipient, wishes), client.data(content)):
                assert code == 250, text


def make(kind: str, root: Path) -> Server:
    """A server that knows our authority."""
    if MISSING[kind]:
        pytest.skip(MISSING[kind])
    if kind == "exim":
        return Exim("127.0.0.11", certificate=certificate("exim.test").write(root, "exim"))
    return OpenSmtpd("127.0.0.12", certificate=certificate("smtpd.test").write(root, "smtpd"), ca=str(root / "ca.pem"))


@pytest.fixture(scope="module", params=["exim", "opensmtpd"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp(request.param)
    site = ours(root, users=("root", "alice", "bob", "told", *WAYS, *FAULTS))
    server = make(request.param, root)
    site.configure(delivery={"next_hop": f"[{server.address}]:{server.port}", "ca_file": str(root / "ca.pem")})
    with site:
        relay(site, server)
        with server:
            yield Pair(site, server)


def relay(site: Site, server: Server) -> None:
    """Tell it all the ways."""
    ways = {f"{name}@{DOMAIN}": way for name, way in {**WAYS, **FAULTS, "told": WAYS["required"]}.items()}
    if isinstance(server, Exim):
        ca = server.keep("ca.pem", (site.root / "ca.pem").read_text())
        server.relays(
            {
                recipient: way.relay._replace(
                    port=site.address(way.listener)[1],
                    ca=ca if way.relay.ca else "",
                    login=f"alice:{way.login}" if way.login else "",
                )
                for recipient, way in ways.items()
            }
        )
    else:
        urls = {}
        for recipient, way in ways.items():
            label = "" if not way.login else "good@" if way.login == PASSWORD else "bad@"
            urls[recipient] = f"{way.scheme}://{label}{way.relay.host}:{site.address(way.listener)[1]}"
        server.relays(urls, {"good": f"alice:{PASSWORD}", "bad": "alice:swordfish"})


# -- as a client ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_over_each_way_in(pair: Pair, name: str) -> None:
    """The message is as it was, and our trace names protocol and cipher."""
    way = WAYS[name]
    sender = f"alice@{DOMAIN}" if way.login else "a@x.test"
    body = f"From: {sender}\r\nSubject: {name}\r\n\r\n.\r\nGr\u00fc\u00dfe\r\n..\r\n.hidden\r\n".encode()
    pair.send(sender, f"{name}@{DOMAIN}", body, ["BODY=8BITMIME"])
    [content] = pair.site.await_mail(name)
    found = trace(content)
    assert found.protocol == way.protocol
    assert found.cipher.startswith("TLSv1.3 with cipher TLS_") is ("S" in way.protocol.removeprefix("ESMTP")), found
    assert content.startswith(f"Return-Path: <{sender}>\nDelivered-To: {name}@{DOMAIN}\n".encode())
    assert content.endswith("\n\n.\nGr\u00fc\u00dfe\n..\n.hidden\n".encode())


def test_dsn_there_and_back(pair: Pair) -> None:
    """It passes the sender's wishes on, and takes our report of the success for its own user."""
    before = len(pair.server.messages(0))
    wishes = ["NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;first@elsewhere.test"]
    text = b"From: a@x.test\r\nSubject: told\r\n\r\nthe body\r\n"
    pair.send("a@x.test", f"told@{DOMAIN}", text, ["RET=HDRS", "ENVID=Q1"], wishes)
    pair.site.await_mail("told")
    report = Report(next(one for one in pair.server.messages(before + 1) if b"multipart/report" in one))
    assert report.about_message["Reporting-MTA"] == f"dns; {NAME}"
    assert report.about_message["Original-Envelope-Id"] == "Q1"
    [recipient] = report.recipients
    assert recipient["Action"] == "delivered"
    assert recipient["Original-Recipient"] == "rfc822; first@elsewhere.test"


# -- as a next hop ----------------------------------------------------------------------------------------------------

TEXT: Final = (
    b"From: a@me.test\r\nDate: Mon, 05 Oct 2026 10:00:00 +0000\r\nMessage-ID: <1@me.test>\r\nSubject: x\r\n"
    b"MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n"
)


@pytest.fixture
def transport() -> Iterator[Transport]:
    with ExitStack() as stack:
        transport = Transport(stack)
        yield transport


def payload(message: bytes) -> bytes:
    """Of a text; a report has none."""
    found = email.message_from_bytes(message).get_payload(decode=True)
    return found if isinstance(found, bytes) else b""


def handshakes(server: Server) -> bool:
    """Whether anybody can talk TLS to it: Debian's OpenSMTPD 6.8 with OpenSSL 3 offers STARTTLS and then breaks off."""
    with smtplib.SMTP(server.address, server.port, "user.test", PATIENCE) as client:
        client.ehlo()
        try:
            client.starttls(context=unchecked())
            client.ehlo()
        except (OSError, smtplib.SMTPServerDisconnected):
            client.close()
            return False
    return True


def unchecked() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.mark.parametrize("tls", ["required", "opportunistic", "none"])
def test_as_a_next_hop(pair: Pair, transport: Transport, tls: str) -> None:
    """Several messages, also a large one with long lines, over verified TLS and without: each as it was.

    Where its TLS is broken, opportunism goes on in clear text.
    """
    works = handshakes(pair.server)
    if tls == "required" and not works:
        pytest.skip("this server cannot shake hands with Python's own TLS either")
    host = "exim.test" if isinstance(pair.server, Exim) else "smtpd.test"
    transport.dns.set(host, {"A": pair.server.address})
    hop = f"[{host}]:{pair.server.port}"
    transport.make(next_hop=hop, tls=tls, ca_file=str(pair.site.root / "ca.pem"))
    before = Counter(map(payload, pair.server.messages(0)))
    large = b"".join(b"%d %b\r\n" % (number, b"." * (number % 200)) for number in range(10_000))
    bodies = [".dot\r\nh\u00e4\r\n..\r\n.\r\n".encode(), large, b"z" * 3000 + b"\r\n"]
    for body in bodies:
        outcome = only(transport.send("b@x.test", body=TEXT + body))
        assert isinstance(outcome, Delivered)
        assert outcome.dsn
        assert transport.attempts[0].tls.startswith("TLSv1.") is (works and tls != "none")
    found = pair.server.messages(before.total() + len(bodies))
    assert Counter(map(payload, found)) - before == Counter(body.replace(b"\r\n", b"\n") for body in bodies)


def test_a_next_hop_that_is_not_to_be_trusted(pair: Pair, transport: Transport, tmp_path: Path) -> None:
    """Another name, or another authority: with ``required`` nothing is sent to it."""
    before = len(pair.server.messages(0))
    transport.dns.set(ALIAS, {"A": pair.server.address})
    other = authority("Another CA").write(tmp_path, "other").certificate
    good = str(pair.site.root / "ca.pem")
    name = "exim.test" if isinstance(pair.server, Exim) else "smtpd.test"
    transport.dns.set(name, {"A": pair.server.address})
    for host, ca in ((ALIAS, good), (name, other)):
        transport.make(next_hop=f"[{host}]:{pair.server.port}", tls="required", ca_file=ca)
        assert isinstance(only(transport.send("b@x.test")), Deferred)
    assert len(pair.server.messages(0)) == before


# -- last, for servers draw conclusions from it ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAULTS)
def test_it_keeps_what_it_may_not_send(pair: Pair, name: str) -> None:
    """A certificate for another name, no TLS where it must be, a wrong password: nothing comes."""
    if isinstance(pair.server, OpenSmtpd) and name != "stranger":
        pytest.skip("it leaves the whole host alone for a while after a single failure")
    pair.send(f"alice@{DOMAIN}", f"{name}@{DOMAIN}", b"Subject: kept\r\n\r\nhello\r\n")
    if name == "wrong":
        pair.site.await_log(r"SASL (PLAIN|LOGIN) authentication failed: .*, sasl_username=alice")
    await_value(lambda: pair.server.deferred(f"{name}@{DOMAIN}"), what="it is deferred")
    assert not pair.site.mailbox(name)
    assert "swordfish" not in pair.site.log()
