"""Starting with the machine without systemd: the SysV script lives a server's life, with the exit codes of the LSB.

The shell scripts of the checkout are looked through here, too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.site import BIN, Site, alive

ROOT: Final = Path(__file__).parents[2]
SCRIPT: Final = ROOT / "init/mtad.sysv"
SHELL: Final = (SCRIPT, *(ROOT / name for name in ("tools/venv", "tools/test", "tools/demo", ".ci/run")))


class Script:
    """The script, with a defaults file of its own."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.defaults = site.root / "defaults"
        self.set(DAEMON=BIN / "mtad", CONFIG=site.config_path)

    def set(self, **values: Path) -> None:
        """Write the defaults file."""
        self.defaults.write_text("".join(f"{name}={value}\n" for name, value in values.items()))

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), *arguments],
            # As at the start of a machine: nothing in it, but for which checkout is being tested.
            env={"MTAD_DEFAULTS": str(self.defaults), "PATH": "/nowhere", "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    script = Script(Site(tmp_path / "site"))
    yield script
    script("stop")


def test_the_life_of_a_server_under_the_script(script: Script) -> None:
    site = script.site
    assert script("status").returncode == 3
    assert script("stop").returncode == 0
    assert script("reload").returncode == 7
    assert script("try-restart").returncode == 0
    assert script("status").returncode == 3

    started = script("start")
    assert started.returncode == 0, started.stderr
    first = site.status().pid
    site.send("a@client.test", "alice@example.org", b"Subject: x\r\n\r\nhello\r\n")
    site.await_mail("alice")
    again = script("start")
    assert (again.returncode, again.stdout) == (0, "mtad: runs already\n")
    status = script("status")
    assert status.returncode == 0
    assert f"process {first}" in status.stdout

    assert script("reload").returncode == 0
    assert script("force-reload").returncode == 0
    assert (site.status().pid, site.status().reloads) == (first, 2)

    assert script("restart").returncode == 0
    second = site.status().pid
    assert second != first
    assert not alive(first)
    assert script("try-restart").returncode == 0
    third = site.status().pid
    assert third != second

    assert script("stop").returncode == 0
    assert not alive(third)
    assert script("status").returncode == 3


def test_a_bad_configuration_is_told_and_changes_nothing(script: Script) -> None:
    site = script.site
    assert script("start").returncode == 0
    pid = site.status().pid
    good = site.config_path.read_text()
    site.config_path.write_text(good + "\n[nonsense]\n")
    for action in ("reload", "restart"):
        result = script(action)
        assert result.returncode == 6, action
        assert "nonsense: unknown" in result.stderr
    assert alive(pid)
    # A server that runs is seen and stopped whatever has become of its file.
    assert script("status").returncode == 0
    assert script("stop").returncode == 0
    assert not alive(pid)
    assert script("start").returncode == 6
    site.config_path.write_text(good)


def test_what_is_missing_has_its_own_exit_code(script: Script, tmp_path: Path) -> None:
    script.set(DAEMON=tmp_path / "nothing", CONFIG=script.site.config_path)
    assert [script(action).returncode for action in ("start", "stop", "restart", "status")] == [5, 0, 5, 4]
    script.set(DAEMON=BIN / "mtad", CONFIG=tmp_path / "nothing")
    assert [script(action).returncode for action in ("start", "stop", "restart", "status")] == [6, 6, 6, 4]
    assert "nothing cannot be read" in script("start").stderr
    for wrong in ("", "nonsense", "--help"):
        result = script(wrong)
        assert result.returncode == 2
        assert "start|stop|restart" in result.stderr
    assert script().returncode == 2
    script.set(DAEMON=BIN / "mtad", CONFIG=script.site.config_path)


def test_the_script_has_an_lsb_header() -> None:
    text = SCRIPT.read_text()
    block = text[text.index("### BEGIN INIT INFO\n") : text.index("### END INIT INFO\n")]
    found = dict(re.findall(r"^# ([\w-]+): +(.+)$", block, re.M))
    assert found.keys() >= {
        "Provides",
        "Required-Start",
        "Required-Stop",
        "Default-Start",
        "Default-Stop",
        "Short-Description",
    }
    assert "mtad" in found["Provides"].split()
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_are_clean(path: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == ""


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_are_those_of_any_shell_and_can_be_run(path: Path) -> None:
    assert path.read_text().startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", str(path)], check=True, timeout=60)
    assert os.access(path, os.X_OK)
