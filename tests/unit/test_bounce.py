"""Reports about what failed: committed to the spool before the failures are marked, and about nothing else."""

from __future__ import annotations

import email
import email.message
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from mtad.config import Duration, Retry
from mtad.delivery.bounce import BounceTransport, original_header
from mtad.envelope import Envelope, Notify, Recipient
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.progress import Event, Reported
from mtad.spool.message import IncomingFile, OpenMessage
from mtad.spool.queues import Queue, Spool

CONTENT = b"From: a@sender.test\r\nSubject: hello\r\n\r\nbody that stays here\r\n"
NEVER = Failed("5.1.1", "host mx said: 550 5.1.1 no such user", "mx.far.test", "550 5.1.1 no such user")


class Bounces:
    """A spool with one message in active, and the transport."""

    def __init__(self, root: Path) -> None:
        self.spool = Spool(str(root / "spool"), create=True)
        self.retry = Retry(lifetime=Duration(1000), bounce_lifetime=Duration(1000))
        self.transport = BounceTransport(self.spool, "mx.example.org", "postmaster@example.org", self.retry)

    def message(
        self,
        *outcomes: Outcome,
        sender: str = "a@sender.test",
        content: bytes = CONTENT,
        age: float = 0.0,
        notify: tuple[Notify, ...] = (),
        **more: Any,
    ) -> OpenMessage:
        """A message to u0, u1 ... with these outcomes, open as a delivery has it."""
        recipients = tuple(Recipient(f"u{number}@far.test", notify) for number in range(len(outcomes)))
        envelope = Envelope(self.spool.ids.new(), time.time() - age, sender, recipients, **more)
        incoming = self.spool.enter(envelope)
        incoming.write(content)
        incoming.commit()
        self.spool.claim(Queue.INCOMING, envelope.id)
        attempt = Attempt(time.time(), tuple(enumerate(outcomes)))
        self.spool.append(Queue.ACTIVE, envelope.id, attempt)
        return self.spool.open(Queue.ACTIVE, envelope.id)

    def reports(self) -> list[tuple[Envelope, email.message.Message]]:
        found = []
        for name in self.spool.names(Queue.INCOMING):
            with self.spool.open(Queue.INCOMING, name) as opened:
                content = b"".join(opened.chunks())
                found.append((opened.message.envelope, email.message_from_bytes(content)))
        return found

    def events(self, message: OpenMessage) -> list[Event]:
        return list(self.spool.load(Queue.ACTIVE, message.message.envelope.id).events)


@pytest.fixture
def bounces(tmp_path: Path) -> Iterator[Bounces]:
    bounces = Bounces(tmp_path)
    yield bounces
    bounces.spool.close()


def fields(report: email.message.Message) -> list[email.message.Message]:
    """The blocks of the delivery-status part."""
    part = report.get_payload(1)
    assert isinstance(part, email.message.Message)
    payload = part.get_payload()
    assert isinstance(payload, list)
    return [block for block in payload if isinstance(block, email.message.Message)]


def test_one_report_about_all_that_failed(bounces: Bounces) -> None:
    with bounces.message(NEVER, Delivered("2.0.0", "sent"), NEVER) as message:
        [reported] = bounces.transport.report(message, (0, 2))
        [(envelope, report)] = bounces.reports()
        assert reported.recipients == (0, 2)
        assert bounces.events(message)[-1] == reported
    assert (envelope.id, envelope.sender, envelope.kind) == (reported.report, "", "bounce")
    assert [recipient.address for recipient in envelope.recipients] == ["a@sender.test"]
    assert report["To"] == "a@sender.test"
    assert [block["Final-Recipient"] for block in fields(report)[1:]] == ["rfc822; u0@far.test", "rfc822; u2@far.test"]
    assert "body that stays here" not in report.as_string()


def test_only_those_asked_for_are_reported(bounces: Bounces) -> None:
    with bounces.message(NEVER, NEVER) as message:
        [reported] = bounces.transport.report(message, (1,))
    assert reported.recipients == (1,)


