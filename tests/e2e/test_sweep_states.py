"""Crash states of a recorded disk: the short form of `tools/crashtest states`, and its control."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tools.lib.crash_blocks import Recorded, Replay, lack
from tools.lib.sweep_power import libeatmydata
from tools.lib.sweep_states import mounted, play

needs_nbd = pytest.mark.skipif(bool(lack()), reason=lack() or "-")


@needs_nbd
def test_no_state_of_the_disk_has_lost_or_torn_a_message(tmp_path: Path) -> None:
    figures, faults = play(tmp_path, "5", 12, started=4, seconds=0.7)
    assert not faults
    assert (figures["states"], figures["started"]) == (12, 3)
    assert int(figures["acknowledged"]) > 20
    assert int(figures["flushes"]) > 20


@needs_nbd
def test_without_a_flush_the_states_have_lost_mail(tmp_path: Path) -> None:
    library = libeatmydata()
    if library is None:
        pytest.skip("libeatmydata is not installed")
    figures, faults = play(tmp_path, "5", 3, preload=str(library), started=9, seconds=0.5)
    assert int(figures["lost"]) > 20
    assert faults


@needs_nbd
def test_a_superblock_that_is_torn_is_mended_as_at_a_boot(tmp_path: Path) -> None:
    disk = Recorded(tmp_path)
    with disk:
        (disk.path / "file").write_text("here")
    state = bytearray((tmp_path / "image").read_bytes())
    for torn in (False, True):
        state[1024 + 1020] ^= torn  # in its checksum
        with mounted(state, tmp_path / "state", disk.path) as mended:
            assert mended is torn
            assert (disk.path / "file").read_text() == "here"


def test_a_state_has_what_was_flushed_and_any_part_of_the_rest(tmp_path: Path) -> None:
    disk = Recorded(tmp_path)
    with disk.base.open("wb") as file:
        file.truncate(32 * 1024)
    log = bytearray()
    for content in (b"a", b"b", b"", b"c", b"", b"d"):  # "" is a flush; each write is of two sectors, at a place of its own
        offset = ord(content or b"a") % 16 * 4096
        log += struct.pack("<cQI", b"W" if content else b"F", offset, 1024 * len(content)) + content * 1024
    disk.log.write_bytes(log)

    def sectors(state: bytearray) -> str:
        return "".join(
            chr(state[at]) if state[at] else "-" for place in range(1, 5) for at in (place * 4096, place * 4096 + 512)
        )

    found: dict[int, set[str]] = {}
    for seed in range(1000):
        replay = Replay(disk)
        chance = random.Random(seed)
        for number in (1, 2, 3, 4, 5, 6):
            found.setdefault(number, set()).add(sectors(replay.state(number, chance)))
    torn = {"--", "a-", "-a", "aa"}
    assert found[1] == {f"{part}------" for part in torn}
    assert found[2] == {f"{one}{other.replace('a', 'b')}----" for one in torn for other in torn}
    assert found[3] == {"aabb----"}
    assert found[4] == {f"aabb{part.replace('a', 'c')}--" for part in torn}
    assert found[5] == {"aabbcc--"}
    assert found[6] == {f"aabbcc{part.replace('a', 'd')}" for part in torn}
    assert [replay.position(number) for number in range(7)] == [0, 1037, 2074, 2087, 3124, 3137, len(log)]
