"""What became of one recipient in one attempt: a closed union of three values.

Delivered: the next hop took the responsibility. Deferred: not now, try again. Failed: never, tell the sender. Whatever is
not known to be one of the others is Deferred: an unknown failure is temporary.
"""

from __future__ import annotations

import msgspec


class _Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    status: str
    """Enhanced status code (RFC 3463), such as "4.4.1"."""
    text: str
    """What happened, for logs, `mtaq` and reports, on one line of printable characters."""
    remote: str = ""
    """Host name of the server that decided; "" when the decision was ours."""
    reply: str = ""
    """What that server said, word for word ("550 5.1.1 ..."); "" when it said nothing."""


class Delivered(_Outcome, frozen=True, tag="delivered"):
    """The recipient is done: stored, or taken over by the next hop."""

    dsn: bool = False
    """The next hop took over the duty to report, too (RFC 3461 section 5.2.2): it was told what the sender wants."""


class Deferred(_Outcome, frozen=True, tag="deferred"):
    """The recipient stays in the queue."""

    destination: bool = False
    """True when the destination as a whole was out of reach (connection, greeting, DNS), not just this recipient."""


class Failed(_Outcome, frozen=True, tag="failed"):
    """The recipient will not be tried again; the sender gets a report."""


Outcome = Delivered | Deferred | Failed


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True, tag="attempt"):
    """One try to hand recipients over to one host; the history of a message is a list of these.

    ``started`` and ``active`` are in seconds since the epoch; ``active`` is when the scheduler took the message in hand for
    this attempt, 0 when that is not known. ``connection`` and ``transmission`` are seconds: until the session stood (DNS,
    connect, greeting, EHLO), and from MAIL to the last reply. With the time until ``active``, and from then to ``started``,
    they are the ``delays=a/b/c/d`` of the log. ``outcomes`` pairs the index of each recipient in the envelope with what
    became of it.
    """

    started: float
    outcomes: tuple[tuple[int, Outcome], ...]
    host: str = ""
    """The host's name as routing gave it; "local" for a Maildir; "" when it never came to a host."""
    address: str = ""
    """``192.0.2.1:25`` or ``[2001:db8::1]:25``."""
    tls: str = ""
    """Protocol and cipher, or "" for clear text."""
    connection: float = 0.0
    transmission: float = 0.0
    active: float = 0.0

    @property
    def relay(self) -> str:
        """Host and address as the log shows them: ``mx.example.org[192.0.2.1]:25``, or ``none``."""
        if not self.address:
            return self.host or "none"
        host, _, port = self.address.rpartition(":")
        return f"{self.host}[{host.strip('[]')}]:{port}"
