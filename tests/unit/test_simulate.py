"""The simulator: its invariants hold on small days, it repeats, and it would notice when they did not hold."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from mtad.scheduler.budgets import Budget
from tools.lib.sim_verdict import duration, table, verdict
from tools.lib.sim_world import GREY, PER_MINUTE, SHARES, make
from tools.lib.simulate import Plan, Simulation

ROOT = Path(__file__).parents[2]
SMALL = Plan(seed=1, messages=6000, domains=300, hours=2.0)


def run(plan: Plan) -> Simulation:
    simulation = Simulation(plan)
    simulation.run()
    return simulation


@pytest.mark.parametrize("seed", range(4))
def test_a_small_day(seed: int) -> None:
    """Nothing lost, no lane over its limit, nobody starves, a suspended lane costs one probe a period."""
    simulation = run(msgspec.structs.replace(SMALL, seed=seed))
    assert [finding.what for finding in verdict(simulation) if not finding.good] == []
    assert simulation.arrived > 6000
    assert set(simulation.waits) >= set(SHARES) - {"flapping"}, "each kind had mail, but perhaps the rarest"


def test_dead_destinations_do_not_change_the_wait_of_the_others() -> None:
    """The median wait at healthy destinations is the same with and without dead ones."""
    plan = msgspec.structs.replace(SMALL, messages=20000, domains=1000)
    with_dead = run(plan)
    without = run(msgspec.structs.replace(plan, without=frozenset({"dead", "flapping"})))
    assert with_dead.probes
    assert not without.probes
    # The same mail in the same order; only what chance makes of each attempt is another.
    for part, accuracy in ((0.5, 0.05), (0.9, 0.1)):
        assert with_dead.waits["steady"].at(part) == pytest.approx(without.waits["steady"].at(part), rel=accuracy)


def test_who_waits_waits_for_a_reason() -> None:
    """Greylisting costs what the host asks for, and hardly more; a slow host is as slow as it is."""
    simulation = run(SMALL)
    assert GREY <= simulation.waits["greylisting"].at(0.5) <= 1.15 * GREY + 30
    assert 5 <= simulation.waits["slow"].at(0.5) <= 20
    assert simulation.waits["steady"].at(0.99) < 2.0


def test_a_seed_repeats_a_day_and_another_one_is_another_day() -> None:
    first, again, other = (run(msgspec.structs.replace(SMALL, seed=seed)) for seed in (5, 5, 6))
    assert table(first) == table(again)
    assert first.attempts == again.attempts
    assert table(first) != table(other)


def test_a_lane_over_its_limit_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "room", True)
    plan = msgspec.structs.replace(SMALL, messages=4000, domains=20, hours=0.2)
    limit, *_ = [finding for finding in verdict(run(plan)) if finding.what.startswith("no lane")]
    assert not limit.good


def test_a_lane_that_forgets_its_failures_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtad.scheduler.lanes.DEAD_LANE", 60.0)
    probes, *_ = [finding for finding in verdict(run(SMALL)) if finding.what.startswith("a suspended lane")]
    assert not probes.good


def test_a_lost_message_would_be_noticed() -> None:
    simulation = Simulation(SMALL)
    remove = simulation.spool.remove
    lose = random.Random(1)

    def losing(queue_id: str) -> bool:
        if lose.random() < 0.001:
            simulation.delivered -= 1
        return remove(queue_id)

    simulation.spool.remove = losing  # type: ignore[method-assign]
    simulation.run()
    assert not verdict(simulation)[0].good


def test_the_world_is_made_of_its_shares() -> None:
    made = make(5000, random.Random(1), 86400.0)
    for kind, share in SHARES.items():
        assert sum(one.kind == kind for one in made) == pytest.approx(50 * share, rel=0.35)
    same = make(5000, random.Random(1), 86400.0, without=frozenset({"dead"}))
    assert [one.kind for one in same] == ["steady" if one.kind == "dead" else one.kind for one in made]


def test_a_limiting_destination_limits() -> None:
    [limited] = [one for one in make(200, random.Random(1), 86400.0) if one.kind == "limited"][:1]
    rng = random.Random(1)
    taken = sum(limited.attempt(float(second) / 10, "id", 1, rng)[1][0].status == "2.0.0" for second in range(599))
    assert taken == PER_MINUTE


@pytest.mark.parametrize(("seconds", "words"), [(0.284, "0.28 s"), (12.4, "12 s"), (318.0, "5.3 min"), (6840.0, "1.9 h")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_command() -> None:
    arguments = ["--messages", "2000", "--domains", "100", "--hours", "1", "--seed", "3"]
    command = [sys.executable, str(ROOT / "tools" / "simulate"), *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert shown.stdout.startswith("seed 3: 2000 messages to 100 domains in 1 hours\n")
    assert "\nok   nothing lost: " in shown.stdout
    assert "BAD" not in shown.stdout
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True).stdout)
    assert found["seed"] == 3
    assert found["delivered"] + found["bounced"] == found["recipients"]
    assert all(finding["good"] for finding in found["findings"])