def test_what_expired_is_reported_with_what_was_last_in_the_way(bounces: Bounces) -> None:
    later = Deferred("4.4.1", "connect to mx: refused")
    with bounces.message(later, age=2000) as message:
        [_] = bounces.transport.report(message, (0,))
    [(_, report)] = bounces.reports()
    block = fields(report)[1]
    assert block["Status"] == "4.4.7"
    assert "refused" in block["Diagnostic-Code"]


@pytest.mark.parametrize("outcome", [Delivered("2.0.0", "sent"), Deferred("4.2.0", "busy")])
def test_where_nothing_failed_there_is_no_report(bounces: Bounces, outcome: Outcome) -> None:
    with bounces.message(outcome) as message:
        assert bounces.transport.report(message, (0,)) == []
    assert bounces.reports() == []


def test_a_report_about_recipients_that_did_not_fail_is_not_made(bounces: Bounces) -> None:
    """A failure that could not be written down must not be marked as reported."""
    with bounces.message(NEVER, Deferred("4.2.0", "busy")) as message:
        assert bounces.transport.report(message, (1,)) == []
        assert not any(isinstance(event, Reported) for event in bounces.events(message))
    assert bounces.reports() == []


def test_what_nobody_sent_is_reported_to_postmaster(bounces: Bounces) -> None:
    with bounces.message(NEVER, sender="") as message:
        assert bounces.transport.report(message, (0,))
    [(envelope, _)] = bounces.reports()
    assert (envelope.kind, envelope.sender) == ("double-bounce", "")
    assert [recipient.address for recipient in envelope.recipients] == ["postmaster@example.org"]


