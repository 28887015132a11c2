"""The books of the sweep ``soak``: a ledger that forgets, and the account at each checkpoint.

What was sent since the last checkpoint, and what was still in the queue then, must be found. What was found, and is not
in the queue, is forgotten, and if it comes once more nobody has sent it.

An *upset* is a moment after which the server cannot know all that it did before: a power cut, and the end of a process
while the disk refuses to write down what that process knew. It excuses an extra copy of a message that was there before,
for each recipient; all other extra copies must be named by the log.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from tools.lib.crash_load import Ledger
from tools.lib.crash_verdict import Copy, Sent, Verdict, doubts, judge

#: What of an account is a broken promise.
BROKEN: Final = ("lost", "torn", "twice", "stuck")


class Account(msgspec.Struct, frozen=True):
    """What a checkpoint has found; the faults are for people."""

    messages: int
    """Acknowledged ones that were accounted for."""
    lost: int
    torn: int
    in_doubt: int
    """Extra copies that the log names."""
    upset: int
    """Extra copies that an upset excuses."""
    faults: tuple[str, ...]


class Books(Ledger):
    """The ledger, with the number of upsets before each message."""

    def __init__(self, path: Path) -> None:
        """A new file."""
        super().__init__(path)
        self._upsets = 0
        self._born: dict[str, int] = {}
        self._forgotten = 0
        self._guard = threading.Lock()
        self._kept: list[Copy] = []
        self._words: Counter[tuple[str, str]] = Counter()

    def note(self, message: Sent) -> None:
        """See the ledger."""
        with self._guard:
            self._born.setdefault(message.id, self._upsets)
        super().note(message)

    def upset(self) -> None:
        """There was an upset."""
        with self._guard:
            self._upsets += 1

    def total(self) -> int:
        """How many messages were acknowledged, with those that are forgotten."""
        return self._forgotten + self.acknowledged()

    def unknown_to_clients(self, name: str) -> bool:
        """Whether a message was sent and not acknowledged."""
        return any(message.id == name and not message.queue_id for message in self.messages())

    def settle(self, found: Iterable[Copy], log: str, stuck: Sequence[str]) -> tuple[Account, frozenset[str]]:
        """Judge what was found, and forget what is done; the ids of those that are still in the queue, too.

        ``log`` is what was logged since the last time.
        """
        copies = [*found, *self._kept]
        sent = self.messages()
        words = self._words + doubts(log)
        first = judge(sent, copies, words, stuck)
        second = judge(sent, copies, self._excused(copies, words), stuck)
        queued = frozenset(copy.id for copy in copies if copy.place == "queue")
        self._forget(sent, copies, words, queued)
        excused = len(first.unexplained) - len(second.unexplained)
        messages = sum(1 for message in sent if message.queue_id and message.id not in queued)
        account = Account(
            messages, len(second.lost), len(second.torn), len(first.explained), excused, tuple(_faults(second))
        )
        return account, queued

    def _excused(self, copies: Sequence[Copy], words: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
        """The words of the log, and the upsets after each message that could make one more copy."""
        senders = {message.id: message.sender for message in self.messages()}
        upsets: dict[tuple[str, str], int] = {}
        for copy in copies:
            since = self._upsets - self._born.get(copy.id, self._upsets)
            upsets[copy.queue_id, copy.recipient] = since
            if copy.report_id:
                upsets[copy.report_id, senders.get(copy.id, "")] = since
        return words + Counter({key: since for key, since in upsets.items() if since})

    def _forget(
        self, sent: Sequence[Sent], copies: Sequence[Copy], words: Counter[tuple[str, str]], queued: Collection[str]
    ) -> None:
        self._kept = [copy for copy in copies if copy.id in queued and copy.place != "queue"]
        queue_ids = {copy.queue_id for copy in copies if copy.id in queued}
        self._words = Counter({key: count for key, count in words.items() if key[0] in queue_ids})
        with self._lock, self._guard:
            for message in sent:
                if message.id not in queued:
                    self._forgotten += bool(message.queue_id)
                    del self._messages[message.id]
                    del self._born[message.id]


def _faults(verdict: Verdict) -> list[str]:
    kinds = zip(BROKEN, (verdict.lost, verdict.torn, verdict.unexplained, verdict.stuck), strict=True)
    return [f"{word}: {entry}" for word, entries in kinds for entry in entries]
