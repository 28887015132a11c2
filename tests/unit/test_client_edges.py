"""The client's limits, octet by octet, and replies at the borders of their class."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from mtad.smtp.capabilities import Capabilities
from mtad.smtp.client import GROUP_OCTETS, PIECE, first_field
from mtad.smtp.dialogue import After, Phase, Step
from mtad.smtp.replies import ProtocolFault
from tests.unit.test_client_protocol import EVERY, PIPELINING, Transaction, play, r, said, sent

FIRST = b"Received: x\r\n"
CHUNKING = Capabilities({}, pipelining=True, chunking=True)


def test_a_content_without_a_field_in_front_has_no_first_field() -> None:
    assert first_field(FIRST + b"more\r\n") == FIRST
    assert first_field(b"no field\r\n") == b""
    assert first_field(b"") == b""


def recipients(octets: int) -> list[str]:
    """Recipients whose commands have so many octets together."""
    frame = len(b"RCPT TO:<>\r\n")
    named = [f"u{number:02}@{'d' * (200 - frame - 4)}" for number in range(octets // 200 - 1)]
    rest = octets - 200 * len(named)
    return [*named, f"last@{'d' * (rest - frame - 5)}"]


@pytest.mark.parametrize("over", [0, 1])
def test_a_group_is_filled_to_its_last_octet(over: int) -> None:
    room = GROUP_OCTETS - len(b"MAIL FROM:<a@x>\r\n") - len(b"DATA\r\n") + over
    names = recipients(room)
    transaction = Transaction("a@x", names, 1, PIPELINING)
    _, steps = play(transaction.steps(iter([b"x\r\n"])), EVERY, *[EVERY] * len(names), "354 go", "250 ok")
    assert [len(block) for block in sent(steps)[:-1]] == ([GROUP_OCTETS - 5, 6] if over else [GROUP_OCTETS])
    assert said(transaction) == ["dot 250"] * len(names)


def test_a_second_group_is_filled_like_the_first() -> None:
    room = 2 * GROUP_OCTETS
    names = [f"u{number:03}@{'d' * (256 - 12 - 5)}" for number in range(room // 256 + 1)]
    transaction = Transaction("a@x", names, 1, PIPELINING)
    _, steps = play(transaction.steps(iter([b"x\r\n"])), EVERY, *[EVERY] * len(names), "354 go", "250 ok")
    # MAIL and 63 recipients of 256 octets; then 64 of them fill a group to its last octet; then the rest and DATA.
    assert [len(block) for block in sent(steps)[:-1]] == [17 + 63 * 256, GROUP_OCTETS, 2 * 256 + 6]


@pytest.mark.parametrize("over", [0, 1])
def test_a_piece_is_filled_to_its_last_octet(over: int) -> None:
    transaction = Transaction("a@x", ["b@x"], 1, PIPELINING)
    content = [b"x" * (PIECE - 100), b"y" * (95 + over) + b"\r\n"]
    _, steps = play(transaction.steps(iter(content)), EVERY, EVERY, "354 go", "250 ok")
    pieces = [step for step in steps if step.phase in {Phase.CONTENT, Phase.DOT}]
    whole = b"".join(content)
    if over:
        assert pieces == [Step(Phase.CONTENT, whole, reply=False), Step(Phase.DOT, b".\r\n", final=True)]
    else:
        assert pieces == [Step(Phase.DOT, whole + b".\r\n", final=True)]


def test_pieces_after_the_first_are_filled_like_it() -> None:
    transaction = Transaction("a@x", ["b@x"], 1, PIPELINING)
    content = [b"x" * PIECE, b"y" * (PIECE - 10), b"z" * 8 + b"\r\n", b"end\r\n"]
    _, steps = play(transaction.steps(iter(content)), EVERY, EVERY, "354 go", "250 ok")
    pieces = [step.send for step in steps if step.phase in {Phase.CONTENT, Phase.DOT}]
    assert pieces == [content[0], content[1] + content[2], content[3] + b".\r\n"]


def test_the_rest_of_a_bdat_keeps_every_octet_of_later_pieces() -> None:
    content = [FIRST + b"a", b"b" * 5000, b"c\r\n"]
    size = sum(map(len, content))
    transaction = Transaction("a@x", ["b@x"], size, CHUNKING, first=content[0])
    _, steps = play(transaction.steps(iter(content)), EVERY, EVERY, "250 ok", "250 ok")
    left = b"".join(content)[len(FIRST) :]
    assert steps[-1].send == b"BDAT %d LAST\r\n%b" % (len(left), left)
    assert said(transaction) == ["dot 250"]


@pytest.mark.parametrize("size", [1, 5, 12, 13, 14, 20])
def test_a_first_line_that_comes_in_pieces_is_left_out_of_the_rest(size: int) -> None:
    content = FIRST + b"abcdefghijklmnopqrstuvwxyz" * 3 + b"\r\n"
    chunks = [content[at : at + size] for at in range(0, len(content), size)]
    transaction = Transaction("a@x", ["b@x"], len(content), CHUNKING, first=content)
    _, steps = play(transaction.steps(iter(chunks)), EVERY, EVERY, "250 ok", "250 ok")
    left = content[len(FIRST) :]
    assert steps[-1].send == b"BDAT %d LAST\r\n%b" % (len(left), left)


@pytest.mark.parametrize(
    ("replies", "told"),
    [
        (("300 go on",), "300 go on"),
        (("354 go on",), "354 go on"),
        ((EVERY, "300 go on"), "300 go on"),
        ((EVERY, EVERY, "250 2.0.0 Ok"), "250 2.0.0 Ok"),
        ((EVERY, EVERY, "299 Ok"), "299 Ok"),
        ((EVERY, EVERY, "354 go", "300 more"), "300 more"),
        ((EVERY, EVERY, "354 go", "354 more"), "354 more"),
        ((EVERY, EVERY, "354 go", "399 more"), "399 more"),
    ],
)
def test_a_success_of_the_wrong_kind_is_told(replies: Iterable[str], told: str) -> None:
    steps = Transaction("a@x", ["b@x"], 1, PIPELINING).steps(iter([b"x\r\n"]))
    next(steps)
    *before, last = replies
    for text in before:
        steps.send(r(text))
    with pytest.raises(ProtocolFault, match=f"^reply out of place: {told}$"):
        steps.send(r(last))


def test_a_success_in_the_middle_of_the_content_is_out_of_place() -> None:
    steps = Transaction("a@x", ["b@x"], 1, PIPELINING).steps(iter([b"x" * PIECE, b"\r\n"]))
    next(steps)
    for text in (EVERY, EVERY):
        steps.send(r(text))
    assert steps.send(r("354 go")) == Step(Phase.CONTENT, b"x" * PIECE, reply=False)
    with pytest.raises(ProtocolFault, match=r"^reply out of place: 250 2\.0\.0 Ok$"):
        steps.send(r("250 2.0.0 Ok"))


@pytest.mark.parametrize(
    ("code", "after"), [(299, After.READY), (400, After.READY), (421, After.CLOSED), (500, After.READY)]
)
def test_the_reply_to_the_dot_is_the_verdict(code: int, after: After) -> None:
    transaction = Transaction("a@x", ["b@x"], 1, PIPELINING)
    play(transaction.steps(iter([b"x\r\n"])), EVERY, EVERY, "354 go", f"{code} that is it")
    assert said(transaction) == [f"dot {code}"]
    assert transaction.after is after


def test_a_transaction_needs_recipients() -> None:
    with pytest.raises(ValueError, match=r"^a transaction without recipients$"):
        Transaction("a@x", [], 1, PIPELINING)


def test_rset_that_is_refused_is_told() -> None:
    steps = Transaction("a@x", ["b@x"], 1, PIPELINING, reset=True).steps(iter([b"x\r\n"]))
    assert next(steps).send.startswith(b"RSET\r\nMAIL FROM:<a@x>")
    with pytest.raises(ProtocolFault, match=r"^RSET refused: 500 what$"):
        steps.send(r("500 what"))
