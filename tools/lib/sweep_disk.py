"""The sweep ``disk``: the spool's disk goes wrong for a while, again and again, under load, and is healed.

Spool and mailboxes are on a small ext4 of their own; log and ledger are not. Each round makes one trouble of `TROUBLES`,
sends messages meanwhile, lets go what was deferred before, heals the disk, and looks how long it takes until all is well:

- while it lasts each message gets 452 or 451, or a 250 that holds; nothing gets a 5yz, and no session is cut off;
- what is in the queue is delivered meanwhile, where the trouble is such that it can be;
- within `HEALTHY` seconds after the healing a new message is taken and delivered, and nothing waits in incoming or active,
  with the same processes as before;
- at the end each acknowledged message is found whole, and none that was refused is found anywhere: after a failed fsync
  a file is never trusted again.

The unit of its length is a round.
"""

from __future__ import annotations

import random
import smtplib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from tests.peers.dns import DnsServer
from tests.peers.mx import OK, Actions, Mx, Say, Script, free_port
from tests.site import Site, await_value
from tools.lib import small_disk
from tools.lib.crash_disks import own_mounts
from tools.lib.crash_finds import at_exchanger, in_maildirs, in_spool
from tools.lib.crash_load import DOMAIN, MOODY, SENDERS, STEADY, USERS, Client, Ledger, Moods, compose
from tools.lib.crash_run import drain
from tools.lib.crash_verdict import Copy, Sent, Verdict, doubts, judge, totals
from tools.lib.disk_looks import arrived, lasting, older, transact
from tools.lib.small_disk import SmallDisk
from tools.lib.sweeps import Cell, SweepOptions, SweepResult, bar

#: Seconds after the healing within which all is well again.
HEALTHY: Final = 5.0
#: Seconds that the disk hangs.
HANG: Final = 60.0
#: Messages that are sent, one after the other, in each trouble, and how many wait in the queue to be delivered meanwhile.
PROBES: Final = 12
#: Seconds that a trouble lasts, more or less, unless the disk hangs.
LASTS: Final = 2.0
WAITING: Final = 5

_STEADY_ADDRESS: Final = "127.0.0.23"
_MOODY_ADDRESS: Final = "127.0.0.24"


class Trouble(msgspec.Struct, frozen=True):
    """One way to go wrong: ``codes`` that a message may get meanwhile, and whether mail in the queue goes out."""

    codes: frozenset[int]
    drains: bool
    hangs: bool = False


TROUBLES: Final[dict[str, Trouble]] = {
    "full": Trouble(frozenset({250, 452}), drains=True),
    "inodes gone": Trouble(frozenset({250, 452}), drains=True),
    "read-only": Trouble(frozenset({451}), drains=False),
    "fsync fails": Trouble(frozenset({451}), drains=True),
    "nothing can be undone": Trouble(frozenset({451}), drains=False),
    "hung": Trouble(frozenset({250, 451}), drains=False, hangs=True),
}


class Moody(Moods):
    """Recipients ``gate-…`` are put off as long as the gate is shut."""

    def __init__(self) -> None:
        self.open = False

    def __getitem__(self, recipient: str) -> Actions:
        if recipient.startswith("gate-"):
            return OK if self.open else Say("450 4.2.0 The gate is shut")
        return super().__getitem__(recipient)


class Tally:
    """What happened in the rounds of one trouble."""

    def __init__(self) -> None:
        self.rounds = 0
        self.codes: Counter[int] = Counter()
        self.drained = 0
        self.slowest = 0.0


