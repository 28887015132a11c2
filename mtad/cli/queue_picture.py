"""The picture of `mtaq watch`: the scheduler's numbers, and its lanes, the busiest first.

What others have said (destinations, replies) is put in as text, never as markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from mtad.cli.queue_facts import Look
from mtad.cli.times import age, plural
from mtad.desk import Lanes, LaneView
from mtad.queue_causes import SchedulerState

#: Lines of the picture that are no lanes.
FRAME: Final = 9

#: Characters of a lane's name, and of all that stands beside it.
_SHORTEST_NAME: Final = 16
_LONGEST_NAME: Final = 50
_NUMBERS: Final = 61

_STATES: Final[Mapping[SchedulerState, tuple[str, str]]] = {
    "running": ("mtad runs", "green"),
    "silent": ("mtad runs, but its scheduler does not answer (see its log)", "red"),
    "starting": ("mtad runs, but has no scheduler at this moment", "yellow"),
    "down": ("mtad is not running, so nothing is delivered (mtad start)", "red"),
}


def picture(look: Look, before: Look | None, rows: int, width: int) -> RenderableType:
    """The picture, with at most ``rows`` lines about lanes; the rates are those since the look ``before``."""
    words, colour = _STATES[look.state]
    if look.state == "running" and look.lanes is not None:
        words += f" for {age(look.at - look.lanes.started)}; scheduler {look.pid}, deliveries in "
        words += ", ".join(map(str, look.lanes.processes)) or "no process yet"
    parts: list[RenderableType] = [Text(words, style=colour)]
    parts.append(Text("queues     " + ", ".join(f"{name} {count:,}" for name, count in look.queues.items())))
    if look.lanes is not None:
        parts += _numbers(look.lanes, before, look.at)
        lines, shown = _lane_lines(look.lanes, before, look.at, rows, width)
        parts += lines
        if look.lanes.count > shown:
            parts.append(Text(f"and {plural(look.lanes.count - shown, 'more lane')}", style="dim"))
    return Group(*parts)


def _numbers(lanes: Lanes, before: Look | None, now: float) -> list[Text]:
    total = f"in hand    {plural(lanes.active, 'message')}; {lanes.in_flight:,} in delivery, {lanes.waiting:,} waiting; "
    total += f"{plural(lanes.count, 'lane')}, {lanes.suspended} suspended"
    done = f"so far     {lanes.delivered:,} delivered, {lanes.deferrals:,} put off, {lanes.failed:,} failed"
    if before is not None and before.lanes is not None and before.lanes.started == lanes.started:
        done += f"; {_rate(lanes.delivered - before.lanes.delivered, now - before.at)} delivered now"
    return [Text(total), Text(done)]


def _rate(count: int, seconds: float) -> str:
    """How many a second, or a minute where that is less than one."""
    per_second = count / seconds if seconds > 0 else 0.0
    return f"{per_second:.0f}/s" if per_second >= 1 or not count else f"{per_second * 60:.0f}/min"


def _lane_lines(lanes: Lanes, before: Look | None, now: float, rows: int, width: int) -> tuple[list[Text], int]:
    """One line for a lane, and one below it for what went wrong there last; how many lanes are shown in ``rows`` lines."""
    if not lanes.lanes:
        return [], 0
    shown = 0
    room = max(_SHORTEST_NAME, min(_LONGEST_NAME, width - _NUMBERS))
    lines = [Text(f"{'lane':<{room}} {'state':<28}{'done':>7}{'open':>9}{'waiting':>8}{'oldest':>8}", style="bold")]
    earlier = (
        {(lane.transport, lane.destination): lane.done for lane in before.lanes.lanes} if before and before.lanes else {}
    )
    for lane in lanes.lanes:
        troubles = lane.reply or lane.reason
        if len(lines) + bool(troubles) > rows:
            break
        shown += 1
        done = earlier.get((lane.transport, lane.destination))
        rate = f"{lane.done:,}" if done is None or before is None else _rate(lane.done - done, now - before.at)
        words, colour = state_of(lane, now)
        name = name_of(lane)
        line = Text(f"{name if len(name) <= room else name[: room - 1] + '…':<{room}} ", no_wrap=True, overflow="ellipsis")
        line.append(f"{words:<28}", style=colour)
        oldest = age(now - lane.oldest) if lane.oldest else ""
        line.append(f"{rate:>7}{f'{lane.in_flight}/{lane.window}/{lane.limit}':>9}{lane.waiting:>8,}{oldest:>8}".rstrip())
        lines.append(line)
        if troubles:
            lines.append(Text(f"  {troubles}", style="dim", no_wrap=True, overflow="ellipsis"))
    return [Text(""), *lines], shown


def name_of(lane: LaneView) -> str:
    """What a lane is called."""
    if lane.transport == "local":
        return "mailboxes here"
    if lane.transport == "bounce":
        return "reports"
    return f"{lane.destination} ({lane.group})" if lane.group else lane.destination


def state_of(lane: LaneView, now: float) -> tuple[str, str]:
    """How far a lane is open, in words, and in which colour to say so."""
    if lane.suspended_since:
        probe = f"probe {_brief(lane.suspended_until - now)}" if lane.suspended_until > now else "probe next"
        return f"suspended {_brief(now - lane.suspended_since)}, {probe}", "red"
    if lane.rate and lane.next_start > now:
        return f"rate {lane.rate}, next in {_brief(lane.next_start - now + 0.5)}", "yellow"
    if lane.waiting and lane.in_flight >= lane.window:
        return ("full", "yellow") if lane.window >= lane.limit else ("opening", "yellow")
    if not (lane.waiting or lane.in_flight):
        return "idle", "dim"
    return ("open, IPv4 only", "green") if lane.ipv4_until > now else ("open", "green")


def _brief(seconds: float) -> str:
    """A duration in its largest unit."""
    return age(seconds).partition(" ")[0]
