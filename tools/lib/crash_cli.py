"""The command `tools/crashtest`."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.lib.crash_run import CrashTest
from tools.lib.crash_verdict import table


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="tools/crashtest", description="Kill mtad's processes under load, and look for what was lost, torn or doubled."
    )
    parser.add_argument("--kills", type=int, default=50, help="how often (%(default)s)")
    parser.add_argument("--seed", type=int, help="repeat the schedule of an earlier run; by default a new one")
    parser.add_argument("--clients", type=int, default=6, help="clients that send at a time (%(default)s)")
    parser.add_argument(
        "--pause", type=float, default=0.03, help="mean seconds between two messages of a client (%(default)s)"
    )
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="the disk to use (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep everything afterwards, also when all is well")
    parser.add_argument(
        "--break",
        dest="broken",
        choices=("lose", "tear", "twice"),
        default="",
        help="do this on purpose, to see that it is noticed",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run it; the exit code: 0 all promises kept, 1 not."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server is stopped then, too
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    root = Path(tempfile.mkdtemp(prefix="mtad-crash-", dir=options.directory))
    print(f"seed {seed}, {options.kills} kills, in {root}", flush=True)

    def say(text: str) -> None:
        print(text, flush=True)

    test = CrashTest(
        root, seed, options.kills, clients=options.clients, pause=options.pause, broken=options.broken, say=say
    )
    try:
        verdict = test.run()
    except AssertionError as fault:
        print(f"tools/crashtest: {fault}\nseed {seed}; everything is in {root}", file=sys.stderr)
        return 1
    print(table(verdict))
    if verdict.good and not options.keep:
        shutil.rmtree(root)
    else:
        print(f"seed {seed}; everything is in {root}")
    return 0 if verdict.good else 1
