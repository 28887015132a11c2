"""The sweep ``reload``: SIGTERM and SIGHUP with a hundred transactions under way, again and again.

A round opens connections and brings each to a point of its own, from the greeting to the final dot; then the signal comes,
and each goes on where it was, at its own pace. Some never end, and some dribble on, in every fourth round. Then:

- each transaction is finished, or its client is told 421; no connection ends without a word, least of all after the dot;
- after SIGTERM all processes are gone and the port is free, after SIGHUP those of the old configuration are gone, within
  `LIMIT` seconds; at the port the next server, or generation, takes a message at once;
- at the end each acknowledged message is found, whole, and once.

The unit of its length is a round.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from tests.client import Client
from tests.peers.mx import free_port
from tests.procs import alive
from tests.site import Site, await_value
from tools.lib.crash_finds import in_maildirs, in_spool
from tools.lib.crash_load import Ledger, compose
from tools.lib.crash_peers import peers
from tools.lib.crash_run import drain
from tools.lib.crash_verdict import Verdict, doubts, judge, totals
from tools.lib.sweeps import Cell, SweepOptions, SweepResult, bar

Kind = Literal["SIGTERM", "SIGHUP"]

#: Transactions under way.
TRANSACTIONS: Final = 100
#: Seconds within which a stop, or the end of an old generation, must have come.
LIMIT: Final = 30.0
#: ``processes.stop_timeout``, in seconds: what sessions have to end in.
_STOP: Final = 3.0
#: Seconds in which a session that means to be done is.
_PROMPT: Final = 0.8
#: Points at which a signal finds a session.
POINTS: Final = ("greeting", "ehlo", "mail", "rcpt", "data", "content", "before the dot", "bdat", "the dot")
_IN_TRANSACTION: Final = frozenset(POINTS[2:])


class CutOff(Exception):
    """The server ended a session in a way that no server may."""


class Told(Exception):
    """The server said 421."""


class Guest:
    """One client in one round."""

    def __init__(self, name: str, point: str, temper: str, chance: random.Random, ledger: Ledger) -> None:
        """``temper``: prompt, or never (it stops there), or dribbling (its content never ends)."""
        self.point = point
        self.temper = temper
        self.outcome = ""
        """``done``, ``refused``, ``421``, or what went wrong."""
        self._chance = random.Random(chance.random())
        self._ledger = ledger
        self._message, self._content = compose(self._chance, name)
        self._client: Client | None = None
        self._dotted = False

    def run(self, address: tuple[str, int], ready: threading.Barrier, go: threading.Event) -> None:
        """The whole visit, in a thread of its own."""
        arrived = False
        try:
            with Client(address) as self._client:
                self._ledger.note(self._message)
                steps = self._steps()
                for point, step in steps:
                    step()
                    if point == self.point:
                        arrived = True
                        ready.wait(60)
                        go.wait(60)
                        self._dawdle()
                self.outcome = self.outcome or "done"
        except Told:
            self.outcome = "421"
        except (CutOff, OSError) as fault:
            self.outcome = f"{fault or type(fault).__name__}{' after the dot' if self._dotted else ''}"
        finally:
            if not arrived:
                ready.abort()

    def _dawdle(self) -> None:
        if self.temper == "never":
            self._hear()
        if self.temper == "dribbling":
            assert self._client is not None
            while self._client.quiet(0.05):
                self._client.send(b"and so on\r\n")
            self._hear()
        if self.point != "the dot":
            time.sleep(self._chance.uniform(0, _PROMPT / 2))

    def _steps(self) -> list[tuple[str, Callable[[], None]]]:
        sent = self._message
        half = len(self._content) // 2
        steps: list[tuple[str, Callable[[], None]]] = [
            ("greeting", lambda: self._expect("2")),
            ("ehlo", lambda: self._say("EHLO client.test", "2")),
            ("mail", lambda: self._say(f"MAIL FROM:<{sent.sender}>", "2")),
            ("rcpt", self._name_recipients),
        ]
        if self.point == "bdat":
            first, rest = self._content[:half], self._content[half:]
            steps += [
                ("bdat", lambda: self._say(f"BDAT {len(first)}", "2", first)),
                ("", lambda: self._finish(b"BDAT %d LAST\r\n%s" % (len(rest), rest))),
            ]
            return steps
        stuffed = self._content.replace(b"\r\n.", b"\r\n..")
        steps += [
            ("data", lambda: self._say("DATA", "3")),
            ("content", lambda: self._send(stuffed[:half])),
            ("before the dot", lambda: self._slowly(stuffed[half:])),
        ]
        if self.point == "the dot":
            return [*steps, ("the dot", self._dot), ("", self._await_reply)]
        return [*steps, ("", lambda: self._finish(b".\r\n"))]

    def _dot(self) -> None:
        self._dotted = True
        self._send(b".\r\n")

    def _finish(self, last: bytes) -> None:
        self._dotted = True
        self._send(last)
        self._await_reply()

    def _await_reply(self) -> None:
        answer = self._hear(told=False)
        if answer.startswith("250"):
            self._ledger.note(msgspec.structs.replace(self._message, queue_id=answer.rpartition(" ")[2]))
            return
        self.outcome = "421" if answer.startswith("421") else "refused"
        if answer[:1] != "4":
            raise CutOff(f"{answer!r} to the dot")

    def _slowly(self, data: bytes) -> None:
        for start in range(0, len(data), 20_000):
            self._send(data[start : start + 20_000])
            if len(data) > 20_000:
                time.sleep(_PROMPT / 20)

    def _send(self, data: bytes) -> None:
        assert self._client is not None
        self._client.send(data)

    def _name_recipients(self) -> None:
        for name in self._message.recipients:
            self._say(f"RCPT TO:<{name}>", "2")

    def _say(self, line: str, wanted: str, content: bytes = b"") -> None:
        self._send(line.encode() + b"\r\n" + content)
        self._expect(wanted)

    def _expect(self, wanted: str) -> None:
        answer = self._hear()
        if not answer.startswith(wanted):
            raise CutOff(f"{answer!r} at {self.point}")

    def _hear(self, told: bool = True) -> str:
        assert self._client is not None
        answer = self._client.reply()
        if not answer:
            raise CutOff(f"the connection ended without a word at {self.point}, {self.temper}")
        if told and answer.startswith("421"):
            raise Told
        return answer


class ReloadSweep:
    """One run of the sweep."""

    def __init__(
        self,
        root: Path,
        seed: int,
        say: Callable[[str], None],
        transactions: int = TRANSACTIONS,
        kinds: Sequence[Kind] = ("SIGTERM", "SIGHUP"),
        stop: signal.Signals = signal.SIGTERM,
    ) -> None:
        """``kinds`` of rounds; ``stop`` goes to the master; another signal than SIGTERM, to all, is the control."""
        self._root = root
        self._say = say
        self._transactions = transactions
        self._kinds = kinds
        self._stop = stop
        self._chance = random.Random(f"{seed} reload")
        self._number = 0
        self.outcomes: dict[Kind, Counter[str]] = {kind: Counter() for kind in kinds}
        self.slowest = dict.fromkeys(kinds, 0.0)
        self.rounds: Counter[str] = Counter()
        self.faults: list[str] = []
        self.verdict: Verdict | None = None

    def run(self, rounds: int) -> None:
        """Do it all; the results are in the attributes.

        Raises:
            AssertionError: the server does not start or does not stop.
        """
        port = free_port(["127.0.0.1"])
        with peers() as world:
            site = world.site(
                self._root / "site",
                limits={"connections_per_client": 1000},
                processes={"stop_timeout": f"{_STOP:g}s"},
            )
            site.listeners = [{"name": "relay", "service": "relay", "address": [f"127.0.0.1:{port}"]}]
            site.configure()
            ledger = Ledger(self._root / "ledger")
            try:
                site.start()
                for number in range(1, rounds + 1):
                    self._round(site, port, ledger, number)
                    self._say(f"{bar(number, rounds)} {ledger.acknowledged()} acknowledged, {len(self.faults)} faults")
                stuck = drain(site)
            finally:
                ledger.close()
                if site.process is not None:
                    site.stop()
            copies = [*in_maildirs(site.mail_root), *in_spool(site.spool_path), *world.copies()]
            self.verdict = judge(ledger.messages(), copies, doubts(site.log()), stuck)
            self.faults += self.verdict.broken(doubtful=False)
            if "panic" in site.log():
                self.faults.append("the log has a panic")

    def _round(self, site: Site, port: int, ledger: Ledger, number: int) -> None:
        kind = self._chance.choice(self._kinds)
        self.rounds[kind] += 1
        guests = [self._guest(ledger, number, stubborn=number % 4 == 0) for _ in range(self._transactions)]
        ready = threading.Barrier(len(guests) + 1)
        go = threading.Event()
        threads = [
            threading.Thread(target=guest.run, args=(("127.0.0.1", port), ready, go), daemon=True) for guest in guests
        ]
        for thread in threads:
            thread.start()
        try:
            ready.wait(60)
        except threading.BrokenBarrierError:
            go.set()
            self.faults.append(f"round {number}: a client did not get to its point: {[one.outcome for one in guests]}")
        time.sleep(self._chance.uniform(0, 0.02))
        before = site.processes()
        began = time.monotonic()
        go.set()
        if kind == "SIGTERM":
            self._stop_server(site, before, port)
        else:
            self._reload(site, before)
        self.slowest[kind] = max(self.slowest[kind], time.monotonic() - began)
        if kind == "SIGTERM":
            site.start()
        for thread in threads:
            thread.join(LIMIT)
        self._look(number, kind, guests)
        self._expect_service(site, ledger, number)

    def _guest(self, ledger: Ledger, number: int, *, stubborn: bool) -> Guest:
        self._number += 1
        point = self._chance.choice(POINTS)
        temper = "prompt"
        if stubborn and point not in ("the dot", "greeting") and self._chance.random() < 0.2:
            temper = "dribbling" if point in ("data", "content") and self._chance.random() < 0.7 else "never"
        return Guest(f"{number}-{self._number}", point, temper, self._chance, ledger)

    def _stop_server(self, site: Site, before: Sequence[int], port: int) -> None:
        assert site.process is not None
        for pid in before[:1] if self._stop is signal.SIGTERM else before:
            os.kill(pid, self._stop)
        site.process.wait(LIMIT)
        site.process = None
        if left := [pid for pid in before if alive(pid)]:
            if self._stop is signal.SIGTERM:
                self.faults.append(f"the master is gone, and these are not: {left}")
            await_value(lambda: not any(alive(pid) for pid in before), LIMIT)
        try:
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(("127.0.0.1", port))
                trial.listen()
        except OSError as fault:
            self.faults.append(f"after a stop somebody holds the port: {fault}")

    def _reload(self, site: Site, before: Sequence[int]) -> None:
        reloads = site.status().reloads
        os.kill(before[0], signal.SIGHUP)
        await_value(lambda: site.status().reloads > reloads, LIMIT, "reloaded")
        if fault := site.status().reload_fault:
            self.faults.append(f"a reload was refused: {fault}")
        try:
            await_value(lambda: not any(alive(pid) for pid in before[1:]), LIMIT)
        except AssertionError:
            self.faults.append("processes of the old configuration are still there")

    def _look(self, number: int, kind: Kind, guests: Sequence[Guest]) -> None:
        for guest in guests:
            outcome = guest.outcome or "no end"
            if outcome not in {"done", "421", "refused"} or (outcome == "refused" and guest.temper == "prompt"):
                self.faults.append(f"round {number}, {kind}, {guest.point}, {guest.temper}: {outcome}")
                outcome = "wrong"
            elif outcome == "421" and guest.temper == "prompt" and guest.point in _IN_TRANSACTION:
                outcome = "421 in a transaction"
            self.outcomes[kind][outcome] += 1

    def _expect_service(self, site: Site, ledger: Ledger, number: int) -> None:
        message, content = compose(self._chance, f"{number}-0")
        ledger.note(message)
        queue_id = site.send(message.sender, message.recipients, content, "relay")
        ledger.note(msgspec.structs.replace(message, queue_id=queue_id))


def run(options: SweepOptions, say: Callable[[str], None]) -> SweepResult:
    """See the module."""
    sweep = ReloadSweep(options.directory, options.seed, say)
    sweep.run(options.length)
    verdict = sweep.verdict
    assert verdict is not None
    rows: list[dict[str, Cell]] = [
        {
            "signal": kind,
            "rounds": sweep.rounds[kind],
            "sessions": sum(outcomes.values()),
            "finished": outcomes["done"],
            "421": outcomes["421"],
            "421 in a transaction": outcomes["421 in a transaction"],
            "slowest, s": sweep.slowest[kind],
        }
        for kind, outcomes in sweep.outcomes.items()
    ]
    rows.append({"signal": "all", **totals([verdict])})
    return SweepResult(rows, sweep.faults)
