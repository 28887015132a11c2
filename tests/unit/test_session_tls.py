"""STARTTLS and what comes before and after it; who speaks out of turn."""

from __future__ import annotations

import pytest

from mtad.config import Limits
from mtad.session.state import Client, TlsFacts
from tests.dialogue_engine import BINDINGS, TLS, Engine, MemoryLogins, octets

STRANGER = Client("192.0.2.1")
READY = "220 2.0.0 Ready to start TLS"


def starttls(engine: Engine) -> Engine:
    assert engine.say("EHLO c", "STARTTLS")[-1] == READY
    assert engine.dialogue.wants_tls
    return engine


def site(**settings: object) -> Engine:
    return Engine(client=STRANGER, tls="starttls", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "behind",
    [
        b"NOOP FAKE\r\n",
        b"NOOP\r\n" * 3,
        b"NOOP\r\n" * 100,
        b"RSET\r\n",
        b"MAIL FROM:<a@b>\r\n",
        b"AUTH PLAIN AGFsaWNlAG9wZW4gc2VzYW1l\r\n",
        b"NOO",
        b"\n",
        b"\x16\x03\x01",
    ],
)
@pytest.mark.parametrize("service", ["mx", "relay", "submission"])
def test_what_is_behind_starttls_tl1(behind: bytes, service: str) -> None:
    """CVE-2011-0411: it is never read, the client is told off, and not even our own people are forgiven."""
    engine = Engine(service, tls="starttls", logins=MemoryLogins())  # type: ignore[arg-type]
    engine.say("EHLO c")
    engine._unread = b""
    engine.send(b"STARTTLS\r\n" + behind)
    assert engine._unread == b"554 5.5.1 Error: commands pipelined after STARTTLS\r\n"
    assert engine.dialogue.closing
    assert not engine.dialogue.wants_tls
    assert engine.dialogue.session.bad == 1
    assert engine.log.events == ["refused 'STARTTLS' 554 5.5.1"]


def test_what_comes_between_220_and_the_handshake_tl1() -> None:
    """It was meant for the handshake; should anybody hand it over all the same, it is gone."""
    engine = starttls(site())
    assert engine.dialogue.receive(b"EHLO evil\r\nMAIL FROM:<a@b>\r\n") == b""
    engine.secure()
    assert engine.say("NOOP") == ["250 2.0.0 Ok"]
    assert engine.dialogue.session.helo == ""


def test_everything_is_forgotten_tl2_tl4() -> None:
    engine = site(logins=MemoryLogins())
    engine.say("EHLO evil", "MAIL FROM:<evil@example.net>", "RCPT TO:<bob@example.org>")
    assert engine.say("STARTTLS") == [READY]
    engine.secure()
    session = engine.dialogue.session
    assert (session.helo, session.esmtp, session.transaction, session.login) == ("", False, None, "")
    for line in ("MAIL FROM:<a@b>", "RCPT TO:<bob@example.org>", "DATA", "BDAT 0 LAST", "AUTH PLAIN"):
        assert engine.say(line)[0].startswith("503 5.5.1"), line
    assert engine.say("EHLO c")[0] == "250-mx.example.org"
    assert engine.say("RCPT TO:<bob@example.org>")[0].startswith("503 5.5.1")


def test_a_login_from_before_is_forgotten_tl2() -> None:
    engine = Engine(tls="starttls", logins=MemoryLogins(), auth_without_tls=True)
    assert engine.say("EHLO c", "AUTH PLAIN AGFsaWNlAG9wZW4gc2VzYW1l")[-1].startswith("235")
    starttls(engine)
    engine.secure()
    assert engine.dialogue.session.login == ""
    assert engine.say("EHLO c", "MAIL FROM:<a@b>", "RCPT TO:<x@example.com>")[-1].startswith("550 5.7.1")


def test_misbehaviour_is_not_forgotten() -> None:
    engine = Engine(client=STRANGER, tls="starttls", limits=Limits(bad_commands=5))
    engine.say("X", "X", "X", "X")
    starttls(engine)
    engine.secure()
    assert engine.say("X")[0].startswith("421 4.7.0")
    assert engine.dialogue.session.commands["STARTTLS"] == (1, 1)


def test_where_and_when_tl3() -> None:
    engine = site()
    assert engine.say("STARTTLS")[0].startswith("503 5.5.1")
    engine.say("HELO c")
    assert engine.say("STARTTLS")[0].startswith("503 5.5.1 Error: send EHLO first")
    assert "250-STARTTLS" in engine.say("EHLO c")
    assert engine.say("STARTTLS now")[0].startswith("501 5.5.4")
    starttls(engine)
    engine.secure()
    assert not any("STARTTLS" in line for line in engine.say("EHLO c"))
    assert engine.say("STARTTLS") == ["503 5.5.1 Error: TLS already active"]
    assert engine.say("NOOP") == ["250 2.0.0 Ok"]


def test_a_chunk_that_was_under_way_is_given_up() -> None:
    engine = site()
    engine.say("EHLO c", "MAIL FROM:<a@b>", "RCPT TO:<bob@example.org>")
    engine.send(b"BDAT 3\r\nabc")
    assert engine.say("STARTTLS") == [READY]
    engine.secure()
    assert [entry.state for entry in engine.spool.entries] == ["discarded"]


def test_tls_from_the_first_octet() -> None:
    engine = Engine(client=STRANGER, tls="implicit")
    assert engine.transcript.startswith(b"220 mx.example.org ESMTP")
    assert not any("STARTTLS" in line for line in engine.say("EHLO c"))
    assert engine.say("STARTTLS") == ["503 5.5.1 Error: TLS already active"]
    assert engine.dialogue.session.protocol == "ESMTPS"


