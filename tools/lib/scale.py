"""A server with a long queue: how fast it starts, what it remembers of each message, and whether a new one notices.

The queue is made of real queue files, written without flushes: it is the reading of them that is measured. Their
destination is dead, and their next attempt is far away.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import msgspec

from mtad.envelope import Envelope, Recipient
from mtad.outcome import Attempt, Deferred
from mtad.spool.queue_id import encode
from mtad.spool.queues import Queue, Spool
from tests.peers.dns import DnsServer
from tests.peers.mx import Mx, free_port
from tests.site import BIN, Site, await_value

#: The domain that answers, and the one that does not.
LIVE: Final = "live.test"
DEAD: Final = "dead.test"

_BODY: Final = b"From: a@example.org\r\nSubject: a long queue\r\n\r\nhello\r\n"
_WHY: Final = Deferred("4.4.1", "connect to mx.dead.test[127.0.0.9]:25: Connection refused", destination=True)


class Measured(msgspec.Struct):
    """The figures; seconds, and octets of memory."""

    messages: int
    start: float = 0.0
    """From the start of the scheduler until it has the whole queue on its agenda."""
    memory: float = 0.0
    """Of the scheduler, for each message in the queue: unique and proportional to what it shares (PSS)."""
    latency: tuple[float, ...] = ()
    """From the ``250`` of a new message to its arrival at the exchanger, in the order in which they were sent."""
    first_line: float = 0.0
    whole: float = 0.0
    """Until the first line of `mtaq`, and its last."""


def fill(spool: Spool, count: int, domain: str, *, queue: Queue = Queue.DEFERRED, due: float = 3600.0) -> None:
    """Put so many messages for a domain into a queue, tried once, due in so many seconds."""
    now = time.time()
    with patch("os.fsync"):
        for number in range(count):
            arrival = now - 600 + number * 1e-3
            queue_id = encode(int(arrival * 1e6), number % 50)
            recipients = (Recipient(f"b{number}@{domain}"),)
            entry = spool.enter(Envelope(queue_id, arrival, f"a{number}@example.org", recipients))
            entry.write(_BODY)
            entry.commit()
            if queue is not Queue.INCOMING:
                spool.claim(Queue.INCOMING, queue_id)
            if queue is Queue.DEFERRED:
                spool.append(Queue.ACTIVE, queue_id, Attempt(arrival, ((0, _WHY),)))
                spool.defer(queue_id, now + due + number % 600)


class Scale:
    """The site and its peers; a context manager."""

    def __init__(self, root: Path, **sections: Any) -> None:
        """``root`` is an empty directory; ``sections`` are settings, see `tests.site.Site`."""
        self.port = free_port(["127.0.0.8"])
        self._dns = DnsServer()
        self.mx = Mx("127.0.0.8", self.port)
        self.site = Site(root, dns=self._dns.address, port=self.port, **sections)
        for domain, address in ((LIVE, "127.0.0.8"), (DEAD, "127.0.0.9")):
            self._dns.set(domain, {"MX": [f"10 mx.{domain}."]})
            self._dns.set(f"mx.{domain}", {"A": [address], "AAAA": []})

    @contextmanager
    def peers(self) -> Iterator[None]:
        """The name server and the exchanger run."""
        with self._dns, self.mx:
            yield

    def spool(self) -> Spool:
        """Its spool, made if need be."""
        return Spool(str(self.site.spool_path), create=True)

    def scheduler(self) -> int:
        """The process id of the scheduler."""
        return await_value(lambda: self.site.pids("scheduler"), what="a scheduler")[0]

    def latency(self) -> float:
        """Seconds from the ``250`` of a new message to its arrival at the live exchanger."""
        before = len(self.mx.messages)
        client = self.site.client("relay")
        with client:
            client.ehlo()
            for command in ("MAIL FROM:<a@example.org>", f"RCPT TO:<b@{LIVE}>"):
                client.docmd(command)
            client.data(_BODY)
            taken = time.monotonic()
            await_value(lambda: len(self.mx.messages) > before, what="the new message arrives")
            return time.monotonic() - taken


def memory(pid: int) -> int:
    """Octets that a process has for itself, with its part of what it shares (PSS); of its parent's it shares most."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    found = re.search(r"^Pss_Anon: +(\d+) kB", text, re.M) or re.search(r"^Pss: +(\d+) kB", text, re.M)
    assert found is not None
    return int(found[1]) * 1024


def measure(root: Path, count: int, say: Callable[[str], None]) -> Measured:
    """Everything, for a queue of so many messages."""
    result = Measured(count)
    scale = Scale(root)
    with scale.peers():
        with scale.site:
            scale.latency()
            empty = memory(scale.scheduler())
        say(f"writing {count} messages into the queue")
        spool = scale.spool()
        fill(spool, count, DEAD)
        spool.close()
        say("starting")
        began = time.monotonic()
        with scale.site:
            pid = scale.scheduler()
            _await_calm(pid)
            result.start = time.monotonic() - began
            result.memory = (memory(pid) - empty) / count
            say("sending new messages")
            result.latency = tuple(scale.latency() for _ in range(20))
            say("listing")
            result.first_line, result.whole = _list(scale.site)
    return result


def _await_calm(pid: int) -> None:
    """Until a process has used no processor time for a tenth of a second: it has read what there was."""
    used = -1

    def calm() -> bool:
        nonlocal used
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        before, used = used, int(fields[11]) + int(fields[12])
        time.sleep(0.1)
        return used == before

    await_value(calm, timeout=600.0, what="the scheduler has read the queue")


def _list(site: Site) -> tuple[float, float]:
    began = time.monotonic()
    command = [str(BIN / "mtaq"), "-c", str(site.config_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first = time.monotonic() - began
        for _ in process.stdout:
            pass
    return first, time.monotonic() - began
