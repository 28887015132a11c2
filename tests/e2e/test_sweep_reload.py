"""The sweep ``reload`` in its short form, and that it would notice a server that hangs up on its clients."""

from __future__ import annotations

import signal
from pathlib import Path

from tools.lib.sweep_reload import ReloadSweep


def test_stops_and_reloads_under_load(tmp_path: Path) -> None:
    sweep = ReloadSweep(tmp_path, 5, lambda _: None, transactions=40)
    sweep.run(4)
    assert sweep.faults == []
    assert sweep.rounds["SIGTERM"]
    assert sweep.rounds["SIGHUP"]
    for outcomes in sweep.outcomes.values():
        assert outcomes["done"] > 10
        assert outcomes["421"] > 2


def test_a_server_that_hangs_up_is_noticed(tmp_path: Path) -> None:
    sweep = ReloadSweep(tmp_path, 5, lambda _: None, transactions=20, kinds=("SIGTERM",), stop=signal.SIGKILL)
    sweep.run(1)
    assert any("ended without a word" in fault for fault in sweep.faults)
