"""``mtaq why``: for each recipient of a message what blocks it now, and what can be done about that."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, Final

import click
import msgspec

from mtad.cli.common import Source, config_option, explained
from mtad.cli.queue_facts import Absent, Site
from mtad.cli.times import moment, plural
from mtad.queue_causes import Cause, Facts
from mtad.queue_deferrals import causes

#: Addresses that are named above an answer that is the same for several.
_NAMED: Final = 3
#: Columns of the names of facts.
_LABEL: Final = 14
#: Texts are not made wider than this, however wide the terminal is.
_WIDEST: Final = 100


def width() -> int:
    """Columns for a text; 80 where there is no terminal."""
    return min(_WIDEST, shutil.get_terminal_size().columns)


def wrapped(text: str, indent: int, label: str = "") -> str:
    """A text below a label, or without one, in lines that fit the terminal; words that are longer are left whole."""
    first = f"{'':{indent}}{label:<{_LABEL}}" if label else " " * indent
    rest = " " * (len(first))
    return "\n".join(
        textwrap.wrap(
            text,
            max(width(), len(first) + 20),
            initial_indent=first,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def alike(found: Sequence[Cause]) -> list[tuple[Cause, list[str]]]:
    """Answers that are the same but for the recipient, with the recipients they are about, in the order of the first."""
    groups: dict[bytes, tuple[Cause, list[str]]] = {}
    for cause in found:
        key = msgspec.json.encode(msgspec.structs.replace(cause, recipient="", advice=()))
        groups.setdefault(key, (cause, []))[1].append(cause.recipient)
    return list(groups.values())


def lines(facts: Facts, found: Sequence[Cause]) -> Iterable[str]:
    """All that is printed about one message."""
    envelope = facts.envelope
    sender = envelope.sender or "MAILER-DAEMON (a report)"
    recipients = plural(len(envelope.recipients), "recipient")
    yield f"{envelope.id}  from {sender}"
    arrived = moment(envelope.arrival, facts.now)
    yield wrapped(f"{facts.queue}; {recipients}; arrived {arrived}", 2)
    for cause, addresses in alike(found):
        yield ""
        named = addresses if len(addresses) <= _NAMED + 1 else addresses[:_NAMED]
        yield from (f"  {address}" for address in named)
        if len(named) < len(addresses):
            yield f"  and {len(addresses) - len(named)} more recipients"
        yield wrapped(cause.text, 4)
        yield from _details(cause, facts.now)


def _details(cause: Cause, now: float) -> Iterable[str]:
    if cause.cause != "delivered":
        if cause.reply:
            yield wrapped(f"{cause.host}: {cause.reply}" if cause.host else cause.reply, 4, "reply")
        elif cause.reason:
            yield wrapped(cause.reason, 4, "reason")
    if cause.since:
        label = {"delivered": "at", "returned": "at", "suspended": "suspended"}.get(cause.cause)
        label = label or ("since" if cause.process or not cause.attempts or not cause.next_attempt else "last attempt")
        yield wrapped(moment(cause.since, now), 4, label)
    if cause.until:
        yield wrapped(moment(cause.until, now), 4, "until" if cause.cause == "suspended" else "next start")
    if cause.next_attempt:
        tried = f" ({plural(cause.attempts, 'attempt')} so far)" if cause.attempts else ""
        yield wrapped(moment(cause.next_attempt, now) + tried, 4, "next attempt")
    if cause.expires:
        yield wrapped(f"{moment(cause.expires, now)}; then it goes back to its sender", 4, "expires")
    for number, advice in enumerate(cause.advice):
        yield from _advised(advice.command, advice.effect, "" if number else "you can type")


def _advised(command: str, effect: str, label: str) -> Iterable[str]:
    start = f"    {label:<{_LABEL}}{command}"
    if len(start) + 2 + len(effect) <= width():
        yield f"{start}  {effect}"
        return
    yield start
    yield wrapped(effect, 4 + _LABEL + 2)


def as_object(facts: Facts, found: Sequence[Cause]) -> dict[str, Any]:
    """All that is told about one message, for ``--json``."""
    return {
        "queue_id": facts.envelope.id,
        "queue_name": facts.queue,
        "arrival_time": facts.envelope.arrival,
        "sender": facts.envelope.sender,
        "kind": facts.envelope.kind,
        "scheduler": facts.scheduler,
        "recipients": msgspec.to_builtins(found),
    }


@click.command(short_help="Why messages wait, and what you can do.")
@click.argument("queue_ids", nargs=-1, required=True, metavar="QUEUE_ID...")
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for each message.")
@explained
def why(queue_ids: tuple[str, ...], config: str | None, as_json: bool) -> None:
    """Say what keeps messages from being delivered, one answer for each recipient, and what you can do.

    Exit 1: one of them is not in the queue.
    """
    site = Site(Source(config))
    absent = False
    for number, one in enumerate(site.gather(queue_ids)):
        if isinstance(one, Absent):
            absent = True
            body: dict[str, Any] = msgspec.to_builtins(one)
            text = f"{one.queue_id}\n{wrapped(one.text, 2)}"
        else:
            found = causes(one)
            body = as_object(one, found)
            text = "\n".join(lines(one, found))
        if as_json:
            click.echo(msgspec.json.encode(body).decode())
        else:
            click.echo(("\n" if number else "") + text)
    sys.exit(1 if absent else 0)
