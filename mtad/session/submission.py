"""The header of a message that one of our own people hands in: completed and checked before it is kept (RFC 6409).

What it is for: `SubmittedHeader` stands between the content and the spool for as long as the header lasts. It adds Date:
and Message-ID: where they are missing, behind the last field, and looks at From:. There must be at most one, with one
address in it that the login may use, so that nobody can make a mail program show another author than the one who was asked
for a password (VU#517845, CVE-2024-7208).

Invariants: what is written is the content as it came with whole lines added, however it was cut. Fields that are there are
never changed, so that no signature breaks. What is held in memory is bounded by `HEADER_LIMIT`. A From: that two mail
programs could read in two ways is refused, not guessed at: two fields, several addresses, groups, an @ in a name that is
not quoted, text behind the address.

Errors: ``fault`` is the reply with which the message is to be refused; content goes on through all the same.

Standards: RFC 6409 sections 6.1, 8.2 and 8.3; RFC 5322 sections 3.3, 3.4, 3.6.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from mtad.address import Address
from mtad.errors import SyntaxFault
from mtad.reply import Reply, reply
from mtad.smtp.grammar import parse_mailbox

#: Octets of a header that is handed in. Postfix keeps 100 KiB of a header (header_size_limit).
HEADER_LIMIT: Final = 256 * 1024

TOO_LONG: Final = reply(552, "5.3.4", "Error: header of the message is too long")
NOT_YOURS: Final = reply(550, "5.7.1", "Error: From: must be one address of the authenticated user")

# field-name     = 1*ftext; ftext = %d33-57 / %d59-126                     and the white space of obs-optional
_FIELD: Final = re.compile(rb"([!-9;-~]+)[ \t]*:")

# mailbox        = [display-name] "<" addr-spec ">" / addr-spec            and comments; a character begins one branch only
_COMMENT: Final = r"\((?:[^()\\]|\\.)*\)"
_AUTHOR: Final = re.compile(
    rf'(?:"(?:[^"\\]|\\.)*"|{_COMMENT}|[^"<>(),:;@\[\]\\])*<[ \t]*([^<> \t]+)[ \t]*>(?:[ \t]|{_COMMENT})*'
    rf"|(?:[ \t]|{_COMMENT})*([^<>,:; \t()]+)(?:[ \t]|{_COMMENT})*",
    re.DOTALL,
)


class SubmittedHeader:
    """The header of one message on its way in; see the module."""

    __slots__ = ("_added", "_buffer", "_done", "_fields", "_next", "_owns", "_searched", "fault")

    def __init__(self, owns: Callable[[Address], bool], date: str = "", message_id: str = "") -> None:
        """Begin.

        Args:
            owns: whether the client may use an address.
            date: for Date:, when there is none; "" leaves it at that.
            message_id: for Message-ID:, with its angle brackets; the same.
        """
        self._owns = owns
        self._added = {b"date": f"Date: {date}\r\n" if date else "", b"message-id": ""}
        if message_id:
            self._added[b"message-id"] = f"Message-ID: {message_id}\r\n"
        self._buffer = bytearray()
        self._next = 0
        self._searched = 0
        self._fields: list[tuple[bytes, int, int]] = []
        self._done = False
        self.fault: Reply | None = None

    def feed(self, content: bytes) -> bytes:
        """Take the next piece of content, cut anywhere, and return what is to be kept; nothing while the header lasts."""
        if self._done:
            return content
        buffer = self._buffer
        buffer += content
        since = max(self._next, self._searched)  # a long line that comes octet by octet is searched once
        while (end := buffer.find(b"\r\n", since)) >= 0:
            first = buffer[self._next]
            field = None if first in b" \t" else _FIELD.match(buffer, self._next, end)
            if field is not None:
                self._fields.append((field[1].lower(), field.end(), end))
            elif first in b" \t" and end > self._next and self._fields:
                name, start, _ = self._fields[-1]
                self._fields[-1] = (name, start, end)
            else:
                return self._end(blank=end == self._next)
            self._next = since = end + 2
        self._searched = len(buffer) - 1  # the CR may be there already
        if len(buffer) > HEADER_LIMIT:
            self.fault = TOO_LONG
            return self._release()
        return b""

    def finish(self) -> bytes:
        """The end of the content: what is still to be kept of a message that is nothing but a header."""
        if self._done:
            return b""
        self._next = len(self._buffer)
        return self._end(blank=True)

    def _release(self, at: int = 0, added: bytes = b"") -> bytes:
        self._done = True
        rest = bytes(self._buffer[:at]) + added + bytes(self._buffer[at:])
        self._buffer = bytearray()
        return rest

    def _end(self, *, blank: bool) -> bytes:
        """The header ends where ``_next`` is, with a blank line or without."""
        names = [name for name, _, _ in self._fields]
        added = "".join(line for name, line in self._added.items() if name not in names)
        if not self._is_author_theirs():
            self.fault = NOT_YOURS
        # A body that begins without a blank line must not become part of the last field.
        return self._release(self._next, added.encode("utf-8") + (b"" if blank else b"\r\n"))

    def _is_author_theirs(self) -> bool:
        values = [bytes(self._buffer[start:end]) for name, start, end in self._fields if name == b"from"]
        if not values:
            return True
        author = parse_author(values[0]) if len(values) == 1 else None
        return author is not None and self._owns(author)


def parse_author(value: bytes) -> Address | None:
    """The address in a From: field, or None when there is not exactly one that everybody reads alike.

    ``value`` is what stands behind the colon, folded or not.
    """
    try:
        text = value.decode("utf-8").replace("\r\n", "").strip()
    except UnicodeDecodeError:
        return None
    match = _AUTHOR.fullmatch(text)
    if match is None:
        return None
    try:
        return parse_mailbox(match[1] or match[2])
    except SyntaxFault:
        return None
