"""What was flushed is there after a power cut, or the flush fails; on real file systems."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mtad.stable import flush, flush_data
from tools.lib.crash_disks import Disk, Kind, lack


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_file_system_that_is_shut_down_never_says_that_it_has_flushed(kind: Kind, tmp_path: Path) -> None:
    if reason := lack(kind):
        pytest.skip(reason)
    with Disk(tmp_path, kind) as disk:
        disk.format()
        disk.mount()
        directory = os.open(disk.path, os.O_RDONLY | os.O_DIRECTORY)
        file = os.open(disk.path / "before", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            os.write(file, b"content")
            flush(file)
            flush_data(file)
            os.rename(disk.path / "before", disk.path / "after")
            disk.cut()
            if kind == "xfs":
                os.fsync(directory)  # it says that the rename is on the disk
            for flushed, fd in ((flush, directory), (flush, file), (flush_data, file)):
                with pytest.raises(OSError, match="Input/output error"):
                    flushed(fd)
        finally:
            os.close(file)
            os.close(directory)
        disk.unmount()
        disk.mount()
        assert not (disk.path / "after").exists()


def test_what_cannot_be_flushed_fails() -> None:
    reader, writer = os.pipe()
    try:
        for flushed in (flush, flush_data):
            with pytest.raises(OSError, match="Invalid argument"):
                flushed(writer)
    finally:
        os.close(reader)
        os.close(writer)
