"""A site for tests: a real mtad, started from a configuration of its own in a directory of its own.

    with Site(tmp_path, dns=dns) as site:
        queue_id = site.send("a@sender.test", "alice@example.org", b"Subject: x\r\n\r\nhello\r\n")
        [stored] = site.await_mail("alice")
        site.await_empty_queue()

Everything is real: processes, sockets on loopback ports that the kernel chose, a spool on the disk. Conditions are awaited
with a deadline, never slept for. At its end a site is stopped, and that nothing of it is left running is asserted.
"""

from __future__ import annotations

import json
import os
import re
import signal
import smtplib
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import mtad
from mtad.control import Status, ask_status
from mtad.envelope import Envelope
from mtad.errors import MtadError, QueueFileUnfinished
from mtad.spool.queues import MASTER_LOCK, Queue, Spool
from tests.procs import alive, children

__all__ = ["BIN", "DOMAIN", "HOSTNAME", "PACKAGES", "PATIENCE", "Site", "Taken", "alive", "await_value", "children", "toml"]

BIN: Final = Path(sys.executable).parent
HOSTNAME: Final = "mx.example.org"
DOMAIN: Final = "example.org"
#: Where our code and what it uses are, for another Python.
PACKAGES: Final = os.pathsep.join([str(Path(mtad.__file__).parents[1]), sysconfig.get_path("purelib")])
#: Seconds within which what must happen happens; generous, for a busy machine.
PATIENCE: Final = 20.0

T = TypeVar("T")


class Taken(NamedTuple):
    """A message in the queue."""

    envelope: Envelope
    content: bytes


def await_value(get: Callable[[], T | None], timeout: float = PATIENCE, what: str = "") -> T:
    """Ask again until the answer is true in Python's sense; the answer.

    Raises:
        AssertionError: it was not within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    pause = 0.002
    while not (value := get()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what or get}; last: {value!r}")
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    return value


def toml(value: object) -> str:
    """A Python value in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value) if isinstance(value, str) else str(value)


