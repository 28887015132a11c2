"""The sweep ``clock``: the wall's clock is set, while the server runs and while it is stopped.

The server runs with a clock of its own (`tools.lib.wrong_clock`). A round sends messages that are put off, sets the clock,
and looks:

- nothing bounces: what is put off for ever is tried again and stays in the queue. Only a server that was started later
  than the life of a message gives it up, and that after one more attempt;
- what a host takes now is delivered at the time at which it was due, give or take `TICK`; after a start with a clock that
  was set back, when that clock comes to the time;
- a new message is delivered at once;
- no queue id comes twice, and no delay in the log is negative.

The unit of its length is a round.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

from tests.e2e.world import World
from tests.peers.mx import OK, Actions, Mx, Say, Script
from tests.site import await_value
from tools.lib.crash_load import Moods
from tools.lib.sweeps import Cell, SweepOptions, SweepResult, bar
from tools.lib.wrong_clock import Clock

#: Seconds by which an attempt may come late.
TICK: Final = 1.5
#: Seconds until the first repetition, and what jitter may add to it.
_MINIMUM: Final = 3.0
_JITTER: Final = 0.1
#: Seconds after which a scheduler that has nothing to do looks at the clock.
_NOTICED: Final = 5.0
#: Messages of each kind in a round.
MESSAGES: Final = 5

_HOUR: Final = 3600
_DAY: Final = 86400
#: By how much the clock is set, in words and in seconds.
LEAPS: Final[dict[str, int]] = {"-1 h": -_HOUR, "+1 d": _DAY, "+10 d": 10 * _DAY}
Mode = Literal["running", "restart"]
#: All kinds of rounds.
ROUNDS: Final[Sequence[tuple[str, Mode]]] = [(leap, mode) for leap in LEAPS for mode in ("running", "restart")]

_NOT_NOW: Final = "450 4.2.0 Not now"


class Gate(Moods):
    """Recipients ``gate-…`` are put off as long as the gate is shut, ``stay-…`` for ever."""

    def __init__(self) -> None:
        self.open = False

    def __getitem__(self, recipient: str) -> Actions:
        kind = recipient.partition("-")[0]
        return Say(_NOT_NOW) if kind == "stay" or (kind == "gate" and not self.open) else OK


class Round:
    """One round, with a server of its own."""

    def __init__(self, root: Path, leap: str, mode: Mode, faults: list[str]) -> None:
        """``root`` does not exist yet."""
        self.leap = leap
        self.mode = mode
        self.late = 0.0
        """Seconds by which the latest delivery was late."""
        self.ids: list[str] = []
        self._faults = faults
        self._root = root
        self._gate = Gate()

    def run(self) -> None:
        """Do it.

        Raises:
            AssertionError: the server does not start or does not stop.
        """
        self._root.mkdir(parents=True)
        self._clock = Clock(self._root / "off")
        retry = {"minimum": f"{_MINIMUM:g}s", "maximum": "30s", "lifetime": "5d", "destination_pause": "1s"}
        with World(self._root / "site", start=False, retry=retry) as world:
            world.site.prefix = self._clock.prefix()
            world.site.start()
            mx = world.mx(Script(rcpt=self._gate))
            self._play(world, mx, world.domain(mx))
            if "panic" in world.site.log():
                self._fault("the log has a panic")
            if found := re.findall(r"delays?=[^ ,]*-[0-9][^ ,]*", world.site.log()):
                self._fault(f"a negative delay: {found[0]}")

    def _play(self, world: World, mx: Mx, domain: str) -> None:
        site = world.site
        kept = [f"{kind}-{number}@{domain}" for kind in ("gate", "stay") for number in range(MESSAGES)]
        self.ids += [world.send(recipient) for recipient in kept]
        await_value(lambda: len(site.files("deferred")) == len(kept), what="all are deferred")
        due = time.monotonic() + _MINIMUM * (1 + _JITTER)
        tried = self._tries(mx, "stay")
        if self.mode == "restart":
            site.stop()
            self._set(LEAPS[self.leap])
            self._gate.open = True  # what is due at the start may be tried before it is known that there was one
            site.start()
        else:
            self._gate.open = True
            self._set(LEAPS[self.leap])
        self.ids += [world.send(f"new-{number}@{domain}") for number in range(MESSAGES)]
        self._await(mx, "new", time.monotonic())
        if self.mode == "restart" and LEAPS[self.leap] < 0:
            time.sleep(max(0.0, due - time.monotonic()))
            if self._arrived(mx, "gate"):
                self._fault("tried before its time")
            self._set(0)
            due = time.monotonic() + _NOTICED
        self._await(mx, "gate", max(due, time.monotonic()))
        await_value(lambda: self._tries(mx, "stay") >= tried + MESSAGES, what="tried again")
        self._expect_no_report(world)

    def _expect_no_report(self, world: World) -> None:
        """What no host takes is still there; unless the server has just been told that ten days went by."""
        site = world.site
        if self.mode == "restart" and LEAPS[self.leap] > 5 * _DAY:
            site.await_mail("alice", MESSAGES)
            return
        try:
            await_value(lambda: len(site.files("deferred")) == MESSAGES, timeout=5.0)
        except AssertionError:
            self._fault(f"{len(site.files('deferred'))} of {MESSAGES} messages are still deferred")
        if site.mailbox("alice"):
            self._fault("a bounce before its time")

    def _await(self, mx: Mx, kind: str, due: float) -> None:
        try:
            await_value(lambda: self._arrived(mx, kind) == MESSAGES, timeout=_MINIMUM + 10.0)
        except AssertionError:
            self._fault(f"of {MESSAGES} messages {kind} only {self._arrived(mx, kind)} were delivered in time")
            return
        self.late = max(self.late, late := time.monotonic() - due)
        if late > TICK:
            self._fault(f"messages {kind} were delivered {late:.1f} s late")

    @staticmethod
    def _arrived(mx: Mx, kind: str) -> int:
        return sum(name.startswith(f"{kind}-") for message in mx.messages for name in message.recipients)

    @staticmethod
    def _tries(mx: Mx, kind: str) -> int:
        """How often recipients of this kind were named to the exchanger."""
        return sum(line.upper().startswith("RCPT") and f"<{kind}-" in line for _, line in list(mx.commands))

    def _set(self, off: int) -> None:
        """The clock is off by so many seconds from now on."""
        self._clock.set_by(off - self._clock.off)

    def _fault(self, what: str) -> None:
        self._faults.append(f"{self.leap}, {self.mode}: {what}")


def sweep(root: Path, rounds: Sequence[tuple[str, Mode]], say: Callable[[str], None]) -> tuple[list[Round], list[str]]:
    """Play these rounds; the rounds, and what was wrong."""
    played: list[Round] = []
    faults: list[str] = []
    for number, (leap, mode) in enumerate(rounds, 1):
        one = Round(root / f"round{number}", leap, mode, faults)
        one.run()
        played.append(one)
        if not faults:
            shutil.rmtree(root / f"round{number}")
        say(f"{bar(number, len(rounds))} {leap}, {mode}; {len(faults)} faults")
    for one in played:  # each has a spool of its own
        if len(set(one.ids)) != len(one.ids):
            faults.append(f"{one.leap}, {one.mode}: a queue id came twice")
    return played, faults


def run(options: SweepOptions, say: Callable[[str], None]) -> SweepResult:
    """See the module."""
    chance = random.Random(options.seed)
    rounds: list[tuple[str, Mode]] = []
    while len(rounds) < options.length:
        rounds += chance.sample(ROUNDS, len(ROUNDS))
    played, faults = sweep(options.directory, rounds[: options.length], say)
    rows: list[dict[str, Cell]] = []
    for leap, mode in ROUNDS:
        some = [one for one in played if (one.leap, one.mode) == (leap, mode)]
        if some:
            messages = sum(len(one.ids) for one in some)
            latest = max(one.late for one in some)
            rows.append({"leap": leap, "server": mode, "rounds": len(some), "messages": messages, "latest, s": latest})
    return SweepResult(rows, faults)
