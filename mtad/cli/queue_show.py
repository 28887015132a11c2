"""``mtaq show``: a message in the queue, and all that happened to it."""

from __future__ import annotations

import codecs
import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import click
import msgspec

from mtad.cli.common import Source, config_option, explained, fail
from mtad.cli.queue_facts import Absent, Found, Site
from mtad.cli.queue_why import wrapped
from mtad.cli.times import age, moment, plural
from mtad.envelope import Envelope, Recipient
from mtad.errors import QueueFileDamaged
from mtad.outcome import Attempt, Deferred, Delivered, Outcome
from mtad.progress import CUT, REPORT, Doubt, Instructed, Named, RecipientState, Reported
from mtad.spool.message import OpenMessage
from mtad.spool.queue_file import StoredMessage

#: Octets of a header that are looked at: more than that is no header.
_LONGEST_HEADER: Final = 1024 * 1024


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that happened to a recipient. ``delays`` are seconds: in the queue, in our lanes, opening, sending."""

    at: float
    what: str
    host: str = ""
    address: str = ""
    tls: str = ""
    status: str = ""
    text: str = ""
    reply: str = ""
    delays: tuple[float | None, float | None, float, float] | None = None
    report: str = ""


def histories(message: StoredMessage) -> list[list[Step]]:
    """What happened to each recipient, in the order of the envelope."""
    envelope = message.envelope
    found: list[list[Step]] = [[] for _ in envelope.recipients]
    for event in message.events:
        match event:
            case Attempt():
                for index, outcome in event.outcomes:
                    found[index].append(_tried(envelope, event, outcome))
                continue
            case Doubt(at=at, host=host):
                words = {REPORT: "about to be told", CUT: "perhaps sent"}
                step = Step(at, words.get(host, "about to be sent"), host=host)
            case Named(at=at, hold=hold):
                step = Step(at, "held in doubt" if hold else "found in doubt")
            case Reported(at=at, report=report, kind=kind):
                step = Step(at, f"told of {kind}", report=report)
            case Instructed(at=at, what=what, done=done):
                step = Step(at, what, text="" if done else "when its delivery has ended")
        concerned = found if isinstance(event, Instructed) else [found[index] for index in event.recipients]
        for history in concerned:
            history.append(step)
    return found


def _tried(envelope: Envelope, attempt: Attempt, outcome: Outcome) -> Step:
    active = attempt.active
    return Step(
        attempt.started,
        _word(outcome),
        host=attempt.host,
        address=attempt.address,
        tls=attempt.tls,
        status=outcome.status,
        text=outcome.text,
        reply=outcome.reply,
        delays=(
            max(0.0, active - envelope.arrival) if active else None,
            max(0.0, attempt.started - active) if active else None,
            attempt.connection,
            attempt.transmission,
        ),
    )


def _word(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not tried yet"
    return "delivered" if isinstance(outcome, Delivered) else "deferred" if isinstance(outcome, Deferred) else "failed"


def standing(state: RecipientState) -> str:
    """Where a recipient stands, in a few words."""
    word = _word(state.outcome)
    if state.reported:
        word += ", and its sender was told"
    if state.announced:
        word += ", and its sender was told so"
    if state.warned:
        word += ", and its sender was told of the delay"
    if state.doubt:
        who = "somebody" if state.doubt == CUT else state.doubt
        word += "; in doubt: " + ("a report may have gone out" if state.doubt == REPORT else f"{who} may have it")
    if state.held:
        word += ", and held until somebody releases it"
    return word


def header_of(opened: OpenMessage) -> bytes:
    """The header with the empty line that ends it; all of a message without one."""
    data = b""
    for chunk in opened.chunks():
        data += chunk
        end = data.find(b"\r\n\r\n")
        if end >= 0:
            return data[: end + 4]
        if len(data) > _LONGEST_HEADER:
            break
    return data


# -- for people -------------------------------------------------------------------------------------------------------


def lines(found: Found, header: int, now: float) -> Iterator[str]:
    """All that is printed about one message; ``header`` is the size of its header, 0 when that is not known."""
    message, envelope = found.message, found.message.envelope
    octets = message.head.content_size
    yield f"{envelope.id}  {found.queue.value}"
    yield wrapped(
        (envelope.sender or "MAILER-DAEMON") + ("" if envelope.kind == "mail" else f", a {envelope.kind}"), 2, "from"
    )
    came = ", ".join(
        part
        for part in (
            f"from {envelope.client}" if envelope.client else "",
            f"helo {envelope.helo}" if envelope.helo else "",
            envelope.protocol,
            f"login {envelope.login}" if envelope.login else "",
        )
        if part
    )
    yield wrapped(moment(envelope.arrival, now), 2, "arrived")
    if came:
        yield wrapped(came, 2, "client")
    parts = f": header {header:,}, body {octets - header:,}" if header else ""
    yield wrapped(f"{octets:,} octets{parts}", 2, "size")
    if parameters := _parameters(envelope):
        yield wrapped(parameters, 2, "parameters")
    if found.due:
        yield wrapped(moment(found.due, now), 2, "next attempt")
    yield wrapped(str(len(envelope.recipients)), 2, "recipients")
    for names, recipient, state, history in _alike(found):
        yield ""
        yield from (f"  {name}" for name in names[:4])
        if len(names) > 4:
            yield f"  and {plural(len(names) - 4, 'more recipient')}"
        yield wrapped(f"{standing(state)}{_asked(recipient)}", 4)
        for step in history:
            yield from _told(step, now)


def _parameters(envelope: Envelope) -> str:
    given = [
        f"BODY={envelope.body.upper()}" if envelope.body else "",
        "SMTPUTF8" if envelope.smtputf8 else "",
        f"RET={envelope.ret.upper()}" if envelope.ret else "",
        f"ENVID={envelope.envid}" if envelope.envid else "",
    ]
    return " ".join(part for part in given if part)


def _asked(recipient: Recipient) -> str:
    asked = f"NOTIFY={','.join(recipient.notify).upper()}" if recipient.notify else ""
    return "".join(f"; {part}" for part in (asked, f"ORCPT={recipient.orcpt}" if recipient.orcpt else "") if part)


def _alike(found: Found) -> Iterable[tuple[list[str], Recipient, RecipientState, Sequence[Step]]]:
    """Recipients with the same history together."""
    groups: dict[bytes, tuple[list[str], Recipient, RecipientState, Sequence[Step]]] = {}
    stored = found.message
    for recipient, state, history in zip(stored.envelope.recipients, stored.states, histories(stored), strict=True):
        key = msgspec.json.encode((msgspec.structs.replace(recipient, address=""), state, history))
        groups.setdefault(key, ([], recipient, state, history))[0].append(recipient.address)
    return groups.values()


def _told(step: Step, now: float) -> Iterator[str]:
    stamp = moment(step.at, now).partition(",")[0]
    if step.delays is None:
        what = {
            "about to be sent": f"about to be sent to {step.host}",
            "about to be told": "its sender is about to be told",
            "perhaps sent": "the machine has stopped, and with it went what was written last",
            "found in doubt": "no answer was written down: in doubt, and to be done again",
            "held in doubt": "no answer was written down: in doubt, and held",
        }
        text = what.get(step.what) or (
            (f"its sender was {step.what}" + (f", by {step.report}" if step.report else ", or did not want to know"))
            if step.what.startswith("told")
            else f"an administrator's order: {step.what} {step.text}".rstrip()
        )
        yield wrapped(text, 4, stamp)
        return
    place = Attempt(0.0, (), step.host, step.address).relay
    yield wrapped(f"{step.what} {step.status}, {'at no host' if place == 'none' else place}", 4, stamp)
    yield wrapped(step.reply or step.text, 18)
    names = ("in the queue", "in its lane", "to open", "to send")
    spent = [f"{_short(delay)} {name}" for delay, name in zip(step.delays, names, strict=True) if delay is not None]
    if place != "none":
        yield wrapped(
            ", ".join(spent) + ("; " + (f"TLS {step.tls}" if step.tls else "clear text") if step.address else ""), 18
        )


def _short(seconds: float) -> str:
    """Nothing below 10 ms, as in the log."""
    return age(seconds) if seconds >= 60 else f"{round(seconds, 2 if seconds < 1 else 1):g} s"


# -- for programs -----------------------------------------------------------------------------------------------------


def as_object(found: Found, header: int) -> dict[str, Any]:
    """All that is told about one message, for ``--json``."""
    envelope = found.message.envelope
    body: dict[str, Any] = {"queue_id": envelope.id, "queue_name": found.queue.value}
    body |= {name: value for name, value in msgspec.to_builtins(envelope).items() if name not in {"id", "recipients"}}
    body |= {"message_size": found.message.head.content_size, "header_size": header}
    if found.due:
        body["next_attempt"] = found.due
    stored = found.message
    body["recipients"] = [
        msgspec.to_builtins(recipient)
        | {"state": _word(state.outcome), "settled": state.settled, "doubt": state.doubt, "held": state.held}
        | {"history": msgspec.to_builtins(history)}
        for recipient, state, history in zip(envelope.recipients, stored.states, histories(stored), strict=True)
    ]
    return body


@click.command(short_help="A message, and all that happened to it.")
@click.argument("queue_ids", nargs=-1, required=True, metavar="QUEUE_ID...")
@config_option
@click.option("--headers", is_flag=True, help="Only the header of the message.")
@click.option("--content", is_flag=True, help="Only the message, header and body, as it is stored.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for each message.")
@explained
def show(queue_ids: tuple[str, ...], config: str | None, headers: bool, content: bool, as_json: bool) -> None:
    """Show messages in the queue: the envelope, and each attempt for each recipient, with what was answered.

    On a terminal, characters that would steer it are written out. Exit 1: one of the messages is not in the queue.
    """
    if headers and content:
        raise click.UsageError("give --headers or --content, not both")
    site = Site(Source(config))
    missing: list[str] = []
    for number, queue_id in enumerate(queue_ids):
        found = site.look(queue_id)
        if isinstance(found, Found):
            try:
                _show(site, found, headers=headers, content=content, as_json=as_json, first=not number)
                continue
            except FileNotFoundError:  # it has gone, or moved on, since
                found = Absent(queue_id, "missing", "It has just left the queue that it was in. Ask again.")
        if as_json:
            click.echo(msgspec.json.encode(found).decode())
        missing.append(f"{queue_id}: {found.text}")
    if missing:
        fail("\n".join(missing))


def _show(site: Site, found: Found, *, headers: bool, content: bool, as_json: bool, first: bool) -> None:
    with site.spool.peek(found.queue, found.message.envelope.id) as opened:
        if not as_json and content:
            screen = _Screen()
            for chunk in opened.chunks():
                screen.write(chunk)
            return
        try:
            header = header_of(opened)
        except QueueFileDamaged as fault:
            click.echo(f"mtaq: {found.message.envelope.id}: {fault}", err=True)
            header = b""
        if as_json:
            body = as_object(found, len(header))
            if headers:
                body["headers"] = header.decode("utf-8", "backslashreplace")
            if content:
                body["content"] = b"".join(opened.chunks()).decode("utf-8", "backslashreplace")
            click.echo(msgspec.json.encode(body).decode())
        elif headers:
            _Screen().write(header)
        else:
            click.echo(("" if first else "\n") + "\n".join(lines(found, len(header), time.time())))


class _Screen:
    """Writes octets as they are; on a terminal as text in which nothing steers it."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder = io.IncrementalNewlineDecoder(decoder, translate=True)

    def write(self, data: bytes) -> None:
        """Some more of it."""
        if self._terminal:
            text = self._decoder.decode(data)
            plain = (char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
            click.echo("".join(plain), nl=False)
        else:
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
