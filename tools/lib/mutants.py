"""How strong the tests are: branch coverage and mutation score of the modules on which a promise rests.

A mutant is a function with one small change: ``<`` for ``<=``, an argument left out, a constant off by one. The tests that
concern the module run against it; a mutant that none of them notices *survived*, and is a change that somebody could make
by accident. mutmut makes and judges them, coverage counts branches; this module says which tests concern which module, and
runs both on a copy of the checkout, so nothing here is changed, not even by a mutant that writes where it should not.

A mutant that hangs is *timed out* and counts as noticed. One that no test reaches counts as survived. mutmut leaves out
what stands outside functions, in properties and other decorated functions, and the arguments of ``len`` and ``isinstance``.

Runs can be repeated: hypothesis draws the same examples each time (its profile for CI), and has no deadline.

Errors: `Unmeasured`, when the tests fail on the unchanged code, or mutmut does not come to an end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs/tests.md"

#: Per cent that each module must reach.
LEAST_BRANCHES: Final = 95.0
LEAST_SCORE: Final = 85.0

#: Which tests concern which module. Only fast ones: each mutant runs those of them that reach it.
CONCERNS: Final[Mapping[str, tuple[str, ...]]] = {
    "mtad/smtp/wire.py": ("test_wire", "test_wire_edges"),
    "mtad/smtp/server.py": ("test_server_protocol", "test_server_edges"),
    "mtad/smtp/client.py": ("test_client_protocol", "test_client_content", "test_client_smuggling", "test_client_edges"),
    "mtad/spool/queue_file.py": ("test_queue_file", "test_queue_file_edges"),
    "mtad/spool/message.py": ("test_open_message", "test_incoming_file", "test_spool_leftovers", "test_message_edges"),
    "mtad/spool/queues.py": ("test_queues", "test_queues_edges"),
    "mtad/delivery/maildir.py": ("test_maildir", "test_maildir_edges"),
    "mtad/retry.py": ("test_retry", "test_notify"),
    "mtad/scheduler/settling.py": (
        "test_settling",
        "test_scheduler",
        "test_scheduler_doubts",
        "test_scheduler_faults",
        "test_scheduler_orders",
        "test_scheduler_queues",
        "test_reports_unwritten",
        "test_leaps",
    ),
}

#: Left out: a mutant that is killed in the middle of one would leave a mount behind, or they would take too long for each.
_LEFT_OUT: Final = (
    "tests/unit/test_maildir.py::test_a_full_disk_defers_with_the_reason_and_leaves_nothing",
    "tests/unit/test_queues.py::test_promise_8_twenty_thousand_messages_are_streamed_in_linear_time",
)

#: Options of pytest that leave them out, and what needs the checkout itself.
_OPTIONS: Final = ("-p", "no:cacheprovider", "-p", "no:xdist", *(f"--deselect={test}" for test in _LEFT_OUT))

#: What a copy of the checkout needs for its unit tests.
_COPIED: Final = ("mtad", "tests", "tools", "pyproject.toml", "setup.py", "README.md")

#: How mutmut tells what became of a mutant: exit codes of pytest, and signals that its time limits send.
_KILLED: Final = frozenset({1, 3})
_TIMED_OUT: Final = frozenset({36, 24, -24, 152, 255, -9})

_BEGIN: Final = "<!-- made by tools/mutants --write -->\n"
_END: Final = "<!-- end -->\n"
_HEADINGS: Final = ("module", "lines", "branches", "mutants", "killed", "timed out", "survived", "score")


class Unmeasured(Exception):
    """A module could not be measured; the text says why."""


class Figures(msgspec.Struct, frozen=True):
    """What was measured for one module. ``lines`` and ``branches`` are per cent."""

    module: str
    lines: float
    branches: float
    killed: int
    timed_out: int
    survivors: tuple[str, ...] = ()

    @property
    def mutants(self) -> int:
        """How many there were."""
        return self.killed + self.timed_out + len(self.survivors)

    @property
    def score(self) -> float:
        """Per cent of the mutants that the tests noticed."""
        return 100 * (self.killed + self.timed_out) / self.mutants if self.mutants else 0.0

    @property
    def good(self) -> bool:
        """Whether both floors are reached."""
        return self.branches >= LEAST_BRANCHES and self.score >= LEAST_SCORE

    def cells(self) -> tuple[str, ...]:
        """As a row of the table; per cent are rounded down."""
        return (
            self.module,
            _per_cent(self.lines),
            _per_cent(self.branches),
            str(self.mutants),
            str(self.killed),
            str(self.timed_out),
            str(len(self.survivors)),
            _per_cent(self.score),
        )


def _per_cent(value: float) -> str:
    return f"{int(value * 10) / 10:.1f} %"


def concerning(module: str) -> list[str]:
    """The test files that concern a module, relative to the checkout."""
    return [f"tests/unit/{name}.py" for name in CONCERNS[module]]


def measure(module: str, directory: Path, children: int) -> Figures:
    """Measure one module on a copy in ``directory``, which is made and stays; ``children`` mutants at a time.

    Raises:
        Unmeasured: see the module.
    """
    copy(module, directory)
    lines, branches = _coverage(module, directory)
    _run([_program("mutmut"), "run", "--max-children", str(children)], directory, module)
    verdicts = json.loads((directory / "mutants" / f"{module}.meta").read_bytes())["exit_code_by_key"]
    return judge(module, lines, branches, verdicts)


def judge(module: str, lines: float, branches: float, verdicts: Mapping[str, int | None]) -> Figures:
    """Figures out of mutmut's exit code for each mutant.

    Raises:
        Unmeasured: some were not tried.
    """
    if None in verdicts.values():
        raise Unmeasured(f"{module}: mutmut came to no end")
    killed = sum(1 for code in verdicts.values() if code in _KILLED)
    timed_out = sum(1 for code in verdicts.values() if code in _TIMED_OUT)
    survivors = tuple(name for name, code in verdicts.items() if code not in _KILLED | _TIMED_OUT)
    return Figures(module, lines, branches, killed, timed_out, survivors)


def changes(figures: Figures, directory: Path) -> list[str]:
    """What each survivor changes, as the lines of a diff."""
    found = []
    for name in figures.survivors:
        shown = _run([_program("mutmut"), "show", name], directory, name)
        changed = [line for line in shown.splitlines() if re.match(r"[-+](?![-+]{2})", line)]
        found.append("\n".join([name.rpartition(".")[2], *changed]))
    return found


def copy(module: str, directory: Path) -> None:
    """Copy what the tests need, with settings for mutmut."""
    directory.mkdir(parents=True)
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, directory / name)
    settings = {
        "source_paths": ["mtad"],
        "only_mutate": [module],
        "also_copy": ["tools"],
        "pytest_add_cli_args_test_selection": concerning(module),
        "pytest_add_cli_args": list(_OPTIONS),
        # Seconds: a mutant may take four times as long as the tests do without it.
        "timeout_multiplier": 4.0,
    }
    with (directory / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.mutmut]\nuse_git_change_detection = false\ntrack_dependencies = false\n")
        file.writelines(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())


def _coverage(module: str, directory: Path) -> tuple[float, float]:
    """Per cent of lines and of branches that the tests of a module reach."""
    program = _program("coverage")
    arguments = [
        program,
        "run",
        "--branch",
        f"--include={module}",
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    _run([*arguments, *concerning(module)], directory, module)
    report = json.loads(_run([program, "json", "-q", "-o", "-"], directory, module))
    totals = report["totals"]
    lines = 100 * totals["covered_lines"] / max(1, totals["num_statements"])
    return lines, 100 * totals["covered_branches"] / max(1, totals["num_branches"])


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _run(command: Sequence[str], directory: Path, what: str) -> str:
    temporary = directory.parent / "t"
    temporary.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"CI": "1", "TMPDIR": str(temporary), "PYTEST_DEBUG_TEMPROOT": str(temporary)}
    try:
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as fault:
        raise Unmeasured(f"{command[0]} is missing: tools/venv test,mutation") from fault
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise Unmeasured(f"{what}: {Path(command[0]).name} failed:\n{end}")
    return done.stdout


def table(rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown, its columns aligned."""
    lines = [_HEADINGS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if column == 0 else ":") for column, width in enumerate(widths)) + "|"
    texts = [
        "| "
        + " | ".join(
            cell.ljust(w) if at == 0 else cell.rjust(w) for at, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    ]
    return "\n".join([texts[0], rule, *texts[1:]]) + "\n"


def rows_of(page: str) -> dict[str, tuple[str, ...]]:
    """The rows of the table in a page, by module."""
    inside = page.partition(_BEGIN)[2].partition(_END)[0]
    rows = [tuple(cell.strip() for cell in line.strip("|\n").split("|")) for line in inside.splitlines()]
    return {row[0]: row for row in rows if row[0] in CONCERNS and len(row) == len(_HEADINGS)}


def written(page: str, figures: Sequence[Figures]) -> str:
    """A page with new rows in its table; rows of modules that were not measured stay.

    Raises:
        ValueError: the page has no place for the table.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError("the page has no place for the table")
    rows = rows_of(page) | {one.module: one.cells() for one in figures}
    return before + begin + table([rows[module] for module in CONCERNS if module in rows]) + end + after
