"""Which messages a command of mtaq is about: those named, or those that fit, as ``--domain`` and its kin say.

Of several filters all must fit; ``--domain`` and ``--reason`` one and the same recipient, for whom something is left to do.
What cannot be read fits nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final, ParamSpec, TypeVar

import click
import msgspec

from mtad.address import domain_of
from mtad.config_values import duration
from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.outcome import Deferred, Failed
from mtad.progress import RecipientState
from mtad.reasons import normalised
from mtad.spool.queue_file import StoredMessage
from mtad.spool.queue_id import is_queue_id
from mtad.spool.queues import Queue, Spool

#: Whom `mtaq` shows as the sender of a report.
_NOBODY: Final = ("<>", "mailer-daemon", "<mailer-daemon>")

P = ParamSpec("P")
R = TypeVar("R")


class Filter(msgspec.Struct, frozen=True):
    """What a message must be like; the empty one fits all."""

    domain: str = ""
    """Of a recipient that is left, in lower case."""
    sender: str | None = None
    """An address, ``@domain``, or "" for the null sender; without case."""
    reason: str = ""
    """A part of why a recipient is still here, without case."""
    older_than: float | None = None
    """Seconds since it arrived."""

    @property
    def empty(self) -> bool:
        """Everything fits."""
        return self == Filter()

    def fits(self, message: StoredMessage, now: float) -> bool:
        """Whether this message fits at ``now``, in seconds since the epoch."""
        envelope = message.envelope
        if self.older_than is not None and now - envelope.arrival <= self.older_than:
            return False
        if self.sender is not None and not self._sent_by(envelope.sender.lower()):
            return False
        if not self.domain and not self.reason:
            return True
        recipients = zip(envelope.recipients, message.states, strict=True)
        return any(self._left(recipient.address, state) for recipient, state in recipients)

    def _sent_by(self, sender: str) -> bool:
        wanted = self.sender or ""
        return domain_of(sender) == wanted[1:] if wanted.startswith("@") else sender == wanted

    def _left(self, address: str, state: RecipientState) -> bool:
        if state.settled or (self.domain and domain_of(address) != self.domain):
            return False
        if not self.reason:
            return True
        text = state.outcome.text if isinstance(state.outcome, (Deferred, Failed)) else ""
        return self.reason in text.casefold() or self.reason in normalised(text).casefold()


def _duration(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else float(duration(value))
    except ValueError as fault:
        raise click.BadParameter(str(fault)) from None


def filter_options(command: Callable[P, R]) -> Callable[P, R]:
    """Give a command the filters; it is called with what `make_filter` takes."""
    for option in (
        click.option(
            "--older-than", metavar="TIME", callback=_duration, help='In the queue for longer than this, as "2h".'
        ),
        click.option("--reason", metavar="TEXT", help="A recipient is still here for a reason that has this text in it."),
        click.option("--sender", metavar="ADDRESS", help="From this address, from @DOMAIN, or from <> (reports)."),
        click.option("--domain", metavar="DOMAIN", help="A recipient of this domain is left."),
    ):
        command = option(command)
    return command


def make_filter(domain: str | None, sender: str | None, reason: str | None, older_than: float | None) -> Filter:
    """The filter that options name; None for one that was not given.

    Raises:
        click.UsageError: an empty text, which would fit nothing or everything.
    """
    if reason is not None and not reason.strip():
        raise click.UsageError("--reason is empty")
    return Filter(
        domain_option(domain) if domain is not None else "",
        _sender_option(sender) if sender is not None else None,
        (reason or "").casefold(),
        older_than,
    )


def domain_option(text: str) -> str:
    """A domain as it is given to an option, also with the ``@`` that stands before it elsewhere, in lower case.

    Raises:
        click.UsageError: it names none, as when a script has an empty variable there.
    """
    domain = text.strip().lower().removeprefix("@").rstrip(".")
    if not domain:
        raise click.UsageError("--domain is empty")
    return domain


def _sender_option(text: str) -> str:
    sender = text.strip().lower()
    if sender in _NOBODY:
        return ""
    sender = sender.removeprefix("<").removesuffix(">")
    sender = sender.rstrip(".") if sender.startswith("@") else sender
    if sender in ("", "@"):
        raise click.UsageError('--sender is empty; the null sender is "<>"')
    return sender


def read(spool: Spool, queue: Queue, queue_id: str) -> StoredMessage | None:
    """A message; None when it cannot be read, or is none (any more)."""
    try:
        return spool.load(queue, queue_id)
    except (OSError, QueueFileDamaged, QueueFileUnfinished):
        return None


def fitting(
    spool: Spool,
    queues: Iterable[Queue],
    wanted: Filter,
    now: float,
    ids: Collection[str] | None = None,
    also: Callable[[StoredMessage], bool] | None = None,
) -> Iterator[str]:
    """The messages of some queues that fit, each once; of ``ids`` only, if given. ``also`` must be true of them, too.

    A message is read only when that is needed to tell.
    """
    seen: set[str] = set()
    for queue in queues:
        if ids is None:
            names: Iterable[str] = (name for name, _ in spool.times(queue))
        else:
            names = [name for name in ids if is_queue_id(name) and spool.find(name) is queue]
        for name in names:
            if name in seen:
                continue
            if not wanted.empty or also is not None:
                message = read(spool, queue, name)
                if message is None or not wanted.fits(message, now) or (also is not None and not also(message)):
                    continue
            seen.add(name)
            yield name
