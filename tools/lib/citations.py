"""Citations of RFCs in the comments and docstrings of a program: "RFC 5321 sections 4.1.1 to 4.1.3 and 4.5; RFC 3848".

A citation begins with "RFC" and a number. Behind it may stand sections, remarks in parentheses, and the numbers of further
RFCs. A number without "RFC" in front counts only when it is one of those that are known, for it may be anything. Sections
may be ranges ("4.1.1 to 4.1.3") and short forms ("4.5.3.1.4 and .6").
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

_BEGIN: Final = re.compile(r"\bRFCs? (\d{3,5})\b")
_REMARK: Final = re.compile(r" ?\([^()]*\)")
_SECTIONS: Final = re.compile(r",? sections? (?=[\d.])")
#: What separates one section, or RFC, from the next.
_JOIN: Final = re.compile(r"(?:,|;)? (?:and |or |to )?|, ")
_RFC: Final = re.compile(r"(?:RFC )?(\d{3,5})(?![\d.]*\d)(?!:)")
_SECTION: Final = re.compile(r"\d{1,2}(?:\.\d{1,2})*(?!\d)|(?:\.\d{1,2})+(?!\d)")
_LEADER: Final = re.compile(r"^\s*#:?\s*")


class Citation(msgspec.Struct, frozen=True):
    """An RFC is named in a file, with these sections of it; ``line`` is where its number stands."""

    rfc: int
    sections: tuple[str, ...]
    path: Path
    line: int


class _Block(msgspec.Struct, frozen=True):
    """Prose: one line of text, and the offset at which each line of the file begins in it."""

    text: str
    lines: tuple[tuple[int, int], ...]

    def line_at(self, offset: int) -> int:
        return max((line for start, line in self.lines if start <= offset), default=0)


def find(path: Path, known: Collection[int]) -> Iterator[Citation]:
    """All citations in a Python file. ``known``: the RFCs that need no "RFC" in front of their number."""
    source = path.read_text(encoding="utf-8")
    for block in _blocks(source):
        end = 0
        for match in _BEGIN.finditer(block.text):
            if match.start() < end:
                continue  # the last one went on to here
            for number, sections, at, end in _read(block.text, match, known):  # noqa: B007  the last end is needed
                yield Citation(number, sections, path, block.line_at(at))


def _read(text: str, begin: re.Match[str], known: Collection[int]) -> Iterator[tuple[int, tuple[str, ...], int, int]]:
    """RFC, sections, where it begins and where it ends, for each RFC of one citation."""
    number, start, at = int(begin[1]), begin.start(), begin.end()
    sections: list[str] = []
    in_sections = False
    while True:
        remark = _REMARK.match(text, at)
        at = remark.end() if remark else at
        word = _SECTIONS.match(text, at)
        if word is not None:
            in_sections = True
            at = _take_section(text, word.end(), sections, word[0])
            continue
        join = _JOIN.match(text, at)
        if join is None:
            break
        rfc = _RFC.match(text, join.end())
        if rfc is not None and (rfc[0].startswith("RFC") or int(rfc[1]) in known) and "to " not in join[0]:
            yield number, tuple(sections), start, at
            number, start, at = int(rfc[1]), rfc.start(), rfc.end()
            sections, in_sections = [], False
            continue
        # without the word "section" only what has a dot is one, as in "RFC 5321, 5.1"
        section = _SECTION.match(text, join.end()) if join[0].strip() or in_sections else None
        if section is None or not (in_sections or ("." in section[0] and join[0].startswith(","))):
            break
        at = _take_section(text, join.end(), sections, join[0])
    yield number, tuple(sections), start, at


def _take_section(text: str, at: int, sections: list[str], join: str) -> int:
    """Note down the section that stands here, and all that a range passes over; where it ends."""
    match = _SECTION.match(text, at)
    if match is None:
        return at
    section = match[0]
    if section.startswith(".") and sections:
        parts = sections[-1].split(".")
        section = ".".join(parts[: len(parts) - section.count(".")]) + section
    if "to " in join and sections:
        sections.extend(between(sections[-1], section))
    sections.append(section)
    return match.end()


def between(first: str, last: str) -> Sequence[str]:
    """The sections between two that differ in their last number only."""
    head, _, low = first.rpartition(".")
    other, _, high = last.rpartition(".")
    if head != other:
        return ()
    return [f"{head}.{number}" if head else str(number) for number in range(int(low) + 1, int(high))]


def _blocks(source: str) -> Iterator[_Block]:
    yield from _comments(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield _block(list(enumerate(node.value.value.split("\n"), node.lineno)))


def _comments(source: str) -> Iterator[_Block]:
    """Comments on lines that follow each other are one."""
    gathered: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if gathered and token.start[0] != gathered[-1][0] + 1:
            yield _block(gathered)
            gathered = []
        gathered.append((token.start[0], _LEADER.sub("", token.string)))
    if gathered:
        yield _block(gathered)


def _block(lines: Sequence[tuple[int, str]]) -> _Block:
    text = ""
    starts: list[tuple[int, int]] = []
    for number, line in lines:
        starts.append((len(text), number))
        text += " ".join(line.split()) + " "
    return _Block(text, tuple(starts))
