"""`mtaq why`, the pure part: a test for each cause of a message that is not waiting for its time."""

from __future__ import annotations

import msgspec
import pytest

from mtad.desk import JobView, LaneView, MessageView
from mtad.outcome import Attempt, Delivered
from mtad.progress import Instructed, Reported
from mtad.queue_deferrals import causes
from tests.unit.queue_aid import GONE, ID, LANE, LATER, NOW, SENT, check, facts, in_hand, only, tried, waits

# -- settled, and at rest ---------------------------------------------------------------------------------------------


def test_delivered() -> None:
    cause = only(facts(tried(SENT)))
    check(cause, "delivered", "Delivered to mx.y.test[192.0.2.1]:25.")
    assert (cause.since, cause.expires, cause.reason) == (NOW - 60, 0, "")
    local = Attempt(NOW - 60, ((0, Delivered("2.0.0", "delivered to maildir")),), "local")
    check(only(facts(local)), "delivered", "Delivered in the mailbox here.")


def test_returned() -> None:
    cause = only(facts(tried(GONE), Reported(NOW - 50, (0,), "r")))
    check(cause, "returned", "It failed, and its sender was told.")
    assert cause.reply == "550 5.1.1 No such user"


def test_held() -> None:
    cause = only(facts(tried(LATER), Instructed(NOW - 10, "hold", done=True), queue="hold"))
    typed = (f"mtaq release {ID}", f"mtaq delete {ID}")
    check(cause, "held", "It is held: nothing is tried until somebody releases it.", *typed)
    assert (cause.since, cause.next_attempt, cause.expires) == (NOW - 10, 0, 0), "it does not expire"


def test_held_because_nobody_is_left_to_be_told() -> None:
    one = facts(tried(GONE), queue="hold")
    notice = msgspec.structs.replace(one, envelope=msgspec.structs.replace(one.envelope, kind="double-bounce", sender=""))
    assert only(notice).cause == "held"
    assert only(notice).text == (
        "It is held: a notice to postmaster that cannot be delivered itself. Nobody was told of it."
    )


@pytest.mark.parametrize("queue", ["incoming", "active", "deferred"])
def test_no_server(queue: str) -> None:
    cause = only(facts(tried(LATER), queue=queue, scheduler="down", view=None))
    check(cause, "stopped", "mtad is not running, so nothing is delivered.", "mtad start")
    assert cause.reply == "450 4.2.1 Busy"


def test_no_scheduler_at_this_moment() -> None:
    text = "mtad runs, but has no scheduler at this moment. It starts one; if this lasts, its log says why not."
    check(only(facts(scheduler="starting", view=None)), "starting", text, "mtad status")


@pytest.mark.parametrize("queue", ["incoming", "active"])
def test_a_scheduler_that_does_not_answer(queue: str) -> None:
    text = "The scheduler (process 4711) does not answer, so what it does with this message is not known."
    check(only(facts(scheduler="silent", queue=queue, view=None)), "silent", text, "mtad status", f"mtaq show {ID}")


def test_a_scheduler_that_does_not_answer_when_a_message_is_due() -> None:
    text = "It has been due for 2 minutes, and the scheduler does not answer."
    check(only(facts(tried(LATER), scheduler="silent", due=NOW - 120, view=None)), "silent", text, "mtad status")


def test_a_message_whose_time_has_not_come_waits_for_that_and_not_for_the_scheduler() -> None:
    assert only(facts(tried(LATER), scheduler="silent", view=None)).cause == "reply"


def test_the_disk_refuses() -> None:
    view = MessageView(ID, known=True, stuck="cannot move it to deferred: Read-only file system")
    text = "The disk refuses: cannot move it to deferred: Read-only file system. It is tried again every ten seconds."
    typed = ("df -h /spool; df -i /spool", "ls -ld /spool/*")
    check(only(facts(tried(LATER), queue="active", view=view)), "disk", text, *typed)


# -- on its way into a delivery process -------------------------------------------------------------------------------


def test_just_arrived() -> None:
    cause = only(facts(queue="incoming", view=MessageView(ID, known=False)))
    check(cause, "arrived", "It has arrived. The scheduler takes it up at once, or in five seconds at most.")


def test_in_work_since_before_this_scheduler() -> None:
    cause = only(facts(queue="active", view=MessageView(ID, known=False), in_work=True))
    text = "It is in work: a process of the scheduler before this one has it, and when that has ended it goes on."
    check(cause, "earlier", text)


def test_in_active_and_unknown() -> None:
    cause = only(facts(queue="active", view=MessageView(ID, known=False)))
    text = "It lies in active, and the scheduler does not know of it yet. It looks there again within five minutes."
    check(cause, "unread", text, "mtad reload")


def test_in_delivery() -> None:
    job = JobView((0,), LANE, "delivering", NOW - 12, pid=99)
    cause = only(facts(**in_hand(job)))
    check(cause, "delivering", "It is in delivery to y.test, by process 99 for 12 seconds.", f"mtaq show {ID}")
    assert (cause.process, cause.since, cause.destination) == (99, NOW - 12, "y.test")


