"""The transport "bounce": tells the sender what failed, by a message of our own that enters the spool like any other.

A report goes to the sender of a message. When what failed was sent by nobody (the null reverse-path), there is no one to
tell but our postmaster, and that notice is a "double-bounce". What becomes of a double-bounce that fails is the scheduler's
decision: it is held for a human, nothing is reported twice.

The order is what matters: the report is committed, then the failures are marked as reported, then the message may go.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Final

from mtad import dsn
from mtad.config import Retry
from mtad.envelope import Envelope, Kind, Recipient
from mtad.outcome import Failed
from mtad.progress import Reported
from mtad.retry import Bounce, settle
from mtad.spool.message import OpenMessage
from mtad.spool.queues import Spool

#: How much of the original's content is searched for the end of its header; what a report quotes is capped below that.
_HEADER_SEARCH: Final = 256 * 1024


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

    def report(self, message: OpenMessage, recipients: Collection[int]) -> Envelope | None:
        """Commit one report about those of these recipients that failed, and mark them as reported.

        What failed, and why, is read from the queue file and judged by `mtad.retry.settle`, as the scheduler did.

        Returns:
            the report's envelope; None when there is nothing to report.

        Raises:
            OSError: the report could not be stored, or could not be marked as sent; nothing is lost, and at worst the
                sender is told twice.
        """
        original = message.message.envelope
        now = time.time()
        verdict = settle(original, message.message.states, now, self._retry, 0.0)
        if not isinstance(verdict, Bounce):
            return None
        failed = [(index, failure) for index, failure in verdict.failed if index in recipients]
        report, content = self._compose(message, original, failed, now)
        entry = self._spool.enter(report)
        try:
            entry.write(content)
        except OSError:
            entry.discard()
            raise
        entry.commit()
        message.append(Reported(now, tuple(index for index, _ in failed), report.id), durable=True)
        return report

    def _compose(
        self, message: OpenMessage, original: Envelope, failed: Sequence[tuple[int, Failed]], now: float
    ) -> tuple[Envelope, bytes]:
        failures = [(original.recipients[index], failure) for index, failure in failed]
        kind: Kind = "bounce" if original.sender else "double-bounce"
        to = original.sender or self._postmaster
        report = Envelope(self._spool.ids.new(), now, "", (Recipient(to),), kind=kind)
        header = original_header(message)
        write = dsn.report if kind == "bounce" else dsn.double_bounce
        content = write(original, failures, header, hostname=self._hostname, now=now, report_id=report.id)
        return report, content
