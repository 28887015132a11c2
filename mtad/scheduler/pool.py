"""The delivery processes: started as there is work, watched, ended.

Each process has one channel. A job goes to the process that has the fewest, so none waits in a channel while a thread is
free elsewhere. A process that closes its channel has died; one that has not shown a sign of life for `SILENCE` seconds
hangs, and is killed; so is one whose watchdog names jobs that it could not end (`mtad.delivery.watchdog`), when nothing
else is at work in it any more, or not for long: it gets no new jobs meanwhile. In all cases the next one for that place
starts after a pause that grows when processes die young.

The jobs of a process come back to the scheduler once the kernel says that it is gone (`reap`), not before: one that hangs
in a dead file system cannot be killed, and could still finish what it was at. Nobody waits for it.

Errors: a machine that gives no process or descriptor is asked again after the same pause. A process that the machine does
not give what it needs ends with a word in the log, and is replaced like any other.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Final

import msgspec

from mtad import log
from mtad.delivery.jobs import ALIVE, Job, Result, job_encoder, result_decoder, stuck_jobs
from mtad.host import words
from mtad.net.channels import PacketRoom, PacketSocket, end_sending, packet_pair
from mtad.signals import how_ended

#: Seconds without any packet after which a process with work is taken for hung.
SILENCE: Final = 60.0
#: Seconds that the other jobs of a process get to end, when some make no progress.
LAST_RESPITE: Final = 60.0
#: A process that lived less than this (seconds) died young; the pause before the next one doubles up to the maximum.
YOUNG: Final = 5.0
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 30.0
#: Seconds between two looks whether a process is gone: in its first second, and afterwards.
_FIRST_LOOK: Final = 0.002
_LATER_LOOK: Final = 0.5


class Dying(msgspec.Struct, frozen=True):
    """A process that has been killed or has died, until the kernel says so. ``jobs`` is what it had, ``why`` in words."""

    pid: int
    jobs: tuple[Job, ...]
    why: str
    since: float


class Slot:
    """A place for one delivery process, and the process that has it, if any."""

    def __init__(self, number: int) -> None:
        """An empty place."""
        self.number = number
        self.pid = 0
        self.channel: PacketSocket | None = None
        self.jobs: dict[int, Job] = {}
        self.started = 0.0
        self.heard = 0.0
        self.stuck: frozenset[int] = frozenset()
        self.stuck_since = 0.0
        self.pause = FIRST_PAUSE
        self.not_before = 0.0

    def complaint(self, now: float) -> str:
        """Why the process is to be ended, in words; "" when it is well."""
        if not self.jobs:
            return ""
        if now - self.heard > SILENCE:
            return "did not show a sign of life"
        if self.stuck and (self.jobs.keys() <= self.stuck or now - self.stuck_since > LAST_RESPITE):
            return "has deliveries that make no progress"
        return ""

    def names_stuck(self, numbers: frozenset[int], now: float) -> None:
        """Its watchdog names the jobs that make no progress; those that have ended meanwhile do not count."""
        stuck = numbers & self.jobs.keys()
        if stuck and not self.stuck:
            self.stuck_since = now
        self.stuck = stuck


class DeliveryPool:
    """All delivery processes of one scheduler; used by its one thread."""

    def __init__(self, processes: int, threads: int, run: Callable[[PacketSocket, int], None]) -> None:
        """``run`` is what a delivery process does with its end of the channel and its number, after the fork."""
        self._slots = [Slot(number) for number in range(processes)]
        self._threads = threads
        self._run = run
        self._numbers = 0
        self._room = PacketRoom()
        self._looked: float | None = None
        self._dying: list[Dying] = []

    def channels(self) -> dict[int, Slot]:
        """The places that have a process, by the descriptor of their channel; for a poll."""
        return {slot.channel.fileno(): slot for slot in self._slots if slot.channel is not None}

    def pids(self) -> list[int]:
        """The process ids of the delivery processes."""
        return [slot.pid for slot in self._slots if slot.pid]

    def pid_of(self, number: int) -> int:
        """The process that has the job with this number; 0 when none has."""
        return next((slot.pid for slot in self._slots if number in slot.jobs), 0)

    def free(self, now: float) -> Slot | None:
        """A place that can take another job (its process is started when it has none); None when all are full.

        ``now`` is of the monotonic clock, as all times here.
        """
        best: Slot | None = None
        for slot in self._slots:
            if slot.channel is None and now < slot.not_before:
                continue
            if len(slot.jobs) < self._threads and not slot.stuck and (best is None or len(slot.jobs) < len(best.jobs)):
                best = slot
        if best is None or best.channel is not None or self._start(best, now):
            return best
        return None

    def wait(self, now: float) -> float | None:
        """Seconds until the pool wants to be asked again, by `free` or `reap`; None: nothing is to be waited for."""
        waits = [slot.not_before - now for slot in self._slots if slot.channel is None and slot.not_before > now]
        waits += [_FIRST_LOOK if now - dying.since < 1.0 else _LATER_LOOK for dying in self._dying]
        return min(waits, default=None)

    def send(self, slot: Slot, job: Job, now: float) -> int | None:
        """Number a job and hand it to a process; None when that one has just died or does not listen."""
        assert slot.channel is not None
        if not slot.jobs:
            slot.heard = now  # nobody listened for the heartbeat of an idle process
        self._numbers += 1
        job = msgspec.structs.replace(job, number=self._numbers)
        try:
            slot.channel.send(job_encoder.encode(job))
        except OSError:
            return None
        slot.jobs[job.number] = job
        return job.number

    def receive(self, slot: Slot, now: float) -> tuple[Job, Result] | None:
        """The next result of a process; None when there is none yet, or it was a sign of life.

        Raises:
            EOFError: the process has died.
        """
        assert slot.channel is not None
        try:
            packet = self._room.receive(slot.channel)
        except BlockingIOError:
            return None
        except OSError as fault:
            raise EOFError from fault
        if not packet:
            raise EOFError
        slot.heard = now
        if packet.startswith(ALIVE):
            slot.names_stuck(stuck_jobs(packet), now)
            return None
        result = result_decoder.decode(packet)
        return slot.jobs.pop(result.number), result

    def hung(self, now: float) -> list[Slot]:
        """The places whose process has work and is to be ended, see `Slot.complaint`. To be called every few seconds."""
        if self._looked is not None and now - self._looked > SILENCE / 2:
            for slot in self._slots:  # we have been frozen for so long, and they with us
                slot.heard = now
        self._looked = now
        return [slot for slot in self._slots if slot.complaint(now)]

    def bury(self, slot: Slot, why: str, now: float) -> None:
        """End what is left of a process; ``why`` in words. `reap` tells when it is over."""
        assert slot.channel is not None
        slot.channel.close()
        slot.channel = None
        _kill(slot.pid)
        self._dying.append(Dying(slot.pid, tuple(slot.jobs.values()), why, now))
        slot.jobs.clear()
        slot.stuck = frozenset()
        slot.pid = 0
        self._rest(slot, now, young=now - slot.started < YOUNG)

    def reap(self) -> list[tuple[Dying, str]]:
        """The processes that are gone since the last call, and how each ended, in words; "" when as it should."""
        gone: list[tuple[Dying, str]] = []
        for dying in self._dying:
            pid, status = os.waitpid(dying.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                gone.append((dying, how_ended(code) if code or dying.jobs else ""))
        self._dying = [dying for dying in self._dying if all(dying is not other for other, _ in gone)]
        return gone

    def finish(self) -> None:
        """Let each process end what it is at and then exit; results still come."""
        for slot in self._slots:
            if slot.channel is not None:
                end_sending(slot.channel)

    def kill(self) -> None:
        """End the processes now."""
        for pid in self.pids():
            _kill(pid)

    def _start(self, slot: Slot, now: float) -> bool:
        """Start a process in a place; False, and a pause, when the machine does not give one."""
        try:
            ours, theirs = packet_pair()
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                theirs.close()
                raise
        except OSError as fault:
            self._rest(slot, now, young=True)
            log.warning(f"cannot start a delivery process, trying again in {slot.pause:g} s: {fault.strerror or fault}")
            return False
        if pid == 0:
            # A child that kept another's channel would hide that one's death from the scheduler, and the other way round.
            ours.close()
            for other in self._slots:
                if other.channel is not None:
                    other.channel.close()
            _never_return(self._run, theirs, slot.number)
        theirs.close()
        ours.setblocking(False)
        slot.channel = ours
        slot.pid = pid
        slot.started = slot.heard = now
        slot.not_before = 0.0
        return True

    @staticmethod
    def _rest(slot: Slot, now: float, *, young: bool) -> None:
        slot.pause = min(LONGEST_PAUSE, slot.pause * 2) if young else FIRST_PAUSE
        slot.not_before = now + slot.pause


def _never_return(run: Callable[[PacketSocket, int], None], channel: PacketSocket, number: int) -> None:
    code = 70  # EX_SOFTWARE
    try:
        run(channel, number)
        code = 0
    except (OSError, MemoryError) as fault:
        log.fatal(f"delivery process ends: {words(fault) or 'out of memory'}")
    except BaseException as bug:
        log.panic("delivery process ends", bug)
    finally:
        os._exit(code)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
