"""The command `tools/scale`."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tools.lib.scale import Measured, measure


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="tools/scale", description="Make a long queue and measure what it costs.")
    parser.add_argument("--messages", type=int, default=100_000, help="(%(default)s)")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="the disk to use (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run it; the exit code."""
    options = parse(arguments)
    root = Path(tempfile.mkdtemp(prefix="mtad-scale-", dir=options.directory))

    def say(text: str) -> None:
        if not options.json:
            print(text, file=sys.stderr, flush=True)

    try:
        found = measure(root / "site", options.messages, say)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(msgspec.json.encode(found).decode() if options.json else table(found))
    return 0


def table(found: Measured) -> str:
    """For people."""
    latency = sorted(found.latency)
    rows = [
        ("messages in the queue", f"{found.messages:,}"),
        ("until the scheduler has them all", f"{found.start:.1f} s"),
        ("its memory for each", f"{found.memory:.0f} octets"),
        ("a new message is at its exchanger", f"{1000 * statistics.median(latency):.0f} ms after its 250 (median of 20)"),
        ("", f"{1000 * latency[-1]:.0f} ms (slowest)"),
        ("mtaq prints its first line", f"after {found.first_line:.2f} s"),
        ("and all", f"after {found.whole:.1f} s"),
    ]
    return "\n".join(f"{name:<35}{value}" for name, value in rows)
