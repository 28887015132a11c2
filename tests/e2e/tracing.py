"""For tests that make system calls of other processes fail: whether this machine lets them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.lib.injection import Injection
from tools.lib.sweeps import Unavailable


def _why_not() -> str:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
        try:
            Injection(victim.pid, 0, "kill").close()
        except Unavailable as fault:
            return str(fault)
        finally:
            victim.kill()
    return ""


_REASON = _why_not()

needs_tracing = pytest.mark.skipif(bool(_REASON), reason=_REASON or "processes can be traced")
