"""The values of parameters, and the argument of BDAT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.errors import SyntaxFault
from mtad.smtp.parameters import (
    Chunk,
    decode_xtext,
    encode_xtext,
    parse_auth,
    parse_body,
    parse_chunk,
    parse_envid,
    parse_notify,
    parse_orcpt,
    parse_ret,
    parse_size,
)


@pytest.mark.parametrize(
    ("parse", "value", "meaning"),
    [
        (parse_size, "0", 0),
        (parse_size, "99999999999999999999", 99999999999999999999),
        (parse_body, "7bit", ""),
        (parse_body, "8BITMIME", "8bitmime"),
        (parse_body, "BinaryMime", "binarymime"),
        (parse_ret, "FULL", "full"),
        (parse_ret, "hdrs", "hdrs"),
        (parse_envid, "QQ314159", "QQ314159"),
        (parse_envid, "a+20b+2Bc+3D", "a b+c="),
        (parse_envid, "x" * 100, "x" * 100),
        (parse_notify, "NEVER", ("never",)),
        (parse_notify, "success", ("success",)),
        (parse_notify, "SUCCESS,FAILURE,DELAY", ("success", "failure", "delay")),
        (parse_notify, "DELAY,DELAY", ("delay",)),
        (parse_orcpt, "rfc822;Bob@Example.ORG", "rfc822;Bob@Example.ORG"),
        (parse_orcpt, "RFC822;a+2Bb@c", "rfc822;a+b@c"),
        (parse_orcpt, "rfc822;+22a+20b+22@c", 'rfc822;"a b"@c'),
        (parse_orcpt, "utf-8;ü@b", r"utf-8;\x{FC}@b"),
        (parse_orcpt, r"UTF-8;\x{FC}@b", r"utf-8;\x{FC}@b"),
        (parse_orcpt, "utf-8;\U0001f600@b", r"utf-8;\x{1F600}@b"),
        (parse_orcpt, "rfc822;m+C3+BCller+2Ba@b", r"utf-8;m\x{FC}ller+a@b"),
        (parse_orcpt, r"rfc822;+C3+BC\x{0A}@b", r"utf-8;\x{FC}\x{5C}x{0A}@b"),
        (parse_orcpt, "utf-8;+C3+BC@b", r"utf-8;\x{FC}@b"),
        (parse_orcpt, "x400;/S=a+2F", None),
        (parse_orcpt, "x400;/S+3Da", "x400;/S=a"),
        (parse_auth, "<>", ""),
        (parse_auth, "a+2Bb@c", "a+b@c"),
        (parse_chunk, "0", Chunk(0, False)),
        (parse_chunk, "0 LAST", Chunk(0, True)),
        (parse_chunk, "0010  last", Chunk(10, True)),
        (parse_chunk, "18446744073709551616", Chunk(1 << 64, False)),
    ],
)
def test_meaning(parse: Callable[[str], Any], value: str, meaning: Any) -> None:
    if meaning is None:
        with pytest.raises(SyntaxFault):
            parse(value)
    else:
        assert parse(value) == meaning


@pytest.mark.parametrize(
    ("parse", "value"),
    [
        *((parse_size, value) for value in ("", "-1", "+1", "1e9", "0x1", "1" * 21, "1 ", "\u0661", "1.0")),
        *((parse_body, value) for value in ("", "X", "8BIT", "7BIT,8BITMIME", "8b\u0131tmime")),
        *((parse_ret, value) for value in ("", "ALL", "FULL,HDRS", "HDR\u017f")),
        *(
            (parse_envid, value)
            for value in ("", "a+00b", "a+0Ab", "+0D+0A", "a+7F", "a+80", "+2", "+2b", "+GG", "a=b", "ü")
        ),
        (parse_envid, "x" * 101),
        *(
            (parse_notify, value)
            for value in ("", "NEVER,SUCCESS", "SUCCESS,NEVER", "ALWAYS", "SUCCESS,", ",", "SUCCESS;DELAY")
        ),
        *(
            (parse_orcpt, value)
            for value in ("", ";", "rfc822", "rfc822;", ";a@b", "rfc822;a+0Ab", "rfc822;a+0D+0AX:y", "a b;c")
        ),
        *((parse_orcpt, value) for value in ("rfc822;ü@b", "rfc822;a=b", "rfc822;+00", "rfc822;a+1B[2J", "rf\u0441;a@b")),
        *(
            (parse_orcpt, value)
            for value in (r"utf-8;\x{0A}@b", r"utf-8;\x{2028}@b", r"utf-8;\x{110000}@b", r"utf-8;a\x{85}")
        ),
        *((parse_orcpt, value) for value in ("rfc822;+C3@b", "rfc822;+C2+85@b", "rfc822;+E2+80+A8", "x400;+C3+BC")),
        *((parse_orcpt, value) for value in (r"utf-8;+C3+BC\x{0A}@b", "rfc822;+C0+8A@b")),
        (parse_orcpt, "rfc822;" + "x" * 494),
        *((parse_auth, value) for value in ("a+0A", "a+0D+0Ab", "ü", "<a@b>=")),
        *((parse_chunk, value) for value in ("", "LAST", "-1", "1 LASTLAST", "1 LAST LAST", "1\tLAST", "\u0661", " 1")),
    ],
)
def test_what_is_refused_s_pa9_s_en1(parse: Callable[[str], Any], value: str) -> None:
    with pytest.raises(SyntaxFault, match=r"expected|character"):
        parse(value)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_xtext_there_and_back(text: str) -> None:
    """Invariant: printable text survives, and the form on the wire has no space, ``+`` or ``=`` of its own."""
    wire = encode_xtext(text)
    assert " " not in wire
    assert "=" not in wire
    assert decode_xtext(wire) == text


@given(st.text())
def test_nothing_that_does_not_print_comes_out_s_en1(text: str) -> None:
    """Invariant: whatever goes in, what is decoded is printable US-ASCII, or a SyntaxFault."""
    for parse in (decode_xtext, parse_orcpt, parse_envid, parse_auth):
        try:
            meaning = parse(text)
        except SyntaxFault:
            continue
        assert meaning.isascii()
        assert meaning.isprintable()


def test_xtext_of_more_than_ascii_is_the_callers_fault() -> None:
    with pytest.raises(ValueError, match="ascii"):
        encode_xtext("ü")
