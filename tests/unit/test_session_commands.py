"""The table of commands, and what is counted."""

from __future__ import annotations

import pytest

from mtad.address import Address
from mtad.config import Limits, Size
from mtad.policy import Policy
from mtad.reply import Reply
from mtad.session.commands import COMMANDS, dispatch
from mtad.session.state import Client, Session, Site, State, Transaction, open_session
from mtad.smtp.grammar import parse_command
from tests.dialogue_engine import HOSTNAME, Engine, MemoryUsers

POLICY = Policy(MemoryUsers(), ("example.org",))


def session_in(state: State, limits: Limits | None = None, policy: Policy = POLICY) -> Session:
    session = open_session(Site(HOSTNAME, limits or Limits(), policy), Client("192.0.2.1"))
    if state is not State.START:
        session.helo = "client.example"
    if state in {State.SENDER, State.RECIPIENT}:
        session.transaction = Transaction(Address("a", "b"))
    if state is State.RECIPIENT and session.transaction is not None:
        session.transaction.recipients["bob@example.org"] = "bob@example.org"
    assert session.state is state
    return session


def say(session: Session, line: str) -> Reply:
    return dispatch(session, parse_command(line.encode()))


#: For each command, a well-formed line, and for each state the code and the state after it.
TABLE = {
    "EHLO c": dict.fromkeys(State, (250, State.READY)),
    "HELO c": dict.fromkeys(State, (250, State.READY)),
    "MAIL FROM:<a@b>": {
        State.START: (503, State.START),
        State.READY: (250, State.SENDER),
        State.SENDER: (503, State.SENDER),
        State.RECIPIENT: (503, State.RECIPIENT),
    },
    "RCPT TO:<bob@example.org>": {
        State.START: (503, State.START),
        State.READY: (503, State.READY),
        State.SENDER: (250, State.RECIPIENT),
        State.RECIPIENT: (250, State.RECIPIENT),
    },
    "DATA": {
        State.START: (503, State.START),
        State.READY: (503, State.READY),
        State.SENDER: (503, State.SENDER),
        State.RECIPIENT: (354, State.RECIPIENT),
    },
    "RSET": {state: (250, State.START if state is State.START else State.READY) for state in State},
    "NOOP": {state: (250, state) for state in State},
    "HELP": {state: (214, state) for state in State},
    "QUIT": {state: (221, state) for state in State},
}


def test_the_table_is_complete() -> None:
    assert {line.split()[0] for line in TABLE} == set(COMMANDS)


@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
@pytest.mark.parametrize("line", TABLE)
def test_each_command_in_each_state(line: str, state: State) -> None:
    code, after = TABLE[line][state]
    session = session_in(state)
    answer = say(session, line)
    assert answer.code == code
    assert session.state is after
    if code == 503:
        assert answer.enhanced == "5.5.1"
    assert session.closing is (line == "QUIT")


@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
@pytest.mark.parametrize("line", ["VRFY a", "EXPN a", "STARTTLS", "AUTH PLAIN", "BDAT 1", "TURN", "GET / HTTP/1.1"])
def test_what_is_not_in_the_table(line: str, state: State) -> None:
    session = session_in(state)
    answer = say(session, line)
    assert (answer.code, answer.enhanced) == (502, "5.5.1")
    assert session.state is state


@pytest.mark.parametrize(
    ("state", "line", "status"),
    [
        (State.START, "EHLO", "5.5.4"),
        (State.START, "HELO a b", "5.5.4"),
        (State.READY, "MAIL", "5.5.4"),
        (State.READY, "MAIL FROM:<a>", "5.1.7"),
        (State.READY, "MAIL FROM:<a@b> SIZE=x", "5.5.4"),
        (State.READY, "MAIL FROM:<a@b> SIZE=123456789012345678901", "5.5.4"),
        (State.READY, "MAIL FROM:<a@b> BODY=BINARYMIME", "5.5.4"),
        (State.SENDER, "RCPT bob", "5.5.4"),
        (State.SENDER, "RCPT TO:<bob>", "5.1.3"),
        (State.RECIPIENT, "RCPT TO:<bob@example.org> A=1 A=2", "5.5.4"),
        (State.RECIPIENT, "DATA x", "5.5.4"),
        (State.RECIPIENT, "RSET x", "5.5.4"),
        (State.READY, "QUIT x", "5.5.4"),
    ],
)
def test_bad_syntax_changes_nothing(state: State, line: str, status: str) -> None:
    session = session_in(state)
    answer = say(session, line)
    assert (answer.code, answer.enhanced) == (501, status)
    assert session.state is state
    assert not session.closing


def test_every_reply_is_one_that_may_be_sent() -> None:
    """RFC 2034: every 2yz, 4yz and 5yz has its status, but for those of EHLO and HELO."""
    for state in State:
        for line in [*TABLE, "VRFY", "EHLO", "MAIL x", "RCPT x", "RCPT TO:<x>", "RCPT TO:<x@y>", "DATA x"]:
            answer = say(session_in(state), line)
            if (line.split()[0] in {"EHLO", "HELO"} and answer.positive) or answer.code == 354:
                assert answer.enhanced == ""
            else:
                assert answer.enhanced[0] == str(answer.code)[0]


def test_ehlo_offers_what_works() -> None:
    session = session_in(State.START, Limits(message_size=Size(12345)))
    answer = say(session, "EHLO c")
    assert answer.encode() == (
        b"250-mx.example.org\r\n250-PIPELINING\r\n250-SIZE 12345\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES\r\n"
    )
    assert session.protocol == "ESMTP"
    assert say(session, "HELO c").encode() == b"250 mx.example.org\r\n"
    assert session.protocol == "SMTP"


