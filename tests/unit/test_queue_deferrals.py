"""`mtaq why`, the pure part: a test for each cause of a message that waits for its time, and what holds for all answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from mtad.config import Retry
from mtad.desk import JobView, MessageView
from mtad.outcome import Attempt, Deferred
from mtad.progress import CUT, REPORT, Doubt, Event, Named
from mtad.queue_causes import CauseName
from mtad.queue_deferrals import causes
from tests.unit.queue_aid import (
    GONE,
    HOUR,
    ID,
    LANE,
    LATER,
    NOW,
    SENT,
    SUSPENDED,
    check,
    commands,
    facts,
    in_hand,
    only,
    tried,
    waits,
)


def test_its_destination_is_suspended() -> None:
    cause = only(facts(tried(LATER), lanes={0: SUSPENDED}))
    text = (
        "Mail to y.test has been suspended for 12 minutes: no attempt there came through. In 48 seconds the next message "
        "that is due tries it for all."
    )
    check(cause, "suspended", text, "mtad explain --to b@y.test --probe", f"mtad-flush {ID}")
    assert (cause.since, cause.until, cause.reply) == (NOW - 720, NOW + 48, "421 4.3.2 No")
    assert (cause.next_attempt, cause.attempts) == (NOW + 300, 1)


def test_a_suspension_whose_pause_is_over() -> None:
    over = msgspec.structs.replace(SUSPENDED, suspended_until=NOW - 1)
    assert only(facts(tried(LATER), lanes={0: over})).text.endswith(" The next message that is due tries it for all.")


def test_a_job_in_a_suspended_lane() -> None:
    assert only(facts(**in_hand(waits(SUSPENDED)))).cause == "suspended"


def test_in_doubt() -> None:
    cause = only(facts(Doubt(NOW - 60, (0,), "mx.y.test")))
    text = (
        "In doubt: mx.y.test may have it already, for a process of ours died before the answer. It is sent again in 5 "
        "minutes."
    )
    check(cause, "doubt", text, f"mtad-flush {ID}", f"mtaq delete {ID}")


def test_in_doubt_about_one_of_several() -> None:
    cause, _ = causes(facts(Doubt(NOW - 60, (0,), "local"), recipients=["b@y.test", "c@y.test"]))
    assert cause.text.startswith("In doubt: the mailbox here may have it already")
    assert commands(cause) == [f"mtad-flush {ID}"], "deleting it would take it from the other"


def test_in_doubt_about_a_report() -> None:
    cause = only(facts(tried(GONE), Doubt(NOW - 60, (0,), REPORT)))
    assert cause.text == (
        "In doubt: a process died while it told the sender that this failed. The sender is told again in 5 minutes."
    )


def test_in_doubt_since_the_machine_stopped() -> None:
    cause = only(facts(Doubt(NOW - 60, (0,), CUT)))
    assert cause.text == (
        "In doubt: somebody may have it already, for the machine stopped while it was here. It is sent again in 5 minutes."
    )


def test_held_in_doubt() -> None:
    history: list[Event] = [Doubt(NOW - 60, (0,), "mx.y.test"), Named(NOW - 50, (0,), hold=True)]
    cause = only(facts(*history, queue="hold", view=None))
    text = (
        "In doubt, and held: mx.y.test may have it already, for a process of ours died before the answer. It is not sent "
        "again before somebody releases it."
    )
    check(cause, "held", text, f"mtaq release {ID}", f"mtaq delete {ID}")
    assert (cause.since, cause.next_attempt) == (NOW - 50, 0)


@pytest.mark.parametrize("more", [{}, in_hand(), {"scheduler": "down"}])
def test_one_of_several_held_in_doubt(more: dict[str, Any]) -> None:
    history: list[Event] = [Doubt(NOW - 60, (0,), "local"), Named(NOW - 50, (0,), hold=True)]
    held, other = causes(facts(*history, recipients=["b@y.test", "c@y.test"], **more))
    assert held.cause == "held"
    assert held.text.endswith(" It is not sent again before somebody releases it. The other recipients go on.")
    assert commands(held) == [f"mtaq release {ID}"]
    assert "oubt" not in other.text


def test_a_doubt_is_told_whatever_is_in_the_way() -> None:
    doubt, named = Doubt(NOW - 60, (0,), "mx.y.test"), Named(NOW - 50, (0,))
    tail = " In doubt: mx.y.test may have it already."
    assert only(facts(doubt, named, **in_hand(waits()))).text.endswith(tail)
    assert only(facts(doubt, scheduler="down")).text == f"mtad is not running, so nothing is delivered.{tail}"
    delivering = JobView((0,), LANE, "delivering", NOW - 30, pid=7)
    assert only(facts(doubt, named, **in_hand(delivering))).text.endswith(tail)
    assert "oubt" not in only(facts(doubt, **in_hand(delivering))).text, "the usual one, between final dot and reply"
    told = only(facts(tried(GONE), Doubt(NOW - 60, (0,), REPORT), scheduler="down"))
    assert told.text.endswith(" In doubt: its sender may have been told already.")


def test_expired() -> None:
    cause = only(facts(tried(LATER), retry=Retry(lifetime=HOUR)))  # type: ignore[arg-type]
    text = "Its time in the queue is over: after one more attempt it goes back to its sender."
    check(cause, "expired", text, f"mtad-flush {ID}")


def test_due_and_no_room() -> None:
    cause = only(facts(tried(LATER), due=NOW - 90, view=MessageView(ID, known=False, due=NOW - 90)))
    text = "It has been due for 1 minute, and is taken up as soon as the messages in hand leave room."
    check(cause, "due", text, "mtaq watch")
    assert cause.next_attempt == NOW


def test_due_and_not_seen() -> None:
    cause = only(facts(tried(LATER), due=NOW - 90, view=MessageView(ID, known=False)))
    text = "It has been due for 1 minute. The scheduler has not seen it yet: it looks there again within five minutes."
    check(cause, "due", text, f"mtad-flush {ID}")


def test_never_tried() -> None:
    check(only(facts()), "untried", "It was not tried yet, and waits for its time.", f"mtad-flush {ID}")


AT = "mx.y.test[192.0.2.1]"
EXPLAIN = "mtad explain --to b@y.test"
FLUSH = f"mtad-flush {ID}"


@pytest.mark.parametrize(
    ("name", "outcome", "text", "typed"),
    [
        (
            "dns",
            Deferred("4.4.3", "Host or domain name not found. Name service error for name=y.test type=MX: try again"),
            "The DNS does not say where mail for y.test goes.",
            [EXPLAIN, FLUSH],
        ),
        (
            "tls",
            Deferred("4.7.4", f"TLS is required, but was not offered by host {AT}", "mx.y.test"),
            "Mail to y.test must be encrypted, and mx.y.test was not up to that.",
            [f"{EXPLAIN} --probe", "mtad reload", FLUSH],
        ),
        (
            "login",
            Deferred("4.7.8", f"SASL authentication failed; server {AT} said: 535 5.7.8 No", "mx.y.test", "535 5.7.8 No"),
            "The next hop mx.y.test does not take our login.",
            ["mtad reload", FLUSH],
        ),
        (
            "connect",
            Deferred("4.4.1", f"connect to {AT}:25: Connection refused", "mx.y.test", destination=True),
            "No server of y.test took the connection.",
            [f"{EXPLAIN} --probe", FLUSH],
        ),
        (
            "broken",
            Deferred("4.4.2", f"lost connection with {AT} while sending MAIL FROM", "mx.y.test"),
            "The dialogue with mx.y.test broke off.",
            [f"{EXPLAIN} --probe", FLUSH],
        ),
        (
            "greylisted",
            Deferred("4.7.1", f"host {AT} said: 451 4.7.1 Greylisted", "mx.y.test", "451 4.7.1 Greylisted"),
            "Greylisted: mx.y.test wants to see it a second time. That is usual for a first message, and passes.",
            [FLUSH],
        ),
        (
            "limited",
            Deferred(
                "4.7.0", f"host {AT} said: 451 4.7.0 rate limit exceeded", "mx.y.test", "451 4.7.0 rate limit exceeded"
            ),
            "mx.y.test takes no more from us at the moment.",
            ["mtad reload", FLUSH],
        ),
        ("reply", LATER, "mx.y.test did not want it yet.", [FLUSH, f"mtaq bounce {ID}"]),
        (
            "mailbox",
            Deferred("4.3.1", "cannot store in the mailbox of b: No space left on device"),
            "It could not be stored in the mailbox here.",
            [FLUSH, f"mtaq bounce {ID}"],
        ),
        (
            "machine",
            Deferred("4.3.0", "delivery process killed by signal 9"),
            "It was not delivered because of a fault on this machine.",
            ["df -h /spool", FLUSH],
        ),
    ],
)
def test_put_off(name: CauseName, outcome: Deferred, text: str, typed: list[str]) -> None:
    cause = only(facts(tried(outcome, at=NOW - 120), tried(outcome)))
    check(cause, name, text, *typed)
    assert (cause.next_attempt, cause.attempts, cause.since) == (NOW + 300, 2, NOW - 60)
    assert (cause.reason, cause.reply) == (f"{outcome.status} {outcome.text}", outcome.reply)


def test_put_off_with_the_others_of_a_destination_that_is_open_again() -> None:
    text = f"delivery temporarily suspended: connect to {AT}:25: Connection refused"
    cause = only(facts(Attempt(NOW - 60, ((0, Deferred("4.4.1", text, "mx.y.test", destination=True)),))))
    assert cause.cause == "connect"
    assert cause.text == (
        "No server of y.test took the connection. It was put off with the other mail to there, without an attempt of its "
        "own."
    )
    assert (cause.reason, cause.attempts) == (f"4.4.1 connect to {AT}:25: Connection refused", 0)


# -- what holds for all ----------------------------------------------------------------------------------------------


def test_reports_have_a_lifetime_of_their_own() -> None:
    one = facts(tried(LATER), retry=Retry(bounce_lifetime=2 * HOUR))  # type: ignore[arg-type]
    report = msgspec.structs.replace(one, envelope=msgspec.structs.replace(one.envelope, kind="bounce", sender=""))
    assert (only(one).expires, only(report).expires) == (NOW - HOUR + 5 * 24 * HOUR, NOW + HOUR)


def test_a_configuration_that_cannot_be_read_hides_the_expiry_alone() -> None:
    assert (only(facts(tried(LATER), retry=None)).expires, only(facts(tried(LATER), retry=None)).cause) == (0, "reply")


def test_a_message_that_was_claimed_after_its_file_was_seen() -> None:
    job = JobView((0,), LANE, "delivering", NOW - 1, pid=99)
    view = MessageView(ID, known=True, jobs=(job,))
    assert only(facts(tried(LATER), view=view)).cause == "delivering"


def test_one_answer_for_each_recipient_in_their_order() -> None:
    recipients = [f"u{number}@y.test" for number in range(1000)]
    found = causes(facts(Attempt(NOW - 1, ((999, SENT), (0, LATER))), recipients=recipients))
    assert [cause.recipient for cause in found] == recipients
    assert [found[0].cause, found[1].cause, found[999].cause] == ["reply", "untried", "delivered"]


def test_every_cause_has_a_test() -> None:
    sources = [Path(__file__), Path(__file__).with_name("test_queue_causes.py")]
    tested = "".join(source.read_text() for source in sources)
    assert [name for name in get_args(CauseName) if f'"{name}"' not in tested] == []
