"""Times and numbers as the commands print them."""

from __future__ import annotations

import time


def age(seconds: float) -> str:
    """A duration in its two largest units: ``3d 4h``, ``5m 2s``, ``0s``."""
    rest = max(0, int(seconds))
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        number, rest = divmod(rest, length)
        if number or (unit == "s" and not parts):
            parts.append(f"{number}{unit}")
        if len(parts) == 2:
            break
    return " ".join(parts)


def plural(number: int, one: str, many: str = "") -> str:
    """``1 message``, ``2 messages``."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def moment(when: float, now: float) -> str:
    """A time on this machine's clock, and how far away it is: ``14:08:11, in 3m 2s``, ``Nov 28 14:08:11, 4d 2h ago``."""
    local = time.localtime(when)
    same_day = local[:3] == time.localtime(now)[:3]
    clock = time.strftime("%H:%M:%S" if same_day else "%b %e %H:%M:%S", local)
    if abs(when - now) < 1:
        return f"{clock}, now"
    return f"{clock}, in {age(when - now + 0.5)}" if when > now else f"{clock}, {age(now - when)} ago"
