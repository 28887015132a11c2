"""How fast a server relays: messages a second, and processor time a message, in runs that alternate between servers.

A run: smtp-source sends, the server takes each message and relays it to smtp-sink. The clock runs from right before the
first connection until the sink has received all and the server's queue is empty. The processor time is that of the whole
machine in the same interval, less what the generator, the sink and this program used: so the kernel's work for the server
counts, wherever it is done, and so does everything else that the machine does. Both servers therefore run in turn, in
pairs close together, and what is to be trusted is the ratio within the pairs.

Errors: `BenchFailed` when a message did not arrive, with what was there instead.
"""

from __future__ import annotations

import os
import re
import resource
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

import msgspec

from tools.lib import cpu

#: Seconds between two looks at the sink's counter.
_LOOK: Final = 0.01
#: Seconds without any progress after which a run has failed.
_PATIENCE: Final = 60.0
_COUNT: Final = re.compile(rb"mesg=(\d+)\r")


class BenchFailed(Exception):
    """A run did not come to its end; the text is for people."""


class Server(Protocol):
    """A server under test, started before its runs and stopped after them."""

    name: str

    def start(self) -> None:
        """Start it; it relays to the sink and logs to a file."""

    def stop(self) -> None:
        """Stop it; nothing of it is left."""

    @property
    def port(self) -> int:
        """Where it takes mail, on 127.0.0.1."""

    def pids(self) -> list[int]:
        """Its main process."""

    def empty(self) -> bool:
        """Whether nothing is in its queue."""


class Load(msgspec.Struct, frozen=True):
    """What is sent in a run: messages of so many octets, over so many connections at a time."""

    messages: int = 3000
    size: int = 4096
    sessions: int = 20
    keep: bool = False
    """Send all of a session's messages over one connection; else each message has its own."""


class Run(msgspec.Struct, frozen=True):
    """What a run took: seconds of time; processor seconds of the machine, and of the server's processes alone."""

    server: str
    messages: int
    seconds: float
    busy: float
    own: float

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.messages / self.seconds

    @property
    def cost(self) -> float:
        """Milliseconds of processor time for a message."""
        return 1000 * self.busy / self.messages

    @property
    def own_cost(self) -> float:
        """The same, of the server's processes alone."""
        return 1000 * self.own / self.messages


class Spread(msgspec.Struct, frozen=True):
    """A median, and between what the values lie."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


class Summary(msgspec.Struct, frozen=True):
    """The medians of each server, and the ratios within the pairs, first server to second; None without a second."""

    rate: dict[str, float]
    cost: dict[str, float]
    own_cost: dict[str, float]
    rate_ratio: Spread | None = None
    cost_ratio: Spread | None = None
    own_cost_ratio: Spread | None = None


class Sink:
    """smtp-sink, and how many messages it has received."""

    def __init__(self, port: int, output: Path) -> None:
        """Where it listens; ``output`` is where it counts."""
        self.port = port
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    @contextmanager
    def running(self) -> Iterator[Sink]:
        """Run it for the length of a ``with`` block."""
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        with self._output.open("wb") as output:
            command = [program("smtp-sink"), *user, "-c", "-m", "1000", f"127.0.0.1:{self.port}", "1000"]
            self._process = subprocess.Popen(command, stdout=output, stdin=subprocess.DEVNULL)
        try:
            self._await()
            yield self
        finally:
            self._process.terminate()
            self._process.wait()

    def _await(self) -> None:
        """Wait until it listens: a server that finds nobody there would leave the destination alone for a while."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                assert self._process is not None
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise BenchFailed("smtp-sink does not start") from None
                time.sleep(_LOOK)

    def count(self) -> int:
        """Messages so far.

        Raises:
            BenchFailed: it has died.
        """
        if self._process is None or self._process.poll() is not None:
            raise BenchFailed("smtp-sink has ended")
        with self._output.open("rb") as output:
            output.seek(max(0, output.seek(0, os.SEEK_END) - 256))
            return parse_count(output.read())


def parse_count(tail: bytes) -> int:
    """How many messages the sink has counted, from the end of its output, which may be cut anywhere."""
    counts = _COUNT.findall(tail)
    return int(counts[-1]) if counts else 0


