"""The command `tools/crashtest`: kills at random moments, or one of the sweeps, or each of them."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tools.lib.crash_report import write
from tools.lib.crash_run import CrashTest
from tools.lib.crash_verdict import table
from tools.lib.sweeps import SWEEPS, SweepOptions, Unavailable, markdown
from tools.lib.sweeps import run as run_sweep

#: Options of the kills, which a sweep does not have, and what they are unless told otherwise.
_OF_KILLS: Final = {"kills": 50, "clients": 6, "pause": 0.03, "break": ""}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="tools/crashtest",
        description="Kill mtad under load, or make other things go wrong, and look for what was lost, torn or doubled.",
        epilog="\n".join(
            ["the sweeps, and their lengths:"]
            + [f"  {name:10} {sweep.about}; {sweep.length} {sweep.unit}" for name, sweep in SWEEPS.items()]
            + ["", "Exit code: 0 all promises kept, 1 not, 2 nothing could be run here."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sweep", nargs="?", choices=(*SWEEPS, "all"), metavar="SWEEP", help="one of those below, or all; without it, kills"
    )
    parser.add_argument("--length", type=int, help="how much of a sweep to do, in its unit; see below")
    parser.add_argument("--kills", type=int, help=f"how often (kills only; {_OF_KILLS['kills']})")
    parser.add_argument("--seed", type=int, help="repeat the schedule of an earlier run; by default a new one")
    parser.add_argument("--clients", type=int, help=f"clients that send at a time (kills only; {_OF_KILLS['clients']})")
    parser.add_argument(
        "--pause",
        type=float,
        help=f"mean seconds between two messages of a client (kills only; {_OF_KILLS['pause']})",
    )
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="the disk to use (%(default)s)")
    parser.add_argument("--write", action="store_true", help="put the table of a sweep into docs/reliability.md")
    parser.add_argument("--keep", action="store_true", help="keep everything afterwards, also when all is well")
    parser.add_argument(
        "--break",
        choices=("lose", "tear", "twice"),
        help="do this on purpose, to see that it is noticed (kills only)",
    )
    options = parser.parse_args(arguments)
    if not options.sweep and (options.write or options.length is not None):
        parser.error("--write and --length need a sweep")
    for name, usual in _OF_KILLS.items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
        elif options.sweep:
            parser.error(f"--{name} is for kills only, and not for a sweep")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run it; the exit code: 0 all promises kept, 1 not."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server is stopped then, too
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    if options.sweep:
        names = list(SWEEPS) if options.sweep == "all" else [options.sweep]
        codes = [_sweep(name, seed, options) for name in names]
        return 1 if 1 in codes else min(codes)
    return _kills(seed, options)


def _say(text: str) -> None:
    print(text, flush=True)


def _sweep(name: str, seed: int, options: argparse.Namespace) -> int:
    """Run one sweep; 0 all promises kept, 1 not, 2 it cannot be run here."""
    length = SWEEPS[name].length if options.length is None else max(1, options.length)
    root = Path(tempfile.mkdtemp(prefix=f"mtad-{name}-", dir=options.directory))
    _say(f"{name}: seed {seed}, {length} {SWEEPS[name].unit}, in {root}")
    try:
        result = run_sweep(name, SweepOptions(seed, length, root, options.keep), _say)
    except Unavailable as lack:
        _say(f"{name}: skipped: {lack}")
        shutil.rmtree(root)
        return 2
    except AssertionError as fault:
        return _failed(fault, seed, root)
    _say(markdown(result.rows))
    for line in result.faults:
        _say(f"FAULT: {line}")
    if options.write:
        write(name, seed, length, result)
    if result.faults or options.keep:
        _say(f"seed {seed}; everything is in {root}")
    else:
        shutil.rmtree(root)
    return 1 if result.faults else 0


def _kills(seed: int, options: argparse.Namespace) -> int:
    root = Path(tempfile.mkdtemp(prefix="mtad-crash-", dir=options.directory))
    _say(f"seed {seed}, {options.kills} kills, in {root}")
    test = CrashTest(
        root, seed, options.kills, clients=options.clients, pause=options.pause, broken=getattr(options, "break"), say=_say
    )
    try:
        verdict = test.run()
    except AssertionError as fault:
        return _failed(fault, seed, root)
    print(table(verdict))
    if verdict.good and not options.keep:
        shutil.rmtree(root)
    else:
        print(f"seed {seed}; everything is in {root}")
    return 0 if verdict.good else 1


def _failed(fault: AssertionError, seed: int, root: Path) -> int:
    if not str(fault):  # an assertion of ours that has no words: the place must do
        traceback.print_exception(fault)
    print(f"tools/crashtest: {fault}\nseed {seed}; everything is in {root}", file=sys.stderr)
    return 1
