"""The sweep "power": the power is cut at random moments under load, and the server starts again on what the disks kept.

It goes in rounds of a few cuts. Each round has new file systems of its own, of the kind and the layout whose turn it is:
spool and mail on one, or on two of which either is cut first and the other lives on for a moment. After a cut all processes
are killed, the file systems mounted again, and the server started again under load; after the last one the queue is drained
and all copies are counted. What the clients got their 250 for, and what exchangers have taken, is written down elsewhere.

An extra copy of a message is allowed once for each recipient and cut that came after the message was sent: what a cut took
away may be the record that it was delivered. A file in ``corrupt/`` is allowed only for a message that never got its 250.

A last round is the control: under libeatmydata, with which nothing is ever flushed, mail must be lost. Otherwise the cuts
are none, and the sweep proves nothing.

The seed makes the schedule and the messages. What the server is doing at the moment of a cut differs from run to run.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Literal

import msgspec

from tests.site import Site, await_value
from tools.lib.crash_disks import Disk, Kind, lack, own_mounts
from tools.lib.crash_finds import in_maildirs, in_spool
from tools.lib.crash_load import Client, Ledger
from tools.lib.crash_peers import peers
from tools.lib.crash_run import drain
from tools.lib.crash_verdict import Copy, Sent, judge
from tools.lib.sweeps import Cell, Say, SweepOptions, SweepResult, Unavailable, bar

Layout = Literal["one", "spool first", "mail first"]

LAYOUTS: Final[Sequence[Layout]] = ("one", "spool first", "mail first")
#: Cuts of a round.
_ROUND: Final = 4
#: Seconds of load before a cut: from this to that.
_LOAD: Final = (0.5, 3.0)
#: Seconds, at most, between the cut of the first file system and that of the second; and from the last to the kill.
_BETWEEN: Final = 0.1
_CLIENTS: Final = 8
#: Where libeatmydata may be.
_EATMYDATA: Final = (
    Path(f"/usr/lib/{os.uname().machine}-linux-gnu/libeatmydata.so.1"),
    Path("/usr/lib64/libeatmydata.so"),
    Path("/usr/lib/libeatmydata.so"),
)


class Cut(msgspec.Struct, frozen=True):
    """One power cut: seconds of load before it, between the file systems, and from then to the kill."""

    load: float
    between: float
    after: float


class Round(msgspec.Struct, frozen=True):
    """One round: what it is played on, and its cuts."""

    kind: Kind
    layout: Layout
    cuts: tuple[Cut, ...]


class Figures(msgspec.Struct, frozen=True):
    """What came of a round; the faults are for people."""

    cuts: int
    messages: int
    lost: int
    torn: int
    twice: int
    half: int
    """Files in corrupt/ of messages without a 250."""
    faults: tuple[str, ...]


def libeatmydata() -> Path | None:
    """Where it is; None when it is not installed."""
    return next((path for path in _EATMYDATA if path.exists()), None)


def schedule(seed: int, cuts: int, kinds: Sequence[Kind]) -> list[Round]:
    """The rounds that a seed brings: each kind with each layout in turn, `_ROUND` cuts at most in each, ``cuts`` in all."""
    chance = random.Random(seed)
    turns = [(kind, layout) for layout in LAYOUTS for kind in kinds]
    rounds: list[Round] = []
    per_round = max(1, min(_ROUND, cuts // len(turns)))
    while cuts > 0:
        kind, layout = turns[len(rounds) % len(turns)]
        drawn = [
            Cut(chance.uniform(*_LOAD), chance.uniform(0, _BETWEEN), chance.uniform(0, _BETWEEN))
            for _ in range(min(per_round, cuts))
        ]
        rounds.append(Round(kind, layout, tuple(drawn)))
        cuts -= len(drawn)
    return rounds


def run(options: SweepOptions, say: Say) -> SweepResult:
    """``length`` cuts in all; a row for each kind of file system and layout, and one for the control."""
    if reason := lack():
        raise Unavailable(reason)
    own_mounts()
    kinds: list[Kind] = ["ext4"]
    if not lack("xfs"):
        kinds.append("xfs")
    done = 0
    found: dict[tuple[str, str], list[Figures]] = {}
    for number, turn in enumerate(schedule(options.seed, options.length, kinds)):
        figures = play(options.directory / f"{number}", f"{options.seed} {number}", turn)
        done += len(turn.cuts)
        found.setdefault((turn.kind, turn.layout), []).append(figures)
        faults = len(figures.faults)
        say(f"{bar(done, options.length)} {turn.kind}, {turn.layout}: {figures.messages} messages, {faults} faults")
    rows = [_row(kind, layout, many) for (kind, layout), many in found.items()]
    faults_found = [fault for many in found.values() for figures in many for fault in figures.faults]
    if (library := libeatmydata()) is None:
        say("libeatmydata is not installed: no control")
    else:
        turn = Round("ext4", "one", (Cut(1.0, 0.0, 0.0),))
        control = play(options.directory / "control", f"{options.seed} control", turn, preload=str(library))
        rows.append(_row("ext4", "control: libeatmydata", [control]))
        if not control.lost:
            faults_found.append("the control lost nothing: the cuts prove nothing")
    return SweepResult(rows, faults_found)


def _row(kind: str, layout: str, many: Sequence[Figures]) -> dict[str, Cell]:
    return {
        "file system": kind,
        "layout": layout,
        "cuts": sum(figures.cuts for figures in many),
        "acknowledged": sum(figures.messages for figures in many),
        "lost": sum(figures.lost for figures in many),
        "torn": sum(figures.torn for figures in many),
        "twice": sum(figures.twice for figures in many),
        "half, no 250": sum(figures.half for figures in many),
    }


def play(root: Path, seed: str, turn: Round, preload: str = "") -> Figures:
    """Play one round in a directory of its own; ``preload`` is a library for the server's processes."""
    with ExitStack() as stack:
        disks = [
            stack.enter_context(Disk(root / name, turn.kind))
            for name in (("spool",) if turn.layout == "one" else ("spool", "mail"))
        ]
        for disk in disks:
            disk.format()
            disk.mount()
        world = stack.enter_context(peers())
        spool, mail = disks[0].path / "spool", disks[-1].path / "mail"
        site = world.site(root / "site", top={"spool": str(spool)}, local={"mail_root": str(mail)})
        site.spool_path, site.mail_root = spool, mail
        ledger = Ledger(root / "ledger")
        stack.callback(ledger.close)
        stack.callback(end, site)
        order = disks[::-1] if turn.layout == "mail first" else disks
        try:
            for number, cut in enumerate(turn.cuts):
                start(site, preload)
                with load(site, ledger, seed, number):
                    time.sleep(cut.load)
                    _cut(order, cut)
                    end(site)
                for disk in disks:
                    disk.unmount()
                    disk.mount()
            start(site)
            stuck = drain(site)
            site.stop()
        except AssertionError as failure:  # what is left cannot be counted
            return Figures(len(turn.cuts), ledger.acknowledged(), 0, 0, 0, 0, (f"{root}: {failure}",))
        copies = [*in_maildirs(mail), *in_spool(spool), *world.copies()]
        return weigh(ledger.messages(), copies, stuck, len(turn.cuts))