def program(name: str) -> str:
    """The path of one of Postfix's programs.

    Raises:
        BenchFailed: it is not installed.
    """
    for directory in [*os.get_exec_path(), "/usr/sbin", "/usr/local/sbin"]:
        path = os.path.join(directory, name)
        if os.access(path, os.X_OK):
            return path
    raise BenchFailed(f"{name} is not installed; on Debian it comes with the package postfix")


def run(server: Server, sink: Sink, load: Load) -> Run:
    """Send a load through a server.

    Raises:
        BenchFailed: the generator failed, or not all messages arrived.
    """
    command = [program("smtp-source"), "-4", "-s", str(load.sessions), "-m", str(load.messages), "-l", str(load.size)]
    command += ["-d"] if load.keep else []
    command += ["-M", "source.test", "-f", "sender@source.test", "-t", "recipient@sink.test", f"127.0.0.1:{server.port}"]
    expected = sink.count() + load.messages
    roots = server.pids()
    tools_before = _tools(sink)
    own, busy, started = cpu.tree(roots), cpu.machine(), time.monotonic()
    source = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
    if source.returncode != 0:
        raise BenchFailed(f"smtp-source failed at {server.name} with {source.returncode}")
    _await(sink.count, expected, server.name)
    while not server.empty():
        if time.monotonic() - started > _PATIENCE * 10:
            raise BenchFailed(f"the queue of {server.name} does not become empty")
        time.sleep(_LOOK)
    seconds, busy, own = time.monotonic() - started, cpu.machine() - busy, cpu.tree(roots) - own
    return Run(server.name, load.messages, seconds, busy - (_tools(sink) - tools_before), own)


def _await(count: Callable[[], int], expected: int, name: str) -> None:
    last, changed = -1, time.monotonic()
    while (now := count()) < expected:
        if now != last:
            last, changed = now, time.monotonic()
        elif time.monotonic() - changed > _PATIENCE:
            raise BenchFailed(f"{expected - now} messages did not come through {name}")
        time.sleep(_LOOK)


def _tools(sink: Sink) -> float:
    """Processor seconds of the sink, of the generators that have ended, and of this process."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return cpu.process(sink.pid)[0] + sum(usage.ru_utime + usage.ru_stime for usage in usages)


def summarise(runs: Sequence[Run]) -> Summary:
    """Medians and ratios of runs that alternate between one or two servers."""
    names = list(dict.fromkeys(one.server for one in runs))
    by_server = [[one for one in runs if one.server == name] for name in names]
    ratios: list[Spread | None] = [None, None, None]
    if len(names) == 2:
        pairs = list(zip(*by_server, strict=False))
        ratios = [
            Spread.of([first.rate / second.rate for first, second in pairs]),
            Spread.of([first.cost / second.cost for first, second in pairs]),
            Spread.of([first.own_cost / max(second.own_cost, 1e-9) for first, second in pairs]),
        ]
    named = list(zip(names, by_server, strict=True))
    return Summary(
        {name: statistics.median(one.rate for one in group) for name, group in named},
        {name: statistics.median(one.cost for one in group) for name, group in named},
        {name: statistics.median(one.own_cost for one in group) for name, group in named},
        *ratios,
    )


HEADING: Final = f"{'server':10} {'messages/s':>11} {'ms CPU/message':>15} {'own processes':>14}"


def row(name: str, rate: float, cost: float, own_cost: float) -> str:
    """One line of the table."""
    return f"{name:10} {rate:11.0f} {cost:15.2f} {own_cost:14.2f}"


def conclusion(summary: Summary) -> Iterator[str]:
    """The lines below the runs."""
    yield "medians"
    for name in summary.rate:
        yield row(name, summary.rate[name], summary.cost[name], summary.own_cost[name])
    if summary.rate_ratio is not None:
        first, second = summary.rate
        yield f"{first} / {second}, median of the pairs (least to most)"
        yield f"  messages a second        {summary.rate_ratio}"
        yield f"  CPU a message            {summary.cost_ratio}"
        yield f"  CPU of own processes     {summary.own_cost_ratio}"
