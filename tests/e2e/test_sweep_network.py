"""The sweep ``network`` in its short form, and that it would notice what it looks for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tools.lib.network_cuts import Case
from tools.lib.network_lines import BAD, load
from tools.lib.network_proxy import HARMS, Harm, Point, Role
from tools.lib.sweep_network import Choose, CutSweep
from tools.lib.sweeps import Unavailable

#: Seconds that a busy machine may be late.
_ALLOWANCE = 8.0


def sweep(root: Path, choose: Choose, **options: Any) -> CutSweep:
    given = {"allowance": _ALLOWANCE, "at_a_time": 30, "thorough": False} | options
    done = CutSweep(root, 7, lambda _: None, **given)
    done.run(choose)
    return done


def control(root: Path, points: Sequence[tuple[Role, Harm, Point]], **options: Any) -> CutSweep:
    """A sweep of which the promises are broken."""

    def choose(cases: Sequence[Case]) -> Sequence[Case]:
        return [case for case in cases if (case.role, case.harm, case.point) in points]

    dialogues = {role: ("step by step",) for role, _, _ in points}
    return sweep(root, choose, dialogues=dialogues, **options)


def test_cuts_lose_nothing_and_double_only_what_is_in_doubt(tmp_path: Path) -> None:
    def choose(cases: Sequence[Case]) -> Sequence[Case]:
        chosen = [case for case in cases if case.dialogue == "pipelined" and case.point == ("reply to dot", "before")]
        for role in ("server", "client"):
            for harm in HARMS:
                others = [case for case in cases if (case.role, case.harm) == (role, harm) and case not in chosen]
                chosen += random.sample(others, 3)  # others each time: all of them hold
        return chosen

    done = sweep(tmp_path, choose)
    assert done.faults == []
    assert len(done.endings) == 32
    # Each of these got its message, and mtad did not hear of it.
    assert all(done.twice["client", harm] >= 2 for harm in HARMS)
    assert not any(done.twice["server", harm] for harm in HARMS)


@pytest.mark.parametrize("how", BAD)
def test_bad_lines_lose_nothing(tmp_path: Path, how: str) -> None:
    try:
        outcome = load(tmp_path / "line", 7, how, 1.5, deadline=2.5, allowance=_ALLOWANCE)
    except Unavailable as lack:
        pytest.skip(str(lack))
    assert outcome.faults == ()
    assert outcome.sent


def test_who_takes_the_own_dot_for_an_answer_is_noticed(tmp_path: Path) -> None:
    dot = Point("dot", "before")
    done = control(tmp_path, [("client", "FIN", dot), ("server", "reset", dot)], broken="optimist", hasty=True)
    print(*done.faults, sep="\n")  # for whoever reads why this failed
    lost = [fault.partition(", case")[2] for fault in done.faults if fault.startswith("lost: ")]
    # Each has two recipients.
    assert sum(": client, " in case for case in lost) == 2
    assert sum(": server, " in case for case in lost) == 2


def test_a_server_without_deadlines_is_noticed(tmp_path: Path) -> None:
    rcpt = Point("RCPT", "before")
    points: list[tuple[Role, Harm, Point]] = [("client", "silence", rcpt), ("server", "zero window", rcpt)]
    done = control(tmp_path, points, broken="patient", deadline=1.0, allowance=1.0)
    held = [fault for fault in done.faults if fault.endswith("held past its deadline")]
    assert sum(": client, " in fault for fault in held) == 1
    assert sum(": server, " in fault for fault in held) == 1
