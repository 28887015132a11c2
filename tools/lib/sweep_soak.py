"""The sweep ``soak``: everything that the other sweeps do, mixed, to one server that lives through all of it.

A seed is a short schedule of harms (`tools.lib.soak_schedule`) under load: processes killed, stopped, reloaded, power
cuts, a disk in trouble, failing system calls, no more memory, processes or descriptors, a line that loses, rude clients,
floods, failing exchangers, harmed files, a clock that is set.
Then all is healed, and within `SERVING` seconds the server must take a message. Every `CHECKPOINT` seeds there is no load,
until what can be delivered is delivered; what is past the time of its next attempt by `GRACE` seconds is stuck. Then:

- each acknowledged message is found, whole; twice only what the log names as in doubt, or what the machine forgot, in a
  power cut, or because a process died and the disk had not taken the record of what it did (`tools.lib.soak_books`);
- each harmed file lies in corrupt/, nothing else does, but for what a power cut left of a message without a 250;
- memory and descriptors of processes that have lived since the last checkpoints are flat (`tools.lib.soak_vitals`).

What is accounted for is thrown away. The seed S of a run with a
length of N plays the schedules S to S + N - 1, so that a single one is played again with its own number and a length of 1;
the load of a seed is always the same, too. What the server is doing at that moment is not.

The unit of its length is a seed.
"""

from __future__ import annotations

import random
import smtplib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from mtad.errors import MtadError
from tools.lib.crash_disks import own_mounts
from tools.lib.crash_finds import in_maildirs, in_spool
from tools.lib.crash_load import Client, compose
from tools.lib.soak_books import Account
from tools.lib.soak_harms import Doing
from tools.lib.soak_queue import corrupt, left, remove, set_aside
from tools.lib.soak_schedule import KINDS, SPAN, Harm, schedule
from tools.lib.soak_stage import Stage
from tools.lib.soak_vitals import Vitals
from tools.lib.sweeps import Cell, Say, SweepOptions, SweepResult, bar

#: Seeds from one checkpoint to the next.
CHECKPOINT: Final = 20
#: Seconds after a seed in which the server takes a message again.
SERVING: Final = 10.0
#: Seconds in which all is delivered that can be: some retries, and what the server itself tries again every ten seconds.
DRAINED: Final = 90.0
_CLIENTS: Final = 3
#: Mean seconds between two messages of a client.
_PAUSE: Final = 0.1
#: Seconds for a harm to end.
_PATIENCE: Final = 120.0


