"""Where the sweep ``soak`` plays: one server on a small disk, two exchangers, and what a service manager does.

The thread that enters it, and all that it starts from then on, have a network of their own, where that is possible. The
server, its spool and its mailboxes live through all seeds. What ends it, in whole or in part, and starts it again is
done here, one thing at a time; so is what happens to its disk.

Errors: AssertionError, when the server does not come up although nothing is wrong.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mtad.errors import MtadError
from tests.peers.mx import OK, Actions, Mx, Say, Script
from tests.procs import alive, children
from tests.site import await_value
from tools.lib.control_groups import Groups
from tools.lib.crash_disks import Disk
from tools.lib.crash_load import Moods
from tools.lib.crash_peers import peers
from tools.lib.small_disk import SmallDisk
from tools.lib.soak_books import Books
from tools.lib.soak_line import own_line
from tools.lib.sweep_power import end, start
from tools.lib.sweeps import Unavailable
from tools.lib.wrong_clock import Clock

#: Seconds in which a server that is ended is up again, also when its disk is in trouble at first.
UP: Final = 40.0
#: Seconds for a stop in order.
_STOP: Final = 25.0
#: The longest wait between attempts: so long at most does a checkpoint wait for what is deferred.
RETRY: Final = {"minimum": "1s", "maximum": "5s", "destination_pause": "1s"}
#: How long an exchanger is waited for: over a line that loses, it may have reset a connection without our hearing of it.
WAITS: Final = {
    f"{phase}_timeout": "10s" for phase in ("helo", "mail", "rcpt", "data_init", "data_xfer", "data_done", "rset")
}


class Tempers(Moods):
    """As `Moods`, without a memory that grows; ``stay-…`` is taken once its message is released."""

    def __init__(self) -> None:
        self.released: frozenset[str] = frozenset()
        self.seen: set[str] = set()

    def __getitem__(self, recipient: str) -> Actions:
        kind = recipient.partition("-")[0]
        if kind == "stay":
            return Say("450 4.2.1 Not now") if self.stays(recipient) else OK
        if kind == "later":
            fresh = recipient not in self.seen
            self.seen.add(recipient)
            return Say("450 4.2.0 Later") if fresh else OK
        return super().__getitem__(recipient)

    def stays(self, recipient: str) -> bool:
        """Whether a recipient is put off for ever, or until now."""
        kind, _, name = recipient.partition("@")[0].partition("-")
        return kind == "stay" and name not in self.released


class Forgetful(Mx):
    """An exchanger that can forget what it has taken."""

    def forget(self) -> None:
        """Now; nothing may be on its way here."""

        def clear() -> None:
            for memory in (self.transactions, self.commands, self.reads):
                memory.clear()
            self._threads = [thread for thread in self._threads if thread.is_alive()]

        self.note(clear)


class Stage:
    """The server and its world; a context manager. ``site`` runs within it, but for the moments of a harm."""

    def __init__(self, root: Path, preload: str = "") -> None:
        """``preload`` is a library for the server, for the negative control."""
        self.root = root
        self.tempers = Tempers()
        self.lacks: list[str] = []
        """What of the harms cannot be done here."""
        self.faults: list[str] = []
        self.failed_starts = 0
        self.harmed: dict[int, str] = {}
        """Harmed files that lie in the queues, or in corrupt/: inode and name."""
        self._lingering: list[socket.socket] = []
        self.disk: SmallDisk | None = None
        self.disk_lock = threading.Lock()
        self.life_lock = threading.RLock()
        self._preload = preload
        self._power: Disk | None = None
        self.own_line = False
        self.limit_lock = threading.Lock()
        self.files_lock = threading.Lock()
        self.line_lock = threading.Lock()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            try:
                own_line()
                self.own_line = True
            except Unavailable as lack:
                self.lacks.append(str(lack))
            self.groups = Groups(stack)
            self.lacks += self.groups.lacks.values()
            place = self.root / "disk" / "at"
            place.mkdir(parents=True)
            self._image = self.root / "disk" / "image"
            try:
                self.disk = stack.enter_context(SmallDisk(self._image, place, inodes=4096))
                self._power = Disk(self.root / "disk", "ext4")
            except Unavailable as lack:
                self.lacks.append(str(lack))
            self.place = place
            self.staging = place / "staging"
            self.staging.mkdir()
            world = stack.enter_context(peers(Forgetful))
            self.exchangers = [one for one in world.exchangers if isinstance(one, Forgetful)]
            self.scripts = [Script(), Script(rcpt=self.tempers)]
            for exchanger, script in zip(self.exchangers, self.scripts, strict=True):
                exchanger.script = script
            self.copies = world.copies
            spool, mail = place / "spool", place / "mail"
            self.site = world.site(
                self.root / "site", top={"spool": str(spool)}, local={"mail_root": str(mail)}, retry=RETRY
            )
            self.site.configure(processes={"stop_timeout": "2s"}, delivery=WAITS)
            self.site.spool_path, self.site.mail_root = spool, mail
            self.clock = Clock(self.root / "clock")
            self.site.prefix = [*self.groups.prefix(), *self.clock.prefix()]
            self.books = Books(self.root / "ledger")
            stack.callback(self.books.close)
            stack.callback(self._end)
            self.up()
            self.sync()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # A harm that is under way, when all ends before its time, is healed first, and none begins any more.
        for lock in (self.disk_lock, self.life_lock):
            lock.acquire(timeout=UP)
        self._stack.__exit__(kind, error, trace)

    def linger(self, connection: socket.socket) -> None:
        """A client that says nothing more, until all of them part."""
        self._lingering.append(connection)

    def part(self) -> None:
        """Close the connections of those."""
        while self._lingering:
            self._lingering.pop().close()

    # -- the disk -----------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """All that was written until now survives a power cut."""
        subprocess.run(["sync", "-f", str(self.place)], check=True, timeout=60)

    def power_cut(self, after: float) -> None:
        """Cut the power of the disk, kill all ``after`` so many seconds, and start again on what is there."""
        assert self._power is not None
        with self.disk_lock, self.life_lock:
            self._power.cut()
            time.sleep(after)
            self._end()
            self.books.cut()
            self._power.unmount()
            self._power.mount()
            for path in (self.place / "ballast").glob("*"):
                path.unlink()  # the cut may have undone the healing
            self.up()

    # -- the processes ------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Start it, again and again while it does not come up."""
        deadline = time.monotonic() + UP
        while True:
            try:
                return start(self.site, self._preload)
            except (AssertionError, MtadError, OSError):
                self._end()
                self.failed_starts += 1
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def one_of(self, role: str, chance: random.Random) -> int:
        """A process of that role; 0 when there is none now."""
        try:
            pids = self.site.deliveries() if role == "delivery" else self.site.pids(role)
        except AssertionError:
            return 0
        return chance.choice(pids) if pids else 0

    def kill_master(self) -> None:
        """SIGKILL, and a start."""
        with self.life_lock:
            self.books.died()
            self.site.kill()
            self.up()

    def stop(self) -> None:
        """SIGTERM, and a start; a stop that does not end is a fault."""
        with self.life_lock:
            process = self.site.process
            assert process is not None
            found = [process.pid]
            for pid in found:
                found.extend(children(pid))
            self.books.died()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP)
                self.site.process = None
                left = [pid for pid in found if alive(pid)]
                if left:
                    self.faults.append(f"the master is gone after SIGTERM, and these are not: {left}")
            except subprocess.TimeoutExpired:
                self.faults.append(f"no end within {_STOP:g} s of SIGTERM")
                self._end()
            self.up()

    def revive(self) -> None:
        """Start it if it has ended, which it may not have by itself."""
        process = self.site.process
        if process is not None and process.poll() is None:
            return
        self.faults.append(f"the master has ended by itself with {process.poll() if process else '?'}")
        self.site.process = None
        self.up()

    def bury(self) -> None:
        """Start it if its master was killed, which is no fault of it."""
        process = self.site.process
        if process is not None and process.poll() is not None:
            end(self.site)
            self.up()

    def reload(self) -> None:
        """SIGHUP."""
        with self.life_lock:
            assert self.site.process is not None
            self.books.died()
            self.site.process.send_signal(signal.SIGHUP)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No process of the server does anything meanwhile."""
        process = self.site.process
        assert process is not None
        os.killpg(process.pid, signal.SIGSTOP)
        try:
            await_value(lambda: all(_stopped(pid) for pid in self._family()), what="all processes stand still")
            yield
        finally:
            os.killpg(process.pid, signal.SIGCONT)

    def _family(self) -> list[int]:
        assert self.site.process is not None
        found = [self.site.process.pid]
        for pid in found:
            found.extend(children(pid))
        return found

    def _end(self) -> None:
        end(self.site)


def _stopped(pid: int) -> bool:
    """Whether a process stands still, or is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TtZX"
    except OSError:
        return True
