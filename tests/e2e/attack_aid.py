"""What the tests of attacks share: what a server under attack uses of the machine, what it has taken, and rude clients."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.client import Client
from tests.site import Site, Taken, await_value

EHLO: Final = "EHLO client.test"
MAIL: Final = "MAIL FROM:<a@sender.test>"
RCPT: Final = "RCPT TO:<alice@example.org>"

#: For tables of refused commands: the client is never cut off for them.
PATIENT: Final = {
    "bad_commands": 100_000,
    "bad_commands_in_a_row": 100_000,
    "junk_commands": 100_000,
    "connections_per_client": 10_000,
}

MIB: Final = 1 << 20


class Memory:
    """How much more memory processes had at their worst moment than before; a context manager around the attack."""

    def __init__(self, pids: Iterable[int]) -> None:
        """``pids``: of the processes, all of which live on."""
        self._pids = list(pids)
        assert self._pids
        self.growth = 0
        """Octets, of the process with the most; known at the end."""

    def __enter__(self) -> Self:
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the high-water mark begins anew
        self._before = {pid: _octets(pid, "VmRSS") for pid in self._pids}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.growth = max(_octets(pid, "VmHWM") - before for pid, before in self._before.items())


def _octets(pid: int, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert match is not None
    return int(match[1]) * 1024


def listeners(site: Site) -> Memory:
    """The memory of the listener processes."""
    return Memory(site.pids("listener"))


def harvest(site: Site, count: int) -> list[Taken]:
    """Exactly so many messages lie in incoming, no more and no half ones; they are taken away, so that the next test has
    it empty. For a site that does not deliver."""
    await_value(lambda: len(site.files("incoming")) == count, what=f"{count} messages: {site.files('incoming')}")
    messages = site.taken()
    assert len(messages) == count
    for message in messages:
        os.unlink(site.spool_path / "incoming" / message.envelope.id)
    return messages


def deliver(client: Client, content: bytes = b"Subject: x\r\n\r\nx\r\n") -> str:
    """After the recipients: DATA, content and dot; the reply."""
    answer = client.say("DATA")
    if not answer.startswith("354 "):
        return answer
    client.send(content + b".\r\n")
    return client.reply()


def pour(client: Client, data: bytes) -> list[str]:
    """Send without waiting, and hear all replies until the server closes the connection."""
    sender = threading.Thread(target=client.send, args=(data,), daemon=True)
    sender.start()
    replies = []
    while answer := client.reply():
        replies.append(answer)
    sender.join(20)
    assert not sender.is_alive(), "the server neither reads nor closes"
    return replies


def assert_printable(text: str | bytes) -> None:
    """Lines, and in them nothing that does not print; a tab may begin one."""
    lines = (text.decode() if isinstance(text, bytes) else text).split("\n")
    assert all(line.removeprefix("\t").isprintable() for line in lines), [line for line in lines if not line.isprintable()]
