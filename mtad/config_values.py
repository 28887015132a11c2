"""One setting's value: from TOML, checked against its row of the table, and back to TOML.

`decode` is told the row (`mtad.config_table.Setting`) and what tomllib made of the file, and gives the value that the
structs hold. `value_text` is its inverse. Durations, sizes and rates have their grammar here.

Errors: ValueError, whose text says what is wrong and, where that can be guessed, what was meant.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

from mtad.config import DAY, HOUR, Duration, Size
from mtad.config_table import Setting

_DURATION: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?) ?(ms|s|m|h|d|w)")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": HOUR, "d": DAY, "w": 7 * DAY}
_SIZE: Final = re.compile(r"([0-9]{1,15}) ?(|B|[kK]B|MB|GB|KiB|MiB|GiB)")
_OCTETS: Final = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_BINARY: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

_RATE: Final = re.compile(r"([0-9]{1,7})/(.+)")
#: The most messages and the longest time, in seconds, that a rate may name.
MOST_IN_RATE: Final = 1_000_000
LONGEST_RATE: Final = DAY

_Number = TypeVar("_Number", int, Duration, Size)


def duration(text: str) -> Duration:
    """Seconds of ``"300s"``, ``"1.5h"``; units ms, s, m, h, d, w.

    Raises:
        ValueError: it is not a number with a unit.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f'{text!r} is not a duration; write a number and ms, s, m, h, d or w, such as "300s"')
    return Duration(float(match[1]) * _SECONDS[match[2]])


def rate(text: str) -> tuple[int, float]:
    """Count and seconds of ``"100/1m"``: 1 to `MOST_IN_RATE`, within more than nothing and up to `LONGEST_RATE`.

    Raises:
        ValueError: it is not a number, a stroke and a duration, or out of range.
    """
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f'{text!r} is not a rate; write a number, / and a duration, such as "100/1m"')
    count, seconds = int(match[1]), float(duration(match[2]))
    if not 1 <= count <= MOST_IN_RATE:
        raise ValueError(f"{text!r}: the number is not within 1 and {MOST_IN_RATE}")
    if not 0 < seconds <= LONGEST_RATE:
        raise ValueError(f"{text!r}: the time is not within 0.001s and {duration_text(LONGEST_RATE)}")
    return count, seconds


def size(text: str) -> Size:
    """Octets of ``"25MiB"``; units KiB, MiB, GiB of 1024, kB, MB, GB of 1000, none or B for octets.

    Raises:
        ValueError: it is not a number with a unit.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f'{text!r} is not a size; write octets, or a number and KiB, MiB or GiB, such as "25MiB"')
    unit = match[2]
    return Size(int(match[1]) * (_BINARY[unit] if unit in _BINARY else _OCTETS[unit]))


def duration_text(value: float) -> str:
    """A duration as the file has it: whole days and hours as such, all else in seconds."""
    for unit, seconds in (("d", DAY), ("h", HOUR)):
        if value and value % seconds == 0:
            return f"{value // seconds:.0f}{unit}"
    return f"{value:.0f}s" if value == int(value) else f"{float(value):.9f}".rstrip("0") + "s"


def size_text(value: int) -> str:
    """A size as the file has it: whole units of 1024 as such, all else in octets."""
    for unit, octets in reversed(_BINARY.items()):
        if value and value % octets == 0:
            return f"{value // octets}{unit}"
    return str(int(value))


def value_text(value: object) -> str:
    """A setting's value in TOML."""
    if isinstance(value, tuple):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    if isinstance(value, Duration):
        return f'"{duration_text(value)}"'
    if isinstance(value, Size):
        text = size_text(value)
        return text if text.isdigit() else f'"{text}"'
    if isinstance(value, int):
        return str(value)
    # The escapes of JSON are escapes of TOML's basic strings too; DEL alone is free in the one and not in the other.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def decode(setting: Setting, value: object) -> Any:
    """One value, checked against its row of the table.

    Raises:
        ValueError: wrong type, not one of the choices, empty, or out of range.
    """
    return _DECODERS[setting.kind](setting, value)


def _text(setting: Setting, value: object) -> str:
    if not isinstance(value, str):
        raise _mistyped("a string", value)
    if len(value) < setting.minimum or (setting.kind == "path" and not value and setting.default != ""):
        raise ValueError("is empty")
    return value


def _choice(setting: Setting, value: object) -> str:
    if not isinstance(value, str):
        raise _mistyped("a string", value)
    if value not in setting.choices:
        close = difflib.get_close_matches(value, setting.choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{value!r} is none of {', '.join(setting.choices)}{hint}")
    return value


def _list(setting: Setting, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _mistyped('a list of strings, such as ["one", "two"]', value)
    if len(value) < setting.minimum:
        raise ValueError("is empty")
    return tuple(value)


def _integer(setting: Setting, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _mistyped("an integer", value)
    return _within(setting, value, str)


def _duration(setting: Setting, value: object) -> Duration:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f'a duration needs a unit; did you mean "{value}s"?')
    if not isinstance(value, str):
        raise _mistyped('a duration, a string with a unit such as "300s"', value)
    return _within(setting, duration(value), duration_text)


def _size(setting: Setting, value: object) -> Size:
    if isinstance(value, str):
        return _within(setting, size(value), size_text)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _mistyped('a size, octets or a string such as "25MiB"', value)
    return _within(setting, Size(value), size_text)


def _mistyped(expected: str, value: object) -> ValueError:
    names = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "a list", dict: "a table"}
    return ValueError(f"expected {expected}, got {names.get(type(value), 'a date or time')}")


def _within(setting: Setting, value: _Number, text: Callable[[_Number], str]) -> _Number:
    if not setting.minimum <= value <= setting.maximum:
        least, most = text(type(value)(setting.minimum)), text(type(value)(setting.maximum))
        raise ValueError(f"{text(value)} is not within {least} and {most}")
    return value


_DECODERS: Final[dict[str, Callable[[Setting, object], Any]]] = {
    "text": _text,
    "path": _text,
    "choice": _choice,
    "list": _list,
    "integer": _integer,
    "duration": _duration,
    "size": _size,
}
