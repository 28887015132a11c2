"""Starting with the machine under systemd: what the server tells a service manager, and the unit.

There is no systemd as process 1 where tests run, so the unit is judged by systemd-analyze, and the restrictions that could
break a Python program are put on a real server by other means: no new privileges, no capability but one, no memory that is
both writable and executable. Its system calls are compared with those that the unit allows.
"""

from __future__ import annotations

import configparser
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from mtad.cli.common import EX_CONFIG
from mtad.config import Config, Processes
from tests.site import BIN, PATIENCE, Site, await_value

INIT: Final = Path(__file__).parents[2] / "init"
UNIT: Final = INIT / "mtad.service"
#: The unit's exposure as systemd-analyze counts it, in tenths: 20 is 2.0, and 10 is the worst.
EXPOSURE: Final = 20

needs_systemd_analyze = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


# -- what the server tells a service manager --------------------------------------------------------------------------


class Manager:
    """A service manager that only listens: the socket of sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(PATIENCE)

    def next(self) -> dict[str, str]:
        """The next notification, as its assignments."""
        lines = self._socket.recv(4096).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    # The name of such a socket has little room, and tmp_path may be long.
    with tempfile.TemporaryDirectory(prefix="notify-") as directory:
        manager = Manager(Path(directory) / "socket")
        monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
        yield manager
        manager.close()


def foreground(site: Site, *before: str) -> subprocess.Popen[bytes]:
    """``mtad start --foreground`` as a service manager runs it, behind the words ``before``."""
    command = [*before, str(BIN / "mtad"), "start", "--foreground", "-c", str(site.config_path)]
    with open(site.root / "output", "ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/")


def test_the_manager_hears_ready_reloading_and_stopping(tmp_path: Path, manager: Manager) -> None:
    site = Site(tmp_path / "site")
    site.process = foreground(site)
    assert manager.next() == {"READY": "1"}
    # It is ready: no second try is needed, neither for the sockets nor for the status.
    with site.client() as client:
        assert client.noop()[0] == 250

    before = time.monotonic_ns() // 1000
    site.process.send_signal(signal.SIGHUP)
    reloading = manager.next()
    assert reloading.pop("RELOADING") == "1"
    assert before <= int(reloading.pop("MONOTONIC_USEC")) <= time.monotonic_ns() // 1000
    assert reloading == {}
    assert manager.next() == {"READY": "1"}

    # A reload that is refused ends as well, or the manager would wait for it for ever.
    good = site.config_path.read_text()
    site.config_path.write_text("nonsense")
    site.process.send_signal(signal.SIGHUP)
    assert manager.next()["RELOADING"] == "1"
    assert manager.next() == {"READY": "1"}
    site.config_path.write_text(good)

    site.process.send_signal(signal.SIGTERM)
    assert manager.next() == {"STOPPING": "1"}
    assert site.process.wait(PATIENCE) == 0


def test_a_server_that_cannot_start_never_says_ready(tmp_path: Path, manager: Manager) -> None:
    site = Site(
        tmp_path / "site", listeners=[{"name": "a", "service": "mx", "address": ["127.0.0.1:0"], "interface": "none0"}]
    )
    process = foreground(site)
    assert process.wait(PATIENCE) == EX_CONFIG
    manager._socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.next()


# -- the systemd unit -------------------------------------------------------------------------------------------------


class Unit(configparser.RawConfigParser):
    """A unit file, whose keys may stand more than once: their values are joined by line ends."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
        self.optionxform = str  # type: ignore[assignment,method-assign]  # as the documentation tells to keep the case
        values: dict[str, list[str]] = {}
        section = ""
        for line in path.read_text().splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif line and not line.startswith("#"):
                key, _, value = line.partition("=")
                values.setdefault(f"{section}.{key}", []).append(value)
        for name, parts in values.items():
            section, _, key = name.partition(".")
            if not self.has_section(section):
                self.add_section(section)
            self.set(section, key, "\n".join(parts))


@pytest.fixture
def installed_unit(tmp_path: Path) -> Path:
    """The unit as on a machine where mtad is installed: with the path of the one that is."""
    unit = tmp_path / "mtad.service"
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/mtad", str(BIN / "mtad")))
    return unit


