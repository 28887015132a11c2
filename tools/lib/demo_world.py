"""The world in which `tools/demo` plays: two mail servers and a name server, all on loopback, all in one folder.

Everything listens on ports above 1024 that were free. The two servers have addresses of their own, 127.0.0.1 and
127.0.0.2, and the same port, since the port on which next hops listen is one setting for all of them.
"""

from __future__ import annotations

import json
import os
import signal
import smtplib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

ROOT: Final = Path(__file__).resolve().parents[2]
BIN: Final = Path(sys.executable).parent
#: Seconds within which what must happen happens; on an idle machine all of it takes milliseconds.
PATIENCE: Final = 15.0
#: Seconds for one of mtad's commands.
_LONGEST_COMMAND: Final = 60.0

T = TypeVar("T")


class DemoFailed(Exception):
    """Something did not go as told; the text says what."""


def await_value(get: Callable[[], T | None], what: str) -> T:
    """Ask again until the answer is true in Python's sense; the answer.

    Raises:
        DemoFailed: it was not within `PATIENCE`.
    """
    deadline = time.monotonic() + PATIENCE
    while not (value := get()):
        if time.monotonic() > deadline:
            raise DemoFailed(f"{what}: not within {PATIENCE:g} seconds")
        time.sleep(0.02)
    return value


def free_port(*hosts: str) -> int:
    """A TCP port that is free on all of these addresses."""
    for _ in range(100):
        with socket.socket() as first:
            first.bind((hosts[0], 0))
            port: int = first.getsockname()[1]
            if all(_is_free(host, port) for host in hosts[1:]):
                return port
    raise DemoFailed(f"no port is free on all of {', '.join(hosts)}")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as trial:
        try:
            trial.bind((host, port))
        except OSError:
            return False
    return True


class NameServer:
    """A name server that knows a few names; a context manager. Any other name does not exist."""

    def __init__(self, names: Mapping[str, Mapping[str, str]]) -> None:
        """``names`` maps a name to its records: type and data, as ``{"MX": "10 mx.here.example."}``."""
        self._names = names
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, name="name server", daemon=True)

    @property
    def address(self) -> str:
        """As the setting ``dns.servers`` has it."""
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join(PATIENCE)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            question, client = self._socket.recvfrom(4096)
            if not question:
                return
            try:
                self._socket.sendto(self._answer(dns.message.from_wire(question)), client)
            except (dns.exception.DNSException, OSError):
                pass  # not a question, or nobody waits for the answer any more

    def _answer(self, query: dns.message.Message) -> bytes:
        asked = query.question[0]
        records = self._names.get(asked.name.to_text(omit_final_dot=True).lower())
        response = dns.message.make_response(query, recursion_available=True)
        if records is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif (data := records.get(dns.rdatatype.to_text(asked.rdtype))) is not None:
            response.answer.append(dns.rrset.from_text(asked.name, 60, "IN", asked.rdtype, data))
        return response.to_wire()


