"""SMTP replies as values (RFC 5321 section 4.2, enhanced status codes RFC 2034 and RFC 3463).

The same type serves both roles: what our server says and what a remote server said. A reply that we build is checked when
it is made, so that an ill-formed one cannot reach the wire; what a remote server said is cleaned by the parser before.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

import msgspec

#: RFC 5321 section 4.5.3.1.5: a reply line is at most 512 octets, code and CRLF included.
MAX_LINE: Final = 512

_ENHANCED: Final = re.compile(r"([245])\.(\d{1,3})\.(\d{1,3})")


class Reply(msgspec.Struct, frozen=True):
    """A reply of one or more lines.

    ``code`` is 200 to 599; ``enhanced`` like "5.1.1", or "" where the standard wants none (greeting, EHLO, 3yz);
    ``lines`` hold printable text without line ends, without code and enhanced status.
    """

    code: int
    enhanced: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole reply on one line, as logs and reports show it: ``550 5.1.1 No such user here``."""
        head = f"{self.code} {self.enhanced} " if self.enhanced else f"{self.code} "
        return (head + " ".join(self.lines)).rstrip()

    @property
    def positive(self) -> bool:
        """2yz and 3yz: the command did what it was for."""
        return self.code < 400

    @property
    def temporary(self) -> bool:
        """4yz: the same may work later."""
        return 400 <= self.code < 500

    @property
    def permanent(self) -> bool:
        """5yz: it will not work."""
        return self.code >= 500

    def encode(self) -> bytes:
        """The reply as it goes over the wire, each line with code and enhanced status, CRLF at the end of each."""
        return _encode(self)


@lru_cache(maxsize=512)
def _encode(answer: Reply) -> bytes:
    """Remembered, since nearly all that a server says it has said before."""
    head = f"{answer.enhanced} " if answer.enhanced else ""
    last = len(answer.lines) - 1
    wire = [
        _cut(f"{answer.code}{' ' if number == last else '-'}{head}{line}".encode("utf-8", "replace"))
        for number, line in enumerate(answer.lines)
    ]
    return b"\r\n".join(wire) + b"\r\n"


def _cut(line: bytes) -> bytes:
    """A line without its CRLF at the length that a client must be able to take, no character cut in two."""
    if len(line) <= MAX_LINE - 2:
        return line
    return line[: MAX_LINE - 2].decode("utf-8", "ignore").encode()


def reply(code: int, enhanced: str, *lines: str) -> Reply:
    """Build a reply of our own.

    Raises:
        ValueError: the caller's fault: code out of range, classes of code and status differ, no line, a control character.
    """
    if not 200 <= code <= 599 or not lines:
        raise ValueError(f"not a reply: code {code}, {len(lines)} lines")
    if enhanced:
        match = _ENHANCED.fullmatch(enhanced)
        if match is None or match[1] != str(code)[0]:
            raise ValueError(f"enhanced status {enhanced!r} does not go with code {code}")
    if any(not line.isprintable() for line in lines):
        raise ValueError(f"control character in reply {code}")
    return Reply(code, enhanced, lines)
