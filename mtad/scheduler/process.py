"""The scheduler process: the loop around `Scheduler` and `DeliveryPool`.

It polls for wake-ups, results, requests of `mtad-flush`, signals and the death of the master; in between it advances the
scans a slice at a time. SIGTERM: no new deliveries, those under way are waited for (``processes.stop_timeout``) and
settled. SIGUSR1 (a reload): the spool is given to the next scheduler at once, deliveries under way end on their own and
write what they did into the queue files, where the next scheduler finds it. The delivery processes are told before the
spool's lock is let go: a job that none of them has begun by then is the next scheduler's, see `mtad.delivery.process`.
"""

from __future__ import annotations

import math
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from mtad import log
from mtad.delivery.jobs import Job
from mtad.delivery.process import run_delivery
from mtad.desk import DESK_SOCKET, Refused, encoder
from mtad.errors import QueueFileDamaged, SpoolBusy
from mtad.host import stay_on_processor
from mtad.net.channels import PacketSocket
from mtad.net.desk import Desk
from mtad.runtime import Runtime
from mtad.scheduler.lifemark import LifeMark, boot_id
from mtad.scheduler.pool import DeliveryPool, Slot
from mtad.scheduler.report import LogEvents
from mtad.scheduler.scan import Scan
from mtad.scheduler.scheduler import Scheduler
from mtad.signals import Signals
from mtad.spool.queue_file import parse_wakeup
from mtad.spool.queue_id import is_queue_id
from mtad.spool.queues import Queue, Spool

#: Seconds between two looks at a queue for what no wake-up told. incoming/ is short or empty, so a look costs nothing.
SCAN_INTERVALS: Final = {Queue.INCOMING: 5.0, Queue.ACTIVE: 300.0, Queue.DEFERRED: 300.0}
#: Seconds between two tries to get the spool, and between two looks at messages that an earlier delivery still holds.
_RECHECK: Final = 0.1
#: Seconds between two warnings about files that cannot be looked at.
_SCAN_QUIET: Final = 60.0
#: Seconds between two rounds of housekeeping.
_HOUSEKEEPING: Final = 10.0


class FlushRequest(msgspec.Struct, frozen=True):
    """What `mtad-flush` sends: these deferred messages are to be tried now."""

    flush: tuple[str, ...]


