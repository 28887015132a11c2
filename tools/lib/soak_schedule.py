"""What goes wrong in a seed of the sweep ``soak``: a pure function of the seed.

A seed is some harms within `SPAN` seconds, each at its moment, and some of them over one another. Seeds come in eras of
`ERA`: in the first kind all that is running may be ended, in the second the master lives on, in the third all processes do;
so there are some that live long enough for a look at what they have eaten.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final

import msgspec

#: Seconds of a seed in which harms begin, and in which messages are sent.
SPAN: Final = 2.8
#: Seconds that a harm lasts at most, where it lasts.
LASTS: Final = 1.5
#: Seeds of an era.
ERA: Final = 200
#: How many harms a seed has, and how often.
_HARMS: Final = (1, 2, 3, 4, 5)
_OFTEN: Final = (2, 4, 4, 2, 1)

#: Harms that end the master, or may, and how often each comes.
ENDS_ALL: Final[Mapping[str, int]] = {"master killed": 3, "stopped": 3, "power cut": 3, "memory short": 3}
#: Harms that end another process.
ENDS_SOME: Final[Mapping[str, int]] = {
    "scheduler killed": 3,
    "listener killed": 3,
    "delivery killed": 3,
    "reload": 3,
    "killed at a call": 3,
}
#: Harms that end nobody.
ENDS_NONE: Final[Mapping[str, int]] = {
    "disk full": 2,
    "inodes gone": 1,
    "disk read-only": 2,
    "fsync fails": 2,
    "disk hung": 2,
    "error at a call": 4,
    "descriptors gone": 2,
    "processes short": 2,
    "line loses": 2,
    "rude clients": 4,
    "idle clients": 2,
    "hasty clients": 2,
    "exchanger fails": 5,
    "harmed files": 3,
    "clock set": 3,
}
KINDS: Final = (*ENDS_ALL, *ENDS_SOME, *ENDS_NONE)


class Harm(msgspec.Struct, frozen=True):
    """One harm: what, when it begins, how long it lasts, in seconds, and the seed of all else that is to be chosen."""

    kind: str
    at: float
    lasts: float
    chance: int

    def __str__(self) -> str:
        return f"{self.kind} at {self.at:.2f} s for {self.lasts:.2f} s"


def schedule(seed: int) -> list[Harm]:
    """The harms of a seed, in the order in which they begin."""
    chance = random.Random(f"{seed} soak")
    weights = dict(ENDS_NONE)
    era = seed // ERA % 3
    if era < 2:
        weights |= ENDS_SOME
    if era == 0:
        weights |= ENDS_ALL
    [count] = chance.choices(_HARMS, _OFTEN)
    harms = [
        Harm(kind, chance.uniform(0, SPAN), chance.uniform(0.1, LASTS), chance.getrandbits(32))
        for kind in chance.choices(list(weights), list(weights.values()), k=count)
    ]
    return sorted(harms, key=lambda harm: harm.at)
