"""Queue ids: promise 9 of the spool, unique across processes and threads, and sorted by arrival."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.spool.queue_id import QueueIds, encode, is_queue_id

ALPHABET: Final = "0123456789BCDFGHJKLMNPQRSTVWXYZbcdfghjklmnpqrstvwxyz"

_times = st.integers(0, 10**16)
_processes = st.integers(1, 2**22)


def _arrival(queue_id: str) -> int:
    """Microseconds since the epoch, decoded as Postfix's own tools do it."""

    def number(digits: str) -> int:
        value = 0
        for digit in digits:
            value = value * 52 + ALPHABET.index(digit)
        return value

    return number(queue_id[:6]) * 1_000_000 + number(queue_id[6:10])


@given(_times, _processes)
def test_an_id_tells_its_arrival(microseconds: int, process: int) -> None:
    queue_id = encode(microseconds, process)
    assert _arrival(queue_id) == microseconds
    assert queue_id[10] == "z"
    assert is_queue_id(queue_id)
    assert len(queue_id) <= 15


@given(_times, _processes, _times, _processes)
def test_promise_9_ids_sort_by_arrival_and_differ_by_process(a: int, p: int, b: int, q: int) -> None:
    if a != b:
        assert (encode(a, p) < encode(b, q)) == (a < b)
    assert (encode(a, p) == encode(a, q)) == (p == q)


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", ".gitkeep", "4SVLC0zzz", "4SVLC1b9J2z", "4SVLC1b9J2z2N7.1", "4SVLC1b9J2z2N7\n", "../C1b9J2z2N7"],
)
def test_the_names_of_other_files_are_no_ids(text: str) -> None:
    assert not is_queue_id(text)


@pytest.mark.parametrize(
    "text", ["4SVLC1b9J2z2N7z", "4SVLC1b9J2a2N7", "4SVLC1b9J2z222222222", "4SVLC1b9J\0z2", "4SVLC1b9J٣z2", "x" * 14]
)
def test_what_looks_nearly_like_an_id_is_none(text: str) -> None:
    assert not is_queue_id(text)


@given(st.from_regex(r"[0-9A-Za-z./\x00-\x20]{10}z[0-9A-Za-z./]{1,9}"))
def test_an_id_is_safe_as_a_file_name(text: str) -> None:
    if is_queue_id(text):
        assert text.isascii()
        assert text.isalnum()


def test_promise_9_ids_of_many_threads_are_unique_and_sorted() -> None:
    ids = QueueIds()
    made: list[list[str]] = [[] for _ in range(8)]

    def make(mine: list[str]) -> None:
        mine.extend(ids.new() for _ in range(2_000))

    threads = [threading.Thread(target=make, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in made)
    assert len({queue_id for mine in made for queue_id in mine}) == 8 * 2_000


def test_promise_9_ids_of_two_processes_are_unique_and_sorted() -> None:
    code = "from mtad.spool.queue_id import QueueIds; ids = QueueIds(); print(*[ids.new() for _ in range(20_000)])"
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)
    ]
    made = [process.communicate()[0].split() for process in processes]
    assert all(mine == sorted(mine) and len(mine) == 20_000 for mine in made)
    assert len({queue_id for mine in made for queue_id in mine}) == 40_000


def test_promise_9_a_clock_that_is_set_back_repeats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = QueueIds()
    now = time.time_ns()
    before = [ids.new() for _ in range(100)]
    monkeypatch.setattr("mtad.spool.queue_id.time.time_ns", lambda: now - 3600 * 10**9)
    after = [ids.new() for _ in range(100)]
    monkeypatch.undo()
    later = [ids.new()]
    assert sorted({*before, *after, *later}) == before + after + later


def test_a_fork_while_another_thread_makes_an_id_leaves_the_child_able_to() -> None:
    ids = QueueIds()
    mine = ids.new()
    reader, writer = os.pipe()
    with ids._lock:  # as a thread would hold it that the child does not have
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # should it hang after all
            os.write(writer, ids.new().encode())
            os._exit(0)
    os.close(writer)
    theirs = os.read(reader, 100).decode()
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    assert is_queue_id(theirs)
    assert theirs[11:] != mine[11:]


def test_an_id_is_made_of_the_present_time() -> None:
    before = time.time_ns() // 1000
    made = _arrival(QueueIds().new())
    assert before <= made <= time.time_ns() // 1000
