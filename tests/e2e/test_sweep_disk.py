"""The sweep ``disk`` in its short form, and that it would notice a server whose disk never says no."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.procs import needs_root
from tests.site import Site
from tools.lib import small_disk
from tools.lib.small_disk import SmallDisk
from tools.lib.sweep_disk import TROUBLES, DiskSweep
from tools.lib.sweeps import Unavailable

EATMYDATA = Path("/usr/lib/x86_64-linux-gnu/libeatmydata.so")


def sweep(tmp_path: Path, *rounds: str, preload: str = "") -> DiskSweep:
    """Run it, or skip the test."""
    sweep = DiskSweep(tmp_path, 5, rounds, lambda _: None, hang=1.0, lasts=0.3, preload=preload)
    try:
        sweep.run()
    except Unavailable as lack:
        pytest.skip(str(lack))
    return sweep


@contextmanager
def disk_or_skip(root: Path) -> Iterator[SmallDisk]:
    try:
        with SmallDisk(root / "image", root / "disk") as disk:
            yield disk
    except Unavailable as lack:
        pytest.skip(str(lack))


@needs_root
@pytest.mark.parametrize("rounds", [list(TROUBLES)[:3], list(TROUBLES)[3:]], ids=", ".join)
def test_a_disk_in_trouble(tmp_path: Path, rounds: list[str]) -> None:
    done = sweep(tmp_path, *rounds)
    assert done.faults == []
    assert done.verdict is not None
    assert done.verdict.messages >= 15
    for name, tally in done.tallies.items():
        assert tally.codes[452] + tally.codes[451] + tally.codes[250] > 0, name
        assert name in ("hung", "inodes gone") or tally.codes[452] + tally.codes[451] >= 10, name


@needs_root
def test_a_scheduler_that_starts_on_a_read_only_disk_waits_for_it(tmp_path: Path) -> None:
    with disk_or_skip(tmp_path) as disk:
        site = Site(tmp_path / "site", top={"spool": str(disk.place / "spool")})
        site.spool_path = disk.place / "spool"
        with site:
            with disk.read_only():
                os.kill(site.pids("scheduler")[0], signal.SIGKILL)
                site.await_log(r"waiting for the spool's lock: Read-only file system")
            site.send("a@sender.test", "alice@example.org", "Subject: x\r\n\r\nhello\r\n")
            site.await_mail("alice")
            assert "panic" not in site.log()


@needs_root
@pytest.mark.skipif(not EATMYDATA.exists(), reason="libeatmydata is not installed")
def test_a_server_that_flushes_nothing_is_noticed(tmp_path: Path) -> None:
    """With libeatmydata no fsync reaches the disk, and so none fails: a 250 is said that nothing stands behind."""
    assert any(
        fault.startswith("fsync fails: 250 ") for fault in sweep(tmp_path, "fsync fails", preload=str(EATMYDATA)).faults
    )


@pytest.mark.parametrize("says", ["", "echo strace: Process 1 attached >&2"], ids=["attaching", "letting go"])
def test_a_tracer_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """As strace does when a thread comes to its end while it is attached to, or let go."""
    program = tmp_path / "strace"
    program.write_text(f"#!/bin/sh\ntrap '' TERM\n{says}\nwhile :; do read -r _ <>{tmp_path}/pipe; done\n")
    program.chmod(0o755)
    os.mkfifo(tmp_path / "pipe")  # nobody writes
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(small_disk, "_ATTACH", 0.2)
    with nullcontext() if says else pytest.raises(Unavailable), small_disk.failing([1], "fsync:error=EIO"):
        pass
