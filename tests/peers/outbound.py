"""A small world to deliver to: a DNS, exchangers that share a port, and an SMTP transport in front of them.

    with ExitStack() as stack:
        site = Site(stack)
        mx = site.mx("127.0.0.5")
        site.domain("127.0.0.5", "127.0.0.6")
        outcomes = site.send("b@x.test", "c@x.test")

The transport is the real one, and so are the sockets; everything is closed with the stack.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import msgspec

from mtad.config import Delivery, Duration
from mtad.delivery.smtp import SmtpTransport
from mtad.delivery.transport import Task, Transport
from mtad.envelope import Envelope, Recipient
from mtad.nexthop import Rules
from mtad.outcome import Attempt, Outcome
from mtad.resolver import Resolver
from mtad.routing import Router
from tests.peers.dns import DnsServer
from tests.peers.mx import Mx, Script, free_port

ADDRESSES = ("127.0.0.5", "127.0.0.6", "127.0.0.7", "::1")
BODY = b"Subject: test\r\n\r\n.leading dot\r\nhello\r\n"
SHORT = 0.6


class Bytes:
    """Content that is held in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def chunks(self) -> Iterator[bytes]:
        for first in range(0, len(self._data), 65536):
            yield self._data[first : first + 65536]


class Site:
    """A DNS, exchangers that share a port, and a transport that delivers to them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.dns = stack.enter_context(DnsServer())
        self.port = free_port(ADDRESSES)
        self.doubts: list[str] = []
        self.on_doubt: Callable[[], object] = lambda: None
        self.settings = Delivery(port=self.port)
        self.transport = self.make()

    def make(self, next_hop: str = "", **settings: object) -> SmtpTransport:
        """A transport of its own; all time-outs short if ``short``."""
        if settings.pop("short", False):
            settings |= {name: Duration(SHORT) for name in Delivery.__struct_fields__ if name.endswith("_timeout")}
        self.settings = msgspec.structs.replace(self.settings, **settings)
        self.settings = msgspec.structs.replace(self.settings, next_hop=next_hop)
        router = Router(Resolver([self.dns.address], 1.0), "me.test", Rules(self.settings))
        self.transport = SmtpTransport("me.test", self.settings, router)
        self._stack.callback(self.transport.close)
        return self.transport

    def mx(
        self,
        address: str = "127.0.0.5",
        script: Script | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        implicit: bool = False,
        logins: Mapping[str, str] | None = None,
    ) -> Mx:
        mx = Mx(address, self.port, script, tls=tls, implicit=implicit, logins=logins)
        return self._stack.enter_context(mx)

    def domain(self, *hosts: str, name: str = "x.test") -> None:
        """A domain with these MX, best first; a host may have several addresses, separated by blanks."""
        self.dns.set(name, {"MX": [f"{number} mx{number}.{name}." for number, _ in enumerate(hosts, 1)]})
        for number, text in enumerate(hosts, 1):
            addresses = text.split()
            self.dns.set(
                f"mx{number}.{name}",
                {
                    "A": [address for address in addresses if ":" not in address],
                    "AAAA": [address for address in addresses if ":" in address],
                },
            )

    def send(
        self,
        *recipients: str | Recipient,
        body: bytes = BODY,
        sender: str = "a@me.test",
        domain: str = "x.test",
        declared: str = "",
        **envelope: object,
    ) -> dict[str, Outcome]:
        """Deliver one message and return the last outcome of each recipient.

        ``declared`` is BODY= of the envelope, ``envelope`` more fields of it.
        """
        whole = [Recipient(one) if isinstance(one, str) else one for one in recipients or ("b@x.test",)]
        message = Envelope("Q1", 0.0, sender, tuple(whole))
        self.attempts = self.deliver(msgspec.structs.replace(message, body=declared, **envelope), body, domain)
        names = [one.address for one in whole]
        return {names[index]: outcome for attempt in self.attempts for index, outcome in attempt.outcomes}

    def deliver(self, envelope: Envelope, body: bytes, domain: str) -> Sequence[Attempt]:
        task = Task(envelope, tuple(range(len(envelope.recipients))), domain)
        transport: Transport = self.transport
        return transport.deliver(task, Bytes(body), self.doubt)

    def doubt(self, host: str) -> None:
        self.doubts.append(host)
        self.on_doubt()


def only(outcomes: dict[str, Outcome]) -> Outcome:
    """The outcome of the one recipient there is."""
    (outcome,) = outcomes.values()
    return outcome
