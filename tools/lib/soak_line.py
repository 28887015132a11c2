"""A loopback of one's own for the sweep ``soak``, and how it loses packets: of everybody, name servers and clients, too.

Whoever calls `own_line` first of all it does, in a thread of its own, has it for that thread and all that it starts.

Errors: `Unavailable`: this machine lacks a right or a program.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tools.lib.sweeps import Unavailable

_CLONE_NEWNET: Final = 0x40000000
_TABLE: Final = "inet soak"
#: Of a hundred packets.
LOST: Final = 30
_RULES: Final = f"""
table {_TABLE} {{
  chain input {{
    type filter hook input priority 0;
    numgen random mod 100 < {LOST} drop
  }}
}}
"""


def own_line() -> None:
    """From now on this thread, and the threads and processes that it starts, have a network with nobody else in it."""
    for program in ("ip", "nft"):
        if shutil.which(program) is None:
            raise Unavailable(f"there is no {program}")
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_CLONE_NEWNET):
        raise Unavailable(f"no network of our own: {os.strerror(ctypes.get_errno())}")
    _do("ip", "link", "set", "lo", "up")


@contextmanager
def lossy() -> Iterator[None]:
    """`LOST` of a hundred packets do not arrive meanwhile."""
    _do("nft", "-f", "-", text=_RULES)
    try:
        yield
    finally:
        _do("nft", "delete", "table", *_TABLE.split())


def _do(*command: str, text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip().splitlines()[:1]}")
