"""The arithmetic of `tools/bench`, and what it reads from the kernel and from smtp-sink."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.site import await_value
from tools.lib import cpu
from tools.lib.bench import (
    HEADING,
    BenchFailed,
    Load,
    Run,
    Spread,
    Summary,
    conclusion,
    parse_count,
    program,
    row,
    summarise,
)
from tools.lib.bench_cli import parse

TICKS = os.sysconf("SC_CLK_TCK")


def one(server: str, seconds: float, busy: float, own: float = 1.0) -> Run:
    return Run(server, 1000, seconds, busy, own)


def test_a_run_in_numbers() -> None:
    measured = Run("mtad", 2000, 4.0, 3.0, 1.0)
    assert measured.rate == 500
    assert measured.cost == 1.5
    assert measured.own_cost == 0.5


def test_ratios_are_those_of_the_pairs_and_not_of_the_medians() -> None:
    runs = [one("mtad", 1, 1), one("Postfix", 2, 3), one("mtad", 2, 4), one("Postfix", 2, 4), one("mtad", 4, 1)]
    runs += [one("Postfix", 16, 2)]
    summary = summarise(runs)
    assert summary.rate_ratio == Spread(2.0, 1.0, 4.0)
    assert summary.cost_ratio == Spread(0.5, 1 / 3, 1.0)
    assert summary.rate == {"mtad": 500.0, "Postfix": 500.0}
    assert summary.cost == {"mtad": 1.0, "Postfix": 3.0}


def test_a_server_alone_has_no_ratio() -> None:
    summary = summarise([one("mtad", 1, 1), one("mtad", 2, 1), one("mtad", 4, 1)])
    assert summary == Summary({"mtad": 500.0}, {"mtad": 1.0}, {"mtad": 1.0})
    assert [line for line in conclusion(summary) if "/" in line] == []


def test_the_report_has_medians_and_ratios() -> None:
    lines = list(conclusion(summarise([one("mtad", 1, 1), one("Postfix", 2, 4)])))
    assert lines[1] == row("mtad", 1000, 1, 1)
    assert lines[2] == row("Postfix", 500, 4, 1)
    assert lines[4].split() == ["messages", "a", "second", "2.00", "(2.00", "to", "2.00)"]
    assert lines[5].split() == ["CPU", "a", "message", "0.25", "(0.25", "to", "0.25)"]
    assert len(HEADING) == len(lines[1])


@pytest.mark.parametrize(
    ("tail", "count"),
    [
        (b"", 0),
        (b"sess=1 quit=0 mesg=0\r", 0),
        (b"sess=1 quit=0 mesg=7\rsess=1 quit=1 mesg=8\r", 8),
        (b"mesg=41\rsess=50 quit=49 mesg=5", 41),  # the last counter is cut: it may be 50
        (b"9\rsess=50 quit=49 mesg=50\rse", 50),
    ],
)
def test_the_count_of_the_sink(tail: bytes, count: int) -> None:
    assert parse_count(tail) == count


def test_processor_time_of_a_process_whose_name_is_odd() -> None:
    stat = "7 (a) R (b c) S 1 7 7 0 -1 4194304 100 0 0 0 " + f"{3 * TICKS} {2 * TICKS} {TICKS} {TICKS} 20 0 1 0 5 0 0"
    assert cpu.parse_process(stat) == (5.0, 2.0)


def test_processor_time_of_the_machine_leaves_out_idle_waiting_and_stolen_time() -> None:
    fields = [1, 2, 4, 1000, 2000, 8, 16, 4000, 0, 0]
    text = "cpu  " + " ".join(str(field * TICKS) for field in fields) + "\ncpu0 1 2 3 4\n"
    assert cpu.parse_machine(text) == 31.0


def test_processor_time_of_a_tree_counts_children_living_and_dead() -> None:
    work = "import time\nwhile time.process_time() < 0.3: pass"
    parent = f"""import subprocess, sys
subprocess.run([sys.executable, "-c", {work!r}])
subprocess.Popen([sys.executable, "-c", {work + chr(10) + "time.sleep(60)"!r}])
print("ready", flush=True)
sys.stdin.read()"""
    before = cpu.machine()
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        [child] = cpu.children(process.pid)
        await_value(lambda: cpu.process(child)[0] >= 0.2, what="the living child has worked")
        assert cpu.process(process.pid)[1] >= 0.19
        assert cpu.tree([process.pid]) >= 0.39
        os.kill(child, 9)
        assert process.stdin is not None
        process.stdin.close()
    assert cpu.machine() - before >= 0.3
    assert cpu.tree([process.pid]) == 0.0


def test_a_program_that_is_missing_is_named() -> None:
    assert program("sh").endswith("/sh")
    with pytest.raises(BenchFailed, match="smtp-nothing is not installed"):
        program("smtp-nothing")


def test_the_options() -> None:
    options = parse(["-n", "10", "--sessions", "3", "--pairs", "2", "--only", "mtad"])
    assert (options.messages, options.sessions, options.pairs, options.only) == (10, 3, 2, "mtad")
    assert (parse([]).messages, parse([]).size) == (Load().messages, Load().size)
    with pytest.raises(SystemExit):
        parse(["--pairs", "0"])


def test_a_short_run_for_real(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tools.lib.bench_cli import main

    try:
        program("smtp-sink")
    except BenchFailed as why:
        pytest.skip(str(why))
    tmp_path.chmod(0o755)
    started = time.monotonic()
    assert main(["-n", "50", "--sessions", "5", "--pairs", "1", "--only", "mtad", "--directory", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == HEADING
    name, rate, _, _ = lines[2].split()
    assert name == "mtad"
    assert float(rate) > 50 / (time.monotonic() - started)
    assert list(tmp_path.iterdir()) == []
