"""What a client's dialogues are made of: phases, steps, verdicts, and command lines that cannot be injected into.

A dialogue (see `mtad.smtp.opening` and `mtad.smtp.client`) is a generator of `Step` values. The driver, which is
`mtad.delivery.connections`, sends the step's bytes, reads one reply when the step wants one, and sends it back into the
generator. Nothing here touches a socket or a clock, so that every dialogue can be tested with literals.

Theory: a step belongs to one of the phases of `PHASES`, the table below, and nothing else names a time-out or the words of
an error.

Invariants: no CR, LF or other control character gets into a command: `command` refuses it (a caller's fault, ValueError).
Callers ask `sendable` about an address first. Attack S-EN1, and GHSA-c7w3-x93f-qmm8 and GHSA-vvjj-xcjg-gr5g in another
client. What is a secret (AUTH) leaves in a step whose ``repr`` does not show it.

Standards: RFC 5321 sections 4.1.1, 4.1.2 and 4.2; RFC 6531 section 3.3 (UTF-8 in commands).
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from enum import Enum
from typing import Final

import msgspec

from mtad.reply import Reply
from mtad.smtp.replies import ProtocolFault


class Phase(Enum):
    """Where in a dialogue we are; the key to `PHASES`."""

    GREETING = "greeting"
    EHLO = "ehlo"
    HELO = "helo"
    STARTTLS = "starttls"
    AUTH = "auth"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    BDAT = "bdat"
    CONTENT = "content"
    DOT = "dot"
    RSET = "rset"

    __hash__ = object.__hash__  # each is one object; Enum's own is slow, and each step looks one up


class Words(msgspec.Struct, frozen=True):
    """A row of `PHASES`, in the words of Postfix, which administrators and their scripts know."""

    timeout: str
    """The setting (`mtad.config.Delivery`) that bounds the wait for the reply."""
    activity: str
    """``lost connection with ... while`` this."""
    request: str
    """``(in reply to`` this ``)``."""


# The phases in the order in which they come; a dialogue moves down, from STARTTLS back to EHLO, and back up to RSET or MAIL
# for the next message. BDAT is the first piece of a content, DOT the last, be it DATA or BDAT.
PHASES: Final[Mapping[Phase, Words]] = {
    Phase.GREETING: Words("helo_timeout", "receiving the initial server greeting", "connection"),
    Phase.EHLO: Words("helo_timeout", "performing the EHLO handshake", "EHLO command"),
    Phase.HELO: Words("helo_timeout", "performing the HELO handshake", "HELO command"),
    Phase.STARTTLS: Words("starttls_timeout", "performing the STARTTLS handshake", "STARTTLS command"),
    Phase.AUTH: Words("helo_timeout", "performing SASL authentication", "AUTH command"),
    Phase.RSET: Words("rset_timeout", "sending RSET", "RSET command"),
    Phase.MAIL: Words("mail_timeout", "sending MAIL FROM", "MAIL FROM command"),
    Phase.RCPT: Words("rcpt_timeout", "sending RCPT TO", "RCPT TO command"),
    Phase.DATA: Words("data_init_timeout", "sending DATA command", "DATA command"),
    Phase.BDAT: Words("data_init_timeout", "sending BDAT command", "BDAT command"),
    Phase.CONTENT: Words("data_xfer_timeout", "sending message body", "message body"),
    Phase.DOT: Words(
        "data_done_timeout", "sending end of data -- message may be sent more than once", "end of DATA command"
    ),
}

#: What a connection without a transaction gets for a farewell (RFC 5321 section 4.1.1.10); the reply is not waited for.
QUIT: Final = b"QUIT\r\n"

# C0, DEL, C1, and what some programs take for the end of a line or cannot be written in UTF-8
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Step(msgspec.Struct, frozen=True):
    """What the driver is to do next: send ``send`` (if any), then read one reply if ``reply``.

    ``final`` marks the octets that end a message: once they are sent, its recipients are in doubt until the reply.
    A step without ``reply`` is answered with None, or with a reply that came all the same (the server gave up).
    """

    phase: Phase
    send: bytes = b""
    reply: bool = True
    final: bool = False

    def __repr__(self) -> str:
        send = "..." if self.phase is Phase.AUTH else repr(self.send)
        return f"Step({self.phase.value}, {send}, reply={self.reply}, final={self.final})"


class Verdict(msgspec.Struct, frozen=True):
    """What the server said about a recipient, and to which command."""

    phase: Phase
    reply: Reply

    @property
    def accepted(self) -> bool:
        """The server took the message for this recipient."""
        return self.phase is Phase.DOT and self.reply.positive

    @property
    def permanent(self) -> bool:
        """The recipient will not be taken, ever.

        552 to RCPT means "too many recipients" and is temporary, RFC 5321 section 4.5.3.1.10.
        """
        return self.reply.permanent and not (self.phase is Phase.RCPT and self.reply.code == 552)


class After(Enum):
    """What a connection is good for after a transaction."""

    READY = "ready"  # the next MAIL may follow at once
    RESET = "reset"  # a transaction is still open: RSET first
    CLOSED = "closed"  # the end: the server said 421, or we cannot go on


Steps = Generator[Step, Reply | None, None]


def command(*fields: str, utf8: bool = False) -> bytes:
    """A command line, fields joined as they are; ``utf8`` when the server offers SMTPUTF8 and it is in use.

    Raises:
        ValueError: the caller's fault: a control character, or a character that needs SMTPUTF8.
    """
    line = "".join(fields)
    if not sendable(line, utf8=utf8):
        raise ValueError(f"not fit for a command line: {line!a}")
    return line.encode("utf-8") + b"\r\n"


def sendable(text: str, *, utf8: bool = False) -> bool:
    """Whether ``text`` may stand in a command: no control characters (RFC 5321 section 4.1.2), US-ASCII unless ``utf8``."""
    return (utf8 or text.isascii()) and _CONTROL.search(text) is None


def expect(reply: Reply | None) -> Reply:
    """The reply that the driver owes."""
    if reply is None:
        raise ValueError("the driver owes a reply")
    return reply


def refusal(phase: Phase, reply: Reply) -> Verdict:
    """A reply that is no success.

    Raises:
        ProtocolFault: it is a success of a kind that has no place here (354 to EHLO).
    """
    if reply.positive:
        raise ProtocolFault(f"reply out of place: {reply.text}")
    return Verdict(phase, reply)
