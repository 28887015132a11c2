"""The client's content, fields and groups of commands, played with literals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.smtp.capabilities import NO_EXTENSIONS, Capabilities
from mtad.smtp.client import GROUP_COMMANDS, GROUP_OCTETS, PIECE
from mtad.smtp.dialogue import PHASES, After, Phase, Step, command, sendable
from mtad.smtp.opening import greet
from mtad.smtp.replies import ProtocolFault
from tests.unit.test_client_protocol import EVERY, PIPELINING, Transaction, play, r, said, sent, transact

# --- content ------------------------------------------------------------------------------------------------------------


def test_a_small_message_and_its_dot_leave_in_one_final_piece() -> None:
    transaction = Transaction("a@x", ["b@x"], 1, PIPELINING)
    _, steps = play(transaction.steps(iter([b"a\r\n", b"", b"b\r\n"])), EVERY, EVERY, "354 go", "250 ok")
    assert steps[-1] == Step(Phase.DOT, b"a\r\nb\r\n.\r\n", final=True)
    assert [step.final for step in steps].count(True) == 1


@given(st.lists(st.integers(0, PIECE), max_size=12))
def test_only_the_final_step_can_end_a_large_message(sizes: list[int]) -> None:
    # Invariant: all pieces together are the content, and those before the final one lack its end.
    chunks = [b"x" * size for size in sizes] + [b"\r\n"]
    transaction = Transaction("a@x", ["b@x"], 1, PIPELINING)
    _, steps = play(transaction.steps(iter(chunks)), EVERY, EVERY, "354 go", "250 ok")
    content = [step for step in steps if step.phase in {Phase.CONTENT, Phase.DOT}]
    assert b"".join(step.send for step in content) == b"".join(chunks) + b".\r\n"
    assert [step.final for step in content] == [False] * (len(content) - 1) + [True]
    assert content[-1].send.endswith(b".\r\n")
    assert not any(step.send.endswith(b"\r\n.\r\n") for step in content[:-1])
    assert all(len(step.send) <= PIECE for step in content)
    assert all(step.send for step in content)


def test_a_server_that_gives_up_in_the_middle_of_the_content_is_heard() -> None:
    transaction = Transaction("a@x", ["b@x", "c@x"], 1, PIPELINING)
    steps = transaction.steps(iter([b"x" * PIECE, b"y" * PIECE, b"\r\n"]))
    for text in ("", EVERY, EVERY, "550 no"):
        steps.send(r(text) if text else None)
    assert steps.send(r("354 go")).phase is Phase.CONTENT
    with pytest.raises(StopIteration):
        steps.send(r("552 5.3.4 too big"))
    assert said(transaction) == ["content 552", "rcpt 550"]
    assert transaction.after is After.CLOSED


# --- BDAT ---------------------------------------------------------------------------------------------------------------

FIRST = b"Received: x\r\n"
CHUNKING = Capabilities({}, pipelining=True, chunking=True)


def test_bdat_has_one_chunk_for_the_first_line_and_one_for_the_rest() -> None:
    transaction = Transaction("a@x", ["b@x"], len(FIRST) + 5, CHUNKING, first=FIRST + b"abc")
    _, steps = play(transaction.steps(iter([FIRST[:4], FIRST[4:] + b"ab", b"c\r\n"])), EVERY, EVERY, "250 ok", "250 ok")
    envelope, end = sent(steps)
    assert envelope == b"MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nBDAT 13\r\nReceived: x\r\n"
    assert end == b"BDAT 5 LAST\r\nabc\r\n"
    assert (said(transaction), transaction.after) == (["dot 250"], After.READY)


@pytest.mark.parametrize("body", [b"ab", b"abcd", b""])
def test_bdat_with_another_size_than_it_said_is_never_finished(body: bytes) -> None:
    transaction = Transaction("a@x", ["b@x"], len(FIRST) + 3, CHUNKING, first=FIRST)
    steps = transaction.steps(iter([FIRST, body]))
    next(steps)
    seen = [steps.send(r(EVERY)), steps.send(r(EVERY))]
    with pytest.raises(ValueError, match="than the 16 octets"):
        seen.append(steps.send(r("250 ok")))
    assert not [step for step in seen if step.final]


@pytest.mark.parametrize(
    ("replies", "expected", "lied", "after"),
    [
        ((EVERY, EVERY, "502 what?"), ["-"], True, After.CLOSED),
        ((EVERY, EVERY, "451 disk full"), ["bdat 451"], False, After.RESET),
        ((EVERY, EVERY, "421 down"), ["bdat 421"], False, After.CLOSED),
        ((EVERY, "550 no", "502 what?"), ["rcpt 550"], False, After.RESET),
        ((EVERY, "550 no", "250 ok"), ["rcpt 550"], False, After.RESET),
        (("550 no", "503 no", "250 ok"), ["mail 550"], False, After.RESET),
        (("550 no", EVERY, "250 ok"), ["mail 550"], False, After.RESET),
        ((EVERY, EVERY, "250 ok", "554 spam"), ["dot 554"], False, After.READY),
    ],
)
def test_replies_to_bdat(replies: tuple[str, ...], expected: list[str], lied: bool, after: After) -> None:
    transaction = Transaction("a@x", ["b@x"], len(FIRST), CHUNKING, first=FIRST)
    play(transaction.steps(iter([FIRST])), *replies)
    assert (said(transaction), transaction.lied, transaction.after) == (expected, lied, after)


def test_354_to_bdat_is_a_fault() -> None:
    transaction = Transaction("a@x", ["b@x"], len(FIRST), CHUNKING, first=FIRST)
    with pytest.raises(ProtocolFault):
        play(transaction.steps(iter([FIRST])), EVERY, EVERY, "354 go")


# --- fields and groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["a\rb@x", "a\nb@x", "a\r\nRCPT TO:<evil@x>", "a\0b@x", "a\x1b@x", "a\x7f@x", "\u00fc@x"])
def test_s_en1_no_control_character_can_be_written(bad: str) -> None:
    assert not sendable(bad)
    with pytest.raises(ValueError, match="command line"):
        command("RCPT TO:<", bad, ">")
    with pytest.raises(ValueError, match="command line"):
        Transaction(bad, ["b@x"], 1, NO_EXTENSIONS)
    with pytest.raises(ValueError, match="command line"):
        Transaction("a@x", ["b@x", bad], 1, NO_EXTENSIONS)
    with pytest.raises(ValueError, match="command line"):
        play(greet(bad), "220 mx", EVERY)


@given(st.text())
def test_a_command_is_one_line_whatever_it_is_made_of(text: str) -> None:
    # Invariant: a command has one CRLF, at its end, and no other control character; or there is no command.
    if sendable(text):
        line = command("X ", text)
        assert line.endswith(b"\r\n")
        assert all(32 <= octet < 127 for octet in line[:-2])


def test_a_transaction_without_recipients_is_the_callers_fault() -> None:
    with pytest.raises(ValueError, match="without recipients"):
        Transaction("a@x", [], 1, NO_EXTENSIONS)


def test_many_recipients_leave_in_groups_and_each_is_accounted_for() -> None:
    recipients = [f"r{number}@x" for number in range(250)]
    replies = ["550 5.1.1 no" if number % 2 else EVERY for number in range(250)]
    transaction, lines = transact(recipients, PIPELINING, EVERY, *replies, "354 go", "250 ok")
    assert [block.count(b"\r\n") for block in lines[:-1]] == [GROUP_COMMANDS, GROUP_COMMANDS, 52]
    assert said(transaction) == ["dot 250", "rcpt 550"] * 125


def test_long_recipients_leave_in_smaller_groups() -> None:
    recipients = [f"{'x' * 240}{number}@example.org" for number in range(90)]
    _, lines = transact(recipients, PIPELINING, *[EVERY] * 91, "354 go", "250 ok")
    assert len(lines) == 3
    assert max(len(block) for block in lines) <= GROUP_OCTETS


def test_mail_refused_in_the_first_of_many_groups_ends_it_there() -> None:
    transaction, lines = transact(
        [f"r{number}@x" for number in range(150)], PIPELINING, "550 5.7.1 not you", *["503 no"] * (GROUP_COMMANDS - 1)
    )
    assert said(transaction) == ["mail 550"] * 150
    assert len(lines) == 1


def test_every_phase_has_its_row_in_the_table() -> None:
    assert set(PHASES) == set(Phase)
