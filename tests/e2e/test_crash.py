"""Kills at random moments under load: the short form of `tools/crashtest`, and that it would notice a server that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.lib.crash_run import Break, CrashTest
from tools.lib.crash_verdict import table


def test_five_kills_lose_nothing(tmp_path: Path) -> None:
    verdict = CrashTest(tmp_path, seed=5, kills=5, clients=4).run()
    assert verdict.messages > 20
    assert verdict.good, table(verdict)


@pytest.mark.parametrize("broken", ["lose", "tear", "twice"])
def test_what_must_not_happen_is_noticed(tmp_path: Path, broken: Break) -> None:
    verdict = CrashTest(tmp_path, seed=5, kills=1, clients=4, broken=broken).run()
    found = {"lose": verdict.lost, "tear": verdict.torn, "twice": verdict.unexplained}
    assert found.pop(broken), table(verdict)
    assert not any(found.values()), table(verdict)
