"""Faults at a system call of a running process, by number: what `tools.lib.tracer` does, for a test.

    with Injection(pid, 17, "kill") as injection:
        ...
        if injection.hit:
            print(injection.hit.call, injection.hit.where)

Errors: `Unavailable`: this machine does not let us. Leaving the context ends the tracer, whatever state it is in; the
process goes on by itself.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from tools.lib.sweeps import Unavailable

_TRACER: Final = Path(__file__).with_name("tracer.py")
_REASONS: Final = {3: "ptrace(2) is not allowed here", 4: "the tracer knows the registers of x86-64 only"}
#: Seconds for a tracer to begin, and to end.
_PATIENCE: Final = 20.0


class Call(msgspec.Struct, frozen=True):
    """A call that was counted: its number from 1, its name, and the file that it is about, or ""."""

    number: int
    call: str
    where: str


class Injection:
    """One tracer at work on one process; a context manager."""

    def __init__(self, pid: int, number: int, action: str, more: Sequence[str] = ()) -> None:
        """See `tools.lib.tracer`; ``number`` 0 only looks on.

        Raises:
            Unavailable: this machine does not let us, or the process is gone.
        """
        command = [sys.executable, "-I", str(_TRACER), str(pid), str(number), action]
        if more:
            command.append(",".join(more))
        self.calls: list[Call] = []
        """Those that were counted; the last is the one that was hit, if any."""
        self.hit: Call | None = None
        self.hit_at = 0.0
        """When, in seconds of the monotonic clock."""
        self._event = threading.Event()
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            _, fault = self._process.communicate(timeout=_PATIENCE)
            reason = _REASONS.get(self._process.returncode, "the tracer did not start")
            raise Unavailable(f"{reason}: {fault.decode().strip()}")
        self._reader = threading.Thread(target=self._read, name="injection", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def wait(self, timeout: float) -> bool:
        """Wait until it has hit, that many seconds at most; whether it has."""
        return self._event.wait(timeout)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(_PATIENCE)
        self._reader.join(_PATIENCE)
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, number, call, where = line.decode().rstrip("\n").split(" ", 3)
            self.calls.append(Call(int(number), call, where))
            if word == "hit":
                self.hit_at = time.monotonic()
                self.hit = self.calls[-1]
                self._event.set()
