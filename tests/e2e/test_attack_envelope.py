"""What an address or a parameter is made to carry: S-EN1 to S-EN3 and S-EN5 of the attacks.

What another server's reply is made to carry, the other half of S-EN2, is in test_attack_replies; S-EN4 is in
tests/unit/test_attack_addresses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.client import Client
from tests.e2e.attack_aid import EHLO, MAIL, PATIENT, RCPT, assert_printable, deliver, harvest
from tests.e2e.test_auth import auth_site, plain
from tests.e2e.world import World
from tests.peers.mx import Say, Script
from tests.procs import title
from tests.site import Site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with all services, that keeps what it takes."""
    with auth_site(tmp_path_factory.mktemp("envelope"), limits=PATIENT, deliver=False) as site:
        yield site


# -- S-EN1: lines and control characters --------------------------------------------------------------------------------

INJECTED: Final = {
    "MAIL with CRLF": b"MAIL FROM:<a@b.test\r\nX-Evil: 1>",
    "MAIL with CRLF in quotes": b'MAIL FROM:<"a\r\nX-Evil: 1"@b.test>',
    "MAIL with CR": b'MAIL FROM:<"a\rX-Evil: 1"@b.test>',
    "MAIL with a quoted CR": b'MAIL FROM:<"a\\\rX-Evil: 1"@b.test>',
    "MAIL with LF": b'MAIL FROM:<"a\nX-Evil: 1"@b.test>',
    "MAIL with NEL": b'MAIL FROM:<"a\xc2\x85X-Evil: 1"@b.test> SMTPUTF8',
    "MAIL with a line separator": b'MAIL FROM:<"a\xe2\x80\xa8X-Evil: 1"@b.test> SMTPUTF8',
    "HELO": b"HELO x\x1b[2J",
    "HELO with CR": b"HELO x.test\rX-Evil: 1",
    "EHLO": b"EHLO a\tb",
    "EHLO with a comment": b"EHLO a.test (X-Evil: 1)",
    "EHLO with a comma": b"EHLO a.test;X-Evil",
    "EHLO in brackets": b"EHLO [a\\]X-Evil]",
    "ENVID with LF": b"MAIL FROM:<a@b.test> ENVID=a+0AX-Evil",
    "ENVID with CRLF": b"MAIL FROM:<a@b.test> ENVID=a+0D+0AX-Evil:+201",
    "ENVID with NUL": b"MAIL FROM:<a@b.test> ENVID=a+00",
    "ENVID with ESC": b"MAIL FROM:<a@b.test> ENVID=a+1B[2J",
    "ENVID with C1": b"MAIL FROM:<a@b.test> ENVID=a+85b",
    "ENVID with DEL": b"MAIL FROM:<a@b.test> ENVID=a+7Fb",
}

INJECTED_RECIPIENTS: Final = {
    "RCPT with LF": b'RCPT TO:<"x\nBcc:y"@example.org>',
    "RCPT with CRLF": b"RCPT TO:<alice@example.org\r\nBcc:y>",
    "RCPT with CR": b"RCPT TO:<alice@example.org\r>",
    "ORCPT with LF": b"RCPT TO:<alice@example.org> ORCPT=rfc822;a+0AX-Evil",
    "ORCPT with CRLF": b"RCPT TO:<alice@example.org> ORCPT=rfc822;a+0D+0AX-Evil:+201",
    "ORCPT with NUL": b"RCPT TO:<alice@example.org> ORCPT=rfc822;a+00",
    "ORCPT with ESC": b"RCPT TO:<alice@example.org> ORCPT=rfc822;a+1B[2J",
    "ORCPT whose type is a line": b"RCPT TO:<alice@example.org> ORCPT=rfc822+0A;a",
    "ORCPT in UTF-8 with LF": b"RCPT TO:<alice@example.org> ORCPT=utf-8;a\\x{0A}X-Evil",
    "ORCPT in UTF-8 with CR": b"RCPT TO:<alice@example.org> ORCPT=utf-8;a\\x{000D}X-Evil",
    "ORCPT in UTF-8 with NEL": b"RCPT TO:<alice@example.org> ORCPT=utf-8;a\\x{85}X-Evil",
    "ORCPT in UTF-8 with an escape of an escape": b"RCPT TO:<alice@example.org> ORCPT=utf-8;a+5Cx{0A}X-Evil",
}

AUTH_PARAMETERS: Final = ["a+0A", "a+0D+0Ab", "a+00", "a+1B", "a+7F", "a+80", "a+0a", "a+", "+", "=", "a=b", "\u00fc"]


