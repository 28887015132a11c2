"""The command `tools/standards`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tools.lib.standards import PACKAGE, PAGE, ROOT, BadTable, cited, load, problems, render


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="tools/standards",
        description="Make docs/standards.md from tools/lib/standards.toml and the citations of RFCs in mtad/.",
        epilog="Exit code: 0 fine, 1 table and code do not agree, or (with --check) the page is stale.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is stale")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run it; the exit code."""
    options = parse(arguments)
    try:
        table = load()
    except BadTable as fault:
        print(f"tools/standards: {fault}", file=sys.stderr)
        return 1
    citations = cited(PACKAGE, table)
    found = list(problems(table, citations, ROOT))
    page = render(table, citations, PACKAGE)
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        if options.check:
            found.append(f"{PAGE.relative_to(ROOT)} is stale: run tools/standards")
        else:
            PAGE.write_text(page, encoding="utf-8")
            print(f"{PAGE.relative_to(ROOT)} written")
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0
