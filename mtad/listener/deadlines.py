"""How long a client may take, in calm and under stress.

What it is for: `Stress` knows whether the server is nearly full and holds the `Allowance` of that moment; a session's
`Deadline` says how long to wait for its client. There is a deadline for each command; one for the whole of a message's
content, from its first octet, however many chunks it comes in; and inside the content a least rate. The rate is a credit
of so many seconds, which time uses up and octets fill again, but never above what it was at first (as Postfix does it). So
a client may pause, and it may be slow for a while, but not for long.

Stress begins when more than two thirds of the connections that there may be are in use, and ends when it is less than half
of them, so that it does not come and go with each client. It holds for sessions that are there already, too: who has been
silent for longer than is now allowed is found by each listener process within a second (`mtad.listener.process`).

Invariants: an allowance of stress is never more generous than that of calm. The time is a parameter.

Standards: RFC 5321 section 4.5.3.2.7 wants five minutes for a command; a server that is nearly full does not have them, and
Postfix does not give them then, either (STRESS_README).
"""

from __future__ import annotations

from math import inf
from typing import Final

import msgspec

from mtad.config import Limits

#: A session that is not waiting for its client, as the time at which it began to wait.
BUSY: Final = inf


class Allowance(msgspec.Struct, frozen=True):
    """Seconds that a client has."""

    command: float
    tls: float
    content: float
    """For the whole of a message's content."""
    window: float
    """For content that comes more slowly than it must, or not at all."""
    octet: float
    """What an octet of content adds to what is left of ``window``."""


def allowance(limits: Limits, *, stressed: bool = False) -> Allowance:
    """What the settings give, in calm or under stress."""
    most = float(limits.stress_timeout) if stressed else inf
    return Allowance(
        min(most, limits.command_timeout),
        min(most, limits.tls_timeout),
        float(limits.data_timeout),
        min(most, limits.data_window if limits.data_rate else inf),
        1.0 / limits.data_rate if limits.data_rate else inf,
    )


class Stress:
    """Whether the server is nearly full. Read by all threads, changed by one."""

    def __init__(self, limits: Limits) -> None:
        self._calm = allowance(limits)
        self._stressed = allowance(limits, stressed=True)
        self._above = limits.connections * 2 // 3
        self._below = limits.connections // 2
        self.on = False
        self.allowance = self._calm
        """What holds at the moment."""

    def note(self, sessions: int) -> bool:
        """The server has so many sessions now; whether that changed anything."""
        if sessions > self._above:
            on = True
        elif sessions < self._below or not sessions:
            on = False
        else:
            return False
        changed = on is not self.on
        if changed:
            self.on = on
            self.allowance = self._stressed if on else self._calm
        return changed


class Deadline:
    """What one session's client has to keep. Times are seconds of one clock that never goes back."""

    __slots__ = ("_due", "_end", "_late", "_whose", "in_content", "since", "wait")

    def __init__(self, now: float, allowed: Allowance) -> None:
        """A command is awaited."""
        self._whose: object = None
        self._end = self._late = inf
        self.begin(now, allowed, None, in_content=False)

    def begin(self, now: float, allowed: Allowance, transaction: object, *, in_content: bool) -> None:
        """Something was complete, and the next is awaited: a command, or content of this transaction (None: no one's)."""
        self.in_content = in_content
        """Whether content is awaited."""
        self.since = now
        """Since when it is; for content, when octets last came."""
        if transaction is not self._whose:
            self._whose = transaction
            self._end = inf
        if in_content:
            if self._end is inf:
                self._end = now + allowed.content
            self._due = self._end
            self._late = now + allowed.window
            self.wait = min(allowed.window, self._due - now)
            """Seconds for which to wait for octets; not above 0 when the time is over."""
        else:
            self.wait = allowed.command
            self._due = now + self.wait
            if self._due > self._end:  # between two chunks
                self._due = self._end
                self.wait = self._due - now

    def received(self, now: float, octets: int, allowed: Allowance) -> None:
        """Octets came, and nothing is complete."""
        self.wait = self._due - now
        if self.in_content:
            self.since = now
            late = self._late + octets * allowed.octet
            left = late - now
            if left >= allowed.window:
                left = allowed.window  # the same number each time: the connection's setting stays
                late = now + left
            self._late = late
            self.wait = min(self.wait, left)

    def silence(self, now: float) -> None:
        """The wait was in vain; for content there may be some left."""
        self.wait = min(self._due, self._late) - now if self.in_content else 0.0
