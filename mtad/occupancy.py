"""Who is connected, counted over all listener processes without a lock.

An anonymous shared mapping, made by the master before it forks, holds one row per listener process. A process writes in
its own row only, and reads all. A row has the number of the process's sessions and, for each of a fixed number of slots,
how many of its sessions have a client whose network hashes to that slot. Two clients that share a slot share a limit; with
65,536 slots, and a hash that is keyed anew at each start, nobody can arrange that.

A process counts a session in before it looks at the sums. So two that take the last place in the same microsecond may both
refuse, but never both admit.

When a listener dies its row is cleared by the master, so nothing leaks.
"""

from __future__ import annotations

import ipaddress
import mmap
from functools import lru_cache
from hashlib import blake2b
from typing import Final

_SLOTS: Final = 65536
#: Addresses whose slot a process remembers.
_REMEMBERED: Final = 4096
#: Rows: the most listeners that a configuration may ask for, twice over, so that a reload's old ones may drain meanwhile.
ROWS: Final = 128
_ROW: Final = 1 + _SLOTS


def client_network(address: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 of an IPv6 address."""
    if ":" not in address:
        return address
    bits = int(ipaddress.IPv6Address(address.partition("%")[0])) >> 64
    return f"{bits:x}::/64"


class Occupancy:
    """The shared table; see the module. ``key`` is random, 16 octets."""

    def __init__(self, key: bytes) -> None:
        """Make the mapping: 32 MiB of address space, of which only the pages that are used take memory."""
        self._key = key
        #: The slot of a client's network, 1 to 65,536; remembered, since a busy client asks for it again and again.
        self.slot = lru_cache(maxsize=_REMEMBERED)(self._slot)
        self._map = mmap.mmap(-1, ROWS * _ROW * 4)
        self._cells = memoryview(self._map).cast("I")
        self._used: set[int] = set()
        # The rows below it were in use at some time. A child knows it from before its fork; that is enough, since only a
        # reload goes above it, and then those that go on accepting are forked after all rows were given out.
        self._top = 0

    def assign(self) -> int:
        """Give a free row to a new process (the master's call).

        Raises:
            RuntimeError: there are too many listeners, old ones included.
        """
        for row in range(ROWS):
            if row not in self._used:
                self._used.add(row)
                self._top = max(self._top, row + 1)
                return row
        raise RuntimeError("no free row for another listener")

    @property
    def free(self) -> int:
        """How many rows could be given out (the master's to ask)."""
        return ROWS - len(self._used)

    def clear(self, row: int) -> None:
        """Empty the row of a process that is gone (the master's call)."""
        self._map[row * _ROW * 4 : (row + 1) * _ROW * 4] = bytes(_ROW * 4)
        self._used.discard(row)

    def _slot(self, address: str) -> int:
        digest = blake2b(client_network(address).encode(), digest_size=2, key=self._key).digest()
        return 1 + int.from_bytes(digest)

    def add(self, row: int, slot: int) -> None:
        """Count a session in; only by the process that owns the row, and by one thread of it at a time."""
        base = row * _ROW
        self._cells[base] += 1
        self._cells[base + slot] += 1

    def subtract(self, row: int, slot: int) -> None:
        """Count a session out; the same."""
        base = row * _ROW
        self._cells[base] -= 1
        self._cells[base + slot] -= 1

    def sessions(self, row: int) -> int:
        """How many sessions one process has."""
        return self._cells[row * _ROW]

    def total(self) -> int:
        """How many sessions the whole server has."""
        return sum(self._cells[: self._top * _ROW : _ROW])

    def of_client(self, slot: int) -> int:
        """How many sessions the clients of a slot have."""
        return sum(self._cells[slot : self._top * _ROW : _ROW])
