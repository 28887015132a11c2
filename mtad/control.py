"""What the master says when `mtad status` asks, and where the sockets and locks of a server are."""

from __future__ import annotations

import os
from typing import Final

import msgspec

from mtad.desk import DESK_SOCKET
from mtad.net.channels import Counter
from mtad.spool.queues import MAILSLOT

#: In the spool: the master's counter.
CONTROL_SOCKET: Final = "control.sock"


class ProcessStatus(msgspec.Struct, frozen=True):
    """One process: what it is, since when it runs (seconds since the epoch), its sessions, how often its place died."""

    role: str
    pid: int
    started: float
    sessions: int = 0
    deaths: int = 0


class ListenerStatus(msgspec.Struct, frozen=True):
    """One listening service and the addresses it really has."""

    name: str
    service: str
    addresses: tuple[str, ...]


class Status(msgspec.Struct, frozen=True):
    """All that the master knows."""

    version: str
    pid: int
    started: float
    config: str
    hostname: str
    spool: str
    sessions: int
    listeners: tuple[ListenerStatus, ...]
    processes: tuple[ProcessStatus, ...]
    draining: int = 0
    """Processes of an earlier configuration that still finish their work."""
    reloads: int = 0
    """How often a reload was asked for, refused ones included."""
    reload_fault: str = ""
    """Why the last reload was refused; "" when it was not."""


def control_path(spool: str) -> str:
    """Where the master of a spool answers."""
    return os.path.join(spool, CONTROL_SOCKET)


def mailslot_path(spool: str) -> str:
    """Where the scheduler of a spool takes requests."""
    return os.path.join(spool, MAILSLOT)


def socket_paths(spool: str) -> tuple[str, ...]:
    """All sockets that a server has in its spool."""
    return control_path(spool), mailslot_path(spool), os.path.join(spool, DESK_SOCKET)


def ask_status(spool: str) -> Status | None:
    """The status of the server of a spool; None when none answers."""
    answer = Counter.ask(control_path(spool))
    if not answer:
        return None
    try:
        return msgspec.json.decode(answer, type=Status)
    except msgspec.MsgspecError:
        return None
