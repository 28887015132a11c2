"""Wrong passwords, counted over all listener processes without a lock.

What it is for: to guess passwords here is slow, and soon refused. Each wrong password is counted for the client's network
(as `mtad.occupancy` sees it: an IPv6 client is its /64) and for the login that was claimed, whether anybody has it or not.
The more there were, the longer the reply to the next one is held back. At the limit the network is refused for as long as
it goes on, and `WINDOW` longer. A login that is guessed at from everywhere is not locked against its owner: it is refused
only to networks that have been wrong themselves.

An anonymous shared mapping, made by the master before it forks, holds a fixed number of slots: a count, and the second of
the last failure. A slot is one aligned word of 64 bits and is written as a whole, so none is ever seen half written; two
who count in the same microsecond may count once. Which slot is whose is hashed with a key that is new at each start.

Invariants: nothing is remembered of a password. A success changes nothing, so that no account of one's own washes away
guesses at another's. A clock that is set back forgets nothing and refuses nobody for longer.

Errors: none.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from copy import copy
from hashlib import blake2b
from typing import Final

from mtad.occupancy import client_network

_SLOTS: Final = 65536

#: Seconds after the last failure for which a count is kept.
WINDOW: Final = 3600

#: Wrong passwords of a login, from anywhere, per one that a client's network may have: guesses come from many places.
LOGIN_FACTOR: Final = 5

#: Seconds for which the reply to a first wrong password is held back; each further one doubles it up to the longest.
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 8.0


class Throttle:
    """The shared counts; see the module."""

    def __init__(self, key: bytes, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Make the mapping: 512 KiB.

        Args:
            key: random, 16 octets.
            limit: wrong passwords of one client's network before it is refused.
            clock: seconds, the same in all processes; nobody sets it, so no network is refused for longer.
        """
        self._key = key
        self._limit = limit
        self._clock = clock
        self._map = mmap.mmap(-1, _SLOTS * 8)
        self._cells = memoryview(self._map).cast("Q")

    def limited(self, limit: int) -> Throttle:
        """The same counts with another limit, after a reload."""
        throttle = copy(self)
        throttle._limit = limit
        return throttle

    def refused(self, address: str, login: str = "") -> bool:
        """Whether a client, for this login or (none given) for any, is not to try again for now."""
        client = self._count(self._of_client(address))
        if client >= self._limit or not login or not client:
            return client >= self._limit
        return self._count(self._of_login(login)) >= self._limit * LOGIN_FACTOR

    def failed(self, address: str, login: str) -> float:
        """Count a wrong password; the seconds for which the reply to it is to be held back."""
        count = max(self._add(self._of_client(address)), self._add(self._of_login(login)))
        return float(min(FIRST_PAUSE * 2.0 ** min(count - 1, 16), LONGEST_PAUSE))

    def _of_client(self, address: str) -> int:
        return self._slot(b"client " + client_network(address).encode())

    def _of_login(self, login: str) -> int:
        return self._slot(b"login " + login.casefold().encode("utf-8", "surrogatepass"))

    def _slot(self, name: bytes) -> int:
        return int.from_bytes(blake2b(name, digest_size=2, key=self._key).digest())

    def _count(self, slot: int) -> int:
        cell = self._cells[slot]
        return cell & 0xFFFFFFFF if self._clock() - (cell >> 32) < WINDOW else 0

    def _add(self, slot: int) -> int:
        count = min(self._count(slot) + 1, 0xFFFFFFFF)
        self._cells[slot] = int(self._clock()) << 32 | count
        return count
