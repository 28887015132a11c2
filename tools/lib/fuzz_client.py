"""Fuzz target: the sending half against hostile servers.

An input is a line that says what is sent and how, and what the servers say. The line has words, see `Situation`. In what
the servers say, the octet 0x1E ends what comes in one piece, 0x1D ends a connection, and a piece that is empty is a silence
that lasts too long.
"""

from __future__ import annotations

import base64
import functools
import re
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, cast

import msgspec

from mtad import log
from mtad.config import Delivery
from mtad.delivery.smtp import SESSION_LIMIT, SmtpTransport
from mtad.delivery.transport import Task
from mtad.envelope import Envelope, Recipient
from mtad.log_sinks import Formatter
from mtad.net.connection import ConnectFailed, Connection, ConnectionLost, TimedOut
from mtad.nexthop import Rule
from mtad.outcome import Attempt, Delivered, Failed, Outcome
from mtad.routing import Host
from mtad.smtp.outgoing import normalise
from mtad.tls.connection import TlsConnection, TlsFailed
from tools.lib.fuzz import Target, require

#: Ends a piece of what a server says, and a connection.
PIECE: Final = b"\x1e"
HANGUP: Final = b"\x1d"

_SECRET: Final = "open sesame"
_FORMS: Final = (_SECRET.encode(), base64.b64encode(_SECRET.encode()), base64.b64encode(f"\0alice\0{_SECRET}".encode()))
_BARE: Final = re.compile(rb"\r(?!\n)|(?<!\r)\n")
#: What a client may say, and nothing else. No content begins with one of them.
_COMMAND: Final = re.compile(
    rb"(?:EHLO|HELO) mx\.example\.org|STARTTLS|RSET|DATA|QUIT|\*|AUTH [A-Z0-9-]+(?: [A-Za-z0-9+/=]+)?|[A-Za-z0-9+/=]*"
    rb"|MAIL FROM:<a@example\.org>(?: [!-~]+)*|RCPT TO:<(?:[!-~\x80-\xff]+|\"c d\")@example\.net>(?: [!-~]+)*"
)
_CHUNK: Final = re.compile(rb"BDAT ([0-9]+)( LAST)?")

_CONTENTS: Final[Mapping[bytes, bytes]] = {
    b"plain": b"Subject: x\r\n\r\nhello\r\n",
    b"dots": b"Subject: x\r\n\r\n.\r\n..\r\n.QUIT\r\n.\r\nMAIL FROM:<evil@x>\r\n",
    b"bare": b"Subject: x\n\r\n\n.\r\n\r.\rMAIL FROM:<evil@x>\r\n\n.\nRCPT TO:<a@b>",
    b"commands": b"MAIL FROM:<evil@x>\r\nRCPT TO:<a@b>\r\nDATA\r\n.\r\nQUIT\r\n",
    b"eight": "Subject: é\r\nContent-Type: text/plain\r\n\r\né\r\n".encode(),
    b"long": b"Subject: x\r\n\r\n" + b"x" * 3000 + b"\r\n",
    b"large": b"Subject: x\r\n\r\n" + b"0123456789abcdef\r\n" * 9000,
    b"binary": b"Subject: x\r\nContent-Transfer-Encoding: binary\r\n\r\n\0\r\n.\r\n\n.\n\r\n",
    b"nothing": b"",
}
#: Those that every server can have as they are, but for line ends.
_AS_IT_IS: Final = frozenset({b"plain", b"dots", b"bare", b"commands", b"large"})


class Situation(msgspec.Struct, frozen=True):
    """What the first line of an input says: one of `_CONTENTS`, a level of TLS, and the flags."""

    content: bytes = b"plain"
    tls: str = "opportunistic"
    login: bool = False
    token: bool = False
    utf8: bool = False
    many: bool = False
    """Recipients enough for several groups."""
    broken: bool = False
    """No handshake succeeds."""
    dsn: bool = False


def situation(line: bytes) -> Situation:
    """Read the first line of an input; whatever it is."""
    words = line.split(b",")
    content = next((word for word in words if word in _CONTENTS), b"plain")
    tls = next((word.decode() for word in words if word in {b"none", b"required"}), "opportunistic")
    flags = {flag: flag.encode() in words for flag in ("login", "token", "utf8", "many", "broken", "dsn")}
    return Situation(content, tls, **flags)


