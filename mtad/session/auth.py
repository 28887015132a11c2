"""AUTH: the exchange by which a client shows who it is (RFC 4954).

What it is for: `authenticate` is the command, `respond` takes each line that follows a 334, `refuse` a line that is none.
The mechanisms are in `mtad.smtp.sasl`; what is said of them, what is counted and when it ends is here.

Invariants: what a client sends here is in no reply, no log and no exception. A wrong password and an unknown login get the
same reply, after the same time. Who has tried too often, on this connection or (`Guard`) on any, gets 421 4.7.0 whatever it
says, so that not even a right password shows. After an exchange, well ended or not, lines are commands again.

Errors: an `OSError` of those who know the logins is 454 4.7.0.

Standards: RFC 4954 sections 4 and 6; RFC 4422 section 5.
"""

from __future__ import annotations

import re
import secrets
from typing import Final

from mtad.reply import Reply, reply
from mtad.session.state import Exchange, Session
from mtad.smtp.sasl import Claim, SaslFault, decode, encode, server_mechanism, server_mechanisms
from mtad.smtp.wire import LineFault

#: Wrong passwords on one connection before it is ended; mail programs try two or three mechanisms with the same one.
FAILURES: Final = 3

#: Seconds for which the reply to a wrong password is held back where no `Guard` says better.
PAUSE: Final = 1.0

#: Characters of a challenge, so that its line stays within the 512 octets of RFC 5321 section 4.5.3.1.5.
_LONGEST_CHALLENGE: Final = 500

#: Characters of a login that was tried in vain, for the log.
_CLAIM: Final = 80

# auth-command = "AUTH" SP mechanism [SP initial-response]; sasl-mech = 1*20( UPPER-ALPHA / DIGIT / "-" / "_" )
_ARGUMENT: Final = re.compile(r"([A-Za-z0-9_-]{1,20})(?: +(\S+))?")

_SUCCESS: Final = reply(235, "2.7.0", "Authentication successful")
_FAILURE: Final = reply(535, "5.7.8", "Error: authentication failed: login or password is wrong")
_ALREADY: Final = reply(503, "5.5.1", "Error: already authenticated")
_SYNTAX: Final = reply(501, "5.5.4", "Syntax: AUTH mechanism [initial-response]")
_UNKNOWN: Final = reply(504, "5.5.4", "Error: authentication mechanism is not supported")
_NOT_BASE64: Final = reply(501, "5.5.2", "Error: authentication failed: cannot decode response")
_ABORTED: Final = reply(501, "5.7.0", "Authentication aborted")
_TOO_LONG: Final = reply(500, "5.5.6", "Error: authentication exchange line is too long")
_BARE: Final = reply(501, "5.5.2", "Error: lines must end with CRLF")
_TROUBLE: Final = reply(454, "4.7.0", "Temporary authentication failure")


def offered(session: Session) -> tuple[str, ...]:
    """The mechanisms that this client may use now, the best first; none where AUTH is not to be."""
    if not available(session) or not session.private or session.login:
        return ()
    return server_mechanisms(session.tls.bindings if session.tls else {})


def available(session: Session) -> bool:
    """Whether there is AUTH on this service at all, if only inside TLS."""
    site = session.site
    return site.logins is not None and (site.policy.service == "submission" or site.logins.any())


def authenticate(session: Session, argument: str) -> Reply:
    """AUTH. A 334 means that `respond` is to get the next line."""
    site = session.site
    session.claimed = ""
    if session.login:
        return _ALREADY
    match = _ARGUMENT.fullmatch(argument)
    if match is None:
        return _SYNTAX
    if site.guard is not None and site.guard.refused(session.client.address):
        return _enough(session)
    name = match[1].upper()
    bindings = session.tls.bindings if session.tls else {}
    assert site.logins is not None
    steps = server_mechanism(name, site.logins, bindings, secrets.token_hex(18))
    if steps is None:
        return _UNKNOWN
    session.mechanism = name
    session.exchange = Exchange(name, steps)
    challenge = next(steps)
    if match[2] is None:
        return reply(334, "", encode(challenge))
    return _advance(session, session.exchange, b"" if match[2] == "=" else match[2].encode())


def respond(session: Session, line: bytes) -> Reply:
    """The next line of an exchange."""
    exchange = session.exchange
    assert exchange is not None
    if line == b"*":
        session.exchange = None
        return _ABORTED
    return _advance(session, exchange, line)


def refuse(session: Session, fault: LineFault) -> Reply:
    """A line that is none ends the exchange."""
    session.exchange = None
    return _TOO_LONG if fault is LineFault.TOO_LONG else _BARE


def _advance(session: Session, exchange: Exchange, line: bytes) -> Reply:
    session.exchange = None
    try:
        challenge = encode(exchange.steps.send(decode(line)))
    except StopIteration as end:
        return _conclude(session, end.value)
    except SaslFault:
        return _NOT_BASE64
    except OSError:
        return _TROUBLE
    if len(challenge) > _LONGEST_CHALLENGE:
        return _NOT_BASE64
    session.exchange = exchange
    return reply(334, "", challenge)


def _conclude(session: Session, claim: Claim) -> Reply:
    guard, address = session.site.guard, session.client.address
    session.claimed = "".join(c if c.isprintable() else "?" for c in claim.login[:_CLAIM])
    if guard is not None and guard.refused(address, claim.login):
        return _enough(session)
    if claim.proven:
        session.login = claim.login
        session.claimed = ""
        return _SUCCESS
    session.auth_failures += 1
    session.pause = guard.failed(address, claim.login) if guard is not None else PAUSE
    if session.auth_failures >= FAILURES:
        return _enough(session)
    return _FAILURE


def _enough(session: Session) -> Reply:
    session.closing = True
    return reply(421, "4.7.0", f"{session.site.hostname} Error: too many wrong passwords, try again later")
