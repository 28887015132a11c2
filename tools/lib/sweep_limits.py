"""The sweep ``limits``: memory, processes or descriptors are used up, again and again, under load.

Spool and mailboxes outlive the rounds; each starts the server anew, in control groups of its own, and takes one of `KINDS`:

- *memory*, *pids*, *descriptors*: clients come until there is no room. Each one more is told 421, at once. Those who are
  in, at points from the greeting to the content, all end their message and get a 250; when they have left, the next one is
  let in. No process dies.
- *no descriptor left*: the limit of running listeners is set to what they have, of which they know nothing. The same is
  promised, but that those who are in may hear 451 or 452 where they would need a descriptor.
- *no process for deliveries*, *no descriptor for deliveries*: mail is taken meanwhile, and waits. It goes on afterwards.
- *killed for memory*: a neighbour in the same group takes all of it, until the kernel has killed some of ours. The server
  serves again when the neighbour is gone.

In all of them no process computes for nothing: listeners and the scheduler use less than a tenth of a processor while
something is at its end. And in the end each acknowledged message is found, whole, and nobody has got a report for what was
a fault of ours.

The unit of its length is a round.
"""

from __future__ import annotations

import random
import smtplib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from tests.procs import alive
from tests.site import await_value
from tools.lib.crash_verdict import totals
from tools.lib.flood_clients import descriptors_for
from tools.lib.limit_guests import Guest
from tools.lib.limit_play import FULL, MOST, TALKERS, LimitPlay
from tools.lib.sweeps import Cell, SweepOptions, SweepResult, Unavailable, bar

#: Seconds within which all is well again, when there is room again.
AGAIN: Final = 5.0
#: Seconds within which mail that had to wait is tried: the pause between two tries to start a process has grown.
TRIED: Final = 15.0
_MIB: Final = 1 << 20

#: Takes memory, a MiB at a time, until it is killed; the kernel does not kill it for that.
_NEIGHBOUR: Final = """
import sys, time
for path in sys.argv[1:]:
    open(path, "w").write("0")
open("/proc/self/oom_score_adj", "w").write("-1000")
hoard = []
while len(hoard) < 1024:
    hoard.append(b"x" * (1 << 20))
    time.sleep(0.003)
time.sleep(60)
"""


