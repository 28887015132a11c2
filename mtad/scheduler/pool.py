"""The delivery processes: started as there is work, watched, ended.

Each process has one channel. A job goes to the process that has the fewest, so none waits in a channel while a thread is
free elsewhere. A process that closes its channel has died; one that has not shown a sign of life for `SILENCE` seconds
hangs, and is killed. In both cases the jobs that it had come back to the scheduler, and the next process for that place
starts after a pause that grows when processes die young.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Final

import msgspec

from mtad import log
from mtad.delivery.jobs import ALIVE, Job, Result, job_encoder, result_decoder
from mtad.net.channels import MAX_PACKET, PacketSocket, end_sending, packet_pair

#: Seconds without any packet after which a process with work is taken for hung.
SILENCE: Final = 60.0
#: A process that lived less than this (seconds) died young; the pause before the next one doubles up to the maximum.
YOUNG: Final = 5.0
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 30.0


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
        self.pause = FIRST_PAUSE
        self.not_before = 0.0


class DeliveryPool:
    """All delivery processes of one scheduler; used by its one thread."""

    def __init__(self, processes: int, threads: int, run: Callable[[PacketSocket], None]) -> None:
        """``run`` is what a delivery process does with its end of the channel; it is called after the fork."""
        self._slots = [Slot(number) for number in range(processes)]
        self._threads = threads
        self._run = run
        self._numbers = 0
        self.ended = False

    def channels(self) -> dict[int, Slot]:
        """The places that have a process, by the descriptor of their channel; for a poll."""
        return {slot.channel.fileno(): slot for slot in self._slots if slot.channel is not None}

    def pids(self) -> list[int]:
        """The process ids of the delivery processes."""
        return [slot.pid for slot in self._slots if slot.pid]

    def in_flight(self) -> int:
        """How many jobs are under way."""
        return sum(len(slot.jobs) for slot in self._slots)

    def free(self, now: float) -> Slot | None:
        """A place that can take another job (its process is started when it has none); None when all are full.

        ``now`` is of the monotonic clock, as all times here.
        """
        best: Slot | None = None
        for slot in self._slots:
            if slot.channel is None and now < slot.not_before:
                continue
            if len(slot.jobs) < self._threads and (best is None or len(slot.jobs) < len(best.jobs)):
                best = slot
        if best is not None and best.channel is None:
            self._start(best, now)
        return best

    def wait_until(self) -> float | None:
        """When the next place that is empty after a death may start a process."""
        times = [slot.not_before for slot in self._slots if slot.channel is None and slot.not_before]
        return min(times) if times else None

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
            packet = slot.channel.recv(MAX_PACKET)
        except BlockingIOError:
            return None
        except OSError as fault:
            raise EOFError from fault
        if not packet:
            raise EOFError
        slot.heard = now
        if packet == ALIVE:
            return None
        result = result_decoder.decode(packet)
        return slot.jobs.pop(result.number), result

    def hung(self, now: float) -> list[Slot]:
        """The places whose process has work and has not been heard of for too long."""
        return [slot for slot in self._slots if slot.jobs and now - slot.heard > SILENCE]

    def bury(self, slot: Slot, now: float) -> tuple[list[Job], str]:
        """End what is left of a process: the jobs that it had, and how it died, in words."""
        assert slot.channel is not None
        slot.channel.close()
        slot.channel = None
        _kill(slot.pid)
        _, status = os.waitpid(slot.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        jobs = list(slot.jobs.values())
        slot.jobs.clear()
        slot.pid = 0
        slot.pause = min(LONGEST_PAUSE, slot.pause * 2) if now - slot.started < YOUNG else FIRST_PAUSE
        slot.not_before = now + slot.pause
        return jobs, how

    def finish(self) -> None:
        """Let each process end what it is at and then exit; results still come."""
        self.ended = True
        for slot in self._slots:
            if slot.channel is not None:
                end_sending(slot.channel)

    def kill(self) -> None:
        """End the processes now."""
        for pid in self.pids():
            _kill(pid)

    def _start(self, slot: Slot, now: float) -> None:
        ours, theirs = packet_pair()
        pid = os.fork()
        if pid == 0:
            # A child that kept another's channel would hide that one's death from the scheduler, and the other way round.
            ours.close()
            for other in self._slots:
                if other.channel is not None:
                    other.channel.close()
            _never_return(self._run, theirs)
        theirs.close()
        ours.setblocking(False)
        slot.channel = ours
        slot.pid = pid
        slot.started = slot.heard = now
        slot.not_before = 0.0


def _never_return(run: Callable[[PacketSocket], None], channel: PacketSocket) -> None:
    code = 70  # EX_SOFTWARE
    try:
        run(channel)
        code = 0
    except BaseException as bug:
        log.panic("delivery process ends", bug)
    finally:
        os._exit(code)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
