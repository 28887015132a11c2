"""What all kinds of rounds of the sweep ``limits`` are made of: clients that knock, limits, and what is counted."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from tests.procs import alive, cpu_seconds, descriptors
from tools.lib.crash_verdict import Verdict
from tools.lib.limit_guests import Guest, Knock
from tools.lib.limit_world import LimitWorld

#: The part of a processor that a process of ours may use when it can do nothing.
SPIN: Final = 0.1
#: Seconds within which a new client is told 421.
AT_ONCE: Final = 1.0
#: Seconds between two new clients.
_BETWEEN: Final = 0.05
#: When so many in a row are told 421 it is full.
FULL: Final = 8
#: Guests with a message, in a round; the others say nothing.
TALKERS: Final = 40
#: Seconds. A client came now, and what it waited is what it takes to hear something.
_JUST_NOW: Final = 0.05
#: So many sessions are never needed.
MOST: Final = 4000


class Tally:
    """What happened in the rounds of one kind."""

    def __init__(self) -> None:
        self.rounds = 0
        self.kept = 0
        self.ended = 0
        self.refused = 0
        self.slowest = 0.0
        self.share = 0.0
        self.again = 0.0
        self.killed = 0


class LimitPlay:
    """The stage of one run, and its books."""

    def __init__(
        self,
        root: Path,
        seed: int,
        rounds: Sequence[str],
        say: Callable[[str], None],
        *,
        pause: float = 2.0,
        broken: str = "-",
    ) -> None:
        """``rounds`` are names of kinds; ``pause``: seconds at a limit; ``broken``: see `tools.lib.sweep_server`."""
        self._world = LimitWorld(root, seed, broken, {"connections_per_client": 100_000, "connections": 100_000})
        self._rounds = rounds
        self._say = say
        self._pause = pause
        self._kind = ""
        self._came = 0
        self._neighbours = 0
        self.tallies = {name: Tally() for name in rounds}
        self.skipped: dict[str, str] = {}
        self.faults: list[str] = []
        self.verdict: Verdict | None = None

    @property
    def _tally(self) -> Tally:
        return self.tallies[self._kind]

    def _fault(self, text: str) -> None:
        self.faults.append(f"{self._kind}: {text}")

    def _check(self, good: bool, fault: str) -> None:
        if not good:
            self._fault(fault)

    def _limit(self, controller: Literal["memory", "pids"], more: int) -> None:
        groups = self._world.groups
        groups.limit(controller, groups.use(controller) + more)

    @contextmanager
    def _limited(self, more: int) -> Iterator[None]:
        """The server gets no processes and threads beyond those that it has, and ``more``."""
        self._limit("pids", more)
        try:
            yield
        finally:
            self._world.groups.free()

    @contextmanager
    def _narrow(self, pids: Sequence[int], more: int) -> Iterator[None]:
        """These processes get no descriptors beyond those that they have, and ``more``."""
        before = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids}
        for pid, (_, hard) in before.items():
            used = descriptors(pid)
            free = [number for number in range(len(used) + more + 1) if number not in used]
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[more], hard))
        try:
            yield
        finally:
            for pid, limits in before.items():
                if alive(pid):
                    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)

    def _knock(self) -> Knock:
        self._came += 1
        return Knock(self._world.site.address("relay"), self._came)

    def _knocks(self, seconds: float) -> Iterator[Knock]:
        """New clients, for some seconds, twenty in each; longer where the machine is slower, but so many."""
        for _ in range(round(seconds / _BETWEEN)):
            yield self._knock()
            time.sleep(_BETWEEN)

    def _hear(self, knock: Knock, guests: list[Guest], good: Sequence[str] = ("220", "421")) -> str:
        """What a new client is told; who is let in becomes a guest."""
        seen = knock.age < _JUST_NOW or not knock.answered  # the others have been waiting for us
        answer = knock.answer()
        self._check(answer in good, f"a new client heard {answer}")
        if answer == "220":
            talks = len(guests) < TALKERS
            ledger = self._world.ledger if talks else None
            guest = Guest(knock.client, self._world.name("g"), self._world.chance, ledger)
            guests.append(guest)
            guest.come()
            return answer
        if answer == "421":
            self._tally.refused += 1
            if seen:
                self._tally.slowest = max(self._tally.slowest, knock.took)
                self._check(knock.took <= AT_ONCE, f"the 421 came after {knock.took:.1f} s")
        knock.leave()
        return answer

    @staticmethod
    def _dismiss(knock: Knock) -> str:
        answer = knock.answer()
        knock.leave()
        return answer

    def _fill(self, guests: list[Guest]) -> None:
        refusals = 0
        while refusals < FULL:
            answer = self._hear(self._knock(), guests)
            refusals = refusals + 1 if answer == "421" else 0
            if answer == "silence":
                return
            assert len(guests) < MOST, f"{MOST} sessions, and no end"

    def _end(self, guests: Sequence[Guest], good: set[str]) -> None:
        answers = [guest.end() for guest in guests]
        self._tally.ended += sum(1 for answer in answers if answer.startswith("250"))
        wrong = [answer or "nothing" for answer in answers if answer[:3] not in good]
        self._check(not wrong, f"{len(wrong)} of {len(guests)} guests heard {wrong[:1]}")

    @contextmanager
    def _no_spin(self, pids: Sequence[int]) -> Iterator[None]:
        """None of them computes much meanwhile."""
        before = {pid: cpu_seconds(pid) for pid in pids}
        start = time.monotonic()
        yield
        took = time.monotonic() - start
        share = max((cpu_seconds(pid) - used) / took for pid, used in before.items() if alive(pid))
        self._tally.share = max(self._tally.share, share)
        self._check(share <= SPIN, f"a process uses {100 * share:.0f} % of a processor")

    def _up(self) -> bool:
        process = self._world.site.process
        return process is not None and process.poll() is None
