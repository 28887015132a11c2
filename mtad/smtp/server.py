"""The server's side of SMTP as a machine without I/O: octets in, events out.

What it is for: it keeps order between the framings of a connection: command lines, content up to its dot (DATA), chunks of
known length (BDAT), and the responses of an AUTH exchange. It knows no command and no policy; whoever drives it decides
what a command means and says what follows.

How to use it: `ServerProtocol.receive` takes what the network gave, `next_event` is called until it returns None, and each
event is answered before the next one is asked for, because its answer decides how the following octets are framed:
`start_content` after a 354, `start_chunk` for a BDAT, `expect_response` after a 334.

Invariants: the events do not depend on how the octets were cut. After `start_content` come `ContentReceived` events in any
number and one `ContentEnded`; after `start_chunk` the same and one `ChunkEnded`; after `expect_response` one
`ResponseReceived` or `ResponseRefused`. Everything after that is commands again. Octets that a client sends ahead of a
reply wait here unread; `ahead` tells that there are some.

Errors: none are raised for anything that a client can send. A line that is no command is `LineRefused`.

Standards: RFC 5321 sections 2.3.8, 3.3, 4.1.1.4; RFC 2920 section 3.2; RFC 3030 section 2; RFC 4954 section 4.
"""

from __future__ import annotations

from typing import Final

import msgspec

from mtad.errors import SyntaxFault
from mtad.smtp.grammar import Command, parse_command
from mtad.smtp.wire import LINE_LIMIT, DataDecoder, LineBuffer, LineFault

#: Octets of a response without its CRLF; RFC 4954 section 4 counts 12288 with it.
RESPONSE_LIMIT: Final = 12286


class CommandReceived(msgspec.Struct, frozen=True):
    """A well-formed command line."""

    command: Command


class LineRefused(msgspec.Struct, frozen=True):
    """A command line that cannot be understood at all; to be answered with one 500 5.5.2."""

    why: str


class ContentReceived(msgspec.Struct, frozen=True):
    """A piece of content, cut anywhere, with the dot-stuffing removed; never empty."""

    content: bytes


class ContentEnded(msgspec.Struct, frozen=True):
    """The end of the content. ``bare`` tells that a CR or LF stood alone in it: the message must be refused (550 5.5.2)."""

    bare: bool


class ChunkEnded(msgspec.Struct, frozen=True):
    """All octets of a chunk were received; ``last`` as `ServerProtocol.start_chunk` was told."""

    last: bool


class ResponseReceived(msgspec.Struct, frozen=True):
    """A line of an AUTH exchange, as it came."""

    line: bytes


class ResponseRefused(msgspec.Struct, frozen=True):
    """A line of an AUTH exchange that is none."""

    fault: LineFault


Event = CommandReceived | LineRefused | ContentReceived | ContentEnded | ChunkEnded | ResponseReceived | ResponseRefused


class ServerProtocol:
    """One connection's octets, in the order in which they were received."""

    __slots__ = ("_decoder", "_last", "_lines", "_owed", "_response")

    def __init__(self) -> None:
        self._lines = LineBuffer()
        self._decoder: DataDecoder | None = None
        self._owed: int | None = None
        self._last = False
        self._response = False

    @property
    def in_content(self) -> bool:
        """Whether the next octets are content."""
        return self._decoder is not None or self._owed is not None

    @property
    def ahead(self) -> bool:
        """Whether the client has sent more than it was answered."""
        return self._lines.waiting

    def receive(self, data: bytes) -> None:
        """Append what the network gave."""
        self._lines.feed(data)

    def start_content(self) -> None:
        """What follows is content, up to CRLF.CRLF (the reply to DATA was 354)."""
        self._decoder = DataDecoder()

    def start_chunk(self, octets: int, last: bool) -> None:
        """What follows are so many octets of content, whatever they look like (BDAT, RFC 3030 section 2)."""
        self._owed = octets
        self._last = last

    def expect_response(self) -> None:
        """The next line is a response and no command (the reply to AUTH was 334)."""
        self._response = True
        self._lines.limit = RESPONSE_LIMIT

    def next_event(self) -> Event | None:
        """The next event, or None when more octets are needed."""
        if self._decoder is not None:
            return self._next_content(self._decoder)
        if self._owed is not None:
            return self._next_of_chunk(self._owed)
        line = self._lines.next_line()
        if line is None:
            return None
        if self._response:
            self._response = False
            self._lines.limit = LINE_LIMIT
            return ResponseRefused(line) if isinstance(line, LineFault) else ResponseReceived(line)
        if isinstance(line, LineFault):
            return LineRefused(line.value)
        try:
            return CommandReceived(parse_command(line))
        except SyntaxFault as fault:
            return LineRefused(str(fault))

    def _next_content(self, decoder: DataDecoder) -> Event | None:
        if not decoder.ended:
            data = self._lines.take()
            if not data:
                return None
            content = decoder.feed(data)
            if decoder.ended:
                self._lines.feed(decoder.rest)
            if content:
                return ContentReceived(content)
            if not decoder.ended:
                return None
        self._decoder = None
        return ContentEnded(decoder.bare)

    def _next_of_chunk(self, owed: int) -> Event | None:
        if not owed:
            self._owed = None
            return ChunkEnded(self._last)
        data = self._lines.take(owed)
        if not data:
            return None
        self._owed = owed - len(data)
        return ContentReceived(data)
