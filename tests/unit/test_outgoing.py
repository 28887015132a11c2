"""Content on its way out: what a survey finds, and that line ends become one kind."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.smtp.outgoing import LINE_LIMIT, Survey, normalise, survey

TOKENS = st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n", b".", b"\xff", b"\0", b"x" * 500]), max_size=16)
CUTS = st.lists(st.integers(0, 60), max_size=5)


def cut(content: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(place, len(content)) for place in places), len(content)]
    return [content[begin:end] for begin, end in pairwise(edges)]


@given(TOKENS, CUTS)
def test_a_survey_does_not_depend_on_the_cuts_and_is_right(tokens: list[bytes], places: list[int]) -> None:
    # Invariant: what is found by looking at each piece as it comes is what is found by looking at the whole.
    content = b"".join(tokens)
    found = survey(cut(content, places))
    lines = content.split(b"\r\n")
    header = b"" if content.startswith(b"\r\n") else content.split(b"\r\n\r\n")[0]
    assert found.size == len(content)
    assert content.startswith(found.start)
    assert found.eight_bit is not content.isascii()
    assert found.eight_bit_header is not header.isascii()
    assert found.nul is (b"\0" in content)
    assert found.clean is (not re.search(rb"[\r\n]", b"".join(lines)) and lines[-1] == b"")


@given(TOKENS, CUTS)
def test_normalised_content_is_clean_and_has_the_same_lines(tokens: list[bytes], places: list[int]) -> None:
    # Invariant: CR, LF and CRLF each end a line, whatever the cuts.
    content = b"".join(tokens)
    found = b"".join(normalise(cut(content, places)))
    assert survey([found]).clean
    lines = re.split(rb"\r\n|\r|\n", content)
    assert found.split(b"\r\n") == (lines if lines[-1] == b"" else [*lines, b""])


@pytest.mark.parametrize("length", [LINE_LIMIT - 1, LINE_LIMIT, LINE_LIMIT + 1, 5000])
@pytest.mark.parametrize("form", [b"%b\r\nb\r\n", b"b\r\n%b\r\n", b"b\r\n%b"])
def test_long_lines_are_seen_wherever_the_cut_is(length: int, form: bytes) -> None:
    content = form % (b"a" * length)
    for place in range(0, len(content), 7):
        assert survey([content[:place], content[place:]]).long_lines is (length > LINE_LIMIT)


def test_nothing_at_all() -> None:
    assert survey([]) == survey([b""]) == Survey(0)
    assert list(normalise([])) == []


def test_what_is_clean_passes_as_it_is() -> None:
    chunks = [b"a\r\nb", b"c\r\n", b"d\r\n"]
    assert list(normalise(chunks)) == chunks
