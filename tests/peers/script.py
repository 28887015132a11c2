"""What a scripted mail exchanger says and remembers: the vocabulary of `tests.peers.mx`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

DEFAULT_EXTENSIONS: Final = ("PIPELINING", "SIZE 52428800", "8BITMIME", "ENHANCEDSTATUSCODES")


@dataclass(frozen=True)
class Say:
    """Answer with these lines, each complete with its code; then ``close`` in order, or ``reset`` the connection.

    ``delay`` is in seconds, before the answer.
    """

    lines: str | Sequence[str]
    delay: float = 0.0
    close: bool = False
    reset: bool = False

    def encode(self) -> bytes:
        """The octets of the reply."""
        lines = [self.lines] if isinstance(self.lines, str) else self.lines
        return b"".join(line.encode("utf-8", "surrogateescape") + b"\r\n" for line in lines)


@dataclass(frozen=True)
class Raw:
    """Send these octets as they are, again and again if ``endless``, until the client has had enough."""

    octets: bytes
    endless: bool = False
    pause: float = 0.0
    """Seconds after each octet; 0: all at once."""
    close: bool = False


@dataclass(frozen=True)
class Hang:
    """Say nothing more, and keep the connection open until the client closes it."""


@dataclass(frozen=True)
class Stall:
    """Neither read nor say anything until the exchanger is closed."""


@dataclass(frozen=True)
class Close:
    """Close without a word; ``reset`` with RST instead of FIN."""

    reset: bool = False


Action = Say | Raw | Hang | Stall | Close
Actions = Action | Sequence[Action]

OK: Final = Say("250 2.0.0 Ok")
HANG: Final = Hang()
CLOSE: Final = Close()
STALL: Final = Stall()
RESET: Final = Close(reset=True)


@dataclass(frozen=True)
class Script:
    """What the server does. None: the usual, success."""

    greeting: Actions | None = None
    ehlo: Actions | None = None
    helo: Actions | None = None
    mail: Actions | None = None
    rcpt: Actions | Mapping[str, Actions] | None = None
    data: Actions | None = None
    dot: Actions | None = None
    rset: Actions | None = None
    quit: Actions | None = None
    bdat: Actions | None = None
    """For a chunk that is not the last; that has the reply of ``dot``."""
    starttls: Actions | None = None
    handshake: Actions | None = None
    """Instead of a handshake."""
    auth: Actions | None = None
    """Instead of an exchange."""
    extensions: Sequence[str] = DEFAULT_EXTENSIONS
    tls_extensions: Sequence[str] | None = None
    """Within TLS; None: the same."""
    tls_ehlo: Actions | None = None
    """For EHLO within TLS; None: the same as ``ehlo``."""
    unknown: frozenset[str] = frozenset()
    """Verbs that the server has never heard of, whatever it announces."""
    read_slowly: int | None = None
    """Octets of content that the server reads every 10 ms; None: as fast as they come."""
    read_content: int | None = None
    """Octets of content after which the server stops reading and does what ``dot`` says; None: it reads to the end."""


@dataclass
class Transaction:
    """A mail transaction as the server saw it; it counts as a message once the dot got a 250."""

    connection: int
    """The number of the connection, from 1 on."""
    peer: str
    helo: str
    mail: str
    """The argument of MAIL, as ``FROM:<a@example.org> SIZE=120``."""
    rcpts: list[tuple[str, str]] = field(default_factory=list)
    """Every recipient that was named, with the reply it got."""
    content: bytes = b""
    """Without dot-stuffing and without the final dot."""
    chunks: list[int] = field(default_factory=list)
    """The sizes of the chunks by which the content came; empty for DATA."""
    reply: str = ""
    """What the dot got; "" as long as it did not come."""

    @property
    def sender(self) -> str:
        """The reverse-path without its brackets."""
        return path_of(self.mail)

    @property
    def recipients(self) -> list[str]:
        """Those that were accepted."""
        return [address for address, reply in self.rcpts if reply.startswith("2")]


def text_of(action: Action) -> str:
    if isinstance(action, Say):
        return action.encode().decode("utf-8", "replace").strip()
    return action.octets.decode("utf-8", "replace") if isinstance(action, Raw) else ""


def path_of(argument: str) -> str:
    match = re.search(r"<([^>]*)>", argument)
    return match[1] if match else argument.partition(":")[2].strip()
