"""The command `tools/simulate`."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import get_args

from tools.lib.sim_verdict import Finding, table, verdict
from tools.lib.sim_world import Kind
from tools.lib.simulate import Plan, Simulation


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="tools/simulate",
        description="Play a day of mail to the real scheduler under a clock that jumps: who waits, and who starves?",
        epilog="Exit code: 0 all invariants hold, 1 not. The seed that is printed repeats the day.",
    )
    parser.add_argument("--messages", type=int, default=1_000_000, help="(%(default)s)")
    parser.add_argument("--domains", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument("--hours", type=float, default=24.0, help="in which they arrive (%(default)g)")
    parser.add_argument("--seed", type=int, help="repeat an earlier day; by default a new one")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=get_args(Kind),
        metavar="KIND",
        help=f"let destinations of this kind be steady instead: {', '.join(get_args(Kind))}; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run it; the exit code."""
    options = parse(arguments)
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    plan = Plan(seed, options.messages, options.domains, options.hours, frozenset(options.without))
    loud = sys.stderr.isatty() and not options.json

    def progress(part: float) -> None:
        if loud:
            print(f"\r{part:4.0%} of the day", end="", file=sys.stderr, flush=True)

    if not options.json:
        print(f"seed {seed}: {plan.messages} messages to {plan.domains} domains in {plan.hours:g} hours", flush=True)
    began = time.monotonic()
    simulation = Simulation(plan, progress)
    simulation.run()
    took = time.monotonic() - began
    if loud:
        print("\r" + " " * 20 + "\r", end="", file=sys.stderr)
    findings = verdict(simulation)
    if options.json:
        print(json.dumps(_object(simulation, findings, took)))
    else:
        print(table(simulation))
        print(f"\n{simulation.attempts} attempts, decided in {took:.0f} s")
        for finding in findings:
            print(f"{'ok ' if finding.good else 'BAD'}  {finding.what}")
    return 0 if all(finding.good for finding in findings) else 1


def _object(simulation: Simulation, findings: Sequence[Finding], took: float) -> dict[str, object]:
    return {
        "seed": simulation.plan.seed,
        "recipients": simulation.arrived,
        "delivered": simulation.delivered,
        "bounced": simulation.bounced,
        "attempts": simulation.attempts,
        "seconds": round(took, 1),
        "waits": {
            kind: {
                "recipients": len(waits.seconds),
                "median": round(waits.at(0.5), 2),
                "p99": round(waits.at(0.99), 2),
                "longest": round(waits.at(1.0), 2),
                "starved": waits.starved,
            }
            for kind, waits in sorted(simulation.waits.items())
        },
        "findings": [{"good": finding.good, "what": finding.what} for finding in findings],
    }