class SchedulerProcess:
    """One scheduler process from start to end."""

    def __init__(self, runtime: Runtime, spool: Spool, signals: Signals) -> None:
        """Nothing is done before `run`."""
        self._runtime = runtime
        self._signals = signals
        self._lock = -1
        self._events = LogEvents()
        self._spool = spool
        spool.displaced = lambda queue, name: self._events.damaged(name, queue, "another file has the same queue id")
        self._scheduler = Scheduler(runtime.config, spool, self._events)
        self._mark = LifeMark(spool.root, boot_id(), flushed=runtime.config.retry.on_doubt == "hold")
        self._pool = DeliveryPool(runtime.config.delivery.processes, runtime.config.delivery.threads, self._deliver)
        self._desk: Desk | None = None
        self._poll = select.poll()
        self._watched: dict[int, Slot] = {}
        self._scans: deque[Scan] = deque()
        self._scan_due = dict.fromkeys(SCAN_INTERVALS, 0.0)
        self._held_elsewhere: list[str] = []
        self._recheck = 0.0
        self._scan_quiet_until = 0.0
        self._housekeeping = 0.0
        self._ending: signal.Signals | None = None

    def run(self) -> None:
        """Get the spool, then work until told to end."""
        for source in (self._signals, self._runtime.lifeline, self._runtime.wake, self._runtime.mailslot):
            self._poll.register(source.fileno(), select.POLLIN)
        if not self._get_spool():
            return
        self._begin_life()
        self._open_desk()
        while self._ending is None:
            self._turn()
        handover = self._ending is signal.SIGUSR1
        self._end()
        if not handover:
            self._end_life()

    def _get_spool(self) -> bool:
        """Wait for the spool's lock, and for a disk that has it; False when told to end meanwhile."""
        said = ""
        while True:
            try:
                self._lock = self._spool.lock()
                return True
            except SpoolBusy as busy:
                why = f"waiting for the scheduler before this one: {busy}"
            except OSError as fault:
                why = f"waiting for the spool's lock: {fault.strerror or fault}"
            if why != said:
                self._events.warning(why)
            said = why
            gone = select.select([self._runtime.lifeline], [], [], _RECHECK)[0]
            if gone or self._signals.take():
                return False

    def _begin_life(self) -> None:
        try:
            self._mark.begin(time.time())
        except OSError as fault:
            self._events.warning(f"no mark of life in the spool: {fault.strerror or fault}")
        self._scheduler.begin(self._mark.cut)

    def _end_life(self) -> None:
        try:
            self._spool.sync()
            self._mark.end()
        except OSError as fault:
            self._events.warning(f"no mark of life in the spool: {fault.strerror or fault}")

    def _open_desk(self) -> None:
        """Be there for questions and orders; without it mail is delivered all the same."""
        try:
            self._desk = Desk(os.path.join(self._spool.root, DESK_SOCKET))
        except OSError as fault:
            self._events.warning(f"no desk for mtaq and mtad status: {fault.strerror or fault}")
            return
        self._poll.register(self._desk.fileno(), select.POLLIN)

    def _serve_desk(self) -> None:
        if self._desk is not None:
            self._desk.serve(self._answer)

    def _answer(self, question: bytes) -> bytes:
        try:
            return self._scheduler.clerk.answer(question, self._pool)
        except Exception as bug:
            # Mail must not stop because somebody asked about it.
            log.panic("a question at the desk failed in a way that nobody thought of", bug)
            return encoder.encode(Refused(f"internal error: {type(bug).__name__}"))

    def _turn(self) -> None:
        now = time.monotonic()
        more = self._scheduler.turn()
        more = self._advance_scans(now) or more
        self._scheduler.dispatch(self)
        self._watch_channels()
        for fd, _ in self._poll.poll(0 if more else self._milliseconds(now)):
            self._ready(fd)
        self._take_back()
        if now >= self._housekeeping:
            self._housekeeping = now + _HOUSEKEEPING
            self._scheduler.keep_house()
            self._mark.alive()
            if self._desk is not None:
                self._desk.tidy()
            self._end_hung(now)

    def _milliseconds(self, now: float) -> int:
        """How long nothing will have to be done."""
        until = min([self._housekeeping, *self._scan_due.values()])
        if self._held_elsewhere:
            until = min(until, self._recheck)
        waits = (until - now, self._pool.wait(now), self._scheduler.wait())
        return max(0, int(min(wait for wait in waits if wait is not None) * 1000) + 1)

    def _ready(self, fd: int) -> None:
        runtime = self._runtime
        if fd in self._watched:
            self._read_results(self._watched[fd])
        elif fd == runtime.wake.fileno():
            for line in runtime.wake.receive():
                self._wake_up(line)
        elif fd == runtime.mailslot.fileno():
            while (request := runtime.mailslot.receive()) is not None:
                self._request(request)
        elif self._desk is not None and fd == self._desk.fileno():
            self._serve_desk()
        elif fd == runtime.lifeline.fileno():
            self._events.warning("the master is gone, ending")
            self._ending = signal.SIGTERM
        elif fd == self._signals.fileno():
            for number in self._signals.take():
                self._ending = self._ending or number

    def _wake_up(self, line: bytes) -> None:
        try:
            self._scheduler.arrived(parse_wakeup(line))
        except QueueFileDamaged:
            queue_id = line.decode("ascii", "replace")
            if is_queue_id(queue_id):
                self._scheduler.found_incoming(queue_id, time.time())

    def _request(self, data: bytes) -> None:
        try:
            request = msgspec.json.decode(data, type=FlushRequest)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
            self._events.warning(f"a request that cannot be read: {fault}")
            return
        self._scheduler.flush([queue_id for queue_id in request.flush if is_queue_id(queue_id)])

    # -- delivery processes -------------------------------------------------------------------------------------------

    def dispatch(self, job: Job) -> int | None:
        """Send a job to a process; see `mtad.scheduler.scheduler.Dispatcher`."""
        now = time.monotonic()
        slot = self._pool.free(now)
        if slot is None:
            return None
        number = self._pool.send(slot, job, now)
        if number is None:
            self._watch_channels()  # it is dead: its end will be read in the next turn
        return number

    def _watch_channels(self) -> None:
        channels = self._pool.channels()
        if channels.keys() == self._watched.keys():
            self._watched = channels
            return
        for fd in self._watched.keys() - channels.keys():
            self._poll.unregister(fd)
        for fd in channels.keys() - self._watched.keys():
            self._poll.register(fd, select.POLLIN)
        self._watched = channels

    def _read_results(self, slot: Slot) -> None:
        try:
            while (answer := self._pool.receive(slot, time.monotonic())) is not None:
                self._scheduler.result(answer[1])
        except EOFError:
            self._bury(slot, "died")
        except (msgspec.MsgspecError, KeyError):  # whatever is wrong with it, the others must not suffer
            self._bury(slot, "gave an answer that cannot be read")

    def _bury(self, slot: Slot, why: str) -> None:
        self._pool.bury(slot, why, time.monotonic())
        self._watch_channels()

    def _end_hung(self, now: float) -> None:
        for slot in self._pool.hung(now):
            self._bury(slot, slot.complaint(now))

    def _take_back(self) -> None:
        """Take the work of processes that are gone."""
        for gone, how in self._pool.reap():
            if not how:
                continue
            if self._lock < 0:
                self._events.warning(f"delivery process {gone.pid} {gone.why} ({how})")
                continue
            self._events.warning(
                f"delivery process {gone.pid} {gone.why} ({how}); {len(gone.jobs)} deliveries are taken back"
            )
            self._scheduler.died(gone.jobs, how)

    def _deliver(self, channel: PacketSocket, number: int) -> None:
        """In the child: become the delivery process with this number."""
        os.close(self._lock)
        if self._desk is not None:
            self._desk.close()
        if self._runtime.config.processes.processors == "one":
            stay_on_processor(-1 - number)  # listeners begin at the other end
        run_delivery(self._runtime, channel)

    # -- scans --------------------------------------------------------------------------------------------------------

    def _advance_scans(self, now: float) -> bool:
        for queue, due in self._scan_due.items():
            if now >= due:
                self._scan_due[queue] = now + SCAN_INTERVALS[queue]
                if not any(scan.queue is queue for scan in self._scans):
                    visit, stranger = self._visitor(queue), self._scheduler.found_stranger
                    self._scans.append(Scan(self._spool, queue, visit, stranger, self._warn_of_scan))
        if self._held_elsewhere and now >= self._recheck:
            self._recheck = now + _RECHECK
            self._held_elsewhere = [name for name in self._held_elsewhere if not self._scheduler.restore(name)]
        if self._scans:
            try:
                if not self._scans[0].advance():
                    self._scans.popleft()
            except OSError as fault:
                self._events.warning(f"cannot look through {self._scans.popleft().queue.value}: {fault}")
        return bool(self._scans)

    def _warn_of_scan(self, text: str) -> None:
        """Scans come every few seconds, and a broken file stays where it is."""
        if (now := time.monotonic()) >= self._scan_quiet_until:
            self._scan_quiet_until = now + _SCAN_QUIET
            self._events.warning(text)

    def _visitor(self, queue: Queue) -> Callable[[str, float], None]:
        if queue is Queue.INCOMING:
            return self._scheduler.found_incoming
        if queue is Queue.DEFERRED:
            return self._scheduler.found_deferred
        return self._restore

    def _restore(self, queue_id: str, _mtime: float) -> None:
        if not self._scheduler.restore(queue_id) and queue_id not in self._held_elsewhere:
            self._held_elsewhere.append(queue_id)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Wait for the deliveries under way; settle them unless the next scheduler will.

        At a stop there is a limit. At a reload there is none, before a stop comes or the master goes.
        """
        limit = self._runtime.config.processes.stop_timeout
        deadline = time.monotonic() + limit
        self._poll = select.poll()
        for fd in self._watched:
            self._poll.register(fd, select.POLLIN)
        self._pool.finish()
        handover = self._ending is signal.SIGUSR1
        if self._desk is not None and handover:
            self._desk.close()  # the next scheduler has its own
            self._desk = None
        elif self._desk is not None:
            self._poll.register(self._desk.fileno(), select.POLLIN)
        if handover:
            self._scheduler.put_down()
            deadline = math.inf
            for source in (self._signals, self._runtime.lifeline):
                self._poll.register(source.fileno(), select.POLLIN)
            os.close(self._lock)
            self._lock = -1
        while self._watched and time.monotonic() < deadline:
            for fd, _ in self._poll.poll(200):
                if self._desk is not None and fd == self._desk.fileno():
                    self._serve_desk()
                elif fd not in self._watched:
                    self._poll.unregister(fd)
                    deadline = time.monotonic() + limit
                elif handover:
                    self._drop_results(self._watched[fd])
                else:
                    self._read_results(self._watched[fd])
            self._end_hung(time.monotonic())
            self._take_back()
        if not handover:
            self._scheduler.put_down()
        self._pool.kill()

    def _drop_results(self, slot: Slot) -> None:
        try:
            while (answer := self._pool.receive(slot, time.monotonic())) is not None:
                self._scheduler.late(*answer)
        except EOFError:
            self._bury(slot, "died")


def run_scheduler(runtime: Runtime, spool: Spool, signals: Signals) -> None:
    """What the scheduler process does, from its fork to its end."""
    SchedulerProcess(runtime, spool, signals).run()
