"""The sweep ``files`` in its short form, and that it would notice a message for somebody else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.procs import needs_root
from tools.lib import queue_harms
from tools.lib.sweep_files import FilesSweep


@needs_root
def test_whatever_lies_in_a_queue(tmp_path: Path) -> None:
    sweep = FilesSweep(tmp_path, 5, lambda _: None)
    sweep.run(200)
    assert sweep.faults == []
    assert len(sweep.counts) == len(queue_harms.HARMS)
    fates = Counter(fate for _, fate in sweep.fates.elements())
    assert fates["corrupt"] > 100
    assert fates["message"] > 40
    assert sweep.largest < 100, "MiB of the scheduler: a huge file is not read"


@needs_root
def test_a_message_for_somebody_else_is_noticed(tmp_path: Path) -> None:
    sweep = FilesSweep(tmp_path, 5, lambda _: None, (queue_harms.sealed,))
    sweep.run(3)
    assert sum("not in corrupt" in fault for fault in sweep.faults) == 3
    assert sum(": delivered to {'w" in fault for fault in sweep.faults) == 3