def start(site: Site, preload: str = "") -> None:
    """Start the site; ``preload`` is a library for its processes."""
    # A process group of its own: whatever of it is alive at the kill is found without asking a spool that is gone.
    site.start(start_new_session=True, env=site.environment(**({"LD_PRELOAD": preload} if preload else {})))


def end(site: Site) -> None:
    """Kill all processes of the site, and wait until they are gone, and with them what they had open."""
    process = site.process
    if process is None:
        return

    def gone() -> bool:
        left = _group(process.pid)
        if left:
            os.killpg(process.pid, signal.SIGKILL)
        return not left

    await_value(gone, what="all processes have ended")
    process.wait()
    site.process = None


def _group(group: int) -> list[int]:
    """The processes of a process group, but for those that have ended and that nobody has buried yet."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = _fields(path)[:3]
        except OSError:
            continue  # gone meanwhile
        if int(its_group) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def _fields(path: Path) -> list[str]:
    """State, parent, process group and the rest of what the kernel tells of a process or thread."""
    return path.read_text().rpartition(")")[2].split()


def _cut(order: Sequence[Disk], cut: Cut) -> None:
    for number, disk in enumerate(order):
        if number:
            time.sleep(cut.between)
        disk.cut()
    time.sleep(cut.after)


@contextmanager
def load(site: Site, ledger: Ledger, seed: str, number: int, count: int = _CLIENTS) -> Iterator[None]:
    """So many clients that send until the end of the context. Their ids begin with how many cuts there were before."""
    where = site.address("relay")
    stop = threading.Event()
    clients = []
    for index in range(count):
        name = number * 100 + index
        clients.append(Client(name, f"{seed} {number}", ledger, lambda: where, stop, pause=0.0))
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stop.set()
        for client in clients:
            client.join()


def weigh(sent: Sequence[Sent], copies: Sequence[Copy], stuck: Sequence[str], cuts: int) -> Figures:
    """Compare what was sent with what was found after that many cuts."""
    acknowledged = {message.id for message in sent if message.queue_id}
    half = [copy for copy in copies if copy.place == "corrupt" and copy.id not in acknowledged]
    whole = [copy for copy in copies if copy not in half]
    verdict = judge(sent, whole, {}, stuck)
    there = [copy for copy in whole if copy.place != "corrupt"]
    counts = Counter((copy.id, copy.recipient) for copy in there if not copy.report_id)
    # A report is a message, too: it may be made again, and each of those that were made may be delivered again.
    reports = Counter((copy.id, copy.recipient, copy.report_id) for copy in there if copy.report_id)
    counts.update((name, recipient) for name, recipient, _ in reports)
    counts.update({(name, f"{recipient}, report {report}"): count for (name, recipient, report), count in reports.items()})
    often = [
        f"{name} for {recipient}: {count} copies"
        for (name, recipient), count in counts.items()
        if count - 1 > cuts - _born(name)
    ]
    found = (("lost", verdict.lost), ("torn", verdict.torn), ("stuck", verdict.stuck), ("too often", often))
    faults = [f"{word}: {entry}" for word, entries in found for entry in entries]
    if not acknowledged:
        faults.append("no message was acknowledged: nothing was tried")
    return Figures(
        cuts,
        verdict.messages,
        len(verdict.lost),
        len(verdict.torn),
        sum(count - 1 for count in counts.values()),
        len(half),
        tuple(faults),
    )


def _born(name: str) -> int:
    """How many cuts there were when a message was sent; of a file that is nobody's message: 0."""
    number = name.partition("-")[0]
    return int(number) // 100 if number.isdigit() else 0
