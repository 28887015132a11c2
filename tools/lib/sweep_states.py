"""The sweep "states": each write and flush of a disk is recorded under load, and then any moment of it is made real again.

While clients send, and messages are delivered, deferred, bounced and deleted, the disk writes down what it is told
(`tools.lib.crash_blocks`). Then states in which a power cut could have left it are made, at random places of the log and
with random parts of what was not flushed; each is mounted and looked through. What a client had its 250 for at that place
of the log must be there, whole, or at an exchanger that had it by then; no recipient may have more than two copies, of
which one is then the queue's. On some of the states the server is started, drains the queue, and all is counted again.

A file in ``corrupt/``, or one that would go there, is allowed only for a message without a 250.

The control is a record under libeatmydata: in its states mail must be lost.

The seed makes messages and places; the record differs from run to run.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from mtad.errors import MtadError
from tests.peers.mx import Mx, Transaction
from tests.site import Site
from tools.lib.crash_blocks import Recorded, Replay, lack
from tools.lib.crash_disks import command, own_mounts, unmount
from tools.lib.crash_finds import at_exchanger, in_maildirs, in_spool
from tools.lib.crash_load import Ledger
from tools.lib.crash_peers import peers
from tools.lib.crash_run import drain
from tools.lib.crash_verdict import Sent
from tools.lib.sweep_power import Figures, end, libeatmydata, load, start, weigh
from tools.lib.sweeps import Cell, Say, SweepOptions, SweepResult, Unavailable, bar

#: Seconds of load that are recorded.
_LOAD: Final = 1.0
_CLIENTS: Final = 4
#: Messages that an administrator deletes.
_DELETED: Final = 6
#: States to make from one record.
_PER_RECORD: Final = 250
#: States of the control.
_CONTROL: Final = 10
#: Where the images of the states are: they are flushed when they are unmounted, which no disk should have to do.
_MEMORY: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None
#: More transactions than an exchanger has open at a time.
_OPEN: Final = 100
#: The progress is told once for so many states.
_TELL: Final = 50
#: Faults of one state that are told.
_TOLD: Final = 5


class _Places(Ledger):
    """A ledger that knows how long the log of the disk was when a message got its 250, and when one was to be deleted."""

    def __init__(self, path: Path, position: Callable[[], int]) -> None:
        super().__init__(path)
        self._position = position
        self.acknowledged_at: dict[str, int] = {}
        self.deleted_at: dict[str, int] = {}

    def note(self, message: Sent) -> None:
        if message.queue_id:
            self.acknowledged_at[message.id] = self._position()
        super().note(message)

    def delete(self, site: Site, most: int) -> None:
        """Let an administrator delete some of the messages that stay."""
        for message in self.messages():
            if most and message.queue_id and any(address.startswith("stay-") for address in message.recipients):
                most -= 1
                self.deleted_at[message.id] = self._position()
                site.run("mtaq", "delete", message.queue_id)

    def at(self, position: int) -> list[Sent]:
        """What was sent, as it was known at a place of the log; what was to be deleted by then has no 250 any more."""
        found = []
        for message in self.messages():
            known = self.acknowledged_at.get(message.id, position + 1) <= position
            gone = self.deleted_at.get(message.id, position + 1) <= position
            found.append(message if known and not gone else msgspec.structs.replace(message, queue_id=""))
        return found


class _Exchanger(Mx):
    """An exchanger that knows how long the log was when it took a message, before it says so."""

    def __init__(self, position: Callable[[], int], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._position = position
        self._taken: dict[int, int] = {}

    def note(self, change: Callable[[], None]) -> None:
        with self._condition:
            super().note(change)
            for transaction in self.transactions[-_OPEN:]:
                if transaction.reply:
                    self._taken.setdefault(id(transaction), self._position())

    def by(self, position: int) -> list[Transaction]:
        """The messages that it had taken by a place of the log."""
        return [one for one in self.messages if self._taken.get(id(one), position + 1) <= position]


class _Recording:
    """One record and all that is known about it."""

    def __init__(self, stack: ExitStack, root: Path, seed: str, preload: str, seconds: float) -> None:
        """Make the record. What it starts ends with the stack."""
        self.disk = Recorded(root)
        self.world = stack.enter_context(peers(lambda *given: _Exchanger(self.disk.position, *given)))
        self.ledger = _Places(root / "ledger", self.disk.position)
        stack.callback(self.ledger.close)
        self.spool, self.mail = self.disk.path / "spool", self.disk.path / "mail"
        self.site = self.world.site(root / "site", top={"spool": str(self.spool)}, local={"mail_root": str(self.mail)})
        self.site.spool_path, self.site.mail_root = self.spool, self.mail
        stack.callback(end, self.site)
        with self.disk:
            start(self.site, preload)
            with load(self.site, self.ledger, seed, 0, _CLIENTS):
                time.sleep(seconds / 2)
                self.ledger.delete(self.site, _DELETED)
                time.sleep(seconds / 2)
                end(self.site)
        assert self.ledger.acknowledged_at, "no message was acknowledged"
        self.replay = Replay(self.disk)

    def places(self, chance: random.Random, states: int) -> list[int]:
        """Places of the log, in its order, as numbers of records; none before the first message got its 250."""
        first = min(self.ledger.acknowledged_at.values())
        count = len(self.replay.records)
        start_at = next(number for number in range(count + 1) if self.replay.position(number) >= first)
        return sorted(chance.randint(start_at, count) for _ in range(states))

    def look(self, position: int) -> Figures:
        """Compare the state that is mounted with what is known of that place of the log."""
        copies = [*in_maildirs(self.mail), *in_spool(self.spool), *at_exchanger(self._taken(position))]
        return weigh(self.ledger.at(position), copies, (), 1)

    def drain(self, position: int) -> Figures:
        """Start the server on the state that is mounted, let it drain the queue, stop it, and compare.

        Raises:
            AssertionError: it does not start, or does not stop.
        """
        before = {id(one) for exchanger in self.world.exchangers for one in exchanger.messages}
        start(self.site)
        stuck = drain(self.site)
        self.site.stop()
        later = [one for exchanger in self.world.exchangers for one in exchanger.messages if id(one) not in before]
        copies = [*in_maildirs(self.mail), *in_spool(self.spool), *at_exchanger([*self._taken(position), *later])]
        return weigh(self.ledger.at(position), copies, stuck, 1)

    def _taken(self, position: int) -> list[Transaction]:
        return [
            one
            for exchanger in self.world.exchangers
            if isinstance(exchanger, _Exchanger)
            for one in exchanger.by(position)
        ]


def play(
    root: Path,
    seed: str,
    states: int,
    *,
    preload: str = "",
    started: int = 1,
    seconds: float = _LOAD,
    tell: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Cell], list[str]]:
    """Make one record, of so many seconds of load, and so many states of it.

    On every ``started``-th state the server is started; the others are looked at as they are. ``preload`` is a library for
    its processes while it is recorded. ``tell`` is told the number of each state that was tried.

    Returns:
        the figures, and the faults.

    Raises:
        AssertionError: there is no record.
    """
    chance = random.Random(seed)
    faults: list[str] = []
    results: list[Figures] = []
    starts = repaired = 0
    with ExitStack() as stack:
        recording = _Recording(stack, root, seed, preload, seconds)
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mtad-state-", dir=_MEMORY)))
        for number, place in enumerate(recording.places(chance, states), 1):
            tell(number)
            position = recording.replay.position(place)
            try:
                with mounted(recording.replay.state(place, chance), memory / f"{number}", recording.disk.path) as mended:
                    repaired += mended
                    try:
                        if number % started:
                            figures = recording.look(position)
                        else:
                            figures = recording.drain(position)
                            starts += 1
                    finally:
                        end(recording.site)
            except (AssertionError, MtadError, OSError) as fault:
                faults.append(f"{root}, state after record {place}: {type(fault).__name__}: {fault}")
                continue
            results.append(figures)
            faults += [f"{root}, state after record {place}: {told}" for told in figures.faults[:_TOLD]]
    records = recording.replay.records
    row: dict[str, Cell] = {
        "acknowledged": len(recording.ledger.acknowledged_at),
        "writes": sum(not record.flush for record in records),
        "flushes": sum(record.flush for record in records),
        "states": states,
        "started": starts,
        "repaired by e2fsck": repaired,
        "lost": sum(one.lost for one in results),
        "torn": sum(one.torn for one in results),
        "half, no 250": sum(one.half for one in results),
    }
    return row, faults


@contextmanager
def mounted(state: bytearray, image: Path, place: Path) -> Iterator[bool]:
    """Mount it; whether it had to be repaired first, as at any boot: a superblock may be torn between its two sectors."""
    image.write_bytes(state)
    mount = ("mount", "-t", "ext4", "-o", "loop", str(image), str(place))
    repaired = False
    try:
        command(*mount)
    except AssertionError:
        subprocess.run(["e2fsck", "-f", "-y", str(image)], check=False, timeout=60, capture_output=True)
        command(*mount)
        repaired = True
    try:
        yield repaired
    finally:
        unmount(place)
        image.unlink()  # its name, too, is for once: who has it mounted elsewhere still shall not be met again


def run(options: SweepOptions, say: Say) -> SweepResult:
    """``length`` states in all, a row for each record of at most `_PER_RECORD` of them, and one for the control."""
    if reason := lack():
        raise Unavailable(reason)
    own_mounts()
    rows: list[dict[str, Cell]] = []
    faults: list[str] = []
    done = 0

    def tell(number: int) -> None:
        if number % _TELL == 0:
            say(f"{bar(done + number, options.length)} states, {len(faults)} faults in earlier records")

    while done < options.length:
        states = min(_PER_RECORD, options.length - done)
        figures, found = play(options.directory / f"{len(rows)}", f"{options.seed} {len(rows)}", states, tell=tell)
        done += states
        rows.append({"record": f"{len(rows) + 1}", **figures})
        faults += found
        for fault in found:
            say(fault)
        say(f"{bar(done, options.length)} states, {len(found)} faults")
    if (library := libeatmydata()) is None:
        say("libeatmydata is not installed: no control")
    else:
        figures, _ = play(
            options.directory / "control", f"{options.seed} control", _CONTROL, preload=str(library), started=_CONTROL + 1
        )
        rows.append({"record": "control: libeatmydata", **figures})
        if not figures["lost"]:
            faults.append("the control lost nothing: the states prove nothing")
    return SweepResult(rows, faults)