class LimitSweep(LimitPlay):
    """One run of the sweep."""

    def run(self) -> None:
        """Do it all; the results are in the attributes.

        Raises:
            AssertionError: the server does not start or does not stop.
        """
        with self._world as world:
            for number, name in enumerate(self._rounds, 1):
                self._round(name)
                done = f"{name}; {world.ledger.acknowledged()} acknowledged, {len(self.faults)} faults"
                self._say(f"{bar(number, len(self._rounds))} {done}")
            self.verdict, faults = world.conclude()
            self.faults += faults

    def _round(self, name: str) -> None:
        world = self._world
        needs, play = KINDS[name]
        if lack := world.groups.lacks.get(needs):
            self.skipped[name] = lack
            return
        self._kind = name
        self._tally.rounds += 1
        before, self._neighbours = world.groups.killed(), 0
        try:
            play(self)
        except (AssertionError, OSError, smtplib.SMTPException) as fault:
            self._fault(f"{type(fault).__name__}: {fault}")
        world.groups.free()
        killed = world.groups.killed() - before - self._neighbours
        self._tally.killed += killed
        self._check(not killed or name == "killed for memory", f"the kernel had to kill {killed}")
        try:
            if world.site.process is not None:
                world.stop()
        except AssertionError as fault:
            self._fault(str(fault))

    # -- listeners ----------------------------------------------------------------------------------------------------

    def memory(self) -> None:
        """See the module."""
        self._world.start()
        self._crowd(lambda: self._limit("memory", self._world.chance.randint(30, 50) * _MIB))

    def pids(self) -> None:
        """See the module."""
        self._world.start()
        self._crowd(lambda: self._limit("pids", self._world.chance.randint(20, 80)))

    def descriptors(self) -> None:
        """See the module."""
        self._world.start(self._world.chance.randint(60, 160))
        self._crowd(lambda: None)

    def no_descriptor(self) -> None:
        """See the module."""
        world = self._world
        world.start()
        world.send()
        pids = world.lasting()
        guests: list[Guest] = []
        try:
            for _ in range(TALKERS):
                self._hear(self._knock(), guests, ("220",))
            with self._narrow(world.site.pids("listener"), 0):
                self._fill(guests)
                with self._no_spin(pids):
                    waiting = list(self._knocks(self._pause))
                for knock in waiting:
                    self._hear(knock, guests)
                self._end(guests, {"250", "451", "452"})
            self._tally.kept += len(guests)
            self._check(world.lasting() == pids, f"processes died: {pids} were, {world.lasting()} are")
        finally:
            for guest in guests:
                guest.leave()
        self._expect_room()

    def _crowd(self, limit: Callable[[], None]) -> None:
        world = self._world
        world.send()  # from now on there is a delivery process
        pids = world.lasting()
        limit()
        guests: list[Guest] = []
        try:
            with world.load():
                self._fill(guests)
                for knock in self._knocks(self._pause / 2):
                    self._hear(knock, guests)
            with self._no_spin(pids):
                waiting = list(self._knocks(self._pause))
            for knock in waiting:
                self._hear(knock, guests)
            self._tally.kept += len(guests)
            self._end(guests, {"250"})
            self._check(world.lasting() == pids, f"processes died: {pids} were, {world.lasting()} are")
        finally:
            for guest in guests:
                guest.leave()
        self._expect_room()

    def _expect_room(self, seconds: float = AGAIN) -> None:
        """Everybody has left: the next one is let in, and his message delivered."""
        start = time.monotonic()
        served = 0
        while served < FULL:
            answer = self._dismiss(self._knock())
            served = served + 1 if answer == "220" else 0
            took = time.monotonic() - start
            if took > 4 * seconds:
                self._fault(f"{answer} when all have left, for {took:.1f} s")
                return
            time.sleep(0.01)
        took = time.monotonic() - start
        self._tally.again = max(self._tally.again, took)
        self._check(took <= seconds, f"nobody was let in until all had left for {took:.1f} s")
        self._world.groups.free()
        self._world.send()

    # -- deliveries ---------------------------------------------------------------------------------------------------

    def no_process(self) -> None:
        """See the module."""
        world = self._world
        world.start()
        self._wait_in_queue(lambda: self._limited(world.chance.randint(0, 3)))

    def no_descriptor_for_deliveries(self) -> None:
        """See the module."""
        world = self._world
        world.start()
        world.send()
        pids = [*world.site.pids("scheduler"), *world.site.deliveries()]
        which = world.chance.choice((pids, pids[:1], pids[1:]))
        self._wait_in_queue(lambda: self._narrow(which, world.chance.randint(0, 3)))

    def _wait_in_queue(self, narrow: Callable[[], AbstractContextManager[None]]) -> None:
        world = self._world
        pids = world.lasting()
        guests: list[Guest] = []
        try:
            for _ in range(TALKERS):
                self._hear(self._knock(), guests, ("220",))
            with narrow():
                self._end(guests, {"250"})
                with self._no_spin(pids):
                    time.sleep(self._pause)
            start = time.monotonic()
            queued = world.site.files("incoming") + world.site.files("active")
            await_value(lambda: not world.waiting(queued), TRIED, "what had to wait is tried")
            self._tally.again = max(self._tally.again, time.monotonic() - start)
            self._tally.kept += len(guests)
            self._check(world.lasting() == pids, f"processes died: {pids} were, {world.lasting()} are")
        finally:
            for guest in guests:
                guest.leave()
        world.send()

    # -- the kernel ---------------------------------------------------------------------------------------------------

    def killed(self) -> None:
        """See the module."""
        world = self._world
        world.start()
        world.send()
        site = world.site
        roles = [[site.status().pid], site.pids("scheduler"), site.deliveries(), *([pid] for pid in site.pids("listener"))]
        self._limit("memory", 24 * _MIB)
        with world.load(4):
            for pids in world.chance.sample(roles, world.chance.randint(1, 3)):
                time.sleep(world.chance.uniform(0, self._pause))
                self._strike([pid for pid in pids if alive(pid)])
            start = time.monotonic()
            if not self._up():
                world.site.process = None
                world.start()
            await_value(lambda: len(world.site.pids("listener")) == 2 and world.site.pids("scheduler"), what="all are back")
            while self._dismiss(self._knock()) != "220":
                time.sleep(0.02)
            took = time.monotonic() - start
            self._tally.again = max(self._tally.again, took)
            self._check(took <= AGAIN, f"served again after {took:.1f} s")
        world.groups.free()
        world.send()

    def _strike(self, pids: Sequence[int]) -> None:
        """Have the kernel kill one of these processes, unless it is gone with its master."""
        groups = self._world.groups
        if not pids or not self._up():
            return
        Path(f"/proc/{pids[0]}/oom_score_adj").write_text("1000")
        before = groups.killed()
        neighbour = subprocess.Popen([sys.executable, "-c", _NEIGHBOUR, *groups.entrances()])
        try:
            await_value(lambda: groups.killed() > before or neighbour.poll() is not None, 20, "somebody is killed")
        finally:
            self._neighbours += neighbour.poll() is not None
            neighbour.kill()
            neighbour.wait()
        await_value(lambda: not alive(pids[0]), what="the killed one is gone")


#: What there is, and the controller that it needs, if any.
KINDS: Final[Mapping[str, tuple[str, Callable[[LimitSweep], None]]]] = {
    "memory": ("memory", LimitSweep.memory),
    "pids": ("pids", LimitSweep.pids),
    "descriptors": ("", LimitSweep.descriptors),
    "no descriptor left": ("", LimitSweep.no_descriptor),
    "no process for deliveries": ("pids", LimitSweep.no_process),
    "no descriptor for deliveries": ("", LimitSweep.no_descriptor_for_deliveries),
    "killed for memory": ("memory", LimitSweep.killed),
}


def run(options: SweepOptions, say: Callable[[str], None]) -> SweepResult:
    """See the module."""
    if lack := descriptors_for(MOST):
        raise Unavailable(lack)
    names = list(KINDS)
    chance = random.Random(options.seed)
    rounds: list[str] = []
    while len(rounds) < options.length:
        chance.shuffle(names)
        rounds += names
    sweep = LimitSweep(options.directory, options.seed, rounds[: options.length], say)
    sweep.run()
    verdict = sweep.verdict
    assert verdict is not None
    rows: list[dict[str, Cell]] = [
        {
            "at its end": name,
            "rounds": sweep.skipped.get(name, tally.rounds),
            "sessions kept": tally.kept,
            "250": tally.ended,
            "421": tally.refused,
            "slowest 421, s": tally.slowest,
            "of a processor": tally.share,
            "again after, s": tally.again,
            "killed": tally.killed,
        }
        for name, tally in sweep.tallies.items()
    ]
    rows.append({"at its end": "all", **totals([verdict])})
    return SweepResult(rows, sweep.faults)
