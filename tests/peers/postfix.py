"""A real Postfix, as a next hop and as a client: a configuration, a queue and a port of its own.

    with Postfix("127.0.0.9", certificate=pair) as postfix:
        ...
        postfix.port
        postfix.messages()      # what it took, as the files of its virtual mailboxes

    postfix = Postfix("127.0.0.9", certificate=pair)
    postfix.relays({"b@example.org": Relay("[127.0.0.1]:2525", {"smtp_tls_security_level": "encrypt"})})
    with postfix:
        ...                     # takes mail from loopback, and sends what is for b@example.org there, in this way

Needs root, as Postfix does. It lives in a directory that its own users can enter, which those of pytest are not. Everything
is stopped and removed when the ``with`` block ends.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pytest

from mtad.tls.certificates import Pair
from tests.peers.ports import free_port

needs_postfix = pytest.mark.skipif(
    shutil.which("postfix") is None or os.geteuid() != 0, reason="needs Postfix, and root to run it"
)

_MAIN = """\
compatibility_level = 3.6
queue_directory = {queue}
data_directory = {data}
mail_owner = postfix
setgid_group = postdrop
myhostname = next.test
mydestination =
inet_protocols = all
mynetworks =
smtpd_relay_restrictions = permit_auth_destination, reject
virtual_mailbox_domains = x.test
virtual_mailbox_base = {mail}
virtual_mailbox_maps = static:all/
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
smtpd_tls_security_level = {tls}
smtpd_tls_received_header = yes
smtpd_tls_chain_files = {key}, {certificate}
maillog_file = {log}
maillog_file_prefixes = {root}
smtpd_discard_ehlo_keywords = {discarded}
smtputf8_enable = yes
message_size_limit = 50000000
virtual_mailbox_limit = 0
"""

_MASTER = """\
{address}:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
error unix - - n - - error
virtual unix - n n - - virtual
smtp unix - - n - - smtp
retry unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
tlsmgr unix - - n 1000? 1 tlsmgr
postlog unix-dgram n - n - 1 postlogd
"""


#: What makes it a client: it takes mail from loopback for anybody, and says which TLS it used.
_CLIENT = {
    "mynetworks": "127.0.0.0/8",
    "smtpd_relay_restrictions": "permit_mynetworks, reject",
    "smtp_tls_loglevel": "1",
    "smtp_host_lookup": "native",
    "minimal_backoff_time": "2s",
    "queue_run_delay": "2s",
}


class Relay(NamedTuple):
    """Where mail goes on to: ``[host]:port``, and the settings of smtp(8) for it."""

    hop: str
    settings: Mapping[str, str]


class Postfix:
    """The server; a context manager."""

    def __init__(self, address: str, *, certificate: Pair, tls: str = "may", discarded: Sequence[str] = ()) -> None:
        """Write a configuration. ``discarded``: keywords of EHLO that it does not say."""
        self.address = address
        self._directory = directory = Path(tempfile.mkdtemp(prefix="postfix-"))
        directory.chmod(0o755)
        self.port = free_port([address])
        self._mail = directory / "mail" / "all"
        self._log = directory / "postfix.log"
        self._config = directory / "postfix"
        for path in (self._config, directory / "queue", directory / "data", self._mail):
            path.mkdir(parents=True)
        shutil.chown(directory / "data", "postfix")
        for path in (self._mail, self._mail.parent):
            os.chown(path, 65534, 65534)
        self._main = dict(
            line.split(" =", 1)
            for line in _MAIN.format(
                queue=directory / "queue", data=directory / "data", mail=directory / "mail", tls=tls, log=self._log,
                key=certificate.key, certificate=certificate.certificate, root=directory, discarded=",".join(discarded),
            ).splitlines()
        )  # fmt: skip
        self._master = _MASTER.format(address=address, port=self.port)

    def relays(self, ways: Mapping[str, Relay]) -> None:
        """Send mail on, by recipient (or domain, or ``*``); before it is started."""
        table = self._config / "transport"
        rows = []
        for number, (recipient, relay) in enumerate(ways.items()):
            options = "".join(f" -o {{ {name} = {value} }}" for name, value in relay.settings.items())
            self._master += f"way{number} unix - - n - - smtp{options}\n"
            rows.append(f"{recipient} way{number}:{relay.hop}\n")
        table.write_text("".join(rows), encoding="utf-8")
        self._main |= _CLIENT | {"transport_maps": f"texthash:{table}"}

    def keep(self, name: str, text: str, kind: str = "") -> str:
        """Keep a file where its users can read it; its path, behind the ``kind`` of table that it is."""
        path = self._config / name
        path.write_text(text, encoding="utf-8")
        return f"{kind}{path}"

    def __enter__(self) -> Postfix:
        (self._config / "main.cf").write_text("".join(f"{name} = {value}\n" for name, value in self._main.items()))
        (self._config / "master.cf").write_text(self._master)
        self._run("start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            print(f"--- the log of Postfix ---\n{self.log()[-8000:]}", file=sys.stderr)
        self._run("stop")
        shutil.rmtree(self._directory)

    def _run(self, verb: str) -> None:
        done = subprocess.run(
            ["postfix", "-c", str(self._config), verb], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.log()

    def log(self) -> str:
        """What it logged."""
        return self._log.read_text() if self._log.exists() else ""

    def await_log(self, text: str, timeout: float = 20.0) -> None:
        """Wait until ``text`` stands in the log."""
        self.await_line(re.escape(text), timeout)

    def await_line(self, pattern: str, timeout: float = 20.0) -> None:
        """Wait until a line of the log matches."""
        end = time.monotonic() + timeout
        while re.search(pattern, self.log()) is None:
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)

    def queue(self) -> str:
        """What waits in its queue, as ``mailq`` shows it."""
        command = ["postqueue", "-c", str(self._config), "-p"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout

    def messages(self, count: int, timeout: float = 20.0) -> list[bytes]:
        """Wait for so many messages; their octets, with LF for line ends."""
        end = time.monotonic() + timeout
        while True:
            found = sorted(self._mail.glob("new/*"))
            if len(found) >= count:
                return [path.read_bytes() for path in found]
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)
