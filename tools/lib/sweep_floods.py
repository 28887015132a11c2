"""The sweep ``floods``: very many clients, and very slow, deaf, hasty and tedious ones, while somebody wants to send mail.

The promises: ten thousand idle sessions are held, in 30 KiB each; past the limit there is a 421 at once; who is too slow is
gone at the deadline, in every state, inside TLS and out of it; a server that is nearly full is quicker with that, and goes
back by itself; whoever never reads, comes and goes a thousand times a second or has a hundred thousand commands costs a
bounded amount of memory; and whatever of that happens, other people's messages arrive.

The length is the number of idle sessions; the other parts follow from it. Short forms are in tests/e2e/test_floods.py; what
happens when threads, memory or descriptors are at an end is in tests/e2e/test_room.py.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from mtad.passwords import change_password, make_keys
from tests.client import Client
from tests.e2e.tls_site import TlsClient, tls_site
from tests.site import Site, await_value
from tools.lib.flood_clients import Bystander, Crowd, bystander, descriptors_for, exceptions, memory, send_one
from tools.lib.sweeps import Cell, Say, SweepOptions, SweepResult, Unavailable

#: KiB that an idle session may use.
MOST_EACH: Final = 30.0
#: KiB that a client may make a listener use by whatever it does; what is shared is counted in parts, and another process
#: that ends moves a MiB or two of that.
MOST_RUDE: Final = 4096
#: Sessions that there may be beside the idle ones: the one who sends, and one on its way out.
_SPARE: Final = 4

EHLO: Final = b"EHLO client.test\r\n"
MAIL: Final = b"MAIL FROM:<a@sender.test>\r\n"
RCPT: Final = b"RCPT TO:<alice@example.org>\r\n"
_TIMEOUT: Final = b"421 4.4.2 Error: timeout exceeded\r\n"
NO_LIMITS: Final[Mapping[str, Any]] = {}
_PATIENT: Final[Mapping[str, Any]] = {
    "bad_commands": 1_000_000,
    "bad_commands_in_a_row": 1_000_000,
    "junk_commands": 1_000_000,
}

_ENVELOPE: Final = ("EHLO client.test", "MAIL FROM:<a@sender.test>", "RCPT TO:<alice@example.org>")
#: Where a client is slow: after which lines, what it then says at once, and what comes octet by octet.
SLOW: Final[Mapping[str, tuple[Sequence[str], bytes, bytes]]] = {
    "greeting": ((), b"", b""),
    "EHLO": ((), b"", b"EHLO client.test."),
    "command": (_ENVELOPE[:1], b"", b"NOOP x"),
    "RCPT": (_ENVELOPE[:2], b"", b"RCPT TO:<alice"),
    "DATA": ((*_ENVELOPE, "DATA"), b"Subject: x\r\n", b"Slowly: y\r\n\r\nx\r\n.."),
    "BDAT": (_ENVELOPE, b"BDAT 100000\r\n", b""),
    "AUTH": (("EHLO client.test", "AUTH LOGIN"), b"", b"YWxpY2U"),
}
#: Where AUTH is, in clear and inside TLS.
_LOGINS: Final[Sequence[Mapping[str, Any]]] = (
    {"name": "loopback", "service": "submission", "address": ["127.0.0.1:0"], "auth_without_tls": "loopback"},
    {"name": "submissions", "service": "submission", "address": ["127.0.0.1:0"], "tls": "implicit"},
)


class Flood(msgspec.Struct, frozen=True):
    """How much of one part: ``length`` idle sessions, ``pace`` seconds for what is slow."""

    root: Path
    length: int
    pace: float
    within: float
    """Seconds in which other people's messages must arrive, and refusals."""
    limits: Mapping[str, Any] = NO_LIMITS
    """Other limits than those of the part: to break a promise on purpose."""


