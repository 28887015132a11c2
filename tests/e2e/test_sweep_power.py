"""Power cuts under load: the short form of `tools/crashtest power`, and that it notices a server that flushes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.lib.crash_disks import Kind, lack
from tools.lib.crash_verdict import Copy, Sent
from tools.lib.sweep_power import LAYOUTS, Cut, Layout, Round, libeatmydata, play, schedule, weigh

pytestmark = pytest.mark.skipif(bool(lack()), reason=lack() or "-")

_CUT = Cut(load=0.4, between=0.02, after=0.02)


@pytest.mark.parametrize(
    ("kind", "layout", "cuts"),
    [("ext4", "spool first", 2), ("ext4", "mail first", 1), ("xfs", "one", 1)],
)
def test_power_cuts_lose_nothing(tmp_path: Path, kind: Kind, layout: Layout, cuts: int) -> None:
    if reason := lack(kind):
        pytest.skip(reason)
    figures = play(tmp_path, f"5 {kind} {layout}", Round(kind, layout, (_CUT,) * cuts))
    assert figures.messages > 20
    assert not figures.faults


def test_without_a_flush_power_cuts_lose_mail(tmp_path: Path) -> None:
    library = libeatmydata()
    if library is None:
        pytest.skip("libeatmydata is not installed")
    figures = play(tmp_path, "5 control", Round("ext4", "one", (_CUT,)), preload=str(library))
    assert figures.messages > 20
    assert figures.lost > figures.messages / 2


def test_the_schedule_plays_every_kind_with_every_layout_and_follows_from_the_seed() -> None:
    rounds = schedule(7, 50, ("ext4", "xfs"))
    assert rounds == schedule(7, 50, ("ext4", "xfs")) != schedule(8, 50, ("ext4", "xfs"))
    assert sum(len(turn.cuts) for turn in rounds) == 50
    assert {(turn.kind, turn.layout) for turn in rounds} == {
        (kind, layout) for kind in ("ext4", "xfs") for layout in LAYOUTS
    }
    short = schedule(7, 6, ("ext4", "xfs"))
    assert len(short) == len({(turn.kind, turn.layout) for turn in short}) == 6


def test_what_must_not_be_after_a_power_cut_is_a_fault() -> None:
    sent = [Sent("0-1", "s", ("a",), "d", "Q1"), Sent("101-1", "s", ("a",), "d", "Q2"), Sent("1-9", "s", ("a",), "d")]
    good = [Copy("0-1", "a", "maildir", "d", "Q1"), Copy("101-1", "a", "queue", "d", "Q2")]
    half = Copy("1-9", "", "corrupt")
    assert not weigh(sent, [*good, half], (), 2).faults
    assert not weigh(sent, [*good, *good], (), 2).faults  # one more each, after two cuts and after one
    first, second, third = (Copy("101-1", "a", "report", "", "Q2", report) for report in ("R1", "R2", "R3"))
    assert not weigh(
        sent, [good[0], first, first, second], (), 2
    ).faults  # made again once, and one of them delivered again
    for copies, fault in (
        ([good[0], first, second, third], "too often: 101-1 for a: 3 copies"),
        ([good[0], first, first, first], "too often: 101-1 for a, report R1: 3 copies"),
        (good[:1], "lost: 101-1 Q2 for a"),
        ([*good, good[1], good[1]], "too often: 101-1 for a: 3 copies"),
        ([*good, Copy("0-1", "a", "maildir", "e", "Q1")], "torn: 0-1 Q1 for a in maildir"),
        ([*good, Copy("0-1", "", "corrupt")], "torn: 0-1  for  in corrupt: nobody sent that"),
    ):
        assert weigh(sent, copies, (), 2).faults == (fault,)
    assert weigh(sent[2:], (), (), 2).faults == ("no message was acknowledged: nothing was tried",)
    assert weigh(sent, good, ["active/Q1"], 2).faults == ("stuck: active/Q1",)
