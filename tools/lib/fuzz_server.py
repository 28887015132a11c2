"""Fuzz target: the server's engine and the dialogue on top of it, with everything around it in memory.

An input is a line that says what the site is, and what the client sends. The line has words in any order, see `Situation`;
others mean nothing. In what the client sends, the octet 0x1E stands for "wait for the reply": what is between two of them
comes in one piece, and when the server has said that it is ready for TLS the next piece comes inside it.
"""

from __future__ import annotations

import errno
import re
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import pairwise
from random import Random
from typing import Final

import msgspec

from mtad.config import Limits, Size
from mtad.envelope import Envelope
from mtad.policy import Policy
from mtad.reply import Reply
from mtad.session.dialogue import Dialogue
from mtad.session.state import Client, Session, Site
from mtad.smtp.grammar import parse_mailbox
from mtad.smtp.sasl import Entry, Keys, derive
from mtad.spool.queue_file import encode_envelope, encode_preamble, parse_head
from tests.dialogue_engine import HOSTNAME, PASSWORD, TLS, USERS, MemoryEntry, MemorySpool, MemoryUsers
from tests.dialogue_script import DIALOGUES, Script, load
from tools.lib.fuzz import Target, require

#: Stands for a client that waits.
PAUSE: Final = b"\x1e"

DOMAIN: Final = "example.org"
_SMALL: Final = Limits(message_size=Size(2000), recipients=5, bad_commands=50, bad_commands_in_a_row=40)
_LARGE: Final = Limits(bad_commands=1000, bad_commands_in_a_row=1000, junk_commands=1000)

# Reply-line of RFC 5321 section 4.2, with the enhanced status of RFC 2034
_REPLY: Final = re.compile(r"([2-5][0-9][0-9])([ -])(?:([245])\.[0-9]{1,3}\.[0-9]{1,3} )?[^\x00-\x1f\x7f]*")
_QUEUED: Final = re.compile(rb"^250 2\.0\.0 Ok: queued as (ID[0-9]{4,})\r$", re.MULTILINE)
_CHALLENGE: Final = re.compile(rb"^334 [A-Za-z0-9+/=]*\r$", re.MULTILINE)
_BARE: Final = re.compile(rb"\r(?!\n)|(?<!\r)\n")
# A line that is surely AUTH with something in it that nobody may see
_SECRET: Final = re.compile(rb"(?:\A|\r\n\x1e?)AUTH +[A-Z0-9-]{1,20} +([A-Za-z0-9+/=]{12,2000})\r\n", re.IGNORECASE)


class Situation(msgspec.Struct, frozen=True):
    """What the first line of an input says."""

    service: str = "mx"
    tls: str = "none"
    logins: bool = False
    clear: bool = False
    """AUTH without TLS."""
    mend: bool = False
    """Bare line ends of known clients are mended."""
    small: bool = False
    """Limits that are soon reached."""
    loose: bool = False
    """Whoever sends ahead is borne with, so that it does not matter how octets are cut."""
    early: bool = False
    """The client speaks before the greeting."""
    fault: str = ""
    """What the disk does not do."""


_CHOICES: Final = {
    "service": (b"mx", b"relay", b"submission"),
    "tls": (b"none", b"starttls", b"implicit"),
    "fault": (b"enter", b"write 1", b"write 2", b"commit", b"discard"),
}


def situation(line: bytes) -> Situation:
    """Read the first line of an input; whatever it is."""
    words = line.split(b",")
    chosen = {name: next((w.decode() for w in words if w in values), "") for name, values in _CHOICES.items()}
    flags = {flag: flag.encode() in words for flag in ("logins", "clear", "mend", "small", "loose", "early")}
    return Situation(chosen["service"] or "mx", chosen["tls"] or "none", fault=chosen["fault"], **flags)


class _Logins:
    """alice and bob, once and for all; keys as cheap as can be."""

    def __init__(self) -> None:
        self._keys = {name: derive(PASSWORD, b"salt of " + name.encode().ljust(8), 1) for name in ("alice", "bob")}
        self._nobody = Keys(b"salt of nobody..", 1, b"?" * 32, b"?" * 32)

    def find(self, login: str) -> Entry:
        keys = self._keys.get(login)
        return Entry(login, keys or self._nobody, keys is not None)

    def any(self) -> bool:
        return True


