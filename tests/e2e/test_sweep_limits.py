"""The sweep ``limits`` in its short form, and that it would notice servers that know no limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.lib import control_groups
from tools.lib.flood_clients import descriptors_for
from tools.lib.sweep_limits import KINDS, LimitSweep


def sweep(root: Path, *rounds: str, broken: str = "-") -> LimitSweep:
    """Run it, or skip the test."""
    if lack := descriptors_for(4000):
        pytest.skip(lack)
    sweep = LimitSweep(root, 5, rounds, lambda _: None, pause=0.4, broken=broken)
    sweep.run()
    if lacks := set(sweep.skipped.values()):
        pytest.skip("; ".join(sorted(lacks)))
    return sweep


NEEDY = [name for name, (needs, _) in KINDS.items() if needs]
OTHERS = [name for name, (needs, _) in KINDS.items() if not needs]


@pytest.mark.parametrize("names", [NEEDY, OTHERS], ids=["control groups", "descriptors"])
def test_at_a_limit(tmp_path: Path, names: list[str]) -> None:
    done = sweep(tmp_path, *names)
    assert done.faults == []
    assert done.verdict is not None
    assert done.verdict.messages >= 50
    for name, tally in done.tallies.items():
        if name in ("memory", "pids", "descriptors", "no descriptor left"):
            assert tally.kept >= 10, name
            assert tally.refused >= 8, name
        elif name == "killed for memory":
            assert tally.killed >= 1, name
        else:
            assert tally.ended == 40, name


@pytest.mark.parametrize(
    ("name", "broken", "wrong"),
    [
        ("descriptors", "crowd", ["guests heard ['451 4.3.0"]),
        ("no descriptor left", "spin", ["a new client heard silence", "% of a processor"]),
    ],
)
def test_a_server_without_limits_is_noticed(tmp_path: Path, name: str, broken: str, wrong: list[str]) -> None:
    """Who always has room for one more has not; and who tries again at once computes for nothing."""
    faults = "\n".join(sweep(tmp_path, name, broken=broken).faults)
    assert all(fault in faults for fault in wrong), faults


def test_where_no_control_groups_can_be_made_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = {name: ((str(tmp_path / "nowhere"), "limit", "use", "events"),) for name in ("memory", "pids")}
    monkeypatch.setattr(control_groups, "_PLACES", nowhere)
    done = LimitSweep(tmp_path, 5, ["memory", "pids"], lambda _: None)
    done.run()
    assert done.skipped == {name: f"no control group for {name}: No such file or directory" for name in ("memory", "pids")}
    assert done.faults == []
    assert [tally.rounds for tally in done.tallies.values()] == [0, 0]
