"""What must be true after any number of kills, as a pure function: nothing lost, torn, or twice without a word.

A message that got its 250 must be found, for each of its recipients, in a Maildir, at a mail exchanger, in the queue, or in
a report to its sender, and whole wherever it is. More than one copy for a recipient is an extra one. A crash can cause one
between the final dot and the recorded reply, and the server must say so: an extra copy is explained when the log names the
recipient of that message as in doubt, once for each extra copy. A report is a message, too, and may be delivered twice.

Of a message without a 250 nothing is expected, but what is found of it must be whole and not twice, just the same.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import msgspec

#: The header field by which a message is known again.
ID_FIELD: Final = "X-Crash-Id"

_ID: Final = re.compile(rb"^X-Crash-Id: ([0-9a-z-]+)\r?$", re.M | re.I)
_QUEUE_ID: Final = re.compile(rb"^Received: from (?:[^\r\n]|\r?\n[ \t])*?\bid ([0-9A-Za-z]+)", re.M)
_DOUBT: Final = re.compile(r"\]: (\w+): warning: in doubt: .*?<([^>]*)> before", re.M)

Place = Literal["maildir", "exchanger", "queue", "report", "corrupt"]
PLACES: Final[Sequence[Place]] = ("maildir", "exchanger", "queue", "report", "corrupt")


class Sent(msgspec.Struct, frozen=True):
    """One message that a client sent: a line of the ledger. ``digest`` is of its body; ``queue_id`` is "" without a 250."""

    id: str
    sender: str
    recipients: tuple[str, ...]
    digest: str
    queue_id: str = ""


class Copy(msgspec.Struct, frozen=True):
    """One recipient's copy of a message, as found. A report holds no body: its ``digest`` is "".

    ``queue_id`` is the message's; ``report_id`` that of the report in which it was found.
    """

    id: str
    recipient: str
    place: Place
    digest: str = ""
    queue_id: str = ""
    report_id: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """The result. Each list is empty when all is well; its entries are for people."""

    messages: int
    """That got a 250."""
    recipients: int
    """Of these messages."""
    found: Mapping[str, int]
    """Copies by place."""
    lost: tuple[str, ...]
    torn: tuple[str, ...]
    explained: tuple[str, ...]
    """Extra copies that the log names as in doubt."""
    unexplained: tuple[str, ...]
    stuck: tuple[str, ...]
    """What was still in the queue, long after the last kill, and had no reason to."""

    @property
    def good(self) -> bool:
        """Whether the promises were kept."""
        return not self.broken()

    def broken(self, *, doubtful: bool = True) -> list[str]:
        """The promises that were broken, a line each; without ``doubtful`` nothing was allowed to be in doubt."""
        kinds = {"lost": self.lost, "torn": self.torn, "twice without a word": self.unexplained, "stuck": self.stuck}
        if not doubtful:
            kinds["twice"] = self.explained
        return [f"{kind}: {entry}" for kind, entries in kinds.items() for entry in entries]


def digest(body: bytes) -> str:
    """What a body is known by, whichever line ends it has."""
    return hashlib.sha256(body.replace(b"\r\n", b"\n")).hexdigest()


def identify(content: bytes) -> tuple[str, str, str] | None:
    """The id, the digest of the body, and the queue id of a message as it was found; None when it is none of ours."""
    head, gap, body = content.replace(b"\r\n", b"\n").partition(b"\n\n")
    match = _ID.search(head)
    if match is None or not gap:
        return None
    queue_id = _QUEUE_ID.search(head)
    return match[1].decode(), digest(body), queue_id[1].decode() if queue_id else ""


def doubts(log: str) -> Counter[tuple[str, str]]:
    """How often the log says that a recipient (of a queue id) may get a message again."""
    return Counter((match[1], match[2]) for match in _DOUBT.finditer(log))


def judge(
    sent: Iterable[Sent],
    copies: Iterable[Copy],
    in_doubt: Mapping[tuple[str, str], int],
    stuck: Sequence[str] = (),
) -> Verdict:
    """Compare what was sent with what was found."""
    ledger = {message.id: message for message in sent}
    by_recipient: dict[tuple[str, str], list[Copy]] = {}
    torn: list[str] = []
    for copy in copies:
        message = ledger.get(copy.id)
        where = f"{copy.id} {copy.queue_id} for {copy.recipient} in {copy.place}"
        if message is None or copy.recipient not in message.recipients:
            torn.append(f"{where}: nobody sent that")
        elif copy.place == "corrupt" or (copy.place != "report" and copy.digest != message.digest):
            torn.append(where)
        by_recipient.setdefault((copy.id, copy.recipient), []).append(copy)
    lost = [
        f"{message.id} {message.queue_id} for {recipient}"
        for message in ledger.values()
        if message.queue_id
        for recipient in message.recipients
        if (message.id, recipient) not in by_recipient
    ]
    explained: list[str] = []
    unexplained: list[str] = []
    for (name, recipient), found in by_recipient.items():
        extra = len(found) - 1
        if not extra:
            continue
        queue_id = next((copy.queue_id for copy in found if copy.queue_id), "")
        words = in_doubt.get((queue_id, recipient), 0)
        if name in ledger:
            reports = {copy.report_id for copy in found if copy.report_id}
            words += sum(in_doubt.get((report, ledger[name].sender), 0) for report in reports)
        excused = min(extra, words)
        where = f"{name} {queue_id} for {recipient}: {' '.join(copy.place for copy in found)}"
        explained += [where] * excused
        unexplained += [where] * (extra - excused)
    acknowledged = [message for message in ledger.values() if message.queue_id]
    places = Counter(copy.place for group in by_recipient.values() for copy in group)
    return Verdict(
        len(acknowledged),
        sum(len(message.recipients) for message in acknowledged),
        {place: places[place] for place in PLACES},
        tuple(lost),
        tuple(torn),
        tuple(explained),
        tuple(unexplained),
        tuple(stuck),
    )


def totals(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """What a table says of them all."""
    every = list(verdicts)
    return {
        "acknowledged": sum(verdict.messages for verdict in every),
        "lost": sum(len(verdict.lost) for verdict in every),
        "torn": sum(len(verdict.torn) for verdict in every),
        "twice, in doubt": sum(len(verdict.explained) for verdict in every),
        "twice without a word": sum(len(verdict.unexplained) for verdict in every),
        "stuck": sum(len(verdict.stuck) for verdict in every),
    }


def table(verdict: Verdict, most: int = 20) -> str:
    """The verdict for people; of each kind of failure at most so many examples."""
    lines = [f"{verdict.messages:7} messages acknowledged, {verdict.recipients} recipients"]
    lines += [f"{count:7} copies in {place}" for place, count in verdict.found.items()]
    for name, entries in (
        ("lost", verdict.lost),
        ("torn", verdict.torn),
        ("twice, named in doubt by the log", verdict.explained),
        ("twice without a word", verdict.unexplained),
        ("stuck in the queue", verdict.stuck),
    ):
        lines.append(f"{len(entries):7} {name}")
        if entries is not verdict.explained:
            lines += [f"        {entry}" for entry in entries[:most]]
    return "\n".join(lines)
