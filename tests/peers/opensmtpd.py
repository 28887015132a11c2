"""A real OpenSMTPD, as a next hop and as a client: a configuration, a spool and a port of its own, in a `Chamber`.

    smtpd = OpenSmtpd("127.0.0.12", certificate=pair, ca=path)
    smtpd.relays({"b@example.org": "smtp+tls://localhost:2525"})
    with smtpd:
        smtpd.port              # takes mail for x.test, and for those whom it can relay to
        smtpd.messages(1)       # what it took for x.test

It is found in PATH as smtpd, or where ``MTAD_SMTPD`` says; a binary that was only unpacked from its package will do, with
the rest of the package where it was unpacked.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

from mtad.tls.certificates import Pair
from tests.peers.chamber import Chamber
from tests.peers.ports import free_port
from tests.site import PATIENCE, await_value

#: The users that Debian's OpenSMTPD is built for; the numbers are taken when this machine does not have them.
_USERS: Final = {"opensmtpd": 64991, "opensmtpq": 64992}
#: Where it finds those who sign; there is no setting for that.
_AUTHORITIES: Final = Path("/etc/ssl/certs/ca-certificates.crt")

_CONFIG: Final = """\
pki smtpd.test cert "{certificate}"
pki smtpd.test key "{key}"
table catch {{ "@x.test" = "nobody" }}
table passwords file:{root}/passwords
queue ttl 1h
mta limit conn-delay-route 0
mta limit conn-delay-relay 0
listen on {address} port {port} tls pki smtpd.test hostname smtpd.test
action "here" maildir "{root}/mail" virtual <catch>
{actions}
{matches}
match from any for domain "x.test" action "here"
"""


def smtpd_binary() -> str:
    """Where OpenSMTPD's is; "" when nowhere. Others are called smtpd, too."""
    found = shutil.which(os.environ.get("MTAD_SMTPD") or "smtpd") or ""
    if not found or not _AUTHORITIES.exists():
        return ""
    said = subprocess.run([found, "-h"], capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL)
    return found if "OpenSMTPD" in said.stdout + said.stderr else ""


class OpenSmtpd:
    """The server; a context manager."""

    def __init__(self, address: str, *, certificate: Pair, ca: str) -> None:
        """``ca``: the authorities that it knows."""
        self.address = address
        self.port = free_port([address])
        self._root = root = Path(tempfile.mkdtemp(prefix="opensmtpd-"))
        root.chmod(0o755)
        for name in ("spool/smtpd", "lib/opensmtpd/empty", "run"):
            (root / name).mkdir(parents=True)
        (root / "spool" / "smtpd").chmod(0o711)
        self._pair = Pair(*(str(shutil.copy(path, root)) for path in (certificate.certificate, certificate.key)))
        os.chmod(self._pair.key, 0o600)
        binds = {"/var/spool": root / "spool", "/var/lib": root / "lib", "/run": root / "run", str(_AUTHORITIES): Path(ca)}
        unpacked = Path(smtpd_binary()).parents[1] / "libexec"
        if unpacked != Path("/usr/libexec"):
            binds["/usr/libexec"] = unpacked
        self._chamber = Chamber(root, binds, _USERS)
        self._actions = self._matches = self._passwords = ""
        self._urls: dict[str, str] = {}

    def relays(self, ways: Mapping[str, str], passwords: Mapping[str, str] | None = None) -> None:
        """Send mail on, by recipient, to a relay URL; before it is started.

        ``passwords``: the ``login:password`` of each label in a URL.
        """
        self._urls = dict(ways)
        for number, (recipient, url) in enumerate(ways.items()):
            auth = " auth <passwords>" if "@" in url else ""
            self._actions += f'action "way{number}" relay host "{url}"{auth}\n'
            self._matches += f'match from any for rcpt-to "{recipient}" action "way{number}"\n'
        self._passwords = "".join(f"{label} {login}\n" for label, login in (passwords or {}).items())

    def __enter__(self) -> OpenSmtpd:
        (self._root / "mail").mkdir()
        os.chown(self._root / "mail", 65534, 65534)
        (self._root / "passwords").write_text(self._passwords, encoding="utf-8")
        config = self._root / "smtpd.conf"
        config.write_text(
            _CONFIG.format(
                certificate=self._pair.certificate, key=self._pair.key, address=self.address, port=self.port,
                root=self._root, actions=self._actions, matches=self._matches,
            )
        )  # fmt: skip
        config.chmod(0o644)
        self._chamber.start(smtpd_binary(), "-d", "-f", str(config))

        def up() -> bool:
            assert not self._chamber.ended(), self.log()
            try:
                with socket.create_connection((self.address, self.port), PATIENCE) as connection:
                    return connection.recv(4) == b"220 "
            except ConnectionError:
                return False

        try:
            await_value(up, what="OpenSMTPD listens")
        except AssertionError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            print(f"--- the log of OpenSMTPD ---\n{self.log()[-8000:]}", file=sys.stderr)
        self._chamber.stop()
        shutil.rmtree(self._root)

    def log(self) -> str:
        """What it logged."""
        return self._chamber.output()

    def deferred(self, recipient: str) -> bool:
        """Whether it could not send to the next hop of this recipient, and gave up for now.

        It says so of a recipient only much later; at once it says of a connection what was wrong with it.
        """
        scheme, _, rest = self._urls[recipient].partition("://")
        port = rest.rpartition(":")[2]
        tried = re.findall(rf"^(\S+) mta connecting address={re.escape(scheme)}://\S+:{port} ", self.log(), re.M)
        return any(f"{session} mta error reason=" in self.log() for session in tried)

    def messages(self, count: int, timeout: float = PATIENCE) -> list[bytes]:
        """Wait for so many messages for x.test; their octets, with LF for line ends."""
        end = time.monotonic() + timeout
        while True:
            found = sorted(self._root.glob("mail/new/*"))
            if len(found) >= count:
                return [path.read_bytes() for path in found]
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)
