"""The books of the sweep ``soak``: a ledger that forgets, and the account at each checkpoint.

What was sent since the last checkpoint, and what was still in the queue then, must be found. What was found, and is not
in the queue, is forgotten, and if it comes once more nobody has sent it.

Extra copies must be named by the log: as in doubt, or beforehand, when the disk did not take what was done with a message,
and then a process died who knew it. A power cut excuses one of each message that was there before, for each recipient; whom
the server names then shows `tests/e2e/test_doubt.py`, because the machine here goes on, with the same boot id.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from tools.lib.crash_load import Ledger
from tools.lib.crash_verdict import Copy, Sent, doubts, judge

_UNNOTED: Final = re.compile(r"\]: (\w+): warning: cannot be noted in the queue file: ")


class Account(msgspec.Struct, frozen=True):
    """What a checkpoint has found; the faults are for people."""

    messages: int
    """Acknowledged ones that were accounted for."""
    lost: int
    torn: int
    in_doubt: int
    """Extra copies that the log names."""
    refused: int
    """Extra copies because a death or a power cut took what the disk had refused or not yet taken."""
    faults: tuple[str, ...]


class Books(Ledger):
    """The ledger, with how many deaths and power cuts there were before each message."""

    def __init__(self, path: Path) -> None:
        """A new file."""
        super().__init__(path)
        self._deaths = 0
        self._cuts = 0
        self._born: dict[str, tuple[int, int]] = {}
        """Deaths and power cuts before a message was sent."""
        self._forgotten = 0
        self._guard = threading.Lock()
        self._kept: list[Copy] = []
        self._words: Counter[tuple[str, str]] = Counter()
        self._unnoted: Counter[str] = Counter()

    def note(self, message: Sent) -> None:
        """See the ledger."""
        with self._guard:
            self._born.setdefault(message.id, (self._deaths, self._cuts))
        super().note(message)

    def died(self) -> None:
        """A process dies."""
        with self._guard:
            self._deaths += 1

    def cut(self) -> None:
        """The power is cut."""
        with self._guard:
            self._cuts += 1

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
        unnoted = self._unnoted + Counter(_UNNOTED.findall(log))
        first = judge(sent, copies, words, stuck)
        second = judge(sent, copies, words + self._excused(copies, unnoted), stuck)
        queued = frozenset(copy.id for copy in copies if copy.place == "queue")
        self._forget(sent, copies, words, unnoted, queued)
        excused = len(first.unexplained) - len(second.unexplained)
        messages = sum(1 for message in sent if message.queue_id and message.id not in queued)
        account = Account(
            messages, len(second.lost), len(second.torn), len(first.explained), excused, tuple(second.broken())
        )
        return account, queued

    def _excused(self, copies: Sequence[Copy], unnoted: Mapping[str, int]) -> Counter[tuple[str, str]]:
        """How many copies more a death or a power cut can have made, by queue id and recipient.

        ``unnoted``: how often the log says that the disk did not take what was to be noted of a message.
        """
        senders = {message.id: message.sender for message in self.messages()}
        excused: dict[tuple[str, str], int] = {}
        for copy in copies:
            deaths, cuts = self._born.get(copy.id, (self._deaths, self._cuts))
            deaths, cuts = self._deaths - deaths, self._cuts - cuts
            for queue_id, recipient in ((copy.queue_id, copy.recipient), (copy.report_id, senders.get(copy.id, ""))):
                if queue_id:
                    excused[queue_id, recipient] = cuts + min(deaths, unnoted.get(queue_id, 0))
        return Counter({key: count for key, count in excused.items() if count})

    def _forget(
        self,
        sent: Sequence[Sent],
        copies: Sequence[Copy],
        words: Mapping[tuple[str, str], int],
        unnoted: Mapping[str, int],
        queued: Collection[str],
    ) -> None:
        self._kept = [copy for copy in copies if copy.id in queued and copy.place != "queue"]
        queue_ids = {copy.queue_id for copy in copies if copy.id in queued}
        self._words = Counter({key: count for key, count in words.items() if key[0] in queue_ids})
        self._unnoted = Counter({key: count for key, count in unnoted.items() if key in queue_ids})
        with self._lock, self._guard:
            for message in sent:
                if message.id not in queued:
                    self._forgotten += bool(message.queue_id)
                    del self._messages[message.id]
                    del self._born[message.id]
