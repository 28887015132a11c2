"""The tables that a sweep writes into docs/reliability.md."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from tools.lib import crash_cli
from tools.lib.crash_report import block, put, write
from tools.lib.sweeps import SweepResult

DAY = date(2026, 1, 2)


def test_a_block_says_how_to_do_it_again_and_what_came_of_it() -> None:
    text = block("reload", 7, 1000, DAY, SweepResult([{"signal": "HUP", "lost": 0}]))
    assert "### `reload`: " in text
    assert "`tools/crashtest reload --seed 7 --length 1000` (at most 1,000 rounds), 2026-01-02: no broken promises." in text
    assert "| signal | lost |\n" in text
    assert "| HUP    |    0 |\n" in text


@pytest.mark.parametrize(("faults", "words"), [(["a"], ": 1 broken promise.\n"), (["a", "b"], ": 2 broken promises.\n")])
def test_a_broken_promise_is_not_left_out(faults: list[str], words: str) -> None:
    assert words in block("reload", 7, 1, DAY, SweepResult([{"lost": 1}], faults))


def test_only_the_block_of_the_sweep_is_replaced() -> None:
    reload, clock = (block(name, 1, 1, DAY, SweepResult([{"lost": 0}])) for name in ("reload", "clock"))
    page = f"# Title\n\n{reload}\nBetween.\n\n{clock}\nAfter.\n"
    again = block("reload", 2, 5, DAY, SweepResult([{"lost": 9}]))
    assert put(page, "reload", again) == f"# Title\n\n{again}\nBetween.\n\n{clock}\nAfter.\n"
    assert put(page, "clock", clock) == page


def test_a_sweep_without_a_place_gets_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("# Title\n\nText.\n")
    result = SweepResult([{"lost": 0}])
    write("clock", 3, 4, result, path)
    once = path.read_text()
    assert once == "# Title\n\nText.\n\n" + block("clock", 3, 4, date.today(), result)
    write("clock", 3, 4, result, path)
    assert path.read_text() == once


@pytest.mark.parametrize(
    "arguments",
    [["--write"], ["--length", "3"], ["nothing"], ["power", "--break", "lose"], ["clock", "--kills", "3"]],
)
def test_what_makes_no_sense_is_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        crash_cli.parse(arguments)
    assert ended.value.code == 2
    assert "usage: tools/crashtest" in capsys.readouterr().err
