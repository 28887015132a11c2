"""What a simulation shows: a table of who waited for how long, and the invariants that must hold on every day."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from tools.lib.simulate import Simulation

_ROW = "{:<12} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8}"


class Finding(msgspec.Struct, frozen=True):
    """One invariant."""

    good: bool
    what: str


def duration(seconds: float) -> str:
    """For people, in three digits or so: ``0.28 s``, ``5.3 min``, ``1.9 h``."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def table(simulation: Simulation) -> str:
    """Kinds of destinations, and how long their recipients waited from arrival to delivery."""
    rows = [_ROW.format("destination", "recipients", "median", "90 %", "99 %", "longest", "deferred", "bounced", "starved")]
    for kind, waits in sorted(simulation.waits.items()):
        times = [duration(waits.at(part)) for part in (0.5, 0.9, 0.99, 1.0)]
        rows.append(_ROW.format(kind, len(waits.seconds), *times, waits.deferred, waits.bounced, waits.starved))
    return "\n".join(rows)


def verdict(simulation: Simulation) -> Sequence[Finding]:
    """The invariants."""
    settled = simulation.delivered + simulation.bounced
    delivery = simulation.plan.config.delivery
    limit = delivery.destination_concurrency
    most = max(simulation.most.values(), default=0)
    starved = sum(waits.starved for waits in simulation.waits.values())
    close = too_close(simulation)
    return (
        Finding(
            settled == simulation.arrived and not simulation.left,
            f"nothing lost: {simulation.arrived} recipients, {simulation.delivered} delivered, "
            f"{simulation.bounced} bounced, {simulation.left} messages left",
        ),
        Finding(most <= limit, f"no lane over its limit: at most {most} of {limit} at a time"),
        Finding(not starved, f"nobody starved: {starved} jobs were ready for over ten minutes before they were started"),
        Finding(not close, f"a suspended lane costs one probe a period: {close} attempts came too early"),
        Finding(not simulation.events.warnings, f"no warnings: {len(simulation.events.warnings)}"),
    )


def too_close(simulation: Simulation) -> int:
    """Attempts at a dead destination that came before the pause was over, once its window had closed."""
    pause = simulation.plan.config.retry.destination_pause
    window = simulation.plan.config.delivery.destination_concurrency
    found = 0
    for times in simulation.probes.values():
        # As many as the window was wide when it died may be under way, or follow each other until it is closed.
        later = times[window:]
        found += sum(second - first < pause for first, second in pairwise(later))
    return found
