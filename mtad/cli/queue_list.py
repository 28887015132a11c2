"""What is in the queue, as bare ``mtaq`` lists it: Postfix's mailq, and with ``--json`` ``postqueue -j``.

Reads the queue files themselves, so it works whether the server runs or not, and prints each message as it finds it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final, TextIO

import click
import msgspec

from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.outcome import Attempt, Deferred, Failed
from mtad.progress import CUT, REPORT, RecipientState
from mtad.spool.queue_file import StoredMessage
from mtad.spool.queues import LIVE, Queue, Spool

_HEADING: Final = "----Queue ID----- --Size-- ---Arrival Time---- --Sender/Recipient------\n"
#: Postfix's columns for long queue ids: id and mark, size, time, then sender or recipient.
_SENDER: Final = "%-17s %8d %19.19s %s\n"
_RECIPIENT: Final = "%-17s %8s %-19s %s\n"
#: Reasons end at this column, or begin at the margin when they are longer.
_REASON_END: Final = 76
_MARKS: Final = {Queue.INCOMING: "", Queue.ACTIVE: "*", Queue.DEFERRED: "", Queue.HOLD: "!"}


class RecipientRow(msgspec.Struct, omit_defaults=True):
    """A recipient for whom something is left to do."""

    address: str
    delay_reason: str = ""
    status: str = ""
    remote: str = ""
    in_doubt: str = ""
    """The host that may have taken the message when a process died; "report": its sender may have been told; "cut": the
    machine stopped, and nobody knows."""
    held: bool = False
    """It is in doubt, and kept until somebody releases the message."""


class Row(msgspec.Struct):
    """One message: the names of ``postqueue -j`` first, then ours."""

    queue_name: str
    queue_id: str
    arrival_time: int
    message_size: int
    forced_expire: bool
    sender: str
    recipients: list[RecipientRow]
    next_attempt: int | None
    """When it is due (seconds since the epoch), for a deferred message."""
    attempts: int
    """How often a host was tried, or refused to be."""
    kind: str


def rows(spool: Spool) -> Iterator[Row]:
    """The messages of all queues, one by one, in no order within a queue.

    A message that moves on meanwhile is shown once, where it was seen first.
    """
    moving: set[str] = set()
    for queue in LIVE:
        for queue_id, mtime in spool.times(queue):
            if queue_id in moving:
                continue
            try:
                message = spool.load(queue, queue_id)
            except (FileNotFoundError, QueueFileUnfinished):
                continue  # delivered meanwhile, or not here yet
            except QueueFileDamaged as fault:
                click.echo(f"mtaq: {queue.value}/{queue_id}: damaged: {fault}", err=True)
                continue
            except OSError as fault:
                click.echo(f"mtaq: {queue.value}/{queue_id}: cannot be read: {fault.strerror}", err=True)
                continue
            if queue is not Queue.DEFERRED:
                moving.add(queue_id)  # few: most of a long queue is deferred
            yield _row(queue, message, mtime)


def _row(queue: Queue, message: StoredMessage, mtime: float) -> Row:
    envelope = message.envelope
    return Row(
        queue_name=queue.value,
        queue_id=envelope.id,
        arrival_time=int(envelope.arrival),
        message_size=message.head.content_size,
        forced_expire=False,
        sender=envelope.sender or "MAILER-DAEMON",
        recipients=[
            _recipient(recipient.address, state)
            for recipient, state in zip(envelope.recipients, message.states, strict=True)
            if not state.settled
        ],
        next_attempt=int(mtime) if queue is Queue.DEFERRED else None,
        attempts=sum(isinstance(event, Attempt) for event in message.events),
        kind=envelope.kind,
    )


def _recipient(address: str, state: RecipientState) -> RecipientRow:
    outcome = state.outcome
    if isinstance(outcome, (Deferred, Failed)):
        return RecipientRow(address, outcome.text, outcome.status, outcome.remote, state.doubt, state.held)
    return RecipientRow(address, in_doubt=state.doubt, held=state.held)


def print_table(found: Iterator[Row], out: TextIO) -> None:
    """The table of mailq."""
    octets = count = 0
    for row in found:
        if not count:
            out.write(_HEADING)
        count += 1
        octets += row.message_size
        mark = _MARKS[Queue(row.queue_name)]
        arrival = time.strftime("%a %b %e %H:%M:%S", time.localtime(row.arrival_time))
        out.write(_SENDER % (row.queue_id + mark, row.message_size, arrival, row.sender))
        before = ""
        for recipient in row.recipients:
            reason = recipient.delay_reason
            if recipient.in_doubt:
                held = ", and is held" if recipient.held else ""
                reason = f"in doubt: {doubt(recipient.in_doubt)}{held}" + (f"; {reason}" if reason else "")
            if reason and reason != before:
                out.write(f"{'':{max(0, _REASON_END - len(reason))}}({reason})\n")
            before = reason
            out.write(_RECIPIENT % ("", "", "", recipient.address))
        out.write("\n")
    if count:
        out.write(f"-- {octets // 1024} Kbytes in {count} Request{'' if count == 1 else 's'}.\n")
    else:
        out.write("Mail queue is empty\n")


def doubt(host: str) -> str:
    """What is in doubt, in a few words."""
    if host == REPORT:
        return "its sender may have been told already"
    return f"{'somebody' if host == CUT else host} may have it already"


def print_json(found: Iterator[Row], out: TextIO) -> None:
    """One JSON object a line."""
    encoder = msgspec.json.Encoder()
    for row in found:
        out.write(encoder.encode(row).decode() + "\n")
