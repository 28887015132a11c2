"""The server's side of SMTP as a machine without I/O: octets in, events out.

What it is for: it keeps order between the two framings of a connection, command lines and content. It knows no command and
no policy; whoever drives it decides what a command means and says when content follows.

How to use it: `ServerProtocol.receive` takes what the network gave, `next_event` is called until it returns None, and each
`CommandReceived` is answered before the next event is asked for, because its answer decides how the following octets are
framed: `start_content` after a 354.

Invariants: the events do not depend on how the octets were cut. After `start_content` come `ContentReceived` events in any
number and one `ContentEnded`; everything after that is commands again. Octets that a client sends ahead of a reply wait
here unread.

Errors: none are raised for anything that a client can send. A line that is no command is `LineRefused`.

Standards: RFC 5321 sections 2.3.8, 3.3, 4.1.1.4; RFC 2920 section 3.2.
"""

from __future__ import annotations

import msgspec

from mtad.errors import SyntaxFault
from mtad.smtp.grammar import Command, parse_command
from mtad.smtp.wire import DataDecoder, LineBuffer, LineFault


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


Event = CommandReceived | LineRefused | ContentReceived | ContentEnded


class ServerProtocol:
    """One connection's octets, in the order in which they were received."""

    __slots__ = ("_decoder", "_lines")

    def __init__(self) -> None:
        self._lines = LineBuffer()
        self._decoder: DataDecoder | None = None

    @property
    def in_content(self) -> bool:
        """Whether the next octets are content."""
        return self._decoder is not None

    def receive(self, data: bytes) -> None:
        """Append what the network gave."""
        self._lines.feed(data)

    def start_content(self) -> None:
        """What follows is content, up to CRLF.CRLF (the reply to DATA was 354)."""
        self._decoder = DataDecoder()

    def next_event(self) -> Event | None:
        """The next event, or None when more octets are needed."""
        if self._decoder is not None:
            return self._next_content(self._decoder)
        line = self._lines.next_line()
        if line is None:
            return None
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
