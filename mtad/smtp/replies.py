"""Replies of a remote server: bytes in, `mtad.reply.Reply` values out (RFC 5321 section 4.2), sans-I/O.

For the sending half. What a server says is the text of a stranger that ends in logs, queue files and reports, so
everything that is not printable US-ASCII becomes ``?`` here (a TAB becomes a space), and nothing that is fed can cost
more than a fixed amount of memory.

Leniencies, and why:

- A line may end in a bare LF. RFC 5321 section 2.3.8 wants CRLF, but a reply has no body that could be smuggled into the
  next
  one: we never act on a reply that we did not ask for (see `mtad.delivery.connections`), so nothing is gained by refusing.
- A line may have `MAX_LINE` octets, four times what section 4.5.3.1.5 allows: servers do write long policy texts and URLs.
- A code may stand alone on its line (section 4.2: "a client MUST be prepared to handle this").

Errors: what cannot be a reply is a `ProtocolFault`. The stream cannot be trusted after it; the connection is to be closed,
and the recipients concerned are deferred, for garbage is no refusal.

Standards: RFC 5321 sections 4.2, 4.2.1, 4.5.3.1.5; RFC 2034 section 4 (enhanced status on each line); RFC 3463 section 2.
"""

from __future__ import annotations

import re
from typing import Final

from mtad.errors import MtadError
from mtad.reply import Reply

#: Octets in one line, CRLF included. Postfix takes the same (line_length_limit).
MAX_LINE: Final = 2048

#: Lines in one reply. The longest honest ones answer EHLO and HELP, with some 20.
MAX_LINES: Final = 100

#: Octets in one reply.
MAX_REPLY: Final = 64 * 1024

# RFC 5321 section 4.2: Reply-line = *( Reply-code "-" [ textstring ] CRLF ) Reply-code [ SP textstring ] CRLF
#                       Reply-code = %x32-35 %x30-35 %x30-39
# The second digit may be 6 to 9 here as well: the first one decides (section 4.2.1), and such codes are seen.
# RFC 2034 section 4:   textstring = status-code SP text, with status-code = ("2"/"4"/"5") "." 1*3digit "." 1*3digit
_LINE: Final = re.compile(rb"([2-5])([0-9][0-9])(?:([ -])(?:([245]\.[0-9]{1,3}\.[0-9]{1,3})(?: +|$))?(.*))?", re.DOTALL)

_PRINTABLE: Final = bytes(octet if 32 <= octet < 127 else 0x20 if octet == 9 else 0x3F for octet in range(256))


class ProtocolFault(MtadError):
    """The server does not speak SMTP: its bytes are no reply. Always temporary (4.5.0), and the end of the connection."""


class ReplyReader:
    """Collects the bytes of one connection and cuts them into replies. Not thread-safe."""

    __slots__ = ("_code", "_enhanced", "_fault", "_lines", "_octets", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._fault: ProtocolFault | None = None
        self._begin()

    def _begin(self) -> None:
        self._code = b""
        self._enhanced = b""
        self._lines: list[str] = []
        self._octets = 0

    @property
    def empty(self) -> bool:
        """True when every octet that was fed belonged to a complete reply."""
        return not (self._rest or self._lines or self._fault)

    def feed(self, data: bytes) -> list[Reply]:
        """Take what was received, in pieces of any size; return the replies that are complete with it, oldest first.

        Replies in front of a fault are returned first, for one of them may be the ``250`` that settles a message; the next
        call then raises, whatever it is fed (``b""`` asks).

        Raises:
            ProtocolFault: the bytes are no reply, or too many.
        """
        if self._fault is not None:
            raise self._fault
        lines = (self._rest + data).split(b"\n") if self._rest else data.split(b"\n")
        self._rest = lines.pop()
        replies: list[Reply] = []
        try:
            for line in lines:
                self._take(line, replies)
            if len(self._rest) >= MAX_LINE:
                raise ProtocolFault(f"reply line of more than {MAX_LINE} octets")
        except ProtocolFault as fault:
            self._fault = fault
            self._rest = b""
            if not replies:
                raise
        return replies

    def _take(self, line: bytes, replies: list[Reply]) -> None:
        if len(line) >= MAX_LINE:
            raise ProtocolFault(f"reply line of more than {MAX_LINE} octets")
        line = line.rstrip(b"\r")
        match = _LINE.fullmatch(line)
        if match is None:
            raise ProtocolFault(f"not a reply: {_clean(line[:64])!r}")
        digit, digits, mark, enhanced, text = match.groups()
        code = digit + digits
        if self._code and code != self._code:
            raise ProtocolFault(f"reply code changes from {_clean(self._code)} to {_clean(code)} within a reply")
        self._code = code
        self._octets += len(line) + 1
        if enhanced:
            if not self._enhanced and enhanced[:1] == digit:
                self._enhanced = enhanced
            elif enhanced != self._enhanced:  # a second status, or one of another class, is nothing but text
                text = enhanced + b" " + text if text else enhanced
        self._lines.append(_clean(text or b""))
        if len(self._lines) > MAX_LINES or self._octets > MAX_REPLY:
            raise ProtocolFault(f"reply of more than {MAX_LINES} lines or {MAX_REPLY} octets")
        if mark != b"-":
            replies.append(Reply(int(code), self._enhanced.decode("ascii"), tuple(self._lines)))
            self._begin()


def _clean(text: bytes) -> str:
    return text.translate(_PRINTABLE).decode("ascii")
