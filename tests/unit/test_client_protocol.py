"""The client's protocol, played with literals: what is sent, and what each reply means. No socket, no clock."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

import pytest

from mtad.envelope import Recipient
from mtad.reply import Reply
from mtad.smtp import client
from mtad.smtp.capabilities import NO_EXTENSIONS, Capabilities, parse_capabilities
from mtad.smtp.commands import Mail
from mtad.smtp.dialogue import After, Phase, Step, Verdict
from mtad.smtp.opening import Greeting, greet
from mtad.smtp.replies import ProtocolFault, ReplyReader

T = TypeVar("T")

PIPELINING = Capabilities({"PIPELINING": ""}, pipelining=True)
BODY = (b"Subject: x\r\n\r\n", b"hello\r\n")
WIRE = b"".join(BODY) + b".\r\n"
EVERY = "250 2.1.0 Ok"


def r(text: str) -> Reply:
    """A reply from its text; lines are separated by ``|``."""
    lines = text.split("|")
    wire = "".join(f"{line}\r\n" for line in lines)
    return ReplyReader().feed(wire.encode())[0]


def play(steps: Generator[Step, Reply | None, T], *replies: str) -> tuple[T, list[Step]]:
    """Play a dialogue against these replies, all of which it must ask for, and return its result and its steps."""
    waiting = [r(text) for text in replies]
    seen: list[Step] = []
    answer: Reply | None = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            assert not waiting, f"not asked for: {waiting}"
            result: T = end.value
            return result, seen
        seen.append(step)
        answer = waiting.pop(0) if step.reply else None


def Transaction(
    sender: str,
    recipients: Sequence[str],
    size: int,
    capabilities: Capabilities,
    *,
    reset: bool = False,
    first: bytes = b"",
) -> client.Transaction:
    mail = Mail(sender, tuple(map(Recipient, recipients)), size)
    return client.Transaction(mail, capabilities, first, reset=reset)


def sent(steps: Sequence[Step]) -> list[bytes]:
    return [step.send for step in steps if step.send]


def transact(
    recipients: Sequence[str], capabilities: Capabilities, *replies: str, reset: bool = False
) -> tuple[client.Transaction, list[bytes]]:
    transaction = Transaction("a@example.org", recipients, 21, capabilities, reset=reset)
    _, steps = play(transaction.steps(iter(BODY)), *replies)
    return transaction, sent(steps)


def said(transaction: client.Transaction) -> list[str]:
    """Phase and code of each verdict."""
    return [f"{verdict.phase.value} {verdict.reply.code}" if verdict else "-" for verdict in transaction.verdicts]


# --- greeting -----------------------------------------------------------------------------------------------------------


def test_ehlo_gives_the_capabilities() -> None:
    greeting, steps = play(
        greet("me.example.org"),
        "220 mx ESMTP",
        "250-mx hello|250-pipelining|250-SIZE 1000|250-8BITMIME|250-AUTH=LOGIN|250-AUTH PLAIN LOGIN|250 SIZE 5",
    )
    assert sent(steps) == [b"EHLO me.example.org\r\n"]
    assert greeting.refusal is None
    assert greeting.capabilities == Capabilities(
        {"PIPELINING": "", "SIZE": "1000", "8BITMIME": "", "AUTH=LOGIN": "", "AUTH": "PLAIN LOGIN"},
        pipelining=True,
        size=True,
        size_limit=1000,
        eight_bit=True,
        mechanisms=("PLAIN", "LOGIN"),
    )


def test_the_first_line_of_ehlo_is_a_name_and_no_capability() -> None:
    assert parse_capabilities(r("250 PIPELINING")) == NO_EXTENSIONS


@pytest.mark.parametrize("refusal", ["500 5.5.1 what?", "502 no", "504 no", "550 no"])
def test_helo_when_ehlo_is_refused_for_good(refusal: str) -> None:
    greeting, steps = play(greet("me"), "220 mx", refusal, "250 mx")
    assert sent(steps) == [b"EHLO me\r\n", b"HELO me\r\n"]
    assert greeting == Greeting()


@pytest.mark.parametrize(
    ("replies", "phase"),
    [
        (("421 4.3.2 going down",), Phase.GREETING),
        (("450 later",), Phase.GREETING),
        (("521 no mail here",), Phase.GREETING),
        (("554 5.7.1 no",), Phase.GREETING),
        (("220 mx", "421 busy"), Phase.EHLO),
        (("220 mx", "450 busy"), Phase.EHLO),
        (("220 mx", "500 what?", "550 no"), Phase.HELO),
        (("220 mx", "500 what?", "421 no"), Phase.HELO),
    ],
)
def test_a_server_that_does_not_want_to_talk(replies: tuple[str, ...], phase: Phase) -> None:
    greeting, _ = play(greet("me"), *replies)
    assert greeting.refusal == Verdict(phase, r(replies[-1]))


@pytest.mark.parametrize("replies", [("354 go",), ("220 mx", "354 go"), ("220 mx", "500 what?", "334 go")])
def test_a_greeting_out_of_place_is_a_fault(replies: tuple[str, ...]) -> None:
    with pytest.raises(ProtocolFault):
        play(greet("me"), *replies)


# --- one transaction ----------------------------------------------------------------------------------------------------


def test_without_pipelining_each_command_waits_for_its_reply() -> None:
    transaction, lines = transact(["b@x", "c@x"], NO_EXTENSIONS, EVERY, EVERY, EVERY, "354 go", "250 2.0.0 Ok: queued as 1")
    assert lines == [
        b"MAIL FROM:<a@example.org>\r\n",
        b"RCPT TO:<b@x>\r\n",
        b"RCPT TO:<c@x>\r\n",
        b"DATA\r\n",
        WIRE,
    ]
    assert said(transaction) == ["dot 250", "dot 250"]
    assert all(verdict is not None and verdict.accepted for verdict in transaction.verdicts)
    assert transaction.after is After.READY


def test_with_pipelining_mail_rcpt_and_data_leave_together() -> None:
    transaction, lines = transact(["b@x", "c@x"], PIPELINING, EVERY, EVERY, EVERY, "354 go", "250 ok")
    assert lines == [
        b"MAIL FROM:<a@example.org>\r\nRCPT TO:<b@x>\r\nRCPT TO:<c@x>\r\nDATA\r\n",
        WIRE,
    ]
    assert said(transaction) == ["dot 250", "dot 250"]


def test_reset_travels_with_the_next_transaction() -> None:
    _, lines = transact(["b@x"], PIPELINING, "250 ok", EVERY, EVERY, "354 go", "250 ok", reset=True)
    assert lines[0] == b"RSET\r\nMAIL FROM:<a@example.org>\r\nRCPT TO:<b@x>\r\nDATA\r\n"
    _, lines = transact(["b@x"], NO_EXTENSIONS, "250 ok", EVERY, EVERY, "354 go", "250 ok", reset=True)
    assert lines[:2] == [b"RSET\r\n", b"MAIL FROM:<a@example.org>\r\n"]


def test_mail_has_the_parameters_that_the_server_knows() -> None:
    capabilities = parse_capabilities(r("250-mx|250-SIZE|250 8BITMIME"))
    transaction = Transaction("", ["b@x"], 4711, capabilities)
    _, steps = play(transaction.steps(iter(BODY)), EVERY, EVERY, "354 go", "250 ok")
    assert steps[0].send == b"MAIL FROM:<> SIZE=4711\r\n"


@pytest.mark.parametrize("capabilities", [NO_EXTENSIONS, PIPELINING])
def test_d9_each_recipient_gets_what_was_said_about_it(capabilities: Capabilities) -> None:
    transaction, lines = transact(
        ["ok@x", "full@x", "no@x", "many@x", "ok2@x"],
        capabilities,
        EVERY,
        "250 2.1.5 ok",
        "450 4.2.2 full",
        "550 5.1.1 no such user",
        "552 5.5.3 too many recipients",
        "251 2.1.5 will forward",
        "354 go",
        "250 2.0.0 Ok: queued as 1",
    )
    assert said(transaction) == ["dot 250", "rcpt 450", "rcpt 550", "rcpt 552", "dot 250"]
    assert [verdict.permanent for verdict in transaction.verdicts if verdict] == [False, False, True, False, False]
    assert lines[-1] == WIRE


def test_552_is_for_good_anywhere_but_at_rcpt() -> None:
    too_big = r("552 5.3.4 message too big")
    assert Verdict(Phase.MAIL, too_big).permanent
    assert Verdict(Phase.DOT, too_big).permanent
    assert not Verdict(Phase.RCPT, too_big).permanent


def test_mail_refused_is_the_verdict_for_all_and_ends_it_at_once() -> None:
    transaction, lines = transact(["b@x", "c@x"], NO_EXTENSIONS, "550 5.7.1 not you")
    assert said(transaction) == ["mail 550", "mail 550"]
    assert lines == [b"MAIL FROM:<a@example.org>\r\n"]
    assert transaction.after is After.RESET


def test_mail_refused_under_pipelining_is_the_verdict_for_all() -> None:
    transaction, lines = transact(
        ["b@x", "c@x"], PIPELINING, "451 4.7.1 later", "503 need MAIL", "503 need MAIL", "503 need RCPT"
    )
    assert said(transaction) == ["mail 451", "mail 451"]
    assert len(lines) == 1
    assert transaction.after is After.RESET


def test_mail_refused_but_the_rest_taken_sends_nothing_and_closes() -> None:
    transaction, lines = transact(["b@x"], PIPELINING, "550 5.7.1 not you", EVERY, "354 go")
    assert said(transaction) == ["mail 550"]
    assert len(lines) == 1  # an empty message would be delivered with a dot
    assert transaction.after is After.CLOSED


def test_all_recipients_refused_without_pipelining_sends_no_data() -> None:
    transaction, lines = transact(["b@x", "c@x"], NO_EXTENSIONS, EVERY, "550 no", "450 later")
    assert said(transaction) == ["rcpt 550", "rcpt 450"]
    assert b"DATA\r\n" not in lines
    assert transaction.after is After.RESET


def test_s_pa11_all_recipients_refused_and_data_refused_under_pipelining() -> None:
    transaction, lines = transact(["b@x", "c@x"], PIPELINING, EVERY, "550 no", "450 later", "554 no valid recipients")
    assert said(transaction) == ["rcpt 550", "rcpt 450"]
    assert len(lines) == 1
    assert transaction.after is After.RESET


@pytest.mark.parametrize(("dot", "after"), [("250 ok", After.READY), ("554 no", After.READY), ("421 no", After.CLOSED)])
def test_all_recipients_refused_and_354_under_pipelining_gets_an_empty_message(dot: str, after: After) -> None:
    transaction = Transaction("a@x", ["b@x", "c@x"], 1, PIPELINING)
    _, steps = play(transaction.steps(iter(BODY)), EVERY, "550 no", "450 later", "354 go", dot)
    assert said(transaction) == ["rcpt 550", "rcpt 450"]
    assert steps[-1] == Step(Phase.DOT, b".\r\n")  # not final: nobody's message ends here
    assert transaction.after is after


@pytest.mark.parametrize("capabilities", [NO_EXTENSIONS, PIPELINING])
def test_d9_250_to_rcpt_then_5xx_to_data(capabilities: Capabilities) -> None:
    transaction, lines = transact(["b@x", "c@x"], capabilities, EVERY, EVERY, "450 later", "554 5.7.1 no data from you")
    assert said(transaction) == ["data 554", "rcpt 450"]
    assert lines[-1].endswith(b"DATA\r\n")
    assert transaction.after is After.RESET


@pytest.mark.parametrize("dot", ["450 4.7.1 greylisted", "554 5.7.1 spam"])
def test_the_reply_to_the_dot_is_the_verdict_for_the_accepted(dot: str) -> None:
    transaction, _ = transact(["b@x", "c@x"], PIPELINING, EVERY, EVERY, "550 no", "354 go", dot)
    assert said(transaction) == [f"dot {dot[:3]}", "rcpt 550"]
    assert transaction.after is After.READY
    verdict = transaction.verdicts[0]
    assert verdict is not None
    assert not verdict.accepted


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (("421 4.3.2 down",), ["mail 421", "mail 421"]),
        ((EVERY, "421 4.3.2 down"), ["rcpt 421", "rcpt 421"]),
        ((EVERY, "550 no", "421 4.3.2 down"), ["rcpt 550", "rcpt 421"]),
        ((EVERY, EVERY, "550 no", "421 4.3.2 down"), ["data 421", "rcpt 550"]),
        ((EVERY, EVERY, "550 no", "354 go", "421 4.3.2 down"), ["dot 421", "rcpt 550"]),
    ],
)
@pytest.mark.parametrize("capabilities", [NO_EXTENSIONS, PIPELINING])
def test_d9_421_at_each_stage_ends_the_connection(
    capabilities: Capabilities, replies: tuple[str, ...], expected: list[str]
) -> None:
    transaction, _ = transact(["b@x", "c@x"], capabilities, *replies)
    assert said(transaction) == expected
    assert transaction.after is After.CLOSED


@pytest.mark.parametrize(
    "replies",
    [
        ("354 go",),
        (EVERY, "354 go"),
        (EVERY, EVERY, "250 ok"),
        (EVERY, EVERY, "354 go", "354 go"),
        (EVERY, EVERY, "354 go", "334 go"),
    ],
)
def test_a_reply_out_of_place_is_a_fault_and_no_verdict(replies: tuple[str, ...]) -> None:
    transaction = Transaction("a@x", ["b@x"], 1, PIPELINING)
    with pytest.raises(ProtocolFault):
        play(transaction.steps(iter(BODY)), *replies)
    assert said(transaction) == ["-"]
    assert transaction.after is After.CLOSED


def test_what_was_decided_before_a_break_stays_decided() -> None:
    transaction = Transaction("a@x", ["b@x", "c@x"], 1, PIPELINING)
    steps = transaction.steps(iter(BODY))
    next(steps)
    assert not transaction.answered
    steps.send(r(EVERY))
    steps.send(r("550 5.1.1 no"))
    steps.close()
    assert said(transaction) == ["rcpt 550", "-"]
    assert transaction.answered
    assert transaction.after is After.CLOSED


@pytest.mark.parametrize("first", ["421 4.4.2 idle for too long", None])
def test_a_421_or_silence_instead_of_the_first_answer_leaves_a_kept_connection_unused(first: str | None) -> None:
    transaction = Transaction("a@x", ["b@x"], 1, PIPELINING, reset=True)
    steps = transaction.steps(iter(BODY))
    next(steps)
    steps.send(r("250 ok"))  # to RSET
    if first is not None:
        with pytest.raises(StopIteration):
            steps.send(r(first))
    assert not transaction.answered


def test_rset_refused_is_a_fault_and_leaves_the_connection_unused() -> None:
    transaction = Transaction("a@x", ["b@x"], 1, PIPELINING, reset=True)
    with pytest.raises(ProtocolFault, match="RSET refused"):
        play(transaction.steps(iter(BODY)), "502 5.5.1 what?")
    assert not transaction.answered
    assert said(transaction) == ["-"]
