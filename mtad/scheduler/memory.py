"""What the scheduler remembers about destinations for longer than their lanes live: so many things, for so long.

When there are too many, the one that was learned the longest ago goes. Times are of one monotonic clock, in seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Memory(Generic[Key, Value]):
    """Values by key, each for a time from when it was learned last."""

    def __init__(self, most: int, lifetime: float) -> None:
        """``most`` values are kept, each for ``lifetime`` seconds."""
        self._most = most
        self._lifetime = lifetime
        self._known: OrderedDict[Key, tuple[float, Value]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, key: Key, value: Value, now: float) -> None:
        """Remember this from now on."""
        self._known[key] = now + self._lifetime, value
        self._known.move_to_end(key)
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def get(self, key: Key, now: float) -> Value | None:
        """What is known; None when nothing is (any more)."""
        found = self._known.get(key)
        return None if found is None or now >= found[0] else found[1]

    def until(self, key: Key, now: float) -> float:
        """Until when it is known; 0: it is not."""
        found = self._known.get(key)
        return 0.0 if found is None or now >= found[0] else found[0]

    def forget(self, now: float) -> None:
        """Drop what is too old."""
        while self._known:
            key, (until, _) = next(iter(self._known.items()))
            if now < until:
                return
            del self._known[key]