@functools.cache
def _credentials(token: bool) -> tuple[str, tempfile.TemporaryDirectory[str]]:
    """The path of a file with a password, and what removes it at the end."""
    place = tempfile.TemporaryDirectory(prefix="mtad-fuzz-")
    path = Path(place.name) / "credentials"
    path.touch(0o600)
    path.write_text(f"mx.example.net : alice : {'token:' if token else ''}{_SECRET}\n")
    return str(path), place


class _Wire:
    """One connection to a hostile server, clear or not; also its own TLS."""

    verified = True
    channel_bindings: Mapping[str, bytes] = {"tls-exporter": b"e" * 32}

    def __init__(self, script: bytes, where: Situation) -> None:
        self.address, self.port, self.tls = "192.0.2.1", 25, ""
        self.sent: list[tuple[bool, bytes]] = []
        self._pieces = iter(script.split(PIECE))
        self._where = where

    def receive(self, timeout: float, limit: int = 65536) -> bytes:
        require(timeout >= 0, "a time-out of less than nothing")
        piece = next(self._pieces, None)
        if piece is None:
            raise ConnectionLost("closed")
        if not piece:
            raise TimedOut("silence")
        return piece[:limit]

    def send(self, data: bytes, timeout: float) -> None:
        require(timeout > 0, "no time to send")
        require(bool(data), "nothing is sent")
        self.sent.append((bool(self.tls), data))

    def close(self) -> None:
        pass

    def handshake(self, connection: Connection, server_name: str, verify: bool, *_: object) -> TlsConnection:
        """See `mtad.delivery.opening.Handshake`."""
        wire = cast(_Wire, connection)
        require(server_name == "mx.example.net", "another name is verified than the one that was routed to")
        require(verify or self._where.tls != "required", "TLS is required, and not verified")
        if self._where.broken:
            raise TlsFailed("no")
        wire.tls = "TLSv1.3"
        return cast(TlsConnection, wire)


class _Net:
    """All servers, and the route to them."""

    def __init__(self, script: bytes, where: Situation) -> None:
        self.wires: list[_Wire] = []
        self._scripts = iter(script.split(HANGUP)[:20])
        self._where = where
        credentials = _credentials(where.token)[0] if where.login or where.token else ""
        self._rule = Rule(None, 25, where.tls, credentials=credentials)  # type: ignore[arg-type]  # one of the three

    def dial(self, _address: str, _port: int, _timeout: float) -> Connection:
        script = next(self._scripts, None)
        if script is None:
            raise ConnectFailed("refused")
        self.wires.append(_Wire(script, self._where))
        return cast(Connection, self.wires[-1])

    def rule(self, _destination: str, _host: str = "") -> Rule:
        return self._rule

    def hops(self, _destination: str) -> Iterator[Host]:
        yield Host("mx.example.net", ("192.0.2.1", "192.0.2.2"), 25)


class _Sink:
    """A log that remembers, and holds lines to what they may be."""

    formatter = Formatter(json=False, dated=False)

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def write(self, _level: int, *lines: bytes) -> None:
        require(all(line.decode("utf-8").isprintable() for line in lines), "a line of the log that does not print")
        self.lines.extend(lines)

    def close(self) -> None:
        pass


