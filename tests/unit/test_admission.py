"""A client that is let in, or is not, is counted as long as it is there and no longer."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from mtad.listener.process import ListenerProcess
from mtad.net.connection import Connection
from mtad.occupancy import Occupancy


def test_a_session_for_which_there_is_no_memory_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        assert occupancy.total() == 1
        raise MemoryError

    monkeypatch.setattr(ListenerProcess, "_let_in", refuse)
    occupancy = Occupancy(b"x" * 16)
    process: Any = ListenerProcess.__new__(ListenerProcess)
    process._occupancy, process._row = occupancy, occupancy.assign()
    process._lock, process._visits = threading.Lock(), set()
    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(MemoryError):
        process._admit(Connection(ours, "192.0.2.1", 25), None)
    assert occupancy.total() == 0
    assert ours.fileno() == -1
