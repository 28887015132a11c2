"""What a scheduler has in hand: the tables that it shares with those who do a part of its work.

One thread has it, so nobody needs to lock anything. Who writes what: `Scheduler` takes messages in hand, and those that are
deferred onto the agenda; `mtad.scheduler.settling` lets them go; `mtad.scheduler.orders` does either when an administrator
says so.

Errors: none of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.agenda import Agenda
from mtad.scheduler.events import Events
from mtad.scheduler.moves import Moves
from mtad.spool.queues import Spool


class Hand:
    """The tables of one scheduler, and what it works with."""

    def __init__(self, spool: Spool, events: Events, clock: Callable[[], float], monotonic: Callable[[], float]) -> None:
        """Nothing is in hand. ``clock``: seconds since the epoch; ``monotonic``: seconds since any time."""
        self.spool = spool
        self.events = events
        self.clock = clock
        self.monotonic = monotonic
        self.messages: dict[str, ActiveMessage] = {}
        """Those of active, by queue id."""
        self.urgent: set[str] = set()
        """Queue ids for which a suspended lane is no obstacle when they are taken in hand."""
        self.agenda = Agenda()
        """Those of deferred, by the time of their next attempt."""
        self.moves = Moves(monotonic, events.warning)
        """Those that the disk refused, and that are tried again."""
