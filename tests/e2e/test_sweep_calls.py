"""SIGKILL before single system calls: the short form of `tools/crashtest calls`, and that it can fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.e2e.tracing import needs_tracing
from tests.site import PATIENCE
from tools.lib.call_world import CallWorld, Role
from tools.lib.crash_verdict import Verdict
from tools.lib.injection import Call
from tools.lib.sweep_calls import CallSweep, Point, Tried, points

#: Before which calls the short form kills, by their name and the end of the directory or file: those between two promises.
_WORTH: dict[Role, Sequence[tuple[str, str]]] = {
    "listener": (("fsync", "/incoming"), ("write", "pipe:")),
    "scheduler": (("renameat", "/deferred/"), ("unlinkat", "/active/")),
    "delivery": (("write", "/active/"), ("fsync", "/new"), ("fdatasync", "/active/")),
    "master": (("fsync", "/spool"), ("unlink", "/desk.sock")),
}


def number_of(calls: Sequence[Call], name: str, where: str, chance: random.Random | None = None) -> int:
    """The number of the first call of that name about such a file; with ``chance``, of any of them."""
    found = [call.number for call in calls if call.call == name and where in call.where]
    assert found, f"no {name} of {where} among {calls}"
    return chance.choice(found) if chance else found[0]


class Chooser:
    """Kills at calls of one role, by name and place, which ones of these by chance: all of them must hold."""

    def __init__(self, sweep: CallSweep, role: Role) -> None:
        self._sweep = sweep
        self._role: Role = role
        self._chance = random.Random()
        self._calls = sweep.count(role)

    def kill(self, name: str, where: str) -> Tried:
        """At a call that is reached: where a connection is used again instead of a new one, a life has fewer calls."""
        for _ in range(3):
            tried = self._sweep.kill(Point(self._role, number_of(self._calls, name, where, self._chance)))
            assert not tried.faults(PATIENCE)  # how soon it serves again is for a machine that has nothing else to do
            if tried.hit is not None:
                return tried
            self._calls = self._sweep.count(self._role)
        raise AssertionError(f"three times a life had fewer calls than the one before: {tried}")


@needs_tracing
@pytest.mark.parametrize("role", _WORTH)
def test_a_kill_between_two_promises_breaks_none(tmp_path: Path, role: Role) -> None:
    with CallWorld(tmp_path) as world:
        chooser = Chooser(CallSweep(world), role)
        for name, where in _WORTH[role]:
            assert chooser.kill(name, where).verdict.messages >= 1


def lost(verdict: Verdict) -> Sequence[str]:
    return verdict.lost


def twice(verdict: Verdict) -> Sequence[str]:
    return verdict.unexplained


@needs_tracing
@pytest.mark.parametrize(
    ("broken", "role", "name", "where", "noticed"),
    [
        ("late", "listener", "openat", "/incoming/", lost),
        ("forget", "delivery", "write", "/active/", twice),
    ],
)
def test_a_server_that_breaks_a_promise_is_noticed(
    tmp_path: Path, broken: str, role: Role, name: str, where: str, noticed: Callable[[Verdict], Sequence[str]]
) -> None:
    with CallWorld(tmp_path, broken) as world:
        sweep = CallSweep(world)
        tried = sweep.kill(Point(role, number_of(sweep.count(role), name, where)))
        assert noticed(tried.verdict), tried


def test_points_are_chosen_by_the_seed_and_all_of_them_when_there_are_not_more() -> None:
    counts: dict[Role, int] = {"listener": 2, "master": 3}
    every = [Point("listener", 1), Point("listener", 2), *(Point("master", number) for number in (1, 2, 3))]
    assert points(counts, 5, random.Random(1)) == every
    assert points(counts, 99, random.Random(1)) == every
    few = points(counts, 3, random.Random(1))
    assert len(few) == 3
    assert few == points(counts, 3, random.Random(1)) == [point for point in every if point in few]


def test_everything_that_must_not_happen_is_a_fault() -> None:
    good = Verdict(1, 1, {}, (), (), ("named",), (), ())
    point = Point("master", 7)
    assert Tried(point, None, 1.0, good, ()).faults() == []
    bad = Verdict(1, 1, {}, ("a",), ("b",), (), ("c",), ("d",))
    found = Tried(point, Call(7, "fsync", "/x"), 2.5, bad, ("e",)).faults()
    assert all(fault.startswith("master killed before call 7 (fsync /x): ") for fault in found)
    texts = [fault.partition("): ")[2] for fault in found]
    assert texts == ["e", "serving again only after 2.5 s", "lost: a", "torn: b", "twice without a word: c", "stuck: d"]
