"""Times and numbers as the commands print them."""

from __future__ import annotations


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