@pytest.mark.parametrize("step", ["write", "commit"])
def test_a_report_that_cannot_be_stored_marks_nothing(bounces: Bounces, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with bounces.message(NEVER) as message:
        with monkeypatch.context() as patch:
            if step == "commit":
                patch.setattr(os, "fsync", refuse)
            else:
                patch.setattr(IncomingFile, "write", refuse)
            with pytest.raises(OSError, match="No space"):
                bounces.transport.report(message, (0,))
        assert bounces.reports() == []
        assert not any(isinstance(event, Reported) for event in bounces.events(message))
        assert bounces.transport.report(message, (0,))


def test_the_report_is_committed_before_the_failure_is_marked(bounces: Bounces, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    append = OpenMessage.append

    def look(self: OpenMessage, *events: Event, durable: bool = False) -> None:
        seen.append(len(bounces.reports()))
        assert durable
        append(self, *events, durable=durable)

    with bounces.message(NEVER) as message:
        monkeypatch.setattr(OpenMessage, "append", look)
        bounces.transport.report(message, (0,))
    assert seen == [1]


@pytest.mark.parametrize(
    ("content", "header"),
    [
        (b"A: b\r\n\r\nbody", b"A: b\r\n"),
        (b"A: b\r\nC: d\r\n\r\n", b"A: b\r\nC: d\r\n"),
        (b"no end", b"no end"),
        (b"", b""),
        (b"X: " + b"y" * 70_000 + b"\r\n\r\nbody", b"X: " + b"y" * 70_000 + b"\r\n"),
        (b"X: " + b"y" * 65_530 + b"\r\n\r\nbody", b"X: " + b"y" * 65_530 + b"\r\n"),
        (b"z" * 400_000, b"z" * 262_144),
    ],
    ids=["simple", "two fields", "no end", "empty", "beyond a chunk", "at the cut", "endless"],
)
def test_the_header_is_what_stands_before_the_first_empty_line(bounces: Bounces, content: bytes, header: bytes) -> None:
    with bounces.message(NEVER, content=content) as message:
        assert original_header(message) == header


@pytest.mark.parametrize("cut", range(1, 12))
def test_the_end_of_the_header_is_found_wherever_the_chunks_are_cut(cut: int) -> None:
    class Cut:
        def chunks(self) -> list[bytes]:
            text = b"A: b\r\n\r\nbody"
            return [text[:cut], *(bytes((octet,)) for octet in text[cut:])]

    assert original_header(Cut()) == b"A: b\r\n"  # type: ignore[arg-type]


def test_the_postmaster_of_a_double_bounce_can_be_any_address(tmp_path: Path) -> None:
    bounces = Bounces(tmp_path)
    retry = msgspec.structs.replace(bounces.retry, lifetime=Duration(5))
    transport = BounceTransport(bounces.spool, "mx.example.org", "postmaster@mx.example.org", retry)
    with bounces.message(NEVER, sender="") as message:
        transport.report(message, (0,))
    [(envelope, _)] = bounces.reports()
    assert envelope.recipients[0].address == "postmaster@mx.example.org"


def wishing(*notify: Notify, ret: Literal["", "full", "hdrs"] = "") -> dict[str, Any]:
    return {"notify": notify, "ret": ret, "envid": "QQ1"}


def test_a_success_is_told_when_asked_for(bounces: Bounces) -> None:
    with bounces.message(Delivered("2.0.0", "delivered to maildir"), **wishing("success")) as message:
        [reported] = bounces.transport.report(message, (0,))
        assert reported.kind == "success"
        assert bounces.spool.load(Queue.ACTIVE, message.message.envelope.id).states[0].announced
        with bounces.spool.open(Queue.ACTIVE, message.message.envelope.id) as again:
            assert bounces.transport.report(again, (0,)) == [], "but once"
    [(_, report)] = bounces.reports()
    assert fields(report)[0]["Original-Envelope-Id"] == "QQ1"
    assert fields(report)[1]["Action"] == "delivered"


def test_a_failure_of_which_the_sender_does_not_want_to_hear_is_marked_and_not_told(bounces: Bounces) -> None:
    wishes: tuple[Notify, ...] = ("never", "success", "delay")
    for wish in wishes:
        with bounces.message(NEVER, **wishing(wish)) as message:
            [reported] = bounces.transport.report(message, (0,))
            assert (reported.report, reported.recipients) == ("", (0,))
            assert bounces.spool.load(Queue.ACTIVE, message.message.envelope.id).states[0].settled
    assert bounces.reports() == []


def test_a_delay_is_told_once(bounces: Bounces) -> None:
    bounces.transport = BounceTransport(
        bounces.spool, "mx.example.org", "postmaster@example.org", msgspec.structs.replace(bounces.retry, warn_after=100.0)
    )
    with bounces.message(Deferred("4.4.1", "connect to mx: refused"), age=500) as message:
        [reported] = bounces.transport.report(message, (0,))
        assert reported.kind == "delay"
    [(_, report)] = bounces.reports()
    assert fields(report)[1]["Action"] == "delayed"
    assert "Will-Retry-Until" in fields(report)[1]


def test_the_whole_message_comes_back_when_asked_for(bounces: Bounces) -> None:
    with bounces.message(NEVER, **wishing("failure", ret="full")) as message:
        bounces.transport.report(message, (0,))
    [(_, report)] = bounces.reports()
    assert "body that stays here" in report.as_string()


def test_the_age_of_a_message_is_what_the_scheduler_says(bounces: Bounces) -> None:
    """After a leap of the clock: what is not old is not expired, and its sender hears of a delay, if of anything."""
    retry = msgspec.structs.replace(bounces.retry, warn_after=Duration(100))
    bounces.transport = BounceTransport(bounces.spool, "mx.example.org", "postmaster@example.org", retry)
    with bounces.message(Deferred("4.2.0", "later"), age=600_000) as message:
        [reported] = bounces.transport.report(message, (0,), arrival=time.time() - 200)
    assert reported.kind == "delay"
    [(_, report)] = bounces.reports()
    assert "Will-Retry-Until" in report.as_string()