class Found(msgspec.Struct):
    """What one part has found."""

    flood: str
    clients: int = 0
    each: float | str = "-"
    """KiB of each client."""
    slowest: float | str = "-"
    """Seconds of the slowest message of others."""
    messages: int = 0
    faults: list[str] = msgspec.field(default_factory=list)

    def row(self) -> dict[str, Cell]:
        """For the table."""
        return {
            "flood": self.flood,
            "clients": self.clients,
            "KiB each": self.each,
            "messages of others": self.messages,
            "slowest, s": self.slowest,
            "faults": len(self.faults),
        }

    def check(self, good: bool, fault: str) -> None:
        """Note a broken promise."""
        if not good:
            self.faults.append(f"{self.flood}: {fault}")

    def hear(self, other: Bystander, within: float) -> None:
        """What became of other people's messages."""
        self.messages += len(other.took)
        self.check(bool(other.took), "no message of others arrived")
        self.slowest = max([*other.took, self.slowest if isinstance(self.slowest, float) else 0.0])
        self.check(self.slowest <= within, f"a message of others took {self.slowest:.2f} s")
        for fault in other.faults[:3]:
            self.check(False, f"a message of others: {fault}")


@contextmanager
def _site(flood: Flood, found: Found, limits: Mapping[str, Any] = NO_LIMITS, *, tls: bool = False) -> Iterator[Site]:
    """A site with the limits of a part; at its end nobody is left, and the processes are those from the beginning."""
    wanted = {"connections_per_client": 1_000_000, **limits, **flood.limits}
    make: Callable[..., Site] = _site_with_logins if tls else Site
    with make(flood.root / found.flood.replace(" ", "-"), limits=wanted) as site:
        pids = site.pids("listener")
        for _ in range(10):  # the first ones cost what all that follow use
            send_one(site, site.address())
        yield site
        await_value(lambda: site.status().sessions == 0, 60, "all sessions have ended")
        found.check(site.pids("listener") == pids, "a listener died")
        found.check("panic" not in site.log(), "the log has a panic")


def _site_with_logins(root: Path, **options: Any) -> Site:
    """In clear and with TLS, with and without logins."""
    site = tls_site(root, **options)
    site.listeners += [dict(row) for row in _LOGINS]
    site.configure()
    change_password(str(root / "passwords"), "alice", make_keys("open sesame"))
    return site


def idle(flood: Flood) -> list[Found]:
    """All of them there, greeted and silent, and then each with a transaction."""
    count = flood.length
    found, engaged = Found("idle", count), Found("idle with MAIL and RCPT", count)
    limits = {"connections": count + _SPARE, "stress_timeout": "300s"}
    with _site(flood, found, limits) as site, Crowd() as crowd:
        pids = site.pids("listener")
        before = memory(pids)
        with bystander(site) as other:
            said = crowd.join(site.address(), count)
            time.sleep(flood.pace)
        found.check(not exceptions(said, b"220 "), exceptions(said, b"220 "))
        found.each = (memory(pids) - before) / count
        found.check(found.each <= MOST_EACH, f"{found.each:.1f} KiB each")
        found.hear(other, flood.within)
        with bystander(site) as other:
            for line in (EHLO, MAIL, RCPT):
                said = crowd.say(line)
                engaged.check(not exceptions(said, b"250"), exceptions(said, b"250"))
            time.sleep(1.0)
        engaged.each = (memory(pids) - before) / count
        engaged.check(engaged.each <= MOST_EACH, f"{engaged.each:.1f} KiB each")
        engaged.hear(other, flood.within)
        await_value(lambda: site.status().sessions <= count, what="the others have left")
        with Crowd() as more:
            more.join(site.address("relay"), _SPARE)
            start = time.monotonic()
            [refused] = more.join(site.address(), 1)
            found.check(refused.startswith(b"421 4.7.0 "), f"past the limit: {refused!r}")
            found.check(time.monotonic() - start <= flood.within, "the 421 took its time")
    return [found, engaged]


