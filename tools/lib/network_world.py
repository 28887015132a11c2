"""The world of a sweep of the network: one server with short deadlines, exchangers of three kinds, and their books.

What it is for: `tools.lib.network_cuts` has the dialogues that are cut; here is what they have in common. `LogWatch` knows
when the server wrote down that a session or an attempt was over, which is when its thread was free again.
"""

from __future__ import annotations

import os
import random
import re
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mtad.tls.certificates import Pair
from tests.peers.dns import DnsServer
from tests.peers.mx import Mx, Script, free_port
from tests.peers.script import DEFAULT_EXTENSIONS
from tests.site import DOMAIN, HOSTNAME, Site
from tests.unit.tls_aid import authority, issue
from tools.lib import network_server
from tools.lib.crash_finds import at_exchanger, in_maildirs, in_spool
from tools.lib.crash_load import SENDERS, Ledger
from tools.lib.crash_verdict import ID_FIELD, Copy, Sent, digest

#: Who gets mail here.
USERS: Final = ("alice", "bob")
_EXCHANGERS: Final = "127.0.0.25"
_PLAIN: Final = tuple(extension for extension in DEFAULT_EXTENSIONS if extension != "PIPELINING")
#: What an exchanger announces, by its kind.
EXTENSIONS: Final = {
    "pipelined": DEFAULT_EXTENSIONS,
    "step by step": _PLAIN,
    "chunks": (*DEFAULT_EXTENSIONS, "CHUNKING"),
    "second": DEFAULT_EXTENSIONS,
    "TLS": (*DEFAULT_EXTENSIONS, "STARTTLS"),
}
#: Where the proxies of exchangers are, and from where those of clients come: 2^16 addresses each.
_PROXIES: Final = "127.65"
_CLIENTS: Final = "127.64"

_ENDED: Final = re.compile(r": disconnect from \S*\[([\d.]+)\]")
_TRIED: Final = re.compile(r": (\w+): to=<([^>]+)>.* status=(\w+) \((.*)\)$")
_AGAIN: Final = "message may be sent more than once"
#: Seconds between two looks at the log.
_LOOK: Final = 0.02