class _Stored:
    """A content in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def chunks(self) -> Iterator[bytes]:
        return (self.data[at : at + 4096] for at in range(0, len(self.data), 4096))


def client(data: bytes) -> Iterable[Hashable]:
    # Whatever servers say: nothing is raised; every recipient has an outcome that prints, and the last one for a recipient
    # that was delivered says so; nobody is delivered without a 2yz to the end of the content. What we send are commands of
    # ours, and between them content of which each server reads exactly one message: dots stuffed, no bare CR or LF but in
    # BDAT, as many octets as BDAT says. Where TLS is required nothing but EHLO, STARTTLS and QUIT is said in clear text, a
    # password never is, and no log, outcome or history shows one. What was in doubt was told before it was sent.
    line, _, script = data.partition(b"\n")
    where = situation(line)
    net, sink, doubts = _Net(script, where), _Sink(), list[str]()
    envelope = _envelope(where)
    settings = Delivery(destination_recipients=150)
    transport = SmtpTransport(
        "mx.example.org", settings, net, clock=lambda: 1.0, monotonic=lambda: 1.0, dial=net.dial, tls=_Wire(b"", where)
    )
    before, log._Process.sink = log._Process.sink, sink
    try:
        task = Task(envelope, tuple(range(len(envelope.recipients))), "example.net")
        attempts = transport.deliver(task, _Stored(_CONTENTS[where.content]), doubts.append)
        transport.close()
    finally:
        log._Process.sink = before
    final = _outcomes(attempts, len(envelope.recipients))
    messages = [message for wire in net.wires for message in _messages(wire, where)]
    expected = b"".join(normalise((_CONTENTS[where.content],)))
    require(where.content not in _AS_IT_IS or all(message == expected for message in messages), "another content is sent")
    sessions = {outcome for outcome in final if isinstance(outcome, Delivered)}
    require(not sessions or bool(doubts), "delivered without content")
    # Of nothing the end alone is sent, and so it is when a server wants content for nobody (RFC 2920 section 3.1).
    require(len(doubts) >= len(messages), "content was sent that was not in doubt")
    require(len(doubts) == len(messages) or where.content == b"nothing", "in doubt, and nothing was sent")
    require(len(net.wires) <= 20 and SESSION_LIMIT < 20, "too many sessions")
    told = b"\n".join([*sink.lines, msgspec.json.encode(attempts)])
    require(not any(form in told for form in _FORMS), "a password is shown")
    return {(type(outcome).__name__, outcome.status[:3], re.sub(r"[0-9].*", "", outcome.text)[:50]) for outcome in final}


def _envelope(where: Situation) -> Envelope:
    names = [f"user{number}@example.net" for number in range(220)] if where.many else ["b@example.net", '"c d"@example.net']
    if where.utf8:
        names.append("é@example.net")
    notify = ("success", "failure") if where.dsn else ()
    recipients = tuple(Recipient(name, notify, "rfc822;a+b=c@d" if where.dsn else "") for name in names)  # type: ignore[arg-type]
    body = "binarymime" if where.content == b"binary" else ""
    ret, envid = ("full", "a+b c") if where.dsn else ("", "")
    return Envelope("ID1", 1.0, "a@example.org", recipients, body=body, smtputf8=where.utf8, ret=ret, envid=envid)  # type: ignore[arg-type]


def _outcomes(attempts: Sequence[Attempt], count: int) -> Sequence[Outcome]:
    """The last outcome of each recipient; a recipient that was decided has none after that."""
    final: dict[int, Outcome] = {}
    for attempt in attempts:
        for index, outcome in attempt.outcomes:
            require(
                not isinstance(final.get(index), Delivered | Failed), "a recipient was tried again after it was decided"
            )
            require(outcome.text.isprintable() and outcome.reply.isprintable(), "an outcome that does not print")
            require(re.fullmatch(r"[245]\.\d{1,3}\.\d{1,3}", outcome.status) is not None, "a status that is none")
            kind = {"2": "Delivered", "4": "Deferred", "5": "Failed"}[outcome.status[0]]
            require(type(outcome).__name__ == kind, "outcome and status differ")
            final[index] = outcome
    require(sorted(final) == list(range(count)), "a recipient without outcome")
    return [final[index] for index in range(count)]


def _messages(wire: _Wire, where: Situation) -> Sequence[bytes]:
    """The messages that went over a connection to their end; raises when what was sent could be read in another way."""
    for encrypted, sent in wire.sent:
        if not encrypted:
            require(not any(form in sent for form in _FORMS), "a password in clear text")
            safe = sent.startswith((b"EHLO ", b"HELO ", b"STARTTLS\r\n", b"QUIT\r\n"))
            require(safe or (where.tls != "required" and not (where.login or where.token)), "said in clear text")
    # A piece of commands ends with DATA; then content is what follows up to CRLF.CRLF, if the server let us send it.
    rest = b"".join(sent for _, sent in wire.sent)
    messages: list[bytes] = []
    chunks = b""
    in_content = False
    while rest:
        line, end, behind = rest.partition(b"\r\n")
        chunk = _CHUNK.fullmatch(line)
        if in_content and _COMMAND.fullmatch(line) is None:
            content, dot, rest = (b"\r\n" + rest).partition(b"\r\n.\r\n")
            require(_BARE.search(content) is None, "a bare CR or LF is sent")
            in_content = False
            if dot and content:
                messages.append((content + b"\r\n").replace(b"\r\n.", b"\r\n")[2:])
        elif chunk is not None and end:
            size = int(chunk[1])
            if len(behind) < size:
                return messages  # the server broke off
            chunks, rest = chunks + behind[:size], behind[size:]
            if chunk[2]:
                messages.append(chunks)
                chunks = b""
        else:
            require(bool(end) and _COMMAND.fullmatch(line) is not None, "said what no client says")
            in_content = line == b"DATA"
            chunks = b""
            rest = behind
    return messages


def client_seeds() -> Sequence[bytes]:
    """Servers that work, and some that do not."""
    ehlo = b"250-mx.example.net\r\n250-%b\r\n250 HELP\r\n"
    ok = b"250 2.0.0 Ok\r\n"
    whole = (b"220 mx ESMTP\r\n", ehlo % b"8BITMIME", ok, ok, ok, b"354 go\r\n", ok)
    piped = (b"220 mx\r\n", ehlo % b"PIPELINING\r\n250-SIZE 100000", ok + ok + ok + b"354 go\r\n", ok)
    bdat = (b"220 mx\r\n", ehlo % b"PIPELINING\r\n250-CHUNKING\r\n250-BINARYMIME\r\n250-8BITMIME", ok * 4, ok)
    secure = (b"220 mx\r\n", ehlo % b"STARTTLS", b"220 go\r\n", ehlo % b"AUTH PLAIN LOGIN XOAUTH2\r\n250-DSN")
    talks = [
        (b"plain", whole),
        (b"dots", whole),
        (b"bare", piped),
        (b"commands", bdat),
        (b"commands", piped),
        (b"eight", whole),
        (b"large", piped),
        (b"binary", bdat),
        (b"binary", whole),
        (b"nothing", bdat),
        (b"long", piped),
        (b"plain,many", (piped[0], piped[1], ok * 100, ok * 50 + b"354 go\r\n", ok, ok * 72 + b"354 go\r\n", ok)),
        (
            b"plain,many",
            (piped[0], ehlo % b"PIPELINING\r\n250-LIMITS RCPTMAX=9 MAILMAX=3", *(ok * 10 + b"354 go\r\n", ok) * 3),
        ),
        (b"plain,utf8", (b"220 mx\r\n", ehlo % b"SMTPUTF8\r\n250-8BITMIME", *whole[2:5], ok, *whole[5:])),
        (b"plain,required,dsn", (*secure, *whole[2:])),
        (b"plain,login", (*secure, b"235 2.7.0 Ok\r\n", *whole[2:])),
        (b"plain,token", (*secure, b"334 e30=\r\n", b"535 5.7.8 no\r\n")),
        (
            b"plain,login",
            (
                *secure[:3],
                ehlo % b"AUTH LOGIN",
                b"334 VXNlcm5hbWU6\r\n",
                b"334 UGFzc3dvcmQ6\r\n",
                b"235 ok\r\n",
                *whole[2:],
            ),
        ),
        (b"plain,login", (*secure[:3], ehlo % b"AUTH SCRAM-SHA-256", b"334 cj1hLHM9YWFhYSxpPTQwOTY=\r\n", b"334 dj1h\r\n")),
        (b"plain,broken", (*secure[:3], b"\x1d220 mx\r\n", *whole[1:])),
        (b"plain", (secure[0], secure[1], b"220 go\r\n250-evil\r\n250 AUTH PLAIN\r\n")),
        (b"plain", (b"554 5.7.1 no\r\n", b"\x1d421 4.3.2 busy\r\n")),
        (b"plain", (piped[0], piped[1], b"250 ok\r\n550 5.1.1 no\r\n452 4.2.2 full\r\n354 go\r\n", b"451 4.3.0 later\r\n")),
        (b"plain", (bdat[0], bdat[1], ok * 3 + b"500 what?\r\n", b"\x1d220 mx\r\n", *whole[1:])),
    ]
    return [words + b"\n" + PIECE.join(pieces) for words, pieces in talks]


_LINES: Final = (
    b"250 2.1.0 Ok|250-PIPELINING|250-CHUNKING|250-STARTTLS|250-SMTPUTF8|250-8BITMIME|250-SIZE 1|250-DSN"
    b"|250-LIMITS RCPTMAX=1"
    b"|250-AUTH PLAIN LOGIN SCRAM-SHA-256-PLUS XOAUTH2|220 go|354 go|334 |235 ok|421 bye|450 4.2.0 later"
    b"|550 5.1.1 no|500 what"
    b"|250 HELP|552 5.2.2 too many"
).split(b"|")
_WORDS: Final = (
    *(line + b"\r\n" for line in _LINES),
    *(PIECE, PIECE + PIECE, HANGUP, b"\r\n\x1e", b"250 ok\r\n\x1e", *_CONTENTS),
    *b"required|none|,login,|,token,|,utf8,|,many,|,broken,|,dsn,".split(b"|"),
)

TARGET: Final = Target("client", client, client_seeds, _WORDS, share=3)
