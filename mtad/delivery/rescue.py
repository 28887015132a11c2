"""The rescue of mail that is refused for our IPv6 address: on over IPv4, in the same attempt, before anything bounces.

Large providers ask more of an IPv6 address than of an IPv4 one: a reverse name, SPF that covers it, a reputation. A refusal
for good that blames the address (`mtad.smtp.hints.blames_address`) says nothing about the message, so it is put off, and
the hosts' IPv4 addresses come next. If there is none to try, it holds after all. Refusals for now are followed in the same
way, only that nothing has to be put off.

Invariants: a refusal that was put off either holds (`Rescue.over`), or was followed by a try over IPv4. `rescued` is True
only when a server took over IPv4 what was refused over IPv6: what the scheduler remembers of it keeps IPv6 unused for long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.smtp.hints import blames_address


class Rescue:
    """Of one delivery, in one thread."""

    __slots__ = ("_ipv4", "_over", "blamed", "put_off", "tried")

    def __init__(self, ipv4: bool) -> None:
        """With ``ipv4`` it is needed from the beginning, for what earlier deliveries have found out."""
        self._ipv4 = ipv4
        self._over = False
        self.blamed = False
        """Our IPv6 address was blamed: IPv6 addresses are left out from then on."""
        self.put_off: dict[int, Failed] = {}
        """Refusals, by the index of the recipient, that hold if there is no IPv4 address."""
        self.tried = False
        """An IPv4 address was tried."""

    def skips(self, address: str) -> bool:
        """Whether this address of a host is to be left out; if not, it counts as tried."""
        if ":" in address:
            return (self.blamed or self._ipv4) and not self._over
        self.tried = True
        return False

    def look_at(self, outcomes: Mapping[int, Outcome], address: str) -> Mapping[int, Outcome]:
        """What a server at ``address`` said to recipients; with a refusal for good that is put off as a Deferred."""
        if ":" not in address:
            self.tried = True
        if ":" not in address or self._over:
            return outcomes
        blaming = {index: outcome for index, outcome in outcomes.items() if blames_address(outcome)}
        if not blaming:
            return outcomes
        self.blamed = True
        put_off = {index: outcome for index, outcome in blaming.items() if isinstance(outcome, Failed)}
        self.put_off |= put_off
        return {**outcomes, **{index: _later(outcome) for index, outcome in put_off.items()}}

    def over(self) -> Mapping[int, Failed]:
        """No IPv4 address is left: from now on IPv6 addresses are good enough; what holds of what was put off."""
        self._over = True
        return {} if self.tried else self.put_off


def _later(refusal: Failed) -> Deferred:
    status = f"4{refusal.status[1:]}"
    return Deferred(status, f"{refusal.text}; going on over IPv4", refusal.remote, refusal.reply)


def revised(attempts: Sequence[Attempt], outcomes: Mapping[int, Outcome]) -> list[Attempt]:
    """The same attempts with other last outcomes for some recipients."""
    left = dict(outcomes)
    changed: list[Attempt] = []
    for attempt in reversed(attempts):
        if any(index in left for index, _ in attempt.outcomes):
            told = tuple((index, left.pop(index, outcome)) for index, outcome in attempt.outcomes)
            changed.append(msgspec.structs.replace(attempt, outcomes=told))
        else:
            changed.append(attempt)
    return changed[::-1]


def rescued(attempts: Sequence[Attempt]) -> bool:
    """Whether a recipient was refused for our IPv6 address and then, later in these attempts, taken over IPv4."""
    blamed: set[int] = set()
    for attempt in attempts:
        v6 = attempt.address.startswith("[")
        for index, outcome in attempt.outcomes:
            if v6 and blames_address(outcome):
                blamed.add(index)
            elif not v6 and isinstance(outcome, Delivered) and index in blamed:
                return True
    return False
