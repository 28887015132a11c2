"""The content of one message while it streams in, from the first octet to the commit.

What it is for: `Intake` passes content on to the spool's entry, counts it, and knows at its end whether the message may be
kept. It knows nothing of framing: DATA and BDAT use it alike.

Invariants: an entry is committed or discarded, once, on every way out. After a failure nothing more is written, and the
client's octets cost no memory. The reasons of a refusal stand in an order of their own, not in that of their discovery,
which hangs on how octets were cut.

Errors: an `OSError` of the spool is a reply, see `storage_failure`.

Standards: RFC 5321 sections 4.2.5, 6.1 (responsibility), 6.3 (loops); RFC 1870 section 6.3 (size).
"""

from __future__ import annotations

import errno
from typing import Final

from mtad.envelope import Envelope
from mtad.reply import Reply, reply
from mtad.session.mail import TOO_BIG
from mtad.session.submission import SubmittedHeader
from mtad.session.world import Entry
from mtad.smtp.wire import HeaderScanner, LineEnds

#: Received: fields above which a message is taken to be in a loop. RFC 5321 section 6.3 says "normally at least 100"; this
#: is Postfix's hopcount_limit, which mail has lived with for decades.
HOP_LIMIT: Final = 50

_LOOP: Final = reply(554, "5.4.6", "Error: too many hops")
_BARE: Final = reply(550, "5.5.2", "Error: bare CR or LF in message")
_TROUBLE: Final = reply(451, "4.3.0", "Error: queue file write error")
_FULL: Final = reply(452, "4.3.1", "Error: insufficient system storage")


class Intake:
    """One message on its way in; see the module."""

    __slots__ = ("_ends", "_entry", "_failure", "_limit", "_mends", "_scanner", "_submitted", "envelope", "size")

    def __init__(
        self,
        envelope: Envelope,
        entry: Entry,
        limit: int,
        *,
        ends: LineEnds | None = None,
        mends: bool = False,
        submitted: SubmittedHeader | None = None,
    ) -> None:
        """Begin.

        Args:
            envelope: the message's.
            entry: where it goes; ours from now on, to commit or to discard.
            limit: octets of content that may come.
            ends: looks after line ends; None when the framing does, or nobody is to.
            mends: ``ends`` mends them, and no message is refused for them.
            submitted: completes and checks the header.
        """
        self.envelope = envelope
        self.size = 0
        """Octets of content so far, as the client sent them."""
        self._entry: Entry | None = entry
        self._limit = limit
        self._ends = ends
        self._mends = mends
        self._submitted = submitted
        self._scanner = HeaderScanner()
        self._failure: Reply | None = None

    @property
    def message_id(self) -> str:
        """The header field of this name, fit for a log; "" when there is none."""
        text = self._scanner.message_id.decode("ascii", "replace")
        return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)

    def trace(self, field: bytes) -> None:
        """Write our own Received: field, which comes first and is not counted. May raise `OSError`."""
        assert self._entry is not None
        self._entry.write(field)

    def write(self, content: bytes) -> None:
        """The next piece of content, cut anywhere."""
        self.size += len(content)
        if self._ends is not None:
            content = self._ends.feed(content)
        if self._submitted is not None:
            content = self._submitted.feed(content)
        self._keep(content)

    def _keep(self, content: bytes) -> None:
        self._scanner.feed(content)
        if self._entry is None:
            return
        if self.size > self._limit or self._scanner.received > HOP_LIMIT:
            self.drop()
            return
        if not content:
            return
        try:
            self._entry.write(content)
        except OSError as error:
            self._failure = storage_failure(error)
            self.drop()

    @property
    def refusal(self) -> Reply | None:
        """Why the message cannot be taken, as far as is known; None while it still may."""
        if self.size > self._limit:
            return TOO_BIG
        if self._scanner.received > HOP_LIMIT:
            return _LOOP
        return self._failure

    def finish(self, bare: bool = False) -> Reply | None:
        """Make the message durable; returns why not, or None when it is ours.

        ``bare`` tells that the framing saw a CR or LF on its own.
        """
        self._flush()
        refusal = self.refusal
        if refusal is None or refusal is self._failure:
            if (bare or (self._ends is not None and self._ends.bare)) and not self._mends:
                refusal = _BARE
            elif self._submitted is not None and self._submitted.fault is not None:
                refusal = self._submitted.fault
        if refusal is None and self._entry is not None:
            try:
                self._entry.commit()
            except OSError as error:
                refusal = storage_failure(error)
            else:
                self._entry = None
                return None
        self.drop()
        return refusal

    def _flush(self) -> None:
        """What the filters still hold."""
        content = self._ends.finish() if self._ends is not None and self.size else b""
        if self._submitted is not None:
            content = self._submitted.feed(content) + self._submitted.finish()
        if content:
            self._keep(content)

    def drop(self) -> None:
        """Discard the entry, unless it is committed or gone already."""
        entry, self._entry = self._entry, None
        if entry is not None:
            try:
                entry.discard()
            except OSError:
                pass  # what stays behind was never committed and is swept at the next start


def storage_failure(error: OSError) -> Reply:
    """What the client is told when the spool failed: 452 4.3.1 for want of space, else 451 4.3.0."""
    return _FULL if error.errno in {errno.ENOSPC, errno.EDQUOT} else _TROUBLE
