"""What the disk refuses is done again until it lets it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mtad.scheduler.moves import PAUSE, QUIET, TURN, Moves


class Disk:
    """A clock, a disk that can refuse, and what happened."""

    def __init__(self) -> None:
        self.now = 0.0
        self.full = False
        self.tries = 0
        self.warnings: list[str] = []
        self.done: list[bool] = []
        self.moves = Moves(lambda: self.now, self.warnings.append)

    def move(self, answer: bool = True) -> Callable[[], bool]:
        def tried() -> bool:
            self.tries += 1
            if self.full:
                raise OSError(28, "No space left on device")
            return answer

        return tried


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.mark.parametrize("answer", [True, False])
def test_what_the_disk_allows_is_done_at_once(disk: Disk, answer: bool) -> None:
    disk.moves.do("a", disk.move(answer), disk.done.append)
    assert disk.done == [answer]
    assert "a" not in disk.moves
    assert disk.moves.wait() is None


def test_what_it_refuses_is_repeated_until_it_does_not(disk: Disk) -> None:
    disk.full = True
    disk.moves.do("a", disk.move(), disk.done.append)
    assert "a" in disk.moves
    for _ in range(3):
        disk.now += PAUSE - 1
        assert disk.moves.turn() is False
        assert disk.moves.wait() == 1.0
        disk.now += 1
        disk.moves.turn()
    assert disk.tries == 4
    disk.full = False
    disk.now += PAUSE
    disk.moves.turn()
    assert disk.done == [True]
    assert len(disk.moves) == 0


def test_the_refusals_of_many_messages_are_told_once_in_a_while(disk: Disk) -> None:
    disk.full = True
    for number in range(100):
        disk.moves.do(str(number), disk.move(), disk.done.append)
    assert len(disk.warnings) == 1
    assert "No space left on device" in disk.warnings[0]
    for _ in range(int(QUIET / PAUSE) - 1):
        disk.now += PAUSE
        while disk.moves.turn():
            pass
    assert len(disk.warnings) == 1
    disk.now += PAUSE
    while disk.moves.turn():
        pass
    assert len(disk.warnings) == 2
    assert len(disk.moves) == 100


def test_a_turn_does_a_bounded_number(disk: Disk) -> None:
    for number in range(TURN + 1):
        disk.moves.later(str(number), lambda: disk.done.append(True))
    disk.now += PAUSE
    assert disk.moves.turn() is True
    assert len(disk.done) == TURN
    assert disk.moves.turn() is False
    assert len(disk.done) == TURN + 1


def test_the_later_of_two_things_about_one_message_counts(disk: Disk) -> None:
    disk.moves.later("a", lambda: disk.done.append(False))
    disk.moves.later("b", lambda: None)
    disk.moves.later("a", lambda: disk.done.append(True))
    disk.now += PAUSE
    disk.moves.turn()
    assert disk.done == [True]
