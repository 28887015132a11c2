"""AUTH on a session: who is asked, what is said, what is counted, and what nobody gets to see."""

from __future__ import annotations

import base64

import pytest

from mtad.config import Limits
from mtad.session.auth import FAILURES, PAUSE
from mtad.session.state import Client, TlsFacts
from mtad.smtp.sasl import PLUS, SCRAM, Entry, decode, encode
from mtad.smtp.sasl_client import ClientMechanism, client_mechanism
from tests.dialogue_engine import BINDINGS, PASSWORD, TLS, Engine, MemoryLogins, octets

STRANGER = Client("192.0.2.1")


def b64(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


GOOD = b64(f"\0alice\0{PASSWORD}")
WRONG = b64("\0alice\0wrong")


class Gate:
    """A guard that remembers, and refuses whom it is told to."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, str]] = []
        self.closed_to: set[tuple[str, str]] = set()

    def refused(self, address: str, login: str = "") -> bool:
        return (address, login) in self.closed_to

    def failed(self, address: str, login: str) -> float:
        self.failures.append((address, login))
        return 4.0


def inside_tls(service: str = "submission", **site: object) -> Engine:
    """A client that has greeted inside TLS."""
    site = {"logins": MemoryLogins(), "tls": "implicit"} | site
    engine = Engine(service, client=STRANGER, **site)  # type: ignore[arg-type]
    engine.say("EHLO c")
    return engine


def auth(engine: Engine, mechanism: ClientMechanism) -> str:
    """The whole exchange; the last line that came back."""
    initial = "" if mechanism.initial is None else f" {encode(mechanism.initial) or '='}"
    (answer,) = engine.say(f"AUTH {mechanism.name}{initial}")
    while answer.startswith("334 "):
        (answer,) = engine.say(encode(mechanism.respond(decode(answer[4:]))))
    return answer


@pytest.mark.parametrize("name", ["PLAIN", "LOGIN", SCRAM, PLUS])
def test_each_mechanism(name: str) -> None:
    engine = inside_tls()
    mechanism = client_mechanism(name, "alice", PASSWORD, BINDINGS if name == PLUS else {}, nonce="n")
    assert auth(engine, mechanism) == "235 2.7.0 Authentication successful"
    assert mechanism.complete
    session = engine.dialogue.session
    assert (session.login, session.mechanism, session.protocol) == ("alice", name, "ESMTPSA")
    assert session.commands["AUTH"] == (1, 1)
    assert engine.dialogue.pause == 0
    assert engine.log.events == []


@pytest.mark.parametrize("name", ["PLAIN", "LOGIN", SCRAM, PLUS])
@pytest.mark.parametrize("login", ["alice", "nobody"])
def test_a_wrong_password_s_pa13(name: str, login: str) -> None:
    """The same reply after the same pause, whether anybody has that login or not."""
    guard = Gate()
    engine = inside_tls(guard=guard)
    mechanism = client_mechanism(name, login, "wrong", BINDINGS if name == PLUS else {}, nonce="n")
    assert auth(engine, mechanism) == "535 5.7.8 Error: authentication failed: login or password is wrong"
    assert engine.dialogue.pause == 4.0
    assert guard.failures == [("192.0.2.1", login)]
    assert engine.dialogue.session.login == ""
    assert engine.dialogue.session.claimed == login
    assert engine.log.events == [f"refused 'AUTH {name}' 535 5.7.8"]
    assert engine.say("NOOP") == ["250 2.0.0 Ok"]
    assert engine.dialogue.pause == 0
    assert engine.dialogue.session.commands["AUTH"] == (0, 1)


def test_the_wrong_channel_tl4() -> None:
    """Somebody in the middle has another channel with each side (RFC 5802 section 6)."""
    engine = inside_tls()
    mechanism = client_mechanism(PLUS, "alice", PASSWORD, {"tls-exporter": b"other"}, nonce="n")
    assert auth(engine, mechanism).startswith("535 5.7.8")


def test_too_many_on_one_connection_s_pa13() -> None:
    engine = inside_tls()
    answers = [engine.say(f"AUTH PLAIN {WRONG}")[0][:9] for _ in range(FAILURES)]
    assert answers == ["535 5.7.8"] * (FAILURES - 1) + ["421 4.7.0"]
    assert engine.dialogue.closing
    assert engine.dialogue.pause == PAUSE


def test_too_many_on_other_connections_s_pa13() -> None:
    """Who is refused is not told any more whether a password was right."""
    guard = Gate()
    guard.closed_to.add(("192.0.2.1", ""))
    engine = inside_tls(guard=guard)
    assert engine.say(f"AUTH PLAIN {GOOD}")[0].startswith("421 4.7.0 mx.example.org")
    assert engine.dialogue.closing
    guard.closed_to = {("192.0.2.1", "alice")}
    for response in (GOOD, WRONG):
        engine = inside_tls(guard=guard)
        assert engine.say(f"AUTH PLAIN {response}")[0].startswith("421 4.7.0 mx.example.org")
        assert engine.dialogue.session.login == ""
    assert inside_tls(guard=guard).say(f"AUTH PLAIN {b64(chr(0) + 'bob' + chr(0) + PASSWORD)}")[0].startswith("235 ")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("AUTH", "501 5.5.4"),
        ("AUTH PLAIN a b", "501 5.5.4"),
        ("AUTH PL\u00c4IN", "500 5.5.2"),
        (f"AUTH {'X' * 21}", "501 5.5.4"),
        ("AUTH NTLM", "504 5.5.4"),
        ("AUTH EXTERNAL =", "504 5.5.4"),
        ("AUTH CRAM-MD5", "504 5.5.4"),
        ("AUTH GSSAPI x", "504 5.5.4"),
        ("AUTH PLAIN ===", "501 5.5.2"),
        ("AUTH PLAIN YWJ", "501 5.5.2"),
        ("AUTH PLAIN =", "501 5.5.2"),
        (f"AUTH PLAIN {b64(chr(0) + 'u' + chr(0) + 'p' + chr(0) + 'x')}", "501 5.5.2"),
        ("AUTH plain", "334 "),
        (f"auth Plain {GOOD}", "235 2.7.0"),
    ],
)
def test_the_command_s_pa13(line: str, answer: str) -> None:
    (said,) = inside_tls().say(line)
    assert said.startswith(answer)


@pytest.mark.parametrize("cut", [octets, lambda data: [data]])
@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (b"*\r\n", "501 5.7.0"),
        (b"===\r\n", "501 5.5.2"),
        (b"* \r\n", "501 5.5.2"),
        (b"NOOP\r\n", "501 5.5.2"),
        (b"QUIT\r\n", "501 5.5.2"),
        (b"AGFs\raWNl\r\n", "501 5.5.2"),
        (b"AGFs\naWNl\r\n", "501 5.5.2"),
        (b"A" * 12286 + b"\r\n", "501 5.5.2"),
        (b"A" * 12287 + b"\r\n", "500 5.5.6"),
        (b"A" * 1_000_000 + b"\r\n", "500 5.5.6"),
        (b"\0\r\n", "501 5.5.2"),
        (b"\r\n", "501 5.5.2"),
        (GOOD.encode() + b"\r\n", "235 2.7.0"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_response_s_pa13(response: bytes, answer: str, cut: object) -> None:
    """Whatever comes, the exchange is over and lines are commands again."""
    engine = inside_tls()
    assert engine.say("AUTH PLAIN") == ["334 "]
    if len(response) < 20_000:
        engine.cut = cut  # type: ignore[assignment]
    engine._unread = b""
    engine.send(response)
    assert engine._unread.startswith(answer.encode())
    assert engine._unread.count(b"\r\n") == 1
    assert engine.say("NOOP") == ["250 2.0.0 Ok"]


def test_a_challenge_that_has_no_room_in_a_line() -> None:
    engine = inside_tls()
    assert engine.say(f"AUTH {SCRAM} {b64('n,,n=alice,r=' + 'x' * 400)}") == [
        "501 5.5.2 Error: authentication failed: cannot decode response"
    ]


def test_once_is_enough() -> None:
    engine = inside_tls()
    engine.say(f"AUTH PLAIN {GOOD}")
    assert engine.say(f"AUTH PLAIN {GOOD}") == ["503 5.5.1 Error: already authenticated"]
    assert not any("AUTH" in line for line in engine.say("EHLO c"))
    assert engine.dialogue.session.login == "alice", "RFC 4954 section 4: EHLO is no reset of this"


def test_not_in_a_transaction_nor_before_ehlo() -> None:
    engine = inside_tls("mx")
    engine.say("MAIL FROM:<a@b>")
    assert engine.say(f"AUTH PLAIN {GOOD}")[0].startswith("503 5.5.1")
    for greeting in ("NOOP", "HELO c"):
        engine = Engine("mx", client=STRANGER, logins=MemoryLogins(), tls="implicit")
        engine.say(greeting)
        assert engine.say(f"AUTH PLAIN {GOOD}")[0].startswith("503 5.5.1")


def offered(engine: Engine) -> str:
    return next((line[4:] for line in engine.say("EHLO c") if line[4:].startswith("AUTH")), "")


def test_only_inside_tls_tl5() -> None:
    """S-TL5: before TLS it is not advertised, and a password that comes all the same is not looked at."""
    logins = MemoryLogins()
    engine = Engine("submission", client=STRANGER, logins=logins, tls="starttls")
    assert offered(engine) == ""
    assert engine.say(f"AUTH PLAIN {GOOD}")[0].startswith("538 5.7.11")
    assert logins.asked == []
    engine.say("STARTTLS")
    engine.secure()
    assert offered(engine) == f"AUTH {PLUS} {SCRAM} PLAIN LOGIN"
    engine = Engine("submission", client=STRANGER, logins=logins, tls="starttls")
    engine.say("EHLO c", "STARTTLS")
    engine.secure(TlsFacts("TLSv1.2", "ECDHE-RSA-AES256-GCM-SHA384", 256))
    assert offered(engine) == f"AUTH {SCRAM} PLAIN LOGIN"


@pytest.mark.parametrize(
    ("address", "allowed", "there"),
    [
        ("127.0.0.1", True, True),
        ("::1", True, True),
        ("::ffff:127.0.0.1", True, True),
        ("127.0.0.1", False, False),
        ("192.0.2.1", True, False),
        ("::ffff:192.0.2.1", True, False),
        ("nonsense", True, False),
    ],
)
def test_without_tls_on_this_machine_only(address: str, allowed: bool, there: bool) -> None:
    engine = Engine("submission", client=Client(address), logins=MemoryLogins(), auth_without_tls=allowed)
    assert bool(offered(engine)) is there
    assert engine.say(f"AUTH PLAIN {GOOD}")[0].startswith("235" if there else "538 5.7.11")


def test_where_nobody_can_log_in_nothing_is_offered() -> None:
    nobody = MemoryLogins("x")
    nobody.entries.clear()
    engine = inside_tls("mx", logins=nobody)
    assert offered(engine) == ""
    assert engine.say(f"AUTH PLAIN {GOOD}")[0].startswith("502 5.5.1")
    assert engine.say("MAIL FROM:<a@b> AUTH=<>")[0].startswith("555 5.5.4")
    assert inside_tls("relay", logins=None).say("AUTH PLAIN")[0].startswith("502 5.5.1")
    assert offered(inside_tls("submission", logins=nobody))


def test_the_auth_parameter_of_mail() -> None:
    """RFC 4954 section 5: read, and not believed."""
    engine = inside_tls("mx")
    assert engine.say("MAIL FROM:<a@b> AUTH=root+40example.org") == ["250 2.1.0 Ok"]
    assert engine.dialogue.session.login == ""
    engine.say("RSET")
    assert engine.say("MAIL FROM:<a@b> AUTH=a+0A")[0].startswith("501 5.5.4")


def test_logins_that_cannot_be_read_are_a_temporary_trouble() -> None:
    class Broken(MemoryLogins):
        def find(self, login: str) -> Entry:
            raise PermissionError(13, login)

    engine = inside_tls(logins=Broken())
    assert engine.say(f"AUTH PLAIN {GOOD}") == ["454 4.7.0 Temporary authentication failure"]


def test_no_credential_is_ever_shown() -> None:
    """Neither of those that were right nor of those that were wrong, however much the client lost its way."""
    engine = inside_tls(limits=Limits(bad_commands=100, bad_commands_in_a_row=100))
    secret = b64("very secret")
    engine.say(f"AUTH PLAIN {secret}", f"AUTH {secret}", "AUTH LOGIN", secret, secret)
    engine.say(f"AUTH {secret.rstrip('=')}", f"AUTH NTLM {secret}", secret, f"{secret} x", f"AUTH LOGIN {secret} {secret}")
    engine.say("AUTH LOGIN", secret, "*", secret, f"AUTH PLAIN{secret}", f"AUTH PLAIN {GOOD}")
    shown = " ".join(engine.log.events) + engine.transcript.decode()
    for text in (secret, secret.rstrip("="), secret.upper().rstrip("="), "very secret", GOOD):
        assert text not in shown
    assert len(engine.log.events) > 8


def test_a_claim_is_fit_for_a_log() -> None:
    engine = inside_tls()
    engine.say(f"AUTH PLAIN {b64(chr(0) + 'a' + chr(27) + '[2J' + chr(10) + 'x' * 200 + chr(0) + 'p')}")
    claimed = engine.dialogue.session.claimed
    assert claimed.isprintable()
    assert claimed.startswith("a?[2J?xxx")
    assert len(claimed) == 80


# -- sent ahead -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        f"AUTH PLAIN {GOOD}\r\nMAIL FROM:<a@b>\r\n",
        f"AUTH PLAIN\r\n{GOOD}\r\n",
        f"AUTH LOGIN\r\n{b64('alice')}\r\n{b64(PASSWORD)}\r\n",
    ],
)
def test_what_is_behind_auth_s_pa10(sent: str) -> None:
    engine = inside_tls()
    engine._unread = b""
    engine.send(sent.encode())
    assert engine._unread.startswith(b"554 5.5.0 ")
    assert engine.dialogue.closing
    assert engine.dialogue.session.login == ""


def test_what_is_behind_a_response_s_pa10() -> None:
    engine = inside_tls()
    engine.say("AUTH LOGIN")
    engine._unread = b""
    engine.send(f"{b64('alice')}\r\n{b64(PASSWORD)}\r\n".encode())
    assert engine._unread.startswith(b"554 5.5.0 ")
    assert engine.log.events == ["refused 'AUTH LOGIN' 554 5.5.0"]


# -- what a login is good for ---------------------------------------------------------------------------------------------


def test_submission_wants_auth_first() -> None:
    engine = inside_tls()
    assert engine.say("MAIL FROM:<alice@example.org>") == ["530 5.7.0 Authentication required"]
    assert engine.say("RCPT TO:<bob@example.org>")[0].startswith("503")
    engine.say(f"AUTH PLAIN {GOOD}")
    answers = engine.say("MAIL FROM:<alice@example.org>", "RCPT TO:<x@example.com>", "RCPT TO:<bob@example.org>", "DATA")
    assert [answer[:3] for answer in answers] == ["250", "250", "250", "354"]
    engine.say("Subject: x", "", "text", ".")
    (entry,) = engine.spool.committed
    assert (entry.envelope.login, entry.envelope.protocol) == ("alice", "ESMTPSA")


def test_a_login_may_relay_on_mx_and_a_stranger_may_not() -> None:
    engine = inside_tls("mx")
    engine.say("MAIL FROM:<a@b>")
    assert engine.say("RCPT TO:<x@example.com>") == ["550 5.7.1 <x@example.com>: Relay access denied"]
    engine.say("RSET", f"AUTH PLAIN {GOOD}", "MAIL FROM:<alice@example.org>")
    assert engine.say("RCPT TO:<x@example.com>") == ["250 2.1.5 Ok"]


@pytest.mark.parametrize("service", ["submission", "mx"])
def test_a_login_sends_as_itself_s_en5(service: str) -> None:
    engine = inside_tls(service, senders=("alice : news@example.org",))
    engine.say(f"AUTH PLAIN {GOOD}")
    for sender, code in (
        ("bob@example.org", "550 5.7.1"),
        ("alice@example.com", "550 5.7.1"),
        ("Alice@example.org", "250"),
        ("news@example.org", "250"),
        ("", "250"),
    ):
        (answer,) = engine.say(f"MAIL FROM:<{sender}>")
        assert answer.startswith(code), sender
        engine.say("RSET")


def test_the_tls_facts_are_the_latest() -> None:
    assert inside_tls().dialogue.session.tls == TLS
