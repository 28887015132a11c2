"""The crash test: a server under load whose processes are killed at random moments, and what is left of the mail.

Which process is killed when is a schedule made from a seed, so it can be repeated; what the process is doing at that moment
cannot. After the kills the queue is drained, the server stopped in order, and all copies are counted
(`tools.lib.crash_verdict`).

`Break` does on purpose what must never happen, to show that the test would see it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import msgspec

from mtad.cli.mtad_flush import flush
from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.spool.queues import Queue, Spool
from tests.site import Site
from tools.lib.crash_finds import in_maildirs, in_spool
from tools.lib.crash_load import USERS, Client, Ledger
from tools.lib.crash_peers import peers
from tools.lib.crash_verdict import Verdict, doubts, judge

Role = Literal["master", "scheduler", "listener", "delivery"]
Break = Literal["", "lose", "tear", "twice"]

#: How often each role is hit; there are two listeners and two delivery processes.
_WEIGHTS: Final[dict[Role, int]] = {"master": 2, "scheduler": 3, "listener": 3, "delivery": 5}
#: Seconds between two kills: from at once to this.
_LONGEST_WAIT: Final = 0.8
#: Seconds after the kills in which something of the queue must have gone, until it is empty but for what stays.
DRAIN_TIMEOUT: Final = 60.0
#: Seconds between two looks at the queue meanwhile.
_PAUSE: Final = 0.1
#: Whatever is here is not done.
_BUSY: Final = (Queue.INCOMING, Queue.ACTIVE)


class Kill(msgspec.Struct, frozen=True):
    """One kill: after how many seconds, a process of which role, and which of them (0 <= which < 1)."""

    wait: float
    role: Role
    which: float


def schedule(seed: int, kills: int) -> list[Kill]:
    """The kills that a seed brings."""
    chance = random.Random(seed)
    roles = list(_WEIGHTS)
    return [
        Kill(chance.uniform(0.0, _LONGEST_WAIT), chance.choices(roles, list(_WEIGHTS.values()))[0], chance.random())
        for _ in range(kills)
    ]


class CrashTest:
    """One crash test in a directory of its own."""

    def __init__(
        self,
        root: Path,
        seed: int,
        kills: int,
        *,
        clients: int = 6,
        pause: float = 0.03,
        broken: Break = "",
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``pause``: of each client between two messages, mean, in seconds; ``say`` takes lines about the progress."""
        self._root = root
        self._seed = seed
        self._kills = schedule(seed, kills)
        self._clients = clients
        self._pause = pause
        self._broken = broken
        self._say = say
        self._stop = threading.Event()

    def run(self) -> Verdict:
        """Do it all.

        Raises:
            AssertionError: the server does not start or does not stop.
        """
        with peers() as world:
            site = world.site(self._root / "site")
            ledger = Ledger(self._root / "ledger")
            try:
                site.start()
                with self._load(site, ledger):
                    self._kill_all(site, ledger)
                self._say(f"{ledger.acknowledged()} messages acknowledged, draining the queue")
                if self._broken == "lose":
                    self._lose(site)
                stuck = drain(site)
            finally:
                ledger.close()
                if site.process is not None:
                    site.stop()
            self._spoil(site)
            copies = [*in_maildirs(site.mail_root), *in_spool(site.spool_path), *world.copies()]
            return judge(ledger.messages(), copies, doubts(site.log()), stuck)

    @contextmanager
    def _load(self, site: Site, ledger: Ledger) -> Iterator[None]:
        def address() -> tuple[str, int]:
            return site.address("relay")

        clients = [Client(number, self._seed, ledger, address, self._stop, self._pause) for number in range(self._clients)]
        for client in clients:
            client.start()
        try:
            yield
        finally:
            self._stop.set()
            for client in clients:
                client.join()

    def _kill_all(self, site: Site, ledger: Ledger) -> None:
        started = time.monotonic()
        for number, kill in enumerate(self._kills, 1):
            time.sleep(kill.wait)
            what = self._kill(site, kill)
            took = time.monotonic() - started
            self._say(f"{took:6.1f} s  kill {number}/{len(self._kills)}: {what}; {ledger.acknowledged()} acknowledged")
        time.sleep(_LONGEST_WAIT / 2)

    def _kill(self, site: Site, kill: Kill) -> str:
        if kill.role == "master":
            assert site.process is not None
            pid = site.process.pid
            site.kill()
            site.start()
            return f"master {pid}, started again"
        for role in dict.fromkeys((kill.role, "delivery", "listener", "scheduler")):
            pids = site.deliveries() if role == "delivery" else site.pids(role)
            if pids:
                pid = pids[int(kill.which * len(pids))]
                os.kill(pid, signal.SIGKILL)
                return f"{role} {pid}"
        return "nobody, since nobody was there"

    def _lose(self, site: Site) -> None:
        """Delete a queue file."""
        site.stop()
        deferred = site.spool_path / "deferred"
        names = site.files("deferred")
        assert names, "nothing is deferred: there is nothing to lose"
        (deferred / random.Random(self._seed).choice(names)).unlink()
        site.start()

    def _spoil(self, site: Site) -> None:
        """Damage, or double, a delivered message."""
        if self._broken not in {"tear", "twice"}:
            return
        victim = random.Random(self._seed).choice(stored(site.mail_root, USERS))
        if self._broken == "tear":
            os.truncate(victim, victim.stat().st_size - 1)
        else:
            shutil.copy(victim, victim.with_name(victim.name + ".copy"))


def stored(mail_root: Path, users: Sequence[str]) -> list[Path]:
    """The files in the mailboxes of these users."""
    return sorted(path for user in users for path in (mail_root / user / "new").glob("*"))


def drain(site: Site, timeout: float = DRAIN_TIMEOUT) -> list[str]:
    """Flush until nothing but what stays is in the queue; what else is when there was no less for ``timeout`` seconds."""
    least = None
    deadline = 0.0
    spool = site.spool()
    try:
        while True:
            begin = time.monotonic()
            left = dict(_left(spool))
            if not left:
                return []
            if least is None or len(left) < least:
                least, deadline = len(left), time.monotonic() + timeout
            elif time.monotonic() > deadline:
                return [text for texts in left.values() for text in texts]
            # Thousands of drains: by the function that the command calls, and without another process for each. What only
            # stays is left alone: it would be tried all the time, and be in the way.
            flush(spool, [name for queue, name in left if queue is Queue.DEFERRED])
            time.sleep(max(_PAUSE, 2 * (time.monotonic() - begin)))  # of a long queue the looks take time from the server
    finally:
        spool.close()


def _left(spool: Spool) -> Iterator[tuple[tuple[Queue, str], list[str]]]:
    """What is in the queue and does not stay, and what there is to say about each."""
    for queue in (Queue.INCOMING, Queue.ACTIVE, Queue.DEFERRED, Queue.HOLD):
        for name, _ in list(spool.times(queue)):
            where = f"{queue.value}/{name}"
            try:
                message = spool.load(queue, name)
            except (FileNotFoundError, QueueFileUnfinished, QueueFileDamaged) as reason:
                yield (queue, name), [f"{where}: {reason}"]  # on the move, or about to be swept or put aside
                continue
            texts = [
                f"{where} for {recipient.address}: {state.outcome}"
                for recipient, state in zip(message.envelope.recipients, message.states, strict=True)
                if queue in _BUSY or not (state.settled or recipient.address.startswith("stay-"))
            ]
            if texts:
                yield (queue, name), texts