@needs_systemd_analyze
def test_the_unit_verifies_without_a_word(installed_unit: Path) -> None:
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(installed_unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # Faults of other units of this machine, which ours mentions, are not ours.
    ours = [line for line in (result.stdout + result.stderr).splitlines() if "mtad" in line]
    assert ours == []
    assert result.returncode == 0, result.stderr


@needs_systemd_analyze
def test_the_unit_is_not_exposed(installed_unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE}", "--no-pager", str(installed_unit)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "offline" in result.stderr:
        pytest.skip(f"this systemd-analyze cannot judge a file: {result.stderr.strip()}")
    print(result.stdout.splitlines()[-1])
    assert result.returncode == 0, result.stdout


def test_the_unit_fits_the_configuration_and_the_exit_codes() -> None:
    service = Unit(UNIT)["Service"]
    defaults = Config(hostname="x")
    assert service["Type"] == "notify"
    assert int(service["RestartPreventExitStatus"]) == EX_CONFIG
    assert int(service["TimeoutStopSec"]) > Processes().stop_timeout + 15
    assert service["ExecStart"].split()[1:] == ["start", "--foreground"]
    assert service["User"] == defaults.user
    writable = service["ReadWritePaths"].replace("-/", "/").split()
    assert writable == [defaults.spool, defaults.local.mail_root]
    assert f"/run/{service['RuntimeDirectory']}" == os.path.dirname(defaults.pid_file)
    assert service["AmbientCapabilities"] == service["CapabilityBoundingSet"] == "CAP_NET_BIND_SERVICE"


def test_it_serves_port_25_with_no_privilege_but_that_and_no_writable_code(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("to take privileges away it needs some: root, and setpriv of util-linux")
    if ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) < 0:  # PR_GET_MDWE of linux/prctl.h
        pytest.skip("this kernel cannot deny writable and executable memory to a process (Linux 6.3)")
    # With noroot the user id 0 means nothing but the ownership of files; another user may be unable to read this checkout.
    # What is set by PR_SET_MDWE is kept over exec and fork, as systemd's MemoryDenyWriteExecute is.
    deny = (
        "import ctypes, os, sys; assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0; os.execv(sys.argv[1], sys.argv[1:])"
    )
    one = "=-all,+net_bind_service"
    bare = ("setpriv", "--securebits=+noroot,+noroot_locked", "--no-new-privs", f"--inh-caps{one}", f"--ambient-caps{one}")
    command = (*bare, f"--bounding-set{one}", sys.executable, "-c", deny)
    site = Site(tmp_path / "site", listeners=[{"name": "inbound", "service": "mx", "address": ["127.0.0.25:25"]}])
    process = site.process = foreground(site, *command)
    await_value(lambda: process.poll() is not None or site.log().count(": started"), what="it starts")
    assert process.poll() is None, (site.root / "output").read_text()
    site.send("a@client.test", "alice@example.org", b"Subject: x\r\n\r\nhello\r\n")
    site.await_mail("alice")
    for pid in site.processes():
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.search(r"^CapEff:\t0000000000000400$", status, re.M)
        assert re.search(r"^CapBnd:\t0000000000000400$", status, re.M)
        assert re.search(r"^NoNewPrivs:\t1$", status, re.M)
    site.stop()
    assert "panic" not in site.log()


def allowed_calls(filters: str) -> set[str]:
    """The system calls of ``SystemCallFilter`` values, groups expanded as this systemd has them."""
    listing = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager"], capture_output=True, text=True, check=True
    )
    groups: dict[str, list[str]] = {}
    for line in listing.stdout.splitlines():
        if line.startswith("@"):
            current = groups.setdefault(line.strip(), [])
        elif line.startswith("    ") and "#" not in line:
            current.append(line.strip())

    def expand(name: str) -> set[str]:
        return set().union(*map(expand, groups[name])) if name.startswith("@") else {name}

    allowed: set[str] = set()
    for value in filters.splitlines():
        # A value that begins with ~ is a list of what is denied.
        calls = set().union(*map(expand, value.lstrip("~").split()))
        allowed = allowed - calls if value.startswith("~") else allowed | calls
    return allowed


@needs_systemd_analyze
def test_it_makes_no_system_call_that_the_unit_denies(tmp_path: Path) -> None:
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    if subprocess.run(["strace", "-f", "-o", str(trace), "true"], capture_output=True, check=False, timeout=60).returncode:
        pytest.skip("strace may not trace here")
    site = Site(tmp_path / "site")
    tracer = foreground(site, "strace", "-f", "-qq", "-o", str(trace))
    try:
        await_value(lambda: tracer.poll() is not None or site.log().count(": started"), what="it starts")
        assert tracer.poll() is None, (site.root / "output").read_text()
        site.send("a@client.test", "alice@example.org", b"Subject: x\r\n\r\nhello\r\n")
        site.await_mail("alice")
        site.await_deferred(site.send("alice@example.org", "a@elsewhere.test", b"Subject: x\r\n\r\nhello\r\n"))
        assert site.reload().returncode == 0
    finally:
        master = site.status().pid
        os.kill(master, signal.SIGTERM)
        tracer.wait(PATIENCE)
    used = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.M))
    assert {"accept4", "clone", "fsync", "rename" if "rename" in used else "renameat"} <= used
    assert used - allowed_calls(Unit(UNIT)["Service"]["SystemCallFilter"]) == set()
