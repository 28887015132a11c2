"""Delivery status notifications: the message that tells a sender what was not delivered, and why.

`report` builds the report to the sender of a message, `double_bounce` the notice to postmaster about a report that could
not be delivered itself. Both are multipart/report with three parts: text for people, message/delivery-status for programs,
and the header of the original message.

Whatever comes from outside (addresses, replies, the original's header) is data only: control characters become ``?``, lines
are bounded and folded nowhere, the boundary stands in no part, and the whole is 7-bit, so that every next hop takes it.

Invariants: lines end with CRLF and have at most 998 octets; the size is bounded whatever the number of recipients and the
length of replies. Pure: ``now`` is a parameter. Errors: none; the input is taken as it is.
Standards: RFC 3464 (delivery-status), RFC 6522 (multipart/report, text/rfc822-headers), RFC 6533 section 3 (addresses in
UTF-8), RFC 3834 (Auto-Submitted), RFC 5322 (header and line length).
"""

from __future__ import annotations

import binascii
import re
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Final, Literal

from mtad.address import domain_of
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Delivered, Outcome

#: Octets of the original's header that go back; Postfix's bounce_size_limit.
MAX_HEADERS: Final = 50_000
#: Characters of one reply or reason. RFC 5321 section 4.5.3.1.5 allows 512 octets in a reply line.
MAX_REASON: Final = 512
#: Recipients that the text for people describes; the others stand in the second part.
MAX_DESCRIBED: Final = 50
#: Characters of all diagnostic fields together; recipients after that go without, for the fields are optional.
MAX_DIAGNOSTICS: Final = 100_000
#: RFC 5322 section 2.1.1: octets in a line without its CRLF.
MAX_LINE: Final = 998
#: Width of the text for people, in characters.
WIDTH: Final = 72

Failure = tuple[Recipient, Outcome]
Kind = Literal["failure", "success", "delay"]

#: What the commoner status codes mean (RFC 3463 and its registry), without the class, in the words of every day.
MEANING: Final = {
    "1.1": "There is no mailbox with this name.",
    "1.2": "The domain of this address does not exist.",
    "1.3": "The address is not well-formed.",
    "1.10": "The domain of this address takes no mail.",
    "2.1": "The mailbox is closed.",
    "2.2": "The mailbox is full.",
    "2.3": "The message is too big for this mailbox.",
    "3.2": "The server of this address takes no mail at present.",
    "3.4": "The message is too big for the server of this address.",
    "4.1": "The server of this address could not be reached.",
    "4.3": "The mail server for this address could not be found.",
    "4.4": "There is no way to the server of this address.",
    "4.6": "The message went round in a circle.",
    "4.7": "Delivery was tried for a long time without success, and has been given up.",
    "7.1": "The server of this address refused the message.",
}

_UNSAFE: Final = re.compile(r"[^ -~]")
# RFC 6533 section 3: everything but QCHAR is written as \x{HEX} in utf-8-addr-xtext.
_NOT_QCHAR: Final = re.compile(r"[^!-*,-<>-\[\]-~]")
_MESSAGE_ID: Final = re.compile(rb"^message-id:[ \t]*(?:\r\n[ \t]+)?(<[!-;=?-~]{1,250}>)[ \t]*\r?$", re.I | re.M)


#: What the report says in its first paragraph, its subject, and the Action of RFC 3464 section 2.3.3, by kind.
_KINDS: Final[dict[Kind, tuple[str, str, str]]] = {
    "failure": (
        "Your message could not be delivered to the recipients below, and delivery will not be tried again. "
        "The other recipients of the message, if there were any, are not concerned.",
        "Undelivered Mail Returned to Sender",
        "failed",
    ),
    "success": (
        "Your message was delivered to the recipients below, as you asked to be told. Where it says relayed, it was handed "
        "to a server that sends no such reports.",
        "Successful Mail Delivery Report",
        "delivered",
    ),
    "delay": (
        "THIS IS A WARNING ONLY. YOU NEED NOT SEND YOUR MESSAGE AGAIN.\n\n"
        "Your message could not be delivered to the recipients below yet. It will be tried again until it is delivered "
        "or too old.",
        "Delayed Mail (still being retried)",
        "delayed",
    ),
}


