"""The table of commands, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest

from mtad.address import Address
from mtad.config import Limits, Size
from mtad.envelope import Recipient
from mtad.policy import Policy
from mtad.reply import Reply
from mtad.session.commands import COMMANDS, dispatch
from mtad.session.state import Client, Session, Site, State, Transaction, open_session
from mtad.smtp.grammar import parse_command
from mtad.smtp.parameters import Chunk
from tests.dialogue_engine import HOSTNAME, Engine, MemoryLogins, MemoryUsers

POLICY = Policy(MemoryUsers(), ("example.org",))


def session_in(state: State, limits: Limits | None = None, policy: Policy = POLICY, **site: Any) -> Session:
    client = Client("127.0.0.1" if site else "192.0.2.1")
    session = open_session(Site(HOSTNAME, limits or Limits(), policy, **site), client)
    if state is not State.START:
        session.helo = "client.example"
        session.esmtp = True
    if state in {State.SENDER, State.RECIPIENT, State.CHUNKS}:
        session.transaction = Transaction(Address("a", "b"))
    if state in {State.RECIPIENT, State.CHUNKS} and session.transaction is not None:
        session.transaction.recipients["bob@example.org"] = Recipient("bob@example.org")
        session.transaction.chunks = state is State.CHUNKS
    assert session.state is state
    return session


def say(session: Session, line: str) -> Reply:
    return dispatch(session, parse_command(line.encode()))


def addresses(session: Session) -> list[str]:
    assert session.transaction is not None
    return [recipient.address for recipient in session.transaction.recipients.values()]


#: A site that has everything, for a client on this machine.
OFFERS: dict[str, Any] = {"tls": "starttls", "logins": MemoryLogins(), "auth_without_tls": True}


#: For each command, a well-formed line, and for each state the code and the state after it.
TABLE = {
    "EHLO c": dict.fromkeys(State, (250, State.READY)),
    "HELO c": dict.fromkeys(State, (250, State.READY)),
    "MAIL FROM:<a@b>": {
        State.START: (503, State.START),
        State.READY: (250, State.SENDER),
        State.SENDER: (503, State.SENDER),
        State.RECIPIENT: (503, State.RECIPIENT),
        State.CHUNKS: (503, State.CHUNKS),
    },
    "RCPT TO:<bob@example.org>": {
        State.START: (503, State.START),
        State.READY: (503, State.READY),
        State.SENDER: (250, State.RECIPIENT),
        State.RECIPIENT: (250, State.RECIPIENT),
        State.CHUNKS: (503, State.CHUNKS),
    },
    "DATA": {
        State.START: (503, State.START),
        State.READY: (503, State.READY),
        State.SENDER: (503, State.SENDER),
        State.RECIPIENT: (354, State.RECIPIENT),
        State.CHUNKS: (503, State.CHUNKS),
    },
    "BDAT 1": {
        State.START: (503, State.START),
        State.READY: (503, State.READY),
        State.SENDER: (503, State.SENDER),
        State.RECIPIENT: (250, State.CHUNKS),
        State.CHUNKS: (250, State.CHUNKS),
    },
    "STARTTLS": {state: (503 if state is State.START else 220, state) for state in State},
    "AUTH PLAIN": {state: (334 if state is State.READY else 503, state) for state in State},
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
    session = session_in(state, **OFFERS)
    answer = say(session, line)
    assert answer.code == code
    assert session.state is after
    if code == 503:
        assert answer.enhanced == "5.5.1"
    assert session.closing is (line == "QUIT")


@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
@pytest.mark.parametrize("line", ["EXPN a", "STARTTLS", "AUTH PLAIN", "TURN", "XCLIENT ADDR=192.0.2.1"])
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
        (State.READY, "MAIL FROM:<a@b> BODY=BINARY", "5.5.4"),
        (State.READY, "MAIL FROM:<a@b> SMTPUTF8=1", "5.5.4"),
        (State.READY, "MAIL FROM:<a@b> RET=ALL", "5.5.4"),
        (State.READY, "MAIL FROM:<a@b> ENVID=+0A", "5.5.4"),
        (State.SENDER, "RCPT TO:<bob@example.org> NOTIFY=NEVER,DELAY", "5.5.4"),
        (State.SENDER, "RCPT TO:<bob@example.org> ORCPT=rfc822;a+0D+0Ab", "5.5.4"),
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
        for line in [*TABLE, "VRFY a", "VRFY", "EHLO", "MAIL x", "RCPT x", "RCPT TO:<x>", "RCPT TO:<x@y>", "DATA x"]:
            answer = say(session_in(state, **OFFERS), line)
            if (line.split()[0] in {"EHLO", "HELO"} and answer.positive) or answer.code in {334, 354}:
                assert answer.enhanced == ""
            else:
                assert answer.enhanced[0] == str(answer.code)[0]


def test_ehlo_offers_what_works() -> None:
    session = session_in(State.START, Limits(message_size=Size(12345)))
    answer = say(session, "EHLO c")
    assert answer.encode() == (
        b"250-mx.example.org\r\n250-PIPELINING\r\n250-SIZE 12345\r\n250-8BITMIME\r\n250-BINARYMIME\r\n250-CHUNKING\r\n"
        b"250-SMTPUTF8\r\n250-DSN\r\n250-ENHANCEDSTATUSCODES\r\n250-LIMITS RCPTMAX=1000\r\n250 HELP\r\n"
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
    assert addresses(session) == ["X@example.com", "x@example.com", "BOB@example.org"]


@pytest.mark.parametrize(("domains", "expected"), [(("b.example", "a.example"), "b.example"), ((), "mx.example.org")])
def test_bare_postmaster_gets_a_domain(domains: tuple[str, ...], expected: str) -> None:
    session = session_in(State.SENDER, policy=Policy(MemoryUsers(), domains))
    assert say(session, "RCPT TO:<PostMaster>").code == 250
    assert addresses(session) == [f"postmaster@{expected}"]


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


@pytest.mark.parametrize(
    "line", ["GET / HTTP/1.1", "POST /x HTTP/1.0", "CONNECT mx.example.org:25", "Host: x", "user-agent: a"]
)
@pytest.mark.parametrize("state", State, ids=lambda state: state.name)
def test_http_is_cut_off_s_pa10(line: str, state: State) -> None:
    session = session_in(state)
    answer = say(session, line)
    assert (answer.code, answer.enhanced) == (421, "4.7.0")
    assert session.closing
    assert session.bad == 1


#: What must be the last of a group, and what not (RFC 2920 section 3.1, RFC 4954 section 4, RFC 3207 section 4).
LAST = {"EHLO c": 554, "HELO c": 554, "DATA": 554, "AUTH PLAIN": 554, "STARTTLS": 554}


@pytest.mark.parametrize("line", TABLE)
def test_what_is_sent_behind_a_command_s_pa10(line: str) -> None:
    state = State.READY if line == "AUTH PLAIN" else State.RECIPIENT
    strangers = session_in(state, **OFFERS)
    answer = dispatch(strangers, parse_command(line.encode()), ahead=True)
    assert answer.code == LAST.get(line, TABLE[line][state][0])
    assert strangers.closing is (line in LAST or line == "QUIT")
    known = session_in(state, **OFFERS)
    known.trusted = True
    answer = dispatch(known, parse_command(line.encode()), ahead=True)
    assert answer.code == (554 if line == "STARTTLS" else TABLE[line][state][0]), "STARTTLS is never forgiven"


def test_bdat_tells_how_much_follows_whatever_the_reply() -> None:
    for state in State:
        session = session_in(state)
        say(session, "BDAT 12 last")
        assert session.chunk == Chunk(12, True)
        say(session, "NOOP")
        assert session.chunk is None


@pytest.mark.parametrize(
    "argument",
    ["", "-1 LAST", "1a", "0x10", "+5", "1 0", "10 LAST LAST", "10LAST", "LAST", "xx", "1" * 21, "10 LAS", "1.0", "\u0661"],
)
def test_bdat_that_is_none_ends_the_session_s_pa12(argument: str) -> None:
    """Nobody knows which of the octets that follow are commands."""
    for state in State:
        session = session_in(state)
        answer = say(session, f"BDAT {argument}")
        assert (answer.code, answer.enhanced) == (501, "5.5.4")
        assert session.closing
        assert session.chunk is None


@pytest.mark.parametrize("octets", ["4294967297", "18446744073709551616", "99999999999999999999", "2147483649"])
def test_bdat_that_nobody_can_mean_is_not_waited_for_s_pa12(octets: str) -> None:
    session = session_in(State.RECIPIENT)
    answer = say(session, f"BDAT {octets}")
    assert (answer.code, answer.enhanced) == (552, "5.3.4")
    assert session.closing


def test_commands_beyond_ascii_s_pa4() -> None:
    for line in ("EHLO ü", "NOOP ü", "HELP ü", "QUIT ü", "RSET ü", "STARTTLS ü", "AUTH ü"):
        session = session_in(State.READY, **OFFERS)
        assert say(session, line).code in {500, 501}
        assert session.state is State.READY
    assert say(session_in(State.READY), "MAIL FROM:<ü@b>").text.startswith("553 5.6.7")
    assert say(session_in(State.READY), "MAIL FROM:<a@ü.example>").text.startswith("553 5.6.7")
    assert say(session_in(State.SENDER), "RCPT TO:<ü@b>").text.startswith("553 5.6.7")


def test_an_address_beyond_ascii_with_smtputf8() -> None:
    session = session_in(State.READY, policy=Policy(MemoryUsers(), (), "relay", ("192.0.2.0/24",)))
    assert say(session, "MAIL FROM:<ü@Bücher.example> SMTPUTF8").code == 250
    assert session.transaction is not None
    assert session.transaction.sender == Address("ü", "xn--bcher-kva.example")
    assert say(session, "RCPT TO:<ø@example.com>").code == 250
    assert addresses(session) == ["ø@example.com"]
    assert session.protocol == "UTF8SMTP"


def test_what_mail_and_rcpt_note_down() -> None:
    session = session_in(State.READY)
    assert say(session, "MAIL FROM:<a@b> body=binarymime RET=hdrs ENVID=QQ+2B1 size=5").code == 250
    assert session.transaction is not None
    assert (session.transaction.body, session.transaction.ret, session.transaction.envid) == ("binarymime", "hdrs", "QQ+1")
    assert say(session, "RCPT TO:<bob@example.org> NOTIFY=delay,FAILURE ORCPT=RFC822;Bob+3Dx@example.org").code == 250
    assert session.transaction.recipients["bob@example.org"] == Recipient(
        "bob@example.org", ("delay", "failure"), "rfc822;Bob=x@example.org"
    )
    assert say(session, "DATA").text == "503 5.5.1 Error: BODY=BINARYMIME needs BDAT"
    assert session.state is State.RECIPIENT


def test_limits_are_what_is_enforced() -> None:
    """RFC 9422 section 4: RCPTMAX."""
    session = session_in(State.START, Limits(recipients=100), Policy(MemoryUsers(), (), "relay", ("192.0.2.0/24",)))
    (limits,) = (line for line in say(session, "EHLO c").lines if line.startswith("LIMITS"))
    assert limits == "LIMITS RCPTMAX=100"
    say(session, "MAIL FROM:<a@b>")
    codes = [say(session, f"RCPT TO:<u{number}@example.com>").code for number in range(101)]
    assert codes == [250] * 100 + [452]


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


def test_refused_recipients_are_borne_a_hundred_times_s_pa6() -> None:
    session = session_in(State.SENDER)
    codes = codes_until_closed(session, [f"RCPT TO:<u{n}@example.org>" for n in range(200)])
    assert codes == [550] * 109 + [421]


def test_recipients_out_of_order_are_not_borne() -> None:
    session = session_in(State.READY)
    assert codes_until_closed(session, ["RCPT TO:<bob@example.org>"] * 20) == [503] * 9 + [421]


def test_a_421_names_the_host() -> None:
    session = session_in(State.READY, Limits(bad_commands=1))
    assert say(session, "X").text == "421 4.7.0 mx.example.org Error: too many errors"
