"""What the master does when the world gives it something that nobody thought of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mtad.config import Config
from mtad.master import Master


def test_a_reload_that_breaks_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever is in the files that it reads: an exception would end the whole server."""

    def reread() -> Config:
        raise RuntimeError("nobody thought of this")

    master = Master(Config("mx.example.org"), "here", reread)
    runtime: Any = SimpleNamespace(config=Config("mx.example.org"), sockets=())
    master._runtime = runtime
    master._reload()
    assert master._runtime is runtime
    assert master._reload_fault == "internal error: RuntimeError"
    assert "panic: reload refused, the old configuration stays" in capfd.readouterr().err
