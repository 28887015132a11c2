"""The sweep ``files``: whatever may lie in a queue, thousands of cases, before a real scheduler.

A batch of harmed things (`tools.lib.queue_harms`) and of good messages, one for each four, is put into incoming, active and
deferred of a stopped server, and some into incoming of the running one. Then:

- no process dies, nothing is logged as panic;
- each harmed thing lies in corrupt/ as it was, but for what was never finished, which is swept from incoming;
- each message that is one still goes to those, and only those, who had not got it yet, once and whole; nothing else does;
- nothing is left in the queues, and nobody is told of what nobody sent.

The unit of its length is a harmed thing.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from mtad.spool.queues import Queue, Spool
from tests.e2e.world import World
from tests.peers.mx import Mx
from tools.lib import queue_harms
from tools.lib.queue_harms import CASE_FIELD, Expected, Harm, Original
from tools.lib.sweeps import Cell, SweepOptions, SweepResult, Unavailable, bar

#: Harmed things in a batch.
BATCH: Final = 500
#: Of so many things one is a good message.
_GOOD: Final = 5
#: Seconds in which the server is done with a batch.
_PATIENCE: Final = 60.0
_QUEUES: Final = (Queue.INCOMING, Queue.ACTIVE, Queue.DEFERRED)
#: What becomes of a thing, and how the table says it. A message may be one although its last record is cut off.
_FATES: Final = {"corrupt": "in corrupt/", "message": "delivered", "swept": "swept"}
_CASE: Final = re.compile(rb"^%s: (\d+)\r$" % CASE_FIELD.encode(), re.M)


class Case(msgspec.Struct, frozen=True):
    """One thing in a queue."""

    number: int
    harm: str
    queue: Queue
    name: str
    original: Original
    expected: Expected
    inode: int

    def __str__(self) -> str:
        return f"case {self.number} ({self.harm} in {self.queue.value}, {self.name!r})"


class FilesSweep:
    """One run of the sweep."""

    def __init__(
        self,
        root: Path,
        seed: int,
        say: Callable[[str], None],
        harms: Sequence[Harm] = queue_harms.HARMS,
        batch: int = BATCH,
    ) -> None:
        """``batch`` is how many harmed things there are at a time."""
        self._root = root
        self._chance = random.Random(f"{seed} files")
        self._say = say
        self._harms = harms
        self._batch = batch
        self._number = 0
        self._now = time.time()
        self._seen = 0
        self._staging = root / "staging"
        self.counts: Counter[str] = Counter()
        self.fates: Counter[tuple[str, str]] = Counter()
        self.largest = 0
        """The most memory that a scheduler had, in MiB."""
        self.faults: list[str] = []

    def run(self, length: int) -> None:
        """Do it all; the results are in the attributes.

        Raises:
            AssertionError: the server does not start or does not stop.
            Unavailable: only root can make all that.
        """
        if os.geteuid() != 0:
            raise Unavailable("only root can give files away and make devices")
        self._staging.mkdir()
        with World(self._root / "site", start=False) as world:
            mx = world.mx()
            domain = world.domain(mx)
            Spool(str(world.site.spool_path), create=True).close()
            while (done := sum(self.counts.values())) < length:
                self._one_batch(world, mx, domain, min(self._batch, length - done))
                self._say(f"{bar(sum(self.counts.values()), length)} {len(self.faults)} faults")

    def _one_batch(self, world: World, mx: Mx, domain: str, size: int) -> None:
        site = world.site
        harms: list[Harm] = [self._harms[(self._number + index) % len(self._harms)] for index in range(size)]
        harms += [queue_harms.nothing] * (size // (_GOOD - 1) + 1)
        self._chance.shuffle(harms)
        cases = [self._make(harm, domain) for harm in harms]
        for harm in harms:
            if harm is not queue_harms.nothing:
                self.counts[harm.__name__] += 1
        live = [case for case in cases if case.queue is Queue.INCOMING and case.number % 2]
        for case in cases:
            if case not in live:
                self._place(case, site.spool_path)
        site.start()
        pids = [*site.pids("scheduler"), *site.pids("listener")]
        for case in live:
            self._place(case, site.spool_path)
        self._await_done(site.spool_path)
        if pids != [*site.pids("scheduler"), *site.pids("listener")]:
            self.faults.append(f"processes died in a batch that ended with case {self._number}")
        self._weigh(site.pids("scheduler"))
        site.stop()
        self._judge(cases, mx, site.spool_path)
        if site.mailbox("alice"):
            self.faults.append("a report of what nobody sent")
        if found := re.findall(r"^.*(?:panic|Traceback|delivery process \d+ (?:died|hung)).*$", site.log(), re.M):
            self.faults.append(f"in the log: {found[0]}")

    def _make(self, harm: Harm, domain: str) -> Case:
        self._number += 2
        original = queue_harms.make(self._chance, self._number, domain, self._now)
        other = queue_harms.make(self._chance, self._number + 1, domain, self._now)
        queue = self._chance.choice(_QUEUES)
        bench = queue_harms.Bench(self._chance, self._staging / original.id, queue, other)
        expected = harm(bench, original)
        if not bench.path.is_symlink():
            os.utime(bench.path, (self._now - 100, self._now - 100))
        inode = bench.path.lstat().st_ino
        return Case(self._number // 2, harm.__name__, queue, bench.path.name, original, expected, inode)

    def _place(self, case: Case, spool: Path) -> None:
        os.rename(self._staging / case.name, spool / case.queue.value / case.name)

    def _await_done(self, spool: Path) -> None:
        deadline = time.monotonic() + _PATIENCE
        while left := [f"{queue.value}/{name}" for queue in _QUEUES for name in os.listdir(spool / queue.value)]:
            if time.monotonic() > deadline:
                self.faults.append(f"{len(left)} left in the queues after {_PATIENCE:g} s: {left[:5]}")
                for name in left:
                    os.rename(spool / name, self._staging / name.replace("/", "-"))
                return
            time.sleep(0.05)

    def _weigh(self, pids: Sequence[int]) -> None:
        for pid in pids:
            if match := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
                self.largest = max(self.largest, int(match[1]) // 1024)

    # -- the verdict --------------------------------------------------------------------------------------------------

    def _judge(self, cases: Sequence[Case], mx: Mx, spool: Path) -> None:
        got: dict[int, Counter[str]] = {}
        messages = mx.messages
        contents = {case.number: case.original.content for case in cases}
        for message in messages[self._seen :]:
            match = _CASE.search(message.content)
            number = int(match[1]) // 2 if match else -1
            got.setdefault(number, Counter()).update(message.recipients)
            if contents.get(number) != message.content:
                self.faults.append(f"another content for {message.recipients}")
        self._seen = len(messages)
        corrupt = {path.lstat().st_ino: path for path in (spool / "corrupt").iterdir()}
        for case in cases:
            self._judge_one(case, got.pop(case.number, Counter()), corrupt)
        self.faults += [f"delivered out of nothing: {list(recipients)}" for recipients in got.values()]
        for path in corrupt.values():
            self.faults.append(f"in corrupt, and nobody put it there: {path.name!r}")
        for path in (*(spool / "corrupt").iterdir(), *self._staging.iterdir()):
            _remove(path)

    def _judge_one(self, case: Case, got: Counter[str], corrupt: dict[int, Path]) -> None:
        self.fates[case.harm, case.expected.fate] += 1
        wanted = Counter(case.expected.due)
        if got != wanted:
            self.faults.append(f"{case}: delivered to {dict(got)} instead of {dict(wanted)}")
        kept = corrupt.pop(case.inode, None)
        if (kept is not None) is not (case.expected.fate == "corrupt"):
            self.faults.append(f"{case}: {'in' if kept else 'not in'} corrupt, should be {case.expected.fate}")
        if kept is not None and not kept.name.startswith(case.name[:60]):
            self.faults.append(f"{case}: in corrupt as {kept.name!r}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            _remove(inner)
        path.rmdir()
    else:
        path.unlink()


def run(options: SweepOptions, say: Callable[[str], None]) -> SweepResult:
    """See the module."""
    sweep = FilesSweep(options.directory, options.seed, say)
    sweep.run(options.length)
    say(f"the largest scheduler had {sweep.largest} MiB")
    harms = sorted({name for name, _ in sweep.fates})
    rows: list[dict[str, Cell]] = [
        {"harm": "none: a good message" if name == queue_harms.nothing.__name__ else name.replace("_", " ")}
        | {words: sweep.fates[name, fate] for fate, words in _FATES.items()}
        for name in harms
    ]
    totals: dict[str, Cell] = {words: sum(int(row[words]) for row in rows) for words in _FATES.values()}
    return SweepResult([*rows, {"harm": "all", **totals}], sweep.faults)
