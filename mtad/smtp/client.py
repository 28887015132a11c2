"""The client's side of SMTP, sans-I/O: what to send next, and what a reply means (RFC 5321 sections 3 and 4).

A dialogue is a generator. It yields a `Step`, the driver (see `mtad.delivery.connections`) sends the step's bytes, reads
one reply when the step wants one, and sends the reply back into the generator. Nothing here touches a socket or a clock,
so that every dialogue can be tested with literals.

    greet(name)             greeting, EHLO, HELO             -> Greeting
    Transaction(...)        MAIL, RCPT .., DATA, content, dot -> per recipient a Verdict

Theory: a step belongs to one of the phases of `PHASES`, the table below, and nothing else names a time-out or the words
of an error. A dialogue that breaks off between two steps leaves what was decided before in `Transaction.verdicts`: a
recipient that was refused stays refused, the others have no verdict yet.

PIPELINING (RFC 2920): MAIL, all RCPT and DATA leave in one piece, cut into groups of at most `GROUP_COMMANDS` commands and
`GROUP_OCTETS` octets, so that the replies to a group always fit into the buffers between us and a server that does not read
on while it writes. RSET, when the connection needs one, travels with them.

Invariants:

- No CR, LF or other control character gets into a command: `command` refuses it (a caller's fault, ValueError). Callers ask
  `sendable` about an address first. Attack S-EN1, and GHSA-c7w3-x93f-qmm8 and GHSA-vvjj-xcjg-gr5g in another client.
- The octets that end a message leave only in a step that is marked ``final``; everything before may be lost without harm.
- 421 in any phase ends the connection (section 3.8); recipients without a verdict get that reply.

Errors: a reply that has no place in its phase (354 for MAIL, 250 for DATA) is a `ProtocolFault`.

Later parts have their places: STARTTLS and AUTH between two rounds of `greet`; conversion for servers without 8BITMIME or
SMTPUTF8 before `Transaction`, whose parameters of MAIL are in one function.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
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
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    CONTENT = "content"
    DOT = "dot"
    RSET = "rset"


class Words(msgspec.Struct, frozen=True):
    """A row of `PHASES`, in the words of Postfix, which administrators and their scripts know."""

    timeout: str
    """The setting (`mtad.config.Delivery`) that bounds the wait for the reply."""
    activity: str
    """``lost connection with ... while`` this."""
    request: str
    """``(in reply to`` this ``)``."""


# The phases in the order in which they come; a dialogue moves down, and back up to RSET or MAIL for the next message.
PHASES: Final[Mapping[Phase, Words]] = {
    Phase.GREETING: Words("helo_timeout", "receiving the initial server greeting", "connection"),
    Phase.EHLO: Words("helo_timeout", "performing the EHLO handshake", "EHLO command"),
    Phase.HELO: Words("helo_timeout", "performing the HELO handshake", "HELO command"),
    Phase.RSET: Words("rset_timeout", "sending RSET", "RSET command"),
    Phase.MAIL: Words("mail_timeout", "sending MAIL FROM", "MAIL FROM command"),
    Phase.RCPT: Words("rcpt_timeout", "sending RCPT TO", "RCPT TO command"),
    Phase.DATA: Words("data_init_timeout", "sending DATA command", "DATA command"),
    Phase.CONTENT: Words("data_xfer_timeout", "sending message body", "message body"),
    Phase.DOT: Words(
        "data_done_timeout", "sending end of data -- message may be sent more than once", "end of DATA command"
    ),
}

#: Commands in one pipelined group. Their replies, at 512 octets each, stay below the smallest common receive buffer.
GROUP_COMMANDS: Final = 100

#: Octets in one pipelined group, below what a peer's receive buffer holds while it is busy writing.
GROUP_OCTETS: Final = 16 * 1024

#: Octets of content that are gathered into one piece for the network.
PIECE: Final = 64 * 1024

#: What a connection without a transaction gets for a farewell (RFC 5321 section 4.1.1.10); the reply is not waited for.
QUIT: Final = b"QUIT\r\n"

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Step(msgspec.Struct, frozen=True):
    """What the driver is to do next: send ``send`` (if any), then read one reply if ``reply``.

    ``final`` marks the octets that end a message: once they are sent, its recipients are in doubt until the reply.
    A step without ``reply`` is answered with None, or with a reply that came all the same (the server gave up).
    """

    phase: Phase
    send: bytes = b""
    reply: bool = True
    final: bool = False


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


class Capabilities(msgspec.Struct, frozen=True):
    """What the server offers (RFC 5321 section 4.1.1.1): the keywords of EHLO in upper case with their parameters."""

    extensions: Mapping[str, str]
    pipelining: bool = False
    size: bool = False
    eight_bit: bool = False


NO_EXTENSIONS: Final = Capabilities({})


class Greeting(msgspec.Struct, frozen=True):
    """How a session began: either ``capabilities``, or the ``refusal`` of a server that does not want to talk."""

    capabilities: Capabilities = NO_EXTENSIONS
    refusal: Verdict | None = None


def command(*fields: str) -> bytes:
    """A command line, fields joined as they are.

    Raises:
        ValueError: the caller's fault: a control character, or a character that needs SMTPUTF8.
    """
    line = "".join(fields)
    if not sendable(line):
        raise ValueError(f"not fit for a command line: {line!a}")
    return line.encode("ascii") + b"\r\n"


def sendable(text: str) -> bool:
    """Whether ``text`` may stand in a command: US-ASCII without control characters (RFC 5321 section 4.1.2)."""
    return text.isascii() and _CONTROL.search(text) is None


def parse_capabilities(reply: Reply) -> Capabilities:
    """Read a positive reply to EHLO; keywords in any case, ``AUTH=LOGIN`` of old servers is a keyword of its own."""
    extensions: dict[str, str] = {}
    for line in reply.lines[1:]:
        keyword, _, parameters = line.strip().partition(" ")
        if keyword:
            extensions.setdefault(keyword.upper(), parameters.strip())
    return Capabilities(
        extensions,
        pipelining="PIPELINING" in extensions,
        size="SIZE" in extensions,
        eight_bit="8BITMIME" in extensions,
    )


Steps = Generator[Step, Reply | None, None]


def greet(name: str) -> Generator[Step, Reply | None, Greeting]:
    """Open a session as ``name``: greeting, EHLO, and HELO when EHLO is refused with 5yz (RFC 5321 section 3.2)."""
    reply = _expect((yield Step(Phase.GREETING)))
    if not 200 <= reply.code < 300:
        return _refused(Phase.GREETING, reply)
    reply = _expect((yield Step(Phase.EHLO, command("EHLO ", name))))
    if 200 <= reply.code < 300:
        return Greeting(parse_capabilities(reply))
    if not reply.permanent:
        return _refused(Phase.EHLO, reply)
    reply = _expect((yield Step(Phase.HELO, command("HELO ", name))))
    if 200 <= reply.code < 300:
        return Greeting()
    return _refused(Phase.HELO, reply)


def _refused(phase: Phase, reply: Reply) -> Greeting:
    if reply.positive:
        raise ProtocolFault(f"reply out of place: {reply.text}")
    return Greeting(refusal=Verdict(phase, reply))


def _expect(reply: Reply | None) -> Reply:
    if reply is None:
        raise ValueError("the driver owes a reply")
    return reply


class Transaction:
    """One mail transaction (RFC 5321 section 3.3), for recipients that share one content.

    ``verdicts`` has a place for each recipient, in order; None: undecided. ``after`` says what became of the connection; it
    is CLOSED until the dialogue came to its end. ``answered`` is True once the server answered MAIL with anything but 421:
    before that, a connection that was kept open can be replaced by a new one as if nothing had been said.
    """

    def __init__(
        self,
        sender: str,
        recipients: Sequence[str],
        size: int,
        capabilities: Capabilities,
        *,
        reset: bool = False,
    ) -> None:
        """Prepare a transaction.

        Args:
            sender: a Mailbox, or "" for the null reverse-path.
            recipients: Mailboxes, at least one.
            size: octets of the content, for SIZE= (RFC 1870).
            capabilities: what the server offers.
            reset: the connection needs a RSET first.

        Raises:
            ValueError: the caller's fault: an address that is not `sendable`, or no recipient.
        """
        if not recipients:
            raise ValueError("a transaction without recipients")
        self.verdicts: list[Verdict | None] = [None] * len(recipients)
        self.after = After.CLOSED
        self.answered = False
        self._pipelining = capabilities.pipelining
        commands = [(Phase.RSET, b"RSET\r\n")] if reset else []
        commands.append((Phase.MAIL, _mail(sender, size, capabilities)))
        commands.extend((Phase.RCPT, command("RCPT TO:<", address, ">")) for address in recipients)
        commands.append((Phase.DATA, b"DATA\r\n"))
        self._commands: Sequence[tuple[Phase, bytes]] = commands
        self._mail: Reply | None = None
        self._accepted: list[int] = []
        self._recipient = 0

    def steps(self, content: Iterator[bytes]) -> Steps:
        """The dialogue. ``content`` is dot-stuffed and ends with the octets that end the message (`mtad.smtp.wire`)."""
        data: Reply | None = None
        for group in self._groups():
            block = b"".join(line for _, line in group)
            for phase, _ in group:
                reply = _expect((yield Step(phase, block)))
                block = b""
                if not self._settle(phase, reply):
                    return
                if phase is Phase.DATA:
                    data = reply
            if data is None and not self._worth_going_on():
                self._decide(Phase.MAIL, self._mail)
                self.after = After.RESET
                return
        yield from self._send(content, _expect(data))

    def _groups(self) -> Iterator[Sequence[tuple[Phase, bytes]]]:
        """The commands, cut into what may leave together."""
        if not self._pipelining:
            yield from ((entry,) for entry in self._commands)
            return
        group: list[tuple[Phase, bytes]] = []
        octets = 0
        for entry in self._commands:
            if group and (len(group) >= GROUP_COMMANDS or octets + len(entry[1]) > GROUP_OCTETS):
                yield group
                group, octets = [], 0
            group.append(entry)
            octets += len(entry[1])
        yield group

    def _worth_going_on(self) -> bool:
        """Between groups: MAIL was not refused, and some recipient is accepted or still to be named."""
        if self._mail is not None and not self._mail.positive:
            return False
        return bool(self._accepted) or self._recipient < len(self.verdicts)

    def _settle(self, phase: Phase, reply: Reply) -> bool:
        """Take the reply to one command; False when it ends the dialogue."""
        if reply.code == 421:
            self._decide(phase, reply)
            return False
        if phase is Phase.RSET and not reply.positive:
            raise ProtocolFault(f"RSET refused: {reply.text}")
        self.answered = self.answered or phase is not Phase.RSET
        wanted = 300 if phase is Phase.DATA else 200
        if reply.positive and not wanted <= reply.code < wanted + 100:
            raise ProtocolFault(f"reply out of place: {reply.text}")
        if phase is Phase.MAIL:
            self._mail = reply
        elif phase is Phase.RCPT:
            if reply.positive:
                self._accepted.append(self._recipient)
            elif self._mail is not None and self._mail.positive:
                self.verdicts[self._recipient] = Verdict(phase, reply)
            self._recipient += 1
        return True

    def _send(self, content: Iterator[bytes], data: Reply) -> Steps:
        """All commands are answered; go on with what the reply to DATA allows."""
        refused = self._mail is None or not self._mail.positive
        if refused:
            self._decide(Phase.MAIL, self._mail)
        if not data.positive:
            self._decide(Phase.DATA, data)
            self.after = After.RESET
        elif not self._accepted:
            # RFC 2920 section 3.1: 354 for nobody. An empty message ends it; whatever the reply says, nobody gets it.
            reply = _expect((yield Step(Phase.DOT, b".\r\n")))
            self.after = After.CLOSED if reply.code == 421 else After.READY
        elif not refused:
            yield from self._content(content)
        # else: MAIL refused, RCPT and DATA accepted. Only closing the connection cannot deliver an empty message.

    def _content(self, content: Iterator[bytes]) -> Steps:
        """Content and final dot. One piece is always held back, so that the end of the message leaves in the last step."""
        held: list[bytes] = []
        octets = 0
        for chunk in content:
            if held and octets + len(chunk) > PIECE:
                early = yield Step(Phase.CONTENT, b"".join(held), reply=False)
                if early is not None:  # the server gave up in the middle; what it says is about the message
                    if early.positive:
                        raise ProtocolFault(f"reply out of place: {early.text}")
                    self._decide(Phase.CONTENT, early)
                    return
                held, octets = [], 0
            if chunk:
                held.append(chunk)
                octets += len(chunk)
        reply = _expect((yield Step(Phase.DOT, b"".join(held), final=True)))
        if 300 <= reply.code < 400:
            raise ProtocolFault(f"reply out of place: {reply.text}")
        self._decide(Phase.DOT, reply)
        self.after = After.CLOSED if reply.code == 421 else After.READY

    def _decide(self, phase: Phase, reply: Reply | None) -> None:
        """Give this reply to every recipient that has no verdict yet."""
        if reply is not None:
            verdict = Verdict(phase, reply)
            self.verdicts = [verdict if known is None else known for known in self.verdicts]


def _mail(sender: str, size: int, capabilities: Capabilities) -> bytes:
    """MAIL with the parameters that the server knows (RFC 1870, RFC 6152)."""
    return command(
        "MAIL FROM:<",
        sender,
        ">",
        f" SIZE={size}" if capabilities.size else "",
        " BODY=8BITMIME" if capabilities.eight_bit else "",
    )
