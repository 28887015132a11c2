"""A site in a small world of its own: a DNS, and mail exchangers at addresses of their own that share one port.

with World(tmp_path) as world:
    first, second = world.mx(), world.mx(Script(dot=Say("451 4.3.0 Later")))
    domain = world.domain(second, first)                     # MX, the best one first
    queue_id = world.site.send("alice@example.org", f"b@{domain}", MESSAGE)
    first.await_messages(1)
"""

from __future__ import annotations

import email
import email.message
import email.policy
import itertools
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from mtad.envelope import Envelope, Recipient
from mtad.outcome import Attempt
from mtad.progress import Event
from mtad.spool.queues import Queue, Spool
from tests.peers.dns import DnsServer
from tests.peers.mx import Mx, Script, free_port
from tests.site import Site, await_value

MESSAGE: Final = b"From: alice@example.org\r\nSubject: a test\r\n\r\nhello\r\n"
#: How the sender of most tests is called: somebody who can get a report.
SENDER: Final = "alice@example.org"

_PROBED: Final = ("127.0.0.1", "127.77.0.1", "::1")


class World:
    """The site, the DNS and the exchangers; a context manager that starts and ends them."""

    def __init__(self, root: Path, *, start: bool = True, **sections: Any) -> None:
        """``sections`` are settings of the site, see `tests.site.Site`; without ``start`` the test starts it."""
        self._stack = ExitStack()
        self._start = start
        self._numbers: Iterator[int] = itertools.count(1)
        self.port = free_port(_PROBED)
        self.dns = DnsServer()
        more = sections.pop("dns", {})
        self.site = Site(root, dns=self.dns.address, port=self.port, **sections)
        self.site.configure(dns=more)

    def __enter__(self) -> Self:
        self._stack.enter_context(self.dns)
        if self._start:
            self._stack.enter_context(self.site)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._start:
            self.site.__exit__(kind, error, trace)
        self._stack.__exit__(kind, error, trace)

    def address(self) -> str:
        """An IPv4 address of the loopback that nobody else uses."""
        number = next(self._numbers)
        return f"127.77.{number // 250}.{number % 250 + 2}"

    def mx(self, script: Script | None = None, address: str = "") -> Mx:
        """An exchanger, at an address of its own unless told."""
        return self._stack.enter_context(Mx(address or self.address(), self.port, script))

    def blackhole(self) -> str:
        """The address of a host that is there and never answers: it takes connections, and not one word."""
        address = self.address()
        listener = self._stack.enter_context(socket.create_server((address, self.port), backlog=1000))
        assert listener.fileno() >= 0
        return address

    def domain(self, *hosts: Mx | str, preferences: Sequence[int] = (), name: str = "") -> str:
        """A new domain with these as MX, best first unless ``preferences`` say otherwise; its name.

        A text with several addresses, separated by blanks, is one host that has all of them.
        """
        name = name or f"d{next(self._numbers)}.test"
        order = preferences or range(10, 10 * len(hosts) + 10, 10)
        names = [f"mx{number}.{name}" for number in range(1, len(hosts) + 1)]
        self.dns.set(name, {"MX": [f"{number} {host}." for number, host in zip(order, names, strict=True)]})
        for host, target in zip(names, hosts, strict=True):
            self.host(host, target)
        return name

    def host(self, name: str, target: Mx | str) -> None:
        """Give a name its addresses."""
        addresses = (target if isinstance(target, str) else target.address).split()
        self.dns.set(
            name,
            {
                "A": [address for address in addresses if ":" not in address],
                "AAAA": [address for address in addresses if ":" in address],
            },
        )

    # -- short forms --------------------------------------------------------------------------------------------------

    def send(self, *recipients: str, content: bytes = MESSAGE, sender: str = SENDER) -> str:
        """Send one message through the relay; its queue id."""
        return self.site.send(sender, recipients, content, "relay")

    def reason(self, queue_id: str, recipient: int = 0) -> str:
        """Why a recipient is deferred, as mtaq has it: status, blank, text. Waits until the message is."""
        row = self.site.await_deferred(queue_id)["recipients"][recipient]
        return f"{row['status']} {row['delay_reason']}"

    def attempts(self, queue: Queue, queue_id: str) -> list[Attempt]:
        """The attempts in the history of a message."""
        return [event for event in self.site.history(queue, queue_id) if isinstance(event, Attempt)]

    def report(self, user: str = "alice", count: int = 1) -> Report:
        """Wait for reports to a user; the last of ``count``."""
        return Report(self.site.await_mail(user, count)[-1])

    def place(
        self,
        queue: Queue,
        *recipients: str,
        events: Sequence[Event] = (),
        arrival: float | None = None,
        due: float | None = None,
        sender: str = SENDER,
        content: bytes = MESSAGE,
    ) -> str:
        """Put a message into a queue directory behind the server's back, without a wake-up; its queue id.

        It is made elsewhere and moved there complete, with its history and its time.
        """
        Spool(str(self.site.spool_path), create=True).close()
        elsewhere = Spool(str(self.site.root / "elsewhere"), create=True)
        try:
            queue_id = elsewhere.ids.new()
            when = time.time() if arrival is None else arrival
            incoming = elsewhere.enter(Envelope(queue_id, when, sender, tuple(map(Recipient, recipients))))
            incoming.write(content)
            incoming.commit()
            for event in events:
                elsewhere.append(Queue.INCOMING, queue_id, event)
        finally:
            elsewhere.close()
        path = self.site.root / "elsewhere" / "incoming" / queue_id
        if due is not None:
            os.utime(path, (due, due))
        os.rename(path, self.site.spool_path / queue.value / queue_id)
        return queue_id


class Report:
    """A report of RFC 3464 taken apart, as stored in a Maildir."""

    def __init__(self, stored: bytes) -> None:
        """``stored`` is a message that must be one."""
        self.message = email.message_from_bytes(stored, policy=email.policy.default)
        assert self.message.get_content_type() == "multipart/report"
        assert self.message.get_param("report-type") == "delivery-status"
        text, status, original = self.message.iter_parts()
        self.text = text.get_content()
        self.original = original
        assert status.get_content_type() == "message/delivery-status"
        blocks = status.get_payload()
        assert isinstance(blocks, list)
        first, *rest = [block for block in blocks if isinstance(block, email.message.Message)]
        self.about_message = first
        self.recipients = rest

    @property
    def failed(self) -> dict[str, str]:
        """The status of each recipient."""
        return {block["Final-Recipient"].removeprefix("rfc822; "): block["Status"] for block in self.recipients}


def await_gone(world: World, queue_id: str) -> None:
    """Wait until a message is in no queue."""
    live = ("incoming", "active", "deferred")
    await_value(lambda: not any(queue_id in world.site.files(queue) for queue in live), what=f"{queue_id} is gone")
