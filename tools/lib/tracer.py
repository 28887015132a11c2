"""A ptrace(2) program that makes the Nth durable system call of a process fail, or kills the process just before it.

    python -I tracer.py PID NUMBER kill|short|EIO|… [CALL,CALL…]

Calls are counted over all threads of the process, from the moment when ``ready`` was printed, and only those that could
change what is on a disk: a write, a rename, a flush, an openat that creates. strace(1) counts each call of each thread for
itself, and cannot tell an openat that creates from another; so every call of a process with several threads can be hit by
this program and not by that one. NUMBER 0 hits nothing. Further CALLs are counted in addition.

Lines on standard output: ``ready``, then ``call`` and its number, name and file for each that was counted, and at the end
``hit`` with the same. It ends when it has hit, when the process is gone, or at a SIGTERM; the process then goes on without
it. ``kill``: the process dies before the call is made. ``short``: a write gets half of its octets, and says so. An error:
the call is not made.

Errors: exit code 3, there is no such process, or the kernel does not let us; 4, not a machine whose registers are known.
See also: `tools.lib.injection`, which starts it. Uses the standard library alone, so that it starts quickly.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Final

_PEEKUSER, _POKEUSER, _DETACH, _SYSCALL = 3, 6, 17, 24
_SEIZE, _INTERRUPT, _LISTEN, _SYSCALL_INFO = 0x4206, 0x4207, 0x4208, 0x420E
#: PTRACE_O_TRACESYSGOOD, PTRACE_O_TRACECLONE and PTRACE_O_TRACEEXEC.
_OPTIONS: Final = 0x01 | 0x08 | 0x10
_EVENT_STOP: Final = 128
_WALL: Final = 0x40000000
_ENTRY: Final = 1
# Offsets in struct user of x86-64: result, third argument, number of the call.
_RAX, _RDX, _ORIG_RAX = 80, 96, 120

#: The calls that count, by their number on x86-64, with the place of a directory descriptor and of a name in the arguments.
DURABLE: Final[dict[int, tuple[str, int, int]]] = {
    1: ("write", 0, -1),
    18: ("pwrite64", 0, -1),
    20: ("writev", 0, -1),
    74: ("fsync", 0, -1),
    75: ("fdatasync", 0, -1),
    77: ("ftruncate", 0, -1),
    82: ("rename", -1, 0),
    83: ("mkdir", -1, 0),
    86: ("link", -1, 0),
    87: ("unlink", -1, 0),
    90: ("chmod", -1, 0),
    91: ("fchmod", 0, -1),
    257: ("openat", 0, 1),
    258: ("mkdirat", 0, 1),
    263: ("unlinkat", 0, 1),
    264: ("renameat", 0, 1),
    265: ("linkat", 0, 1),
    268: ("fchmodat", 0, 1),
    280: ("utimensat", 0, 1),
    316: ("renameat2", 0, 1),
}
#: What can be counted in addition.
OTHER: Final[dict[int, tuple[str, int, int]]] = {
    17: ("pread64", 0, -1),
    41: ("socket", -1, -1),
    44: ("sendto", 0, -1),
    46: ("sendmsg", 0, -1),
    53: ("socketpair", -1, -1),
    288: ("accept4", 0, -1),
}
_OPENAT: Final = 257
_WRITES: Final = frozenset({1, 18})


class _Info(ctypes.Structure):
    """``struct ptrace_syscall_info`` of linux/ptrace.h."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("more", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    """One request.

    Raises:
        OSError: the kernel refuses; ESRCH: the thread is gone, or about to be.
    """
    if _libc.ptrace(request, thread, address & 0xFFFFFFFFFFFFFFFF, data & 0xFFFFFFFFFFFFFFFF) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Tracer:
    """The tracing of one process; see the module."""

    def __init__(self, pid: int, number: int, action: str, more: Sequence[str] = ()) -> None:
        """``more``: names of `OTHER`, or "open" for an openat that creates nothing."""
        self._pid = pid
        self._number = number
        self._action = action
        self._calls = DURABLE | {key: value for key, value in OTHER.items() if value[0] in more}
        self._every_open = "open" in more
        self._seen = 0
        self._info = _Info()
        self._stopped_in_call: set[int] = set()
        self._result: dict[int, int] = {}
        """Threads in a call that is hit, and what it is to say."""

    def run(self) -> None:
        """Trace until it has hit or the process is gone."""
        for entry in os.listdir(f"/proc/{self._pid}/task"):
            _ptrace(_SEIZE, int(entry), 0, _OPTIONS)
            _ptrace(_INTERRUPT, int(entry))
        _say("ready")
        while True:
            try:
                thread, status = os.waitpid(-1, _WALL)
            except ChildProcessError:
                return
            if os.WIFSTOPPED(status):
                try:
                    if self._stopped(thread, status):
                        return
                except ProcessLookupError:
                    pass  # killed meanwhile
            elif thread == self._pid:
                return

    def _stopped(self, thread: int, status: int) -> bool:
        """Let a thread go on; whether all is done."""
        number, event = os.WSTOPSIG(status), status >> 16
        if number == signal.SIGTRAP | 0x80:
            return self._in_call(thread)
        if event == _EVENT_STOP and number in {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}:
            _ptrace(_LISTEN, thread)
        else:
            _ptrace(_SYSCALL, thread, 0, 0 if event else number)
        return False

    def _in_call(self, thread: int) -> bool:
        if thread in self._result:
            _ptrace(_POKEUSER, thread, _RAX, self._result.pop(thread))
            _ptrace(_DETACH, thread)
            return True
        info = self._info
        _ptrace(_SYSCALL_INFO, thread, ctypes.sizeof(info), ctypes.addressof(info))
        if info.op == _ENTRY and self._counts(info):
            self._seen += 1
            hit = self._seen == self._number
            _say(f"{'hit' if hit else 'call'} {self._seen} {self._words(thread)}")
            if hit:
                return self._hit(thread)
        _ptrace(_SYSCALL, thread)
        return False

    def _counts(self, info: _Info) -> bool:
        if info.number == _OPENAT and not self._every_open:
            return bool(info.arguments[2] & os.O_CREAT)
        return info.number in self._calls

    def _hit(self, thread: int) -> bool:
        """At the entry of the call; whether all is done."""
        info = self._info
        if self._action == "short":
            if info.number in _WRITES and info.arguments[2] > 1:
                _ptrace(_POKEUSER, thread, _RDX, info.arguments[2] // 2)
            _ptrace(_DETACH, thread)
            return True
        _ptrace(_POKEUSER, thread, _ORIG_RAX, -1)
        if self._action == "kill":
            os.kill(self._pid, signal.SIGKILL)
            return False
        self._result[thread] = -getattr(errno, self._action)
        _ptrace(_SYSCALL, thread)
        return False

    def _words(self, thread: int) -> str:
        """The call that a thread is about to make."""
        info = self._info
        name, directory, text = self._calls[info.number]
        where = ""
        if directory >= 0:
            fd = ctypes.c_int(info.arguments[directory] & 0xFFFFFFFF).value
            try:
                where = os.readlink(f"/proc/{thread}/{'cwd' if fd == -100 else f'fd/{fd}'}")
            except OSError:
                where = str(fd)
        if text >= 0:
            with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
                memory.seek(info.arguments[text])
                where = os.path.join(where, memory.read(256).partition(b"\0")[0].decode("utf-8", "replace"))
        return f"{name} {where}"


def _say(line: str) -> None:
    os.write(1, line.encode("utf-8", "backslashreplace") + b"\n")


def _end(_number: int, _frame: FrameType | None) -> None:
    os._exit(0)


def main(arguments: Sequence[str]) -> int:
    """The program."""
    if platform.machine() != "x86_64":
        return 4
    pid, number, action, *more = arguments
    signal.signal(signal.SIGTERM, _end)
    try:
        Tracer(int(pid), int(number), action, more[0].split(",") if more else ()).run()
    except OSError as fault:
        print(f"cannot trace {pid}: {fault}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
