"""Clients of a flood, and somebody who only wants to send a message meanwhile.

What it is for: a `Crowd` is as many connections as one likes, without a thread for each; a `Bystander` sends one message
after the other and writes down how long each took from the connect until it lay in the mailbox. `memory` is what processes
really use.
"""

from __future__ import annotations

import re
import resource
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.client import Client
from tests.site import Site

#: Addresses on loopback from which a crowd comes: so many that the ports of each suffice.
_SOURCES: Final = 200
#: Seconds between two messages of a bystander.
_PAUSE: Final = 0.1


def memory(pids: Iterable[int]) -> int:
    """KiB that processes use, with what they share divided among them (PSS)."""
    total = 0
    for pid in pids:
        match = re.search(r"^Pss: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        total += int(match[1]) if match is not None else 0
    return total


def descriptors_for(connections: int) -> str:
    """Let this process, and those it starts, have so many connections; why not, or ""."""
    # A listener needs two for each, and of two listeners none gets more than three quarters of them.
    wanted = connections * 3 // 2 + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard) or soft >= wanted:
        return ""
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
    except (ValueError, OSError):
        return f"{wanted} open files are needed (ulimit -Hn), and {hard} are allowed"
    return ""


class Crowd:
    """Connections; a context manager that closes them."""

    def __init__(self) -> None:
        """Nobody yet."""
        self.sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for connection in self.sockets:
            connection.close()

    def join(self, address: tuple[str, int], count: int) -> list[bytes]:
        """So many more; what each is greeted with."""
        new = []
        for _ in range(count):
            number = len(self.sockets) % _SOURCES
            connection = socket.create_connection(address, 60, (f"127.0.1.{number + 1}", 0))
            self.sockets.append(connection)
            new.append(connection)
        return [self._hear(connection) for connection in new]

    def say(self, line: bytes) -> list[bytes]:
        """All of them say it; what each hears."""
        for connection in self.sockets:
            try:
                connection.sendall(line)
            except ConnectionError:
                pass  # which is then heard
        return [self._hear(connection) for connection in self.sockets]

    def farewells(self, seconds: float) -> list[bytes]:
        """The last words of the server to those whose connections it closes within that time; they leave the crowd."""
        words = []
        deadline = time.monotonic() + seconds
        poll = select.poll()
        by_fd = {connection.fileno(): connection for connection in self.sockets}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while by_fd and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                poll.unregister(fd)
                connection = by_fd.pop(fd)
                words.append(self._hear(connection))
                self.sockets.remove(connection)
                connection.close()
        return words

    @staticmethod
    def _hear(connection: socket.socket) -> bytes:
        try:
            return connection.recv(4096)
        except ConnectionError:
            return b""


class Bystander(threading.Thread):
    """Somebody who sends messages, one after the other, from when it is started until `stop`."""

    def __init__(self, site: Site, listener: str = "inbound") -> None:
        """Of a site that delivers."""
        super().__init__(daemon=True)
        self._site = site
        self._address = site.address(listener)
        self._over = threading.Event()
        #: Seconds of each message from the connect until it was in the mailbox.
        self.took: list[float] = []
        #: What went wrong.
        self.faults: list[str] = []

    def run(self) -> None:
        """In the thread."""
        while not self._over.is_set():
            try:
                self.took.append(send_one(self._site, self._address))
            except (AssertionError, OSError) as fault:
                self.faults.append(str(fault))
            self._over.wait(_PAUSE)

    def stop(self) -> None:
        """Send no more; wait for the last one."""
        self._over.set()
        self.join(120)


def send_one(site: Site, address: tuple[str, int]) -> float:
    """Send a message; the seconds from the connect until it lies in the mailbox.

    Raises:
        AssertionError: it was refused, or did not come.
    """
    start = time.monotonic()
    with Client(address, source="127.0.2.1", timeout=60) as client:
        client.begin("EHLO bystander.test", "MAIL FROM:<a@sender.test>", "RCPT TO:<bob@example.org>", "DATA")
        client.send(b"Subject: what of us\r\n\r\nx\r\n.\r\n")
        answer = client.reply()
        assert answer.startswith("250 "), answer
        queue_id = answer.rpartition(" ")[2]
    new = site.mail_root / "bob" / "new"
    while time.monotonic() - start < 60:
        for path in new.iterdir() if new.is_dir() else ():
            if queue_id.encode() in path.read_bytes():
                path.unlink()
                return time.monotonic() - start
        time.sleep(0.005)
    raise AssertionError(f"{queue_id} was not delivered within a minute")


@contextmanager
def bystander(site: Site, listener: str = "inbound") -> Iterator[Bystander]:
    """One who stops at the end."""
    thread = Bystander(site, listener)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()


def exceptions(said: Sequence[bytes], expected: bytes) -> str:
    """How many heard something else, and what the first of them heard; "" when nobody did."""
    others = [words for words in said if not words.startswith(expected)]
    return f"{len(others)} of {len(said)} heard {others[0]!r}" if others else ""
