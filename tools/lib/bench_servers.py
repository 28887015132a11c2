"""The servers that `tools/bench` compares: mtad and Postfix, each with its durability on and its log in a file.

Postfix runs beside whatever Postfix the machine has: own configuration, own queue, own data directory, own port. Its
settings are the defaults, but for what makes it a relay for loopback to the sink. Neither server limits how many
connections one client may have: there is only one, the generator.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Final

from tests.peers.mx import free_port
from tests.site import Site
from tools.lib.bench import BenchFailed, program

_PATIENCE: Final = 30.0


class Mtad:
    """mtad; see `tools.lib.bench.Server`."""

    name = "mtad"

    def __init__(self, root: Path, sink_port: int) -> None:
        """``root`` is a directory for everything."""
        self._site = Site(
            root,
            delivery={"next_hop": f"[127.0.0.1]:{sink_port}", "tls": "none"},
            limits={"connections_per_client": 1000},
        )
        self._port = 0

    def start(self) -> None:
        """Start it."""
        self._site.start()
        self._port = self._site.address("relay")[1]

    def stop(self) -> None:
        """Stop it."""
        if self._site.process is not None:
            self._site.stop()

    @property
    def port(self) -> int:
        """Where its relay listener is."""
        return self._port

    def pids(self) -> list[int]:
        """Its master."""
        assert self._site.process is not None
        return [self._site.process.pid]

    def empty(self) -> bool:
        """Whether nothing is in incoming, active or deferred."""
        return not any(self._site.files(queue) for queue in ("active", "incoming", "deferred"))


_MAIN: Final = """\
compatibility_level = 3.6
queue_directory = {root}/queue
data_directory = {root}/data
maillog_file = {root}/maillog
maillog_file_prefixes = {root}
myhostname = postfix.test
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
relayhost = [127.0.0.1]:{sink}
alias_maps =
alias_database =
local_recipient_maps =
smtpd_tls_security_level = none
smtp_tls_security_level = none
smtp_destination_concurrency_limit = 20
smtpd_client_connection_count_limit = 0
import_environment = MAIL_CONFIG MAIL_DEBUG MAIL_LOGTAG TZ XAUTHORITY DISPLAY LANG=C
"""

_MASTER: Final = """\
127.0.0.1:{port} inet n - n - - smtpd
postlog unix-dgram n - n - 1 postlogd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
proxywrite unix - - n - 1 proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
local unix - n n - - local
virtual unix - n n - - virtual
lmtp unix - - n - - lmtp
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
"""


class Postfix:
    """An instance of Postfix of its own; see `tools.lib.bench.Server`. Only root can start one."""

    name = "Postfix"

    def __init__(self, root: Path, sink_port: int) -> None:
        """``root`` is a directory for everything, on the way to which everybody may pass."""
        self._root = root
        self.port = free_port(["127.0.0.1"])
        self._config = root / "etc"
        self._config.mkdir(parents=True)
        (root / "queue").mkdir()
        (root / "data").mkdir()
        (self._config / "main.cf").write_text(_MAIN.format(root=root, sink=sink_port), encoding="utf-8")
        (self._config / "master.cf").write_text(_MASTER.format(port=self.port), encoding="utf-8")

    @staticmethod
    def missing() -> str:
        """Why it cannot run here; "" when it can."""
        try:
            program("postfix")
        except BenchFailed as why:
            return str(why)
        return "" if os.geteuid() == 0 else "only root can start a Postfix"

    def start(self) -> None:
        """Start it and wait until it answers."""
        shutil.chown(self._root / "data", self._setting("mail_owner"))
        self._command("start")
        deadline = time.monotonic() + _PATIENCE
        while not self.pids():
            if time.monotonic() > deadline:
                raise BenchFailed(f"Postfix does not start; see {self._root}/maillog")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it."""
        if self.pids():
            self._command("stop")

    def pids(self) -> list[int]:
        """Its master."""
        try:
            return [int((self._root / "queue/pid/master.pid").read_text(encoding="ascii"))]
        except (FileNotFoundError, ValueError):
            return []

    def empty(self) -> bool:
        """Whether no queue file is left."""
        queue = self._root / "queue"
        return not any(
            files for name in ("active", "incoming", "maildrop", "deferred") for _, _, files in os.walk(queue / name)
        )

    def _setting(self, name: str) -> str:
        command = [program("postconf"), "-c", str(self._config), "-h", name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def _command(self, word: str) -> None:
        command = [program("postfix"), "-c", str(self._config), word]
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if result.returncode != 0:
            raise BenchFailed(f"postfix {word}: {result.stderr.strip() or result.stdout.strip()}")
