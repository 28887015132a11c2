"""The parts of `tools/mutants` that need no mutants: the verdict, the table, and the page that it is written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.lib.mutants import (
    CONCERNS,
    LEAST_BRANCHES,
    LEAST_SCORE,
    PAGE,
    ROOT,
    Figures,
    Unmeasured,
    concerning,
    copy,
    judge,
    rows_of,
    table,
    written,
)
from tools.lib.mutants_cli import parse

WIRE, SERVER = "mtad/smtp/wire.py", "mtad/smtp/server.py"
EMPTY = "# Tests\n\n<!-- made by tools/mutants --write -->\n<!-- end -->\nMore.\n"


def test_modules_and_their_tests_exist() -> None:
    for module in CONCERNS:
        assert (ROOT / module).is_file(), module
        for path in concerning(module):
            assert (ROOT / path).is_file(), path


def test_what_no_test_notices_has_survived() -> None:
    codes = {
        "killed": 1,
        "crashed": 3,
        "survived": 0,
        "not reached": 33,
        "no tests": 5,
        "hung": 36,
        "signal": -24,
        "odd": 2,
    }
    figures = judge(WIRE, 100.0, 97.0, codes)
    assert (figures.mutants, figures.killed, figures.timed_out) == (8, 2, 2)
    assert figures.survivors == ("survived", "not reached", "no tests", "odd")
    assert figures.score == 50.0


def test_mutants_that_were_not_tried_are_no_result() -> None:
    with pytest.raises(Unmeasured, match="no end"):
        judge(WIRE, 100.0, 97.0, {"one": 1, "two": None})


@pytest.mark.parametrize(
    ("branches", "survivors", "good"), [(95.0, 15, True), (94.99, 15, False), (95.0, 16, False), (100.0, 100, False)]
)
def test_both_floors_count(branches: float, survivors: int, good: bool) -> None:
    names = tuple(map(str, range(survivors)))
    assert Figures(WIRE, 100.0, branches, 100 - survivors, 0, names).good is good


def test_a_module_without_mutants_is_not_good() -> None:
    assert not Figures(WIRE, 100.0, 100.0, 0, 0).good


def test_per_cent_are_rounded_down() -> None:
    assert Figures(WIRE, 99.99, 94.96, 849, 0, ("x",) * 151).cells()[1:3] == ("99.9 %", "94.9 %")
    assert Figures(WIRE, 99.99, 94.96, 849, 0, ("x",) * 151).cells()[-1] == "84.9 %"


def test_rows_that_were_not_measured_stay_as_they_are() -> None:
    one, two = Figures(WIRE, 100.0, 98.0, 90, 5, ("x",) * 5), Figures(SERVER, 99.0, 97.0, 45, 0, ("x",) * 5)
    page = written(written(EMPTY, [two]), [one])
    assert rows_of(page) == {WIRE: one.cells(), SERVER: two.cells()}
    assert table([one.cells(), two.cells()]) in page
    assert page.startswith("# Tests\n")
    assert page.endswith("<!-- end -->\nMore.\n")
    assert written(page, [one]) == page
    assert len({len(line) for line in table([one.cells(), two.cells()]).splitlines()}) == 1


def test_a_page_without_a_place_is_not_touched() -> None:
    with pytest.raises(ValueError, match="no place"):
        written("# Tests\n", [])


def test_a_copy_has_what_the_tests_need_and_mutates_one_module(tmp_path: Path) -> None:
    copy(WIRE, tmp_path / "copy")
    settings = (tmp_path / "copy" / "pyproject.toml").read_text(encoding="utf-8")
    assert f'only_mutate = ["{WIRE}"]' in settings
    assert '"tests/unit/test_wire.py"' in settings
    assert (tmp_path / "copy" / WIRE).is_file()
    assert "mutmut" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_unknown_modules_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["mtad/nothing.py"])
    assert "not one of the modules: mtad/nothing.py" in capsys.readouterr().err


def test_the_page_has_every_module_above_both_floors() -> None:
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    assert set(rows) == set(CONCERNS)
    for module, row in rows.items():
        assert float(row[2].rstrip(" %")) >= LEAST_BRANCHES, module
        assert float(row[-1].rstrip(" %")) >= LEAST_SCORE, module
