"""Dialogues that are cut at one point: what a case of the sweep ``network`` does, and what it looks for at once.

In the role of a server mtad listens to a client of ours that comes through a `tools.lib.network_proxy.Proxy`; in the role
of a client it delivers to an exchanger behind one. Each case has a proxy, and an address or a domain, of its own, so that
many can be waited for at a time and the log tells them apart.

A case looks at this: the harm is done; the session, or the attempt, is over within the deadline and an allowance; who got
no 250 is served at once when it comes again; what was deferred is delivered the next time.
"""

from __future__ import annotations

import re
import smtplib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from tests.client import Client
from tests.e2e.tls_site import TlsClient
from tests.site import DOMAIN, await_value
from tools.lib.crash_verdict import Sent
from tools.lib.network_proxy import HARMS, Harm, Place, Point, Proxy, Role
from tools.lib.network_world import USERS, NetworkWorld

#: The dialogues of each role.
DIALOGUES: Final[dict[Role, Sequence[str]]] = {
    "server": ("step by step", "pipelined", "chunks", "TLS"),
    "client": ("step by step", "pipelined", "chunks", "second", "TLS"),
}
#: Octets that no buffers take that are not read from.
_BIG: Final = 8_000_000
_SMALL: Final = 300
#: Seconds for what has nothing to do with a deadline; generous, for a busy machine.
_PATIENCE: Final = 30.0

_END: Final = re.compile(r"(dot|last chunk)( \d+)?")
_END_REPLY: Final = re.compile(r"reply to (dot|last chunk)( \d+)?")


class Case(msgspec.Struct, frozen=True):
    """One dialogue and one harm. ``number`` is from 1 on, and nobody else's."""

    number: int
    role: Role
    dialogue: str
    harm: Harm
    point: Point

    def __str__(self) -> str:
        return f"case {self.number}: {self.role}, {self.dialogue}, {self.harm} {self.point}"

    @property
    def uncertain(self) -> bool:
        """Whether one side may have taken the message, and the other not know it."""
        event, place = self.point
        if "record" in event:
            return True  # who knows what is in it: what is twice must be named, just the same
        if _END.fullmatch(event):
            return place == "after"
        # A reset may overtake a reply in the buffers of who gets it.
        return _END_REPLY.fullmatch(event) is not None and (place != "after" or self.harm == "reset")


class Ending(msgspec.Struct, frozen=True):
    """How a case ended; ``late`` in seconds after the harm."""

    case: Case
    faults: tuple[str, ...] = ()
    late: float = 0.0
    again: bool = False
    """Whether it took another session to get the message through."""


def points(events: Sequence[str], role: Role, dialogue: str) -> list[Point]:
    """All points of a dialogue of which the events are known."""
    if role == "client" and dialogue == "second":
        # The first message is in the other dialogues.
        events = events[events.index("reply to dot") + 1 :]
    places: tuple[Place, ...] = ("before", "within", "after")
    return [Point(event, place) for event in dict.fromkeys(events) for place in places]


