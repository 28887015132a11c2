"""Content on its way out: what it needs of the next hop, and line ends that nobody can read in two ways.

`survey` looks at a content once and says what a transaction has to know of it. `normalise` makes every line end CRLF, for
a content that has others: our own spool holds none but in a BINARYMIME body, and whatever else put one there, the next host
must not be given a choice of line ends (SMTP smuggling, attacks C-SM1 ff). Dots are stuffed later, see `mtad.smtp.wire`.

Invariants: results never depend on how the octets were cut into chunks, and memory not on how many there are. What
`normalise` yields has no bare CR or LF and ends with CRLF, or is empty.

Standards: RFC 5321 sections 2.3.8 (lines) and 4.5.3.1.6 (1000 octets with CRLF), RFC 5322 section 2.1.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

#: Octets of a line without its CRLF (RFC 5321 section 4.5.3.1.6).
LINE_LIMIT: Final = 998

#: Octets of the start that a survey keeps: enough for the first line of a header.
_START: Final = 1024

_ANY_LINE_END: Final = re.compile(rb"\r\n|\r|\n")


class Survey(msgspec.Struct, frozen=True):
    """What there is to know of a content."""

    size: int
    """Octets."""
    start: bytes = b""
    """The first of them, at least the first line when that is not longer than `LINE_LIMIT`."""
    eight_bit: bool = False
    """Octets above 127."""
    eight_bit_header: bool = False
    """Such octets before the first empty line."""
    clean: bool = True
    """Every line ends with CRLF, the last one, too; no CR or LF is anywhere else."""
    long_lines: bool = False
    """A line of more than `LINE_LIMIT` octets."""
    nul: bool = False
    """NUL, which is no octet of a text (RFC 2045 section 2.8): some servers drop it, and what stood around it joins."""


def survey(chunks: Iterable[bytes]) -> Survey:
    """Look at a content."""
    size = 0
    start = b""
    eight_bit = eight_bit_header = bare = long_lines = nul = False
    in_header = True
    seam = b"\r\n"  # of the header so far, enough to see its end
    tail = b"\r\n"  # of what came before: its last line, or the last octets of that when it is long already
    for chunk in chunks:
        size += len(chunk)
        if len(start) < _START:
            start += chunk[: _START - len(start)]
        if in_header:
            joint = seam + chunk
            seam = joint[-3:]
            end = joint.find(b"\r\n\r\n")
            if not joint.isascii():
                eight_bit_header = eight_bit_header or not joint[: end if end >= 0 else None].isascii()
            in_header = end < 0
        eight_bit = eight_bit or not chunk.isascii()
        nul = nul or b"\0" in chunk
        piece = tail + chunk
        lines = piece.split(b"\n")
        if not long_lines:
            long_lines = max(map(len, lines)) > LINE_LIMIT and any(
                len(line) - line.endswith(b"\r") > LINE_LIMIT for line in lines
            )
        # a CR at the very end may yet become a CRLF
        bare = bare or _has_bare(piece, len(lines) - 1, piece.endswith(b"\r"))
        # a line that is too long already need not be remembered whole; the last two octets decide about its end
        tail = lines[-1] if len(lines[-1]) <= LINE_LIMIT + 1 else lines[-1][-(LINE_LIMIT + 1) :]
        tail = tail or piece[-2:]
    bare = bare or not tail.endswith(b"\r\n")
    return Survey(size, start, eight_bit, eight_bit_header, not bare, long_lines, nul)


def _has_bare(piece: bytes, newlines: int, pending: int = 0) -> bool:
    """Whether there is a CR or LF that is not of a CRLF; ``pending`` CRs are not counted."""
    pairs = piece.count(b"\r\n")
    return pairs != newlines or piece.count(b"\r") - pending != pairs


def normalise(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same content with CRLF for every CR, LF and CRLF, and one at its end."""
    carriage_return = b""
    last = b"\n"
    for chunk in chunks:
        piece = carriage_return + chunk
        carriage_return = b"\r" if piece.endswith(b"\r") else b""
        if carriage_return:
            piece = piece[:-1]
        if not piece:
            continue
        if _has_bare(piece, piece.count(b"\n")):
            piece = _ANY_LINE_END.sub(b"\r\n", piece)
        yield piece
        last = piece[-1:]
    if carriage_return or last != b"\n":
        yield b"\r\n"
