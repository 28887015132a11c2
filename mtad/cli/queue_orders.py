"""``mtaq hold|release|delete|requeue|expire|bounce``: orders about messages, named or chosen by filters.

The scheduler carries them out, for a message in its hands is nobody else's. While there is none the command does it itself,
under the scheduler's lock, so that one which starts meanwhile waits. Either way an order that was answered stands in the
spool when the command ends: the directories are flushed to the disk.

On a terminal what filters have chosen is shown, as a number and the first few, and asked about.

Exit codes: 0 fine; 1 something could not be done, or the answer was no; 2 usage; 78 bad configuration.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from itertools import islice
from typing import Final

import click
import msgspec

from mtad.cli.common import Source, config_option, explained, fail
from mtad.cli.queue_filter import Filter, filter_options, fitting, make_filter, read
from mtad.cli.times import age, plural
from mtad.desk import DESK_SOCKET, Order, Ordered, OrderName, Refused
from mtad.errors import MtadError, SpoolBusy
from mtad.net.desk import ask
from mtad.outcome import Deferred, Failed
from mtad.spool.orders import any_held, collect, give
from mtad.spool.queue_file import StoredMessage
from mtad.spool.queue_id import is_queue_id
from mtad.spool.queues import LIVE, Queue, Spool

#: Seconds within which a scheduler that has the spool must answer; it may just be starting, or ending.
PATIENCE: Final = 20.0
#: Seconds for which a message that is here, but is found nowhere, may be on its way from one queue to the next.
_MOVING: Final = 1.0
#: Messages in one order: some milliseconds of the scheduler's time.
_BATCH: Final = 100
#: Messages shown before the question.
SHOWN: Final = 5

_WORDS: Final[dict[OrderName, tuple[str, str]]] = {
    "hold": ("held", "Put messages on hold: they stay until they are released."),
    "release": ("released", "Release messages from hold, and try them now."),
    "delete": ("deleted", "Delete messages; nobody is told."),
    "requeue": ("requeued", "Try messages again now, from the beginning."),
    "expire": ("expired", "End messages as at the end of their life: their senders are told that they have expired."),
    "bounce": ("returned", "Return messages to their senders, as undeliverable."),
}
#: What still happens when there is a scheduler again.
_WAITS: Final[dict[OrderName, str]] = {
    "release": "tried when it starts",
    "requeue": "tried when it starts",
    "expire": "their senders are told when it starts",
    "bounce": "their senders are told when it starts",
}


class Report(msgspec.Struct):
    """What became of an order, as ``--json`` prints it."""

    order: OrderName
    running: bool
    """A scheduler took the order."""
    done: list[str]
    later: list[str]
    """In delivery now: done when that has ended."""
    missing: list[str]
    refused: dict[str, str]
    """Ids of messages with which this cannot be done, with the reason."""


class Giver:
    """Gives orders to the scheduler of a spool, or carries them out when there is none."""

    def __init__(self, spool: Spool, patience: float = PATIENCE) -> None:
        """``patience``: seconds that a scheduler which has the spool may take to answer."""
        self._spool = spool
        self._patience = patience
        self._lock = -1
        self._written: set[str] = set()

    @property
    def running(self) -> bool:
        """There was a scheduler, as far as it is known."""
        return self._lock < 0

    def give(self, what: OrderName, ids: Sequence[str]) -> Ordered:
        """Give one order; messages that are about to move from one queue to another are asked about again.

        Raises:
            MtadError: a scheduler has the spool and does not answer, or does not take the order.
            OSError: the world's.
        """
        ordered = self._once(Order(what, tuple(ids)))
        deadline = time.monotonic() + _MOVING
        while moving := [queue_id for queue_id in ordered.missing if self._here(queue_id)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
            again = self._once(Order(what, tuple(moving)))
            missing = [queue_id for queue_id in ordered.missing if queue_id not in moving]
            ordered = Ordered(
                ordered.done + again.done,
                ordered.later + again.later,
                (*missing, *again.missing),
                ordered.refused + again.refused,
            )
        self._written.update(ordered.later, ordered.done if what in ("expire", "bounce", "release") else ())
        return ordered

    def close(self) -> None:
        """Make durable what was done, and let a scheduler have the spool."""
        self._spool.sync(self._written)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _once(self, order: Order) -> Ordered:
        deadline = time.monotonic() + self._patience
        path = os.path.join(self._spool.root, DESK_SOCKET)
        while self._lock < 0:
            # Once, and with all our patience: a scheduler that is slow would carry out each that we sent.
            answer = ask(path, order, max(0.1, deadline - time.monotonic()))
            if isinstance(answer, Ordered):
                return answer
            if isinstance(answer, Refused):
                raise MtadError(f"the scheduler does not take the order: {answer.why}")
            try:
                self._lock = self._spool.lock()
            except SpoolBusy as busy:
                if time.monotonic() > deadline:
                    raise MtadError(f"the scheduler does not answer, and {busy}") from None
                time.sleep(0.05)
        return collect(order.ids, lambda queue_id: give(self._spool, order.what, queue_id, time.time()))

    def _here(self, queue_id: str) -> bool:
        return self._spool.find(queue_id) is not None


def suitable(what: OrderName) -> tuple[Queue, ...]:
    """The queues whose messages filters may choose for an order, apart from those on hold for a release."""
    match what:
        case "hold" | "requeue" | "release":
            return tuple(queue for queue in LIVE if queue is not Queue.HOLD)
        case _:
            return LIVE


def choose(spool: Spool, what: OrderName, wanted: Filter, now: float, ids: Sequence[str] | None) -> list[str]:
    """The messages that fit and with which this can be done."""

    def has_sender(message: StoredMessage) -> bool:
        return message.envelope.kind != "double-bounce"

    if what == "release":
        held = dict.fromkeys(fitting(spool, (Queue.HOLD,), wanted, now, ids))
        # Of a message that goes on for others, recipients may be held because they are in doubt.
        return list(held | dict.fromkeys(fitting(spool, suitable(what), wanted, now, ids, any_held)))
    also = has_sender if what in ("expire", "bounce") else None
    return list(fitting(spool, suitable(what), wanted, now, ids, also))


def describe(spool: Spool, queue_id: str, now: float) -> str:
    """A message on one line: id, age, from whom to whom, and why it is still here."""
    queue = spool.find(queue_id)
    message = read(spool, queue, queue_id) if queue is not None else None
    if queue is None or message is None:
        return queue_id
    envelope = message.envelope
    left = [
        (recipient.address, state.outcome)
        for recipient, state in zip(envelope.recipients, message.states, strict=True)
        if not state.settled
    ]
    to = left[0][0] if left else envelope.recipients[0].address
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    reason = next((outcome.text for _, outcome in left if isinstance(outcome, (Deferred, Failed))), "")
    held = ", on hold" if queue is Queue.HOLD else ""
    why = f" ({reason})" if reason else ""
    return f"{queue_id}  {age(now - envelope.arrival)}{held}  <{envelope.sender}> to <{to}>{more}{why}"


def on_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty()


def confirmed(spool: Spool, what: OrderName, ids: Sequence[str], now: float) -> bool:
    """Show what was chosen, and ask."""
    for queue_id in ids[:SHOWN]:
        click.echo(describe(spool, queue_id, now), err=True)
    if len(ids) > SHOWN:
        click.echo(f"... and {len(ids) - SHOWN} more", err=True)
    return click.confirm(f"{what} {plural(len(ids), 'message')}?", err=True)


def execute(giver: Giver, what: OrderName, ids: Sequence[str]) -> Report:
    """Give an order about any number of messages."""
    wanted = list(dict.fromkeys(ids))
    report = Report(what, True, [], [], [], {})
    report.missing += [_printable(name) for name in wanted if not is_queue_id(name)]
    remaining = filter(is_queue_id, wanted)
    try:
        while batch := list(islice(remaining, _BATCH)):
            ordered = giver.give(what, batch)
            report.done += ordered.done
            report.later += ordered.later
            report.missing += ordered.missing
            report.refused |= dict(ordered.refused)
    finally:
        report.running = giver.running
        giver.close()
    return report


def _printable(name: str) -> str:
    """What was given for a queue id, which may be any octets."""
    return name if name.isprintable() else ascii(name)[1:-1]


def tell(report: Report) -> None:
    """Print what was done."""
    word = _WORDS[report.order][0]
    if report.done:
        rest = _WAITS.get(report.order, "")
        waits = f"; mtad is not running: {rest}" if rest and not report.running else ""
        click.echo(f"{word} {plural(len(report.done), 'message')}{waits}")
    if report.later:
        click.echo(f"{plural(len(report.later), 'message')} in delivery: {word} when that has ended, if anything is left")


def order(
    what: OrderName,
    config: str | None,
    ids: Sequence[str],
    wanted: Filter,
    *,
    everything: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """One of the commands, from its options to its exit code."""
    if not ids and wanted.empty and not everything:
        raise click.UsageError("which messages? Give queue ids, filters, or --all")
    if ids and everything:
        raise click.UsageError("give queue ids or --all, not both")
    spool = Spool(Source(config).spool())
    named = list(ids)
    if "-" in named:
        named = [name for name in named if name != "-"] + sys.stdin.buffer.read().decode(errors="replace").split()
    chosen = named
    if not wanted.empty or everything:
        now = time.time()
        chosen = choose(spool, what, wanted, now, named if ids else None)
        if chosen and not yes and on_terminal() and not confirmed(spool, what, chosen, now):
            fail("nothing was done")
    report = execute(Giver(spool), what, chosen)
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    elif not chosen:
        click.echo("no messages" if wanted.empty else "no messages fit")
    else:
        tell(report)
    faults = [f"{queue_id}: {why}" for queue_id, why in report.refused.items()]
    if wanted.empty and not everything:  # one that was chosen a moment ago and has gone since is no fault
        faults += [f"{queue_id}: no such message" for queue_id in report.missing]
    if faults:
        fail("\n".join(faults))


def command(what: OrderName) -> click.Command:
    """The command for an order."""

    @click.command(
        what, help=f"{_WORDS[what][1]}\n\nOf several filters all must fit. A queue id of - reads ids, one a line."
    )
    @click.argument("queue_ids", nargs=-1, metavar="[QUEUE_ID]...")
    @config_option
    @filter_options
    @click.option("--all", "everything", is_flag=True, help="All messages, when nothing else is given.")
    @click.option("--yes", "-y", is_flag=True, help="Do not ask.")
    @click.option("--json", "as_json", is_flag=True, help="One JSON object that says what became of each message.")
    @explained
    def run(
        queue_ids: tuple[str, ...],
        config: str | None,
        domain: str | None,
        sender: str | None,
        reason: str | None,
        older_than: float | None,
        everything: bool,
        yes: bool,
        as_json: bool,
    ) -> None:
        wanted = make_filter(domain, sender, reason, older_than)
        order(what, config, queue_ids, wanted, everything=everything, yes=yes, as_json=as_json)

    return run


commands: Final = tuple(command(what) for what in _WORDS)