def report(
    envelope: Envelope,
    entries: Sequence[Failure],
    original: bytes,
    *,
    hostname: str,
    now: float,
    report_id: str,
    kind: Kind = "failure",
    until: float = 0.0,
    full: bool = False,
) -> bytes:
    """The report to the sender of a message.

    Args:
        envelope: of the message; its sender must not be null, for nobody would get the report.
        entries: the recipients that are reported on, and what became of them; at least one.
        original: the message from its start; all from the first empty line on is left out unless ``full``.
        hostname: of this host.
        now: seconds since the epoch.
        report_id: the queue id of the report.
        kind: "failure", "success", or "delay".
        until: for a delay, when delivery will be given up (Will-Retry-Until).
        full: return the whole message (RET=FULL, RFC 3461 section 4.3).

    Returns:
        Header and body, lines ended by CRLF, not dot-stuffed.
    """
    words, subject, action = _KINDS[kind]
    intro = (
        f"This is the mail system at {_ascii(hostname)}.\n\n{words}\n\n"
        "If you ask postmaster for help, please send this whole report along."
    )
    head = [("To", _ascii(envelope.sender)), ("Subject", subject), ("Auto-Submitted", "auto-replied")]
    reference = _MESSAGE_ID.search(_header_block(original))
    if reference is not None:
        head.append(("In-Reply-To", reference[1].decode("ascii")))
    parts = [
        _human(intro, entries),
        _status(envelope, entries, _ascii(hostname), action, until),
        _whole(original) if full else _original(original),
    ]
    return _assemble(head, parts, hostname=_ascii(hostname), now=now, report_id=_ascii(report_id))


def double_bounce(
    envelope: Envelope,
    failures: Sequence[Failure],
    headers: bytes,
    *,
    hostname: str,
    now: float,
    report_id: str,
    to: str = "",
) -> bytes:
    """The notice to postmaster (``to``) that a report (``envelope``) could not be delivered; the rest as of `report`."""
    intro = (
        f"This is the mail system at {_ascii(hostname)}.\n\n"
        "A report about undelivered mail could not be delivered itself. Nobody but you is told, and nothing will be tried "
        "again. The reasons and the header of that report follow."
    )
    head = [
        ("To", _ascii(to) or f"postmaster@{_ascii(hostname)}"),
        ("Subject", "Postmaster notice: undeliverable report"),
        ("Auto-Submitted", "auto-generated"),
    ]
    parts = [_human(intro, failures), _status(envelope, failures, _ascii(hostname), "failed"), _original(headers)]
    return _assemble(head, parts, hostname=_ascii(hostname), now=now, report_id=_ascii(report_id))


def _assemble(head: list[tuple[str, str]], parts: Sequence[bytes], *, hostname: str, now: float, report_id: str) -> bytes:
    boundary = _boundary(f"{report_id}/{hostname}", parts)
    fields = [
        ("Date", _date(now)),
        ("From", f"MAILER-DAEMON@{hostname} (Mail Delivery System)"),
        *head,
        ("Message-ID", f"<{report_id}@{hostname}>"),
        ("MIME-Version", "1.0"),
        ("Content-Type", f'multipart/report; report-type=delivery-status;\r\n boundary="{boundary}"'),
    ]
    top = "".join(f"{name}: {value}\r\n" for name, value in fields).encode("ascii")
    line = b"--" + boundary.encode("ascii")
    preamble = b"\r\nThis is a MIME-encapsulated message.\r\n"
    return top + preamble + b"".join(b"\r\n%s\r\n%s" % (line, part) for part in parts) + b"\r\n%s--\r\n" % line


def _boundary(wish: str, parts: Sequence[bytes]) -> str:
    """A boundary (RFC 2046 section 5.1.1, at most 70 characters) that occurs in no part."""
    base = re.sub(r"[^A-Za-z0-9./_-]", "_", wish)[:50]
    number = 0
    while any(f"--=_{number}_{base}".encode() in part for part in parts):
        number += 1
    return f"=_{number}_{base}"


def _ascii(text: str, limit: int = MAX_LINE - 100) -> str:
    """Text as printable ASCII on one line of bounded length; whatever else it holds becomes ``?``."""
    return _UNSAFE.sub("?", text[:limit])


def _clean(text: str) -> str:
    """Text on one line of bounded length without control characters, other scripts kept."""
    text = text[:MAX_REASON]
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def _part(content_type: str, description: str, body: bytes) -> bytes:
    """A body part. Text with long lines or octets beyond printable ASCII is quoted-printable (RFC 2045 section 6.7)."""
    encoding = b""
    if not _is_plain(body):
        encoding = b"Content-Transfer-Encoding: quoted-printable\r\n"
        lines = body.removesuffix(b"\r\n").split(b"\r\n")
        body = b"".join(binascii.b2a_qp(line, istext=False).replace(b"=\n", b"=\r\n") + b"\r\n" for line in lines)
    kind = content_type.encode("ascii")
    return b"Content-Description: %s\r\nContent-Type: %s\r\n%s\r\n%s" % (description.encode("ascii"), kind, encoding, body)


def _is_plain(body: bytes) -> bool:
    bare = body.replace(b"\r\n", b"").replace(b"\t", b"")
    return bare.isascii() and bare.decode("ascii").isprintable() and max(map(len, body.split(b"\r\n"))) <= MAX_LINE


