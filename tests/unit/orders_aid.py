"""What the tests of mtaq's orders and filters share: a spool with messages in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from mtad.cli.mtaq import main
from mtad.cli.queue_filter import fitting, make_filter
from mtad.envelope import Envelope, Kind, Recipient
from mtad.outcome import Attempt, Deferred, Outcome
from mtad.progress import Event
from mtad.spool.queue_id import encode
from mtad.spool.queues import LIVE, Queue, Spool

NOW = 1_700_100_000.0
GONE = encode(1_600_000_000_000_000, 7)
BUSY = Deferred("4.2.0", "host mx.y.test[192.0.2.1] said: 450 4.2.0 The Mailbox is busy", "mx.y.test")


class Stock:
    """A spool, its messages, and a configuration that names it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spool = Spool(str(root / "spool"), create=True)
        self.config = root / "mtad.toml"
        self.config.write_text(f'hostname = "mx.example.org"\nspool = "{root}/spool"\n')
        self._ids = 0

    def put(
        self,
        *recipients: str,
        queue: Queue = Queue.DEFERRED,
        sender: str = "a@x.test",
        age: float = 60.0,
        outcomes: tuple[Outcome, ...] = (),
        events: tuple[Event, ...] = (),
        kind: Kind = "mail",
    ) -> str:
        """A message; its queue id."""
        self._ids += 1
        queue_id = encode(1_700_000_000_000_000 + self._ids, 7)
        names = tuple(map(Recipient, recipients or ("b@y.test",)))
        incoming = self.spool.enter(Envelope(queue_id, NOW - age, sender, names, kind=kind))
        incoming.write(b"x")
        incoming.commit()
        os.rename(self.path(Queue.INCOMING, queue_id), self.path(queue, queue_id))
        for event in (Attempt(1.0, tuple(enumerate(outcomes))), *events):
            self.spool.append(queue, queue_id, event)
        return queue_id

    def path(self, queue: Queue, queue_id: str) -> Path:
        return self.root / "spool" / queue.value / queue_id

    def where(self, queue_id: str) -> list[str]:
        return [queue.value for queue in Queue if self.path(queue, queue_id).exists()]

    def chosen(self, **filters: Any) -> list[str]:
        """The messages that options choose."""
        given = {"domain": None, "sender": None, "reason": None, "older_than": None} | filters
        return list(fitting(self.spool, LIVE, make_filter(**given), NOW))

    def run(self, *arguments: str, **more: Any) -> Result:
        return CliRunner().invoke(main, ["-c", str(self.config), *arguments], **more)

    def json(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        run = self.run(*arguments, "--json")
        assert run.exit_code == code, run.output
        answer: dict[str, Any] = json.loads(run.stdout)
        return answer
