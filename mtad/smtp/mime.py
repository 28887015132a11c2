"""The structure of a MIME message, read as a stream: which octets are header, which are body, and of which part.

`parse` yields `Event` values whose ``data``, put together, are the content that went in: whoever passes on what he does not
want to change passes it on octet for octet. Not a judge of messages: what is not well-formed is read in the way in which it
makes the least difference.

- A container is a ``multipart/*`` with a boundary, or a ``message/rfc822``, whose own Content-Transfer-Encoding is none of
  quoted-printable and base64 (RFC 2045 section 6.4 forbids those). All else is a leaf, and its octets are not looked into.
- A boundary is a line that is ``--``, the boundary, perhaps ``--``, and white space. The innermost container that has it is
  meant; those within it end there (RFC 2046 section 5.1.2). The CRLF before it belongs to it, not to the part.
- A line that is no field ends a header; so does a boundary.

Invariants: memory is bounded: pieces have at most some 128 KiB, containers nest `DEPTH_LIMIT` deep, and of a field
`FIELD_LIMIT` octets are kept. Time is linear.

Errors: `TooDeep`. Standards: RFC 2045, RFC 2046, RFC 5322 section 2.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Final

import msgspec

from mtad.errors import MtadError

#: Containers within containers (Postfix: mime_nesting_limit).
DEPTH_LIMIT: Final = 100

#: Octets of a Content-Type or Content-Transfer-Encoding field that are looked at.
FIELD_LIMIT: Final = 8192

#: Octets of a line that are waited for; a longer one comes in several pieces.
FRAGMENT: Final = 64 * 1024

_FIELD: Final = re.compile(rb"([!-9;-~]+)[ \t]*:")
_TYPE: Final = re.compile(rb"\s*([!-~]+?)\s*/\s*([^\s;\"()<>@,:/\[\]?=]+)")
_BOUNDARY: Final = re.compile(rb";\s*boundary\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s;\"]+))", re.IGNORECASE | re.DOTALL)
_COMMENT: Final = re.compile(rb"\([^()]*\)")
_ENCODED: Final = frozenset({b"quoted-printable", b"base64"})


class TooDeep(MtadError):
    """Containers nest deeper than `DEPTH_LIMIT`."""


class What(Enum):
    """What the octets of an event are."""

    FIELD = "field"  # a line of a header, or a piece of a long one
    ENCODING = "encoding"  # a line of the field Content-Transfer-Encoding
    BLANK = "blank"  # the empty line after a header, or nothing, if the header ended without
    BODY = "body"  # a line of a leaf, or a piece of one; without the CRLF that belongs to a boundary
    FRAME = "frame"  # a container's own: boundaries, and what stands before the first and after the last
    END = "end"  # the last octet of the content has been


class Part(msgspec.Struct, eq=False):
    """A part. Complete when the `What.BLANK` of its header comes."""

    number: int
    parent: Part | None
    type: bytes = b""
    """``text/plain`` in lower case; b"" when the header does not say."""
    encoding: bytes = b""
    """The Content-Transfer-Encoding in lower case; b"" when the header does not say."""
    versioned: bool = False
    """The header has a MIME-Version."""
    container: bool = False
    boundary: bytes = b""


class Event(msgspec.Struct, frozen=True):
    """Some octets of a part."""

    what: What
    part: Part
    data: bytes = b""


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their CRLF; one longer than `FRAGMENT` in pieces, of which the last has the CRLF."""
    rest = b""
    for chunk in chunks:
        parts = (rest + chunk).split(b"\r\n")
        rest = parts.pop()
        for part in parts:
            yield part + b"\r\n"
        if len(rest) >= FRAGMENT:
            keep = 1 if rest.endswith(b"\r") else 0
            yield rest[: len(rest) - keep]
            rest = rest[len(rest) - keep :]
    if rest:
        yield rest


