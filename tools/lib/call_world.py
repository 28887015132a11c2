"""A small world for faults at single system calls: one server, two mail exchangers, and a load that repeats itself.

A server with one listener, one scheduler and one delivery process gets one message after another, each of a `Kind`, and
each only when the one before has left the queue. So the calls of a process come in the same order again and again, and
"the Nth" means something. What became of the mail is judged after each fault (`CallWorld.judge`), with the queue drained.

The kinds together take every way that a message can take: into a mailbox that is not there yet; in several pieces, to an
exchanger and into a mailbox; deferred and tried again; failed, and reported to its sender.
"""

from __future__ import annotations

import os
import random
import signal
import smtplib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import msgspec

from mtad.control import ask_status
from mtad.envelope import Envelope, Recipient
from mtad.spool.queues import Spool
from tests.peers.dns import DnsServer
from tests.peers.mx import Mx, Script, free_port
from tests.site import DOMAIN, Site, await_value
from tools.lib import sweep_server
from tools.lib.crash_finds import at_exchanger, in_maildirs
from tools.lib.crash_load import MOODY, STEADY, Moods
from tools.lib.crash_verdict import ID_FIELD, Copy, Sent, Verdict, digest, doubts, judge

Role = Literal["listener", "scheduler", "delivery", "master"]
ROLES: Final[tuple[Role, ...]] = ("listener", "scheduler", "delivery", "master")
Kind = Literal["local", "big", "later", "never"]
KINDS: Final[tuple[Kind, ...]] = ("local", "big", "later", "never")

#: Seconds for the queue to drain after a fault.
DRAIN_TIMEOUT: Final = 20.0
#: Seconds for a client to get an answer.
_TIMEOUT: Final = 10.0
#: How many mailboxes there are; each message of the kind "local" goes to another one.
_USERS: Final = 1000
_SENDER: Final = f"sender@{DOMAIN}"
_PROBE: Final = "probe"
_STEADY_ADDRESS: Final = "127.0.0.23"
_MOODY_ADDRESS: Final = "127.0.0.24"
#: A command that waits for a line in a FIFO before it becomes another one.
_GATE: Final = ("sh", "-c", 'read -r _ < "$0"; exec "$@"')


class Reply(msgspec.Struct, frozen=True):
    """What a client got for a message: code 0 when the connection ended instead."""

    code: int
    text: str = ""