def refuse(client: Client, lines: bytes) -> None:
    """Send what may turn out to be two lines; each is refused."""
    client.send(lines + b"\r\n")
    answer = client.reply()
    client.send(b"NOOP\r\n")
    while not answer.startswith("250 2.0.0 Ok"):
        assert answer[:1] == "5", (lines, answer)
        answer = client.reply()


def test_s_en1_nothing_gets_out_of_its_field(site: Site) -> None:
    with Client(site.address()) as client:
        client.begin(EHLO)
        for lines in INJECTED.values():
            refuse(client, lines)
        assert client.say(MAIL).startswith("250 ")
        for lines in INJECTED_RECIPIENTS.values():
            refuse(client, lines)
        assert client.say(RCPT).startswith("250 ")
        assert deliver(client).startswith("250 ")
    [message] = harvest(site, 1)
    assert (message.envelope.sender, message.envelope.helo, message.envelope.envid) == ("a@sender.test", "client.test", "")
    assert [recipient.address for recipient in message.envelope.recipients] == ["alice@example.org"]
    assert b"Evil" not in message.content
    assert_printable(site.log())


def test_s_en1_nor_out_of_the_parameter_auth(site: Site) -> None:
    """CVE-2020-28021: that of a client that has logged in."""
    with Client(site.address("loopback")) as client:
        client.begin("EHLO laptop", f"AUTH PLAIN {plain('alice')}")
        for value in AUTH_PARAMETERS:
            refuse(client, f"MAIL FROM:<alice@example.org> AUTH={value}".encode())
        for value in ("<>", "bob@example.org", "a+2Bb+3Dc@example.org"):
            assert client.say(f"MAIL FROM:<alice@example.org> AUTH={value}").startswith("250 ")
            assert client.say("RSET").startswith("250 ")
    harvest(site, 0)
    assert_printable(site.log())


#: Well-formed, and as ugly as that can be.
UGLY_SENDER: Final = r'"a\" <b@c> (d) , ; $(id) `id` \\r\\n X-Evil: 1 \\ "@sender.test'
UGLY_ENVID: Final = "a+20b+2Bc+3Dd<e>;+22+5Cr+5Cn$(id)"
UGLY_ORCPT: Final = "rfc822;+22a+20b+22+5C<X-Evil:+20+3E@c.test"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    delivery = {"processes": 1, "rcpt_timeout": "1s"}
    with World(tmp_path_factory.mktemp("world"), delivery=delivery, limits=PATIENT) as world:
        yield world


def test_s_en1_what_is_taken_is_a_word_in_the_queue_file(site: Site) -> None:
    with Client(site.address()) as client:
        client.begin(EHLO, f"MAIL FROM:<{UGLY_SENDER}> RET=HDRS ENVID={UGLY_ENVID}")
        assert client.say(f"RCPT TO:<bob@example.org> NOTIFY=NEVER ORCPT={UGLY_ORCPT}").startswith("250 ")
        assert client.say(RCPT).startswith("250 ")
        assert deliver(client).startswith("250 ")
    [message] = harvest(site, 1)
    envelope = message.envelope
    assert (envelope.sender, envelope.ret, envelope.helo) == (UGLY_SENDER, "hdrs", "client.test")
    assert envelope.envid == r'a b+c=d<e>;"\r\n$(id)'
    assert [(recipient.address, recipient.orcpt) for recipient in envelope.recipients] == [
        ("bob@example.org", 'rfc822;"a b"\\<X-Evil: >@c.test'),
        ("alice@example.org", ""),
    ]
    assert message.content.endswith(b"\r\nSubject: x\r\n\r\nx\r\n")


def test_s_en1_what_is_taken_stays_where_it_belongs(world: World) -> None:
    """An address that is well-formed is a word in the queue file, in Return-Path:, in a report, and in the log."""
    site = world.site
    with Client(site.address()) as client:
        client.begin("EHLO [IPv6:::1]", f"MAIL FROM:<{UGLY_SENDER}> RET=HDRS ENVID={UGLY_ENVID}")
        assert client.say(f"RCPT TO:<bob@example.org> NOTIFY=NEVER ORCPT={UGLY_ORCPT}").startswith("250 ")
        ugly = b"Message-ID: <a\x1b[2J\x07\rX-Evil: 1@b>\r\nSubject: \x1b[2J\r\n\r\nx\r\n".replace(b"\r" + b"X", b"\x85X")
        assert deliver(client, ugly).startswith("250 ")
    content = site.await_mail("bob")[-1]
    header, _, rest = content.partition(b"Message-ID: ")
    assert header.startswith(b"Return-Path: <" + UGLY_SENDER.encode() + b">\nDelivered-To: bob@example.org\nReceived: ")
    assert [line.partition(b":")[0] for line in header.split(b"\n") if line[:1] not in {b"\t", b""}] == [
        b"Return-Path", b"Delivered-To", b"Received",
    ]  # fmt: skip
    assert_printable(header)
    assert rest.startswith(b"<a\x1b[2J\x07\x85X-Evil: 1@b>\n"), "content is nobody's business"
    assert_printable(site.log())
    assert all(title(pid).startswith("mtad: ") and "evil" not in title(pid).lower() for pid in site.processes())


