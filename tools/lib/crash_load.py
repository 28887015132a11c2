"""The load of a crash test: clients that send messages as fast as they may, and the ledger of what got its 250.

Each client has a random number generator of its own, seeded, so that the same seed brings the same messages; which of them
get through depends on the kills. The part of a recipient before the dash says what becomes of it:

===============  ==================================================================================
users of ours    stored in a Maildir
``steady-…``     taken by the steady exchanger
``later-…``      refused with 450 at first by the other exchanger, taken the next time
``never-…``      refused with 550: the sender gets a report
``stay-…``       refused with 450 for ever: stays in the queue
===============  ==================================================================================
"""

from __future__ import annotations

import random
import smtplib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from tests.peers.mx import OK, Actions, Say
from tools.lib.crash_verdict import ID_FIELD, Sent, digest

DOMAIN: Final = "example.org"
USERS: Final = ("root", "alice", "bob", "carol")
#: Who sends, and gets the reports.
SENDERS: Final = ("sender0", "sender1")
STEADY: Final = "steady.test"
MOODY: Final = "moody.test"
#: Seconds for a client to get an answer; long enough for a busy machine, short enough not to stand still.
_TIMEOUT: Final = 10.0

_LATER: Final = (Say("450 4.2.0 Later"), Say("250 2.1.5 Ok"))
_STAY: Final = Say("450 4.2.1 Not now")
_NEVER: Final = Say("550 5.1.1 Never")


class Moods(Mapping[str, Actions]):
    """The moody exchanger's answers to RCPT: `tests.peers.script.Script.rcpt`, for any recipient."""

    def __getitem__(self, recipient: str) -> Actions:
        kind = recipient.partition("-")[0]
        moods: dict[str, Actions] = {"later": _LATER, "stay": _STAY, "never": _NEVER}
        return moods.get(kind, OK)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class Ledger:
    """What was sent, in memory and, a line each, in a file. A message stands there before its first octet is sent."""

    def __init__(self, path: Path) -> None:
        """A new file."""
        self._lock = threading.Lock()
        self._file = path.open("wb", buffering=0)
        self._messages: dict[str, Sent] = {}

    def note(self, message: Sent) -> None:
        """Write down that a message is sent, or that it got its 250."""
        with self._lock:
            self._messages[message.id] = message
            self._file.write(msgspec.json.encode(message) + b"\n")

    def messages(self) -> list[Sent]:
        """All of them, with the last that is known."""
        with self._lock:
            return list(self._messages.values())

    def acknowledged(self) -> int:
        """How many got a 250."""
        return sum(1 for message in self.messages() if message.queue_id)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def compose(chance: random.Random, name: str) -> tuple[Sent, bytes]:
    """A message: what the ledger says of it, and its content."""
    sender = f"{chance.choice(SENDERS)}@{DOMAIN}"
    kinds: list[Callable[[], str]] = [
        lambda: f"{chance.choice(USERS)}@{DOMAIN}",
        lambda: f"steady-{name}@{STEADY}",
        lambda: f"later-{name}@{MOODY}",
        lambda: f"never-{name}@{MOODY}",
    ]
    chosen = chance.choices(kinds, (6, 5, 2, 2), k=chance.choice((1, 1, 1, 2, 3)))
    recipients = tuple(dict.fromkeys(kind() for kind in chosen))
    if chance.random() < 0.03:
        recipients += (f"stay-{name}@{MOODY}",)
    body = _body(chance)
    head = f"From: {sender}\r\nTo: {', '.join(recipients)}\r\nSubject: crash\r\n{ID_FIELD}: {name}\r\n\r\n"
    return Sent(name, sender, recipients, digest(body)), head.encode() + body


def _body(chance: random.Random) -> bytes:
    # Above 64 KiB a queue file is written, and read, in several pieces.
    size = chance.choices((200, 4000, 30000, 150000), (5, 10, 2, 1))[0]
    line = chance.randbytes(30).hex()
    lines = [f"{'.' if number % 7 == 0 else ''}{number} {line}" for number in range(size // 66 + 1)]
    return "\r\n".join(lines).encode() + b"\r\n"


class Client(threading.Thread):
    """One client: session after session of one to five messages, until `stop` is set."""

    def __init__(
        self,
        number: int,
        seed: int | str,
        ledger: Ledger,
        address: Callable[[], tuple[str, int]],
        stop: threading.Event,
        pause: float,
    ) -> None:
        """``address`` is where the relay listens now, and may raise; ``pause``: mean seconds between messages."""
        super().__init__(name=f"client {number}", daemon=True)
        self._number = number
        self._chance = random.Random(f"{seed} {number}")
        self._ledger = ledger
        self._address = address
        self._stop_event = stop
        self._pause = pause
        self._count = 0

    def run(self) -> None:
        """See the class."""
        while not self._stop_event.is_set():
            try:
                self._session()
            except (OSError, smtplib.SMTPException, AssertionError):
                self._stop_event.wait(0.05)  # killed in the middle; the message in question got no 250

    def _session(self) -> None:
        host, port = self._address()
        with smtplib.SMTP(host, port, local_hostname="client.test", timeout=_TIMEOUT) as client:
            client.ehlo_or_helo_if_needed()
            for _ in range(self._chance.randint(1, 5)):
                self._send(client)
                if self._stop_event.wait(self._chance.uniform(0, 2 * self._pause)):
                    return

    def _send(self, client: smtplib.SMTP) -> None:
        self._count += 1
        message, content = compose(self._chance, f"{self._number}-{self._count}")
        self._ledger.note(message)
        client.mail(message.sender)
        for recipient in message.recipients:
            code, _ = client.rcpt(recipient)
            if code != 250:
                raise smtplib.SMTPDataError(code, b"a recipient was refused")
        code, text = client.data(content)
        if code == 250:
            self._ledger.note(msgspec.structs.replace(message, queue_id=text.decode().rpartition(" ")[2]))