def test_in_delivery_with_an_order_that_waits_for_its_end() -> None:
    job = JobView((0,), LANE, "delivering", NOW - 12, pid=99)
    cause = only(facts(**in_hand(job, ordered="hold")))
    assert cause.text == "It is in delivery to y.test, by process 99 for 12 seconds. After that it is held."


def test_being_stored_and_being_reported() -> None:
    local = JobView((0,), LaneView("local", "", 0, 1, 5, 20), "delivering", NOW - 1, pid=99)
    assert only(facts(**in_hand(local))).text == "It is being stored in the mailbox, by process 99 for 1 second."
    bounce = JobView((0,), LaneView("bounce", "", 0, 1, 5, 20), "delivering", NOW, pid=99)
    failed = only(facts(tried(GONE), **in_hand(bounce)))
    assert failed.text == "It failed, and its sender is being told, by process 99 for 0 seconds."
    assert failed.reply == "550 5.1.1 No such user"


def test_its_turn_comes() -> None:
    check(only(facts(**in_hand(waits()))), "turn", "Its turn comes at once. 12 before it.")
    assert only(facts(**in_hand())).text == "The scheduler has it in hand, and it comes into a lane at once."


def test_the_limit_of_the_lane() -> None:
    lane = msgspec.structs.replace(LANE, in_flight=20)
    cause = only(facts(**in_hand(waits(lane, blocked="concurrency"))))
    text = "It waits for its turn: 20 of 20 deliveries to y.test are under way. 12 before it."
    check(cause, "concurrency", text, "mtad reload")
    assert cause.advice[0].effect == (
        "after you have raised `destination_concurrency`, or `concurrency` of its policy: it is 20 now"
    )
    assert (cause.since, cause.ahead) == (NOW - 30, 12)


def test_a_lane_that_is_not_wide_open() -> None:
    lane = msgspec.structs.replace(LANE, in_flight=2, window=2, reason="said: 421 Less", reply="421 Less")
    cause = only(facts(**in_hand(waits(lane, ahead=0, blocked="concurrency"))))
    text = (
        "It waits for its turn: 2 of 2 deliveries to y.test are under way. It is the next one. It may be 20; each success "
        "opens one more."
    )
    check(cause, "concurrency", text, "mtaq watch")
    assert (cause.reason, cause.reply) == ("said: 421 Less", "421 Less")


def test_the_limit_of_a_group() -> None:
    lane = msgspec.structs.replace(LANE, in_flight=3, window=3, limit=3, group=".protection.outlook.com")
    cause = only(facts(**in_hand(waits(lane, blocked="concurrency"))))
    assert cause.text == (
        "It waits for its turn: 3 of 3 deliveries to y.test are under way, with the others of the policy "
        ".protection.outlook.com. 12 before it."
    )
    assert cause.advice[0].effect == "after you have raised `concurrency` of that policy: it is 3 now"


def test_the_rate() -> None:
    lane = msgspec.structs.replace(LANE, rate="100/1m", group="slow.test", next_start=NOW + 3)
    cause = only(facts(**in_hand(waits(lane, blocked="rate"))))
    text = (
        "It waits for its turn: mail to y.test may go at a rate of 100/1m by the policy slow.test. The next one starts in "
        "3 seconds. 12 before it."
    )
    check(cause, "rate", text, "mtad reload")
    assert cause.until == NOW + 3


def test_no_delivery_process_is_free() -> None:
    cause = only(facts(**in_hand(waits(blocked="processes"))))
    text = "It waits for a free delivery process: all have their hands full. 12 before it."
    check(cause, "processes", text, "mtaq watch", "mtad reload")


# -- the rest of its message ------------------------------------------------------------------------------------------


def test_put_off_while_others_are_under_way() -> None:
    job = JobView((1,), LANE, "delivering", NOW - 12, pid=99)
    first, second = causes(facts(tried(LATER), recipients=["b@y.test", "c@y.test"], **in_hand(job)))
    text = "It was put off, and gets the time of its next attempt when the other recipients of this message are done."
    check(first, "others", text)
    assert (first.reply, first.since, second.cause) == ("450 4.2.1 Busy", NOW - 60, "delivering")


def test_failed_while_others_are_under_way() -> None:
    job = JobView((1,), LANE, "delivering", NOW - 12, pid=99)
    first, _ = causes(facts(tried(GONE), recipients=["b@y.test", "c@y.test"], **in_hand(job)))
    check(first, "report", "It failed; its sender is told when the other recipients of this message are done.")


def test_failed_and_its_report_could_not_be_stored() -> None:
    cause = only(facts(tried(GONE)))
    text = "It failed. The report to its sender could not be stored; that is tried again at the next attempt."
    check(cause, "report", text, f"mtad-flush {ID}", "df -h /spool")
    assert cause.next_attempt == NOW + 300