def test_s_en1_nor_does_it_get_out_of_a_report(world: World) -> None:
    site = world.site
    before = len(site.mailbox("alice"))
    recipient = r'"x\" y@z; X-Evil: 1"'
    hop = world.mx(Script(rcpt=Say("550 5.1.1 <b@c>; \x1b[2J\x07 $(id)\u0085X-Evil: 1")))
    with Client(site.address("relay")) as client:
        client.begin(EHLO, f"MAIL FROM:<alice@example.org> ENVID={UGLY_ENVID}")
        assert client.say(f"RCPT TO:<{recipient}@{world.domain(hop)}> ORCPT={UGLY_ORCPT}").startswith("250 ")
        assert deliver(client, b"Subject: a\x1b[2J\r\n b\x07\r\nX: --==\r\n\r\nx\r\n").startswith("250 ")
    report = site.await_mail("alice", before + 1)[-1]
    assert_printable(report)
    assert re.findall(rb"^X-Evil", report, re.M) == []
    assert b'Original-Envelope-Id: a b+c=d<e>;"\\r\\n$(id)\n' in report
    assert report.count(b"\nFinal-Recipient: ") == 1
    assert_printable(site.log())


# -- S-EN2: commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        ";for i in 0 1 2 3;do read r;done;sh;exit 0;",
        ";for i in 0 1 2 3;do read r;done;sh;exit 0;@",
        ";sh;@sender.test",
        "a@;sh;",
        "a@sender.test;sh",
        "a;sh",
        "|sh",
        "a b@sender.test",
        "a\\ b@sender.test",
    ],
)
def test_s_en2_cve_2020_7247_no_shell_is_an_address(site: Site, path: str) -> None:
    with Client(site.address()) as client:
        client.begin(EHLO)
        assert client.say(f"MAIL FROM:<{path}>")[:3] in {"501", "553"}
        assert client.say("DATA").startswith("503 ")
        assert client.say(MAIL).startswith("250 ")
        assert client.say(f"RCPT TO:<{path}>")[:3] in {"501", "553"}
        assert client.say("DATA")[:1] == "5"
    harvest(site, 0)


# -- S-EN3: templates ----------------------------------------------------------------------------------------------------

LITERALS: Final = [
    "${run{touch/pwned}}", '"${run{touch pwned}}"', "%s%n%x", "`touch/pwned`", "{{7*7}}", '"{touch,pwned}"', "$HOME",
    "~root", "|touch", "!!", "&id", '"$(touch pwned)"', '"; touch pwned;"', '"`touch pwned`"', '"%(a)s {0}"',
]  # fmt: skip