class CutDialogues:
    """Cases before a `NetworkWorld`. Thread-safe."""

    def __init__(self, world: NetworkWorld, allowance: float, *, hasty: bool = False) -> None:
        """``allowance``: seconds after a deadline; ``hasty`` clients take their own dot for a 250, which is the control."""
        self._world = world
        self.allowance = allowance
        self._hasty = hasty

    def events(self, number: int, role: Role, dialogue: str) -> list[str]:
        """The events of a dialogue without harm, of which ``number`` is the case.

        Raises:
            AssertionError: it did not come to its end.
        """
        case = Case(number, role, dialogue, "reset", Point("", "before"))
        if role == "server":
            with self._proxy_of_server(case, None) as proxy:
                assert self._visit(case, proxy), f"no 250: {proxy.events}"
                await_value(proxy.over, _PATIENCE, "the connection is done")
                return _whole(proxy.events)
        with self._proxy_of_client(case, None) as proxy:
            self._deliver(case)
            await_value(proxy.over, _PATIENCE, "the connection has been idle for too long")
            return _whole(proxy.events)

    def run(self, case: Case) -> Ending:
        """Do it; what went wrong is in the ending."""
        try:
            return self._as_server(case) if case.role == "server" else self._as_client(case)
        except (AssertionError, OSError, smtplib.SMTPException) as fault:
            return Ending(case, (f"{case}: {type(fault).__name__}: {fault}",))

    # -- mtad is the server -------------------------------------------------------------------------------------------

    def _proxy_of_server(self, case: Case, point: Point | None) -> Proxy:
        here, there = ("127.0.0.1", 0), self._world.relay
        return Proxy(here, there, "server", point, case.harm, self._world.source(case.number))

    def _as_server(self, case: Case) -> Ending:
        faults: list[str] = []
        heard: list[str] = []
        with self._proxy_of_server(case, case.point) as proxy:
            visitor = threading.Thread(target=lambda: heard.append(self._visit(case, proxy)), daemon=True)
            visitor.start()
            late = self._await_end(case, proxy, self._world.source(case.number), faults)
            proxy.release.set()
            visitor.join(_PATIENCE)
            if not heard:
                faults.append(f"{case}: its client is still there")
        queue_id = heard[0] if heard else ""
        if not queue_id:
            self._come_again(case, faults)
        return Ending(case, tuple(faults), late, not queue_id)

    def _visit(self, case: Case, proxy: Proxy) -> str:
        """Be the client; the queue id if there was a 250, or else ""."""
        recipients = [f"{user}@{DOMAIN}" for user in USERS]
        size = _SMALL if case.dialogue == "TLS" else 0
        message, content = self._world.compose(f"c{case.number}-1", recipients, size)
        self._world.ledger.note(message)
        queue_id = ""
        try:
            with TlsClient(proxy.address, timeout=_PATIENCE) as client:
                queue_id = self._converse(case, client, message, content)
        except (OSError, EOFError):
            pass  # that is what happens to it here
        # What mtad said it has said, also when a network kept it to itself.
        known = queue_id or _queue_id(proxy.acknowledged)
        if known:
            self._world.ledger.note(msgspec.structs.replace(message, queue_id=known))
        return queue_id

    def _converse(self, case: Case, client: TlsClient, message: Sent, content: bytes) -> str:
        envelope = [f"MAIL FROM:<{message.sender}>", *(f"RCPT TO:<{name}>" for name in message.recipients)]
        said = client.reply() and client.say("EHLO client.test")
        if case.dialogue == "TLS":
            said = said and client.say("STARTTLS") and client.secure().say("EHLO client.test")
        if case.dialogue == "pipelined":
            client.send("".join(f"{line}\r\n" for line in [*envelope, "DATA"]).encode())
            for _ in range(len(envelope) + 1):
                said = said and client.reply()
        else:
            for line in envelope if case.dialogue == "chunks" else [*envelope, "DATA"]:
                said = said and client.say(line)
        if not said:
            return ""
        answer = self._finish(case, client, message, content)
        queue_id = _queue_id(answer)
        if answer:
            with suppress(OSError):
                client.say("QUIT")
                client.closed()  # to the very end, so that there is always as much to be cut
        return queue_id

    def _finish(self, case: Case, client: Client, message: Sent, content: bytes) -> str:
        """Send the content, and await the answer."""
        if case.dialogue == "chunks":
            half = len(content) // 2
            client.send(b"BDAT %d\r\n%s" % (half, content[:half]))
            if not client.reply():
                return ""
            client.send(b"BDAT %d LAST\r\n%s" % (len(content) - half, content[half:]))
        else:
            client.send(content.replace(b"\r\n.", b"\r\n.."))
            client.send(b".\r\n")
        if self._hasty:
            self._world.ledger.note(msgspec.structs.replace(message, queue_id="hasty"))
        return client.reply()

    def _come_again(self, case: Case, faults: list[str]) -> None:
        """Who got no 250 sends the message again, as another one to the ledger, and is served."""
        message, content = self._world.compose(f"c{case.number}-2", [f"{USERS[0]}@{DOMAIN}"])
        began = time.monotonic()
        try:
            self._send(message, content)
        except (AssertionError, OSError, smtplib.SMTPException) as fault:
            faults.append(f"{case}: refused when it came again: {fault!r}")
        if (took := time.monotonic() - began) > self._world.deadline + self.allowance:
            faults.append(f"{case}: served only after {took:.1f} s when it came again")

    def _send(self, message: Sent, content: bytes) -> None:
        self._world.ledger.note(message)
        with smtplib.SMTP(*self._world.relay, local_hostname="client.test", timeout=_PATIENCE) as client:
            client.ehlo()
            client.mail(message.sender)
            for recipient in message.recipients:
                client.rcpt(recipient)
            code, text = client.data(content)
        assert code == 250, (code, text)
        self._world.ledger.note(msgspec.structs.replace(message, queue_id=text.decode().rpartition(" ")[2]))

    # -- mtad is the client -------------------------------------------------------------------------------------------

    def _proxy_of_client(self, case: Case, point: Point | None) -> Proxy:
        exchanger = self._world.exchangers[case.dialogue]
        _, here = self._world.exchange(case.number)
        return Proxy(here, (exchanger.address, exchanger.port), "client", point, case.harm)

    def _as_client(self, case: Case) -> Ending:
        faults: list[str] = []
        with self._proxy_of_client(case, case.point) as proxy:
            recipients = self._deliver(case)
            late = self._await_end(case, proxy, f"tried {recipients[0]}", faults)
            proxy.release.set()
            for recipient in recipients:
                if self._world.log.when(f"sent {recipient}", _PATIENCE) is None:
                    faults.append(f"{case}: {recipient} did not get it afterwards")
            again = proxy.connections > 1
        return Ending(case, tuple(faults), late, again)

    def _deliver(self, case: Case) -> Sequence[str]:
        """Give mtad what it is to deliver; the recipients of the message that matters."""
        domain, _ = self._world.exchange(case.number)
        event, place = case.point
        # The content that nobody reads is to be more than any buffer takes.
        big = case.harm == "zero window" and place != "after" and re.match(r"content|last chunk", event) is not None
        recipients: list[str] = []
        for number in (1, 2) if case.dialogue == "second" else (1,):
            name = f"c{case.number}-{number}"
            recipients = [f"{user}-{name}@{domain}" for user in USERS]
            # In TLS a small one, so that its records are as many each time.
            size = _BIG if big else _SMALL if case.dialogue == "TLS" else 0
            message, content = self._world.compose(name, recipients, size)
            self._send(message, content)
            if case.dialogue == "second" and number == 1:
                # The next one goes over the same connection only while that is kept.
                assert self._world.log.when(f"sent {recipients[-1]}", _PATIENCE), "the first message did not get through"
        return recipients

    # -- both ---------------------------------------------------------------------------------------------------------

    def _await_end(self, case: Case, proxy: Proxy, what: str, faults: list[str]) -> float:
        """Wait until the point was reached, and then until the log has ``what``; seconds after the harm."""
        if not proxy.reached.wait(_PATIENCE):
            faults.append(f"{case}: never got there: {proxy.events}")
            return 0.0
        while True:
            limit = proxy.harmed_at + self._world.deadline + self.allowance
            ended = self._world.log.when(what, 0.1)
            if ended is not None:
                return max(0.0, ended - proxy.harmed_at)
            if time.monotonic() > limit:
                faults.append(f"{case}: held past its deadline")
                return time.monotonic() - proxy.harmed_at


def every_case(
    first: int, wanted: Mapping[Role, Sequence[str]], events: Callable[[Role, str], Sequence[str]]
) -> list[Case]:
    """Each harm at each point of each wanted dialogue, numbered from ``first`` on."""
    found: list[Case] = []
    for role, dialogues in wanted.items():
        for dialogue in dialogues:
            for point in points(events(role, dialogue), role, dialogue):
                for harm in HARMS:
                    found.append(Case(first + len(found), role, dialogue, harm, point))
    return found


def _whole(events: Sequence[str]) -> list[str]:
    """The events of a dialogue that came to its end."""
    assert events[-1:] == ["reply to QUIT"] or "server record" in events, events
    return list(events)


def _queue_id(answer: str) -> str:
    return answer.rpartition(" ")[2] if answer.startswith("250") else ""
