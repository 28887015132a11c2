"""The transport "bounce": tells the sender what became of its message.

A report is a message of our own that enters the spool like any other. It goes to the sender: about failures, about delays,
and about successes when it asked for that. When what failed was sent by nobody (the null reverse-path), there is no one to
tell but our postmaster, and that notice is a "double-bounce". What becomes of a double-bounce that fails is the scheduler's
decision: it is held for a human, nothing is reported twice.

The order is what matters: the report is committed, then the recipients are marked as told, then the message may go.

Standards: RFC 3461 sections 4.1 (NOTIFY), 4.3 (RET), 5.2 (success); RFC 5321 section 4.5.5 (the null reverse-path).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Final

import msgspec

from mtad import dsn
from mtad.config import Retry
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Outcome
from mtad.progress import Reported
from mtad.retry import Bounce, lifetime, settle, wants
from mtad.spool.message import OpenMessage
from mtad.spool.queues import Spool

#: How much of the original's content is searched for the end of its header; what a report quotes is capped below that.
_HEADER_SEARCH: Final = 256 * 1024
#: A message up to this size goes back whole when the sender asked for it (RET=FULL). Larger ones go back as their header:
#: a report must not be a way to have somebody flooded.
_FULL_LIMIT: Final = 256 * 1024


def original_header(message: OpenMessage) -> bytes:
    """The header section of a message, without the empty line; at most `_HEADER_SEARCH` octets of it."""
    header = b""
    for chunk in message.chunks():
        start = max(0, len(header) - 3)
        header += chunk
        end = header.find(b"\r\n\r\n", start)
        if end >= 0:
            return header[: end + 2]
        if len(header) >= _HEADER_SEARCH:
            return header[:_HEADER_SEARCH]
    return header


class BounceTransport:
    """Writes reports into the spool. One instance serves all threads of a delivery process."""

    def __init__(self, spool: Spool, hostname: str, postmaster: str, retry: Retry) -> None:
        """``postmaster`` is the address to which a notice about an undeliverable report goes."""
        self._spool = spool
        self._hostname = hostname
        self._postmaster = postmaster
        self._retry = retry

    def report(
        self,
        message: OpenMessage,
        recipients: Collection[int],
        mark: Callable[[Reported], None] | None = None,
        *,
        arrival: float = 0.0,
    ) -> list[Reported]:
        """Commit the reports that are due about these recipients, one of each kind, and mark what was told.

        What became of them, and what is to be told, is read from the queue file and judged by `mtad.retry.settle`, as the
        scheduler did. A failure of which the sender does not want to hear is marked without a report.

        ``arrival`` is the time from which the age of the message counts, in seconds since the epoch, when it is not that
        of its envelope. ``mark`` writes a record of it down, and is called once its report is committed; by default that
        is the queue file.

        Returns:
            the records; empty when there was nothing to tell.

        Raises:
            OSError: a report could not be stored, or ``mark`` raised it; nothing is lost, and at worst the sender is told
                twice.
        """
        if mark is None:
            mark = partial(message.append, durable=True)
        envelope = message.message.envelope
        now = time.time()
        arrival = arrival or envelope.arrival
        aged = msgspec.structs.replace(envelope, arrival=arrival)
        verdict = settle(aged, message.message.states, now, self._retry, 0.0)
        if not isinstance(verdict, Bounce):
            return []
        told: list[Reported] = []
        kinds: tuple[tuple[dsn.Kind, Sequence[tuple[int, Outcome]]], ...] = (
            ("failure", verdict.failed),
            ("success", verdict.delivered),
            ("delay", verdict.delayed),
        )
        for kind, entries in kinds:
            about = {index: outcome for index, outcome in entries if index in recipients}
            unwanted = [index for index in about if envelope.sender and not wants(envelope.recipients[index], kind)]
            if unwanted:
                told.append(Reported(now, tuple(unwanted), "", kind))
                mark(told[-1])
            wanted = [(index, outcome) for index, outcome in about.items() if index not in unwanted]
            if wanted:
                until = arrival + lifetime(envelope, self._retry) if kind == "delay" else 0.0
                report = self._commit(message, kind, wanted, now, until)
                told.append(Reported(now, tuple(index for index, _ in wanted), report, kind))
                mark(told[-1])
        return told

    def _commit(
        self,
        message: OpenMessage,
        kind: dsn.Kind,
        entries: Sequence[tuple[int, Outcome]],
        now: float,
        until: float,
    ) -> str:
        """Store one report; its queue id. ``until`` the message is tried, in seconds since the epoch, if it is."""
        original = message.message.envelope
        about = [(original.recipients[index], outcome) for index, outcome in entries]
        report_id = self._spool.ids.new()
        to = original.sender or self._postmaster
        if original.sender:
            full = kind == "failure" and original.ret == "full" and original.body != "binarymime"
            full = full and message.size <= _FULL_LIMIT
            content = dsn.report(
                original,
                about,
                b"".join(message.chunks()) if full else original_header(message),
                hostname=self._hostname,
                now=now,
                report_id=report_id,
                kind=kind,
                until=until,
                full=full,
            )
        else:
            header = original_header(message)
            content = dsn.double_bounce(
                original, about, header, hostname=self._hostname, now=now, report_id=report_id, to=to
            )
        envelope = Envelope(
            report_id,
            now,
            "",
            (Recipient(to),),
            kind="bounce" if original.sender else "double-bounce",
            body="" if content.isascii() else "8bitmime",
            smtputf8=not to.isascii(),
        )
        entry = self._spool.enter(envelope)
        try:
            entry.write(content)
        except OSError:
            entry.discard()
            raise
        entry.commit()
        return report_id
