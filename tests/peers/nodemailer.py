"""nodemailer, the mail client of Node: found where it is installed, else fetched once per run, else its tests are skipped.

It is looked for in the folder that ``MTAD_NODE_MODULES`` names, then where Node looks by itself (``NODE_PATH``), then among
the global packages of npm; at last npm is asked to install it into a folder of the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.site import PATIENCE

_SCRIPT: Final = Path(__file__).with_suffix(".js")
#: What npm is asked for: of one major version, so that a new one does not fail these tests by itself.
_PACKAGE: Final = "nodemailer@10"
#: Seconds that npm has for it.
_FETCH_TIMEOUT: Final = 60.0


class Missing(Exception):
    """It is not to be had; the text says why."""


class Nodemailer:
    """A nodemailer that works."""

    def __init__(self, cache: Path) -> None:
        """Find it, or have it installed in ``cache``.

        Raises:
            Missing: neither.
        """
        node = shutil.which("node")
        if node is None:
            raise Missing("node is not installed")
        self._node = node
        for folder in _places():
            self._folder = folder
            if self._works():
                return
        self._folder = _fetch(cache)
        if not self._works():
            raise Missing(f"the nodemailer that npm installed does not run with {node}")

    def send(self, transport: dict[str, Any], *messages: dict[str, Any]) -> list[dict[str, Any]]:
        """What became of each message: its ``response``, or ``error``, ``code`` and ``status``.

        Args:
            transport: the options of ``createTransport``.
            messages: each as ``sendMail`` takes it; they are all given to it at once.
        """
        wishes = json.dumps({"transport": transport, "messages": messages})
        done = self._run(str(_SCRIPT), stdin=wishes)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert isinstance(found, list)
        return found

    def _works(self) -> bool:
        return self._run("-e", "require('nodemailer').createTransport({})").returncode == 0

    def _run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        # Without the trust that the environment may add, so that only the test's own authority counts.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NODE_")}
        return subprocess.run(
            [self._node, *arguments], input=stdin, capture_output=True, text=True, encoding="utf-8", check=False,
            timeout=2 * PATIENCE, env=environment | {"NODE_PATH": self._folder},
        )  # fmt: skip


def _places() -> Iterator[str]:
    for name in ("MTAD_NODE_MODULES", "NODE_PATH"):
        if os.environ.get(name):
            yield os.environ[name]
    if npm := shutil.which("npm"):
        found = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, timeout=30, check=False)
        if found.returncode == 0:
            yield found.stdout.strip()
    yield "/usr/share/nodejs"  # where Debian puts its packages


def _fetch(cache: Path) -> str:
    npm = shutil.which("npm")
    if npm is None:
        raise Missing("nodemailer is not installed, and there is no npm to fetch it")
    command = [npm, "install", "--no-audit", "--no-fund", "--no-save", "--ignore-scripts", "--fetch-retries=1"]
    command += ["--fetch-retry-maxtimeout=2000", "--fetch-timeout=20000", "--prefix", str(cache), _PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT, check=False, cwd=cache)
    except subprocess.TimeoutExpired:
        raise Missing(f"npm could not install nodemailer within {_FETCH_TIMEOUT:g} s") from None
    if done.returncode != 0:
        raise Missing(f"npm could not install nodemailer: {(done.stderr or done.stdout).strip()[-300:]}")
    return str(cache / "node_modules")


@pytest.fixture(scope="session")
def nodemailer(tmp_path_factory: pytest.TempPathFactory) -> Nodemailer:
    """It, or the test is skipped with the reason."""
    try:
        return Nodemailer(tmp_path_factory.mktemp("node"))
    except Missing as reason:
        pytest.skip(str(reason))