class Server:
    """One mtad with its own folder, started and stopped by its own commands."""

    def __init__(self, name: str, folder: Path, host: str, port: int, dns_server: str, users: tuple[str, ...]) -> None:
        """Write its configuration.

        Args:
            name: "here" or "there"; its domain is that and ``.example``.
            folder: that of the demo; the server gets one in it.
            host: the address on which it listens.
            port: the port there, and the port of all next hops.
            dns_server: whom it asks.
            users: who has a mailbox.
        """
        self.name = name
        self.domain = f"{name}.example"
        self.host, self.port = host, port
        self.relay_port = free_port(host)
        self.folder = folder / name
        self.config = self.folder / "mtad.toml"
        self.folder.mkdir()
        (self.folder / "users").write_text("".join(f"{user} : {user}@{self.domain}\n" for user in users))
        self.config.write_text(
            _CONFIG.format(
                domain=self.domain,
                folder=self.folder,
                host=host,
                port=port,
                relay_port=self.relay_port,
                dns_server=dns_server,
                postmaster=users[0],
            )
        )
        self._started = False

    def run(self, program: str, *arguments: str) -> str:
        """Run one of mtad's commands for this server; what it printed.

        Raises:
            DemoFailed: its exit code is not 0.
        """
        code, out, errors = self._call(program, *arguments)
        if code:
            said = (errors or out).strip()
            raise DemoFailed(f"`{' '.join((program, *arguments))}` of {self.name} ended with {code}: {said}")
        return out

    def _call(self, program: str, *arguments: str) -> tuple[int, str, str]:
        """Run a command to its end, also when we are interrupted: a start that was cut off could not be stopped."""
        # The demo plays in its folder: nothing may come from the environment or end in the current directory.
        environment = os.environ | {"MTAD_CONFIG": str(self.config), "PYTHONPATH": str(ROOT)}
        try:
            process = subprocess.Popen(
                [str(BIN / program), *arguments],
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                out, errors = process.communicate(timeout=_LONGEST_COMMAND)
            except KeyboardInterrupt:
                process.communicate(timeout=_LONGEST_COMMAND)
                raise
        except (OSError, subprocess.TimeoutExpired) as fault:
            raise DemoFailed(f"{program}: {fault}") from fault
        return process.returncode, out, errors

    def start(self) -> None:
        """``mtad start``: returns when it listens."""
        self._started = True
        self.run("mtad", "start")

    def stop(self) -> None:
        """``mtad stop``: returns when all of it is gone. Does nothing when it does not run, whoever stopped it.

        Raises:
            DemoFailed: it could not be stopped in order, and was killed.
        """
        if not self._started:
            return
        self._started = False
        try:
            self.run("mtad", "stop")
        except DemoFailed:
            code, out, _ = self._call("mtad", "status", "--json")
            if code == 0:
                os.kill(json.loads(out)["pid"], signal.SIGKILL)  # its children see that and end
                raise

    def send(self, sender: str, recipient: str, subject: str, text: str, *, relay: bool = False) -> str:
        """Hand one message to this server by SMTP; its queue id, which is the last word of the reply."""
        content = f"From: {sender}\r\nTo: {recipient}\r\nSubject: {subject}\r\n\r\n{text}\r\n"
        try:
            with smtplib.SMTP(
                self.host, self.relay_port if relay else self.port, "demo.example", timeout=PATIENCE
            ) as client:
                client.ehlo()
                for code, answer in (client.mail(sender), client.rcpt(recipient), client.data(content)):
                    if code != 250:
                        raise DemoFailed(f"{self.name} did not take the message: {code} {answer.decode()}")
        except (OSError, smtplib.SMTPException) as fault:
            if isinstance(fault.__context__, KeyboardInterrupt):  # smtplib's goodbye met the reply that nobody waits for
                raise fault.__context__ from None
            raise DemoFailed(f"{self.name} did not take the message: {fault}") from fault
        return answer.decode().rpartition(" ")[2]

    def mailbox(self, user: str) -> list[Path]:
        """The files in a user's Maildir, oldest first."""
        new = self.folder / "mail" / user / "new"
        return sorted(new.iterdir(), key=lambda path: path.stat().st_mtime_ns) if new.is_dir() else []

    def await_mail(self, user: str, count: int) -> Path:
        """Wait for a user to have ``count`` messages; the newest."""
        return await_value(
            lambda: found[-1] if len(found := self.mailbox(user)) >= count else None, f"mail for {user}@{self.domain}"
        )

    def log(self) -> list[str]:
        """The lines of the log."""
        path = self.folder / "mtad.log"
        return path.read_text(errors="replace").splitlines() if path.exists() else []


_CONFIG: Final = """\
hostname = "mx.{domain}"
spool = "{folder}/spool"
user = ""
pid_file = "{folder}/mtad.pid"

[local]
domains = ["{domain}"]
mail_root = "{folder}/mail"
users = "{folder}/users"
postmaster = "{postmaster}"

[[listener]]
name = "inbound"
service = "mx"
address = ["{host}:{port}"]

[[listener]]
name = "relay"
service = "relay"
address = ["{host}:{relay_port}"]

[delivery]
port = {port}
connection_idle = "0.5s"

[dns]
servers = ["{dns_server}"]
timeout = "3s"

[processes]
listeners = 1
stop_timeout = "3s"

[log]
to = "{folder}/mtad.log"
"""