def test_declared_size_is_held_to_the_limit() -> None:
    limits = Limits(message_size=Size(1000))
    assert say(session_in(State.READY, limits), "MAIL FROM:<a@b> SIZE=1000").code == 250
    answer = say(session_in(State.READY, limits), "MAIL FROM:<a@b> SIZE=1001")
    assert (answer.code, answer.enhanced) == (552, "5.3.4")


def test_recipient_limit() -> None:
    session = session_in(State.SENDER, Limits(recipients=100), Policy(MemoryUsers(), (), "relay", ("192.0.2.0/24",)))
    for number in range(100):
        assert say(session, f"RCPT TO:<u{number}@example.com>").code == 250
    for number in range(100, 200):
        answer = say(session, f"RCPT TO:<u{number}@example.com>")
        assert (answer.code, answer.enhanced) == (452, "4.5.3")
    assert say(session, "RCPT TO:<u5@example.com>").code == 250
    # Patience has its end, at as many again as the limit (S-PA6).
    codes = [say(session, f"RCPT TO:<v{number}@example.com>").code for number in range(10)]
    assert codes == [452] * 9 + [421]
    assert session.closing


def test_local_parts_of_others_are_compared_by_the_letter() -> None:
    """RFC 5321 section 2.4: only the host of a foreign address knows whether case matters."""
    session = session_in(State.SENDER, policy=Policy(MemoryUsers(), ("example.org",), "relay", ("192.0.2.0/24",)))
    for path in ("X@example.com", "x@EXAMPLE.com", "x@example.com", "BOB@example.org", "bob@example.org"):
        assert say(session, f"RCPT TO:<{path}>").code == 250
    assert session.transaction is not None
    assert list(session.transaction.recipients.values()) == ["X@example.com", "x@example.com", "BOB@example.org"]


@pytest.mark.parametrize(("domains", "expected"), [(("b.example", "a.example"), "b.example"), ((), "mx.example.org")])
def test_bare_postmaster_gets_a_domain(domains: tuple[str, ...], expected: str) -> None:
    session = session_in(State.SENDER, policy=Policy(MemoryUsers(), domains))
    assert say(session, "RCPT TO:<PostMaster>").code == 250
    assert session.transaction is not None
    assert list(session.transaction.recipients.values()) == [f"postmaster@{expected}"]


@pytest.mark.parametrize(
    ("service", "client", "path", "code", "status"),
    [
        ("relay", "192.0.2.1", "x@example.com", 554, "5.7.1"),
        ("relay", "192.0.2.1", "bob@example.org", 554, "5.7.1"),
        ("relay", "127.0.0.1", "x@example.com", 250, "2.1.5"),
        ("relay", "::1", "x@example.com", 250, "2.1.5"),
        ("relay", "::ffff:127.0.0.1", "x@example.com", 250, "2.1.5"),
        ("mx", "127.0.0.1", "x@example.com", 550, "5.7.1"),
        ("mx", "192.0.2.1", "bob@example.org", 250, "2.1.5"),
        ("mx", "192.0.2.1", "x@example.org", 550, "5.1.1"),
        ("submission", "127.0.0.1", "bob@example.org", 530, "5.7.0"),
    ],
)
def test_service_and_client(service: str, client: str, path: str, code: int, status: str) -> None:
    engine = Engine(service, client=Client(client))  # type: ignore[arg-type]
    engine.say("EHLO c", "MAIL FROM:<a@b>")
    (answer,) = engine.say(f"RCPT TO:<{path}>")
    assert answer.startswith(f"{code} {status} ")


def test_users_that_cannot_be_read_are_a_temporary_trouble() -> None:
    class Broken:
        def lookup(self, _address: Address, /) -> str | None:
            raise PermissionError(13, "users")

    session = session_in(State.SENDER, policy=Policy(Broken(), ("example.org",)))
    answer = say(session, "RCPT TO:<bob@example.org>")
    assert (answer.code, answer.enhanced) == (451, "4.3.0")


def codes_until_closed(session: Session, lines: list[str]) -> list[int]:
    codes = []
    for line in lines:
        codes.append(say(session, line).code)
        if session.closing:
            break
    return codes


def test_bad_commands_in_a_row() -> None:
    session = session_in(State.READY, Limits(bad_commands_in_a_row=3))
    assert codes_until_closed(session, ["X", "X", "NOOP", "X", "X", "X", "X"]) == [502, 502, 250, 502, 502, 421]


def test_bad_commands_in_total() -> None:
    session = session_in(State.READY, Limits(bad_commands=5))
    assert codes_until_closed(session, ["X", "NOOP"] * 9) == [502, 250] * 4 + [421]


def test_junk_counts_above_its_limit() -> None:
    session = session_in(State.READY, Limits(junk_commands=4, bad_commands_in_a_row=3))
    assert codes_until_closed(session, ["NOOP", "RSET", "HELP", "EHLO a", "NOOP", "NOOP", "NOOP"]) == [
        250,
        250,
        214,
        250,
        250,
        250,
        421,
    ]


def test_refused_recipients_are_borne_a_hundred_times_pa6() -> None:
    session = session_in(State.SENDER)
    codes = codes_until_closed(session, [f"RCPT TO:<u{n}@example.org>" for n in range(200)])
    assert codes == [550] * 109 + [421]


def test_recipients_out_of_order_are_not_borne() -> None:
    session = session_in(State.READY)
    assert codes_until_closed(session, ["RCPT TO:<bob@example.org>"] * 20) == [503] * 9 + [421]


def test_a_421_names_the_host() -> None:
    session = session_in(State.READY, Limits(bad_commands=1))
    assert say(session, "X").text == "421 4.7.0 mx.example.org Error: too many errors"
