"""An error at the Nth system call, for every N between a message's arrival and its removal, in each process.

A *point* is a role, a number N and an error. One process of a running server is traced (`tools.lib.tracer`) while the
messages of `tools.lib.call_world` come in; its Nth call is not made and fails with the error, or a write takes only half.
Then must hold: no 250 without a message; what is refused is refused with 452 4.3.1 for want of space, else with 451 4.3.0;
nobody gets a report for a fault of ours; no process dies; the queue drains; nothing is lost, torn or twice.

Every call gets the errors that it can have. A master that cannot start says so and ends with 1; once it serves, nothing
ends it but a stop, which ends it whatever fails.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from tools.lib.call_world import KINDS, ROLES, CallWorld, Reply, Role
from tools.lib.crash_verdict import Verdict
from tools.lib.injection import Call, Injection
from tools.lib.sweeps import Say, SweepOptions, SweepResult, bar

#: Also counted: what needs a descriptor or reads the disk.
MORE: Final = ("open", "pread64", "socket", "accept4")

_DISK: Final = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ENOMEM", "EINTR")
_DESCRIPTORS: Final = ("EMFILE", "ENFILE", "ENOMEM", "EINTR")
#: What can happen to a call; to all others, `_DISK`.
POSSIBLE: Final[Mapping[str, Sequence[str]]] = {
    "write": (*_DISK, "short"),
    "pwrite64": (*_DISK, "short"),
    "openat": (*_DISK, "EMFILE", "ENFILE"),
    "pread64": ("EIO", "ENOMEM", "EINTR"),
    "socket": _DESCRIPTORS,
    "accept4": _DESCRIPTORS,
}
#: What can happen to a write into a pipe, which is never waited for.
_PIPE: Final = ("EAGAIN",)
_SPACE: Final = ("ENOSPC", "EDQUOT")
#: Seconds for a step of a master's life.
_STEP: Final = 10.0


class Point(msgspec.Struct, frozen=True):
    """One thing to try: which process, which of its calls, and what happens to it."""

    role: Role
    number: int
    error: str


class Tried(msgspec.Struct, frozen=True):
    """What came of a point; ``hit`` is the call, None when the process did not come so far."""

    point: Point
    hit: Call | None
    refused: int
    verdict: Verdict
    wrong: Sequence[str]

    @property
    def faults(self) -> list[str]:
        """The promises that were broken."""
        found = [*self.wrong, *self.verdict.broken(doubtful=False)]
        point = self.point
        at = f"{self.hit.call} {self.hit.where}" if self.hit else "no call"
        return [f"{point.error} at call {point.number} of the {point.role} ({at}): {text}" for text in found]


class ErrorSweep:
    """The sweep in one world. The server runs on from point to point, but for the master's."""

    def __init__(self, world: CallWorld, more: Sequence[str] = MORE) -> None:
        """The world has been entered; ``more`` is counted, too."""
        self.world = world
        self._more = more

    def calls(self, role: Role) -> list[Call]:
        """The calls of a process of this role from a message's arrival to its removal, in a round without an error."""
        if role == "master":
            injection, _ = self._master(Point(role, 0, "EIO"))
        else:
            self._up()
            injection = self._messages(Point(role, 0, "EIO"))
        self._judged()
        return injection.calls

    def fail(self, point: Point) -> Tried:
        """Try one point."""
        world = self.world
        if point.role == "master":
            self.stop()
            injection, wrong = self._master(point)
        else:
            self._up()
            before = world.pid(point.role)
            injection = self._messages(point)
            died = world.pid(point.role) != before
            wrong = [f"process {before} died"] if died else []
        replies = list(world.replies)
        # A listener that makes room for its successor ends a session that has just begun, and the client tries again.
        expected = (421, 0) if point.role == "master" else ()
        told = [complaint(reply, point.error) for reply in replies if reply.code not in expected]
        wrong += [text for text in told if text]
        verdict, more = self._judged()
        return Tried(point, injection.hit, sum(reply.code != 250 for reply in replies), verdict, [*wrong, *more])

    def stop(self) -> None:
        """Stop the server, if it runs."""
        if self.world.site.process is not None:
            self.world.site.stop()

    def _judged(self) -> tuple[Verdict, list[str]]:
        if self.world.site.process is None:
            self.world.start()
        return self.world.judge(self.world.drain())

    def _up(self) -> None:
        if self.world.site.process is None:
            self.world.start(warm=True)

    def _messages(self, point: Point) -> Injection:
        world = self.world
        with Injection(world.pid(point.role), point.number, point.error, self._more) as injection:
            for kind in KINDS:
                world.send(kind)
                world.drain()
                if injection.hit is not None:
                    break
            else:
                injection.wait(0.05)  # the last line of the log comes after the message is gone
        return injection

    def _master(self, point: Point) -> tuple[Injection, list[str]]:
        """A master's life, and what was wrong with it."""
        world = self.world
        self.stop()
        world.leave("local")
        wrong: list[str] = []
        with (
            world.gated() as (process, begin),
            Injection(process.pid, point.number, point.error) as injection,
        ):

            def until(condition: Callable[[], bool]) -> bool:
                deadline = time.monotonic() + _STEP
                while not (met := condition()) and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.005)
                return met

            begin()
            if until(lambda: world.up(process)):
                world.send("big")
                process.send_signal(signal.SIGHUP)
                if not until(world.reloaded):
                    wrong.append("did not reload")
                world.send("local")
                process.send_signal(signal.SIGTERM)
                if not until(lambda: process.poll() is not None):
                    wrong.append("did not stop")
                    process.kill()
                elif process.returncode:
                    wrong.append(f"ended with {process.returncode}")
            elif process.poll() != 1:
                wrong.append(f"neither started nor ended with 1: {process.poll()}")
                process.kill()
            world.gone()
        return injection, wrong


