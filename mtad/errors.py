"""The exceptions of mtad: for what is not a normal result.

Failures that belong to the trade (a reply, an outcome of a delivery) are values, see `mtad.reply` and `mtad.outcome`.
An exception stands for a caller's fault, for a world that failed, or for bad input that names its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class MtadError(Exception):
    """Base of everything that mtad raises on purpose; its text is fit for an administrator."""


class Problem(msgspec.Struct, frozen=True):
    """One fault of a configuration or of the machine: where it is and what is wrong."""

    file: str
    line: int | None
    key: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        parts = [part for part in (place, self.key) if part]
        return ": ".join([*parts, self.message])


class ConfigError(MtadError):
    """The configuration cannot be used. ``problems`` has each fault with file, line and key; exit code 78."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


class SyntaxFault(MtadError):
    """A command's argument breaks the grammar of RFC 5321 section 4.1.2; the text says what was expected."""


class QueueFileDamaged(MtadError):
    """A queue file does not hold what it says: wrong magic, length or checksum. It belongs in corrupt/."""


class QueueFileUnfinished(MtadError):
    """A queue file that was never committed: its receiver is at work on it, or died before the ``250``."""


class SpoolBusy(MtadError):
    """Another process holds the lock of this spool."""


class ResolverFailure(MtadError):
    """The DNS gave no usable answer: SERVFAIL, REFUSED or silence. Always temporary (4.4.3)."""
