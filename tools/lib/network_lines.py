"""Bad lines: two network namespaces with a wire between them, of which much is lost, or which is slow, or is cut.

mtad is in one of them; its clients and an exchanger for all domains are in the other. What a `Line` does is done in both
directions. A thread that is `inside` a namespace, and each that it starts, has its sockets there; all else stays as it was.
It needs root, `ip`, and for what it does `nft` or `tc`.

Errors: `Unavailable` says what is missing. Namespaces, and what is in them, are gone when their context ends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from tests.peers.dns import DnsServer
from tests.peers.mx import Mx, Script
from tests.site import Site
from tools.lib.crash_finds import at_exchanger, in_maildirs, in_spool
from tools.lib.crash_load import DOMAIN, SENDERS, USERS, Client, Ledger, Moods
from tools.lib.crash_run import drain
from tools.lib.crash_verdict import Verdict, doubts, judge
from tools.lib.network_world import LogWatch
from tools.lib.sweeps import Unavailable

#: Seconds: every time-out of the server over a bad line, and what it may take on top of it.
DEADLINE: Final = 8.0
ALLOWANCE: Final = 3.0
#: Mean seconds between two messages of a client.
_CLIENT_PAUSE: Final = 0.2
#: Seconds for the queue to drain over a line that is good again.
_DRAIN: Final = 60.0
#: RFC 2544's addresses for tests of lines; nobody else has them.
_HERE: Final = "198.18.0.1"
_THERE: Final = "198.18.0.2"
_PORT: Final = 2525

_CLONE_NEWNET: Final = 0x40000000
#: In /proc/net/tcp: established, and closed by the other side only.
_ALIVE: Final = frozenset({"01", "08"})


class Bad(msgspec.Struct, frozen=True):
    """One way for a line to be bad: what makes it so, and which program that takes; a command of tc, or a rule of nft."""

    program: str
    command: str
    clients: int = 0
    """How many are served over it at a time, and do not wait for too long."""


BAD: Final[Mapping[str, Bad]] = {
    "30 % loss": Bad("nft", "numgen random mod 100 < 30 drop", 20),
    "256 kbit/s": Bad("tc", "tc qdisc add dev {device} root tbf rate 256kbit burst 4kb latency 300ms", 6),
}
_CUT: Final = Bad("nft", "drop")


class Line:
    """The wire; `line` makes one."""

    def __init__(self, names: tuple[str, str]) -> None:
        """``names`` of the namespaces, mtad's first."""
        self.names = names

    @contextmanager
    def bad(self, how: Bad, table: str = "bad") -> Iterator[None]:
        """Make it bad for a while; ``table`` is a name for that."""
        for name in self.names:
            if how.program == "nft":
                rules = (
                    f"table ip {table} {{\n chain input {{\n  type filter hook input priority 0;\n"
                    f"  iifname {_device(name)} {how.command}\n }}\n}}\n"
                )
                _do("ip", "netns", "exec", name, "nft", "-f", "-", text=rules)
            else:
                _do("ip", "netns", "exec", name, *how.command.format(device=_device(name)).split())
        try:
            yield
        finally:
            for name in self.names:
                heal = ["nft", "delete", "table", "ip", table]
                if how.program == "tc":
                    heal = ["tc", "qdisc", "del", "dev", _device(name), "root"]
                _do("ip", "netns", "exec", name, *heal)


def _device(name: str) -> str:
    return f"v{name.removeprefix('mtad-')}"


def _do(*command: str, text: str = "") -> None:
    """Run a command of the administrator's.

    Raises:
        Unavailable: there is no such program, or it is not allowed here.
    """
    if shutil.which(command[0]) is None:
        raise Unavailable(f"there is no {command[0]}")
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip().splitlines()[:1]}")


