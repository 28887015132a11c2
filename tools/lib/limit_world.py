"""What the sweep ``limits`` plays in: a server in control groups of its own, its peers, its load, and the ledger.

The spool and the mailboxes outlive the starts of the server, so that in the end everything that was acknowledged is looked
for at once.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from tests.site import Site, await_value
from tools.lib import sweep_server
from tools.lib.control_groups import Groups
from tools.lib.crash_finds import in_maildirs, in_spool
from tools.lib.crash_load import DOMAIN, Client, Ledger, compose
from tools.lib.crash_peers import peers
from tools.lib.crash_run import drain
from tools.lib.crash_verdict import Copy, Verdict, doubts, judge

#: Allow oneself so many descriptors, and become the server.
_ALLOW: Final = 'ulimit -n "$0"; exec "$@"'
#: Descriptors of a process, where they are not what is limited.
_PLENTY: Final = 20_000
#: Mean seconds between two messages of a client of the load.
_LOAD_PAUSE: Final = 0.05


class LimitWorld:
    """A context manager: peers and groups while it lasts; the server is started and stopped by those who play in it."""

    def __init__(self, root: Path, seed: int, broken: str, limits: dict[str, Any]) -> None:
        """``broken``: see `tools.lib.sweep_server`; ``limits`` is that section of the configuration."""
        self._root = root
        self._seed = seed
        self._broken = broken
        self._limits = limits
        self._stack = ExitStack()
        self._number = 0
        self.chance = random.Random(f"{seed} limits")

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._peers = stack.enter_context(peers())
            self.groups = Groups(stack)
            self.ledger = Ledger(self._root / "ledger")
            stack.callback(self.ledger.close)
            self.site: Site = self._peers.site(self._root / "site", limits=self._limits)
            stack.callback(self._end)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _end(self) -> None:
        self.groups.free()
        if self.site.process is not None:
            self.stop()

    def start(self, files: int = _PLENTY) -> None:
        """Start the server in the groups, with so many descriptors for each process."""
        server = [sys.executable, sweep_server.__file__, self._broken]
        self.site.prefix = [*self.groups.prefix(), "sh", "-c", _ALLOW, str(files), *server]
        try:
            self.site.start()
        finally:
            self.site.prefix = []

    def stop(self) -> None:
        """Stop it; when it has ended by itself there is nothing to do but to say so.

        Raises:
            AssertionError: it had ended before.
        """
        process = self.site.process
        assert process is not None
        if process.poll() is not None:
            self.site.process = None
            raise AssertionError(f"the master is gone: {process.poll()}")
        self.site.stop()

    def lasting(self) -> list[int]:
        """Process ids that must not change."""
        return [self.site.status().pid, *self.site.pids("scheduler"), *self.site.pids("listener")]

    def name(self, kind: str) -> str:
        """A new name for a message, or whatever needs one."""
        self._number += 1
        return f"{kind}-{self._number}"

    def send(self, timeout: float = 20.0) -> None:
        """Have a message delivered to one of our mailboxes.

        Raises:
            AssertionError: it was not within that many seconds.
            OSError, smtplib.SMTPException: it was not taken.
        """
        message, content = compose(self.chance, self.name("s"))
        message = msgspec.structs.replace(message, recipients=(f"alice@{DOMAIN}",))
        self.ledger.note(message)
        queue_id = self.site.send(message.sender, message.recipients, content, "relay")
        self.ledger.note(msgspec.structs.replace(message, queue_id=queue_id))
        await_value(lambda: not self.waiting([queue_id]), timeout, "a message is delivered")

    def waiting(self, queue_ids: Sequence[str]) -> list[str]:
        """Which of these messages have not been tried, or are being tried."""
        queued = {name for queue in ("incoming", "active") for name in self.site.files(queue)}
        return [queue_id for queue_id in queue_ids if queue_id in queued]

    @contextmanager
    def load(self, clients: int = 2) -> Iterator[None]:
        """Messages without end."""
        stop = threading.Event()
        threads = []
        for _ in range(clients):
            self._number += 1
            address = lambda: self.site.address("relay")  # noqa: E731
            threads.append(Client(self._number, self._seed, self.ledger, address, stop, _LOAD_PAUSE))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def conclude(self) -> tuple[Verdict, list[str]]:
        """Without limits, deliver what can be; what became of all messages, and the promises that were broken."""
        self.groups.free()
        self.start()
        try:
            stuck = drain(self.site)
        finally:
            self.stop()
        copies = [*in_maildirs(self.site.mail_root), *in_spool(self.site.spool_path), *self._peers.copies()]
        verdict = judge(self.ledger.messages(), copies, doubts(self.site.log()), stuck)
        faults = verdict.broken()
        faults += [_blamed(copy) for copy in copies if copy.place == "report" and not copy.recipient.startswith("never-")]
        return verdict, [*faults, *[f"log: {line}" for line in self.site.log().splitlines() if "panic" in line][:5]]


def _blamed(copy: Copy) -> str:
    return f"a report for a fault of ours: {copy.id} for {copy.recipient}"
