"""What the master asks of the machine."""

from __future__ import annotations

import os
import platform
import pwd
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtad import host
from mtad.config import Config
from mtad.errors import ConfigError, MtadError
from tests.procs import identity, needs_root, private_kib

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has such heaps")
NOBODY = pwd.getpwnam("nobody")


def _in_child(act: Callable[[], bool]) -> bool:
    """Whether ``act`` says so in a process of its own."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if act() else 2
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A directory that other users can get at."""
    with tempfile.TemporaryDirectory(prefix="mtad-test-") as root:
        os.chmod(root, 0o755)
        yield Path(root)


@needs_root
def test_account() -> None:
    assert host.account(Config("mx.example.org", user="nobody")) == NOBODY
    assert host.account(Config("mx.example.org", user="")) is None
    with pytest.raises(ConfigError, match="user: there is no user 'no-such-user' on this machine"):
        host.account(Config("mx.example.org", user="no-such-user"))


@needs_root
def test_only_root_becomes_somebody_else() -> None:
    def act() -> bool:
        os.setuid(NOBODY.pw_uid)
        return host.account(Config("mx.example.org", user="root")) is None

    assert _in_child(act)


@needs_root
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_directories_that_are_missing_are_made(open_root: Path, umask: int) -> None:
    """The last one belongs to the user alone; those above are passable, whatever the umask is."""
    path = open_root / "var" / "spool" / "mtad"
    before = os.umask(umask)
    try:
        host.make_directory(str(path), NOBODY)
    finally:
        os.umask(before)
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (NOBODY.pw_uid, 0o700)
    for parent in (path.parent, path.parent.parent):
        assert (parent.stat().st_uid, parent.stat().st_mode & 0o777) == (0, 0o755)
    os.chown(path, 0, 0)
    host.make_directory(str(path), NOBODY)
    assert path.stat().st_uid == 0, "one that exists is left as it is"


@needs_root
def test_privileges_are_dropped_for_good(open_root: Path) -> None:
    def act() -> bool:
        try:
            host.drop_privileges(NOBODY)
        except ConfigError:
            pass  # this Python is for root only; dropped they are all the same
        ids = identity(os.getpid())
        try:
            os.setuid(0)
        except PermissionError:
            return ids["Uid"] == {NOBODY.pw_uid} and ids["Gid"] == {NOBODY.pw_gid} and 0 not in ids["Groups"]
        return False

    assert _in_child(act)


def test_pid_file(tmp_path: Path) -> None:
    path = tmp_path / "run" / "mtad.pid"
    host.write_pid_file(str(path))
    path.write_text("a stale one, and longer than any number can be\n")
    before = os.umask(0o077)
    try:
        host.write_pid_file(str(path))
    finally:
        os.umask(before)
    assert path.read_text() == f"{os.getpid()}\n"
    assert path.stat().st_mode & 0o777 == 0o644


def test_descriptors() -> None:
    def act() -> bool:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        host.raise_descriptor_limit()
        return resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)

    assert _in_child(act)


def test_a_process_stays_on_one_processor() -> None:
    allowed = sorted(os.sched_getaffinity(0))

    def stays(number: int) -> int:
        os.sched_setaffinity(0, allowed)
        host.stay_on_processor(number)
        [processor] = os.sched_getaffinity(0)
        return processor

    assert _in_child(lambda: stays(0) == stays(len(allowed)) == allowed[0])
    assert _in_child(lambda: stays(-1) == allowed[-1])
    assert _in_child(lambda: {stays(number) for number in range(len(allowed))} == set(allowed))


_HEAPS = """
import ctypes, sys, threading
from mtad import host
if sys.argv[1] == "shared":
    host.share_one_heap()
together = threading.Barrier(8)
def work():
    kept = [bytes(1000) for _ in range(100)]
    together.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@needs_glibc
@pytest.mark.parametrize(("how", "heaps"), [("shared", {1}), ("", set(range(2, 100)))])
def test_all_threads_share_one_heap(how: str, heaps: set[int]) -> None:
    said = subprocess.run([sys.executable, "-c", _HEAPS, how], check=True, capture_output=True, timeout=30).stdout
    assert said.count(b"<heap nr=") in heaps


@needs_glibc
def test_memory_that_lies_between_what_is_in_use_is_given_back() -> None:
    def act() -> bool:
        pieces = [b"x" * (1000 + 99_000 * (number % 2)) for number in range(600)]
        del pieces[1::2]
        before = private_kib()
        host.give_back_memory()
        return before - private_kib() > 20_000

    assert _in_child(act)


def test_orphans_become_ours() -> None:
    """As a delivery process does whose scheduler was killed."""

    def act() -> bool:
        host.adopt_orphans()
        ready, tell = os.pipe()
        scheduler = os.fork()
        if scheduler == 0:
            orphan = os.fork()
            if orphan == 0:
                os.close(tell)
                os.read(ready, 1)  # until the pipe is closed
                os._exit(7)
            os._exit(0)
        os.waitpid(scheduler, 0)
        [orphan] = host.children()
        os.close(tell)
        return os.waitstatus_to_exitcode(os.waitpid(orphan, 0)[1]) == 7 and host.children() == []

    assert _in_child(act)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (FileNotFoundError(2, "No such file or directory", "/x"), "/x: No such file or directory"),
        (
            OSError(98, "cannot listen on 127.0.0.1:25: Address already in use"),
            "cannot listen on 127.0.0.1:25: Address already in use",
        ),
        (MtadError("as it is"), "as it is"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
    ],
)
def test_words(fault: Exception, words: str) -> None:
    assert host.words(fault) == words
