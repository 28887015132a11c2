"""What can go wrong in the sweep ``soak``: a function for each kind of harm of `tools.lib.soak_schedule`.

A harm is done on a stage, in a thread of its own, and is over and healed when its function returns, but for clients that
say nothing more: they stay until the end of their seed. It returns "", or why it was not done: somebody else was faster.
What cannot be done on this machine at all raises `Unavailable`.

Nothing here judges the server, but for a stop that does not end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final

import msgspec

from mtad.spool.queues import Queue
from tests.client import Client
from tests.peers.mx import CLOSE, HANG, RESET, Action, Say
from tools.lib import queue_harms, small_disk
from tools.lib.crash_load import MOODY, compose
from tools.lib.flood_clients import Crowd
from tools.lib.soak_limits import descriptors_short, line_loses, memory_short, processes_short
from tools.lib.soak_schedule import KINDS, Harm
from tools.lib.soak_stage import Stage
from tools.lib.sweeps import Unavailable

Do = Callable[[Stage, Harm, random.Random], str]

#: Clients of each kind.
RUDE: Final = 6
IDLE: Final = 60
HASTY: Final = 150
#: Pieces that a client sends at most who reads nothing.
_DEAF: Final = 2000
#: Harmed files at a time.
_FILES: Final = 4
#: Seconds between the cut of the power and the end of the processes, at most.
_AFTER_CUT: Final = 0.05
#: Seconds that a client waits for an answer.
_PATIENCE: Final = 10.0

#: System calls that a process may die before.
_CALLS: Final = ("openat", "write", "pwrite64", "fsync", "fdatasync", "renameat", "rename", "unlinkat", "unlink", "sendto")
#: System calls and an error that each can have.
_ERRORS: Final = (
    *(("fsync", error) for error in ("EIO", "ENOSPC", "EDQUOT")),
    *(("fdatasync", error) for error in ("EIO", "ENOSPC")),
    *(("openat", error) for error in ("EIO", "ENOSPC", "EMFILE", "ENFILE", "ENOMEM")),
    *(("pwrite64", error) for error in ("EIO", "ENOSPC", "EINTR")),
    *((call, error) for call in ("renameat", "rename", "unlinkat", "unlink") for error in ("EIO", "EROFS")),
    *(("pread64", error) for error in ("EIO", "ENOMEM", "EINTR")),
    *((call, error) for call in ("socket", "accept4") for error in ("EMFILE", "ENFILE", "ENOMEM")),
)

#: Seconds by which a clock is set ahead, or back.
_AHEAD: Final = (3600.0, 6 * 3600.0)
_BACK: Final = (1.0, 12.0)

#: What an exchanger does instead of what it should, and where.
_VERBS: Final = ("greeting", "ehlo", "mail", "data", "dot", "quit")
_INSTEAD: Final[Sequence[Action]] = (
    RESET,
    CLOSE,
    HANG,
    Say("451 4.3.0 Not now"),
    Say("421 4.3.2 Going down", close=True),
    Say("421 4.3.2 Going down", reset=True),
)


def _kill(role: str) -> Do:
    def kill(stage: Stage, _: Harm, chance: random.Random) -> str:
        pid = stage.one_of(role, chance)
        if not pid:
            return "nobody was there"
        stage.books.died()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return ""

    return kill


def kill_master(stage: Stage, _harm: Harm, _chance: random.Random) -> str:
    stage.kill_master()
    return ""


def stop(stage: Stage, _harm: Harm, _chance: random.Random) -> str:
    stage.stop()
    return ""


def reload(stage: Stage, _harm: Harm, _chance: random.Random) -> str:
    stage.reload()
    return ""


def power_cut(stage: Stage, _harm: Harm, chance: random.Random) -> str:
    _disk(stage)
    stage.power_cut(chance.uniform(0, _AFTER_CUT))
    return ""


# -- the disk ---------------------------------------------------------------------------------------------------------


def _disk(stage: Stage) -> small_disk.SmallDisk:
    if stage.disk is None:
        raise Unavailable("there is no disk of our own")
    return stage.disk


def _trouble(make: Callable[[Stage, Harm], AbstractContextManager[None]]) -> Do:
    def trouble(stage: Stage, harm: Harm, _: random.Random) -> str:
        _disk(stage)
        with stage.disk_lock:
            try:
                with make(stage, harm):
                    time.sleep(harm.lasts)
            except AssertionError as fault:  # there was no moment in which nobody had a file open for writing
                return str(fault)
        return ""

    return trouble


def _calls_fail(pids: Sequence[int], harm: Harm, *faults: str) -> str:
    """System calls of processes fail for a while."""
    if not pids:
        return "nobody was there"
    try:
        with small_disk.failing(pids, *faults):
            time.sleep(harm.lasts)
    except Unavailable as fault:  # for a process that has just ended, too
        return str(fault)
    return ""


def fail_fsync(stage: Stage, harm: Harm, _: random.Random) -> str:
    with stage.disk_lock:
        return _calls_fail(stage.site.processes(), harm, "fsync:error=EIO", "fdatasync:error=EIO")


def fail_at_a_call(stage: Stage, harm: Harm, chance: random.Random) -> str:
    call, error = chance.choice(_ERRORS)
    pid = stage.one_of(chance.choice(("scheduler", "listener", "delivery")), chance)
    return _calls_fail([pid] if pid else [], harm, f"{call}:error={error}:when={chance.randint(1, 8)}")


def kill_at_a_call(stage: Stage, harm: Harm, chance: random.Random) -> str:
    call = chance.choice(_CALLS)
    pid = stage.one_of(chance.choice(("scheduler", "listener", "delivery")), chance)
    stage.books.died()
    result = _calls_fail([pid] if pid else [], harm, f"{call}:signal=SIGKILL:when={chance.randint(1, 8)}")
    stage.books.died()
    return result


# -- clients ----------------------------------------------------------------------------------------------------------


def rude_clients(stage: Stage, harm: Harm, chance: random.Random) -> str:
    """Each goes some way into a transaction, and then resets, half closes, or says nothing more."""
    address = stage.site.address("relay")
    for number in range(RUDE):
        with contextlib.suppress(OSError, AssertionError, EOFError):
            _rude_client(stage, f"rude-{harm.chance}-{number}", address, chance)
    return ""


def _rude_client(stage: Stage, name: str, address: tuple[str, int], chance: random.Random) -> None:
    message, content = compose(chance, name)
    stuffed = content.replace(b"\r\n.", b"\r\n..")
    half = len(stuffed) // 2
    client = Client(address, timeout=_PATIENCE)
    lines = ["EHLO client.test", f"MAIL FROM:<{message.sender}>"]
    lines += [f"RCPT TO:<{recipient}>" for recipient in message.recipients] + ["DATA"]
    steps: list[Callable[[], object]] = [client.reply]
    steps += [lambda line=line: client.say(line) for line in lines]  # type: ignore[misc]
    steps += [lambda: client.send(stuffed[:half]), lambda: client.send(stuffed[half:] + b".\r\n")]
    temper = chance.choice(("reset", "half", "silent", "deaf"))
    stage.books.note(message)
    for step in steps[: chance.randint(1, len(steps))]:
        step()
    if temper == "reset":
        client.reset()
    elif temper == "half":
        client.socket.shutdown(socket.SHUT_WR)
        last = client.reply()
        if last.startswith("250 ") and "queued as" in last:
            stage.books.note(msgspec.structs.replace(message, queue_id=last.rpartition(" ")[2]))
        client.socket.close()
    else:
        if temper == "deaf":
            _deafen(client)
        stage.linger(client.socket)


def _deafen(client: Client) -> None:
    """Ask for replies, and read none of them, until the server can say no more: its window is zero."""
    client.socket.setblocking(False)
    with contextlib.suppress(OSError):
        for _ in range(_DEAF):
            client.socket.send(b"HELP\r\n" * 200)


def idle_clients(stage: Stage, harm: Harm, _: random.Random) -> str:
    with contextlib.suppress(OSError, AssertionError), Crowd() as crowd:
        crowd.join(stage.site.address("relay"), IDLE)
        time.sleep(harm.lasts)
    return ""


def hasty_clients(stage: Stage, harm: Harm, chance: random.Random) -> str:
    with contextlib.suppress(OSError, AssertionError):
        address = stage.site.address("relay")
        for _ in range(HASTY):
            with Client(address, source="127.0.3.1", timeout=_PATIENCE) as client:
                if chance.random() < 0.5:
                    client.reset()
            time.sleep(harm.lasts / HASTY)
    return ""


# -- exchangers -------------------------------------------------------------------------------------------------------


def exchanger_fails(stage: Stage, harm: Harm, chance: random.Random) -> str:
    """One exchanger resets, closes, hangs or refuses, at one verb; or it does not read the content: its window is zero."""
    number = chance.randrange(len(stage.exchangers))
    exchanger, verb, action = stage.exchangers[number], chance.choice(_VERBS), chance.choice(_INSTEAD)
    usual = stage.scripts[number]
    deaf = {"read_content": 0} if action is HANG and verb == "dot" else {}
    exchanger.script = dataclasses.replace(usual, **{verb: action}, **deaf)  # type: ignore[arg-type]
    time.sleep(harm.lasts)
    exchanger.script = usual
    if action is HANG:
        # Those that hang do so until somebody ends it; the others begin anew.
        with contextlib.suppress(AssertionError):
            exchanger.drop()
    return ""


# -- the clock --------------------------------------------------------------------------------------------------------


def clock_set(stage: Stage, _: Harm, chance: random.Random) -> str:
    """Ahead by hours, or back by so little that what waits for it comes soon."""
    stage.clock.set_by(chance.uniform(*_AHEAD) if chance.random() < 0.7 else -chance.uniform(*_BACK))
    return ""


# -- the queue --------------------------------------------------------------------------------------------------------


def harmed_files(stage: Stage, _: Harm, chance: random.Random) -> str:
    """Files that are none, in incoming and deferred; only such as must go to corrupt/."""
    if os.geteuid() != 0:
        raise Unavailable("only root can give files away and make devices")
    done = 0
    for number in range(_FILES):
        with stage.disk_lock:  # what is put there must stay there, whatever happens to the disk afterwards
            done += _harm_file(stage, chance, number)
    return "" if done else "all of them were messages still"


def _harm_file(stage: Stage, chance: random.Random, number: int) -> bool:
    now = time.time()
    queue = chance.choice((Queue.INCOMING, Queue.INCOMING, Queue.DEFERRED))
    made = chance.randrange(1000) * 20 + number * 2
    good = queue_harms.make(chance, made, MOODY, now)
    other = queue_harms.make(chance, made + 1, MOODY, now)
    bench = queue_harms.Bench(chance, stage.staging / good.id, queue, other)
    expected = chance.choice(queue_harms.HARMS)(bench, good)
    path = bench.path
    if expected != queue_harms.CORRUPT:
        path.unlink()
        return False
    if not path.is_symlink():
        os.utime(path, (now - 100, now - 100))
    stage.sync()
    inode = path.lstat().st_ino
    stage.harmed[inode] = path.name
    try:
        os.rename(path, stage.site.spool_path / queue.value / path.name)
    except OSError:
        del stage.harmed[inode]
        raise
    stage.sync()
    return True


DO: Final[Mapping[str, Do]] = {
    "master killed": kill_master,
    "stopped": stop,
    "power cut": power_cut,
    "scheduler killed": _kill("scheduler"),
    "listener killed": _kill("listener"),
    "delivery killed": _kill("delivery"),
    "reload": reload,
    "killed at a call": kill_at_a_call,
    "disk full": _trouble(lambda stage, _: _disk(stage).full()),
    "inodes gone": _trouble(lambda stage, _: _disk(stage).without_inodes()),
    "disk read-only": _trouble(lambda stage, _: _disk(stage).read_only()),
    "disk hung": _trouble(lambda stage, harm: _disk(stage).frozen(harm.lasts)),
    "fsync fails": fail_fsync,
    "error at a call": fail_at_a_call,
    "descriptors gone": descriptors_short,
    "memory short": memory_short,
    "processes short": processes_short,
    "line loses": line_loses,
    "rude clients": rude_clients,
    "idle clients": idle_clients,
    "hasty clients": hasty_clients,
    "exchanger fails": exchanger_fails,
    "harmed files": harmed_files,
    "clock set": clock_set,
}
assert set(DO) == set(KINDS)


class Doing(threading.Thread):
    """A harm at work."""

    def __init__(self, stage: Stage, harm: Harm, begin: float) -> None:
        """``begin``: of its seed, on the monotonic clock."""
        super().__init__(name=harm.kind, daemon=True)
        self.harm = harm
        self.result = ""
        """Why it was not done."""
        self.lack = ""
        """Why it cannot be done here."""
        self.fault = ""
        """What broke."""
        self._stage = stage
        self._begin = begin

    def run(self) -> None:
        """See the class."""
        time.sleep(max(0.0, self._begin + self.harm.at - time.monotonic()))
        try:
            self.result = DO[self.harm.kind](self._stage, self.harm, random.Random(self.harm.chance))
        except Unavailable as lack:
            self.lack = str(lack)
        except Exception as fault:
            self.fault = f"{type(fault).__name__}: {fault}"
