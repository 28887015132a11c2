"""Whether the machine went down: told by one file, without a flush for any message."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mtad.scheduler.lifemark import LATEST, LIFE_MARK, LifeMark, boot_id

SEEN = 1_700_000_000.0
NOW = SEEN + 3600


def mark(root: Path, boot: str = "one", *, flushed: bool = False) -> LifeMark:
    return LifeMark(str(root), boot, flushed=flushed)


def lived(root: Path, boot: str = "one", *, flushed: bool = False) -> LifeMark:
    """A scheduler that began, and gave its last sign of life at `SEEN`."""
    found = mark(root, boot, flushed=flushed)
    found.begin(SEEN)
    os.utime(root / LIFE_MARK, (SEEN, SEEN))
    return found


def test_the_first_one_knows_of_no_cut(tmp_path: Path) -> None:
    assert mark(tmp_path).begin(NOW) == 0


def test_a_machine_that_went_down_is_a_cut(tmp_path: Path) -> None:
    lived(tmp_path)
    assert mark(tmp_path, "two").begin(NOW) == SEEN + LATEST
    assert mark(tmp_path, "two").begin(NOW + 60) == SEEN + LATEST, "remembered, until the next one"
    os.utime(tmp_path / LIFE_MARK, (NOW, NOW))
    assert mark(tmp_path, "three").begin(NOW + 7200) == NOW + LATEST


def test_what_comes_after_the_start_was_not_there_before_the_cut(tmp_path: Path) -> None:
    lived(tmp_path)
    assert mark(tmp_path, "two").begin(SEEN + 20) == SEEN + 20


def test_a_kill_is_none_for_the_page_cache_has_all(tmp_path: Path) -> None:
    lived(tmp_path)
    assert mark(tmp_path).begin(NOW) == 0


def test_an_end_in_good_order_is_none(tmp_path: Path) -> None:
    lived(tmp_path).end()
    assert mark(tmp_path, "two").begin(NOW) == 0


def test_a_cut_is_remembered_over_an_end_in_good_order(tmp_path: Path) -> None:
    lived(tmp_path)
    second = mark(tmp_path, "two")
    second.begin(NOW)
    second.end()
    assert mark(tmp_path, "three").begin(NOW + 3600) == SEEN + LATEST


def test_where_doubts_are_flushed_the_queue_files_know_themselves(tmp_path: Path) -> None:
    lived(tmp_path, flushed=True)
    assert mark(tmp_path, "two").begin(NOW) == 0


@pytest.mark.parametrize(("before", "after"), [("", "two"), ("one", ""), ("", "")])
def test_without_a_boot_id_nothing_is_said(tmp_path: Path, before: str, after: str) -> None:
    lived(tmp_path, before)
    assert mark(tmp_path, after).begin(NOW) == 0


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"boot":1}', b"\0" * 60])
def test_a_mark_that_cannot_be_read_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / LIFE_MARK).write_bytes(data)
    assert mark(tmp_path).begin(NOW) == 0
    lived(tmp_path)
    assert mark(tmp_path, "two").begin(NOW) == SEEN + LATEST


def test_a_sign_of_life_sets_the_time_and_may_fail(tmp_path: Path) -> None:
    found = lived(tmp_path)
    found.alive()
    assert (tmp_path / LIFE_MARK).stat().st_mtime > SEEN
    (tmp_path / LIFE_MARK).unlink()
    found.alive()


def test_a_clock_that_is_behind_after_the_cut_makes_it_no_sooner(tmp_path: Path) -> None:
    lived(tmp_path)
    assert mark(tmp_path, "two").begin(SEEN - 1800) == SEEN + LATEST


def test_a_mark_that_could_not_be_written_is_written_later_and_the_cut_is_known_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lived(tmp_path)
    second = mark(tmp_path, "two")

    def refuse(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        with pytest.raises(OSError, match="No space left"):
            second.begin(NOW)
        assert second.cut == SEEN + LATEST
        second.alive()
    assert (tmp_path / LIFE_MARK).stat().st_mtime == SEEN, "the mark of the one before looks no younger"
    second.alive()
    os.utime(tmp_path / LIFE_MARK, (NOW, NOW))
    assert mark(tmp_path, "two").begin(NOW + 60) == SEEN + LATEST


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mark(tmp_path / "nowhere").begin(NOW)


def test_the_machine_has_a_boot_id_and_another_may_have_none(tmp_path: Path) -> None:
    assert len(boot_id()) == 36
    assert boot_id(str(tmp_path / "nothing")) == ""
    (tmp_path / "id").write_bytes(b"\xff")
    assert boot_id(str(tmp_path / "id")) == ""
