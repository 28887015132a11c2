"""The sweeps of `tools/crashtest`: each makes one kind of thing go wrong again and again, and looks for what broke.

A sweep is a module ``tools/lib/sweep_NAME.py`` with a function ``run(options, say)`` that returns a `SweepResult`, and a
line in `SWEEPS`. Its module is imported when the sweep is run, so that one which needs something special hinders no other.
What it mounts, starts or writes it undoes, whatever happens; its files stay, in the directory that it is given, for a look.

Errors: a promise that was broken is a fault in the result, not an exception. `Unavailable` says that this machine lacks a
right or a program that the sweep needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, cast

import msgspec

Cell = int | float | str
#: Takes a line about the progress.
Say = Callable[[str], None]


class Unavailable(Exception):
    """The sweep cannot be run here; the text says what is missing."""


class SweepOptions(msgspec.Struct, frozen=True):
    """What a sweep is told: ``seed`` makes its choices, ``directory`` exists and is empty, and is its own.

    ``length`` is how much to do, in the unit of the sweep (see `SWEEPS`), at least 1.
    """

    seed: int
    length: int
    directory: Path
    keep: bool = False


class SweepResult(msgspec.Struct, frozen=True):
    """What came of it: the rows of a table, each from column to value, and, a line each, the promises that were broken."""

    rows: Sequence[Mapping[str, Cell]]
    faults: Sequence[str] = ()


class Sweep(msgspec.Struct, frozen=True):
    """A line of the table: what goes wrong, and how much of it, in which unit, unless another length is given."""

    about: str
    length: int
    unit: str


#: All of them, in the order of ``tools/crashtest all``.
SWEEPS: Final[Mapping[str, Sweep]] = {
    "power": Sweep("power cuts at random moments under load, on file systems of its own", 100, "cuts"),
    "states": Sweep("each write to the disk recorded, and power cuts at any of them made real", 5_000, "states"),
    "calls": Sweep("SIGKILL before the Nth durable system call, in each kind of process", 10_000, "calls"),
    "errors": Sweep("an error at the Nth system call, in each kind of process", 700, "errors"),
    "disk": Sweep("a disk that is full, read-only, failing or hung for a while, and is healed", 36, "rounds"),
    "limits": Sweep("memory, processes or descriptors are used up, under load", 35, "rounds"),
    "files": Sweep("whatever may lie in a queue, before a real scheduler", 10_000, "files"),
    "floods": Sweep("very many clients, and slow, deaf, hasty and tedious ones", 10_000, "idle sessions"),
    "reload": Sweep("SIGTERM and SIGHUP with a hundred transactions under way", 60, "rounds"),
    "clock": Sweep("the clock is set, while the server runs and while it is stopped", 24, "rounds"),
    "network": Sweep("cut at each point of the dialogue, in both roles; and lines that lose or are slow", 2_100, "cuts"),
    "soak": Sweep("all of that mixed, on one server that lives through it", 1_000, "seeds"),
}


class _Module(Protocol):
    def run(self, options: SweepOptions, say: Say) -> SweepResult: ...


def run(name: str, options: SweepOptions, say: Say) -> SweepResult:
    """Run one sweep.

    Raises:
        KeyError: there is none of that name.
        Unavailable: this machine lacks what it needs.
    """
    if name not in SWEEPS:
        raise KeyError(name)
    module = cast(_Module, importlib.import_module(f"tools.lib.sweep_{name}"))
    return module.run(options, say)


def bar(done: int, total: int, width: int = 20) -> str:
    """A progress bar, for the start of a line: ``[#####---------------] 5/20``."""
    full = width * done // max(1, total)
    return f"[{'#' * full}{'-' * (width - full)}] {done}/{total}"


def markdown(rows: Sequence[Mapping[str, Cell]]) -> str:
    """The rows as a table in Markdown, with the columns of all of them; "" without rows."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        return ""
    numeric = {column for column in columns if all(not isinstance(row.get(column, 0), str) for row in rows)}
    cells = [columns, *([_text(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if column in numeric else text.ljust(width)
            for text, width, column in zip(texts, widths, columns, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        f"{'-' * (width - 1)}{':' if column in numeric else '-'}" for width, column in zip(widths, columns, strict=True)
    ]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def _text(cell: Cell) -> str:
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.2f}" if isinstance(cell, float) else cell
