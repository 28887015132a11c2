"""The Received: field that is put in front of every message we take (RFC 5321 section 4.4).

What it is for: a trace that a human can follow and that the loop counter of the next host can count.

Invariants: whatever a client or the DNS says, the field is four lines at most of what prints, each shorter than 998 octets:
the name after HELO and the addresses went through `mtad.smtp.grammar`, and a client name that is no domain becomes
``unknown``. More than US-ASCII is in an address only, of a message that is marked with UTF8SMTP.

Who logged in is not told: the field goes out into the world, and a login is half of a secret.

Errors: none.

Standards: RFC 5321 sections 4.1.3 (address literals), 4.4; RFC 5322 section 3.3 (dates); RFC 3848 (``with``); RFC 6531
sections 3.7.3 (UTF-8 in trace fields), 4.3.
"""

from __future__ import annotations

from email.utils import formatdate
from functools import lru_cache

from mtad.envelope import Envelope
from mtad.errors import SyntaxFault
from mtad.session.state import Client, Session
from mtad.smtp.grammar import parse_domain


def received_field(session: Session, envelope: Envelope) -> bytes:
    """The field for this message, CRLF at its end; ``for`` only when nobody else's address would be betrayed by it."""
    client, tls = session.client, session.tls
    # in the words of Postfix, which people and programs look for
    using = f"\r\n\t(using {tls.protocol} with cipher {tls.cipher} ({tls.bits}/{tls.bits} bits))" if tls else ""
    to = f"\r\n\tfor <{envelope.recipients[0].address}>" if len(envelope.recipients) == 1 else ""
    date = _date(int(envelope.arrival))
    return (
        f"Received: from {session.helo} ({_name(client)} {_literal(client.address)}){using}\r\n"
        f"\tby {session.site.hostname} (mtad) with {session.protocol} id {envelope.id}{to}; {date}\r\n"
    ).encode("utf-8", "replace")


def _name(client: Client) -> str:
    try:
        return parse_domain(client.name)
    except SyntaxFault:
        return "unknown"


def _literal(address: str) -> str:
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


@lru_cache(maxsize=8)
def _date(seconds: int) -> str:
    """The date and time in the zone of this host; messages come many to the second."""
    return formatdate(seconds, localtime=True)