class LogWatch(threading.Thread):
    """Reads the log as it grows; a context manager that ends it."""

    def __init__(self, path: Path) -> None:
        """``path`` need not exist yet."""
        super().__init__(name="log watch", daemon=True)
        self._path = path
        self._condition = threading.Condition()
        self._seen: dict[str, float] = {}
        self._closed = False
        self.doubts: Counter[tuple[str, str]] = Counter()
        """How often it was said that a recipient (of a queue id) may get a message again."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed = True
        self.join(10)

    def when(self, what: str, timeout: float) -> float | None:
        """When ``what`` was first seen, monotonic: an address for the end of its session, ``tried RECIPIENT`` for the first
        attempt, or ``sent RECIPIENT``; None: not within ``timeout`` seconds."""
        with self._condition:
            self._condition.wait_for(lambda: what in self._seen, timeout)
            return self._seen.get(what)

    def run(self) -> None:
        """See the class."""
        while not self._path.exists():
            if self._closed:
                return
            time.sleep(_LOOK)
        with self._path.open(encoding="utf-8", errors="replace") as log:
            rest = ""
            while True:
                closed = self._closed  # what was written before that is read
                text = log.read()
                if text:
                    *lines, rest = (rest + text).split("\n")
                    self._read(lines)
                elif closed:
                    return
                else:
                    time.sleep(_LOOK)

    def _read(self, lines: Iterable[str]) -> None:
        now = time.monotonic()
        with self._condition:
            for line in lines:
                if (ended := _ENDED.search(line)) is not None:
                    self._seen.setdefault(ended[1], now)
                elif (tried := _TRIED.search(line)) is not None:
                    queue_id, recipient, status, why = tried.groups()
                    self._seen.setdefault(f"tried {recipient}", now)
                    if status == "sent":
                        self._seen.setdefault(f"sent {recipient}", now)
                    if _AGAIN in why:
                        self.doubts[queue_id, recipient] += 1
            self._condition.notify_all()


class NetworkWorld:
    """Server, exchangers, ledger; a context manager that starts and stops them."""

    def __init__(self, root: Path, seed: int, deadline: float, broken: str = "-") -> None:
        """Each time-out of the server is ``deadline`` seconds; ``broken``: see `tools.lib.network_server`."""
        self._root = root
        root.mkdir(parents=True, exist_ok=True)
        self._chance = random.Random(f"{seed} network")
        self._lock = threading.Lock()
        self._port = free_port([_EXCHANGERS])
        self._stack = ExitStack()
        self.deadline = deadline
        self._broken = broken
        self.exchangers: dict[str, Mx] = {}
        self.relay = ("127.0.0.1", 9)
        self.before: dict[str, int] = {}
        """What was `held` when there had been one message."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._dns = stack.enter_context(DnsServer({}))
            pair = issue(HOSTNAME, by=authority()).write(self._root)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pair.certificate, pair.key)
            for kind, extensions in EXTENSIONS.items():
                script = Script(extensions=extensions, tls_extensions=DEFAULT_EXTENSIONS)
                self.exchangers[kind] = stack.enter_context(Mx(_EXCHANGERS, 0, script, tls=context))
            self.ledger = Ledger(self._root / "ledger")
            stack.callback(self.ledger.close)
            self.site = self._site(pair)
            self.log = stack.enter_context(LogWatch(self.site.log_path))
            stack.callback(self.stop)
            self.site.start()
            self.relay = self.site.address("relay")
            self.site.send(f"root@{DOMAIN}", f"root@{DOMAIN}", b"Subject: the first\r\n\r\n", "relay")
            self.site.await_mail("root")
            (self.site.mailbox("root")[0]).unlink()  # nobody counts it
            self.before = self.held()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _site(self, pair: Pair) -> Site:
        time_out = f"{round(1000 * self.deadline)}ms"
        phases = ("helo", "mail", "rcpt", "data_init", "data_xfer", "data_done", "rset", "connect", "starttls")
        site = Site(
            self._root / "site",
            dns=self._dns.address,
            port=self._port,
            users=("root", *USERS, *SENDERS),
            listeners=[
                {
                    "name": "relay",
                    "service": "relay",
                    "address": ["127.0.0.1:0"],
                    "trusted": ["127.0.0.0/8"],
                    "tls": "starttls",
                },
            ],
            limits={
                "command_timeout": time_out,
                "tls_timeout": time_out,
                "data_window": time_out,
                "data_timeout": f"{round(2000 * self.deadline)}ms",
                "connections_per_client": 1000,
                "junk_commands": 1_000_000,
                "bad_commands": 1_000_000,
                "bad_commands_in_a_row": 1_000_000,
            },
            delivery={f"{phase}_timeout": time_out for phase in phases}
            | {"connection_idle": "1s", "tls": "opportunistic", "processes": 1},
            tls={"certificate": pair.certificate, "key": pair.key},
            retry={"minimum": "1s", "destination_pause": "1s"},
        )
        if self._broken != "-":
            site.prefix = [sys.executable, network_server.__file__, self._broken]
        return site

    def stop(self) -> None:
        """Stop the server, if it runs."""
        if self.site.process is not None:
            self.site.stop()

    # -- names and messages -------------------------------------------------------------------------------------------

    def source(self, number: int) -> str:
        """The address from which the client of case ``number`` comes."""
        return f"{_CLIENTS}.{number // 250}.{number % 250 + 1}"

    def exchange(self, number: int) -> tuple[str, tuple[str, int]]:
        """The domain of case ``number``, and where its exchanger is; the name server knows it then."""
        domain, address = f"c{number}.test", f"{_PROXIES}.{number // 250}.{number % 250 + 1}"
        self._dns.set(domain, {"MX": [f"10 mx.{domain}."]})
        self._dns.set(f"mx.{domain}", {"A": [address]})
        return domain, (address, self._port)

    def compose(self, name: str, recipients: Sequence[str], size: int = 0) -> tuple[Sent, bytes]:
        """A message of about ``size`` octets; 0: some hundreds or thousands."""
        with self._lock:
            size = size or self._chance.choice((300, 3000, 30_000))
            line = self._chance.randbytes(30).hex()
            sender = f"{self._chance.choice(SENDERS)}@{DOMAIN}"
        lines = [f"{'.' if number % 7 == 0 else ''}{number} {line}" for number in range(size // 66 + 1)]
        body = "\r\n".join(lines).encode() + b"\r\n"
        head = f"From: {sender}\r\nTo: {', '.join(recipients)}\r\nSubject: cut\r\n{ID_FIELD}: {name}\r\n\r\n"
        return Sent(name, sender, tuple(recipients), digest(body)), head.encode() + body

    # -- what there is ------------------------------------------------------------------------------------------------

    def copies(self) -> list[Copy]:
        """Everything that is found; the server is stopped."""
        found = [*in_maildirs(self.site.mail_root), *in_spool(self.site.spool_path)]
        return found + [copy for exchanger in self.exchangers.values() for copy in at_exchanger(exchanger.messages)]

    def held(self) -> dict[str, int]:
        """Threads and sockets of all processes of a role together: what a session or a delivery holds."""
        roles = {"listener": self.site.pids("listener"), "delivery": self.site.deliveries()}
        return {
            f"{what} of {role}": sum(map(count, pids))
            for role, pids in roles.items()
            for what, count in (("threads", _threads), ("sockets", _sockets))
        }


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def _sockets(pid: int) -> int:
    found = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found += os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
        except FileNotFoundError:
            pass  # closed in between
    return found
