"""The sweep ``clock`` in its short form, and that it would notice a server that lets messages expire by a leap."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.lib import sweep_clock
from tools.lib.sweep_clock import Mode, sweep


@pytest.mark.parametrize(("leap", "mode"), [("-1 h", "running"), ("+10 d", "running"), ("+1 d", "restart")])
def test_the_clock_is_set(tmp_path: Path, leap: str, mode: Mode) -> None:
    played, faults = sweep(tmp_path, [(leap, mode)], lambda _: None)
    assert faults == []
    assert len(played[0].ids) == 3 * sweep_clock.MESSAGES


def test_a_message_that_expires_by_a_leap_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop of five days is taken for one, and stands in for a server that knows no leaps."""
    monkeypatch.setitem(sweep_clock.LEAPS, "+5 d", 5 * 86400)
    _, faults = sweep(tmp_path, [("+5 d", "restart")], lambda _: None)
    assert "+5 d, restart: a bounce before its time" in faults