@pytest.fixture(scope="module")
def literal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A site where bob has all of these addresses."""
    world = World(tmp_path_factory.mktemp("literal"), delivery={"processes": 1}, limits=PATIENT, start=False)
    lines = "".join(f"bob : {local}@example.org\n" for local in LITERALS)
    world.site.users_path.write_text(f"root : root@example.org\nbob : bob@example.org\n{lines}")
    with world, world.site:
        yield world


@pytest.mark.parametrize("local", LITERALS)
def test_s_en3_cve_2019_10149_nothing_is_expanded(literal: World, local: str) -> None:
    """As a sender, as a recipient here, as a recipient elsewhere: it is that text and nothing else."""
    site = literal.site
    before = len(site.mailbox("bob"))
    hop = literal.mx()
    domain = literal.domain(hop)
    with Client(site.address("relay")) as client:
        client.begin(EHLO, f"MAIL FROM:<{local}@sender.test>")
        assert client.say(f"RCPT TO:<{local}@{domain}>").startswith("250 ")
        assert client.say(f"RCPT TO:<{local}@example.org>").startswith("250 ")
        assert client.say("RCPT TO:<$(id)@example.org>")[:1] == "5"
        assert deliver(client).startswith("250 ")
    [message] = hop.await_messages(1)
    assert message.mail.startswith(f"FROM:<{local}@sender.test>")
    assert message.recipients == [f"{local}@{domain}"]
    content = site.await_mail("bob", before + 1)[-1]
    assert content.startswith(f"Return-Path: <{local}@sender.test>\nDelivered-To: {local}@example.org\n".encode())
    assert sorted(path.name for path in site.mail_root.iterdir()) == ["bob"]
    assert not list(Path(site.root).rglob("*pwned*"))
    assert_printable(site.log())


# -- S-EN5: in whose name ------------------------------------------------------------------------------------------------

SPOOFED: Final = {
    "another": "From: bob@example.org",
    "another with a name": "From: alice@example.org <bob@example.org>",
    "a name that is an address": 'From: "alice@example.org" <bob@example.org>',
    "two fields": "From: alice@example.org\r\nFrom: bob@example.org",
    "two fields, the other first": "From: bob@example.org\r\nFrom: alice@example.org",
    "two fields in two cases": "From: alice@example.org\r\nFROM: alice@example.org",
    "a blank before the colon": "From: alice@example.org\r\nFrom : bob@example.org",
    "two addresses": "From: alice@example.org, bob@example.org",
    "two addresses in brackets": "From: <alice@example.org> <bob@example.org>",
    "a group": "From: x: alice@example.org;",
    "an empty group": "From: nobody:;",
    "two at signs": "From: alice@example.org@evil.test",
    "a route": "From: <@evil.test:alice@example.org>",
    "behind a comment": "From: (alice@example.org) bob@example.org",
    "in front of a comment": "From: bob@example.org (alice@example.org)",
    "folded": "From:\r\n bob@example.org",
    "folded within": "From: alice@example.org\r\n , bob@example.org",
    "nothing": "From:",
    "a domain of the world": "From: alice@example.com",
    "a subdomain": "From: alice@mail.example.org",
    "NUL": "From: alice@example.org\0 <bob@example.org>",
    "an encoded word": "From: =?utf-8?q?alice=40example.org?= bob@example.org",
    "look-alike": "From: \u0430lice@example.org",
}


@pytest.mark.parametrize("header", SPOOFED.values(), ids=SPOOFED)
def test_s_en5_nobody_writes_in_anothers_name(site: Site, header: str) -> None:
    """What two mail programs could read in two ways is refused, too, in DATA and in chunks; then a right one is taken."""
    with Client(site.address("loopback")) as client:
        client.begin("EHLO laptop", f"AUTH PLAIN {plain('alice')}")
        for content, answer in (
            (f"Subject: x\r\n{header}\r\nTo: y\r\n\r\nx\r\n", "550 5.7.1"),
            ("From: Alice <alice@example.org>\r\n\r\nx\r\n", "250 2.0.0"),
        ):
            octets = content.encode()
            for line in ("MAIL FROM:<alice@example.org>", "RCPT TO:<friend@far.test>"):
                assert client.say(line).startswith("250 ")
            assert deliver(client, octets)[:9] == answer
            for line in ("MAIL FROM:<alice@example.org>", "RCPT TO:<friend@far.test>"):
                assert client.say(line).startswith("250 ")
            client.send(b"BDAT 3\r\n" + octets[:3] + b"BDAT %d LAST\r\n" % (len(octets) - 3) + octets[3:])
            assert client.reply().startswith("250 ")
            assert client.reply()[:9] == answer
    assert all(b"From: Alice <alice@example.org>" in message.content for message in harvest(site, 2))


@pytest.mark.parametrize(
    "sender",
    [
        "bob@example.org",
        "alice@example.com",
        "ALICE@evil.test",
        "root@example.org",
        '"alice "@example.org',
        "alice+x@example.org",
        "@example.org:bob@example.org",
    ],
)
def test_s_en5_nor_in_anothers_envelope(site: Site, sender: str) -> None:
    with Client(site.address("loopback")) as client:
        client.begin("EHLO laptop", f"AUTH PLAIN {plain('alice')}")
        assert client.say(f"MAIL FROM:<{sender}>").startswith("550 5.7.1 ")
        assert client.say("RCPT TO:<bob@example.org>").startswith("503 ")
        for mine in ("alice@example.org", "ALICE@Example.ORG", '"alice"@example.org', ""):
            assert client.say(f"MAIL FROM:<{mine}>").startswith("250 ")
            assert client.say("RSET").startswith("250 ")
    harvest(site, 0)
