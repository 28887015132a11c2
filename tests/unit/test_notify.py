"""What a sender may ask to be told (RFC 3461), and what it is told about delays: the decision and the documents."""

from __future__ import annotations

import email
import email.policy
from dataclasses import dataclass
from email.message import EmailMessage
from typing import cast

import pytest
from msgspec.structs import replace

from mtad.config import DAY, HOUR, Duration, Retry
from mtad.dsn import report
from mtad.envelope import Envelope, Notify, Recipient
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.progress import Event, RecipientState, Reported, replay
from mtad.retry import Bounce, Decision, Done, RetryAt, settle, wants

NOW = 1_700_000_000.0
RETRY = Retry()
WARNING = Retry(warn_after=Duration(4 * HOUR))
SENT = Delivered("2.0.0", "delivered to maildir")
RELAYED = Delivered("2.0.0", "250 2.0.0 Ok", remote="mx.far.test", reply="250 2.0.0 Ok")
PASSED_ON = replace(RELAYED, dsn=True)
LATER = Deferred("4.4.1", "connect to mx.far.test[192.0.2.1]:25: Connection refused", destination=True)
NEVER = Failed("5.1.1", "no such user")


def message(*notify: tuple[Notify, ...], sender: str = "a@b.test", age: float = 0.0) -> Envelope:
    recipients = tuple(Recipient(f"r{number}@c.test", wanted) for number, wanted in enumerate(notify))
    return Envelope("ID", NOW - age, sender, recipients)


def decide(envelope: Envelope, *outcomes: Outcome | RecipientState, retry: Retry = RETRY) -> Decision:
    states = [one if isinstance(one, RecipientState) else RecipientState(one) for one in outcomes]
    return settle(envelope, states, NOW, retry, 0.0)


def test_without_notify_failure_and_delay_are_told_and_success_is_not() -> None:
    recipient = Recipient("a@b.test")
    assert [wants(recipient, what) for what in ("failure", "delay", "success")] == [True, True, False]
    assert wants(Recipient("a@b.test", ("success",)), "success")
    assert not wants(Recipient("a@b.test", ("success",)), "failure")
    assert not wants(Recipient("a@b.test", ("never",)), "failure")


def test_a_success_is_told_when_asked_for_and_once() -> None:
    envelope = message(("success",), ())
    assert decide(envelope, SENT, SENT) == Bounce((), Done(), ((0, SENT),))
    assert decide(envelope, RecipientState(SENT, announced=True), SENT) == Done()


def test_a_success_is_not_told_when_the_next_hop_will_or_nobody_would_hear() -> None:
    assert decide(message(("success",)), PASSED_ON) == Done()
    assert decide(message(("success",)), RELAYED) == Bounce((), Done(), ((0, RELAYED),))
    assert decide(message(("success",), sender=""), SENT) == Done()
    assert decide(message(("success",)), RecipientState(NEVER, reported=True)) == Done()


def test_success_and_failure_and_waiting_in_one_message() -> None:
    verdict = decide(message(("success",), (), ("never",)), SENT, LATER, NEVER)
    assert isinstance(verdict, Bounce)
    assert verdict.delivered == ((0, SENT),)
    assert verdict.failed == ((2, NEVER),), "also a failure of which nobody wants to hear is to be marked"
    assert isinstance(verdict.then, RetryAt)


@pytest.mark.parametrize(
    ("envelope", "retry", "told"),
    [
        (message((), age=5 * HOUR), WARNING, True),
        (message(("delay",), age=4 * HOUR), WARNING, True),
        (message((), age=3 * HOUR), WARNING, False),
        (message((), age=5 * HOUR), RETRY, False),
        (message(("failure",), age=5 * HOUR), WARNING, False),
        (message((), age=5 * HOUR, sender=""), WARNING, False),
        (replace(message((), age=5 * HOUR), kind="bounce"), WARNING, False),
    ],
)
def test_a_delay_is_told_after_warn_after(envelope: Envelope, retry: Retry, told: bool) -> None:
    verdict = decide(envelope, LATER, retry=retry)
    if told:
        assert isinstance(verdict, Bounce)
        assert verdict.delayed == ((0, LATER),)
        assert verdict.failed == ()
        assert isinstance(verdict.then, RetryAt)
    else:
        assert isinstance(verdict, RetryAt)


