"""The sweep ``network``: the network is cut at each point of the dialogue, in both roles, and is bad for a while.

A cut is a reset, a FIN, silence, or a window that closes, before, within and after each command, each reply, the content
and its end (`tools.lib.network_cuts`). Then come a loss of 30 % of all packets, and a line of 256 kbit/s, each under load,
and at its end cut for good (`tools.lib.network_lines`). It must hold that:

- nothing that was acknowledged is lost, nor is it torn; what mtad said counts, also when the client did not hear it;
- a message is there twice only when it was cut between the end of its content and the reply, and the log says so; and one
  that its client believes not taken is there only then;
- no session and no delivery lasts longer than its deadline and a little; afterwards threads and sockets are as they were;
- who comes again is served, and what was deferred is delivered.

The unit of its length is a cut; all of them, when there are no more than that.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final

from tests.site import await_value
from tools.lib.crash_run import drain
from tools.lib.crash_verdict import Verdict, doubts, judge
from tools.lib.network_cuts import DIALOGUES, Case, CutDialogues, Ending, every_case
from tools.lib.network_lines import BAD, load
from tools.lib.network_proxy import HARMS, Role
from tools.lib.network_world import NetworkWorld
from tools.lib.sweeps import Cell, SweepOptions, SweepResult, Unavailable, bar

#: Seconds: every time-out of the server, and what is allowed on top of it to a busy machine.
DEADLINE: Final = 2.0
ALLOWANCE: Final = 2.0
#: Cuts that are waited for at a time.
AT_A_TIME: Final = 24
#: Seconds in which threads and sockets are as they were; a listener's idle thread waits five seconds for another client.
_SETTLED: Final = 20.0
#: Seconds of a bad line.
_SHORTEST_LINE: Final = 5.0
_LONGEST_LINE: Final = 60.0
#: Dialogues without harm have the first numbers.
_CLEAN: Final = 100
#: The number of a case, in the name of its messages.
_CASE: Final = re.compile(r"\bc(\d+)-\d")

Choose = Callable[[Sequence[Case]], Sequence[Case]]


class CutSweep:
    """The cuts, one run of them."""

    def __init__(
        self,
        root: Path,
        seed: int,
        say: Callable[[str], None],
        *,
        deadline: float = DEADLINE,
        allowance: float = ALLOWANCE,
        at_a_time: int = AT_A_TIME,
        dialogues: Mapping[Role, Sequence[str]] = DIALOGUES,
        thorough: bool = True,
        broken: str = "-",
        hasty: bool = False,
    ) -> None:
        """Prepare.

        Args:
            root: an empty directory, or none.
            seed: makes the messages.
            say: takes lines about the progress.
            deadline: of the server, for everything; and ``allowance`` for a busy machine, both in seconds.
            at_a_time: cuts.
            dialogues: those of `DIALOGUES` that are there to choose from.
            thorough: wait until a listener's idle threads have ended, too.
            broken: see `NetworkWorld`; and ``hasty``: see `CutDialogues`.
        """
        self._root = root
        self._seed = seed
        self._say = say
        self._deadline = deadline
        self._allowance = allowance
        self._at_a_time = at_a_time
        self._dialogues = dialogues
        self._thorough = thorough
        self._broken = broken
        self._hasty = hasty
        self.faults: list[str] = []
        self.endings: list[Ending] = []
        self.twice: Counter[tuple[Role, str]] = Counter()
        """Copies too many, by role and harm, all of them named."""
        self.verdict: Verdict | None = None

    def run(self, choose: Choose) -> None:
        """Do those of all cases that are chosen; the results are in the attributes.

        Raises:
            AssertionError: the server does not start or does not stop, or a dialogue without harm does not come to its end.
        """
        with NetworkWorld(self._root, self._seed, self._deadline, self._broken) as world:
            dialogues = CutDialogues(world, self._allowance, hasty=self._hasty)
            clean = [(role, dialogue) for role, names in self._dialogues.items() for dialogue in names]
            with ThreadPoolExecutor(self._at_a_time) as pool:
                events = {one: pool.submit(dialogues.events, number, *one) for number, one in enumerate(clean, 1)}
                cases = choose(every_case(_CLEAN, self._dialogues, lambda role, dialogue: events[role, dialogue].result()))
                futures = [pool.submit(dialogues.run, case) for case in cases]
                for done, future in enumerate(as_completed(futures), 1):
                    self.endings.append(future.result())
                    self.faults += future.result().faults
                    if done % max(1, len(cases) // 20) == 0 or done == len(cases):
                        self._say(f"{bar(done, len(cases))} cuts, {len(self.faults)} faults")
            self._await_settled(world)
            stuck = drain(world.site)
        self._judge(world, stuck, {case.number: case for case in cases})

    def _await_settled(self, world: NetworkWorld) -> None:
        """Wait until threads and sockets are as they were before all of it."""
        # A delivery process keeps a thread for each delivery that it ever had at a time: what is held shows in its sockets,
        # and in ever more threads.
        spare = {"threads of delivery": 2 * self._at_a_time}
        if not self._thorough:
            spare["threads of listener"] = 2 * self._at_a_time

        def settled() -> bool:
            return all(count <= world.before[what] + spare.get(what, 0) for what, count in world.held().items())

        try:
            await_value(settled, _SETTLED)
        except AssertionError:
            self.faults.append(f"still held after all: {world.held()}, and before it was {world.before}")

    def _judge(self, world: NetworkWorld, stuck: Sequence[str], cases: dict[int, Case]) -> None:
        copies = world.copies()
        sent = world.ledger.messages()
        text = world.site.log()
        verdict = self.verdict = judge(sent, copies, doubts(text) + world.log.doubts, stuck)
        self.faults += [f"{text}, {_case_of(text, cases)}" for text in verdict.broken()]
        for entry in verdict.explained:
            case = _case_of(entry, cases)
            if case is None or not case.uncertain:
                self.faults.append(f"twice, and was not cut between its end and the reply: {entry}, {case}")
            else:
                self.twice[case.role, case.harm] += 1
        found = {copy.id for copy in copies}
        for message in sent:
            case = _case_of(message.id, cases)
            if message.queue_id or message.id not in found or case is None:
                continue
            if not case.uncertain:
                self.faults.append(f"taken before its end had come: {message.id}, {case}")
        if "panic" in text:
            self.faults.append("the log has a panic")

    def rows(self) -> list[dict[str, Cell]]:
        """The table."""
        verdict = self.verdict
        assert verdict is not None
        cases = {one.case.number: one.case for one in self.endings}
        wrong = {
            what: Counter((case.role, case.harm) for case in (_case_of(entry, cases) for entry in entries) if case)
            for what, entries in (("lost", verdict.lost), ("torn", verdict.torn))
        }
        found: list[dict[str, Cell]] = []
        for role in DIALOGUES:
            for harm in HARMS:
                endings = [one for one in self.endings if (one.case.role, one.case.harm) == (role, harm)]
                if not endings:
                    continue
                found.append(
                    {
                        "network": harm,
                        "mtad is": role,
                        "cuts": len(endings),
                        "needed another session": sum(one.again for one in endings),
                        "lost": wrong["lost"][role, harm],
                        "torn": wrong["torn"][role, harm],
                        "twice, and named": self.twice[role, harm],
                        "over after, s": max(one.late for one in endings),
                    }
                )
        return found


def _case_of(entry: str, cases: dict[int, Case]) -> Case | None:
    """The case of a message, by what is said of it."""
    match = _CASE.search(entry)
    return cases.get(int(match[1])) if match is not None else None


def sample(seed: int, length: int) -> Choose:
    """A choice of ``length`` cases, in an order of its own."""

    def choose(cases: Sequence[Case]) -> Sequence[Case]:
        return random.Random(f"{seed} cuts").sample(cases, min(length, len(cases)))

    return choose


def run(options: SweepOptions, say: Callable[[str], None]) -> SweepResult:
    """See the module."""
    cuts = CutSweep(options.directory / "cuts", options.seed, say)
    cuts.run(sample(options.seed, options.length))
    verdict = cuts.verdict
    assert verdict is not None
    say(f"cuts: {verdict.messages} messages acknowledged, {len(verdict.lost)} lost, {len(verdict.torn)} torn")
    rows, faults = cuts.rows(), cuts.faults
    for number, how in enumerate(BAD):
        seconds = min(_LONGEST_LINE, max(_SHORTEST_LINE, options.length / 20))
        try:
            outcome = load(options.directory / f"line-{number}", options.seed, how, seconds)
        except Unavailable as lack:
            rows.append({"network": how, "mtad is": f"skipped: {lack}"})
            continue
        faults += outcome.faults
        rows.append(
            {
                "network": how,
                "mtad is": "both",
                "messages": outcome.verdict.messages,
                "lost": len(outcome.verdict.lost),
                "torn": len(outcome.verdict.torn),
                "twice, and named": len(outcome.verdict.explained),
                "over after, s": outcome.released,
            }
        )
        say(f"{how}: {outcome.sent} messages begun, {outcome.verdict.messages} acknowledged, in {seconds:.0f} s")
    return SweepResult(rows, faults)
