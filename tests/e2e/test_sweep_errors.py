"""Errors of single system calls: the short form of `tools/crashtest errors`, and that it can fail."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.e2e.test_sweep_calls import number_of
from tests.e2e.tracing import needs_tracing
from tools.lib.call_world import CallWorld, Reply, Role
from tools.lib.crash_verdict import Verdict
from tools.lib.injection import Call
from tools.lib.sweep_errors import POSSIBLE, ErrorSweep, Point, Tried, complaint, points

#: How many errors the short form makes; other ones each time.
_ERRORS: dict[Role, int] = {"listener": 15, "scheduler": 8, "delivery": 12, "master": 3}


@needs_tracing
@pytest.mark.parametrize("role", _ERRORS)
def test_an_error_breaks_no_promise(tmp_path: Path, role: Role) -> None:
    with CallWorld(tmp_path) as world:
        sweep = ErrorSweep(world)
        chosen = points({role: sweep.calls(role)}, _ERRORS[role], random.Random())
        tried = [sweep.fail(point) for point in chosen]
    assert [fault for one in tried for fault in one.faults] == []
    assert sum(one.hit is not None for one in tried) >= len(tried) / 2
    assert sum(one.verdict.messages for one in tried) >= len(tried) / 2


@needs_tracing
@pytest.mark.parametrize(("error", "answer"), [("ENOSPC", "452 4.3.1"), ("EDQUOT", "452 4.3.1"), ("EIO", "451 4.3.0")])
def test_a_disk_that_does_not_take_a_message_is_said_so(tmp_path: Path, error: str, answer: str) -> None:
    with CallWorld(tmp_path) as world:
        sweep = ErrorSweep(world, ())
        calls = sweep.calls("listener")
        for name, where in (("openat", "/incoming/"), ("write", "/incoming/"), ("fsync", "/incoming")):
            tried = sweep.fail(Point("listener", number_of(calls, name, where), error))
            assert (tried.refused, tried.faults) == (1, [])
    assert world.site.log().count(f"reject: END-OF-MESSAGE from unknown[127.0.0.1]: {answer}") == 3


@needs_tracing
def test_a_false_250_is_noticed(tmp_path: Path) -> None:
    with CallWorld(tmp_path, "yes") as world:
        sweep = ErrorSweep(world, ())
        number = number_of(sweep.calls("listener"), "fsync", "/incoming/")
        tried = sweep.fail(Point("listener", number, "ENOSPC"))
    assert tried.verdict.lost
    assert tried.faults


@pytest.mark.parametrize(
    ("reply", "error", "good"),
    [
        (Reply(250, "2.0.0 Ok: queued as X"), "EIO", True),
        (Reply(451, "4.3.0 Error"), "EIO", True),
        (Reply(452, "4.3.1 Error"), "ENOSPC", True),
        (Reply(452, "4.3.1 Error"), "EIO", False),
        (Reply(451, "4.3.0 Error"), "EDQUOT", False),
        (Reply(550, "5.3.0 Error"), "EIO", False),
        (Reply(0), "EIO", False),
    ],
)
def test_what_a_client_may_be_told(reply: Reply, error: str, *, good: bool) -> None:
    assert (complaint(reply, error) == "") is good


def test_each_call_gets_the_errors_that_it_can_have() -> None:
    made = [Call(1, "write", "/x"), Call(2, "fsync", "/x"), Call(3, "socket", ""), Call(4, "write", "pipe:[1]")]
    calls: dict[Role, list[Call]] = {"listener": made}
    every = points(calls, 1000, random.Random(1))
    assert len(every) == len(set(every)) == 7 + 6 + 4 + 1
    assert {point.error for point in every if point.number == 1} == set(POSSIBLE["write"])
    assert points({"master": made[3:]}, 1000, random.Random(1)) == []
    assert len(points(calls, 5, random.Random(1))) == 5


def test_everything_that_must_not_happen_is_a_fault() -> None:
    good = Verdict(1, 1, {}, (), (), (), (), ())
    point = Point("delivery", 7, "EIO")
    assert Tried(point, None, 1, good, ()).faults == []
    bad = Verdict(1, 1, {}, ("a",), ("b",), ("c",), ("d",), ("e",))
    found = Tried(point, Call(7, "fsync", "/x"), 0, bad, ("f",)).faults
    assert [fault.removeprefix("EIO at call 7 of the delivery (fsync /x): ") for fault in found] == [
        "f", "lost: a", "torn: b", "twice without a word: d", "stuck: e", "twice: c",
    ]  # fmt: skip
