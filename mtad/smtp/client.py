"""One mail transaction from the client's side, sans-I/O: what to send next, and what a reply means (RFC 5321 section 3.3).

`Transaction.steps` is a dialogue, see `mtad.smtp.dialogue`: MAIL, RCPT .., DATA, content, dot; or MAIL, RCPT .., BDAT with
the first line, BDAT with the rest. Per recipient it leaves a `Verdict`. A dialogue that breaks off between two steps leaves
what was decided before in `Transaction.verdicts`: a recipient that was refused stays refused, others have no verdict yet.

PIPELINING (RFC 2920): MAIL, all RCPT and DATA leave in one piece, cut into groups of at most `GROUP_COMMANDS` commands and
`GROUP_OCTETS` octets, so that the replies to a group always fit into the buffers between us and a server that does not read
on while it writes. RSET, when the connection needs one, travels with them.

CHUNKING (RFC 3030): the first BDAT stands where DATA would, and carries the first line of the header only. It shows that
the server knows BDAT before it gets anything that a stranger wrote: a server (or what stands in front of it) that offers
CHUNKING and does not know BDAT would read a content as commands, and a message could hold another one. Such a server is
left, and `lied` says so. The rest of the content is one chunk, however large: it is known beforehand, and every further
chunk would cost a reply. A content whose first line is no header field goes by DATA.

Invariants:

- The octets that end a message leave only in a step that is marked ``final``; everything before may be lost without harm.
- 421 in any phase ends the connection (section 3.8); recipients without a verdict get that reply.
- What goes by DATA is dot-stuffed here and nowhere else; what goes by BDAT has exactly the octets that BDAT announced.

Errors: a reply that has no place in its phase (354 for MAIL, 250 for DATA) is a `ProtocolFault`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from mtad.reply import Reply
from mtad.smtp.capabilities import Capabilities
from mtad.smtp.commands import Mail, mail_command, rcpt_command
from mtad.smtp.dialogue import After, Phase, Step, Steps, Verdict, expect
from mtad.smtp.replies import ProtocolFault
from mtad.smtp.wire import dot_stuff

#: Commands in one pipelined group. Their replies, at 512 octets each, stay below the smallest common receive buffer.
GROUP_COMMANDS: Final = 100

#: Octets in one pipelined group, below what a peer's receive buffer holds while it is busy writing.
GROUP_OCTETS: Final = 16 * 1024

#: Octets of content that are gathered into one piece for the network.
PIECE: Final = 64 * 1024

#: Replies to a first BDAT that say "what is that?": the server does not know what it offers.
_NOT_KNOWN: Final = frozenset({500, 501, 502, 504})

# RFC 5322 section 2.2: field-name ":"; no command of SMTP has its colon right behind the verb
_FIELD: Final = re.compile(rb"[!-9;-~]{1,76}:[^\r\n]{0,800}\r\n")


def first_field(start: bytes) -> bytes:
    """The first line of a content, if it can go ahead of the rest by BDAT; b"" if the content has to go by DATA."""
    line = _FIELD.match(start)
    return line[0] if line else b""


class Transaction:
    """One mail transaction, for recipients that share one content.

    ``verdicts`` has a place for each recipient, in order; None: undecided. ``after`` says what became of the connection; it
    is CLOSED until the dialogue came to its end. ``answered`` is True once the server answered MAIL with anything but 421:
    before that, a connection that was kept open can be replaced by a new one as if nothing had been said. ``lied`` is True
    when the server does not know the BDAT that it offers: nothing was sent to it, and by DATA it may take the message.
    """

    def __init__(self, mail: Mail, capabilities: Capabilities, first: bytes = b"", *, reset: bool = False) -> None:
        """Prepare a transaction.

        Args:
            mail: what is to be said in MAIL and RCPT.
            capabilities: what the server offers.
            first: the start of the content, for its first line; b"": by DATA.
            reset: the connection needs a RSET first.

        Raises:
            ValueError: the caller's fault: an address that is not `sendable`, or no recipient.
        """
        if not mail.recipients:
            raise ValueError("a transaction without recipients")
        self.verdicts: list[Verdict | None] = [None] * len(mail.recipients)
        self.after = After.CLOSED
        self.answered = False
        self.lied = False
        self._pipelining = capabilities.pipelining
        self._size = mail.size
        self._ahead = first_field(first) if capabilities.chunking else b""
        commands = [(Phase.RSET, b"RSET\r\n")] if reset else []
        commands.append((Phase.MAIL, mail_command(mail, capabilities)))
        commands.extend((Phase.RCPT, rcpt_command(recipient, mail, capabilities)) for recipient in mail.recipients)
        if self._ahead:
            commands.append((Phase.BDAT, b"BDAT %d\r\n%b" % (len(self._ahead), self._ahead)))
        else:
            commands.append((Phase.DATA, b"DATA\r\n"))
        self._commands: Sequence[tuple[Phase, bytes]] = commands
        self._mail: Reply | None = None
        self._accepted: list[int] = []
        self._recipient = 0

    def steps(self, content: Iterable[bytes]) -> Steps:
        """The dialogue. ``content`` is as `mtad.smtp.outgoing` leaves it, in pieces cut anywhere, not dot-stuffed."""
        opening: Reply | None = None
        for group in self._groups():
            block = b"".join(line for _, line in group)
            for phase, _ in group:
                reply = expect((yield Step(phase, block)))
                block = b""
                if not self._settle(phase, reply):
                    return
                if phase in {Phase.DATA, Phase.BDAT}:
                    opening = reply
            if opening is None and not self._worth_going_on():
                self._decide(Phase.MAIL, self._mail)
                self.after = After.RESET
                return
        if self._ahead:
            yield from self._after_bdat(content, expect(opening))
        else:
            yield from self._after_data(content, expect(opening))

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

    @property
    def _refused(self) -> bool:
        return self._mail is None or not self._mail.positive

    def _after_data(self, content: Iterable[bytes], data: Reply) -> Steps:
        """All commands are answered; go on with what the reply to DATA allows."""
        if self._refused:
            self._decide(Phase.MAIL, self._mail)
        if not data.positive:
            self._decide(Phase.DATA, data)
            self.after = After.RESET
        elif not self._accepted:
            # RFC 2920 section 3.1: 354 for nobody. An empty message ends it; whatever the reply says, nobody gets it.
            reply = expect((yield Step(Phase.DOT, b".\r\n")))
            self.after = After.CLOSED if reply.code == 421 else After.READY
        elif not self._refused:
            yield from self._content(dot_stuff(content))
        # else: MAIL refused, RCPT and DATA accepted. Only closing the connection cannot deliver an empty message.

    def _after_bdat(self, content: Iterable[bytes], first: Reply) -> Steps:
        """The same with the reply to the first BDAT, of which a RSET undoes everything."""
        if self._refused:
            self._decide(Phase.MAIL, self._mail)
        elif self._accepted and first.code in _NOT_KNOWN:
            self.lied = True  # and it has read our line as a command: the connection is of no use
            return
        elif self._accepted and first.positive:
            yield from self._content(self._rest(content))
            return
        else:
            self._decide(Phase.BDAT, first)
        self.after = After.RESET

    def _rest(self, content: Iterable[bytes]) -> Iterator[bytes]:
        """The last BDAT: exactly as many octets as it announces, for anything else would be read as commands.

        Raises:
            ValueError: the caller's fault: the content has another size than it was said to have. Its last octet is kept.
        """
        left = self._size - len(self._ahead)
        yield b"BDAT %d LAST\r\n" % left
        skip = len(self._ahead)
        for chunk in content:
            piece = chunk[skip:]
            skip -= len(chunk) - len(piece)
            left -= len(piece)
            if left < 0:
                raise ValueError(f"the content is longer than the {self._size} octets that it has")
            yield piece
        if left:
            raise ValueError(f"the content is shorter than the {self._size} octets that it has")

    def _content(self, content: Iterable[bytes]) -> Steps:
        """Content and its end. One piece is always held back, so that the end of the message leaves in the last step."""
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
        reply = expect((yield Step(Phase.DOT, b"".join(held), final=True)))
        if 300 <= reply.code < 400:
            raise ProtocolFault(f"reply out of place: {reply.text}")
        self._decide(Phase.DOT, reply)
        self.after = After.CLOSED if reply.code == 421 else After.READY

    def _decide(self, phase: Phase, reply: Reply | None) -> None:
        """Give this reply to every recipient that has no verdict yet."""
        if reply is not None:
            verdict = Verdict(phase, reply)
            self.verdicts = [verdict if known is None else known for known in self.verdicts]