def slow(flood: Flood) -> list[Found]:
    """An octet now and then, in every state, in clear and inside TLS, and in the handshakes."""
    found = Found("slow")
    seconds = 2.5 * flood.pace
    span = f"{round(seconds * 1000)}ms"
    limits = {"command_timeout": span, "tls_timeout": span, "data_window": span}
    drips: dict[TlsClient, tuple[str, Iterator[int]]] = {}
    with _site(flood, found, limits, tls=True) as site:
        start = time.monotonic()
        for tls in (False, True):
            for name, (lines, at_once, octets) in SLOW.items():
                listeners = ("loopback", "submissions") if name == "AUTH" else ("inbound", "smtps")
                client = TlsClient(site.address(listeners[tls]))
                if tls:
                    client.secure()
                client.begin(*lines)
                client.send(at_once)
                drips[client] = (f"{name}{' inside TLS' if tls else ''}", iter(octets + b"x" * 10_000))
        for name, starts in (("smtps", False), ("inbound", True)):
            client = TlsClient(site.address(name))
            if starts:
                client.begin("EHLO client.test", "STARTTLS")
            drips[client] = (f"the handshake of {name}", iter(b"\x16\x03\x01\x02\x00\x01\x00" + bytes(500)))
        found.clients = len(drips)
        with bystander(site) as other:
            _drip(drips, flood.pace, start + 2 * seconds + 2)
        for name, _ in drips.values():
            found.check(False, f"{name}: still there")
        for client in drips:
            client.socket.close()
        found.hear(other, flood.within)
    return [found]


def _drip(drips: dict[TlsClient, tuple[str, Iterator[int]]], pause: float, until: float) -> None:
    """An octet of each, again and again; those that the server leaves are taken out."""
    while drips and time.monotonic() < until:
        for client, (name, octets) in list(drips.items()):
            octet = next(octets) if "greeting" not in name else None
            client.send(bytes([octet]) if octet is not None else b"")
        step = time.monotonic() + pause
        while drips and (left := min(step, until) - time.monotonic()) > 0:
            ready = select.select([client.socket for client in drips], [], [], left)[0]
            for client in [client for client in drips if client.socket in ready]:
                client.reply()
                client.socket.close()
                del drips[client]


def _calm(log: str) -> bool:
    return log.count("deadlines are short") == log.count("deadlines are as they were")


