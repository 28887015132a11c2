"""A view of the file system of one's own, for servers that have their paths and users built in.

    chamber = Chamber(root, {"/var/spool": root / "spool"}, users={"Debian-exim": 990})
    chamber.start("exim4", "-bdf")
    ...
    chamber.stop()

The programs of others want their users in /etc/passwd and their files below /var and /run, and find there what belongs to
an installed server. In a mount namespace they find what the test has put there, and nobody else sees it. So they also run
out of a folder where they were only unpacked. Their processes have a namespace, too: when the first one ends, all do, so
that nothing is left of them. Needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.client import PATIENCE
from tests.procs import children

#: In there, a name of this machine, besides localhost; a certificate need not be for it.
ALIAS: Final = "alias.test"

_SCRIPT: Final = 'while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit 99; shift 2; done; shift; exec "$@"'


def _works() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    command = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", "mount --bind /etc/hosts /etc/hosts"]
    return subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0


needs_chambers = pytest.mark.skipif(not _works(), reason="needs root, and a machine that lets it make mount namespaces")


class Chamber:
    """The view, and the server that has it."""

    def __init__(self, root: Path, binds: Mapping[str, Path], users: Mapping[str, int]) -> None:
        """``binds``: what is found at a path that exists; ``users``: who exists, with a group of the same name and number.

        Users that the machine has by itself stay who they are.
        """
        names = {line.split(":", 1)[0] for line in Path("/etc/passwd").read_text().splitlines()}
        new = {name: number for name, number in users.items() if name not in names}
        people = "".join(f"{name}:x:{number}:{number}::/nonexistent:/usr/sbin/nologin\n" for name, number in new.items())
        groups = "".join(f"{name}:x:{number}:\n" for name, number in new.items())
        places = {}
        for path, more in (("/etc/passwd", people), ("/etc/group", groups)):
            places[path] = root / Path(path).name
            places[path].write_text(Path(path).read_text() + more)
            places[path].chmod(0o644)
        places["/etc/hosts"] = root / "hosts"
        places["/etc/hosts"].write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", ALIAS)))
        arguments = [str(one) for path, place in {**places, **binds}.items() for one in (place, path)]
        self._prefix = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", _SCRIPT, "sh", *arguments, "--"]
        self._output = root / "output"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str) -> None:
        """Run a server in the foreground; what it writes is `output`."""
        with open(self._output, "wb") as output:
            self._process = subprocess.Popen(
                [*self._prefix, *command], stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    def output(self) -> str:
        """What the server wrote so far."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def ended(self) -> bool:
        """Whether the server has ended."""
        return self._process is None or self._process.poll() is not None

    def stop(self) -> None:
        """End it, with all its processes."""
        if self._process is None:
            return
        # Of unshare's own; it is the first one in its namespace, and unshare ends when all in there have.
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            for pid in children(self._process.pid):
                os.kill(pid, signal_number)
            try:
                self._process.wait(PATIENCE / 4)
                return
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError("it does not end")
