"""mtad as a sweep runs it: what it repeats it repeats sooner, and on demand it is broken on purpose.

    python sweep_server.py BREAK PROGRAM ARGUMENTS…

Two pauses are shortened, so that a sweep of some hundred faults does not consist of waiting: between two tries of what the
disk refused, and between two looks at incoming/. BREAK is ``-``, or one of `BREAKS`: what a negative control needs, for a
sweep that cannot fail proves nothing.
"""

from __future__ import annotations

import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Final

from mtad.delivery import process as delivery
from mtad.listener import process as listener
from mtad.listener.room import Reserve, Room
from mtad.outcome import Attempt
from mtad.progress import Doubt, Reported
from mtad.scheduler import moves
from mtad.scheduler import process as scheduler
from mtad.spool.message import IncomingFile, OpenMessage
from mtad.spool.queues import Queue

#: Seconds, instead of 2 and 5.
MOVES_PAUSE: Final = 0.3
INCOMING_INTERVAL: Final = 0.3
#: Seconds by which a commit comes too late, when that is what is broken.
_LATE: Final = 0.2

_commit: Final = IncomingFile.commit
_note: Final = delivery._note


def _commit_late(file: IncomingFile) -> None:
    """Say yes first, and make it durable afterwards."""
    threading.Timer(_LATE, _commit_anyway, (file,)).start()


def _commit_anyway(file: IncomingFile) -> None:
    """Say yes, whatever the disk says."""
    try:
        _commit(file)
    except OSError:
        pass


def _break_late() -> None:
    IncomingFile.commit = _commit_late  # type: ignore[assignment,method-assign]


def _break_yes() -> None:
    IncomingFile.commit = _commit_anyway  # type: ignore[assignment,method-assign]


def _break_forget() -> None:
    """Who will be in doubt is not written down."""
    delivery._note = _note_no_doubt


def _note_no_doubt(message: OpenMessage, *events: Attempt | Doubt | Reported, durable: bool = False) -> bool:
    kept = [event for event in events if not isinstance(event, Doubt)]
    return not kept or _note(message, *kept, durable=durable)


def _break_crowd() -> None:
    """There is always room for one more."""
    Room.lack = lambda *_, **__: ""  # type: ignore[method-assign]


def _break_spin() -> None:
    """And where there is not, it is tried again at once, and nobody is told."""
    _break_crowd()
    Reserve.give_up = lambda self: False  # type: ignore[method-assign]  # noqa: ARG005
    # A sleep of no time takes some, after all.
    vars(listener)["time"] = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: None)


BREAKS: Final[dict[str, Callable[[], None]]] = {
    "late": _break_late,
    "yes": _break_yes,
    "forget": _break_forget,
    "crowd": _break_crowd,
    "spin": _break_spin,
}


def main(arguments: list[str]) -> None:
    """Become the program."""
    broken, program, *_ = arguments
    if broken in BREAKS:
        BREAKS[broken]()
    moves.PAUSE = MOVES_PAUSE  # type: ignore[misc]
    scheduler.SCAN_INTERVALS[Queue.INCOMING] = INCOMING_INTERVAL
    sys.argv = arguments[1:]
    sys.path[0] = str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