def complaint(reply: Reply, error: str) -> str:
    """What is wrong with a reply to a client when that error happened on our side; "" when nothing is."""
    enhanced = reply.text.partition(" ")[0]
    if reply.code == 250 or (reply.code, enhanced) == ((452, "4.3.1") if error in _SPACE else (451, "4.3.0")):
        return ""
    return f"the client was told {reply.code} {reply.text}"


def possible(role: Role, call: Call) -> Sequence[str]:
    """The errors that a call can have."""
    if not call.where.startswith("pipe:"):
        return POSSIBLE.get(call.call, _DISK)
    # The master's only pipe is that of its signals: full, it has told already what it is to tell.
    return () if role == "master" else _PIPE


def points(calls: Mapping[Role, Sequence[Call]], length: int, chance: random.Random) -> list[Point]:
    """As many points as wanted, in the order of the roles; all of them when there are not more."""
    every = [
        Point(role, call.number, error) for role, made in calls.items() for call in made for error in possible(role, call)
    ]
    chosen = set(chance.sample(every, min(length, len(every))))
    return [point for point in every if point in chosen]


def run(options: SweepOptions, say: Say) -> SweepResult:
    """Try ``options.length`` points, or every one.

    Raises:
        Unavailable: processes cannot be traced here.
    """
    tried: list[Tried] = []
    with CallWorld(options.directory) as world:
        sweep = ErrorSweep(world)
        calls = {role: sweep.calls(role) for role in ROLES}
        say("calls: " + ", ".join(f"{role} {len(made)}" for role, made in calls.items()))
        chosen = points(calls, options.length, random.Random(options.seed))
        for number, point in enumerate(chosen, 1):
            one = sweep.fail(point)
            tried.append(one)
            for fault in one.faults:
                say(fault)
            at = f"{one.hit.call} {one.hit.where}" if one.hit else "not reached"
            say(f"{bar(number, len(chosen))} {point.role} {point.number} {point.error}: {at}")
        sweep.stop()
    rows = [row(role, len(calls[role]), [one for one in tried if one.point.role == role]) for role in ROLES]
    return SweepResult(rows, [fault for one in tried for fault in one.faults])


def row(role: Role, count: int, tried: Sequence[Tried]) -> dict[str, int | float | str]:
    """A line of the table."""
    verdicts = [one.verdict for one in tried]
    return {
        "process": role,
        "calls": count,
        "errors": sum(one.hit is not None for one in tried),
        "acknowledged": sum(verdict.messages for verdict in verdicts),
        "refused with 451 or 452": sum(one.refused for one in tried),
        "lost": sum(len(verdict.lost) for verdict in verdicts),
        "torn": sum(len(verdict.torn) for verdict in verdicts),
        "twice": sum(len(verdict.explained) + len(verdict.unexplained) for verdict in verdicts),
        "stuck": sum(len(verdict.stuck) for verdict in verdicts),
        "other faults": sum(len(one.wrong) for one in tried),
    }
