"""Replies of strangers: RFC 5321 section 4.2, and what is done with those that are none (attack S-EN2, client side)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.reply import Reply, reply
from mtad.smtp.replies import MAX_LINE, MAX_LINES, ProtocolFault, ReplyReader


def read(data: bytes, cuts: list[int] | None = None) -> tuple[list[Reply], str]:
    """All replies in ``data``, fed in pieces cut at ``cuts``, and the fault that ended them, or ""."""
    reader = ReplyReader()
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts or [])})
    replies: list[Reply] = []
    try:
        for first, last in itertools.pairwise(edges):
            replies += reader.feed(data[first:last])
        reader.feed(b"")
    except ProtocolFault as fault:
        return replies, str(fault)
    return replies, ""


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (b"220 mx.example.org ESMTP\r\n", Reply(220, "", ("mx.example.org ESMTP",))),
        (b"250 2.1.0 Ok\r\n", Reply(250, "2.1.0", ("Ok",))),
        (b"250 2.1.0\r\n", Reply(250, "2.1.0", ("",))),
        (b"250\r\n", Reply(250, "", ("",))),
        (b"250 \r\n", Reply(250, "", ("",))),
        (b"250-a\r\n250-b\r\n250 c\r\n", Reply(250, "", ("a", "b", "c"))),
        (b"550-5.1.1 No such\r\n550 5.1.1 user\r\n", Reply(550, "5.1.1", ("No such", "user"))),
        (b"550-5.1.1 one\r\n550 5.1.2 two\r\n", Reply(550, "5.1.1", ("one", "5.1.2 two"))),
        (b"550-first\r\n550 5.7.1 last\r\n", Reply(550, "5.7.1", ("first", "last"))),
        (b"554 4.7.1 class and code differ\r\n", Reply(554, "", ("4.7.1 class and code differ",))),
        (b"550 5.1.1.2 version\r\n", Reply(550, "", ("5.1.1.2 version",))),
        (b"250 bare LF\n", Reply(250, "", ("bare LF",))),
        (b"250 two CRs\r\r\n", Reply(250, "", ("two CRs",))),
        (b"299 unknown but 2yz\r\n", Reply(299, "", ("unknown but 2yz",))),
    ],
)
def test_reads_a_reply(wire: bytes, expected: Reply) -> None:
    assert read(wire) == ([expected], "")
    assert read(wire, list(range(len(wire)))) == ([expected], "")


def test_s_en2_unprintable_octets_become_question_marks() -> None:
    replies, fault = read(b"550 5.1.1 a\0b\x1b[2Jc\rd\te\xffg\xe2\x80\xa8h\r\n")
    assert not fault
    assert replies[0].lines == ("a?b?[2Jc?d e?g???h",)
    assert replies[0].text.isprintable()


@pytest.mark.parametrize(
    "wire",
    [
        b"hello\r\n",
        b"\r\n",
        b"25\r\n",
        b"2500 a\r\n",
        b"x50 a\r\n",
        b"150 a\r\n",
        b"650 a\r\n",
        b"250_a\r\n",
        b" 250 a\r\n",
        "\uff12\uff15\uff10 full-width digits\r\n".encode(),
        b"250-a\r\n550 b\r\n",
        b"250-a\r\n\r\n",
        b"250-x\r\n" * (MAX_LINES + 1),
        b"250 " + b"x" * MAX_LINE,
        b"250 " + b"x" * MAX_LINE + b"\r\n",
        (b"250-" + b"x" * 2000 + b"\r\n") * 40,
    ],
)
def test_s_en2_garbage_is_a_fault(wire: bytes) -> None:
    replies, fault = read(wire)
    assert replies == []
    assert fault
    assert fault.isprintable()


def test_the_longest_line_and_the_longest_reply_are_taken() -> None:
    line = b"250-" + b"x" * 600 + b"\r\n"
    replies, fault = read(line * (MAX_LINES - 1) + b"250 " + b"x" * (MAX_LINE - 6) + b"\r\n")
    assert not fault
    assert len(replies[0].lines) == MAX_LINES


def test_a_fault_costs_none_of_the_replies_in_front_of_it() -> None:
    reader = ReplyReader()
    assert reader.feed(b"250 2.0.0 Ok: queued\r\nHTTP/1.1 400\r\n") == [Reply(250, "2.0.0", ("Ok: queued",))]
    assert not reader.empty
    with pytest.raises(ProtocolFault, match="HTTP"):
        reader.feed(b"")
    with pytest.raises(ProtocolFault, match="HTTP"):
        reader.feed(b"250 later\r\n")


def test_empty_tells_whether_a_reply_is_under_way() -> None:
    reader = ReplyReader()
    assert reader.empty
    reader.feed(b"25")
    assert not reader.empty
    reader.feed(b"0-a\r\n")
    assert not reader.empty
    reader.feed(b"250 b\r\n")
    assert reader.empty


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=8))
def test_any_octets_give_the_same_replies_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    # Invariant: replies, and whether there is a fault, depend on the octets alone, and all text is printable.
    replies, fault = read(data)
    assert read(data, cuts) == (replies, fault)
    assert all(one.text.isprintable() for one in replies)


_TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40).filter(lambda text: text[:1] not in "245")


@given(
    st.lists(st.tuples(st.integers(200, 599), st.booleans(), st.lists(_TEXT, min_size=1, max_size=4)), max_size=4),
    st.lists(st.integers(0, 2000), max_size=10),
)
def test_what_our_server_encodes_is_read_back(drawn: list[tuple[int, bool, list[str]]], cuts: list[int]) -> None:
    # Invariant: reading is the inverse of Reply.encode, whatever the cuts.
    said = []
    for code, has_status, lines in drawn:
        status = f"{code // 100}.1.0" if has_status and code // 100 != 3 else ""
        said.append(reply(code, status, *[line.strip() for line in lines]))
    assert read(b"".join(one.encode() for one in said), cuts) == (said, "")
