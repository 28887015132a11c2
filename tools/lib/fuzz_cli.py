"""The command `tools/fuzz`."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tools.lib.fuzz import Failure, Finding, Target, attempt, campaign, save
from tools.lib.fuzz_guided import guided
from tools.lib.fuzz_targets import TARGETS

_EPILOGUE: Final = """\
Exit code: 0 no findings, 1 findings, 2 usage. A finding is saved in three files: the smallest input that fails in the same
way, the input as it was found (.found), and how it fails (.txt). Inputs of findings that are settled belong in
tests/fuzz/regressions/TARGET, where the tests try them again each time.
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="tools/fuzz",
        description="Feed mtad's parsers and engines with hostile octets, and see that their invariants hold.",
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="show the targets and their invariants")
    parser.add_argument("--target", choices=sorted(TARGETS), metavar="NAME", help="only this target")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together (%(default)s)")
    parser.add_argument("--seed", help="repeat an earlier run; by default a new one")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="try this input, as it is; with --target")
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", default=Path(tempfile.gettempdir()) / "mtad-fuzz", help="%(default)s"
    )
    parser.add_argument(
        "--guided",
        action="store_true",
        help="be led by the coverage of the code, with atheris if that is there; with --target",
    )
    options = parser.parse_args(arguments)
    if (options.replay is not None or options.guided) and options.target is None:
        parser.error("--replay and --guided need --target")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run it; the exit code."""
    options = parse(arguments)
    if options.list:
        for target in TARGETS.values():
            print(target.name)
            print(textwrap.indent(textwrap.fill(target.invariant, 110), "    "))
        return 0
    if options.replay is not None:
        return replay(TARGETS[options.target], options.replay)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seed = options.seed or str(random.SystemRandom().randrange(1_000_000))
    if options.guided:
        return guided(TARGETS[options.target], options.seconds, seed, options.save)
    targets = [TARGETS[options.target]] if options.target else list(TARGETS.values())
    found = fuzz(targets, options.seconds, seed, options.save, lambda text: print(text, flush=True))
    return 1 if found else 0


def replay(target: Target, path: Path) -> int:
    """Try one input, and say how it failed."""
    outcome = attempt(target.check, path.read_bytes(), measured=True)
    if isinstance(outcome, Failure):
        print(f"{outcome.kind}\n\n{outcome.report}")
        return 1
    print("holds")
    return 0


def fuzz(
    targets: Sequence[Target], seconds: float, seed: str, folder: Path, say: Callable[[str], None]
) -> Sequence[Finding]:
    """Run campaigns of ``seconds`` in all; what they found is saved and told."""
    say(f"seed {seed}, {seconds:g} seconds")
    shares = sum(target.share for target in targets)
    found: list[Finding] = []
    inputs = 0
    for target in targets:
        result = campaign(target, seconds * target.share / shares, seed)
        say(
            f"{target.name:10} {result.inputs:8} inputs {result.inputs / max(result.seconds, 1e-9):7.0f}/s"
            f" {result.kept:6} kept  {len(result.findings)} findings"
        )
        for finding in result.findings:
            say(tell(finding, save(finding, folder)))
        found.extend(result.findings)
        inputs += result.inputs
    say(f"{inputs} inputs in all, {len(found)} findings")
    return found


def tell(finding: Finding, path: Path) -> str:
    """A finding for a human: how it fails, with what, and how to see it again."""
    shown = repr(finding.smallest[:300]) + ("..." if len(finding.smallest) > 300 else "")
    last = finding.failure.report.strip().rpartition("\n")[2]
    return (
        f"  {finding.failure.kind}: {last[:300]}\n  {len(finding.smallest)} octets: {shown}\n"
        f"  tools/fuzz --target {finding.target} --replay {path}"
    )
