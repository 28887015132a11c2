"""What lies in the queues at a checkpoint of the sweep ``soak``, and what of it should not.

Errors: none of its own. What is looked at may move meanwhile; `corrupt` and `set_aside` want a server that stands still.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.spool.queues import LIVE, Queue, Spool
from tools.lib.crash_verdict import identify
from tools.lib.soak_stage import Stage

#: Seconds by which an attempt may come late.
GRACE: Final = 5.0


def left(stage: Stage, *, harmed: bool) -> list[str]:
    """What is in the queues and should not be; ``harmed``: also harmed files of deferred."""
    spool = stage.site.spool()
    try:
        return [
            fault
            for queue in LIVE
            for name, due in spool.entries(queue)
            for fault in _wrong(stage, spool, queue, name, due, harmed=harmed)
        ]
    finally:
        spool.close()


def _wrong(stage: Stage, spool: Spool, queue: Queue, name: str, due: float | None, *, harmed: bool) -> list[str]:
    """What is wrong with one file: it is late, or what is in it could have been delivered."""
    where = f"{queue.value}/{name}"
    if _is_harmed(stage, queue, name):
        return [f"{where} is harmed"] if harmed or queue is Queue.INCOMING else []
    now = stage.clock.now()
    late = queue is Queue.DEFERRED and due is not None and due < now - GRACE
    wrong = [f"{where} was due {now - due:.1f} s ago"] if late and due is not None else []
    try:
        message = spool.load(queue, name)
    except (FileNotFoundError, QueueFileUnfinished):
        return []  # moved on meanwhile, or never acknowledged
    except QueueFileDamaged as fault:
        return [f"{where}: {fault}"]
    for recipient, state in zip(message.envelope.recipients, message.states, strict=True):
        if not state.settled and not stage.tempers.stays(recipient.address):
            wrong.append(f"{where} for {recipient.address}: {state.outcome}")
    return wrong


def _is_harmed(stage: Stage, queue: Queue, name: str) -> bool:
    try:
        return stage.harmed.get((stage.site.spool_path / queue.value / name).lstat().st_ino) == name
    except OSError:
        return False


def corrupt(stage: Stage, *, last: bool) -> list[str]:
    """Look at what lies in corrupt/, and throw it away; what is wrong. ``last``: all that is harmed must be there."""
    faults = []
    for path in (stage.site.spool_path / Queue.CORRUPT.value).iterdir():
        if stage.harmed.pop(path.lstat().st_ino, "") == "":
            known = identify(path.read_bytes()) if path.is_file() else None
            if known is None or not stage.books.unknown_to_clients(known[0]):
                faults.append(f"in corrupt/, and nobody put it there: {path.name!r}")
                if path.is_file():
                    shutil.copy(path, stage.root / f"corrupt-{path.name}")
        remove(path)
    if last:
        faults += [f"harmed, and not in corrupt/: {name!r}" for name in stage.harmed.values()]
    return faults


@contextmanager
def set_aside(stage: Stage) -> Iterator[None]:
    """What is harmed and not yet found lies elsewhere meanwhile."""
    moved: list[tuple[Path, Path]] = []
    for queue in LIVE:
        for path in sorted((stage.site.spool_path / queue.value).iterdir()):
            if _is_harmed(stage, queue, path.name):
                aside = stage.staging / f"aside-{len(moved)}"
                os.rename(path, aside)
                moved.append((aside, path))
    try:
        yield
    finally:
        for aside, path in moved:
            os.rename(aside, path)


def remove(path: Path) -> None:
    """Whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
