"""What the tests of the delivery process share: a worker, its spool, and its channel's other end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mtad.config import Config, Delivery, Local, Retry
from mtad.delivery.jobs import ALIVE, Job, Result, job_encoder, result_decoder
from mtad.delivery.process import Worker
from mtad.delivery.transport import Content, Task
from mtad.envelope import Envelope, Recipient
from mtad.net.channels import MAX_PACKET, Lifeline, Mailslot, PacketSocket, WakePipe, packet_pair
from mtad.occupancy import Occupancy
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.progress import Event
from mtad.runtime import Runtime
from mtad.spool.queues import Queue, Spool
from mtad.users import Users

SENT = Delivered("2.0.0", "sent")
NEVER = Failed("5.1.1", "no such user")
LATER = Deferred("4.2.0", "busy")
#: For a message that a broken transport raises.
BROKEN = "on purpose"

_RETRY = Retry()

Deliver = Callable[[Task, Content, Callable[[str], None]], Sequence[Attempt]]


class Scripted:
    """A transport that does what the test says."""

    def __init__(self, deliver: Deliver) -> None:
        self.deliver = deliver


def giving(*outcomes: Outcome) -> Deliver:
    """A delivery with one outcome for each recipient of the task, or one for all."""

    def deliver(task: Task, _content: Content, in_doubt: Callable[[str], None]) -> list[Attempt]:
        in_doubt("mx.far.test")
        given = outcomes * len(task.recipients) if len(outcomes) == 1 else outcomes
        return [Attempt(1.0, tuple(zip(task.recipients, given, strict=True)), host="mx.far.test")]

    return deliver


def broken(*_: object) -> list[Attempt]:
    raise RuntimeError(BROKEN)


class World:
    """A spool, a worker, and the scheduler's end of its channel."""

    def __init__(self, root: Path, retry: Retry = _RETRY) -> None:
        users = root / "users"
        users.write_text("alice : alice@example.org\n")
        local = Local(domains=("example.org",), mail_root=str(root / "mail"), users=str(users))
        config = Config(
            hostname="mx.example.org", spool=str(root / "spool"), local=local, delivery=Delivery(port=9), retry=retry
        )
        self.spool = Spool(config.spool, create=True)
        runtime = Runtime(
            config=config,
            users=Users.load(str(users), local.domains, "alice"),
            sockets=(),
            occupancy=Occupancy(b"x" * 16),
            lifeline=Lifeline(),
            wake=WakePipe(),
            mailslot=Mailslot(str(root / "slot")),
        )
        self.runtime = runtime
        self.mail = root / "mail"
        self.channel, theirs = packet_pair()
        self.channel.settimeout(10)
        self.theirs: PacketSocket = theirs
        self.worker = Worker(runtime, theirs)
        self.script(giving(SENT))

    def close(self) -> None:
        for end in (self.channel, self.theirs, self.runtime.mailslot, self.spool, self.worker._spool):
            end.close()
        self.runtime.lifeline.hold()
        os.close(self.runtime.lifeline.fileno())
        os.close(self.runtime.wake.fileno())
        os.close(self.runtime.wake._write)

    def script(self, deliver: Deliver) -> None:
        """What the transport "smtp" does from now on."""
        self.worker._transports["smtp"] = Scripted(deliver)

    def message(self, *recipients: str, content: bytes = b"Subject: x\r\n\r\nhello\r\n") -> str:
        """A message in active; its queue id."""
        names = recipients or ("b@far.test",)
        envelope = Envelope(self.spool.ids.new(), time.time(), "a@sender.test", tuple(map(Recipient, names)))
        incoming = self.spool.enter(envelope)
        incoming.write(content)
        incoming.commit()
        self.spool.claim(Queue.INCOMING, envelope.id)
        return envelope.id

    def work(self, queue_id: str, *recipients: int, transport: str = "smtp") -> Result:
        result = self.worker.work(Job(7, queue_id, transport, "far.test", recipients or (0,)))  # type: ignore[arg-type]
        assert result is not None
        assert result.number == 7
        return result

    def events(self, queue_id: str) -> list[Event]:
        return list(self.spool.load(Queue.ACTIVE, queue_id).events)

    def send(self, queue_id: str, number: int = 1, transport: str = "smtp") -> None:
        self.channel.send(job_encoder.encode(Job(number, queue_id, transport, "far.test", (0,))))  # type: ignore[arg-type]

    def hear(self) -> Result:
        """The next result; signs of life are passed over."""
        while (packet := self.channel.recv(MAX_PACKET)) == ALIVE:
            pass
        assert packet, "the worker is gone"
        return result_decoder.decode(packet)