class _Header:
    """The fields of one header that matter, as they come by."""

    def __init__(self) -> None:
        self.name = b""
        self._values: dict[bytes, bytearray] = {}

    def take(self, line: bytes, at_start: bool) -> bool:
        """Look at a line or a piece of one; False when it is no part of a header."""
        if at_start and line[:1] not in {b" ", b"\t"}:
            match = _FIELD.match(line)
            if match is None:
                return False
            self.name = match[1].lower()
            line = line[match.end() :]
            fresh = self.name not in self._values
            if self.name in {b"content-type", b"content-transfer-encoding", b"mime-version"} and fresh:
                self._values[self.name] = bytearray()
        value = self._values.get(self.name)
        if value is not None and len(value) < FIELD_LIMIT:
            # NUL goes out as a blank, and is read as what it will be.
            value += line[: FIELD_LIMIT - len(value)].replace(b"\0", b" ")
        return True

    def describe(self, part: Part) -> None:
        """Fill in what the header says about the part."""
        kind = bytes(self._values.get(b"content-type", b""))
        match = _TYPE.match(kind)
        if match:
            part.type = (match[1] + b"/" + match[2]).lower()
        elif part.parent is not None and part.parent.type == b"multipart/digest":
            part.type = b"message/rfc822"  # RFC 2046 section 5.1.5
        part.encoding = _COMMENT.sub(b"", bytes(self._values.get(b"content-transfer-encoding", b""))).strip().lower()
        part.versioned = b"mime-version" in self._values
        if part.encoding in _ENCODED:
            return
        if part.type.startswith(b"multipart/"):
            found = _BOUNDARY.search(kind)
            if found:
                part.boundary = re.sub(rb"\\(.)", rb"\1", found[1]) if found[1] is not None else found[2]
                part.boundary = part.boundary.rstrip()
            part.container = bool(part.boundary)
        else:
            part.container = part.type == b"message/rfc822"


class _Parser:
    def __init__(self) -> None:
        self._count = 0
        self._open: list[Part] = []
        """The containers we are in, outermost first; those whose last boundary has been are not among them."""
        self._header: _Header | None = None
        self._held = b""
        self._part = self._begin(None)

    def _begin(self, parent: Part | None) -> Part:
        self._header = _Header()
        part = Part(self._count, parent)
        self._count += 1
        return part

    def run(self, chunks: Iterable[bytes]) -> Iterator[Event]:
        at_start = True
        for piece in lines(chunks):
            container = self._bounded(piece) if at_start and piece[:2] == b"--" else None
            if container is not None:
                yield from self._boundary(container, piece)
            elif self._header is not None:
                yield from self._in_header(self._header, piece, at_start)
            else:
                yield from self._in_body(piece)
            at_start = piece.endswith(b"\r\n")
        if self._header is not None:
            yield self._end_header(self._header, b"")
        if self._held:
            yield Event(What.BODY, self._part, self._held)
        yield Event(What.END, self._part)

    def _bounded(self, piece: bytes) -> Part | None:
        text = piece[2:].rstrip()
        for part in reversed(self._open):
            if part.boundary and text.startswith(part.boundary) and text[len(part.boundary) :] in {b"", b"--"}:
                return part
        return None

    def _boundary(self, container: Part, piece: bytes) -> Iterator[Event]:
        while self._header is not None:  # a message/rfc822 without a header begins another one
            yield self._end_header(self._header, b"")
        frame = piece
        if self._held:
            end = b"\r\n" if self._held.endswith(b"\r\n") else b""
            if len(self._held) > len(end):
                yield Event(What.BODY, self._part, self._held[: len(self._held) - len(end)])
            self._held, frame = b"", end + piece
        del self._open[self._open.index(container) + 1 :]
        yield Event(What.FRAME, container, frame)
        if piece[2:].rstrip() == container.boundary:
            self._part = self._begin(container)
        else:
            self._open.pop()
            self._part = container

    def _in_header(self, header: _Header, piece: bytes, at_start: bool) -> Iterator[Event]:
        if at_start and piece == b"\r\n":
            yield self._end_header(header, piece)
        elif header.take(piece, at_start):
            encoding = header.name == b"content-transfer-encoding"
            yield Event(What.ENCODING if encoding else What.FIELD, self._part, piece)
        else:
            yield self._end_header(header, b"")
            # The header has just told the boundary, and this line may be the first one.
            container = self._bounded(piece) if at_start and piece[:2] == b"--" else None
            if container is not None:
                yield from self._boundary(container, piece)
            elif self._header is not None:
                yield from self._in_header(self._header, piece, at_start)
            else:
                yield from self._in_body(piece)

    def _in_body(self, piece: bytes) -> Iterator[Event]:
        if self._part.container:
            yield Event(What.FRAME, self._part, piece)
            return
        if self._held:
            yield Event(What.BODY, self._part, self._held)
        self._held = piece

    def _end_header(self, header: _Header, data: bytes) -> Event:
        part = self._part
        header.describe(part)
        self._header = None
        event = Event(What.BLANK, part, data)
        if part.container:
            self._open.append(part)
            if len(self._open) > DEPTH_LIMIT:
                raise TooDeep(f"message parts nest deeper than {DEPTH_LIMIT}")
            if not part.boundary:
                self._part = self._begin(part)
        return event


def parse(chunks: Iterable[bytes]) -> Iterator[Event]:
    """Read a content, cut anywhere.

    Raises:
        TooDeep: containers nest too deep.
    """
    return _Parser().run(chunks)
