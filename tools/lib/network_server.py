"""mtad with what a sweep of the network must notice: `tools.lib.sweep_server`, and two more ways to break it.

python network_server.py BREAK PROGRAM ARGUMENTS…
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from mtad.delivery import smtp
from mtad.delivery.words import Place, broken
from mtad.errors import MtadError
from mtad.net.connection import Connection
from mtad.outcome import Deferred, Delivered
from mtad.smtp.dialogue import Phase
from tools.lib import sweep_server

#: How much longer than it may a patient server waits.
_PATIENCE: Final = 100
_receive: Final = Connection.receive


def _assume(error: MtadError, at: Place, phase: Phase, whole: bool) -> Deferred | Delivered:
    """Who got the dot will have taken the message."""
    if phase is Phase.DOT:
        return Delivered("2.0.0", "no answer, which is as good as one", at.host)
    return broken(error, at, phase, whole)


def _wait_long(connection: Connection, timeout: float, limit: int = 65536) -> bytes:
    """Keep no deadline."""
    return _receive(connection, timeout * _PATIENCE, limit)


def _break_optimist() -> None:
    smtp.broken = _assume  # type: ignore[assignment,attr-defined]


def _break_patient() -> None:
    Connection.receive = _wait_long  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    sweep_server.BREAKS["optimist"] = _break_optimist
    sweep_server.BREAKS["patient"] = _break_patient
    sweep_server.main(sys.argv[1:])
