"""A listener process without memory: nobody is counted for ever, and those who are there go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtad.listener.process import ListenerProcess
from mtad.signals import Signals
from tests.unit.delivery_aid import World


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ListenerProcess]:
    world = World(tmp_path)
    signals = Signals({signal.SIGTERM})
    before = signal.getsignal(signal.SIGTERM)
    yield ListenerProcess(world.runtime, world.runtime.occupancy.assign(), world.spool, signals)
    signal.signal(signal.SIGTERM, before)
    signal.set_wakeup_fd(-1)
    signals.close()
    world.close()


def _no_memory(*_: object) -> None:
    raise MemoryError


def test_it_goes_on(process: ListenerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    def turn(_: object) -> None:
        turns.append(1)
        process._draining = len(turns) == 3
        raise MemoryError

    monkeypatch.setattr(process, "_turn", turn)
    process.run()
    assert len(turns) == 3


def test_a_session_whose_connection_cannot_be_closed_is_not_counted_for_ever(process: ListenerProcess) -> None:
    connection: Any = type("Connection", (), {"close": _no_memory})()
    occupancy = process._occupancy
    slot = occupancy.slot("192.0.2.1")
    occupancy.add(process._row, slot)
    with pytest.raises(MemoryError):
        process._leave(connection, slot)
    assert occupancy.total() == 0
