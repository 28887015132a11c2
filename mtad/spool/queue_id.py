"""Queue ids: unique across processes and threads, in the order of arrival, and in the form that log readers know.

An id is what Postfix calls a long queue id: six characters of seconds and four of microseconds, both in base 52 (digits and
consonants, in ASCII order, so that text order is time order), a ``z``, and a part that makes it unique, which is the
process id in base 51 (without the ``z``). Within one process no two ids share a microsecond, not even when the clock is
set back; two processes that live at the same time differ in the process id.
"""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Final

_ALPHABET: Final = "0123456789BCDFGHJKLMNPQRSTVWXYZbcdfghjklmnpqrstvwxyz"
_BASE: Final = len(_ALPHABET)
_PATTERN: Final = re.compile(rf"[{_ALPHABET}]{{10}}z[{_ALPHABET[:-1]}]{{1,8}}")


def _digits(number: int, base: int, width: int) -> str:
    digits = ""
    while number or len(digits) < width:
        number, digit = divmod(number, base)
        digits = _ALPHABET[digit] + digits
    return digits


def encode(microseconds: int, process: int) -> str:
    """The id for an arrival in microseconds since the epoch, made by the process with this id."""
    seconds, fraction = divmod(microseconds, 1_000_000)
    return f"{_digits(seconds, _BASE, 6)}{_digits(fraction, _BASE, 4)}z{_digits(process, _BASE - 1, 1)}"


def is_queue_id(text: str) -> bool:
    """Whether a text, such as a file's name, has the form of a queue id."""
    return _PATTERN.fullmatch(text) is not None


class QueueIds:
    """The source of queue ids of one process; safe for its threads and across a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def new(self) -> str:
        """A new id for a message that arrives now."""
        with self._lock:
            self._last = max(self._last + 1, time.time_ns() // 1000)
            return encode(self._last, os.getpid())
