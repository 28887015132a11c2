"""The command `tools/bench`: options, the order of the runs, the report."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from tests.peers.mx import free_port
from tools.lib.bench import HEADING, BenchFailed, Load, Run, Server, Sink, conclusion, program, row, run, summarise
from tools.lib.bench_servers import Mtad, Postfix


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="tools/bench", description="Messages a second and CPU a message, through a relay."
    )
    parser.add_argument("-n", "--messages", type=_positive, default=3000, help="messages in a run (%(default)s)")
    parser.add_argument("--size", type=_positive, default=4096, help="octets of a message's body (%(default)s)")
    parser.add_argument("--sessions", type=_positive, default=20, help="connections at a time (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="many messages over each connection, instead of one")
    parser.add_argument("--pairs", type=_positive, default=5, help="runs of each server (%(default)s)")
    parser.add_argument("--only", choices=("mtad", "postfix"), help="measure one server alone")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="the disk to use (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main(arguments: Sequence[str]) -> int:
    """Measure and report; the exit code: 0 fine, 1 a run failed."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is stopped then, too
    try:
        _measure(options)
    except (BenchFailed, AssertionError) as why:
        print(f"tools/bench: {why}", file=sys.stderr)
        return 1
    return 0


def _measure(options: argparse.Namespace) -> None:
    for name in ("smtp-source", "smtp-sink"):
        program(name)
    load = Load(options.messages, options.size, options.sessions, options.keep)

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    root = Path(tempfile.mkdtemp(prefix="mtad-bench-", dir=options.directory))
    root.chmod(0o755)  # Postfix's processes run as another user
    try:
        runs = _runs(options, load, root, say)
    except BaseException:
        print(f"tools/bench: what there is to see is in {root}", file=sys.stderr)
        raise
    shutil.rmtree(root)
    summary = summarise(runs)
    for line in conclusion(summary):
        say(line)
    if options.json:
        facts = {"load": load, "runs": runs, "summary": summary}
        print(json.dumps(msgspec.to_builtins(facts)))


def _runs(options: argparse.Namespace, load: Load, root: Path, say: Callable[[str], None]) -> list[Run]:
    """Start the servers, let them run in turn, and stop them."""
    runs: list[Run] = []
    with ExitStack() as stack:
        sink = stack.enter_context(Sink(free_port(["127.0.0.1"]), root / "sink").running())
        servers = _servers(options.only, root, sink.port, say)
        for server in servers:
            stack.callback(server.stop)
            server.start()
            run(server, sink, msgspec.structs.replace(load, messages=max(100, load.sessions)))  # warm-up, not counted
        average = os.getloadavg()[0]
        say(f"{load.messages} messages of {load.size} octets, {load.sessions} sessions; load average {average:.2f}")
        say(HEADING)
        for _ in range(options.pairs):
            for server in servers:
                one = run(server, sink, load)
                runs.append(one)
                say(row(one.server, one.rate, one.cost, one.own_cost))
    return runs


def _servers(only: str | None, root: Path, sink_port: int, say: Callable[[str], None]) -> list[Server]:
    servers: list[Server] = []
    if only != "postfix":
        servers.append(Mtad(root / "mtad", sink_port))
    if only != "mtad":
        missing = Postfix.missing()
        if not missing:
            servers.append(Postfix(root / "postfix", sink_port))
        elif only == "postfix":
            raise BenchFailed(missing)
        else:
            say(f"without Postfix: {missing}")
    return servers