class SoakSweep:
    """One run of the sweep."""

    def __init__(self, root: Path, say: Say, *, preload: str = "", make: Callable[[int], list[Harm]] = schedule) -> None:
        """``preload`` is a library for the server, for the negative control; ``make`` makes the schedule of a seed."""
        self._stage = Stage(root, preload)
        self._root = root
        self._say = say
        self._make = make
        self._log_seen = 0
        self._since: list[int] = []
        self._over = threading.Event()
        self.vitals = Vitals()
        self.accounts: list[Account] = []
        self.done: Counter[str] = Counter()
        self.undone: Counter[str] = Counter()
        self.slowest = 0.0
        self.faults: list[str] = []

    @property
    def acknowledged(self) -> int:
        """How many messages got a 250."""
        return self._stage.books.total()

    @property
    def lacks(self) -> Sequence[str]:
        """What could not be done here."""
        never = [f"{kind}: never done" for kind in self.undone if not self.done[kind]]
        return list(dict.fromkeys([*self._stage.lacks, *never]))

    def run(self, seed: int, length: int) -> None:
        """Play that many seeds, from ``seed`` on, fewer only when nothing goes on; the results are in the attributes."""
        # In a thread of its own, because that is what gets a network of its own.
        with ThreadPoolExecutor(1, "soak") as alone:
            try:
                alone.submit(self._run, seed, length).result()
            finally:
                self._over.set()  # somebody does not want to wait for all seeds
        self._fault("", *self.vitals.faults())

    def _run(self, seed: int, length: int) -> None:
        with self._stage:
            for number in range(seed, seed + length):
                harms = self._make(number)
                self._since.append(number)
                try:
                    self._seed(number, harms)
                    if len(self._since) == CHECKPOINT or number == seed + length - 1:
                        self._checkpoint(last=number == seed + length - 1)
                except (AssertionError, OSError, MtadError) as fault:
                    self._fault(_where(number, harms), f"nothing goes on: {fault!r}")
                    break
                self._say(
                    f"{bar(number - seed + 1, length)} seed {number}: {', '.join(harm.kind for harm in harms)}; "
                    f"{self.acknowledged} acknowledged, {len(self.faults)} faults"
                )
                if self._over.is_set():
                    break

    def _fault(self, where: str, *texts: str) -> None:
        for text in texts:
            self.faults.append(f"{where}{': ' if where else ''}{text}")
            self._say(f"FAULT: {self.faults[-1]}")

    # -- a seed -------------------------------------------------------------------------------------------------------

    def _seed(self, number: int, harms: Sequence[Harm]) -> None:
        stage = self._stage
        begin = time.monotonic()
        doings = [Doing(stage, harm, begin) for harm in harms]
        for doing in doings:
            doing.start()
        with self._load(number):
            time.sleep(SPAN)
            for doing in doings:
                doing.join(_PATIENCE)
            healed = time.monotonic()
            self._note(number, doings)
            with stage.life_lock:
                stage.revive()
            self._serves(number, healed)
        stage.part()
        self._fault(_where(number, harms), *stage.faults)
        stage.faults.clear()

    def _note(self, number: int, doings: Sequence[Doing]) -> None:
        """What became of the harms of a seed."""
        for doing in doings:
            kind = doing.harm.kind
            broken = doing.fault or (f"{kind} does not end" if doing.is_alive() else "")
            if doing.lack:
                self._stage.lacks.append(f"{kind}: {doing.lack}")
            (self.undone if doing.lack or doing.result or broken else self.done)[kind] += 1
            if broken:
                self._fault(_where(number, [one.harm for one in doings]), f"{kind}: {broken}")

    @contextmanager
    def _load(self, number: int) -> Iterator[None]:
        stop = threading.Event()
        site, books = self._stage.site, self._stage.books
        clients = [
            Client(number * 10 + index, number, books, lambda: site.address("relay"), stop, _PAUSE)
            for index in range(_CLIENTS)
        ]
        for client in clients:
            client.start()
        try:
            yield
        finally:
            stop.set()
            for client in clients:
                client.join(_PATIENCE)

    def _serves(self, number: int, healed: float) -> None:
        """Until it takes a message."""
        last = ""
        tries = 0
        while (took := time.monotonic() - healed) < 6 * SERVING:
            tries += 1
            try:
                if not (last := self._send(f"{number * 10 + 9}-{tries}")):
                    break
            except (OSError, smtplib.SMTPException, AssertionError) as fault:
                last = repr(fault)
            time.sleep(0.05)
        took = time.monotonic() - healed
        self.slowest = max(self.slowest, took)
        if took > SERVING:
            self._fault(_where(number, self._make(number)), f"serves again only after {took:.1f} s: {last}")

    def _send(self, name: str) -> str:
        """Send a message; "" when it is taken, or what was said instead."""
        stage = self._stage
        message, content = compose(random.Random(name), name)
        stage.books.note(message)
        with stage.site.client("relay") as client:
            client.ehlo()
            for code, text in (client.mail(message.sender), *map(client.rcpt, message.recipients)):
                if code != 250:
                    return f"{code} {text!r}"
            code, text = client.data(content)
        if code != 250:
            return f"{code} {text!r}"
        stage.books.note(msgspec.structs.replace(message, queue_id=text.decode().rpartition(" ")[2]))
        return ""

    # -- a checkpoint -------------------------------------------------------------------------------------------------

    def _checkpoint(self, *, last: bool) -> None:
        stage = self._stage
        where = f"seeds {self._since[0]} to {self._since[-1]}"
        if last and stage.harmed:
            stage.stop()  # the next scheduler looks at all that lies in the queues
        stuck = self._drain(harmed=last)
        self.vitals.look(stage.site)
        with stage.paused():
            self._fault(where, *corrupt(stage, last=last))
            with set_aside(stage):
                copies = [*in_maildirs(stage.site.mail_root), *in_spool(stage.site.spool_path), *stage.copies()]
            account, queued = stage.books.settle(copies, self._log(where), stuck)
            stage.tempers.released = queued
            stage.tempers.seen.clear()
            for exchanger in stage.exchangers:
                exchanger.forget()
            self._clear()
        self.accounts.append(account)
        self._fault(where, *account.faults, *stage.faults)
        stage.faults.clear()
        self._since = []

    def _drain(self, *, harmed: bool) -> list[str]:
        """Wait until all is delivered that can be; what is left in the end."""
        deadline = time.monotonic() + DRAINED
        while (still := left(self._stage, harmed=harmed)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return still

    def _log(self, where: str) -> str:
        """What was logged since the last time."""
        with self._stage.site.log_path.open("rb") as file:
            file.seek(self._log_seen)
            text = file.read().decode("utf-8", "replace")
            self._log_seen = file.tell()
        for word in ("panic", "Traceback"):
            if word in text:
                self._fault(where, "the log has: " + next(line for line in text.splitlines() if word in line))
        return text

    def _clear(self) -> None:
        """Throw away what is accounted for, for good."""
        mail = self._stage.site.mail_root
        for path in [*mail.glob("*/new/*"), *mail.glob("*/tmp/*"), *self._stage.staging.iterdir()]:
            remove(path)
        self._stage.sync()


def _where(number: int, harms: Sequence[Harm]) -> str:
    return f"seed {number} ({', '.join(map(str, harms))})"


def run(options: SweepOptions, say: Callable[[str], None]) -> SweepResult:
    """See the module."""
    own_mounts()
    sweep = SoakSweep(options.directory, say)
    sweep.run(options.seed, options.length)
    accounts = sweep.accounts
    for lack in sweep.lacks:
        say(f"left out: {lack}")
    say(f"serving again within {sweep.slowest:.1f} s")
    for line in sweep.vitals.lines():
        say(line)
    rows: list[dict[str, Cell]] = [
        {"harm": kind, "done": sweep.done[kind], "not done": sweep.undone[kind]}
        for kind in KINDS
        if sweep.done[kind] + sweep.undone[kind]
    ]
    rows.append(
        {
            "harm": "all",
            "done": sum(sweep.done.values()),
            "not done": sum(sweep.undone.values()),
            "messages": sum(one.messages for one in accounts),
            "lost": sum(one.lost for one in accounts),
            "torn": sum(one.torn for one in accounts),
            "twice, in doubt": sum(one.in_doubt for one in accounts),
            "twice, not noted": sum(one.refused for one in accounts),
        }
    )
    return SweepResult(rows, sweep.faults)
