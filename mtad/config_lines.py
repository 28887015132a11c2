"""On which line of a TOML text a key stands: tomllib does not tell, and an administrator wants to know.

`key_lines` walks over a text that tomllib has already found to be good, so it need not judge: it steps over strings,
comments, arrays and inline tables, and notes where each key, array element and table header begins.

Invariants: a text that is not TOML gives some mapping or ValueError, never an endless loop. Standards: TOML 1.0.0.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from typing import Final

#: A key with the tables around it: ``("listener", 0, "tls")``; numbers count tables and array elements from 0.
Path = tuple[str | int, ...]

_BLANK: Final = re.compile(r"[ \t]*")
_FILLER: Final = re.compile(r"(?:[ \t\r\n,]+|#[^\n]*)*")
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_QUOTED_KEY: Final = re.compile(r""""(?:\\.|[^"\\\n])*"|'[^'\n]*'""")
# The multi-line forms first: their opening is also an empty one-line string. Up to two quotes may precede the closing.
_STRING: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}' + r"|'''.*?'{3,5}" + r'|"(?:\\.|[^"\\\n])*"' + r"|'[^'\n]*'",
    re.DOTALL,
)
# Numbers, booleans and dates; a date may hold one blank.
_PLAIN: Final = re.compile(r"[^,\]}#\n]+")


def show(path: Path) -> str:
    """The path as people write it: ``listener[0].tls``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def key_lines(text: str) -> dict[Path, int]:
    """The line (from 1) of each key, table header and array element of a good TOML text.

    Raises:
        ValueError: the text is not TOML.
    """
    return _Walker(text).walk()


class _Walker:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._found: dict[Path, int] = {}
        self._tables: dict[Path, int] = {}

    def walk(self) -> dict[Path, int]:
        table: Path = ()
        while not self._end():
            if self._text.startswith("[", self._at):
                table = self._header()
            else:
                self._pair(table)
        return self._found

    def _end(self) -> bool:
        self._skip(_FILLER)
        return self._at >= len(self._text)

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise ValueError(f"not TOML at line {self._line()}")
        self._at = match.end()
        return match[0]

    def _literal(self, wanted: str) -> None:
        if not self._text.startswith(wanted, self._at):
            raise ValueError(f"not TOML at line {self._line()}")
        self._at += len(wanted)

    def _line(self) -> int:
        return bisect_right(self._ends, self._at - 1) + 1

    def _note(self, path: Path, line: int) -> None:
        self._found.setdefault(path, line)

    def _header(self) -> Path:
        line = self._line()
        many = self._text.startswith("[[", self._at)
        self._at += 2 if many else 1
        keys = self._key()
        self._literal("]]" if many else "]")
        path: Path = ()
        for number, key in enumerate(keys):
            path += (key,)
            if many and number == len(keys) - 1:
                self._tables[path] = self._tables.get(path, 0) + 1
            self._note(path, line)
            if path in self._tables:
                path += (self._tables[path] - 1,)
                self._note(path, line)
        return path

    def _key(self) -> list[str]:
        keys = []
        while True:
            self._skip(_BLANK)
            if self._text.startswith(('"', "'"), self._at):
                keys.append(str(tomllib.loads("key = " + self._skip(_QUOTED_KEY))["key"]))
            else:
                keys.append(self._skip(_BARE_KEY))
            self._skip(_BLANK)
            if not self._text.startswith(".", self._at):
                return keys
            self._at += 1

    def _pair(self, table: Path) -> None:
        line = self._line()
        path = table
        for key in self._key():
            path += (key,)
            self._note(path, line)
        self._literal("=")
        self._skip(_BLANK)
        self._value(path)

    def _value(self, path: Path) -> None:
        first = self._text[self._at : self._at + 1]
        if first == "[":
            self._at += 1
            index = 0
            while not self._end() and self._text[self._at] != "]":
                self._note((*path, index), self._line())
                self._value((*path, index))
                index += 1
            self._literal("]")
        elif first == "{":
            self._at += 1
            while not self._end() and self._text[self._at] != "}":
                self._pair(path)
            self._literal("}")
        else:
            self._skip(_STRING if first in {'"', "'"} else _PLAIN)
