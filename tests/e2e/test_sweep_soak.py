"""The sweep ``soak`` in its short form, that it would notice a server that fails, and the rules by which it judges."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.lib.crash_disks import lack
from tools.lib.crash_verdict import Copy, Sent
from tools.lib.soak_books import Books
from tools.lib.soak_queue import GRACE, corrupt, left, set_aside
from tools.lib.soak_schedule import ENDS_ALL, ENDS_NONE, ENDS_SOME, ERA, KINDS, SPAN, Harm, schedule
from tools.lib.soak_stage import Stage
from tools.lib.soak_vitals import ENOUGH, WARM, Vital, growth, slope
from tools.lib.sweep_power import libeatmydata
from tools.lib.sweep_soak import SoakSweep
from tools.lib.wrong_clock import Clock, reader

needs_disks = pytest.mark.skipif(bool(lack()), reason=lack() or "-")


def played(*kinds: str) -> list[Harm]:
    """One of each, one after the other."""
    return [Harm(kind, 0.3 + 0.4 * index, 0.2, 7 + index) for index, kind in enumerate(kinds)]


@needs_disks
def test_seeds_of_everything(tmp_path: Path) -> None:
    seeds = {
        3: played("exchanger fails", "disk full", "rude clients", "harmed files", "clock set"),
        4: played("listener killed", "clock set", "delivery killed", "power cut", "scheduler killed"),
        5: played("processes short", "line loses", "memory short"),
    }
    sweep = SoakSweep(tmp_path, lambda _: None, make=seeds.__getitem__)
    sweep.run(3, 3)
    assert sweep.faults == []
    assert sweep.acknowledged > 20
    assert sum(sweep.done.values()) >= 12 - len(sweep.lacks), sweep.undone  # of 13, one of which may find nobody
    [account] = sweep.accounts
    assert account.messages + 20 > sweep.acknowledged


@needs_disks
def test_a_server_that_flushes_nothing_is_noticed(tmp_path: Path) -> None:
    library = libeatmydata()
    if library is None:
        pytest.skip("libeatmydata is not installed")
    sweep = SoakSweep(tmp_path, lambda _: None, preload=str(library), make=lambda _: played("power cut"))
    sweep.run(5, 1)
    assert sweep.accounts[0].lost > 0
    assert any(fault.startswith("seeds 5 to 5: lost: ") for fault in sweep.faults)


@needs_disks
def test_what_is_late_or_in_corrupt_without_a_reason_is_noticed(tmp_path: Path) -> None:
    with Stage(tmp_path) as stage:
        queue_id = stage.site.send("sender0@example.org", "stay-1-1@moody.test", b"X-Crash-Id: 1-1\r\n\r\nx\r\n", "relay")
        stage.site.await_deferred(queue_id)
        assert left(stage, harmed=True) == []
        with stage.paused():
            path = stage.site.spool_path / "deferred" / queue_id
            os.utime(path, (0, time.time() - 2 * GRACE))
            assert left(stage, harmed=True)[0].startswith(f"deferred/{queue_id} was due ")
            stage.harmed[path.lstat().st_ino] = queue_id
            assert left(stage, harmed=True) == [f"deferred/{queue_id} is harmed"]
            with set_aside(stage):
                assert not path.exists()
            assert path.exists()
            assert corrupt(stage, last=True) == [f"harmed, and not in corrupt/: {queue_id!r}"]
            stage.harmed.clear()
            stage.tempers.released = frozenset({"1-1"})
            assert any(f"deferred/{queue_id} for stay-1-1@moody.test: " in text for text in left(stage, harmed=False))
            os.rename(path, stage.site.spool_path / "corrupt" / queue_id)
            assert corrupt(stage, last=True) == [f"in corrupt/, and nobody put it there: {queue_id!r}"]
            assert corrupt(stage, last=True) == []


def test_a_clock_is_wrong_by_what_its_file_says(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    off = reader(str(clock.path))
    assert off() == 0.0
    clock.set_by(3600.0)
    clock.set_by(-20.0)
    assert off() == 3580.0
    assert abs(clock.now() - time.time() - 3580) < 5
    program = tmp_path / "program"
    program.write_text(
        "import time as t\nprint(t.time() - t.clock_gettime(t.CLOCK_REALTIME), t.time_ns() // 10**9 - int(t.time()))"
    )
    says = subprocess.run([*clock.prefix(), str(program)], capture_output=True, text=True, check=True, timeout=20).stdout
    wrong, between = says.split()
    assert abs(float(wrong) - 3580) < 1
    assert abs(int(between)) <= 1


def test_a_schedule_follows_from_its_seed_and_its_era() -> None:
    assert schedule(7) == schedule(7) != schedule(8)
    kinds = [{harm.kind for seed in range(era * ERA, (era + 1) * ERA) for harm in schedule(seed)} for era in range(6)]
    assert kinds[0] | kinds[3] == set(KINDS)
    assert kinds[1] | kinds[4] == {*ENDS_SOME, *ENDS_NONE}
    assert kinds[2] | kinds[5] == set(ENDS_NONE)
    assert not set(ENDS_ALL) & (kinds[1] | kinds[2])
    for seed in range(ERA):
        times = [harm.at for harm in schedule(seed)]
        assert times == sorted(times)
        assert 1 <= len(times) <= 5
        assert times[-1] <= SPAN


def looks(*kib: int, descriptors: int = 20) -> list[Vital]:
    """So many looks at a process that is warm after the first."""
    return [Vital(20_000, descriptors)] * WARM + [Vital(one, descriptors) for one in kib]


@pytest.mark.parametrize(
    "vitals",
    [
        looks(26_000, 26_100, 26_000, 26_100, 26_050),
        looks(26_000, 29_000, 26_000, 29_000, 26_100),
        looks(20_000, 40_000),
        looks(26_000, *[29_000] * 8),
        [Vital(26_000, count) for count in (20, 24, 25, 22, 25, 23, 24, 25)],
    ],
    ids=["flat", "up and down", "too short", "a step", "connections come and go"],
)
def test_what_does_not_grow(vitals: list[Vital]) -> None:
    assert growth(vitals) == ""


def test_what_grows_is_noticed() -> None:
    assert "KiB grow" in growth(looks(*range(26_000, 29_000, 250)))
    assert "descriptors grow" in growth([Vital(26_000, count) for count in range(20, 30)])
    assert growth(looks(*[26_000 + 3000 * step for step in range(ENOUGH)])) != ""
    assert slope([1, 2, 3, 4]) == 1
    assert slope([5, 5, 9, 5, 5]) == 0


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    """An empty ledger."""
    books = Books(tmp_path / "ledger")
    yield books
    books.close()


_SENT = Sent("1-1", "s@x", ("a", "stay"), "d", "Q1")
_TAKEN = Copy("1-1", "a", "exchanger", "d", "Q1")
_WAITS = Copy("1-1", "stay", "queue", "d", "Q1")
_UNNOTED = "mtad/smtp[7]: Q1: warning: cannot be noted in the queue file: [Errno 28] No space left on device\n"
_DOUBT = "mtad/qmgr[7]: Q1: warning: in doubt: it may have reached <a> before\n"


def test_what_is_in_the_queue_is_remembered_and_what_is_done_is_not(books: Books) -> None:
    books.note(_SENT)
    books.note(Sent("1-2", "s@x", ("a",), "e", "Q2"))
    account, queued = books.settle([_TAKEN, _WAITS, Copy("1-2", "a", "maildir", "e", "Q2")], "", ())
    assert (account.messages, account.faults, queued) == (1, (), frozenset({"1-1"}))
    assert [message.id for message in books.messages()] == ["1-1"]
    assert books.total() == 2
    account, queued = books.settle([Copy("1-1", "stay", "exchanger", "d", "Q1")], "", ())
    assert (account.messages, account.faults, queued) == (1, (), frozenset())
    account, _ = books.settle([Copy("1-2", "a", "maildir", "e", "Q2")], "", ())
    assert account.faults == ("torn: 1-2 Q2 for a in maildir: nobody sent that",)


def test_a_copy_too_many_needs_a_word(books: Books) -> None:
    books.died()
    books.note(_SENT)
    account, _ = books.settle([_TAKEN, _WAITS], _DOUBT, ())
    assert (account.in_doubt, account.refused, account.faults) == (0, 0, ())
    account, _ = books.settle([_TAKEN, _WAITS], "", ())  # once more, as the log had said
    assert (account.in_doubt, account.refused, account.faults) == (1, 0, ())
    account, _ = books.settle([_TAKEN, _WAITS], "", ())
    assert account.faults == ("twice without a word: 1-1 Q1 for a: exchanger exchanger exchanger",)


def test_what_was_not_noted_excuses_a_copy_only_together_with_a_death_after_it_was_sent(books: Books) -> None:
    books.died()
    books.note(_SENT)
    account, _ = books.settle([_TAKEN, _WAITS], _UNNOTED, ())
    assert account.faults == ()
    account, _ = books.settle([_TAKEN, _WAITS], "", ())
    assert account.faults == ("twice without a word: 1-1 Q1 for a: exchanger exchanger",)
    books.died()
    account, _ = books.settle([_WAITS], "", ())
    assert (account.in_doubt, account.refused, account.faults) == (0, 1, ())
    books.died()
    account, _ = books.settle([_TAKEN, _WAITS], "", ())
    assert len(account.faults) == 1, "one word, one copy"


def test_a_power_cut_excuses_one_copy_of_what_was_there_before(books: Books) -> None:
    books.cut()
    books.note(_SENT)
    account, _ = books.settle([_TAKEN, _TAKEN, _WAITS], "", ())
    assert len(account.faults) == 1
    books.cut()
    account, _ = books.settle([_WAITS], "", ())
    assert (account.refused, account.faults) == (1, ())


def test_what_is_lost_or_stuck_is_a_fault(books: Books) -> None:
    books.note(_SENT)
    account, _ = books.settle([_WAITS], "", ("deferred/Q1 was due",))
    assert account.faults == ("lost: 1-1 Q1 for a", "stuck: deferred/Q1 was due")
    assert account.lost == 1
