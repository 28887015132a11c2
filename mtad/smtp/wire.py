"""Octets to lines, lines to content: the framing of SMTP in both directions.

What it is for: `LineBuffer` cuts command lines, `DataDecoder` finds the end of a message and takes the dot-stuffing out,
`dot_stuff` puts it in, `LineEnds` looks after line ends where no such framing does (BDAT), `HeaderScanner` looks at a
header as it streams by. They know nothing of commands or replies.

Invariants: the result never depends on how the octets were cut into chunks. Only CRLF ends a line and only CRLF.CRLF (or
``.CRLF`` as the first line) ends a message; there is no second opinion anywhere, since two opinions are what SMTP smuggling
lives on (CVE-2023-51764 and its kin). What is held back between calls is bounded: a command line's limit in `LineBuffer`,
4 octets in `DataDecoder`, one in `dot_stuff` and in `LineEnds`, about a kilobyte in `HeaderScanner`.

Errors: a command line that is too long or holds a bare CR or LF is a value, `LineFault`; a bare CR or LF in content is
`DataDecoder.bare`, and the reader goes on to the true end. Nothing here raises. NUL and other control characters are
content like any other; nothing is cut off at them.

Standards: RFC 5321 sections 2.3.8 (lines), 4.1.1.4 (DATA), 4.5.2 (transparency), 4.5.3.1.4 and .6 (lengths).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Final

#: Octets of a command line without its CRLF. RFC 5321 section 4.5.3.1.4 asks for 512 and extensions add to it; this is
#: Postfix's line_length_limit.
LINE_LIMIT: Final = 2048

#: Octets of a Message-ID field that are waited for; RFC 5322 section 2.1.1 allows 998 to a line.
MESSAGE_ID_LIMIT: Final = 1024

_END: Final = b"\r\n.\r\n"
# A CR at the end of the buffer may yet become a CRLF and is not bare before its successor is known.
_BARE: Final = re.compile(rb"\r(?=[^\n])|(?<!\r)\n")
_ANY_LINE_END: Final = re.compile(rb"\r\n|\r|\n")


class LineFault(Enum):
    """Why a command line is refused as a whole."""

    TOO_LONG = "line too long"
    BARE_NEWLINE = "lines must end with CRLF"


class LineBuffer:
    """Command lines out of a stream of octets.

    A line at fault is reported once, as soon as the fault is seen, and skipped up to its CRLF.
    """

    __slots__ = ("_buffer", "_position", "_skipping", "limit")

    def __init__(self) -> None:
        self.limit = LINE_LIMIT
        """Octets of a line without its CRLF; may be set between two lines."""
        self._buffer = b""
        self._position = 0
        self._skipping = False

    def feed(self, data: bytes) -> None:
        """Append what was received."""
        self._buffer = self._buffer[self._position :] + data
        self._position = 0

    def next_line(self) -> bytes | LineFault | None:
        """The next line without its CRLF, or what is wrong with it, or None when more octets are needed."""
        if self._skipping and not self._skip():
            return None
        buffer, start = self._buffer, self._position
        end = buffer.find(b"\n", start)
        if end > start and buffer[end - 1] == 13:
            line = buffer[start : end - 1]
            if len(line) <= self.limit and b"\r" not in line:
                self._position = end + 1
                return line
        elif end < 0 and len(buffer) - start <= self.limit and buffer.find(b"\r", start) < 0:
            return None
        return self._look_closer()

    def _look_closer(self) -> LineFault | None:
        """Judge a line that is not plainly good; the order of the tests is the order in which octets would arrive."""
        rest = self._buffer[self._position :]
        bare = _BARE.search(rest)
        crlf = rest.find(b"\r\n")
        length = crlf if crlf >= 0 else len(rest) - rest.endswith(b"\r")
        if bare is not None and bare.start() <= self.limit and not 0 <= crlf < bare.start():
            self._position += bare.end()
            self._skipping = True
            return LineFault.BARE_NEWLINE
        if length > self.limit:
            self._position += self.limit
            self._skipping = True
            return LineFault.TOO_LONG
        return None

    def _skip(self) -> bool:
        """Drop octets up to and including the CRLF; False when it has not come yet."""
        end = self._buffer.find(b"\r\n", self._position)
        if end < 0:
            self._buffer = b"\r" if self._buffer.endswith(b"\r", self._position) else b""
            self._position = 0
            return False
        self._position = end + 2
        self._skipping = False
        return True

    @property
    def waiting(self) -> bool:
        """Whether anything was received that was not yet returned as a line."""
        return self._position < len(self._buffer)

    def take(self, most: int | None = None) -> bytes:
        """What was received and not yet returned as a line: all of it, or ``most`` octets of it at most."""
        if most is not None and most < len(self._buffer) - self._position:
            taken = self._buffer[self._position : self._position + most]
            self._position += most
            return taken
        rest = self._buffer[self._position :]
        self._buffer = b""
        self._position = 0
        return rest


class DataDecoder:
    """The content after DATA: finds its end and removes the dots that the client put in (RFC 5321 section 4.5.2)."""

    __slots__ = ("_held", "_started", "bare", "ended", "rest")

    def __init__(self) -> None:
        # An imagined CRLF before the first octet makes the first line like all others; `_unstuff` takes it off again.
        self._held = b"\r\n"
        self._started = False
        self.bare = False
        """Whether a CR or LF on its own was seen: such a message must be refused, after its end."""
        self.ended = False
        self.rest = b""
        """After the end: the octets that follow it, which are commands."""

    def feed(self, chunk: bytes) -> bytes:
        """Decode what was received, and return the content in it; ``ended`` says whether that was the last of it.

        Not to be called again after the end.
        """
        data = self._held + chunk
        end = data.find(_END)
        if end >= 0:
            self.ended = True
            self.rest = data[end + 5 :]
            self._held = b""
            return self._unstuff(data[: end + 2])
        held = _overlap(data)
        if held:
            self._held = data[-held:]
            return self._unstuff(data[:-held])
        self._held = b""
        return self._unstuff(data)

    def _unstuff(self, body: bytes) -> bytes:
        if not body:
            return b""
        if not self.bare:
            lines = body.count(b"\r\n")
            self.bare = body.count(b"\n") != lines or body.count(b"\r") != lines
        body = body.replace(b"\r\n.", b"\r\n")
        if not self._started:
            self._started = True
            return body[2:]
        return body


class LineEnds:
    """Line ends of content that has no framing to look after them: watched, and mended when that is wanted.

    After `finish` the content ends with CRLF, unless it is empty: that is what the rest of the house counts on.
    """

    __slots__ = ("_at_line_start", "_held", "_mend", "bare")

    def __init__(self, *, mend: bool) -> None:
        """``mend``: a CR or LF on its own becomes CRLF; else it stays."""
        self._mend = mend
        self._held = b""
        self._at_line_start = True
        self.bare = False
        """Whether a CR or LF on its own was seen."""

    def feed(self, content: bytes) -> bytes:
        """Take the next piece, cut anywhere, and return what goes on; one octet may be held back."""
        piece = self._held + content
        self._held = b"\r" if piece.endswith(b"\r") else b""
        if self._held:
            piece = piece[:-1]
        if not piece:
            return b""
        lines = piece.count(b"\r\n")
        if piece.count(b"\n") != lines or piece.count(b"\r") != lines:
            self.bare = True
            if self._mend:
                piece = _ANY_LINE_END.sub(b"\r\n", piece)
        self._at_line_start = piece.endswith(b"\r\n")
        return piece

    def finish(self) -> bytes:
        """The end of the content: what is still to be added."""
        if self._held:
            self.bare = True
        elif self._at_line_start:
            return b""
        return b"\r\n"


def _overlap(data: bytes) -> int:
    """How many octets at the end of ``data`` could be the start of the end of data."""
    for size in (4, 3, 2, 1):
        if data.endswith(_END[:size]):
            return size
    return 0


def dot_stuff(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Content as it goes over the wire after DATA: leading dots doubled, closed by CRLF.CRLF.

    ``chunks`` may be cut anywhere. A CRLF that is missing at the end is added. A bare CR or LF becomes CRLF: our own spool
    holds none, and whatever else put it there, the next host must not be given a choice of line ends.
    """
    at_line_start = True
    carriage_return = b""
    for chunk in chunks:
        piece = carriage_return + chunk
        carriage_return = b"\r" if piece.endswith(b"\r") else b""
        if carriage_return:
            piece = piece[:-1]
        if not piece:
            continue
        lines = piece.count(b"\r\n")
        if piece.count(b"\n") != lines or piece.count(b"\r") != lines:
            piece = _ANY_LINE_END.sub(b"\r\n", piece)
        stuffed = piece.replace(b"\r\n.", b"\r\n..")
        yield b"." + stuffed if at_line_start and piece.startswith(b".") else stuffed
        at_line_start = piece.endswith(b"\r\n")
    yield b".\r\n" if at_line_start and not carriage_return else _END