class CallWorld:
    """The world; a context manager. The server runs only between `start` and `stop`."""

    def __init__(self, root: Path, broken: str = "-") -> None:
        """``broken``: see `tools.lib.sweep_server`."""
        self._port = free_port([_STEADY_ADDRESS, _MOODY_ADDRESS])
        zones = {
            STEADY: {"MX": ["10 mx.steady.test."]},
            "mx.steady.test": {"A": [_STEADY_ADDRESS]},
            MOODY: {"MX": ["10 mx.moody.test."]},
            "mx.moody.test": {"A": [_MOODY_ADDRESS]},
        }
        self._dns = DnsServer(zones)
        self._exchangers = (
            Mx(_STEADY_ADDRESS, self._port),
            Mx(_MOODY_ADDRESS, self._port, Script(rcpt=Moods())),
        )
        self._taken = [0, 0]
        self._root = root
        self._broken = broken
        self._sent: dict[str, Sent] = {}
        self._names = 0
        self._log_read = 0
        self._address = ("127.0.0.1", 9)
        self.replies: list[Reply] = []
        """Of the messages since the last judgement."""

    def __enter__(self) -> Self:
        self._dns.__enter__()
        for exchanger in self._exchangers:
            exchanger.__enter__()
        self.site = Site(
            self._root / "site",
            dns=self._dns.address,
            port=self._port,
            users=("root", "sender", _PROBE, *(f"u{number}" for number in range(_USERS))),
            listeners=[{"name": "relay", "service": "relay", "address": ["127.0.0.1:0"]}],
            processes={"listeners": 1},
            delivery={"processes": 1},
            retry={"minimum": "100ms", "destination_pause": "100ms"},
        )
        self.site.prefix = [sys.executable, sweep_server.__file__, self._broken]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self.site.process is not None:
                if self.site.process.poll() is None:
                    self.site.process.send_signal(signal.SIGCONT)
                    self.site.stop()
                else:
                    self.site.process.wait()
        finally:
            for exchanger in self._exchangers:
                exchanger.close()
            self._dns.__exit__(kind, error, trace)

    # -- the server ---------------------------------------------------------------------------------------------------

    def start(self, *, warm: bool = False) -> None:
        """Start it; ``warm``: with its delivery process, and every connection that is used again."""
        self.site.start()
        self._address = self.site.address("relay")
        if warm:
            self.send("local")
            self.drain()

    def up(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether the master that this process is answers; where it listens is remembered then."""
        status = ask_status(str(self.site.spool_path))
        if status is None or status.pid != process.pid:
            return False
        host, _, port = status.listeners[0].addresses[0].rpartition(":")
        self._address = (host, int(port))
        return True

    def reloaded(self) -> bool:
        """Whether the master was asked for a reload, and is done with it."""
        status = ask_status(str(self.site.spool_path))
        return status is not None and status.reloads > 0

    def pid(self, role: Role) -> int:
        """The process of this role; there is one of each."""
        if role == "master":
            return self.site.status().pid
        find: Callable[[], list[int]] = self.site.deliveries if role == "delivery" else lambda: self.site.pids(role)
        return await_value(find, what=f"a process of the role {role}")[0]

    @contextmanager
    def gated(self) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], None]]]:
        """A server that begins when it is told: its process, and what tells it."""
        gate = self._root / "gate"
        os.mkfifo(gate)
        prefix = self.site.prefix
        try:
            self.site.prefix = [*_GATE, str(gate), *prefix]
            self.site.launch()
            self.site.prefix = prefix
            process = self.site.process
            assert process is not None
            yield process, lambda: _open_gate(gate)
        finally:
            self.site.prefix = prefix
            gate.unlink()

    def gone(self) -> None:
        """The server's master is dead: bury it."""
        assert self.site.process is not None
        self.site.process.wait(_TIMEOUT)
        self.site.process = None

    # -- mail ---------------------------------------------------------------------------------------------------------

    def send(self, kind: Kind) -> Reply:
        """Send one message over a connection of its own."""
        message, content = self._compose(kind)
        reply = self._give(message, content)
        self.replies.append(reply)
        return reply

    def leave(self, kind: Kind) -> None:
        """Put a message into incoming/ as a listener does, while no server runs."""
        message, content = self._compose(kind)
        spool = Spool(str(self.site.spool_path), create=True)
        try:
            name = spool.ids.new()
            recipients = tuple(Recipient(address) for address in message.recipients)
            entry = spool.enter(Envelope(name, time.time(), message.sender, recipients))
            entry.write(f"Received: from client.test by mx.example.org with ESMTP id {name}; now\r\n".encode() + content)
            entry.commit()
        finally:
            spool.close()
        self._sent[message.id] = msgspec.structs.replace(message, queue_id=name)

    def probe(self, since: float, timeout: float = _TIMEOUT) -> float:
        """Seconds from ``since`` (monotonic) until a new message was taken and delivered; infinite: not in time."""
        box = self.site.mail_root / _PROBE / "new"
        before = len(os.listdir(box)) if box.is_dir() else 0
        deadline = since + timeout
        message, content = self._compose("local", _PROBE)
        while self._give(message, content).code != 250:
            if time.monotonic() > deadline:
                return float("inf")
            time.sleep(0.01)
        while not (box.is_dir() and len(os.listdir(box)) > before):
            if time.monotonic() > deadline:
                return float("inf")
            time.sleep(0.005)
        return time.monotonic() - since

    def busy(self) -> list[str]:
        """What is in the queue."""
        queues = ("incoming", "active", "deferred", "hold")
        return [f"{queue}/{name}" for queue in queues for name in self.site.files(queue)]

    def drain(self, over: Callable[[], bool] = lambda: False, timeout: float = DRAIN_TIMEOUT) -> list[str]:
        """Wait until the queue is empty, or ``over``; what is still there."""
        deadline = time.monotonic() + timeout
        while (busy := self.busy()) and not over() and time.monotonic() < deadline:
            time.sleep(0.005)
        return busy

    def judge(self, stuck: list[str]) -> tuple[Verdict, list[str]]:
        """What became of all messages since the last judgement; and what is wrong besides, a line each.

        The queue must be empty but for ``stuck``.
        """
        copies = list(in_maildirs(self.site.mail_root))
        for path in self.site.mail_root.glob("*/new/*"):
            path.unlink()
        for index, exchanger in enumerate(self._exchangers):
            messages = exchanger.messages
            copies += at_exchanger(messages[self._taken[index] :])
            self._taken[index] = len(messages)
        copies += [Copy(f"?corrupt/{name}", "", "corrupt") for name in self.site.files("corrupt")]
        log = self.site.log()
        news, self._log_read = log[self._log_read :], len(log)
        wrong = [line for line in news.splitlines() if ": panic: " in line]
        wrong += [
            f"a report about {copy.recipient}, for a fault of ours"
            for copy in copies
            if copy.place == "report" and not copy.recipient.startswith("never-")
        ]
        verdict = judge(self._sent.values(), copies, doubts(news), stuck)
        self._sent.clear()
        self.replies.clear()
        return verdict, wrong

    def _compose(self, kind: Kind, user: str = "") -> tuple[Sent, bytes]:
        self._names += 1
        name = f"{self._names}"
        recipients = {
            "local": (f"{user or f'u{self._names % _USERS}'}@{DOMAIN}",),
            "big": (f"steady-{name}@{STEADY}", f"u0@{DOMAIN}"),
            "later": (f"later-{name}@{MOODY}",),
            "never": (f"never-{name}@{MOODY}",),
        }[kind]
        line = random.Random(self._names).randbytes(30).hex()
        body = f"{line}\r\n".encode() * (2500 if kind == "big" else 5)
        head = f"From: {_SENDER}\r\nTo: {', '.join(recipients)}\r\nSubject: calls\r\n{ID_FIELD}: {name}\r\n\r\n"
        return Sent(name, _SENDER, recipients, digest(body)), head.encode() + body

    def _give(self, message: Sent, content: bytes) -> Reply:
        """Send a message, and write down what came of it."""
        self._sent[message.id] = message
        try:
            with smtplib.SMTP(*self._address, local_hostname="client.test", timeout=_TIMEOUT) as client:
                steps: list[Callable[[], tuple[int, bytes]]] = [client.ehlo, partial(client.mail, message.sender)]
                steps += [partial(client.rcpt, recipient) for recipient in message.recipients]
                for step in steps:
                    code, text = step()
                    if code != 250:
                        return Reply(code, text.decode())
                code, text = client.data(content)
                if code == 250:
                    self._sent[message.id] = msgspec.structs.replace(message, queue_id=text.decode().rpartition(" ")[2])
                return Reply(code, text.decode())
        except smtplib.SMTPResponseException as refused:
            words = refused.smtp_error
            return Reply(refused.smtp_code, words.decode() if isinstance(words, bytes) else words)
        except (OSError, smtplib.SMTPException, AssertionError):
            return Reply(0)


def _open_gate(gate: Path) -> None:
    with gate.open("wb") as file:
        file.write(b"\n")