def stress(flood: Flood) -> list[Found]:
    """Above two thirds neither idle sessions nor many errors are borne, until fewer than half are left; then they are."""
    most = max(30, flood.length // 10)
    found = Found("stress", most * 8 // 10)
    patience = max(1.5, flood.pace)
    limits = {"connections": most, "stress_timeout": f"{round(patience * 1000)}ms"}
    with _site(flood, found, limits) as site:
        with bystander(site) as other:
            with Crowd() as crowd:
                crowd.join(site.address(), most * 8 // 10)
                last = Client(site.address()).begin("EHLO client.test")
                refused = [last.say("XYZZY")[:3] for _ in range(5)]
                found.check(refused == ["502"] * 4 + ["421"], f"errors under stress: {refused}")
                last.socket.close()
                words = crowd.farewells(patience + 3.0)
                found.check(words == [_TIMEOUT] * len(words), f"last words: {set(words)}")
                found.check(len(crowd.sockets) < most // 2, f"{len(crowd.sockets)} are still there")
            await_value(lambda: site.status().sessions < 3, what="all have left")
            # Each listener process sees for itself that there is room again, within a second.
            await_value(lambda: _calm(site.log()), what="calm")
            with Crowd() as crowd:
                crowd.join(site.address(), most * 6 // 10)
                found.check(not crowd.farewells(patience + 1.5), "cut off while there is room")
        found.hear(other, flood.within)
    return [found]


def deaf(flood: Flood) -> list[Found]:
    """Commands without end, and no reply is ever read."""
    clients = max(5, flood.length // 200)
    found = Found("deaf", clients)
    limits = {"command_timeout": f"{round(2000 * flood.pace)}ms", **_PATIENT}
    with _site(flood, found, limits) as site, Crowd() as crowd:
        pids = site.pids("listener")
        crowd.join(site.address(), clients)
        crowd.say(EHLO)
        crowd.say(MAIL)
        before = worst = memory(pids)
        with bystander(site) as other:
            until = time.monotonic() + 4 * flood.pace + 4
            rest = list(crowd.sockets)
            for connection in rest:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.setblocking(False)
            while rest and time.monotonic() < until:
                rest = [connection for connection in rest if _goes_on(connection.send)]
                worst = max(worst, memory(pids))
                time.sleep(0.01)
        found.check(not rest, f"{len(rest)} are still there")
        found.each = (worst - before) / clients
        found.check(found.each <= MOST_RUDE, f"{found.each:.0f} KiB each")
        found.hear(other, flood.within)
    return [found]


def _goes_on(send: Callable[[bytes], int]) -> bool:
    try:
        send(b"RCPT TO:<nobody@example.org>\r\n" * 500)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def churn(flood: Flood) -> list[Found]:
    """A thousand connections a second that are opened and closed, in order and not."""
    found = Found("opened and closed")
    wanted = max(1000, flood.length // 2)
    with _site(flood, found) as site:
        pids = site.pids("listener")
        before, start = memory(pids), time.monotonic()
        with bystander(site) as other:
            for number in range(wanted):
                client = Client(site.address(), source="127.0.0.2")
                if number % 2:
                    client.reset()
                client.socket.close()
                time.sleep(max(0.0, start + number / 1000 - time.monotonic()))
        found.clients = wanted
        rate = wanted / (time.monotonic() - start)
        found.flood = f"opened and closed, {rate:.0f}/s"
        growth = memory(pids) - before
        found.each = growth / wanted
        found.check(growth <= 8 * MOST_RUDE, f"{growth} KiB in all")
        found.hear(other, flood.within)
    return [found]


def tedious(flood: Flood) -> list[Found]:
    """A hundred thousand NOOPs, and as many recipients, one who exists and many who do not."""
    rows = []
    for name, before, line in (
        ("NOOP", (EHLO,), lambda _: b"NOOP\r\n"),
        ("RCPT", (EHLO, MAIL), lambda _: RCPT),
        ("RCPT, unknown", (EHLO, MAIL), lambda n: b"RCPT TO:<u%d@example.org>\r\n" % n),
    ):
        found = Found(f"{10 * flood.length:,} {name}", 1)
        with _site(flood, found) as site:
            pids = site.pids("listener")
            start = memory(pids)
            with bystander(site) as other, Crowd() as crowd:
                crowd.join(site.address(), 1)
                for first in before:
                    crowd.say(first)
                replies = _pour(crowd, b"".join(map(line, range(10 * flood.length))))
                found.each = float(memory(pids) - start)
            found.check(found.each <= MOST_RUDE, f"{found.each:.0f} KiB")
            if name == "RCPT":
                found.check(replies == 10 * flood.length, f"only {replies} replies")
            else:
                found.check(replies < 300, f"{replies} replies before it was cut off")
            found.hear(other, flood.within)
        rows.append(found)
    return rows


def _pour(crowd: Crowd, data: bytes) -> int:
    """Send it and read what comes; the number of replies until all are there, or the server closes."""
    [connection] = crowd.sockets
    connection.setblocking(False)
    wanted, heard, rest = data.count(b"\n"), 0, memoryview(data)
    while heard < wanted:
        readable, writable, _ = select.select([connection], [connection] if rest else [], [], 60)
        try:
            if readable:
                said = connection.recv(65536)
                if not said:
                    break
                heard += said.count(b"\n")
            if writable:
                rest = rest[connection.send(rest[:65536]) :]
        except OSError:
            break
        if not readable and not writable:
            break
    return heard


PARTS: Final[Mapping[str, Callable[[Flood], list[Found]]]] = {
    "idle": idle,
    "slow": slow,
    "stress": stress,
    "deaf": deaf,
    "churn": churn,
    "tedious": tedious,
}


def run(options: SweepOptions, say: Say) -> SweepResult:
    """See `tools.lib.sweeps`."""
    lack = descriptors_for(options.length)
    if lack:
        raise Unavailable(lack)
    rows: list[dict[str, Cell]] = []
    faults: list[str] = []
    full = options.length >= 5000
    for name, part in PARTS.items():
        start = time.monotonic()
        for found in part(Flood(options.directory / name, options.length, 10.0 if full else 1.0, within=1.0)):
            rows.append(found.row())
            faults += found.faults
        say(f"{name}: {time.monotonic() - start:.0f} s, {len(faults)} faults so far")
    return SweepResult(rows, faults)