def test_a_delay_is_told_once_and_not_with_the_end() -> None:
    assert isinstance(decide(message((), age=5 * HOUR), RecipientState(LATER, warned=True), retry=WARNING), RetryAt)
    verdict = decide(message((), age=6 * DAY), LATER, retry=WARNING)
    assert isinstance(verdict, Bounce)
    assert verdict.delayed == ()


def test_what_was_told_survives_further_attempts() -> None:
    events: list[Event] = [Attempt(1.0, ((0, LATER),)), Reported(2.0, (0,), "R", "delay"), Attempt(3.0, ((0, LATER),))]
    assert replay(1, events)[0].warned
    events = [Attempt(1.0, ((0, SENT),)), Reported(2.0, (0,), "R", "success")]
    state = replay(1, events)[0]
    assert state.announced
    assert state.settled
    assert not state.reported


# -- the documents --------------------------------------------------------------------------------------------------------

ORIGINAL = b"From: a@b.test\r\nSubject: gr\xc3\xbc\xc3\x9fe\r\n\r\nbody with \xc3\xbc\r\n.\r\n"


@dataclass
class Report:
    """A report, taken apart."""

    head: EmailMessage
    text: str
    message: EmailMessage
    recipients: list[EmailMessage]
    last: EmailMessage


def read(data: bytes) -> Report:
    head = email.message_from_bytes(data, policy=email.policy.default)
    parts = cast(list[EmailMessage], head.get_payload())
    blocks = cast(list[EmailMessage], parts[1].get_payload())
    return Report(head, parts[0].get_content(), blocks[0], blocks[1:], parts[2])


def build(envelope: Envelope, outcome: Outcome, **options: object) -> Report:
    entries = [(recipient, outcome) for recipient in envelope.recipients]
    data = report(envelope, entries, ORIGINAL, hostname="mx.test", now=NOW, report_id="R1", **options)  # type: ignore[arg-type]
    return read(data)


def test_envid_and_orcpt_are_echoed() -> None:
    envelope = replace(
        message(()), envid="QQ314159", recipients=(Recipient("r0@c.test", (), "rfc822;first@elsewhere.test"),)
    )
    told = build(envelope, NEVER)
    assert told.message["Original-Envelope-Id"] == "QQ314159"
    assert told.recipients[0]["Original-Recipient"] == "rfc822; first@elsewhere.test"
    assert told.recipients[0]["Action"] == "failed"


def test_a_success_says_delivered_or_relayed() -> None:
    told = build(message(("success",)), SENT, kind="success")
    assert told.head["Subject"] == "Successful Mail Delivery Report"
    assert (told.recipients[0]["Action"], told.recipients[0]["Status"]) == ("delivered", "2.0.0")
    told = build(message(("success",)), RELAYED, kind="success")
    assert told.recipients[0]["Action"] == "relayed"
    assert told.recipients[0]["Remote-MTA"] == "dns; mx.far.test"
    assert "relayed to mx.far.test" in told.text


def test_a_delay_says_until_when() -> None:
    told = build(message(()), LATER, kind="delay", until=NOW + DAY)
    assert told.recipients[0]["Action"] == "delayed"
    assert told.recipients[0]["Status"] == "4.4.1"
    assert told.recipients[0]["Will-Retry-Until"] == "Wed, 15 Nov 2023 22:13:20 +0000"
    assert "WARNING ONLY" in told.text


def test_ret_full_returns_the_whole_message_and_hdrs_only_its_header() -> None:
    told = build(message(()), NEVER, full=True)
    assert told.last.get_content_type() == "message/rfc822"
    assert told.last["Content-Transfer-Encoding"] == "8bit"
    data = report(
        message(()), [(Recipient("r@c.test"), NEVER)], ORIGINAL, hostname="mx.test", now=NOW, report_id="R1", full=True
    )
    assert ORIGINAL in data
    told = build(message(()), NEVER)
    assert told.last.get_content_type() == "text/rfc822-headers"
    assert "body with" not in told.last.get_content()
