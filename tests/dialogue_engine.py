"""The receiving half in memory: spool, users and log that a test can look into, and the engine as a dialogue's target."""

# ruff: noqa: ARG002 - implementations of protocols take what their callers give

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mtad.address import Address
from mtad.config import Limits
from mtad.envelope import Envelope
from mtad.policy import Policy, Service
from mtad.reply import Reply
from mtad.session.dialogue import Dialogue
from mtad.session.state import Client, Session, Site, TlsFacts
from mtad.smtp.sasl import Entry, derive
from tests.dialogue_script import Script, Stored

HOSTNAME = "mx.example.org"
PASSWORD = "open sesame"
BINDINGS = {"tls-exporter": b"e" * 32, "tls-server-end-point": b"s" * 32}
TLS = TlsFacts("TLSv1.3", "TLS_AES_256_GCM_SHA384", 256, BINDINGS)
USERS = {"root@example.org": "root", "alice@example.org": "alice", "bob@example.org": "bob"}
NOON = 1_700_000_000.0


class MemoryUsers:
    """Users from a dictionary."""

    def lookup(self, address: Address) -> str | None:
        return USERS.get(address.key)


class MemoryLogins:
    """alice and bob, and how often anybody was asked for. The iterations are few, so that tests are fast."""

    def __init__(self, *names: str) -> None:
        self.entries = {
            name: derive(PASSWORD, b"salt of " + name.encode().ljust(8), 4096) for name in names or ("alice", "bob")
        }
        self.asked: list[str] = []

    def find(self, login: str) -> Entry:
        self.asked.append(login)
        keys = self.entries.get(login)
        return Entry(login, keys or derive("nobody's", b"salt of nobody", 4096), keys is not None)

    def any(self) -> bool:
        return bool(self.entries)


class MemoryEntry:
    """A message in memory that fails where its spool is told to."""

    def __init__(self, spool: MemorySpool, envelope: Envelope) -> None:
        self.spool = spool
        self.envelope = envelope
        self.content = b""
        self.writes = 0
        self.state = "open"

    def write(self, data: bytes) -> None:
        assert self.state == "open"
        self.writes += 1
        self.spool.fail(f"write {self.writes}")
        self.content += data

    def commit(self) -> None:
        assert self.state == "open"
        self.spool.fail("commit")
        self.state = "committed"

    def discard(self) -> None:
        assert self.state == "open", f"discarded when {self.state}"
        self.state = "discarded"
        self.spool.fail("discard")


class MemorySpool:
    """Services in memory. ``faults`` names the steps that fail ("enter", "write 1", "commit", "discard") and how."""

    def __init__(self) -> None:
        self.entries: list[MemoryEntry] = []
        self.faults: dict[str, OSError] = {}
        self.ids = 0

    def fail(self, step: str) -> None:
        if step in self.faults:
            raise self.faults[step]

    def new_queue_id(self) -> str:
        self.ids += 1
        return f"ID{self.ids:04}"

    def now(self) -> float:
        return NOON

    def enter(self, envelope: Envelope) -> MemoryEntry:
        self.fail("enter")
        self.entries.append(MemoryEntry(self, envelope))
        return self.entries[-1]

    @property
    def committed(self) -> list[MemoryEntry]:
        return [entry for entry in self.entries if entry.state == "committed"]

    @property
    def open_entries(self) -> list[MemoryEntry]:
        return [entry for entry in self.entries if entry.state == "open"]


class Recorder:
    """An observer that remembers, one line for each event."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def refused(self, session: Session, command: str, answer: Reply) -> None:
        self.events.append(f"refused {command!r} {answer.code} {answer.enhanced}")

    def rejected(self, session: Session, recipient: str, answer: Reply) -> None:
        assert session.transaction is not None
        self.events.append(f"rejected {recipient} {answer.code} {answer.enhanced} from {session.transaction.sender}")

    def accepted(self, session: Session, envelope: Envelope, size: int, message_id: str) -> None:
        self.events.append(f"accepted {envelope.id} size {size} nrcpt {len(envelope.recipients)} id {message_id}")

    def discarded(self, session: Session, envelope: Envelope, size: int, answer: Reply) -> None:
        self.events.append(f"discarded {envelope.id} {answer.code} {answer.enhanced}")

    def lost(self, session: Session, where: str, why: str) -> None:
        self.events.append(f"{why} after {where}")


def whole(data: bytes) -> Iterable[bytes]:
    """Cut nothing."""
    return [data]


def octets(data: bytes) -> Iterable[bytes]:
    """Cut everywhere."""
    return (data[i : i + 1] for i in range(len(data)))


class Engine:
    """A dialogue with everything around it in memory; the target on which scripts are played."""

    def __init__(
        self,
        service: Service = "mx",
        *,
        client: Client = Client("127.0.0.1", "localhost"),  # noqa: B008 - frozen
        cut: Callable[[bytes], Iterable[bytes]] = whole,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        domains: Sequence[str] = ("example.org",),
        senders: Sequence[str] = (),
        **site: Any,
    ) -> None:
        """``site`` are settings of `Site`."""
        trusted = ("127.0.0.0/8", "::1/128") if service == "relay" else ()
        policy = Policy(MemoryUsers(), domains, service, trusted, senders)
        self.spool = MemorySpool()
        self.log = Recorder()
        self.dialogue = Dialogue(Site(HOSTNAME, limits, policy, **site), client, self.spool, self.log)
        self.cut = cut
        if self.dialogue.session.site.tls == "implicit":
            self.dialogue.secured(TLS)
        self.transcript = self.dialogue.greeting()
        self._unread = self.transcript

    @classmethod
    def for_script(
        cls, script: Script, cut: Callable[[bytes], Iterable[bytes]] = whole, *, strict_order: bool = True
    ) -> Engine:
        """The site that a script asks for."""
        logins = MemoryLogins() if script.logins else None
        return cls(script.service, cut=cut, tls=script.tls, logins=logins, strict_order=strict_order)

    def send(self, data: bytes) -> None:
        for piece in self.cut(data):
            said = self.dialogue.receive(piece)
            self.transcript += said
            self._unread += said

    def secure(self, tls: TlsFacts | None = None) -> None:
        assert self.dialogue.wants_tls
        self.dialogue.secured(tls or TLS)

    def say(self, *lines: str) -> list[str]:
        """Send lines, and return those that came back."""
        self._unread = b""
        for line in lines:
            self.send(line.encode() + b"\r\n")
        return self._unread.decode().splitlines()

    def line(self) -> bytes:
        line, end, self._unread = self._unread.partition(b"\r\n")
        if not end:
            raise EOFError
        return line

    def closed(self) -> bool:
        return self.dialogue.closing and not self._unread

    def stored(self, count: int = 0) -> list[Stored]:
        return [
            Stored(
                entry.envelope.sender,
                tuple(recipient.address for recipient in entry.envelope.recipients),
                entry.content,
            )
            for entry in self.spool.committed
        ]
