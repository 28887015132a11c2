"""SIGKILL before the Nth durable system call, for every N between a message's arrival and its removal, in each process.

A *point* is a role and a number N. For each there is a server that has just been started, and one process of it is traced
(`tools.lib.tracer`) while the messages of `tools.lib.call_world` come in; before its Nth call it is killed. Then a new
message must be taken and delivered within `SERVING` seconds, the queue must drain, and of all messages nothing may be lost,
torn, or twice without a word in the log. A master that is killed is started again, as a service manager would.

How many calls there are is found out first, in a round without a kill. The master hardly takes part in a message's life:
its calls are those of its start, of a reload and of a stop, each with mail in the queue.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from tools.lib.call_world import KINDS, ROLES, CallWorld, Role
from tools.lib.crash_verdict import Verdict, totals
from tools.lib.injection import Call, Injection
from tools.lib.sweeps import Say, SweepOptions, SweepResult, bar

#: Seconds from the kill until a new message is taken and delivered.
SERVING: Final = 2.0
#: Also counted: what is said to others, a client, a next hop, another process.
MORE: Final = ("sendto", "sendmsg")
#: Seconds for a step of a master's life.
_STEP: Final = 10.0


class Point(msgspec.Struct, frozen=True):
    """One thing to try: which process, and before which of its calls."""

    role: Role
    number: int


class Tried(msgspec.Struct, frozen=True):
    """What came of a point; ``hit`` is the call before which the process was killed, None when it did not come so far."""

    point: Point
    hit: Call | None
    serving: float
    verdict: Verdict
    wrong: Sequence[str]

    def faults(self, limit: float = SERVING) -> list[str]:
        """The promises that were broken; ``limit`` in seconds, for serving again."""
        found = [*self.wrong]
        if self.serving > limit:
            found.append(f"serving again only after {self.serving:.1f} s")
        found += self.verdict.broken()
        at = f"{self.hit.call} {self.hit.where}" if self.hit else "no call"
        return [f"{self.point.role} killed before call {self.point.number} ({at}): {text}" for text in found]


class CallSweep:
    """The sweep in one world."""

    def __init__(self, world: CallWorld) -> None:
        """The world has been entered."""
        self.world = world

    def count(self, role: Role) -> list[Call]:
        """The calls of a process of this role from a message's arrival to its removal, in a round without a kill."""
        world = self.world
        injection, stopped = self._live(Point(role, 0))
        if stopped:
            world.start()
        stuck = world.drain()
        world.site.stop()
        world.judge(stuck)
        return injection.calls

    def kill(self, point: Point) -> Tried:
        """Try one point."""
        world = self.world
        injection, stopped = self._live(point)
        serving = 0.0
        if injection.hit is not None:
            if point.role == "master":
                if world.site.process is not None:  # else its end was seen before the word of the tracer was
                    world.gone()
                world.start()
                stopped = False
            serving = world.probe(injection.hit_at)
        if stopped:
            world.start()
        stuck = world.drain()
        world.site.stop()
        verdict, wrong = world.judge(stuck)
        return Tried(point, injection.hit, serving, verdict, wrong)

    def _live(self, point: Point) -> tuple[Injection, bool]:
        """A server's life with all kinds of messages, up to the kill; whether it was stopped already."""
        if point.role == "master":
            return self._live_master(point.number)
        world = self.world
        world.start(warm=point.role == "delivery")
        with Injection(world.pid(point.role), point.number, "kill", MORE) as injection:
            for kind in KINDS:
                world.send(kind)
                world.drain(lambda: injection.hit is not None)
                if injection.hit is not None:
                    break
            else:
                injection.wait(0.05)  # the last line of the log comes after the message is gone
        return injection, False

    def _live_master(self, number: int) -> tuple[Injection, bool]:
        world = self.world
        world.leave("local")
        with world.gated() as (process, begin), Injection(process.pid, number, "kill", MORE) as injection:

            def until(condition: Callable[[], bool]) -> bool:
                deadline = time.monotonic() + _STEP
                while injection.hit is None and not condition() and time.monotonic() < deadline:
                    time.sleep(0.005)
                return injection.hit is None

            begin()
            if not until(lambda: world.up(process)):
                return injection, True
            world.send("big")
            process.send_signal(signal.SIGHUP)
            if not until(world.reloaded):
                return injection, True
            world.send("later")
            process.send_signal(signal.SIGTERM)
            if until(lambda: process.poll() is not None):
                world.gone()
        return injection, True


def points(counts: dict[Role, int], length: int, chance: random.Random) -> list[Point]:
    """As many points as wanted, in the order of the roles; all of them when there are not more."""
    every = [Point(role, number) for role, count in counts.items() for number in range(1, count + 1)]
    chosen = set(chance.sample(every, min(length, len(every))))
    return [point for point in every if point in chosen]


def run(options: SweepOptions, say: Say) -> SweepResult:
    """Try ``options.length`` points, or every one.

    Raises:
        Unavailable: processes cannot be traced here.
    """
    tried: list[Tried] = []
    with CallWorld(options.directory) as world:
        sweep = CallSweep(world)
        counts = {role: len(sweep.count(role)) for role in ROLES}
        say("calls: " + ", ".join(f"{role} {count}" for role, count in counts.items()))
        chosen = points(counts, options.length, random.Random(options.seed))
        for number, point in enumerate(chosen, 1):
            one = sweep.kill(point)
            tried.append(one)
            for fault in one.faults():
                say(fault)
            at = f"{one.hit.call} {one.hit.where}" if one.hit else "not reached"
            say(f"{bar(number, len(chosen))} {point.role} {point.number}: {at}")
    rows = [row(role, counts[role], [one for one in tried if one.point.role == role]) for role in ROLES]
    return SweepResult(rows, [fault for one in tried for fault in one.faults()])


def row(role: Role, count: int, tried: Sequence[Tried]) -> dict[str, int | float | str]:
    """A line of the table."""
    return {
        "process": role,
        "calls": count,
        "kills": sum(one.hit is not None for one in tried),
        **totals(one.verdict for one in tried),
        "serving again, longest, s": max((one.serving for one in tried), default=0.0),
    }
