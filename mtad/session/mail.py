"""MAIL, RCPT, DATA and BDAT: the commands of a transaction.

What it is for: each is a function of the session and the argument, as `mtad.session.commands` wants them in its table. The
parameters of MAIL and RCPT are two tables of their own: a keyword and the function that notes down what its value says.

Invariants: a command that is refused has changed nothing. What a client may not do is refused here at the first command
that shows it: a sender that is not the login's, an address beyond US-ASCII without SMTPUTF8, a message that is declared too
big.

Errors: `SyntaxFault` (501), as all functions of the table.

Standards: RFC 5321 sections 3.3, 4.1.1.2 to 4.1.1.4; RFC 1870 (SIZE); RFC 6152 (8BITMIME); RFC 3030 (BINARYMIME, CHUNKING);
RFC 3461 section 4 (DSN); RFC 4954 section 5 (AUTH=); RFC 6531 section 3.4 (SMTPUTF8); RFC 9422 (RCPTMAX).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from mtad.address import Address
from mtad.envelope import Recipient
from mtad.errors import SyntaxFault
from mtad.policy import Verdict
from mtad.reply import Reply, reply
from mtad.session import auth
from mtad.session.state import Session, State, Transaction
from mtad.smtp import parameters
from mtad.smtp.grammar import parse_mail, parse_rcpt

TOO_BIG: Final = reply(552, "5.3.4", "Error: message size exceeds fixed limit")
_OK: Final = reply(250, "2.0.0", "Ok")
_SENDER_OK: Final = reply(250, "2.1.0", "Ok")
_RECIPIENT_OK: Final = reply(250, "2.1.5", "Ok")
_GO_AHEAD: Final = reply(354, "", "End data with <CR><LF>.<CR><LF>")
_UNKNOWN_PARAMETER: Final = reply(555, "5.5.4", "Error: parameter not recognized or not implemented")
_NO_VALID_RECIPIENTS: Final = reply(554, "5.5.1", "Error: no valid recipients")
_NEED_RECIPIENT: Final = reply(503, "5.5.1", "Error: need RCPT command")
_NEED_BDAT: Final = reply(503, "5.5.1", "Error: BODY=BINARYMIME needs BDAT")
_NEED_SMTPUTF8: Final = reply(553, "5.6.7", "Error: an address beyond US-ASCII needs the parameter SMTPUTF8")
_TOO_MANY_RECIPIENTS: Final = reply(452, "4.5.3", "Error: too many recipients")


def mail(session: Session, argument: str) -> Reply:
    """MAIL: begin a transaction."""
    parsed = parse_mail(argument)
    transaction = Transaction(parsed.address)
    for keyword, value in parsed.parameters.items():
        note = _MAIL_PARAMETERS.get(keyword)
        if note is None:
            return _UNKNOWN_PARAMETER
        refusal = note(session, transaction, value)
        if refusal is not None:
            return refusal
    if parsed.utf8 and not transaction.smtputf8:
        return _NEED_SMTPUTF8
    if session.login and not session.site.policy.owns(session.login, parsed.address):
        return reply(550, "5.7.1", f"<{parsed.address}>: Sender address rejected: not owned by the authenticated user")
    session.transaction = transaction
    return _SENDER_OK


def _size(session: Session, _transaction: Transaction, value: str) -> Reply | None:
    """RFC 1870 section 6.1: what is declared too big is refused before it is sent."""
    return TOO_BIG if parameters.parse_size(value) > session.site.limits.message_size else None


def _body(_session: Session, transaction: Transaction, value: str) -> None:
    transaction.body = parameters.parse_body(value)


def _smtputf8(_session: Session, transaction: Transaction, value: str) -> None:
    if value:
        raise SyntaxFault("SMTPUTF8 has no value")
    transaction.smtputf8 = True


def _ret(_session: Session, transaction: Transaction, value: str) -> None:
    transaction.ret = parameters.parse_ret(value)


def _envid(_session: Session, transaction: Transaction, value: str) -> None:
    transaction.envid = parameters.parse_envid(value)


def _auth(session: Session, _transaction: Transaction, value: str) -> Reply | None:
    """RFC 4954 section 5. What a client says of others is read and not believed: nothing here depends on it."""
    if not auth.available(session):
        return _UNKNOWN_PARAMETER
    parameters.parse_auth(value)
    return None


_Noted = Reply | None
_MAIL_PARAMETERS: Final[dict[str, Callable[[Session, Transaction, str], _Noted]]] = {
    "SIZE": _size,
    "BODY": _body,
    "SMTPUTF8": _smtputf8,
    "RET": _ret,
    "ENVID": _envid,
    "AUTH": _auth,
}

_RCPT_PARAMETERS: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "NOTIFY": ("notify", parameters.parse_notify),
    "ORCPT": ("orcpt", parameters.parse_orcpt),
}


def rcpt(session: Session, argument: str) -> Reply:
    """RCPT: one more recipient."""
    transaction = session.transaction
    assert transaction is not None
    transaction.attempted = True
    parsed = parse_rcpt(argument)
    wishes: dict[str, Any] = {}
    for keyword, value in parsed.parameters.items():
        parameter = _RCPT_PARAMETERS.get(keyword)
        if parameter is None:
            return _UNKNOWN_PARAMETER
        wishes[parameter[0]] = parameter[1](value)
    if parsed.utf8 and not transaction.smtputf8:
        return _NEED_SMTPUTF8
    address = parsed.address
    policy = session.site.policy
    verdict = policy.judge(address, session.known)
    if verdict not in _WELCOME:
        code, enhanced, text = _REFUSALS[verdict]
        return reply(code, enhanced, f"<{address}>: {text}")
    if not address.domain:
        address = Address(address.local, policy.first_domain or session.site.hostname.lower())
    # The local part of a foreign address is compared by the letter (RFC 5321 section 2.4): only its host knows better.
    key = address.key if verdict is Verdict.LOCAL else str(address)
    if key not in transaction.recipients:
        if len(transaction.recipients) >= session.site.limits.recipients:
            return _TOO_MANY_RECIPIENTS
        transaction.recipients[key] = Recipient(str(address), **wishes)
    return _RECIPIENT_OK


_WELCOME: Final = frozenset({Verdict.LOCAL, Verdict.RELAY})
_REFUSALS: Final = {
    Verdict.UNKNOWN_USER: (550, "5.1.1", "Recipient address rejected: User unknown"),
    Verdict.NOT_OURS: (550, "5.7.1", "Relay access denied"),
    Verdict.NOT_TRUSTED: (554, "5.7.1", "Relay access denied"),
    Verdict.NOT_AUTHENTICATED: (530, "5.7.0", "Authentication required"),
}


def data(session: Session, _argument: str) -> Reply:
    """DATA: 354, the content follows up to its dot."""
    transaction = session.transaction
    assert transaction is not None
    if not transaction.recipients:
        return _NO_VALID_RECIPIENTS if transaction.attempted else _NEED_RECIPIENT
    return _NEED_BDAT if transaction.body == "binarymime" else _GO_AHEAD


def bdat(session: Session, _argument: str) -> Reply:
    """BDAT: a chunk of content follows, and is read whatever is said here (RFC 3030 section 2)."""
    transaction = session.transaction
    assert transaction is not None
    if session.state is State.SENDER:
        return _NO_VALID_RECIPIENTS if transaction.attempted else _NEED_RECIPIENT
    transaction.chunks = True
    return _OK