class DiskSweep:
    """One run of the sweep."""

    def __init__(
        self,
        root: Path,
        seed: int,
        rounds: Sequence[str],
        say: Callable[[str], None],
        *,
        hang: float = HANG,
        lasts: float = LASTS,
        preload: str = "",
    ) -> None:
        """``rounds`` are names of `TROUBLES`; ``preload`` is a library for the server, for the negative control."""
        self._root = root
        self._seed = seed
        self._rounds = rounds
        self._say = say
        self._hang = hang
        self._lasts = lasts
        self._preload = preload
        self._chance = random.Random(f"{seed} disk")
        self._count = 0
        self._moody = Moody()
        self._refused: dict[str, str] = {}
        self.tallies = {name: Tally() for name in rounds}
        self.faults: list[str] = []
        self.verdict: Verdict | None = None

    def run(self) -> None:
        """Do it all; the results are in the attributes.

        Raises:
            AssertionError: the server does not start or does not stop.
            Unavailable: this machine lacks a right or a program.
        """
        port = free_port([_STEADY_ADDRESS, _MOODY_ADDRESS])
        zones = {
            STEADY: {"MX": ["10 mx.steady.test."]},
            "mx.steady.test": {"A": [_STEADY_ADDRESS]},
            MOODY: {"MX": ["10 mx.moody.test."]},
            "mx.moody.test": {"A": [_MOODY_ADDRESS]},
        }
        with ExitStack() as stack:
            disk = stack.enter_context(SmallDisk(self._root / "image", self._root / "disk"))
            dns = stack.enter_context(DnsServer(zones))
            steady = stack.enter_context(Mx(_STEADY_ADDRESS, port))
            moody = stack.enter_context(Mx(_MOODY_ADDRESS, port, Script(rcpt=self._moody)))
            site = self._site(dns.address, port, disk)
            ledger = Ledger(self._root / "ledger")
            stack.callback(ledger.close)
            try:
                site.start()
                with self._load(site, ledger):
                    for number, name in enumerate(self._rounds, 1):
                        self._round(name, site, disk, moody, steady, ledger)
                        self._say(f"{bar(number, len(self._rounds))} {name}; {ledger.acknowledged()} acknowledged")
                self._moody.open = True
                stuck = drain(site)
            finally:
                if site.process is not None:
                    site.stop()
            copies = [*in_maildirs(site.mail_root), *in_spool(site.spool_path)]
            copies += [copy for exchanger in (steady, moody) for copy in at_exchanger(exchanger.messages)]
            self.verdict = judge(ledger.messages(), copies, doubts(site.log()), stuck)
            self._conclude(copies, site)

    def _conclude(self, copies: Sequence[Copy], site: Site) -> None:
        assert self.verdict is not None
        self.faults += self.verdict.broken()
        found = {copy.id: copy.place for copy in copies}
        self.faults += [
            f"refused with {answer}, and found in {found[name]}: {name}"
            for name, answer in self._refused.items()
            if name in found
        ]
        if "panic" in site.log():
            self.faults.append("the log has a panic")

    def _site(self, dns: str, port: int, disk: SmallDisk) -> Site:
        site = Site(
            self._root / "site",
            dns=dns,
            port=port,
            users=(*USERS, *SENDERS),
            retry={"minimum": "1s", "destination_pause": "1s"},
            local={"domains": [DOMAIN], "mail_root": str(disk.place / "mail")},
        )
        site.spool_path, site.mail_root = disk.place / "spool", disk.place / "mail"
        site.configure(top={"spool": str(site.spool_path)})
        if self._preload:
            site.prefix = ["env", f"LD_PRELOAD={self._preload}"]
        return site

    @contextmanager
    def _load(self, site: Site, ledger: Ledger) -> Iterator[None]:
        stop = threading.Event()
        client = Client(0, self._seed, ledger, lambda: site.address("relay"), stop, 0.2)
        client.start()
        try:
            yield
        finally:
            stop.set()
            client.join()

    # -- one round ----------------------------------------------------------------------------------------------------

    def _round(self, name: str, site: Site, disk: SmallDisk, moody: Mx, steady: Mx, ledger: Ledger) -> None:
        trouble, tally = TROUBLES[name], self.tallies[name]
        tally.rounds += 1
        self._moody.open = False
        waiting = [self._send(site, ledger, f"gate-{number}-{len(self._rounds)}") for number in range(WAITING)]
        for _, queue_id in waiting:
            await_value(lambda queue_id=queue_id: queue_id in site.files("deferred"), what="deferred")  # type: ignore[misc]
        pids = lasting(site)
        with self._trouble(name, site, disk):
            self._moody.open = True
            if trouble.hangs:
                self._hung(site, ledger)
            else:
                site.run("mtad-flush")
                for _ in range(PROBES):
                    if name == "full":
                        disk.fill()
                    elif name == "inodes gone":
                        disk.exhaust()
                    self._probe(name, site, ledger)
                    time.sleep(self._chance.uniform(0, 2 * self._lasts / PROBES))
                ids = [sent.id for sent, _ in waiting]
                tally.drained += self._await_drained(name, moody, ids) if trouble.drains else arrived(moody, ids)
        healed = time.monotonic()
        self._await_health(name, site, steady, ledger, healed)
        self._await_drained(name, moody, [sent.id for sent, _ in waiting], HEALTHY)
        tally.slowest = max(tally.slowest, took := time.monotonic() - healed)
        if took > HEALTHY:
            self.faults.append(f"{name}: well only {took:.1f} s after the healing")
        if lasting(site) != pids:
            self.faults.append(f"{name}: processes died: {pids} were, {lasting(site)} are")

    def _trouble(self, name: str, site: Site, disk: SmallDisk) -> AbstractContextManager[None]:
        match name:
            case "full":
                return disk.full()
            case "inodes gone":
                return disk.without_inodes()
            case "read-only":
                return disk.read_only()
            case "hung":
                return disk.frozen(self._hang)
            case "fsync fails":
                return small_disk.failing(site.processes(), "fsync:error=EIO", "fdatasync:error=EIO")
            case _:
                # A disk of which nothing is known any more: what was written stands there, and cannot be taken back.
                faults = (
                    f"{call}:error=EIO" for call in ("fsync", "fdatasync", "unlinkat", "unlink", "ftruncate", "renameat")
                )
                return small_disk.failing(site.processes(), *faults)

    def _hung(self, site: Site, ledger: Ledger) -> None:
        """Send a message to the hung disk, which gets its answer only when the disk is back."""
        answers: list[int] = []
        sender = threading.Thread(target=lambda: answers.append(self._probe("hung", site, ledger)), daemon=True)
        sender.start()
        sender.join(self._hang)
        if answers and answers[0] == 250:
            self.faults.append("hung: 250 while the disk hangs")

    def _compose(self, recipient: str = "") -> tuple[Sent, bytes]:
        self._count += 1
        name = f"p-{self._count}"
        message, content = compose(self._chance, name)
        if recipient:
            content = content.replace(f"To: {', '.join(message.recipients)}\r\n".encode(), b"", 1)
            message = msgspec.structs.replace(message, recipients=(recipient,))
        return message, content

    def _send(self, site: Site, ledger: Ledger, local: str) -> tuple[Sent, str]:
        message, content = self._compose(f"{local}-{self._count}@{MOODY}")
        ledger.note(message)
        queue_id = site.send(message.sender, message.recipients, content, "relay")
        ledger.note(msgspec.structs.replace(message, queue_id=queue_id))
        return message, queue_id

    def _probe(self, name: str, site: Site, ledger: Ledger, recipient: str = "") -> int:
        """Send a message; its code, 0 when there was none. One that may not be is a fault."""
        message, content = self._compose(recipient)
        ledger.note(message)
        try:
            code, text = transact(site, message, content)
        except (OSError, smtplib.SMTPException) as fault:
            self.faults.append(f"{name}: the session broke: {fault!r}")
            return 0
        if not recipient:
            self.tallies[name].codes[code] += 1
        if code == 250:
            ledger.note(msgspec.structs.replace(message, queue_id=text.rpartition(" ")[2]))
        else:
            self._refused[message.id] = f"{code} {text}"
        if code not in TROUBLES[name].codes and not recipient:
            self.faults.append(f"{name}: {code} {text}")
        return code

    def _await_drained(self, name: str, moody: Mx, ids: Sequence[str], timeout: float = 10.0) -> int:
        try:
            await_value(lambda: arrived(moody, ids) == len(ids), timeout)
        except AssertionError:
            self.faults.append(f"{name}: of {len(ids)} in the queue only {arrived(moody, ids)} were delivered in time")
        return arrived(moody, ids)

    def _await_health(self, name: str, site: Site, steady: Mx, ledger: Ledger, healed: float) -> None:
        """Wait until a new message gets through and nothing is left where nothing belongs."""
        patience = 6 * HEALTHY
        recipient = f"well-{self._count}@{STEADY}"
        while (code := self._probe(name, site, ledger, recipient)) != 250:
            if time.monotonic() > healed + patience:
                self.faults.append(f"{name}: {code} long after the healing")
                return
        here = time.time() - (time.monotonic() - healed)

        def well() -> bool:
            if not any(recipient in message.recipients for message in steady.messages):
                return False
            return not any(older(site, queue, here) for queue in ("incoming", "active"))

        try:
            await_value(well, timeout=patience)
        except AssertionError:
            left = [f"{queue}/{old}" for queue in ("incoming", "active") for old in older(site, queue, here)]
            self.faults.append(f"{name}: not well within {patience:g} s: {left}")


def run(options: SweepOptions, say: Callable[[str], None]) -> SweepResult:
    """See the module."""
    own_mounts()
    names = list(TROUBLES)
    chance = random.Random(options.seed)
    rounds: list[str] = []
    while len(rounds) < options.length:
        chance.shuffle(names)
        rounds += names
    sweep = DiskSweep(options.directory, options.seed, rounds[: options.length], say)
    sweep.run()
    verdict = sweep.verdict
    assert verdict is not None
    rows: list[dict[str, Cell]] = [
        {
            "trouble": name,
            "rounds": tally.rounds,
            "452": tally.codes[452],
            "451": tally.codes[451],
            "250": tally.codes[250],
            "drained meanwhile": tally.drained,
            "slowest healing, s": tally.slowest,
        }
        for name, tally in sweep.tallies.items()
    ]
    rows.append(
        {
            "trouble": "all",
            "rounds": options.length,
            **totals([verdict]),
        }
    )
    return SweepResult(rows, sweep.faults)
