"""The master process: binds the sockets, forks the children, restarts, reloads, ends them. It delivers nothing.

It has one thread and one loop over its signals and its counter (`mtad status`). Signals: SIGTERM and SIGINT stop, SIGHUP
reloads, SIGCHLD reaps. A child that dies is replaced, after a pause that doubles as long as its place dies young.

A *generation* is a configuration and the children that run it. A reload checks the new configuration, binds what is new,
starts the new children and asks the old ones to finish: listeners drain, the scheduler gives the spool away at once.
Sockets whose address stays are kept, so no connection is refused meanwhile. A refused configuration changes nothing.

Errors: what keeps a server from starting is raised by `Master.prepare`, before anything is forked. After that nothing ends
the master but a stop. One that was killed takes its children with it; they let go of the sockets at once, and a successor
that finds the traces of such an end waits for that.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
from setproctitle import setproctitle

from mtad import VERSION, host, log
from mtad.child_place import ChildPlace
from mtad.config import Config
from mtad.control import ListenerStatus, ProcessStatus, Status, control_path, mailslot_path, socket_paths
from mtad.errors import ConfigError, MtadError, Problem
from mtad.listener.process import run_listener
from mtad.net.channels import Counter, Lifeline, Mailslot, WakePipe, notify
from mtad.net.listening import ListeningSocket, bind_all, close_all
from mtad.occupancy import Occupancy
from mtad.runtime import Runtime, load_passwords, load_tls, reloaded
from mtad.scheduler.process import run_scheduler
from mtad.signals import Signals, held_back, how_ended, let_through
from mtad.spool.queues import MASTER_LOCK, Spool
from mtad.throttle import Throttle
from mtad.users import Users

#: Seconds over the limit that children have to end by themselves before they are killed.
_GRACE: Final = 3.0
#: Seconds that the children of a master that was killed have to let go of its sockets.
_SUCCESSION: Final = 3.0


class Master:
    """One server from start to end; see the module."""

    def __init__(self, config: Config, source: str, reread: Callable[[], Config]) -> None:
        """``source`` names where the configuration comes from, ``reread`` reads and checks it again for a reload."""
        self._config = config
        self._source = source
        self._reread = reread
        self._started = time.time()
        self._places: list[ChildPlace] = []
        self._draining: dict[int, str] = {}
        self._rows: dict[int, int] = {}
        self._stopping = False
        self._reloads = 0
        self._reload_fault = ""

    # -- start --------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Everything that can fail: sockets, privileges, log, spool, locks, pid file. Nothing is forked yet.

        Raises:
            ConfigError: a setting cannot be honoured on this machine.
            SpoolBusy: another server uses this spool.
            OSError, MtadError: the world's, named.
        """
        config = self._config
        host.share_one_heap()
        host.raise_descriptor_limit()
        account = host.account(config)
        if account is not None:
            for path in (config.spool, os.path.dirname(config.pid_file), config.local.mail_root):
                host.make_directory(path, account)
        killed = os.path.exists(control_path(config.spool))
        sockets = _bind(config, (), _SUCCESSION if killed else 0.0)
        if account is not None:
            host.drop_privileges(account)
        log.setup(config.log.to, config.log.format, "master")
        self._spool = Spool(config.spool, create=True)
        self._lock = self._spool.lock(MASTER_LOCK)
        users = self._load_users(config)
        tls = load_tls(config)
        host.adopt_orphans()
        self._signals = Signals({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD})
        self._counter = Counter(control_path(config.spool))
        self._runtime = Runtime(
            config=config,
            users=users,
            tls=tls,
            passwords=load_passwords(config),
            throttle=Throttle(os.urandom(16), config.limits.wrong_passwords),
            sockets=sockets,
            occupancy=Occupancy(os.urandom(16)),
            lifeline=Lifeline(),
            wake=WakePipe(),
            mailslot=Mailslot(mailslot_path(config.spool)),
        )
        self._spool.wake = self._runtime.wake.send
        host.write_pid_file(config.pid_file)

    def run(self, ready: Callable[[], None]) -> None:
        """Fork the children, call ``ready``, and serve until a stop."""
        setproctitle("mtad: master")
        self._open_places()
        self._fill_places()
        log.info(f"started -- version {VERSION}, configuration {self._source}")
        ready()
        notify("READY=1")
        poll = select.poll()
        poll.register(self._signals.fileno(), select.POLLIN)
        poll.register(self._counter.fileno(), select.POLLIN)
        while not self._stopping:
            for fd, _ in poll.poll(self._milliseconds()):
                if fd == self._counter.fileno():
                    self._counter.answer(msgspec.json.encode(self.status()))
                else:
                    self._on_signals(self._signals.take())
            self._reap()
            self._fill_places()
        self._stop()

    def status(self) -> Status:
        """What `mtad status` shows."""
        runtime = self._runtime
        listeners = tuple(
            ListenerStatus(
                listener.name,
                listener.service,
                tuple(socket.bound for index, socket in runtime.sockets if index == number),
            )
            for number, listener in enumerate(runtime.config.listener)
        )
        processes = tuple(
            ProcessStatus(
                place.role,
                place.pid,
                place.started,
                runtime.occupancy.sessions(place.row) if place.row >= 0 else 0,
                place.deaths,
            )
            for place in self._places
        )
        return Status(
            version=VERSION,
            pid=os.getpid(),
            started=self._started,
            config=self._source,
            hostname=runtime.config.hostname,
            spool=runtime.config.spool,
            sessions=runtime.occupancy.total(),
            listeners=listeners,
            processes=processes,
            draining=len(self._draining),
            reloads=self._reloads,
            reload_fault=self._reload_fault,
        )

    # -- children -----------------------------------------------------------------------------------------------------

    def _open_places(self) -> None:
        config = self._runtime.config
        self._places = [ChildPlace("scheduler")]
        self._places += [
            ChildPlace("listener", self._runtime.occupancy.assign()) for _ in range(config.processes.listeners)
        ]

    def _fill_places(self) -> None:
        for place in self._places:
            if place.due():
                self._fork(place)

    def _fork(self, place: ChildPlace) -> None:
        with held_back():
            try:
                pid = os.fork()
            except OSError as fault:
                place.wait(young=True)
                log.warning(f"cannot start a {place.role}, trying again in {place.pause:g} s: {fault.strerror}")
                return
            if pid == 0:
                self._become_child(place)
        place.filled(pid)
        if place.row >= 0:
            self._rows[pid] = place.row

    def _become_child(self, place: ChildPlace) -> None:
        """In the child: what it does until its end. Does not return."""
        code = 70  # EX_SOFTWARE
        try:
            wanted = {signal.SIGTERM, signal.SIGUSR1} if place.role == "scheduler" else {signal.SIGTERM}
            signals = Signals(wanted)
            let_through()
            self._signals.close()
            self._runtime.lifeline.hold()
            self._counter.close()
            os.close(self._lock)
            if place.role == "scheduler":
                setproctitle("mtad: scheduler")
                log.become("qmgr")
                for _, socket in self._runtime.sockets:
                    socket.close()
                run_scheduler(self._runtime, self._spool, signals)
            else:
                run_listener(self._runtime, place.row, self._spool, signals)
            code = 0
        except BaseException as bug:
            log.panic(f"{place.role} ends", bug)
        finally:
            os._exit(code)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._buried(pid, os.waitstatus_to_exitcode(status))

    def _buried(self, pid: int, code: int) -> None:
        row = self._rows.pop(pid, None)
        if self._draining.pop(pid, None) is not None:
            if row is not None:
                self._runtime.occupancy.clear(row)
            return
        for place in self._places:
            if place.pid == pid:
                break
        else:
            return
        place.pid = 0
        if row is not None:
            self._runtime.occupancy.clear(row)
            place.row = self._runtime.occupancy.assign()
        if self._stopping:
            return
        place.died()
        log.warning(f"{place.role} process {pid} {how_ended(code)}; the next one starts in {place.pause:g} s")

    def _milliseconds(self) -> int | None:
        times = [place.not_before for place in self._places if not place.pid]
        if not times:
            return None
        return max(0, int((min(times) - time.monotonic()) * 1000) + 1)

    # -- signals ------------------------------------------------------------------------------------------------------

    def _on_signals(self, seen: set[signal.Signals]) -> None:
        if signal.SIGTERM in seen or signal.SIGINT in seen:
            self._stopping = True
        elif signal.SIGHUP in seen:
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            self._reload()
            self._reloads += 1
            notify("READY=1")

    def _reload(self) -> None:
        old = self._runtime
        before = [socket for _, socket in old.sockets]
        sockets = old.sockets
        try:
            config = self._reread()
            _unchangeable(old.config, config, self._source)
            if config.processes.listeners > old.occupancy.free:
                raise MtadError(f"{len(self._draining)} processes of earlier reloads still finish their work")
            users = self._load_users(config)
            sockets = _bind(config, [(old.config.listener[index].name, socket) for index, socket in old.sockets])
            runtime = reloaded(old, config, users, sockets)
            log.setup(config.log.to, config.log.format, "master")
        except (MtadError, OSError) as fault:
            close_all([socket for _, socket in sockets], keep=before)
            self._reload_fault = host.words(fault)
            for line in self._reload_fault.splitlines():
                log.warning(f"reload refused, the old configuration stays: {line}")
            return
        except Exception as bug:  # whatever is in the files that were read: who is served must not suffer from it
            close_all([socket for _, socket in sockets], keep=before)
            self._reload_fault = f"internal error: {type(bug).__name__}"
            log.panic("reload refused, the old configuration stays", bug)
            return
        self._reload_fault = ""
        self._runtime = runtime
        leaving = self._places
        self._open_places()
        for place in leaving:
            if place.pid:
                self._draining[place.pid] = place.role
                _signal(place.pid, signal.SIGUSR1 if place.role == "scheduler" else signal.SIGTERM)
            elif place.row >= 0:  # its process has died, and the next one will not be started
                old.occupancy.clear(place.row)
        close_all(before, keep=[socket for _, socket in sockets])  # before a new child can inherit what nobody serves
        self._fill_places()
        log.info("reloaded")

    def _load_users(self, config: Config) -> Users:
        return Users.load(
            config.local.users,
            config.local.domains,
            config.local.postmaster,
            fallback=config.development,
            warn=log.warning,
        )

    # -- stop ---------------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        notify("STOPPING=1")
        log.info("stopping")
        close_all(socket for _, socket in self._runtime.sockets)
        deadline = time.monotonic() + self._runtime.config.processes.stop_timeout + _GRACE
        for pid in self._children():
            _signal(pid, signal.SIGTERM)
        poll = select.poll()
        poll.register(self._signals.fileno(), select.POLLIN)
        while self._children():
            left = deadline - time.monotonic()
            if left <= 0:
                for pid in self._children():
                    log.warning(f"process {pid} did not end in time and is killed")
                    _signal(pid, signal.SIGKILL)
                deadline = time.monotonic() + _GRACE
            poll.poll(max(1, min(1000, int(left * 1000))))
            self._signals.take()
            self._reap()
        self._counter.close()
        for path in (*socket_paths(self._config.spool), self._config.pid_file):
            try:
                os.unlink(path)
            except OSError:
                pass  # somebody tidied up already
        log.info("stopped")

    def _children(self) -> list[int]:
        """All living children, also deliveries whose scheduler was killed: they became ours (`mtad.host.adopt_orphans`)."""
        known = {place.pid for place in self._places if place.pid} | self._draining.keys()
        return sorted(known | set(host.children()))


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _bind(
    config: Config, bound: Iterable[tuple[str, ListeningSocket]], patience: float = 0.0
) -> tuple[tuple[int, ListeningSocket], ...]:
    """The sockets of all listeners, each with the index of its table; see `bind_all`."""
    wanted = [
        (index, (listener.name, address, listener.interface))
        for index, listener in enumerate(config.listener)
        for address in listener.address
    ]
    sockets = bind_all([place for _, place in wanted], bound, patience)
    return tuple((index, socket) for (index, _), socket in zip(wanted, sockets, strict=True))


def _unchangeable(old: Config, new: Config, source: str) -> None:
    """What a reload cannot change, since it belongs to the master.

    Raises:
        ConfigError: such a setting has changed.
    """
    problems = [
        Problem(source, None, key, f"cannot be changed by a reload (now {before!r}, wanted {after!r}); restart instead")
        for key, before, after in (
            ("spool", old.spool, new.spool),
            ("user", old.user, new.user),
            ("pid_file", old.pid_file, new.pid_file),
        )
        if before != after
    ]
    if problems:
        raise ConfigError(problems)
