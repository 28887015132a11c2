"""What a server's words, or its silence, mean for a recipient: replies and faults to outcomes, in the words of Postfix.

`Place` is a server as texts name it, ``mx.example.org[192.0.2.1]``, and as attempts record it. All functions are pure.

Invariants: texts are one line of printable characters, for `mtad.smtp.replies` left nothing else in a reply; a reply is cut
at `REPLY_LIMIT`. What is not a refusal for good is Deferred.
"""

from __future__ import annotations

from typing import Final

import msgspec

from mtad.errors import MtadError
from mtad.net.connection import ConnectionLost, TimedOut
from mtad.outcome import Deferred, Delivered, Failed, Outcome
from mtad.reply import Reply
from mtad.smtp.dialogue import PHASES, Phase, Verdict

#: Characters of a reply that are kept in outcomes: a report with a thousand of them is still a readable document.
REPLY_LIMIT: Final = 1000


class Place(msgspec.Struct, frozen=True):
    """A server. ``port`` is 0 and all else empty for no server."""

    host: str = ""
    address: str = ""
    port: int = 0
    tls: str = ""

    def __str__(self) -> str:
        return f"{self.host}[{self.address}]"

    @property
    def peer(self) -> str:
        """``192.0.2.1:25`` or ``[2001:db8::1]:25``; "" for no server."""
        if not self.address:
            return ""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


NOWHERE: Final = Place()


def outcome_of(verdict: Verdict, at: Place, *, dsn: bool) -> Outcome:
    """What a server's word means for a recipient; ``dsn``: the server knows what the sender wants to be told."""
    said = cut(verdict.reply)
    if verdict.accepted:
        return Delivered(status_of(verdict.reply, "2"), said, at.host, said, dsn=dsn)
    text = f"host {at} said: {said} (in reply to {PHASES[verdict.phase].request})"
    if verdict.permanent:
        return Failed(status_of(verdict.reply, "5"), text, at.host, said)
    return Deferred(status_of(verdict.reply, "4"), text, at.host, said)


def refused(refusal: Verdict, at: Place, whole: bool) -> Deferred:
    """A server that does not want to talk: always temporary, another one may want to (Postfix: smtp_skip_5xx_greeting)."""
    said = cut(refusal.reply)
    text = f"host {at} refused to talk to me: {said}"
    return Deferred(status_of(refusal.reply, "4"), text, at.host, said, destination=whole)


def broken(error: MtadError, at: Place, phase: Phase, whole: bool) -> Deferred:
    """A dialogue that did not come to its end."""
    activity = PHASES[phase].activity
    if isinstance(error, TimedOut):
        return Deferred("4.4.2", f"conversation with {at} timed out while {activity}", at.host, destination=whole)
    if isinstance(error, ConnectionLost):
        return Deferred("4.4.2", f"lost connection with {at} while {activity}", at.host, destination=whole)
    return Deferred("4.5.0", f"protocol error of {at} while {activity}: {error}", at.host, destination=whole)


def status_of(reply: Reply, kind: str) -> str:
    """The enhanced status of a reply in the class that the reply is taken for."""
    return kind + (reply.enhanced[1:] or ".0.0")


def cut(reply: Reply) -> str:
    """What was said, of bearable length."""
    return reply.text[:REPLY_LIMIT]
