"""The commands of SMTP: each one function, all of them rows of one table.

What it is for: a function takes the session and the argument and returns the reply; the session is all that it changes.
What is the same for all commands is data in the row: in which states the command is legal and what is said when it comes
out of order, whether it takes an argument, which status a bad address has, whether it is junk or a try at a recipient.
`dispatch` reads the row, so no function repeats it. A command that is not in the table is not implemented: 502 5.5.1.

Counting: a refused command (5yz) is bad, and so is junk (NOOP, RSET, HELP, EHLO, HELO) above its limit between two
messages. Too many bad commands, in a row or in all, and the session ends with 421 4.7.0 in place of the reply. Recipients
are treated with patience, since a list with dead addresses is not an attack and RFC 5321 section 4.5.3.1.8 wants a hundred
of them heard: `REFUSED_RECIPIENTS` in a session are free, and in one transaction as many above the limit as the limit.

Errors: a function raises `SyntaxFault` for its argument (501) and lets `OSError` through (451 4.3.0); `dispatch` raises
nothing for what a client or the world can do.

Standards: RFC 5321 sections 3.2, 3.3, 4.1.1, 4.1.4, 4.2.4, 4.3.2; RFC 1870 (SIZE); RFC 6152 (8BITMIME); RFC 2920
(PIPELINING); RFC 2034 and 3463 (enhanced status codes).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import msgspec

from mtad.address import Address
from mtad.errors import SyntaxFault
from mtad.policy import Verdict
from mtad.reply import Reply, reply
from mtad.session.state import Session, State, Transaction
from mtad.smtp.grammar import BadAddress, Command, parse_helo, parse_mail, parse_rcpt

#: Recipients of one session that may be refused before each further one counts as a bad command. RFC 5321 section
#: 4.5.3.1.8 counts rejecting fewer than 100 as a fault; a client that guesses names needs more.
REFUSED_RECIPIENTS: Final = 100

OK: Final = reply(250, "2.0.0", "Ok")
_SENDER_OK: Final = reply(250, "2.1.0", "Ok")
_RECIPIENT_OK: Final = reply(250, "2.1.5", "Ok")
_BYE: Final = reply(221, "2.0.0", "Bye")
_GO_AHEAD: Final = reply(354, "", "End data with <CR><LF>.<CR><LF>")
_NOT_IMPLEMENTED: Final = reply(502, "5.5.1", "Error: command not implemented")
_NO_ARGUMENT: Final = reply(501, "5.5.4", "Syntax: command takes no argument")
_UNKNOWN_PARAMETER: Final = reply(555, "5.5.4", "Error: parameter not recognized or not implemented")
_NO_VALID_RECIPIENTS: Final = reply(554, "5.5.1", "Error: no valid recipients")
_NEED_RECIPIENT: Final = reply(503, "5.5.1", "Error: need RCPT command")
_GREET_FIRST: Final = reply(503, "5.5.1", "Error: send EHLO or HELO first")
_TOO_MANY_RECIPIENTS: Final = reply(452, "4.5.3", "Error: too many recipients")
_LOCAL_TROUBLE: Final = reply(451, "4.3.0", "Error: local trouble, try again later")
TOO_BIG: Final = reply(552, "5.3.4", "Error: message size exceeds fixed limit")

# size-value = 1*20DIGIT (RFC 1870 section 4)
_SIZE: Final = re.compile(r"[0-9]{1,20}")


def _ehlo(session: Session, argument: str) -> Reply:
    session.helo = parse_helo(argument)
    session.esmtp = True
    session.transaction = None
    site = session.site
    offers = ("PIPELINING", f"SIZE {site.limits.message_size}", "8BITMIME", "ENHANCEDSTATUSCODES")
    return reply(250, "", site.hostname, *offers)


def _helo(session: Session, argument: str) -> Reply:
    session.helo = parse_helo(argument)
    session.esmtp = False
    session.transaction = None
    return reply(250, "", session.site.hostname)


def _mail(session: Session, argument: str) -> Reply:
    parsed = parse_mail(argument)
    for keyword, value in parsed.parameters.items():
        check = _MAIL_PARAMETERS.get(keyword)
        if check is None:
            return _UNKNOWN_PARAMETER
        refusal = check(session, value)
        if refusal is not None:
            return refusal
    session.transaction = Transaction(parsed.address)
    return _SENDER_OK


def _size(session: Session, value: str) -> Reply | None:
    """RFC 1870 section 6.1: what is declared too big is refused before it is sent."""
    if _SIZE.fullmatch(value) is None:
        raise SyntaxFault("expected SIZE=number")
    return TOO_BIG if int(value) > session.site.limits.message_size else None


def _body(_session: Session, value: str) -> Reply | None:
    """RFC 6152 section 3: content passes through as it is, so that either value means the same to us."""
    if value.upper() not in {"7BIT", "8BITMIME"}:
        raise SyntaxFault("expected BODY=7BIT or BODY=8BITMIME")
    return None


_MAIL_PARAMETERS: Final[dict[str, Callable[[Session, str], Reply | None]]] = {"SIZE": _size, "BODY": _body}


def _rcpt(session: Session, argument: str) -> Reply:
    transaction = session.transaction
    assert transaction is not None
    transaction.attempted = True
    parsed = parse_rcpt(argument)
    if parsed.parameters:
        return _UNKNOWN_PARAMETER
    address = parsed.address
    verdict = session.site.policy.judge(address, session.trusted)
    if verdict not in _WELCOME:
        code, enhanced, text = _REFUSALS[verdict]
        return reply(code, enhanced, f"<{address}>: {text}")
    if not address.domain:
        address = Address(address.local, session.site.policy.first_domain or session.site.hostname.lower())
    # The local part of a foreign address is compared by the letter (RFC 5321 section 2.4): only its host knows better.
    key = address.key if verdict is Verdict.LOCAL else str(address)
    if key not in transaction.recipients:
        if len(transaction.recipients) >= session.site.limits.recipients:
            return _TOO_MANY_RECIPIENTS
        transaction.recipients[key] = str(address)
    return _RECIPIENT_OK


_WELCOME: Final = frozenset({Verdict.LOCAL, Verdict.RELAY})
_REFUSALS: Final = {
    Verdict.UNKNOWN_USER: (550, "5.1.1", "Recipient address rejected: User unknown"),
    Verdict.NOT_OURS: (550, "5.7.1", "Relay access denied"),
    Verdict.NOT_TRUSTED: (554, "5.7.1", "Relay access denied"),
    Verdict.NOT_AUTHENTICATED: (530, "5.7.0", "Authentication required"),
}


def _data(session: Session, _argument: str) -> Reply:
    transaction = session.transaction
    assert transaction is not None
    if transaction.recipients:
        return _GO_AHEAD
    return _NO_VALID_RECIPIENTS if transaction.attempted else _NEED_RECIPIENT


def _rset(session: Session, _argument: str) -> Reply:
    session.transaction = None
    return OK


def _noop(_session: Session, _argument: str) -> Reply:
    return OK


def _quit(session: Session, _argument: str) -> Reply:
    session.closing = True
    return _BYE


def _help(_session: Session, _argument: str) -> Reply:
    return reply(214, "2.0.0", f"Commands: {' '.join(COMMANDS)}", "See RFC 5321")


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
    junk: bool = False
    """Leads nowhere by itself: counts as bad above the limit."""
    tries_recipient: bool = False
    """Its refusals in a transaction are treated with patience."""


_ANYWHERE: Final = frozenset(State)
_IN_TRANSACTION: Final = frozenset({State.SENDER, State.RECIPIENT})
_NESTED: Final = reply(503, "5.5.1", "Error: nested MAIL command")
_NEED_MAIL: Final = reply(503, "5.5.1", "Error: need MAIL command")

COMMANDS: Final[dict[str, Row]] = {
    "EHLO": Row(_ehlo, _ANYWHERE, junk=True),
    "HELO": Row(_helo, _ANYWHERE, junk=True),
    "MAIL": Row(_mail, frozenset({State.READY}), _NESTED, bad_address="5.1.7"),
    "RCPT": Row(_rcpt, _IN_TRANSACTION, _NEED_MAIL, bad_address="5.1.3", tries_recipient=True),
    "DATA": Row(_data, _IN_TRANSACTION, _NEED_MAIL, takes_argument=False),
    "RSET": Row(_rset, _ANYWHERE, takes_argument=False, junk=True),
    "NOOP": Row(_noop, _ANYWHERE, junk=True),
    "HELP": Row(_help, _ANYWHERE, junk=True),
    "QUIT": Row(_quit, _ANYWHERE, takes_argument=False),
}


def dispatch(session: Session, command: Command) -> Reply:
    """Do what the command says and return the reply to it; 354 means that content follows."""
    row = COMMANDS.get(command.verb)
    if row is None:
        session.last_verb = "UNKNOWN"
        return settle_account(session, _NOT_IMPLEMENTED)
    session.last_verb = command.verb
    return settle_account(session, _perform(session, row, command.argument), row)


def _perform(session: Session, row: Row, argument: str) -> Reply:
    state = session.state
    if state not in row.states:
        return _GREET_FIRST if state is State.START else row.disorder
    if argument and not row.takes_argument:
        return _NO_ARGUMENT
    try:
        return row.function(session, argument)
    except BadAddress as fault:
        return reply(501, row.bad_address, f"Syntax: {fault}")
    except SyntaxFault as fault:
        return reply(501, "5.5.4", f"Syntax: {fault}")
    except OSError:
        return _LOCAL_TROUBLE


def settle_account(session: Session, answer: Reply, row: Row | None = None) -> Reply:
    """Count a reply for or against the client; the reply that is to be sent: the same, or the 421 that ends the session.

    Args:
        session: whose counters.
        answer: the reply to a command, to a line that was none (no row), or to content.
        row: the command's.
    """
    limits = session.site.limits
    bad = answer.code >= 500
    if row is not None:
        if row.junk:
            session.junk += 1
            bad = bad or session.junk > limits.junk_commands
        if row.tries_recipient and session.transaction is not None and not answer.positive:
            bad = _out_of_patience(session, session.transaction, answer)
    if bad:
        session.bad += 1
        session.bad_in_a_row += 1
        if session.bad >= limits.bad_commands or session.bad_in_a_row >= limits.bad_commands_in_a_row:
            session.closing = True
            return reply(421, "4.7.0", f"{session.site.hostname} Error: too many errors")
    elif answer.positive:
        session.bad_in_a_row = 0
    return answer


def _out_of_patience(session: Session, transaction: Transaction, answer: Reply) -> bool:
    if answer.temporary:
        transaction.put_off += 1
        return transaction.put_off > session.site.limits.recipients
    session.refused_recipients += 1
    return session.refused_recipients > REFUSED_RECIPIENTS
