"""The tracer of the sweeps `calls` and `errors`: it counts over all threads, and hits the call it was told to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.tracing import needs_tracing
from tools.lib.injection import Injection
from tools.lib.sweeps import Unavailable

pytestmark = needs_tracing

#: Three threads, one after the other, write a line each; then a flush and a rename. What went wrong is said.
_VICTIM = """
import os, sys, threading
sys.stdin.readline()
os.chdir(sys.argv[1])

def say(text):
    os.write(1, (text + chr(10)).encode())

try:
    fd = os.open("old", os.O_CREAT | os.O_WRONLY)
    os.close(os.open("old", os.O_RDONLY))
    for number in range(3):
        thread = threading.Thread(target=lambda: say(f"wrote {os.write(fd, b'0123456789')}"))
        thread.start()
        thread.join()
    os.fsync(fd)
    os.rename("old", "new")
except OSError as fault:
    say(fault.strerror)
say("end")
"""
#: Its calls; what goes to standard output is counted, too.
_CALLS = ["openat", "write", "write", "write", "write", "write", "write", "fsync", "rename", "write"]


@contextmanager
def victim(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", _VICTIM, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run(directory: Path, number: int, action: str) -> tuple[Injection, int, list[str]]:
    """The injection, the exit code, and what the victim said."""
    with victim(directory) as process, Injection(process.pid, number, action) as injection:
        said, _ = process.communicate(b"\n", 20)
        if number:
            assert injection.wait(20)
        return injection, process.returncode, said.decode().splitlines()


def test_calls_of_all_threads_are_counted_in_their_order(tmp_path: Path) -> None:
    injection, code, said = run(tmp_path, 0, "kill")
    assert code == 0
    assert said == ["wrote 10"] * 3 + ["end"]
    assert injection.hit is None
    assert [call.call for call in injection.calls] == _CALLS
    assert [call.number for call in injection.calls] == list(range(1, len(_CALLS) + 1))
    assert injection.calls[0].where == injection.calls[1].where == str(tmp_path / "old")


@pytest.mark.parametrize(("number", "octets"), [(1, None), (2, 0), (4, 10), (6, 20), (7, 30)])
def test_a_kill_comes_before_the_call(tmp_path: Path, number: int, octets: int | None) -> None:
    injection, code, _ = run(tmp_path, number, "kill")
    assert code == -9
    assert injection.hit is not None
    assert (injection.hit.number, injection.hit.call) == (number, _CALLS[number - 1])
    old = tmp_path / "old"
    assert (old.stat().st_size if old.exists() else None) == octets


def test_a_call_that_fails_is_not_made(tmp_path: Path) -> None:
    _, code, said = run(tmp_path, 9, "ENOSPC")
    assert code == 0
    assert said == ["wrote 10"] * 3 + ["No space left on device", "end"]
    assert (tmp_path / "old").stat().st_size == 30
    assert not (tmp_path / "new").exists()


def test_a_short_write_writes_what_it_says(tmp_path: Path) -> None:
    _, code, said = run(tmp_path, 4, "short")
    assert code == 0
    assert said == ["wrote 10", "wrote 5", "wrote 10", "end"]
    assert (tmp_path / "new").read_bytes() == b"0123456789012340123456789"


def test_what_is_no_longer_traced_goes_on(tmp_path: Path) -> None:
    with victim(tmp_path) as process:
        Injection(process.pid, 1, "kill").close()
        said, _ = process.communicate(b"\n", 20)
        assert process.returncode == 0
        assert said.endswith(b"end\n")


def test_a_process_that_is_gone_cannot_be_traced() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(20)
    with pytest.raises(Unavailable, match=str(process.pid)):
        Injection(process.pid, 1, "kill")
