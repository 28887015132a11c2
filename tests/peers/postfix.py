"""A real Postfix as a next hop: a configuration, a queue and a port of its own.

    with Postfix("127.0.0.9", certificate=pair) as postfix:
        ...
        postfix.port
        postfix.messages()      # what it took, as the files of its virtual mailboxes

Needs root, as Postfix does. It lives in a directory that its own users can enter, which those of pytest are not. Everything
is stopped and removed when the ``with`` block ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

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
anvil unix - - n - 1 anvil
tlsmgr unix - - n 1000? 1 tlsmgr
postlog unix-dgram n - n - 1 postlogd
"""


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
        (self._config / "main.cf").write_text(
            _MAIN.format(
                queue=directory / "queue", data=directory / "data", mail=directory / "mail", tls=tls, log=self._log,
                key=certificate.key, certificate=certificate.certificate, root=directory, discarded=",".join(discarded),
            )
        )  # fmt: skip
        (self._config / "master.cf").write_text(_MASTER.format(address=address, port=self.port))

    def __enter__(self) -> Postfix:
        self._run("start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
        end = time.monotonic() + timeout
        while text not in self.log():
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)

    def messages(self, count: int, timeout: float = 20.0) -> list[bytes]:
        """Wait for so many messages; their octets, with LF for line ends."""
        end = time.monotonic() + timeout
        while True:
            found = sorted(self._mail.glob("new/*"))
            if len(found) >= count:
                return [path.read_bytes() for path in found]
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)
