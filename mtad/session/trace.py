"""The Received: field that is put in front of every message we take (RFC 5321 section 4.4).

What it is for: a trace that a human can follow and that the loop counter of the next host can count.

Invariants: whatever a client or the DNS says, the field is three lines of printable US-ASCII at most, each shorter than 998
octets: the name after HELO and the addresses went through `mtad.smtp.grammar`, and a client name that is no domain becomes
``unknown``.

Errors: none.

Standards: RFC 5321 sections 4.1.3 (address literals), 4.4; RFC 5322 section 3.3 (dates); RFC 3848 (``with``).
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
    client = session.client
    to = f"\r\n\tfor <{envelope.recipients[0].address}>" if len(envelope.recipients) == 1 else ""
    date = _date(int(envelope.arrival))
    return (
        f"Received: from {session.helo} ({_name(client)} {_literal(client.address)})\r\n"
        f"\tby {session.site.hostname} (mtad) with {session.protocol} id {envelope.id}{to}; {date}\r\n"
    ).encode("ascii", "replace")


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
