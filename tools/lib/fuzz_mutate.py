"""Inputs made from others: cut, doubled, swapped, spliced, with the octets in them that parsers trip over.

In the manner of radamsa: nothing is known of the format but that it may have lines, numbers and words. All chance comes
from the generator that is handed in, so a run can be repeated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Final

#: Octets of one input; long enough for every limit of a line, short enough for thousands in a second.
LIMIT: Final = 64 * 1024

#: What ends, separates or quotes something somewhere, and what programs take for one of these.
NASTY: Final = (
    *(b"\r", b"\n", b"\r\n", b"\n\r", b"\r\r\n", b"\r\n.\r\n", b"\n.\n", b"\r.\r", b"\n.\r\n", b"\r\n.\n", b"\r\n..", b"."),
    *(b"\0", b"\t", b" ", b"\x0b", b"\x0c", b"\x1a", b"\x1e", b"\x7f", b"\x80", b"\x85", b"\xff", b"\xa0"),
    *(b"<", b">", b"<>", b"@", b'"', b"\\", b":", b";", b",", b"=", b"+0A", b"%", b"[", b"]", b"(", b")", b"{", b"}", b"*"),
    *(b"\xc3\xa9", b"\xe2\x80\xa8", b"\xe2\x80\xae", b"\xed\xa0\x80", b"\xc0\xae", b"\xef\xbb\xbf", b"\xf4\x90\x80\x80"),
)
NUMBERS: Final = (
    *(b"0", b"1", b"-1", b"00", b"127", b"128", b"255", b"256", b"65535", b"65536", b"2147483647", b"2147483648"),
    *(b"4294967295", b"4294967296", b"18446744073709551615", b"18446744073709551616", b"9" * 30, b"1e9", b"0x10", b"NaN"),
)
#: Lengths around which limits lie.
LENGTHS: Final = (2, 3, 10, 63, 64, 65, 100, 255, 256, 257, 510, 512, 998, 1000, 2046, 2048, 2049, 4096, 12288)

_NUMBER: Final = re.compile(rb"[0-9]+")
_WORD: Final = re.compile(rb"[A-Za-z0-9_-]+")


class Mutator:
    """Makes inputs; ``words`` are those of the format."""

    def __init__(self, rng: Random, words: Sequence[bytes] = (), limit: int = LIMIT) -> None:
        self._rng = rng
        self._words = tuple(words) or (b"",)
        self._limit = limit
        self._ways: Sequence[Callable[[bytes], bytes]] = (
            *(self._flip, self._insert, self._delete, self._double, self._move, self._truncate, self._grow),
            *(self._number, self._word, self._word, self._ends),
            *(self._line_twice, self._line_gone, self._line_moved, self._line_gone),
        )

    def mutate(self, data: bytes, others: Sequence[bytes]) -> bytes:
        """A new input from ``data``; parts may come from ``others``, of which there is at least one."""
        rng = self._rng
        while True:
            data = self._splice(data, rng.choice(others)) if rng.random() < 0.15 else rng.choice(self._ways)(data)
            if rng.random() < 0.4:
                return data[: self._limit]

    def _place(self, data: bytes) -> int:
        return self._rng.randrange(len(data) + 1)

    def _span(self, data: bytes) -> tuple[int, int]:
        """A part of the data, mostly a short one."""
        start = self._place(data)
        length = self._rng.choice((1, 2, 4, 8, 16, 64, 256, len(data)))
        return start, min(len(data), start + self._rng.randrange(length + 1))

    def _octets(self) -> bytes:
        rng = self._rng
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(NASTY)
        if kind < 0.8:
            return rng.choice(self._words)
        return bytes([rng.randrange(256)])

    def _flip(self, data: bytes) -> bytes:
        if not data:
            return self._octets()
        at = self._rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << self._rng.randrange(8))]) + data[at + 1 :]

    def _insert(self, data: bytes) -> bytes:
        at = self._place(data)
        return data[:at] + self._octets() + data[at:]

    def _delete(self, data: bytes) -> bytes:
        start, end = self._span(data)
        return data[:start] + data[end:]

    def _double(self, data: bytes) -> bytes:
        start, end = self._span(data)
        return data[:end] + data[start:]

    def _move(self, data: bytes) -> bytes:
        start, end = self._span(data)
        rest = data[:start] + data[end:]
        at = self._place(rest)
        return rest[:at] + data[start:end] + rest[at:]

    def _truncate(self, data: bytes) -> bytes:
        return data[: self._place(data)]

    def _grow(self, data: bytes) -> bytes:
        """A part many times over, up to and past the limits of others."""
        start, end = self._span(data)
        part = data[start:end][:64] or self._octets() or b"x"
        length = self._rng.choice(LENGTHS)
        count = length // len(part) + 1 if self._rng.random() < 0.5 else self._rng.choice((2, 2, 5, 5, 20, 20, 101, 1001))
        return data[:start] + (part * min(count, self._limit // len(part)))[: self._limit] + data[end:]

    def _replace(self, data: bytes, pattern: re.Pattern[bytes], new: bytes) -> bytes:
        """New octets in the place of one match, found from somewhere on."""
        match = pattern.search(data, self._place(data)) or pattern.search(data)
        return data[: match.start()] + new + data[match.end() :] if match else data + new

    def _number(self, data: bytes) -> bytes:
        return self._replace(data, _NUMBER, self._rng.choice(NUMBERS))

    def _word(self, data: bytes) -> bytes:
        return self._replace(data, _WORD, self._rng.choice(self._words))

    def _ends(self, data: bytes) -> bytes:
        """Another line end, at one place or everywhere."""
        new = self._rng.choice((b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n\r\n", b"\r\n ", b""))
        return data.replace(b"\r\n", new) if self._rng.random() < 0.2 else self._replace(data, re.compile(b"\r\n"), new)

    def _lines(self, data: bytes) -> list[bytes]:
        return data.splitlines(keepends=True) or [b""]

    def _line_twice(self, data: bytes) -> bytes:
        lines = self._lines(data)
        at = self._rng.randrange(len(lines))
        lines.insert(self._rng.randrange(len(lines) + 1), lines[at])
        return b"".join(lines)

    def _line_gone(self, data: bytes) -> bytes:
        lines = self._lines(data)
        del lines[self._rng.randrange(len(lines))]
        return b"".join(lines)

    def _line_moved(self, data: bytes) -> bytes:
        lines = self._lines(data)
        line = lines.pop(self._rng.randrange(len(lines)))
        lines.insert(self._rng.randrange(len(lines) + 1), line)
        return b"".join(lines)

    def _splice(self, data: bytes, other: bytes) -> bytes:
        """The start of one and the end of another, or a part of another in the middle."""
        at = self._place(data)
        if self._rng.random() < 0.5:
            return data[:at] + other[self._place(other) :]
        start, end = self._span(other)
        return data[:at] + other[start:end] + data[at:]