def _human(intro: str, failures: Sequence[Failure]) -> bytes:
    lines: list[str] = []
    for paragraph in intro.split("\n\n"):
        lines += [*textwrap.wrap(paragraph, WIDTH), ""]
    for recipient, outcome in failures[:MAX_DESCRIBED]:
        lines.append(f"<{_clean(recipient.address)}>")
        for sentence in _reasons(outcome):
            lines += textwrap.wrap(
                sentence,
                WIDTH,
                initial_indent="    ",
                subsequent_indent="    ",
                break_on_hyphens=False,
                break_long_words=False,
            )
        lines.append("")
    rest = len(failures) - MAX_DESCRIBED
    if rest > 0:
        lines += [*textwrap.wrap(f"... and {rest} more, which the second part of this report lists.", WIDTH), ""]
    text = "\r\n".join(lines)
    charset = "us-ascii" if text.isascii() else "utf-8"
    return _part(f"text/plain; charset={charset}", "Notification", text.encode("utf-8", "replace"))


def _reasons(outcome: Outcome) -> list[str]:
    if isinstance(outcome, Delivered):
        where = f"relayed to {_clean(outcome.remote)}" if outcome.remote else "delivered"
        return [f"{where} ({_clean(outcome.text)})"]
    meaning = MEANING.get(outcome.status.partition(".")[2], "The message could not be delivered.")
    if outcome.reply and outcome.remote:
        said = f"The server {_clean(outcome.remote)} said: {_clean(outcome.reply)}"
        return [meaning, said] if outcome.reply in outcome.text else [meaning, said, f"({_clean(outcome.text)})"]
    return [meaning, f"({_clean(outcome.text)})"]


def _status(envelope: Envelope, entries: Sequence[Failure], host: str, action: str, until: float = 0.0) -> bytes:
    fields = f"Reporting-MTA: dns; {host}\r\nX-Mtad-Queue-ID: {_ascii(envelope.id)}\r\n"
    if envelope.envid:
        fields = f"Original-Envelope-Id: {_ascii(envelope.envid)}\r\n{fields}"
    if envelope.sender:
        fields += f"X-Mtad-Sender: {_typed(envelope.sender)}\r\n"
    blocks = [f"{fields}Arrival-Date: {_date(envelope.arrival)}\r\n"]
    room = MAX_DIAGNOSTICS
    for recipient, outcome in entries:
        block = ""
        if recipient.orcpt:
            kind, _, address = recipient.orcpt.partition(";")
            block = f"Original-Recipient: {_ascii(kind)}; {_ascii(address)}\r\n"
        done = "relayed" if isinstance(outcome, Delivered) and outcome.remote else action
        block += (
            f"Final-Recipient: {_typed(recipient.address)}\r\nAction: {done}\r\nStatus: {_status_code(outcome.status)}\r\n"
        )
        extra = f"Remote-MTA: dns; {_ascii(outcome.remote, 255)}\r\n" if outcome.remote else ""
        kind, text = ("smtp", outcome.reply) if outcome.reply else ("x-mtad", outcome.text)
        extra += f"Diagnostic-Code: {kind}; {_ascii(text, MAX_REASON)}\r\n"
        if until:
            extra += f"Will-Retry-Until: {_date(until)}\r\n"
        if room >= len(extra):
            block += extra
            room -= len(extra)
        blocks.append(block)
    head = b"Content-Description: Delivery report\r\nContent-Type: message/delivery-status\r\n\r\n"
    return head + "\r\n".join(blocks).encode("ascii")


def _date(seconds: float) -> str:
    return format_datetime(datetime.fromtimestamp(int(seconds), UTC))


def _status_code(status: str) -> str:
    """The status, or the general one of its class where it is not of RFC 3463's form."""
    return status if re.fullmatch(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}", status) else "5.0.0"


def _typed(address: str) -> str:
    """An address with its type; one in UTF-8 is escaped as RFC 6533 section 3 has it for a 7-bit report."""
    if address.isascii():
        return f"rfc822; {_ascii(address)}"
    local = address.rpartition("@")[0]
    escaped = _NOT_QCHAR.sub(lambda match: f"\\x{{{ord(match[0]):X}}}", f"{local}@{domain_of(address)}")
    return f"utf-8; {_ascii(escaped)}"


def _header_block(headers: bytes) -> bytes:
    """The header alone, at most `MAX_HEADERS` octets of whole lines."""
    if headers.startswith(b"\r\n"):
        return b""
    end = headers.find(b"\r\n\r\n")
    block = headers if end < 0 else headers[: end + 2]
    if len(block) > MAX_HEADERS:
        block = block[: block.rfind(b"\r\n", 0, MAX_HEADERS) + 2] if b"\r\n" in block[:MAX_HEADERS] else block[:MAX_HEADERS]
    return block if block.endswith(b"\r\n") or not block else block + b"\r\n"


def _original(headers: bytes) -> bytes:
    return _part("text/rfc822-headers", "Undelivered message header", _header_block(headers) or b"\r\n")


def _whole(message: bytes) -> bytes:
    """The message itself, as it is; a part of this type must not be encoded (RFC 2046 section 5.2.1)."""
    encoding = b"" if message.isascii() else b"Content-Transfer-Encoding: 8bit\r\n"
    kind = b"Content-Description: Undelivered message\r\nContent-Type: message/rfc822\r\n"
    return kind + encoding + b"\r\n" + message