@pytest.mark.parametrize(
    ("tls", "login", "parameter", "protocol"),
    [
        (False, False, "", "ESMTP"),
        (True, False, "", "ESMTPS"),
        (False, True, "", "ESMTPA"),
        (True, True, "", "ESMTPSA"),
        (False, False, " SMTPUTF8", "UTF8SMTP"),
        (True, False, " SMTPUTF8", "UTF8SMTPS"),
        (False, True, " SMTPUTF8", "UTF8SMTPA"),
        (True, True, " SMTPUTF8", "UTF8SMTPSA"),
    ],
)
def test_the_trace_says_the_truth_rfc_3848(tls: bool, login: bool, parameter: str, protocol: str) -> None:
    engine = Engine(logins=MemoryLogins(), auth_without_tls=True, tls="implicit" if tls else "none")
    engine.say("EHLO c")
    if login:
        engine.say("AUTH PLAIN AGFsaWNlAG9wZW4gc2VzYW1l")
    engine.say(f"MAIL FROM:<alice@example.org>{parameter}", "RCPT TO:<bob@example.org>", "DATA", ".")
    (entry,) = engine.spool.committed
    assert entry.envelope.protocol == protocol
    assert f" with {protocol} id ".encode() in entry.content
    using = b"\r\n\t(using TLSv1.3 with cipher TLS_AES_256_GCM_SHA384 (256/256 bits))\r\n\tby mx.example.org"
    assert (using in entry.content) is tls


def test_a_client_that_only_says_helo() -> None:
    engine = Engine(client=STRANGER, tls="implicit")
    engine.say("HELO c", "MAIL FROM:<a@b>", "RCPT TO:<bob@example.org>", "DATA", ".")
    assert b" with SMTP id " in engine.spool.committed[0].content


def test_facts_are_values() -> None:
    assert TlsFacts("TLSv1.2", "x", 128).bindings == {}
    assert TLS.bindings == BINDINGS


# -- out of turn ----------------------------------------------------------------------------------------------------------


def test_who_speaks_before_the_greeting_s_pa10() -> None:
    engine = Engine(client=STRANGER)
    assert engine.dialogue.spoke_early() == b"554 5.5.0 mx.example.org Error: you spoke before the greeting\r\n"
    assert engine.dialogue.closing
    assert engine.dialogue.receive(b"EHLO c\r\n") == b""
    assert engine.log.events == ["refused 'CONNECT' 554 5.5.0"]
    engine.dialogue.lost()
    assert len(engine.log.events) == 1


@pytest.mark.parametrize("engine", [Engine("relay"), Engine(strict_order=False)])
def test_our_own_people_are_forgiven(engine: Engine) -> None:
    assert engine.dialogue.spoke_early() == engine.transcript
    assert not engine.dialogue.closing


def test_tls_where_there_is_none_tl6() -> None:
    """S-TL6: a ClientHello to port 25 is answered at once, not waited out."""
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2
    for cut in (octets, lambda data: [data]):
        engine = Engine(client=STRANGER, cut=cut)
        engine._unread = b""
        engine.send(hello)
        assert engine._unread.startswith(b"554 5.5.0")
        assert engine._unread.count(b"\n") == 1
        assert engine.dialogue.closing


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: mx.example.org:25\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 300\r\n\r\nEHLO c\r\nMAIL FROM:<a@b>\r\n",
        b"CONNECT mx.example.org:25 HTTP/1.1\r\n\r\n",
        b"Host: a\r\nEHLO c\r\n",
    ],
)
def test_http_s_pa10(request_: bytes) -> None:
    for cut in (octets, lambda data: [data]):
        engine = Engine(client=STRANGER, cut=cut)
        engine._unread = b""
        engine.send(request_)
        assert engine._unread == b"421 4.7.0 mx.example.org Error: this is a mail server\r\n"
        assert engine.dialogue.closing
        assert len(engine.log.events) == 1


ENVELOPE = b"MAIL FROM:<a@b>\r\nRCPT TO:<bob@example.org>\r\nDATA\r\n"


@pytest.mark.parametrize("ahead", [b"EHLO c\r\nMAIL FROM:<a@b>\r\n", b"HELO c\r\nNOOP\r\n", b"EHLO c\r\nM"])
def test_what_is_behind_a_greeting_s_pa10(ahead: bytes) -> None:
    engine = Engine(client=STRANGER)
    engine._unread = b""
    engine.send(ahead)
    assert engine._unread == b"554 5.5.0 Error: SMTP protocol synchronization: wait for the reply\r\n"
    assert engine.dialogue.closing


def test_what_is_behind_data_s_pa10() -> None:
    """Nothing of it is content, and nothing of it is a command."""
    engine = Engine(client=STRANGER)
    engine.say("EHLO c")
    engine._unread = b""
    engine.send(ENVELOPE + b"Subject: x\r\n\r\nx\r\n.\r\nQUIT\r\n")
    assert [line[:3] for line in engine._unread.decode().splitlines()] == ["250", "250", "554"]
    assert engine.spool.entries == []
    assert engine.dialogue.closing


def test_a_whole_group_is_welcome() -> None:
    engine = Engine(client=STRANGER)
    engine.say("EHLO c")
    engine._unread = b""
    engine.send(ENVELOPE)
    assert [line[:3] for line in engine._unread.decode().splitlines()] == ["250", "250", "354"]
    engine._unread = b""
    engine.send(b"x\r\n.\r\n" + ENVELOPE)
    assert [line[:3] for line in engine._unread.decode().splitlines()] == ["250", "250", "250", "354"]