_LOGINS: Final = _Logins()


class _Watcher:
    """An observer that holds what it is told to its promises."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def _hear(self, *texts: str) -> None:
        require(all(text.isprintable() for text in texts), "the log is told something that does not print")
        self.told.extend(texts)

    def refused(self, _session: Session, command: str, answer: Reply) -> None:
        self._hear("refused", command, answer.text)

    def rejected(self, _session: Session, recipient: str, answer: Reply) -> None:
        self._hear("rejected", recipient, answer.text)

    def accepted(self, _session: Session, envelope: Envelope, size: int, message_id: str) -> None:
        self._hear("accepted", envelope.id, str(size), message_id)

    def discarded(self, _session: Session, envelope: Envelope, size: int, answer: Reply) -> None:
        self._hear("discarded", envelope.id, str(size), answer.text)

    def lost(self, session: Session, where: str, why: str) -> None:
        self._hear("lost", where, why, session.helo, session.claimed)


class _Talk:
    """One dialogue, and what is true of it after each piece."""

    def __init__(self, where: Situation) -> None:
        trusted = ("127.0.0.0/8",) if where.service == "relay" else ()
        policy = Policy(MemoryUsers(), (DOMAIN,), where.service, trusted)  # type: ignore[arg-type]  # one of _CHOICES
        site = Site(
            HOSTNAME,
            _SMALL if where.small else _LARGE,
            policy,
            tls=where.tls,  # type: ignore[arg-type]  # one of _CHOICES
            logins=_LOGINS if where.logins else None,
            auth_without_tls=where.clear,
            bare_line_ends="normalize" if where.mend else "refuse",
            strict_order=not where.loose,
        )
        self.spool = MemorySpool()
        if where.fault:
            self.spool.faults[where.fault] = OSError(errno.ENOSPC if where.small else errno.EIO, "no")
        self.watcher = _Watcher()
        self.dialogue = Dialogue(site, Client("127.0.0.1", "localhost"), self.spool, self.watcher)
        if where.tls == "implicit":
            self.dialogue.secured(TLS)
        self.said = [self.dialogue.spoke_early() if where.early else self.dialogue.greeting()]

    def hear(self, pieces: Iterable[bytes]) -> None:
        """What the client sends in one go, cut into pieces; TLS begins before it when it is due."""
        dialogue = self.dialogue
        if dialogue.wants_tls:
            dialogue.secured(TLS)
        for piece in pieces:
            if dialogue.closing or dialogue.wants_tls:
                return
            self.said.append(dialogue.receive(piece))
            if not (dialogue.closing or dialogue.wants_tls):
                lines = dialogue._protocol._lines
                require(len(lines._buffer) - lines._position <= lines.limit + 1, "more than a line is kept in memory")
                require(dialogue.pause >= 0, "a pause of less than nothing")

    @property
    def transcript(self) -> bytes:
        """All that the server said; what is random in it is left out."""
        return _CHALLENGE.sub(b"334 ?\r", b"".join(self.said))

    @property
    def stored(self) -> Sequence[tuple[bytes, bytes]]:
        return [(encode_envelope(entry.envelope), entry.content) for entry in self.spool.committed]


def _cuts(piece: bytes, rng: Random) -> Iterator[bytes]:
    """A piece in several: often of one octet, sometimes long ones."""
    at = 0
    while at < len(piece):
        size = rng.choice((1, 1, 2, 3, 5, 50, 1000))
        yield piece[at : at + size]
        at += size


def check(data: bytes) -> Iterable[Hashable]:
    # Whatever a client sends: nothing is raised; replies are well-formed, and the log prints and shows no secret; each
    # "250 queued" is a message committed and the other way round, with an envelope that can be written and read, recipients
    # that are ours unless the client is, and content with a Received: field and without a bare CR or LF; there are never
    # more messages than CRLF.CRLF and BDAT LAST in what was sent; no entry stays open; memory is bounded; and, where
    # sending ahead is borne with, none of this depends on how the octets were cut.
    line, _, rest = data.partition(b"\n")
    where = situation(line)
    segments = rest.split(PAUSE)
    talk = _Talk(where)
    for segment in segments:
        talk.hear((segment,))
    talk.dialogue.lost()
    talk.dialogue.lost()
    require(not talk.spool.open_entries, "an entry was neither committed nor discarded")
    transcript = b"".join(talk.said)
    heads = list(_replies(transcript))
    queued = [match.decode() for match in _QUEUED.findall(transcript)]
    require(queued == [entry.envelope.id for entry in talk.spool.committed], "250 does not mean committed")
    sent = rest.replace(PAUSE, b"")
    most = sent.count(b"\r\n.\r\n") + sent.upper().count(b"LAST")
    require(len(queued) <= most, "more messages than were sent")
    for entry in talk.spool.committed:
        _judge(entry, where)
    # Where chunks are, a line that looks like AUTH may have lost its first octets to one.
    for secret in _SECRET.findall(rest) if b"BDAT" not in sent.upper() else ():
        if rest.count(secret) == 1:
            require(not any(secret.decode() in text for text in talk.watcher.told), "the log is told a secret")
    if where.loose and not where.fault:
        _compare(talk, _cut(where, segments, Random(zlib.crc32(data))))
    return {(where.service, where.tls, one, other) for one, other in pairwise(heads)}


def _cut(where: Situation, segments: Sequence[bytes], rng: Random) -> _Talk:
    talk = _Talk(where)
    for segment in segments:
        talk.hear(_cuts(segment, rng))
    talk.dialogue.lost()
    return talk


def _compare(talk: _Talk, other: _Talk) -> None:
    if b" pipelined after STARTTLS" in talk.transcript:
        return  # what came together with STARTTLS is something else when it comes later
    require(talk.transcript == other.transcript, "what is said depends on how octets were cut")
    require(talk.stored == other.stored, "what is stored depends on how octets were cut")


def _replies(transcript: bytes) -> Iterator[str]:
    """Code and status of each reply; raises when one is not well-formed."""
    lines = transcript.split(b"\r\n")
    require(lines.pop() == b"", "a reply without CRLF at its end")
    code = ""
    for line in lines:
        require(len(line) <= 510, "a line of a reply is too long")
        match = _REPLY.fullmatch(line.decode("utf-8"))
        require(match is not None, "a line of a reply is not well-formed")
        assert match is not None
        require(code in {"", match[1]}, "the code changes within a reply")
        require(match[3] in {None, match[1][0]}, "status and code differ")
        require(match[3] is not None or match[1] < "400", "a refusal without enhanced status")
        code = match[1] if match[2] == "-" else ""
        if not code:
            yield line[:9].decode("ascii", "replace")
    require(not code, "a reply without its last line")


def _judge(entry: MemoryEntry, where: Situation) -> None:
    """A message that was taken."""
    envelope, content = entry.envelope, entry.content
    encoded = encode_envelope(envelope)
    head = parse_head(encode_preamble(encoded, len(content), 0) + encoded + b"\n")
    require(head.envelope == envelope, "the envelope is another one after it was written and read")
    require(bool(envelope.recipients), "a message for nobody")
    known = where.service == "relay" or bool(envelope.login)
    require(known or where.service == "mx", "submission without a login")
    require(envelope.login in {"", "alice", "bob"}, "somebody else has logged in")
    for mailbox in (envelope.sender, *(recipient.address for recipient in envelope.recipients)):
        if mailbox:
            address = parse_mailbox(mailbox)
            require(str(address) == mailbox, "an address has two forms")
        require(mailbox.isprintable(), "an address that does not print")
    for recipient in envelope.recipients:
        address = parse_mailbox(recipient.address)
        ours = address.domain == DOMAIN and (address.key in USERS or address.local.lower() == "postmaster")
        require(ours or (known and address.domain != DOMAIN), "a recipient that should not have been taken")
    require(content.startswith(b"Received: "), "no Received: field")
    require(content.endswith(b"\r\n") or envelope.body == "binarymime", "the content does not end with a line end")
    require(envelope.body == "binarymime" or _BARE.search(content) is None, "a bare CR or LF is stored")


def seeds() -> Sequence[bytes]:
    """The dialogue files, as strict and as patient sites see them, and what these do not do."""
    found = []
    for path in sorted(DIALOGUES.rglob("*.txt")):
        script = load(path)
        words = [script.service, script.tls] + ["logins"] * script.logins
        for more in ((), ("loose",)):
            found.append(",".join([*words, *more]).encode() + b"\n" + _pieces(script))
    ehlo, mail = b"EHLO a\r\n\x1e", b"MAIL FROM:<alice@example.org>\r\nRCPT TO:<bob@example.org>\r\n"
    plain = b"AUTH PLAIN AGFsaWNlAG9wZW4gc2VzYW1l\r\n\x1e"
    message = b"DATA\r\n\x1eFrom: alice@example.org\r\n\r\nhello\r\n.\r\n\x1e"
    found += [
        b"submission,implicit,logins,loose\n" + ehlo + plain + mail + message + b"QUIT\r\n",
        b"submission,starttls,logins\n" + ehlo + b"STARTTLS\r\n\x1e" + ehlo + plain + mail + message,
        b"mx,logins,clear,mend\n" + ehlo + plain + mail + b"DATA\r\n\x1ea\nb\rc\r\n.\r\n\x1e",
        b"mx,logins,clear,loose\n" + ehlo + b"AUTH LOGIN\r\n\x1eYWxpY2U=\r\n\x1eb3BlbiBzZXNhbWU=\r\n\x1eAUTH LOGIN\r\n",
        b"mx,logins,clear\n"
        + ehlo
        + b"AUTH SCRAM-SHA-256\r\n\x1ebiwsbj1hbGljZSxyPWFiYw==\r\n\x1eYz1iaXdzLHI9YWJj\r\n\x1e*\r\n",
        b"relay,mend,loose\n" + ehlo + mail + b"BDAT 4\r\na\nb\rBDAT 2 LAST\r\n\r\n",
        b"relay,small,loose\n" + ehlo + mail + b"DATA\r\n\x1e" + b"0123456789\r\n" * 200 + b".\r\nNOOP\r\n",
        b"mx,loose\n" + ehlo + b"MAIL FROM:<> BODY=BINARYMIME SMTPUTF8 RET=HDRS ENVID=a+2Bb\r\n"
        b"RCPT TO:<bob@example.org> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;a+2Bb@c\r\nBDAT 5\r\n\0\r\n.\nBDAT 0 LAST\r\n",
        b"mx,early\n" + ehlo,
    ]
    found += [b"mx,%b\n" % fault + ehlo + mail + message for fault in _CHOICES["fault"]]
    return found


def _pieces(script: Script) -> bytes:
    """What a script sends, with a pause wherever it reads."""
    out: list[bytes] = []
    for step in script.steps:
        if step.mark in {"->", "=>"}:
            out.append(step.octets)
        elif out and out[-1] != PAUSE:
            out.append(PAUSE)
    return b"".join(out)


_LINES: Final = (
    b"EHLO a|HELO a|MAIL FROM:<>|MAIL FROM:<a@b.c>|RCPT TO:<bob@example.org>|RCPT TO:<x@y.example>|DATA"
    b"|BDAT 3|BDAT 0 LAST"
    b"|BDAT 5 LAST|RSET|NOOP|VRFY a|HELP|QUIT|STARTTLS|GET /|AUTH PLAIN |AUTH LOGIN|AUTH SCRAM-SHA-256 |XCLIENT|*"
    b"|AGFsaWNlAG9wZW4gc2VzYW1l|From: bob@x|Received: x|Message-ID: <a@b>"
).split(b"|")
_WORDS: Final = (
    b" SIZE=| BODY=8BITMIME| BODY=BINARYMIME| SMTPUTF8| RET=FULL| ENVID=| NOTIFY=NEVER"
    b"| ORCPT=utf-8;\\x{E9}@a| AUTH=<>|mx|relay"
    b"|submission|starttls|implicit|,logins,|,clear,|,mend,|,small,|,loose,|alice@example.org|postmaster"
    b"|[127.0.0.1]|\xc3\xa9@b.c"
).split(b"|")
WORDS: Final = (
    *(line + b"\r\n" for line in _LINES),
    *_WORDS,
    *(PAUSE, b"\r\n.\r\n\x1e", b"DATA\r\n\x1e", b"STARTTLS\r\n\x1e"),
)

TARGET: Final = Target("server", check, seeds, WORDS, share=3)
