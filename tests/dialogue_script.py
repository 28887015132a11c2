"""Dialogues as data: the language of ``tests/dialogues/*.txt``, and the player.

A file is played on anything that is a `Target`: the bare protocol engine, or a running daemon behind a socket. Each line is

    # a comment, or an empty line
    service relay            which kind of listener is spoken to (default: mx); before everything else
    tls starttls             what TLS it does (default: none)
    logins                   alice and bob may log in, with the password "open sesame"
    segments                 what is sent in one line must arrive in one piece: it is about what was sent ahead
    -> EHLO client.example   a line that the client sends; CRLF is added
    => MAIL FROM:<a@b>\\n     octets that the client sends, as they are
    <- 250 2.1.0             the next line from the server starts so
    <~ 250 .* queued as \\S+  the next line from the server matches so, from its start to its end
    <* 250                   all lines of one reply, each with this code
    <!                       the server has closed the connection
    ** tls                   shake hands: what follows is inside TLS
    == stored 1 sender=a@b rcpt=c@d,e@f has=REGEX ends=TEXT
                             so many messages were taken in this dialogue; of the last: its envelope, an expression found in
                             its content, and how that ends
    20x -> RCPT TO:<u{n}@a>  the same so many times, {n} counting from 1; also with =>, <- and <~

In what is sent and after ``ends=``, ``\\r \\n \\t \\0 \\xNN \\\\`` mean what they mean in C. Words of a ``==`` line are
quoted as in a shell. What stands in ``special/`` needs TLS, logins or segments. The site is mx.example.org with the domain
example.org and its users root, alice and bob.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

DIALOGUES = Path(__file__).parent / "dialogues"

_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPES = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"0": b"\0", b"\\": b"\\"}
_REPEATED = re.compile(r"([0-9]+)x (.*)")
_STEP = re.compile(r"(->|=>|<-|<~|<\*|<!|==|\*\*)(?: (.*))?")
_SITE = re.compile(r"service (mx|relay|submission)|tls (none|starttls|implicit)|(logins|segments)")


Service = Literal["mx", "relay", "submission"]
Tls = Literal["none", "starttls", "implicit"]


class Stored(msgspec.Struct, frozen=True):
    """One message that was taken: the envelope's addresses and the content as it is kept."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes


class Target(Protocol):
    """What a dialogue is played on: one connection, just opened."""

    def send(self, data: bytes) -> None:
        """Send octets to the server."""

    def line(self) -> bytes:
        """The next line from the server, without CRLF; EOFError when it has closed the connection."""

    def closed(self) -> bool:
        """Whether the server has closed the connection, with no line left unread."""

    def stored(self, count: int) -> Sequence[Stored]:
        """The messages taken on this connection so far; a daemon is given time to show ``count`` of them."""


@runtime_checkable
class Securable(Protocol):
    """A target that can do TLS."""

    def secure(self) -> None:
        """Shake hands."""


class Step(msgspec.Struct, frozen=True):
    """One line of a dialogue: where it stands, its mark, what follows, and the octets when it sends some."""

    number: int
    mark: str
    text: str
    octets: bytes = b""


class Script(msgspec.Struct, frozen=True):
    """A dialogue file."""

    name: str
    service: Service
    steps: tuple[Step, ...]
    tls: Tls = "none"
    logins: bool = False
    segments: bool = False

    @property
    def octets(self) -> bytes:
        """All that the client sends, in one piece."""
        return b"".join(step.octets for step in self.steps)


class DialogueFailure(AssertionError):
    """The server did something else than the dialogue says; the text has file and line."""


def unescape(text: str) -> bytes:
    """Octets from the form in which dialogues write them; characters above 127 are sent as UTF-8."""

    def value(match: re.Match[bytes]) -> bytes:
        return bytes([int(match[1], 16)]) if match[1] else _ESCAPES[match[2]]

    return _ESCAPE.sub(value, text.encode())


def parse(name: str, text: str) -> Script:
    """Read a dialogue. A line that is none raises ValueError with its place."""
    site: dict[str, Any] = {"service": "mx"}
    steps: list[Step] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        directive = _SITE.fullmatch(line)
        if directive is not None and not steps:
            key, _, value = line.partition(" ")
            site[key] = value or True
            continue
        repeated = _REPEATED.fullmatch(line)
        times = int(repeated[1]) if repeated else 0
        match = _STEP.fullmatch(repeated[2] if repeated else line)
        if match is None:
            raise ValueError(f"{name}:{number}: not a line of a dialogue: {line}")
        mark, rest = match[1], match[2] or ""
        for n in range(1, max(times, 1) + 1):
            filled = rest.replace("{n}", str(n)) if times else rest
            octets = unescape(filled) if mark in {"->", "=>"} else b""
            steps.append(Step(number, mark, filled, octets + b"\r\n" if mark == "->" else octets))
    return Script(name, steps=tuple(steps), **site)


def load(path: Path) -> Script:
    """Read a dialogue file."""
    return parse(path.name, path.read_text(encoding="utf-8"))


def play(script: Script, target: Target) -> None:
    """Play a dialogue to its end; raises `DialogueFailure` where the server departs from it."""
    for step in script.steps:
        try:
            _play_step(step, target)
        except DialogueFailure as failure:
            raise DialogueFailure(f"{script.name}:{step.number}: {step.mark} {step.text}\n{failure}") from None


def _play_step(step: Step, target: Target) -> None:
    match step.mark:
        case "->" | "=>":
            target.send(step.octets)
        case "<-" | "<~":
            line = _line(target)
            expected = re.escape(step.text) + ".*" if step.mark == "<-" else step.text
            if re.fullmatch(expected, line) is None:
                raise DialogueFailure(f"the server said: {line}")
        case "<*":
            while not (line := _line(target)).startswith(f"{step.text} "):
                if not line.startswith(f"{step.text}-"):
                    raise DialogueFailure(f"the server said: {line}")
        case "**":
            assert isinstance(target, Securable)
            target.secure()
        case "<!":
            if not target.closed():
                raise DialogueFailure("the connection is still open")
        case _:
            _check_stored(step.text, target)


def _line(target: Target) -> str:
    try:
        return target.line().decode("utf-8", "backslashreplace")
    except EOFError:
        raise DialogueFailure("the server had closed the connection, or said nothing") from None


def _check_stored(text: str, target: Target) -> None:
    word, count, *fields = shlex.split(text)
    if word != "stored":
        raise ValueError(f"not a check: {text}")
    messages = target.stored(int(count))
    if len(messages) != int(count):
        raise DialogueFailure(f"{len(messages)} messages are stored: {messages}")
    for field in fields:
        name, _, value = field.partition("=")
        if not _agrees(messages[-1], name, value):
            raise DialogueFailure(f"{name} does not agree: {messages[-1]}")


def _agrees(message: Stored, name: str, value: str) -> bool:
    match name:
        case "sender":
            return message.sender == value
        case "rcpt":
            return sorted(message.recipients) == sorted(value.split(","))
        case "has":
            return re.search(value.encode(), message.content, re.DOTALL) is not None
        case "ends":
            return message.content.endswith(unescape(value))
    raise ValueError(f"no such check: {name}")
