"""The tables of docs/reliability.md: each is what one run of a sweep has found, and is written by that run.

Between a line ``<!-- crashtest NAME -->`` and a line ``<!-- end -->`` the page belongs to this module; the rest of it to
people. A sweep without such a place gets one at the end of the page.

Errors: OSError, the page cannot be read or written.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Final

from tools.lib.sweeps import SWEEPS, SweepResult, markdown

PAGE: Final = Path(__file__).resolve().parents[2] / "docs/reliability.md"


def block(name: str, seed: int, length: int, day: date, result: SweepResult) -> str:
    """What a run has found, with the lines around it."""
    sweep = SWEEPS[name]
    count = len(result.faults)
    broken = f"{count or 'no'} broken promise{'' if count == 1 else 's'}"
    command = f"tools/crashtest {name} --seed {seed} --length {length}"
    return (
        f"<!-- crashtest {name} -->\n### `{name}`: {sweep.about}\n\n"
        f"`{command}` (at most {length:,} {sweep.unit}), {day.isoformat()}: {broken}.\n\n"
        f"{markdown(result.rows)}\n<!-- end -->\n"
    )


def put(page: str, name: str, text: str) -> str:
    """The page with this block instead of its earlier one."""
    earlier = re.compile(rf"^<!-- crashtest {re.escape(name)} -->\n.*?^<!-- end -->\n", re.M | re.S)
    if earlier.search(page) is None:
        return f"{page.rstrip()}\n\n{text}"
    return earlier.sub(lambda _: text, page)


def write(name: str, seed: int, length: int, result: SweepResult, path: Path = PAGE) -> None:
    """Put the block of a run, of today, into the page."""
    page = path.read_text(encoding="utf-8")
    path.write_text(put(page, name, block(name, seed, length, date.today(), result)), encoding="utf-8")
