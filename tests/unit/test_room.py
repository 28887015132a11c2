"""Whether there is room for a session more: descriptors, and memory as the kernel tells it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mtad.listener.room import RESERVE, Reserve, Room

MIB = 1 << 20
FULL = "too little memory"


class Machine:
    """What the kernel says, in files."""

    def __init__(self, root: Path, groups: str = "", available: int = 1000 * MIB) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 2048000 kB\nMemAvailable:  {available // 1024} kB\n")
        self.write("proc/self/cgroup", groups)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def v2(self, group: str, most: int | None, use: int, files: int = 0) -> None:
        where = f"sys/fs/cgroup/{group}"
        self.write(f"{where}/memory.max", f"{most}\n" if most is not None else "max\n")
        self.write(f"{where}/memory.current", f"{use}\n")
        self.write(f"{where}/memory.stat", f"anon {use}\ninactive_file {files // 2}\nactive_file {files - files // 2}\n")

    def v1(self, group: str, most: int, use: int, files: int = 0) -> None:
        where = f"sys/fs/cgroup/memory/{group}"
        self.write(f"{where}/memory.limit_in_bytes", f"{most}\n")
        self.write(f"{where}/memory.usage_in_bytes", f"{use}\n")
        self.write(
            f"{where}/memory.stat", f"inactive_file 1\nactive_file 1\ntotal_inactive_file {files}\ntotal_active_file 0\n"
        )

    def lack(self, sessions: int = 0) -> str:
        return Room(self.root).lack(sessions, 0.0)


def test_this_machine_has_room() -> None:
    assert Room().lack(5, 0.0) == ""


def test_where_the_kernel_says_nothing_there_is_room(tmp_path: Path) -> None:
    assert Room(tmp_path).lack(5, 0.0) == ""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("nonsense")
    assert Room(tmp_path).lack(5, 0.0) == ""


def test_who_comes_to_a_thread_that_there_is_needs_no_more_memory(tmp_path: Path) -> None:
    room = Room(Machine(tmp_path, available=RESERVE - 1024).root)
    assert room.lack(0, 0.0, inherits=True) == ""
    assert room.lack(0, 0.0) == FULL


def test_a_machine_without_memory(tmp_path: Path) -> None:
    assert Machine(tmp_path, available=RESERVE).lack() == ""
    assert Machine(tmp_path, available=RESERVE - 1024).lack() == FULL
    assert Machine(tmp_path, available=RESERVE).lack(1) == FULL, "each session may grow"


@pytest.mark.parametrize(
    ("most", "use", "files", "lack"),
    [
        (None, 10**12, 0, ""),
        (512 * MIB, 400 * MIB, 0, ""),
        (512 * MIB, 500 * MIB, 0, FULL),
        (512 * MIB, 512 * MIB, 100 * MIB, ""),
        (64 * MIB, 55 * MIB, 0, ""),
        (64 * MIB, 57 * MIB, 0, FULL),
    ],
)
def test_a_control_group(tmp_path: Path, most: int | None, use: int, files: int, lack: str) -> None:
    """Of version 2; files in memory do not count, and a small group is not refused altogether."""
    machine = Machine(tmp_path, "0::/system.slice/mtad.service\n")
    machine.v2("system.slice/mtad.service", most, use, files)
    assert machine.lack() == lack


def test_a_limit_of_a_group_above_counts_too(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/a.slice/b.slice/c.service\n")
    machine.v2("a.slice/b.slice/c.service", None, 50 * MIB)
    machine.v2("a.slice", 512 * MIB, 511 * MIB)
    assert machine.lack() == FULL


def test_a_control_group_of_version_1(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "5:cpu:/\n4:memory:/mtad\n0::/\n")
    machine.v1("mtad", 512 * MIB, 511 * MIB, files=100 * MIB)
    assert machine.lack() == ""
    machine.v1("mtad", 512 * MIB, 511 * MIB)
    assert machine.lack() == FULL
    machine.v1("mtad", 0x7FFFFFFFFFFFF000, 511 * MIB)
    assert machine.lack() == "", "which is how that version says that there is no limit"


def test_memory_is_looked_at_again_after_a_while_and_after_some_sessions(tmp_path: Path) -> None:
    Machine(tmp_path)
    room = Room(tmp_path)
    assert room.lack(0, 100.0) == ""
    Machine(tmp_path, available=0)
    assert room.lack(1, 100.1) == "", "not each time"
    assert room.lack(2, 100.3) == FULL
    Machine(tmp_path)
    answers = [room.lack(3, 100.3) for _ in range(100)]
    assert answers[0] == FULL
    assert answers[-1] == ""


def test_two_descriptors_for_each_session() -> None:
    """In a process of its own, whose limit can be made small."""
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "from mtad.listener.room import Room\n"
        "room = Room(); print([n for n in range(100) if room.lack(n, 0.0)][0], room.lack(99, 0.0))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5)); print(repr(Room().lack(0, 0.0)), repr(Room().lack(1, 0.0)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    first, last = result.stdout.splitlines()
    number, _, why = first.partition(" ")
    assert 40 <= int(number) <= 45
    assert why == "too few descriptors"
    assert last == "'' 'too few descriptors'", "one at least"


def test_the_reserve_is_one_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    reserve = Reserve()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert reserve.restore(), "it is there"
    assert reserve.give_up()
    assert not reserve.give_up(), "only once"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        assert not reserve.restore()
        assert not Reserve().give_up()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert reserve.restore()
    assert reserve.give_up()
