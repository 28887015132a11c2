"""Issue 4, Scale: a long queue does not slow down a new message, costs little memory, and is listed as it is read."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from mtad.spool.queues import Queue, Spool
from tests.site import Site, await_value
from tools.lib.scale import DEAD, Scale, fill, measure
from tools.lib.scale_cli import table

ROOT = Path(__file__).parents[2]
MANY = 20_000


def test_twenty_thousand_messages_for_a_dead_destination_and_then_one_for_a_live_one(tmp_path: Path) -> None:
    """It arrives within 100 ms, while the others are being taken up, tried and put off."""
    scale = Scale(tmp_path)
    spool = scale.spool()
    fill(spool, MANY, DEAD, queue=Queue.INCOMING)
    with scale.peers(), scale.site:
        scale.latency()  # the first one finds no delivery process, no connection and no answer of the DNS
        seconds: list[float] = []
        while len(seconds) < 15 or (spool.count(Queue.DEFERRED) < MANY // 2 and len(seconds) < 200):
            seconds.append(scale.latency())
        assert spool.count(Queue.INCOMING) + spool.count(Queue.ACTIVE) + spool.count(Queue.DEFERRED) >= MANY
        assert statistics.median(seconds) < 0.1
        await_value(lambda: spool.count(Queue.DEFERRED) == MANY, timeout=90.0, what="all are deferred")
        assert statistics.median(scale.latency() for _ in range(15)) < 0.1
        # All of them together took a handful of connections: the rest was put off with the lane.
        tried = len(re.findall(r"status=deferred \(connect to", scale.site.log()))
        put_off = len(re.findall(r"status=deferred \(delivery temporarily suspended: ", scale.site.log()))
        assert tried + put_off == MANY
        assert tried < 30
    spool.close()


def test_a_long_queue_costs_little_memory(tmp_path: Path) -> None:
    """Under 1 KB of the scheduler's memory for each deferred message."""
    found = measure(tmp_path / "site", 5000, lambda _text: None)
    assert 0 < found.memory < 1024
    assert len(found.latency) == 20
    assert 0 < found.first_line <= found.whole
    assert "its memory for each" in table(found)


def test_mtaq_prints_as_it_reads(tmp_path: Path) -> None:
    """The first line is there long before the last one is known: a reader that has seen enough ends it."""
    site = Site(tmp_path)
    spool = Spool(str(site.spool_path), create=True)
    fill(spool, 3000, DEAD)
    spool.close()
    command = [str(Path(sys.executable).parent / "mtaq"), "-c", str(site.config_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = os.read(process.stdout.fileno(), 1000)
        assert first.startswith(b"----Queue ID-----")
        assert process.poll() is None, "it is not done: there is more than a pipe holds"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


def test_the_command() -> None:
    command = [sys.executable, str(ROOT / "tools" / "scale"), "--help"]
    assert "--messages" in subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
