"""Where the copies are, after a crash test: Maildirs, mail exchangers, the queue, and reports to senders."""

from __future__ import annotations

import email
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.spool.queues import LIVE, Queue, Spool
from tests.peers.mx import Transaction
from tools.lib.crash_verdict import Copy, Place, identify

_DELIVERED_TO: Final = re.compile(rb"^Delivered-To: ([^\r\n]+)", re.M)


def in_maildirs(mail_root: Path) -> Iterator[Copy]:
    """Copies in the Maildirs, and what the reports in them tell; files that are neither are torn copies of nothing."""
    for path in sorted(mail_root.glob("*/new/*")) + sorted(mail_root.glob("*/cur/*")):
        content = path.read_bytes()
        known = identify(content)
        if known is None:
            yield from in_report(content, str(path))
        else:
            name, digest, queue_id = known
            recipient = _DELIVERED_TO.search(content)
            yield Copy(name, recipient[1].decode() if recipient else "", "maildir", digest, queue_id)


@lru_cache(maxsize=4096)  # a sweep looks at the same reports in state after state
def in_report(content: bytes, where: str) -> Sequence[Copy]:
    """The recipients whose failure a report tells; one copy of nobody's message when it is no report."""
    name, queue_id, recipients = "", "", []
    report = email.message_from_bytes(content)
    report_id = str(report["Message-ID"]).strip("<>").partition("@")[0]
    for part in report.walk():
        if part.get_content_type() == "text/rfc822-headers":
            headers = part.get_payload(decode=True)
            known = identify(headers.rstrip() + b"\n\n") if isinstance(headers, bytes) else None
            if known is not None:
                name, _, queue_id = known
        elif field := part["Final-Recipient"]:
            recipients.append(str(field).partition(";")[2].strip())
    if not name or not recipients:
        return [Copy(f"?{where}", "", "maildir")]
    return [Copy(name, recipient, "report", "", queue_id, report_id) for recipient in recipients]


def at_exchanger(messages: Iterable[Transaction]) -> Iterator[Copy]:
    """Copies that a mail exchanger has taken."""
    for transaction in messages:
        name, digest, queue_id = identify(transaction.content) or ("?exchanger", "", "")
        for recipient in transaction.recipients:
            yield Copy(name, recipient, "exchanger", digest, queue_id)


def in_spool(root: Path) -> Iterator[Copy]:
    """Copies in the queue, for the recipients that are not done; what lies in corrupt/ counts for all of them.

    Nothing may be at work on the spool.
    """
    spool = Spool(str(root))
    try:
        for queue in (*LIVE, Queue.CORRUPT):
            for name in sorted(spool.names(queue)):
                if not name.startswith("."):
                    yield from _in_queue(spool, queue, name, root)
    finally:
        spool.close()


def _in_queue(spool: Spool, queue: Queue, name: str, root: Path) -> Iterator[Copy]:
    try:
        with spool.open(queue, name) as opened:
            message = opened.message
            content = b"".join(opened.chunks())
    except QueueFileUnfinished:
        return  # never acknowledged, and swept at the next start
    except QueueFileDamaged:
        known = identify((root / queue.value / name).read_bytes())
        yield Copy(known[0] if known else f"?{queue.value}/{name}", "", "corrupt")
        return
    recipients = zip(message.envelope.recipients, message.states, strict=True)
    for recipient, state in recipients:
        if state.settled:
            continue
        if message.envelope.kind != "mail":
            yield from in_report(content, f"{queue.value}/{name}")
            return
        name_of_message, digest, queue_id = identify(content) or (f"?{queue.value}/{name}", "", "")
        place: Place = "corrupt" if queue is Queue.CORRUPT else "queue"
        yield Copy(name_of_message, recipient.address, place, digest, queue_id)
