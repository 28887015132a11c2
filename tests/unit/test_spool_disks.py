"""The spool on disks that are full, read-only, or lose their power. Needs root, for file systems of the tests' own."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from mtad.spool.leftovers import LEFTOVERS
from mtad.spool.queues import Queue, Spool
from tests.unit.spool_aid import CONTENT, envelope, needs_root, read

LARGE: Final = CONTENT * 5_000


class Mounted:
    """A small file system of its own."""

    def __init__(self, place: Path, *mount: str) -> None:
        self.place = place
        self._mount = [*mount, str(place)]
        self.mount()

    def mount(self) -> None:
        """Mount it, or skip the test."""
        self.place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *self._mount], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")

    def unmount(self) -> None:
        """Unmount it, also when a test that failed has files open there."""
        subprocess.run(["umount", "--lazy", str(self.place)], check=False)


@needs_root
def test_a_disk_that_is_full_or_read_only_fails_the_message_and_leaves_nothing(tmp_path: Path) -> None:
    disk = Mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=128k,nr_inodes=12", "tmpfs")
    try:
        spool = Spool(str(disk.place), create=True)
        before = {path.name for path in disk.place.rglob("*")}
        file = spool.enter(envelope())
        with pytest.raises(OSError, match="No space"):  # noqa: PT012
            file.write(LARGE)
            file.commit()
        assert {path.name for path in disk.place.rglob("*")} == before
        committed = []
        with pytest.raises(OSError, match="No space"):  # noqa: PT012
            for _ in range(20):  # until no inode is left
                file = spool.enter(envelope(spool.ids.new()))
                file.write(CONTENT)
                file.commit()
                committed.append(file.envelope.id)
        assert 0 < len(committed) < 12
        assert sorted(spool.names(Queue.INCOMING)) == committed
        assert all(read(disk.place / "incoming" / queue_id)[1] == CONTENT for queue_id in committed)
        subprocess.run(["mount", "-o", "remount,ro", str(disk.place)], check=True)
        file = spool.enter(envelope())
        with pytest.raises(OSError, match="Read-only"):
            file.commit()
        with pytest.raises(OSError, match="Read-only"):
            spool.claim(Queue.INCOMING, committed[0])
        assert spool.load(Queue.INCOMING, committed[0]).envelope.id == committed[0]
        spool.close()
    finally:
        disk.unmount()


@needs_root
def test_promise_1_what_was_acknowledged_survives_a_power_cut(tmp_path: Path) -> None:
    # ext4 is told to stop without writing its journal: what was not synced before is gone, as after a power cut.
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 * 2**20)
    try:
        made = subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("mkfs.ext4 is not installed")
    if made.returncode:
        pytest.skip(f"cannot make a file system: {made.stderr.strip()}")
    disk = Mounted(tmp_path / "disk", "-o", "loop", str(image))
    try:
        spool = Spool(str(disk.place / "spool"), create=True)
        committed = {}
        for content in (CONTENT, LARGE, b""):
            incoming = spool.enter(envelope(spool.ids.new()))
            incoming.write(content)
            incoming.commit()
            committed[incoming.envelope.id] = content
        half = spool.enter(envelope(spool.ids.new()))
        half.write(LARGE)
        never = Path(disk.place, "spool", "incoming", "control")
        never.write_bytes(CONTENT)
        assert len(list(spool.names(Queue.INCOMING))) == 5
        fd = os.open(disk.place, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, 0x8004587D, (2).to_bytes(4, sys.byteorder))  # EXT4_IOC_SHUTDOWN, without a log flush
        except OSError as fault:
            pytest.skip(f"this ext4 cannot be shut down: {fault}")
        finally:
            os.close(fd)
        with pytest.raises(OSError, match=r"."):
            half.commit()
        LEFTOVERS.abandon()  # the process is gone with the power
        spool.close()
        subprocess.run(["umount", str(disk.place)], check=True)
        disk.mount()
        spool = Spool(str(disk.place / "spool"))
        assert not never.exists()  # the power was really cut
        for name in spool.names(Queue.INCOMING):
            if name not in committed:
                assert spool.sweep(name)
        assert {
            name: read(disk.place / "spool" / "incoming" / name)[1] for name in spool.names(Queue.INCOMING)
        } == committed
        spool.close()
    finally:
        disk.unmount()
