"""What the tests of the causes share: a message, what may be known of it, and how an answer is looked at."""

from __future__ import annotations

import json
import os
import select
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
from click.testing import CliRunner, Result

from mtad.cli.mtaq import main
from mtad.config import Retry
from mtad.desk import (
    DESK_SOCKET,
    Answer,
    AskLanes,
    AskMessages,
    JobView,
    Lanes,
    LaneView,
    Messages,
    MessageView,
    Question,
    encoder,
    question_decoder,
)
from mtad.envelope import Envelope, Recipient
from mtad.net.desk import Desk
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.progress import Event, replay
from mtad.queue_causes import Cause, CauseName, Facts
from mtad.queue_deferrals import causes
from mtad.spool.queue_file import encode_envelope, encode_event, encode_preamble
from mtad.spool.queue_id import encode
from mtad.spool.queues import Queue, Spool

ID = "4BzR5k2jL0z9"
NOW = 1_700_000_000.0
HOUR = 3600.0
LATER = Deferred("4.2.1", "host mx.y.test[192.0.2.1] said: 450 4.2.1 Busy", "mx.y.test", "450 4.2.1 Busy")
GONE = Failed("5.1.1", "host mx.y.test[192.0.2.1] said: 550 5.1.1 No such user", "mx.y.test", "550 5.1.1 No such user")
SENT = Delivered("2.0.0", "250 ok", "mx.y.test", "250 ok")
LANE = LaneView("smtp", "y.test", waiting=13, in_flight=5, window=20, limit=20)
SUSPENDED = LaneView(
    "smtp",
    "y.test",
    waiting=0,
    in_flight=0,
    window=0,
    limit=20,
    suspended_since=NOW - 720,
    suspended_until=NOW + 48,
    reason="host mx.y.test[192.0.2.1] refused to talk to me: 421 4.3.2 No",
    reply="421 4.3.2 No",
)


def tried(*outcomes: Outcome, at: float = NOW - 60, host: str = "mx.y.test", address: str = "192.0.2.1:25") -> Attempt:
    """An attempt that brought these outcomes, for recipients 0, 1, ..."""
    return Attempt(at, tuple(enumerate(outcomes)), host, address)


def facts(*events: Event, recipients: Sequence[str] = ("b@y.test",), **more: Any) -> Facts:
    """A deferred message of an hour ago that is due in five minutes, unless told otherwise."""
    envelope = Envelope(ID, NOW - HOUR, "a@x.test", tuple(map(Recipient, recipients)))
    given: dict[str, Any] = {
        "queue": "deferred",
        "envelope": envelope,
        "states": replay(len(envelope.recipients), events),
        "events": events,
        "now": NOW,
        "scheduler": "running",
        "due": NOW + 300,
        "view": MessageView(ID, known=False, due=NOW + 300),
        "retry": Retry(),
        "spool": "/spool",
        "scheduler_pid": 4711,
    }
    return Facts(**given | more)


def only(one: Facts) -> Cause:
    """The answer for the only recipient."""
    [cause] = causes(one)
    return cause


def in_hand(*jobs: JobView, **more: Any) -> dict[str, Any]:
    """What is known of a message in these jobs."""
    return {"queue": "active", "view": MessageView(ID, known=True, jobs=jobs, **more)}


def waits(lane: LaneView = LANE, ahead: int = 12, **more: Any) -> JobView:
    """A job in a lane."""
    return JobView((0,), lane, "waiting", NOW - 30, ahead=ahead, **more)


def commands(cause: Cause) -> list[str]:
    """What can be typed."""
    return [advice.command for advice in cause.advice]


def check(cause: Cause, name: CauseName, text: str, *typed: str) -> None:
    """The cause, its sentence, and what can be typed."""
    assert (cause.cause, cause.text, commands(cause)) == (name, text, list(typed))


class Clerk:
    """A scheduler that only answers: it holds the lock of a spool and has a real desk there; a context manager."""

    def __init__(self, spool: Spool, messages: Sequence[MessageView] = (), lanes: Lanes | None = None) -> None:
        self.asked: list[Question] = []
        self._messages = {view.id: view for view in messages}
        self._lanes = lanes or Lanes((), 0, 0, 0, 0, 0, 0)
        self._spool = spool
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._lock = self._spool.lock()
        self._desk = Desk(os.path.join(self._spool.root, DESK_SOCKET))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._desk.close()
        os.close(self._lock)

    def _work(self) -> None:
        while not self._over.is_set():
            if select.select([self._desk], [], [], 0.01)[0]:
                self._desk.serve(self._answer)

    def _answer(self, data: bytes) -> bytes:
        question = question_decoder.decode(data)
        self.asked.append(question)
        answer: Answer = self._lanes
        if isinstance(question, AskMessages):
            answer = Messages(tuple(self._messages.get(one) or MessageView(one, known=False) for one in question.ids))
        elif isinstance(question, AskLanes) and question.destinations:
            chosen = tuple(lane for lane in self._lanes.lanes if lane.destination in question.destinations)
            answer = msgspec.structs.replace(self._lanes, lanes=chosen)
        return encoder.encode(answer)


class Stock:
    """A spool with messages in it, and a configuration for the commands."""

    def __init__(self, root: Path) -> None:
        self.path = root / "spool"
        self.spool = Spool(str(self.path), create=True)
        self.config = root / "mtad.toml"
        self.config.write_text(
            f'hostname = "mx.x.test"\nspool = "{self.path}"\n[local]\ndomains = ["here.test"]\n[retry]\nlifetime = "2h"\n'
        )
        self._count = 0

    def put(
        self,
        queue: Queue,
        recipients: Sequence[str],
        *events: Event,
        content: bytes = b"Subject: x\r\n\r\nhello\r\n",
        due: float = 0.0,
        **more: Any,
    ) -> str:
        """A message that arrived an hour ago; its queue id. ``more`` is for its envelope."""
        self._count += 1
        queue_id = encode(1_600_000_000_000_000 + self._count, 7)
        given: dict[str, Any] = {"arrival": time.time() - HOUR, "sender": "a@x.test"}
        envelope = Envelope(queue_id, recipients=tuple(map(Recipient, recipients)), **given | more)
        encoded = encode_envelope(envelope)
        data = encode_preamble(encoded, len(content), zlib.crc32(content)) + encoded + b"\n" + content
        path = self.path / queue.value / queue_id
        path.write_bytes(data + b"".join(map(encode_event, events)))
        if due:
            os.utime(path, (due, due))
        return queue_id

    def run(self, *arguments: str, code: int = 0) -> Result:
        """``mtaq`` with these arguments."""
        result = CliRunner().invoke(main, [*arguments, "-c", str(self.config)])
        assert result.exit_code == code, result.output
        return result

    def json(self, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
        """What it prints with ``--json``."""
        return [json.loads(line) for line in self.run(*arguments, "--json", code=code).stdout.splitlines()]