class Site:
    """One mtad under test; a context manager that starts and stops it."""

    def __init__(
        self,
        root: Path,
        *,
        dns: str = "127.0.0.1:9",
        port: int = 25,
        users: Sequence[str] = ("root", "alice", "bob"),
        listeners: Sequence[dict[str, Any]] | None = None,
        deliver: bool = True,
        **sections: dict[str, Any],
    ) -> None:
        """Write the configuration.

        Args:
            root: an empty directory for everything.
            dns: the name server, ``address:port``; the default answers nothing.
            port: on which next hops listen.
            users: each gets ``<user>@example.org``.
            listeners: the listener tables; by default ``inbound`` (mx) and ``relay`` on 127.0.0.1 and ::1.
            deliver: False keeps the scheduler waiting for its spool, so that what was taken stays for `taken` to look at.
            sections: more settings, by section, as ``retry={"minimum": "1s"}``; "top": those before the first table.
        """
        self.root = root
        self.spool_path = root / "spool"
        self.mail_root = root / "mail"
        self.config_path = root / "mtad.toml"
        self.log_path = root / "mtad.log"
        self.users_path = root / "users"
        root.mkdir(parents=True, exist_ok=True)
        self.users_path.write_text("".join(f"{user} : {user}@{DOMAIN}\n" for user in users))
        self.settings: dict[str, dict[str, Any]] = {
            "top": {
                "hostname": HOSTNAME,
                "spool": str(self.spool_path),
                "user": "",
                "pid_file": str(root / "mtad.pid"),
            },
            "local": {
                "domains": [DOMAIN],
                "mail_root": str(self.mail_root),
                "users": str(self.users_path),
                "passwords": str(root / "passwords"),
            },
            "delivery": {"port": port, "connect_timeout": "5s"},
            "dns": {"servers": [dns], "timeout": "2s"},
            "log": {"to": str(self.log_path)},
            "processes": {"stop_timeout": "5s"},
        }
        self.listeners = (
            list(listeners)
            if listeners
            else [
                {"name": "inbound", "service": "mx", "address": ["127.0.0.1:0", "[::1]:0"]},
                {"name": "relay", "service": "relay", "address": ["127.0.0.1:0", "[::1]:0"]},
            ]
        )
        self.configure(**sections)
        self.process: subprocess.Popen[bytes] | None = None
        self.deliver = deliver
        #: Another Python that runs our commands.
        self.python = ""
        #: What stands before each of our commands: another program that runs it.
        self.prefix: list[str] = []
        self._lock = -1

    def configure(self, **sections: dict[str, Any]) -> None:
        """Change settings and write the file again; ``reload`` or a restart makes them hold."""
        for section, values in sections.items():
            self.settings.setdefault(section, {}).update(values)
        parts = [f"{key} = {toml(value)}\n" for key, value in self.settings["top"].items()]
        for section, values in self.settings.items():
            if section != "top":
                parts.append(f"\n[{section}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in values.items()))
        for listener in self.listeners:
            parts.append("\n[[listener]]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in listener.items()))
        self.config_path.write_text("".join(parts))

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self.master() is None:
            self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and self.log_path.exists():
            print(f"--- the log of {self.root} ---\n{self.log()[-8000:]}", file=sys.stderr)
        if self.master() is not None:
            self.stop()
        elif self.process is not None:
            self.process.wait(PATIENCE)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def start(self, **options: Any) -> None:
        """Start it in the foreground and wait until it answers. ``options`` are for `subprocess.Popen`."""
        self.launch(**options)
        self.await_up()

    def launch(self, **options: Any) -> None:
        """Start it in the foreground."""
        if not self.deliver and self._lock < 0:
            self._lock = Spool(str(self.spool_path), create=True).lock()
        with open(self.root / "output", "ab") as output:
            given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "cwd": self.root, "env": self.environment()} | options
            command = [*self._command("mtad"), "start", "--foreground"]
            self.process = subprocess.Popen(command, stdout=output, stderr=output, **given)

    def await_up(self) -> None:
        """Wait until it answers."""
        process = self.process
        assert process is not None

        def up() -> bool:
            assert process.poll() is None, f"mtad ended with {process.poll()}: {(self.root / 'output').read_text()}"
            status = ask_status(str(self.spool_path))
            return status is not None and status.pid == process.pid

        await_value(up, what="mtad answers")

    def stop(self) -> None:
        """Stop it in order; no process of it is left."""
        pids = self.processes()
        assert pids, "it does not run"
        os.kill(pids[0], signal.SIGTERM)
        if self.process is not None:
            self.process.wait(PATIENCE)
            self.process = None
        await_value(lambda: not any(alive(pid) for pid in pids), what=f"all of {pids} are gone")

    def start_daemon(self, **options: Any) -> subprocess.CompletedProcess[str]:
        """``mtad start``, which returns. ``options`` are for `subprocess.run`."""
        return self.run("mtad", "start", **{"stdin": subprocess.DEVNULL} | options)

    def master(self) -> int | None:
        """The process id of the master that has the spool."""
        try:
            spool = self.spool()
        except MtadError:
            return None
        try:
            return spool.holder(MASTER_LOCK)
        finally:
            spool.close()

    def kill(self) -> None:
        """SIGKILL the master; its children find out by themselves."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE)
        self.process = None

    def reload(self) -> subprocess.CompletedProcess[str]:
        """``mtad reload``."""
        return self.run("mtad", "reload")

    def renew(self) -> None:
        """`reload`, which must be taken, and wait until no old listener is left: one may take a last connection."""
        before = self.pids("listener")
        result = self.reload()
        assert result.returncode == 0, result.stderr
        await_value(lambda: not any(map(alive, before)), what="the old listeners have ended")

    def status(self) -> Status:
        """What the master says."""
        return await_value(lambda: ask_status(str(self.spool_path)), what="mtad answers")

    def pids(self, role: str) -> list[int]:
        """The process ids of the living ``listener``s, or of the ``scheduler``."""
        return [process.pid for process in self.status().processes if process.role == role and process.pid]

    def deliveries(self) -> list[int]:
        """The process ids of the delivery processes."""
        return [pid for scheduler in self.pids("scheduler") for pid in children(scheduler)]

    def processes(self) -> list[int]:
        """The process ids of all processes of the site, the master's first."""
        master = self.master()
        found = [] if master is None else [master]
        for pid in found:
            found.extend(children(pid))
        return found

    def run(self, program: str, *arguments: str, timeout: float = 60.0, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run one of our commands with the site's configuration. ``options`` are more for `subprocess.run`."""
        command = [*self._command(program), *arguments]
        given: dict[str, Any] = {"env": self.environment()} | options
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **given)

    def environment(self, **more: str) -> dict[str, str]:
        """The environment in which our commands run."""
        path = {"PYTHONPATH": PACKAGES} if self.python else {}
        return os.environ | {"MTAD_CONFIG": str(self.config_path)} | path | more

    def _command(self, program: str) -> list[str]:
        if not self.python:
            return [*self.prefix, str(BIN / program)]
        module = f"mtad.cli.{program.replace('-', '_')}"
        return [*self.prefix, self.python, "-c", f"from {module} import main; main(prog_name={program!r})"]

    # -- mail in ------------------------------------------------------------------------------------------------------

    def address(self, listener: str = "inbound", family: str = "4") -> tuple[str, int]:
        """Host and port of a listener, of the family "4" or "6"."""
        for found in self.status().listeners:
            if found.name == listener:
                for address in found.addresses:
                    host, _, port = address.rpartition(":")
                    if ("[" in host) == (family == "6"):
                        return host.strip("[]"), int(port)
        raise AssertionError(f"no listener {listener} with IPv{family}")

    def client(self, listener: str = "inbound", family: str = "4") -> smtplib.SMTP:
        """A client that is connected; for use in a ``with``."""
        host, port = self.address(listener, family)
        return smtplib.SMTP(host, port, local_hostname="client.test", timeout=PATIENCE)

    def send(self, sender: str, recipients: str | Sequence[str], content: bytes | str, listener: str | None = None) -> str:
        """Send one message; its queue id. Other domains than ours go through the relay."""
        wanted = [recipients] if isinstance(recipients, str) else list(recipients)
        if listener is None:
            ours = all(recipient.endswith("@" + DOMAIN) for recipient in wanted)
            listener = "inbound" if ours else "relay"
        with self.client(listener) as client:
            client.ehlo()
            code, text = client.mail(sender)
            assert code == 250, text
            for recipient in wanted:
                code, text = client.rcpt(recipient)
                assert code in (250, 251), text
            code, text = client.data(content)
            assert code == 250, text
        return text.decode().rpartition(" ")[2]

    # -- what became of it --------------------------------------------------------------------------------------------

    def mailbox(self, user: str) -> list[Path]:
        """The files in a user's ``new``, oldest first."""
        new = self.mail_root / user / "new"
        return sorted(new.iterdir(), key=lambda path: path.stat().st_mtime_ns) if new.is_dir() else []

    def await_mail(self, user: str, count: int = 1, timeout: float = PATIENCE) -> list[bytes]:
        """Wait until a mailbox has that many messages; all of them."""
        await_value(lambda: len(self.mailbox(user)) >= count, timeout, f"{count} messages for {user}")
        return [path.read_bytes() for path in self.mailbox(user)]

    def queue(self) -> list[dict[str, Any]]:
        """``mtaq --json``."""
        result = self.run("mtaq", "--json")
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    def files(self, queue: str) -> list[str]:
        """The names in a queue directory."""
        return sorted(name for name in os.listdir(self.spool_path / queue) if not name.startswith("."))

    def await_deferred(self, queue_id: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """Wait until a message is in deferred; its row of ``mtaq --json``."""
        await_value(lambda: queue_id in self.files("deferred"), timeout, f"{queue_id} is deferred")
        return next(row for row in self.queue() if row["queue_id"] == queue_id)

    def await_empty_queue(self, timeout: float = PATIENCE) -> None:
        """Wait until nothing is in incoming, active or deferred."""
        live = ("incoming", "active", "deferred")
        await_value(lambda: not any(self.files(queue) for queue in live), timeout, "the queue is empty")

    def log(self) -> str:
        """The log so far."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def await_log(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Wait until a line of the log matches; the match."""
        return await_value(lambda: re.search(pattern, self.log(), re.M), timeout, f"log has {pattern!r}")

    def taken(self) -> list[Taken]:
        """The messages that are safe in incoming, oldest first."""
        spool = self.spool()
        found = []
        for queue_id in sorted(spool.names(Queue.INCOMING)):
            try:
                with spool.open(Queue.INCOMING, queue_id) as message:
                    found.append(Taken(message.message.envelope, b"".join(message.chunks())))
            except QueueFileUnfinished:
                pass  # somebody is sending it
        spool.close()
        return found

    def spool(self) -> Spool:
        """The spool, opened."""
        return Spool(str(self.spool_path))

    def history(self, queue: Queue, queue_id: str) -> list[object]:
        """The events in a queue file."""
        spool = self.spool()
        try:
            return list(spool.load(queue, queue_id).events)
        finally:
            spool.close()