@contextmanager
def line() -> Iterator[Line]:
    """Make a wire between two new namespaces.

    Raises:
        Unavailable: that cannot be done here.
    """
    names = (f"mtad-{os.getpid()}a", f"mtad-{os.getpid()}b")
    made: list[str] = []
    try:
        for name in names:
            _do("ip", "netns", "add", name)
            made.append(name)
        first, second = names
        ends = _device(first), _device(second)
        _do("ip", "link", "add", ends[0], "netns", first, "type", "veth", "peer", "name", ends[1], "netns", second)
        for name, address in zip(names, (_HERE, _THERE), strict=True):
            _do("ip", "-n", name, "address", "add", f"{address}/24", "dev", _device(name))
            for device in ("lo", _device(name)):
                _do("ip", "-n", name, "link", "set", device, "up")
        yield Line(names)
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30, check=False)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Be in a namespace: this thread, with the sockets that it makes meanwhile and the threads that it starts."""
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(there)
        try:
            yield
        finally:
            _enter(here)
    finally:
        os.close(here)
        os.close(there)


def _enter(namespace: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Outcome(msgspec.Struct, frozen=True):
    """What came of a load over a bad line."""

    verdict: Verdict
    sent: int
    """Messages that clients tried to send."""
    faults: tuple[str, ...]
    released: float
    """Seconds until the last connection was given up, after the line was cut altogether."""


def load(
    root: Path, seed: int, how: str, seconds: float, *, deadline: float = DEADLINE, allowance: float = ALLOWANCE
) -> Outcome:
    """Send over a line that is bad as ``how`` in `BAD` says, for so long; then cut it, look, heal it, drain, and judge.

    Each time-out of the server is ``deadline`` seconds, and it may be late by ``allowance``.

    Raises:
        AssertionError: the server does not start or does not stop.
        Unavailable: this machine lacks a right or a program.
    """
    for program in ("ip", "nft", BAD[how].program):
        if shutil.which(program) is None:
            raise Unavailable(f"there is no {program}")
    root.mkdir()
    with ExitStack() as stack:
        wire = stack.enter_context(line())
        here, there = wire.names
        with inside(there):
            exchanger = stack.enter_context(Mx(_THERE, _PORT, Script(rcpt=Moods())))
        stack.enter_context(inside(here))  # and so is the server that is started here
        dns = stack.enter_context(DnsServer({}))
        ledger = Ledger(root / "ledger")
        stack.callback(ledger.close)
        site = _site(root, dns.address, deadline)
        try:
            with LogWatch(site.log_path) as log:
                released, faults = _send(site, wire, ledger, seed, how, seconds, deadline + allowance)
                stuck = drain(site, _DRAIN)
                site.stop()
        finally:
            if site.process is not None:
                site.stop()
    copies = [*in_maildirs(site.mail_root), *in_spool(site.spool_path), *at_exchanger(exchanger.messages)]
    verdict = judge(ledger.messages(), copies, doubts(site.log()) + log.doubts, stuck)
    faults += [f"{how}: {text}" for text in verdict.broken()]
    if "panic" in site.log():
        faults.append(f"{how}: the log has a panic")
    return Outcome(verdict, len(ledger.messages()), tuple(faults), released)


def _send(
    site: Site, wire: Line, ledger: Ledger, seed: int, how: str, seconds: float, limit: float
) -> tuple[float, list[str]]:
    """Load over the line while it is bad, and cut at the end; how long connections were held then, and what was wrong."""
    site.start()
    stop = threading.Event()
    clients = [
        Client(number, seed, ledger, lambda: (_HERE, _PORT), stop, _CLIENT_PAUSE) for number in range(BAD[how].clients)
    ]
    faults: list[str] = []
    with wire.bad(BAD[how]):
        with inside(wire.names[1]):
            for client in clients:
                client.start()
        time.sleep(seconds)
        with wire.bad(_CUT, "cut"):
            stop.set()
            released = _await_released(site, limit)
            if released > limit:
                faults.append(f"{how}: connections are held {released:.0f} s after the line was cut")
    for client in clients:
        client.join(60)
    return released, faults


def _await_released(site: Site, limit: float) -> float:
    """Wait until no connection is held over a line that is cut; seconds that it took, or a little more than ``limit``."""
    master = site.processes()[0]
    began = time.monotonic()
    while (took := time.monotonic() - began) <= limit and _connections(master):
        time.sleep(0.05)
    return took


def _connections(pid: int) -> int:
    """Connections in the namespace of a process that came about, did not end there, and are somebody's."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return sum(1 for row in rows if row[3] in _ALIVE and row[9] != "0")


def _site(root: Path, dns: str, deadline: float) -> Site:
    time_out = f"{deadline:g}s"
    phases = ("helo", "mail", "rcpt", "data_init", "data_xfer", "data_done", "rset", "connect")
    listener = {"name": "relay", "service": "relay", "address": [f"{_HERE}:{_PORT}"], "trusted": [f"{_THERE}/32"]}
    return Site(
        root / "site",
        dns=dns,
        users=(*USERS, *SENDERS),
        listeners=[listener],
        limits={"command_timeout": time_out, "data_window": time_out},
        delivery={f"{phase}_timeout": time_out for phase in phases} | {"next_hop": f"[{_THERE}]:{_PORT}", "tls": "none"},
        retry={"minimum": "1s", "destination_pause": "1s"},
        local={"domains": [DOMAIN]},
    )
