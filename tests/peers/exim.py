"""A real Exim, as a next hop and as a client: a configuration, a spool and a port of its own, in a `Chamber`.

    exim = Exim("127.0.0.11", certificate=pair)
    exim.relays({"b@example.org": EximRelay(port, tls="required", ca=path)})
    with exim:
        exim.port               # takes mail for x.test, and for those whom it can relay to
        exim.messages(1)        # what it took for x.test

It is found in PATH as exim4 or exim, or where ``MTAD_EXIM`` says; a binary that was only unpacked from its package will do.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, NamedTuple

from mtad.tls.certificates import Pair
from tests.peers.chamber import Chamber
from tests.peers.ports import free_port
from tests.site import PATIENCE, await_value

#: The user that Debian's Exim is built for; the number is taken when this machine does not have it.
_USER: Final = "Debian-exim"
_NUMBER: Final = 64990

_CONFIG: Final = """\
primary_hostname = exim.test
exim_path = {binary}
spool_directory = {root}/spool
log_file_path = {root}/log/%slog
pid_file_path = {root}/exim.pid
local_interfaces = {address}
daemon_smtp_ports = {port}
acl_smtp_rcpt = acl_rcpt
dsn_advertise_hosts = *
tls_advertise_hosts = *
tls_certificate = {certificate}
tls_privatekey = {key}
log_selector = +tls_cipher +tls_certificate_verified
deliver_drop_privilege = true
keep_environment =
rfc1413_query_timeout = 0s
host_lookup =
queue_run_in_order = false

begin acl
acl_rcpt:
  accept

begin routers
here:
  driver = accept
  domains = x.test
  transport = maildir
{routers}
begin transports
maildir:
  driver = appendfile
  directory = {root}/mail
  maildir_format
  create_directory
  user = {user}
{transports}
begin retry
* * F,1h,2s

begin authenticators
plain:
  driver = plaintext
  public_name = PLAIN
  client_send = ^${{extract{{1}}{{|}}{{$address_data}}}}^${{extract{{2}}{{|}}{{$address_data}}}}
"""


class EximRelay(NamedTuple):
    """Where mail goes on to, on this machine, and how."""

    port: int
    tls: Literal["none", "opportunistic", "required", "implicit"] = "opportunistic"
    ca: str = ""
    """Who signs certificates for ``host`` that are good; "": any is."""
    login: str = ""
    """As ``login:password``."""
    host: str = "localhost"


def exim_binary() -> str:
    """Where it is; "" when nowhere."""
    return shutil.which(os.environ.get("MTAD_EXIM") or "exim4") or shutil.which("exim") or ""


class Exim:
    """The server; a context manager."""

    def __init__(self, address: str, *, certificate: Pair) -> None:
        self.address = address
        self.port = free_port([address])
        self._root = root = Path(tempfile.mkdtemp(prefix="exim-"))
        root.chmod(0o755)
        self._relays: Mapping[str, EximRelay] = {}
        self._chamber = Chamber(root, {}, {_USER: _NUMBER})
        number = next(
            int(line.split(":")[2]) for line in (root / "passwd").read_text().splitlines() if line.startswith(f"{_USER}:")
        )
        for name in ("spool", "log", "mail", "tls"):
            (root / name).mkdir()
            os.chown(root / name, number, number)
        self._pair = Pair(*(str(shutil.copy(path, root / "tls")) for path in (certificate.certificate, certificate.key)))
        os.chown(self._pair.key, number, number)

    def relays(self, ways: Mapping[str, EximRelay]) -> None:
        """Send mail on, by recipient; before it is started."""
        self._relays = ways

    def keep(self, name: str, text: str) -> str:
        """Keep a file where its user can read it; its path."""
        path = self._root / "tls" / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o644)
        return str(path)

    def __enter__(self) -> Exim:
        config = self._root / "exim.conf"
        config.write_text(self._config(), encoding="utf-8")
        config.chmod(0o644)
        self._chamber.start(exim_binary(), "-C", str(config), "-bdf", "-q5s")

        def up() -> bool:
            assert not self._chamber.ended(), self.log()
            return "listening for SMTP on" in self.log()

        try:
            await_value(up, what="Exim listens")
        except AssertionError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            print(f"--- the log of Exim ---\n{self.log()[-8000:]}", file=sys.stderr)
        self._chamber.stop()
        shutil.rmtree(self._root)

    def _config(self) -> str:
        routers, transports = [], []
        for number, (recipient, relay) in enumerate(self._relays.items()):
            routers.append(_router(number, recipient, relay))
            transports.append(_transport(number, relay))
        return _CONFIG.format(
            binary=exim_binary(), root=self._root, address=self.address, port=self.port, user=_USER,
            certificate=self._pair.certificate, key=self._pair.key,
            routers="".join(routers), transports="".join(transports),
        )  # fmt: skip

    def log(self) -> str:
        """What it logged, and said otherwise."""
        paths = sorted((self._root / "log").glob("*log"))
        return self._chamber.output() + "".join(path.read_text(errors="replace") for path in paths)

    def deferred(self, recipient: str) -> bool:
        """Whether it could not send what is for this recipient, and keeps it."""
        return f" == {recipient} R=" in self.log()

    def messages(self, count: int, timeout: float = PATIENCE) -> list[bytes]:
        """Wait for so many messages for x.test; their octets, with LF for line ends."""
        end = time.monotonic() + timeout
        while True:
            found = sorted(self._root.glob("mail/new/*"))
            if len(found) >= count:
                return [path.read_bytes() for path in found]
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)


def _router(number: int, recipient: str, relay: EximRelay) -> str:
    local, _, domain = recipient.rpartition("@")
    lines = [f"way{number}:", "  driver = manualroute", f"  domains = {domain}", "  self = send"]
    lines += [f"  route_list = * {relay.host}::{relay.port} byname", f"  transport = way{number}"]
    if local:
        lines.append(f"  local_parts = {local}")
    if relay.login:
        lines.append(f"  address_data = {relay.login.replace(':', '|', 1)}")
    return "\n".join(lines) + "\n"


def _transport(number: int, relay: EximRelay) -> str:
    lines = [f"way{number}:", "  driver = smtp", "  allow_localhost", "  dnssec_request_domains ="]
    if relay.tls == "none":
        lines.append("  hosts_avoid_tls = *")
    elif relay.tls != "opportunistic":
        lines.append("  hosts_require_tls = *")
    if relay.tls == "implicit":
        lines.append("  protocol = smtps")
    if relay.ca:
        lines += [f"  tls_verify_certificates = {relay.ca}", "  tls_verify_hosts = *", "  tls_verify_cert_hostnames = *"]
    else:
        lines += ["  tls_try_verify_hosts ="]
    if relay.login:
        lines.append("  hosts_require_auth = *")
    return "\n".join(lines) + "\n"