# The letters are spelt out in both cases, and no flag is set, so that the search jumps from CRLF to CRLF.
_RECEIVED: Final = re.compile(rb"\r\n[Rr][Ee][Cc][Ee][Ii][Vv][Ee][Dd]:")
_MESSAGE_ID_NAME: Final = re.compile(rb"\r\n[Mm][Ee][Ss][Ss][Aa][Gg][Ee]-[Ii][Dd]:")
# unfolded when the value stands on a line of its own, as some programs write it
_MESSAGE_ID: Final = re.compile(_MESSAGE_ID_NAME.pattern + rb"(?:[ \t]*\r\n(?=[ \t]))?[ \t]*([^\r\n \t][^\r\n]*)\r\n")

_LONGEST_NAME: Final = len(b"\r\nMessage-ID:")


class HeaderScanner:
    """What the receiving side needs to know of a header while it streams by: its Received: fields and its Message-ID."""

    __slots__ = ("_counted", "_held", "_wants_id", "done", "message_id", "received")

    def __init__(self) -> None:
        self._held = b"\r\n"
        self._counted = 0
        self._wants_id = True
        self.received = 0
        """Received: fields so far (RFC 5321 section 6.3 counts them to find loops)."""
        self.message_id = b""
        """The value of the first Message-ID: field; empty when there is none, or none of bearable length."""
        self.done = False
        """Whether the end of the header was seen; feeding more is allowed and does nothing."""

    def feed(self, content: bytes) -> None:
        """Look at the next piece of content, cut anywhere, dots taken out."""
        if self.done:
            return
        data = self._held + content
        end = data.find(b"\r\n\r\n")
        self.done = end >= 0
        stop = end + 2 if self.done else len(data)
        self.received += len(_RECEIVED.findall(data, self._counted, stop))
        hold = max(0, stop - _LONGEST_NAME + 1)
        self._counted = max(self._counted, stop - len(b"\r\nReceived:") + 1)
        if self._wants_id:
            hold = self._find_message_id(data, stop, hold)
        self._held = b"" if self.done else data[hold:]
        self._counted -= hold

    def _find_message_id(self, data: bytes, stop: int, hold: int) -> int:
        """Look for the field in ``data``; returns from where on the data must be seen again."""
        name = _MESSAGE_ID_NAME.search(data, 0, stop)
        if name is None:
            return hold
        match = _MESSAGE_ID.match(data, name.start(), stop)
        if match is not None:
            # One that is too long is none, whether it came in one piece or in many.
            if match.end() - name.start() <= MESSAGE_ID_LIMIT:
                self.message_id = match[1].rstrip(b" \t")
        elif stop - name.start() <= MESSAGE_ID_LIMIT and not self.done:
            return min(hold, name.start())
        self._wants_id = False
        return hold
