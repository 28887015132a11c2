"""``mtaq --by``: the queue in groups, with counts and ages: ten thousand messages become ten lines.

The ages are in the columns of Postfix's qshape: messages that are in the queue for up to 5 minutes, up to 10, 20 ... 1280,
and for longer. A message with recipients in several groups counts in each of them, and once in the total.

Messages are read one by one and forgotten: what is kept are counts, as many as there are groups.
"""

from __future__ import annotations

import shutil
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Final, Literal, TextIO

import click
import msgspec

from mtad.address import domain_of
from mtad.cli.times import age
from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.outcome import Deferred, Failed
from mtad.progress import RecipientState
from mtad.reasons import normalised
from mtad.spool.queue_file import StoredMessage
from mtad.spool.queues import LIVE, Queue, Spool

By = Literal["destination", "sender", "reason"]

#: Minutes: the upper ends of all columns but the last.
BOUNDS: Final = (5, 10, 20, 40, 80, 160, 320, 640, 1280)
COLUMNS: Final = (*(str(minutes) for minutes in BOUNDS), f"{BOUNDS[-1]}+")
#: What stands for a reason where there is none.
UNTRIED: Final = "not tried yet"
NOBODY: Final = "MAILER-DAEMON"


class Group(msgspec.Struct):
    """Messages that have something in common."""

    messages: int = 0
    recipients: int = 0
    """For whom something is left to do."""
    oldest: float = 0.0
    """When the oldest of them arrived, in seconds since the epoch."""
    ages: list[int] = msgspec.field(default_factory=lambda: [0] * len(COLUMNS))
    """Messages by age, see `COLUMNS`."""

    def add(self, arrival: float, recipients: int, column: int) -> None:
        """Count one message."""
        self.messages += 1
        self.recipients += recipients
        self.ages[column] += 1
        if not self.oldest or arrival < self.oldest:
            self.oldest = arrival


class Groups(msgspec.Struct):
    """The queue as a whole, and its groups by name."""

    total: Group
    groups: dict[str, Group]


def grouped(spool: Spool, by: By, now: float) -> Groups:
    """Count the messages of all queues; damaged ones are told of on standard error."""
    found = Groups(Group(), {})
    for message in _messages(spool):
        envelope = message.envelope
        counts = _counts(message, by)
        # A clock that was set back makes nobody younger than new.
        column = bisect_left(BOUNDS, max(0.0, now - envelope.arrival) / 60)
        found.total.add(envelope.arrival, sum(counts.values()), column)
        for name, recipients in counts.items():
            group = found.groups.get(name)
            if group is None:
                group = found.groups[name] = Group()
            group.add(envelope.arrival, recipients, column)
    return found


def _messages(spool: Spool) -> Iterator[StoredMessage]:
    """All of them, each once: one that moves on meanwhile counts where it was seen first."""
    moving: set[str] = set()
    for queue in LIVE:
        for queue_id, _ in spool.times(queue):
            if queue_id in moving:
                continue
            try:
                message = spool.load(queue, queue_id)
            except (FileNotFoundError, QueueFileUnfinished):
                continue
            except (QueueFileDamaged, OSError) as fault:
                click.echo(f"mtaq: {queue.value}/{queue_id}: not counted: {fault}", err=True)
                continue
            if queue is not Queue.DEFERRED:
                moving.add(queue_id)
            yield message


def _counts(message: StoredMessage, by: By) -> Mapping[str, int]:
    """To which groups a message belongs, and with how many recipients."""
    states, envelope = message.states, message.envelope
    if by == "sender":
        return {envelope.sender or NOBODY: sum(not state.settled for state in states)}
    counts: dict[str, int] = {}
    for recipient, state in zip(envelope.recipients, states, strict=True):
        if not state.settled:
            name = domain_of(recipient.address) if by == "destination" else _reason(state)
            counts[name] = counts.get(name, 0) + 1
    return counts


def _reason(state: RecipientState) -> str:
    outcome = state.outcome
    return normalised(outcome.text) if isinstance(outcome, (Deferred, Failed)) else UNTRIED


def ordered(found: Groups) -> list[tuple[str, Group]]:
    """The groups, those with the most messages first."""
    return sorted(found.groups.items(), key=lambda pair: (-pair[1].messages, pair[1].oldest, pair[0]))


def print_groups(found: Groups, by: By, now: float, out: TextIO) -> None:
    """A table for people. Names that do not fit beside the numbers stand below them."""
    if not found.total.messages:
        out.write("Mail queue is empty\n")
        return
    heading = ["T", *COLUMNS, "oldest"]
    rows = [(name, _cells(group, now)) for name, group in (("TOTAL", found.total), *ordered(found))]
    widths = [max(len(cells[column]) for cells in (heading, *(row for _, row in rows))) for column in range(len(heading))]
    left = sum(widths) + len(widths) + 1
    beside = left + max(len(by), *(len(name) for name, _ in rows)) <= shutil.get_terminal_size().columns
    for name, cells in ((by, heading), *rows):
        line = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        out.write(f"{line}  {name}\n" if beside else f"{name}\n{line}\n")


def _cells(group: Group, now: float) -> list[str]:
    return [str(group.messages), *(str(count) for count in group.ages), age(now - group.oldest)]


def print_objects(found: Groups, by: By, out: TextIO) -> None:
    """One JSON object a line for each group."""
    for name, group in ordered(found):
        body = {
            by: name,
            "messages": group.messages,
            "recipients": group.recipients,
            "oldest": group.oldest,
            "ages": dict(zip(COLUMNS, group.ages, strict=True)),
        }
        out.write(msgspec.json.encode(body).decode() + "\n")
