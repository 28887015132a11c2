"""The commands of SMTP: each one function, all of them rows of one table.

What it is for: a function takes the session and the argument and returns the reply; the session is all that it changes.
What is the same for all commands is data in the row: in which states the command is legal and what is said when it comes
out of order, whether it takes an argument and in which characters, whether it needs EHLO, TLS or a login, whether anything
may be sent behind it before its reply, what its argument must never be seen in, whether it is junk or a try at a recipient.
`dispatch` reads the row, so no function repeats it. A command that is not in the table is not implemented: 502 5.5.1;
VRFY and EXPN are not, so that nobody learns here who has a mailbox (RFC 5321 section 7.3).

Counting: a refused command (5yz) is bad, and so is junk (NOOP, RSET, HELP, EHLO, HELO, empty chunks) above its limit
between two messages. Too many bad commands, in a row or in all, and the session ends with 421 4.7.0 in place of the reply;
under stress fewer are too many.
Recipients are treated with patience, since a list with dead addresses is not an attack and RFC 5321 section 4.5.3.1.8 wants
a hundred of them heard: `REFUSED_RECIPIENTS` in a session are free, and in one transaction as many above the limit as the
limit.

Manners: who speaks HTTP, or sends ahead where it must wait, is no mail client but something that was made to talk to us; it
is told so and cut off at once. What is sent ahead of the handshake is not even forgiven to our own people (CVE-2011-0411).

Errors: a function raises `SyntaxFault` for its argument (501) and lets `OSError` through (451 4.3.0); `dispatch` raises
nothing for what a client or the world can do.

Standards: RFC 5321 sections 3.2, 3.3, 4.1.1, 4.1.4, 4.2.4, 4.3.2; RFC 2920 section 3.1 (last in a group); RFC 2034 and 3463
(enhanced status codes); RFC 3207 (STARTTLS); RFC 3030 (CHUNKING); RFC 4954 (AUTH); RFC 6409 section 4.3 (530); RFC 9422
(LIMITS).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

import msgspec

from mtad.errors import SyntaxFault
from mtad.reply import Reply, reply
from mtad.session import auth, mail
from mtad.session.mail import TOO_BIG
from mtad.session.state import Session, State, Transaction
from mtad.smtp.grammar import BadAddress, Command, parse_helo
from mtad.smtp.parameters import Chunk, parse_chunk

#: Recipients of one session that may be refused before each further one counts as a bad command. RFC 5321 section
#: 4.5.3.1.8 counts rejecting fewer than 100 as a fault; a client that guesses names needs more.
REFUSED_RECIPIENTS: Final = 100

#: Octets of one chunk that are read only to be refused; who announces more cannot mean it, and is not waited for.
CHUNK_LIMIT: Final = 1 << 31

OK: Final = reply(250, "2.0.0", "Ok")
_BYE: Final = reply(221, "2.0.0", "Bye")
_READY_FOR_TLS: Final = reply(220, "2.0.0", "Ready to start TLS")
_TLS_ALREADY: Final = reply(503, "5.5.1", "Error: TLS already active")
_NOT_IMPLEMENTED: Final = reply(502, "5.5.1", "Error: command not implemented")
_NO_ARGUMENT: Final = reply(501, "5.5.4", "Syntax: command takes no argument")
_EIGHT_BIT: Final = reply(500, "5.5.2", "Error: 8-bit character in command")
_GREET_FIRST: Final = reply(503, "5.5.1", "Error: send EHLO or HELO first")
_EHLO_FIRST: Final = reply(503, "5.5.1", "Error: send EHLO first")
_IN_CHUNKS: Final = reply(503, "5.5.1", "Error: the message has begun with BDAT")
_NEEDS_TLS: Final = reply(538, "5.7.11", "Error: encryption is required here, send STARTTLS first")
_NEEDS_LOGIN: Final = reply(530, "5.7.0", "Authentication required")
_LOCAL_TROUBLE: Final = reply(451, "4.3.0", "Error: local trouble, try again later")
_OUT_OF_STEP: Final = reply(554, "5.5.0", "Error: SMTP protocol synchronization: wait for the reply")
_BEHIND_STARTTLS: Final = reply(554, "5.5.1", "Error: commands pipelined after STARTTLS")

#: First words that show somebody who takes us for a web server, as Postfix's smtpd_forbidden_commands.
FORBIDDEN: Final = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
    | {
        "ACCEPT:",
        "CONNECTION:",
        "CONTENT-LENGTH:",
        "CONTENT-TYPE:",
        "COOKIE:",
        "HOST:",
        "ORIGIN:",
        "REFERER:",
        "USER-AGENT:",
    }
)


def _ehlo(session: Session, argument: str) -> Reply:
    session.helo = parse_helo(argument)
    session.esmtp = True
    session.transaction = None
    site = session.site
    offers = [
        "PIPELINING",
        f"SIZE {site.limits.message_size}",
        "8BITMIME",
        "BINARYMIME",
        "CHUNKING",
        "SMTPUTF8",
        "DSN",
        "ENHANCEDSTATUSCODES",
        f"LIMITS RCPTMAX={site.limits.recipients}",
    ]
    if site.tls == "starttls" and session.tls is None:
        offers.append("STARTTLS")
    mechanisms = auth.offered(session)
    if mechanisms:
        offers.append(f"AUTH {' '.join(mechanisms)}")
    return reply(250, "", site.hostname, *offers, "HELP")


def _helo(session: Session, argument: str) -> Reply:
    session.helo = parse_helo(argument)
    session.esmtp = False
    session.transaction = None
    return reply(250, "", session.site.hostname)


def _starttls(session: Session, _argument: str) -> Reply:
    return _TLS_ALREADY if session.tls is not None else _READY_FOR_TLS


def _rset(session: Session, _argument: str) -> Reply:
    session.transaction = None
    return OK


def _noop(_session: Session, _argument: str) -> Reply:
    return OK


def _quit(session: Session, _argument: str) -> Reply:
    session.closing = True
    return _BYE


def _help(session: Session, _argument: str) -> Reply:
    verbs = (verb for verb, row in COMMANDS.items() if row.available(session))
    return reply(214, "2.0.0", f"Commands: {' '.join(verbs)}", "See RFC 5321")


class Behind(Enum):
    """What may be sent behind a command before its reply (RFC 2920 section 3.1)."""

    ANYTHING = "it may stand anywhere in a group"
    NOTHING = "it is the last of a group; those we know are forgiven"
    NOTHING_AT_ALL = "what is behind it would be taken for something that it is not"


class Row(msgspec.Struct, frozen=True):
    """A command: its function, and what the rules that all commands share need to know of it."""

    function: Callable[[Session, str], Reply]
    """May raise `SyntaxFault`, and changes nothing before it does."""
    states: frozenset[State]
    """Where it is legal; absence is an error (503 5.5.1)."""
    disorder: Reply = _GREET_FIRST
    """What is said elsewhere, once the client has greeted."""
    takes_argument: bool = True
    bad_address: str = "5.5.4"
    """The status of a malformed address."""
    available: Callable[[Session], bool] = lambda _: True
    """Whether this service has it at all; else it is not implemented."""
    behind: Behind = Behind.ANYTHING
    utf8: bool = False
    """Its argument may have more than US-ASCII."""
    needs_ehlo: bool = False
    needs_tls: bool = False
    """Not in clear, but where `Session.private` says otherwise."""
    needs_login: bool = False
    """Not before AUTH where the service is submission."""
    secret: bool = False
    """Its argument is nobody's business, and no log's."""
    octets: Callable[[str], Chunk] | None = None
    """Reads from the argument how many octets of content follow the line, whatever the reply is."""
    junk: bool = False
    """Leads nowhere by itself: counts as bad above the limit."""
    tries_recipient: bool = False
    """Its refusals in a transaction are treated with patience."""


_ANYWHERE: Final = frozenset(State)
_GREETED: Final = frozenset(State) - {State.START}
_IN_TRANSACTION: Final = frozenset({State.SENDER, State.RECIPIENT})
_NESTED: Final = reply(503, "5.5.1", "Error: nested MAIL command")
_NEED_MAIL: Final = reply(503, "5.5.1", "Error: need MAIL command")
_NOT_NOW: Final = reply(503, "5.5.1", "Error: AUTH not permitted during a mail transaction")

COMMANDS: Final[dict[str, Row]] = {
    "EHLO": Row(_ehlo, _ANYWHERE, behind=Behind.NOTHING, junk=True),
    "HELO": Row(_helo, _ANYWHERE, behind=Behind.NOTHING, junk=True),
    "STARTTLS": Row(
        _starttls,
        _GREETED,
        takes_argument=False,
        available=lambda session: session.site.tls != "none",
        behind=Behind.NOTHING_AT_ALL,
        needs_ehlo=True,
    ),
    "AUTH": Row(
        auth.authenticate,
        frozenset({State.READY}),
        _NOT_NOW,
        available=auth.available,
        behind=Behind.NOTHING,
        needs_ehlo=True,
        needs_tls=True,
        secret=True,
    ),
    "MAIL": Row(mail.mail, frozenset({State.READY}), _NESTED, bad_address="5.1.7", utf8=True, needs_login=True),
    "RCPT": Row(mail.rcpt, _IN_TRANSACTION, _NEED_MAIL, bad_address="5.1.3", utf8=True, tries_recipient=True),
    "DATA": Row(mail.data, _IN_TRANSACTION, _NEED_MAIL, takes_argument=False, behind=Behind.NOTHING),
    "BDAT": Row(mail.bdat, _IN_TRANSACTION | {State.CHUNKS}, _NEED_MAIL, octets=parse_chunk),
    "RSET": Row(_rset, _ANYWHERE, takes_argument=False, junk=True),
    "NOOP": Row(_noop, _ANYWHERE, junk=True),
    "HELP": Row(_help, _ANYWHERE, junk=True),
    "QUIT": Row(_quit, _ANYWHERE, takes_argument=False),
}


def dispatch(session: Session, command: Command, ahead: bool = False) -> Reply:
    """Do what the command says and return the reply to it.

    354 means that content follows, and 334 a line of the exchange; ``session.chunk``, when it is set, that so many octets
    follow whatever the reply is. A reply that sets ``session.closing`` is the last.

    Args:
        session: what is remembered.
        command: the line.
        ahead: whether the client has sent anything behind it already.
    """
    session.chunk = None
    row = COMMANDS.get(command.verb)
    if row is None or not row.available(session):
        session.last_verb = "UNKNOWN"
        if command.verb in FORBIDDEN:
            return _cut_off(session, reply(421, "4.7.0", f"{session.site.hostname} Error: this is a mail server"))
        return settle_account(session, _NOT_IMPLEMENTED)
    session.last_verb = command.verb
    if ahead and row.behind is not Behind.ANYTHING:
        if row.behind is Behind.NOTHING_AT_ALL:
            return _cut_off(session, _BEHIND_STARTTLS)
        if out_of_step(session):
            return _cut_off(session, _OUT_OF_STEP)
    if row.octets is not None:
        try:
            session.chunk = row.octets(command.argument)
        except SyntaxFault as fault:  # nobody knows now where commands begin again
            return _cut_off(session, reply(501, "5.5.4", f"Syntax: {fault}"))
        if session.chunk.octets > max(CHUNK_LIMIT, session.site.limits.message_size):
            return _cut_off(session, TOO_BIG)
    answer = _perform(session, row, command.argument)
    if session.chunk is not None and answer.positive:
        return answer  # it is settled when the chunk is here
    return settle_account(session, answer, row)


def out_of_step(session: Session) -> bool:
    """Whether a client that has sent ahead where it must not is to be cut off."""
    return session.site.strict_order and not session.known


def _cut_off(session: Session, answer: Reply) -> Reply:
    session.bad += 1
    session.chunk = None
    session.closing = True
    return answer


def cut_off(session: Session) -> Reply:
    """The last reply to a client that has sent ahead where it must not."""
    return _cut_off(session, _OUT_OF_STEP)


def _perform(session: Session, row: Row, argument: str) -> Reply:
    state = session.state
    if state not in row.states:
        if state is State.START:
            return _GREET_FIRST
        return _IN_CHUNKS if state is State.CHUNKS else row.disorder
    if row.needs_ehlo and not session.esmtp:
        return _EHLO_FIRST
    if argument and not row.takes_argument:
        return _NO_ARGUMENT
    if not row.utf8 and not argument.isascii():
        return _EIGHT_BIT
    if row.needs_tls and not session.private:
        return _NEEDS_TLS
    if row.needs_login and not session.login and session.site.policy.service == "submission":
        return _NEEDS_LOGIN
    try:
        return row.function(session, argument)
    except BadAddress as fault:
        return reply(501, row.bad_address, f"Syntax: {fault}")
    except SyntaxFault as fault:
        return reply(501, "5.5.4", f"Syntax: {fault}")
    except OSError:
        return _LOCAL_TROUBLE


def settle_account(session: Session, answer: Reply, row: Row | None = None, *, junk: bool = False) -> Reply:
    """Count a reply for or against the client; the reply that is to be sent: the same, or the 421 that ends the session.

    Args:
        session: whose counters.
        answer: the reply to a command, to a line that was none (no row), or to content.
        row: the command's.
        junk: it led nowhere, though its row does not say so.
    """
    limits = session.site.limits
    bad = answer.code >= 500
    if junk or (row is not None and row.junk):
        session.junk += 1
        bad = bad or session.junk > _most(session, limits.junk_commands)
    if row is not None and row.tries_recipient and session.transaction is not None and not answer.positive:
        bad = _out_of_patience(session, session.transaction, answer)
    if bad:
        session.bad += 1
        session.bad_in_a_row += 1
        most, in_a_row = _most(session, limits.bad_commands), _most(session, limits.bad_commands_in_a_row)
        if session.bad >= most or session.bad_in_a_row >= in_a_row:
            session.closing = True
            return reply(421, "4.7.0", f"{session.site.hostname} Error: too many errors")
    elif answer.positive:
        session.bad_in_a_row = 0
    return answer


def _most(session: Session, limit: int) -> int:
    """A limit of errors, and what is left of it under stress."""
    site = session.site
    return min(limit, site.limits.stress_bad_commands) if site.stressed() else limit


def _out_of_patience(session: Session, transaction: Transaction, answer: Reply) -> bool:
    if answer.temporary:
        transaction.put_off += 1
        return transaction.put_off > session.site.limits.recipients
    session.refused_recipients += 1
    return session.refused_recipients > REFUSED_RECIPIENTS
