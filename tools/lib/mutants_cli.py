"""The command `tools/mutants`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.lib.mutants import (
    CONCERNS,
    LEAST_BRANCHES,
    LEAST_SCORE,
    PAGE,
    Figures,
    Unmeasured,
    changes,
    measure,
    table,
    written,
)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="tools/mutants",
        description="Say how strong the tests are: branches covered and mutants noticed, by module.",
        epilog=f"Exit code: 0 fine, 1 a module has less than {LEAST_BRANCHES:g} % of its branches covered or less than "
        f"{LEAST_SCORE:g} % of its mutants noticed, 2 not measured. All of it takes about half an hour on one processor.",
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"by default all: {', '.join(CONCERNS)}")
    parser.add_argument("--children", type=int, default=1, help="mutants that are tried at a time (%(default)s)")
    parser.add_argument("--show", action="store_true", help="print what each survivor changes")
    parser.add_argument("--write", action="store_true", help="put the figures into docs/tests.md")
    options = parser.parse_args(arguments)
    unknown = [module for module in options.modules if module not in CONCERNS]
    if unknown:
        parser.error(f"not one of the modules: {', '.join(unknown)}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run it; the exit code."""
    options = parse(arguments)
    figures: list[Figures] = []
    try:
        with tempfile.TemporaryDirectory(prefix="mtad-mutants-") as place:
            for module in options.modules or CONCERNS:
                print(f"{module} ...", file=sys.stderr, flush=True)
                directory = Path(place) / module.replace("/", "_")
                figures.append(measure(module, directory, options.children))
                for change in changes(figures[-1], directory) if options.show else ():
                    print(change, end="\n\n", flush=True)
    except Unmeasured as fault:
        print(f"tools/mutants: {fault}", file=sys.stderr)
        return 2
    print(table([one.cells() for one in figures]), end="")
    if options.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
    return 0 if all(one.good for one in figures) else 1
