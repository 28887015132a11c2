"""Why a message is where it is: one answer for each recipient. The pure part of `mtaq why`.

Values in, answers out: what the queue file says, what the scheduler says (`mtad.desk`), and the time. Of all that may be
said about a recipient the answer is what is in the way *now*, looked for in this order: it is settled; it is held, in doubt
or with its message; no scheduler runs, or it does not answer; the disk refuses; it is in delivery, or waits in its lane; it
waits for the rest of its message; it waits for its time, and then why it was put off (see `mtad.queue_deferrals`).

Invariants: as many answers as recipients, in their order; every answer has a text. Times are seconds since the epoch.
Errors: none; what is not known is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import msgspec

from mtad.address import domain_of
from mtad.config import Retry
from mtad.desk import JobView, LaneView, MessageView
from mtad.envelope import Envelope
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.progress import CUT, Event, Instructed, Named, RecipientState
from mtad.reasons import SUSPENDED
from mtad.retry import in_words, lifetime

CauseName = Literal[
    # nothing is left to do
    "delivered",
    "returned",
    # nothing is done
    "held",
    "stopped",
    "starting",
    "silent",
    "disk",
    # on its way into a delivery process
    "arrived",
    "earlier",
    "unread",
    "delivering",
    "turn",
    "concurrency",
    "rate",
    "processes",
    # it waits for the rest of its message
    "others",
    "report",
    # it waits for its time
    "suspended",
    "doubt",
    "expired",
    "due",
    "untried",
    "dns",
    "tls",
    "login",
    "connect",
    "broken",
    "greylisted",
    "limited",
    "reply",
    "mailbox",
    "machine",
]

QueueName = Literal["incoming", "active", "deferred", "hold"]

#: What there is of a scheduler: one that answers; one that does not; a master that is starting one; nothing at all.
SchedulerState = Literal["running", "silent", "starting", "down"]


class Advice(msgspec.Struct, frozen=True):
    """Something to type, and what it does."""

    command: str
    effect: str


class Cause(msgspec.Struct, frozen=True):
    """The answer for one recipient. Times and numbers are 0, and texts "", where they do not apply."""

    recipient: str
    cause: CauseName
    text: str
    reason: str = ""
    """Why it was deferred, failed or suspended the last time."""
    reply: str = ""
    """What the server said then, word for word."""
    host: str = ""
    destination: str = ""
    """The domain or next hop by which it is counted."""
    since: float = 0.0
    """Since when this is the cause: the suspension, the delivery, the wait, or the last attempt."""
    until: float = 0.0
    """When the suspension ends, or the rate lets the next one start."""
    process: int = 0
    ahead: int = 0
    """How many jobs come before it."""
    attempts: int = 0
    """How often it was tried."""
    next_attempt: float = 0.0
    expires: float = 0.0
    """When it goes back to its sender."""
    advice: tuple[Advice, ...] = ()


class Facts(msgspec.Struct, frozen=True):
    """All that is known about one message."""

    queue: QueueName
    envelope: Envelope
    states: Sequence[RecipientState]
    events: Sequence[Event]
    now: float
    scheduler: SchedulerState
    due: float = 0.0
    """The time of the next attempt, as the file of a deferred message has it."""
    view: MessageView | None = None
    lanes: Mapping[int, LaneView] = {}
    """For a recipient, the lane to which it would go, where there is one."""
    retry: Retry | None = None
    """None: the configuration cannot be read."""
    in_work: bool = False
    """A delivery process has the file open."""
    spool: str = "the spool"
    scheduler_pid: int = 0


class Past(msgspec.Struct):
    """What the history says about one recipient."""

    tried: int = 0
    last: float = 0.0
    """When the last attempt, or the last putting off, began."""
    host: str = ""


def pasts(facts: Facts) -> list[Past]:
    """The history by recipient."""
    found = [Past() for _ in facts.envelope.recipients]
    for event in facts.events:
        if isinstance(event, Attempt):
            for index, outcome in event.outcomes:
                past = found[index]
                past.last = event.started
                past.host = event.relay if event.host else past.host
                past.tried += not outcome.text.startswith(SUSPENDED)
    return found


def expiry(facts: Facts) -> float:
    """When the message goes back to its sender; 0 when that is not known."""
    return 0.0 if facts.retry is None else facts.envelope.arrival + lifetime(facts.envelope, facts.retry)


def somebody(host: str) -> str:
    """Who may have a message that is in doubt."""
    return {"local": "the mailbox here", CUT: "somebody"}.get(host, host)


def how_doubtful(host: str) -> str:
    """Who may have it, and why that is not known."""
    why = "the machine stopped while it was here" if host == CUT else "a process of ours died before the answer"
    return f"{somebody(host)} may have it already, for {why}."


def deletion(facts: Facts, host: str) -> tuple[Advice, ...]:
    """To delete a message in doubt, where that takes it from nobody else."""
    if sum(not state.settled for state in facts.states) > 1:
        return ()
    return (Advice(f"mtaq delete {facts.envelope.id}", f"deletes it, if you find that {somebody(host)} has it"),)


def at_rest(facts: Facts, index: int, past: Past) -> Cause | None:
    """The answer for a recipient that nobody is at work on and whose time does not matter; None when it does."""
    state, queue_id = facts.states[index], facts.envelope.id
    blank = base(facts, index, past)
    if isinstance(state.outcome, Delivered):
        where = "in the mailbox here" if past.host == "local" else f"to {past.host}" if past.host else ""
        return _with(blank, "delivered", f"Delivered {where}".rstrip() + ".", since=past.last)
    if state.reported:
        return _with(blank, "returned", "It failed, and its sender was told.", since=past.last)
    if state.held:
        return _kept(facts, blank, state.doubt)
    if facts.queue == "hold":
        return _held(facts, blank)
    if facts.scheduler == "down":
        text = "mtad is not running, so nothing is delivered."
        return _with(blank, "stopped", text, advice=(Advice("mtad start", "starts it"),))
    if facts.scheduler == "starting":
        text = "mtad runs, but has no scheduler at this moment. It starts one; if this lasts, its log says why not."
        return _with(blank, "starting", text, advice=(Advice("mtad status", "shows the processes"),))
    if facts.view is not None and facts.view.stuck:
        text = f"The disk refuses: {facts.view.stuck}. It is tried again every ten seconds."
        advice = Advice(f"df -h {facts.spool}; df -i {facts.spool}", "shows the room that is left")
        return _with(blank, "disk", text, advice=(advice, Advice(f"ls -ld {facts.spool}/*", "shows whose they are")))
    if facts.scheduler == "silent" and facts.queue != "deferred":
        who = f" (process {facts.scheduler_pid})" if facts.scheduler_pid else ""
        text = f"The scheduler{who} does not answer, so what it does with this message is not known."
        return _with(blank, "silent", text, advice=(Advice("mtad status", "shows the processes"), show(queue_id)))
    return None


def base(facts: Facts, index: int, past: Past) -> Cause:
    """What every answer about a recipient has."""
    state, address = facts.states[index], facts.envelope.recipients[index].address
    lane = facts.lanes.get(index)
    outcome: Outcome | None = state.outcome
    bad = isinstance(outcome, (Deferred, Failed))
    return Cause(
        address,
        "untried",
        "",
        reason=f"{outcome.status} {outcome.text}" if outcome is not None and bad else "",
        reply=outcome.reply if outcome is not None and bad else "",
        host=outcome.remote if outcome is not None else "",
        destination=(lane.destination if lane else "") or domain_of(address),
        attempts=past.tried,
        expires=0.0 if state.settled else expiry(facts),
    )


def show(queue_id: str) -> Advice:
    """Where to look for more."""
    return Advice(f"mtaq show {queue_id}", "shows each attempt so far")


def _with(blank: Cause, cause: CauseName, text: str, *, since: float = 0.0, advice: tuple[Advice, ...] = ()) -> Cause:
    return msgspec.structs.replace(blank, cause=cause, text=text, since=since, advice=advice)


def _for_ever(blank: Cause) -> Cause:
    """What is held does not expire."""
    return msgspec.structs.replace(blank, expires=0.0)


def _held(facts: Facts, blank: Cause) -> Cause:
    queue_id = facts.envelope.id
    since = max((event.at for event in facts.events if isinstance(event, Instructed) and event.what == "hold"), default=0.0)
    text = "It is held: nothing is tried until somebody releases it."
    if facts.envelope.kind == "double-bounce" and not since:
        text = "It is held: a notice to postmaster that cannot be delivered itself. Nobody was told of it."
    advice = (
        Advice(f"mtaq release {queue_id}", "lets it go on"),
        Advice(f"mtaq delete {queue_id}", "deletes it; nobody is told"),
    )
    return _with(_for_ever(blank), "held", text, since=since, advice=advice)


def _kept(facts: Facts, blank: Cause, host: str) -> Cause:
    queue_id = facts.envelope.id
    since = max((event.at for event in facts.events if isinstance(event, Named) and event.hold), default=0.0)
    text = f"In doubt, and held: {how_doubtful(host)} It is not sent again before somebody releases it."
    if facts.queue != "hold":
        text += " The other recipients go on."
    release = Advice(f"mtaq release {queue_id}", "sends it now, perhaps a second time")
    return _with(
        msgspec.structs.replace(blank, expires=0.0), "held", text, since=since, advice=(release, *deletion(facts, host))
    )


def at_work(facts: Facts, index: int, past: Past) -> Cause:
    """The answer for a recipient of a message in incoming or active."""
    blank, view = base(facts, index, past), facts.view
    job = next((job for job in view.jobs if index in job.recipients), None) if view else None
    if job is not None:
        blank = msgspec.structs.replace(blank, destination=job.lane.destination, since=job.since)
        return _delivering(facts, blank, job) if job.state == "delivering" else _in_lane(facts, blank, job)
    outcome = facts.states[index].outcome
    if view is not None and view.known:
        if isinstance(outcome, Failed):
            return _with(blank, "report", f"It failed; its sender is told when {_rest(facts)}.", since=past.last)
        if isinstance(outcome, Deferred):
            text = f"It was put off, and gets the time of its next attempt when {_rest(facts)}."
            return _with(blank, "others", text, since=past.last)
        return _with(blank, "turn", "The scheduler has it in hand, and it comes into a lane at once.")
    if facts.in_work:
        text = "It is in work: a process of the scheduler before this one has it, and when that has ended it goes on."
        return _with(blank, "earlier", text)
    if facts.queue == "incoming":
        return _with(blank, "arrived", "It has arrived. The scheduler takes it up at once, or in five seconds at most.")
    text = "It lies in active, and the scheduler does not know of it yet. It looks there again within five minutes."
    return _with(blank, "unread", text, advice=(Advice("mtad reload", "has it looked for at once"),))


def _rest(facts: Facts) -> str:
    open_jobs = len(facts.view.jobs) if facts.view else 0
    return "the other recipients of this message are done" if open_jobs else "its message is written down"


def _place(lane: LaneView) -> str:
    """A lane's destination in a sentence."""
    if lane.transport == "local":
        return "the mailboxes here"
    return "senders, as reports" if lane.transport == "bounce" else lane.destination


#: What follows a delivery, by the order that waits for its end.
_AFTERWARDS: Final = {
    "hold": "After that it is held.",
    "delete": "After that it is deleted.",
    "requeue": "After that it is tried again.",
    "expire": "After that it goes back to its sender, as expired.",
    "bounce": "After that it goes back to its sender.",
}


def _delivering(facts: Facts, blank: Cause, job: JobView) -> Cause:
    lane = job.lane
    doing = {
        "local": "It is being stored in the mailbox",
        "bounce": "It failed, and its sender is being told",
    }.get(lane.transport, f"It is in delivery to {lane.destination}")
    text = f"{doing}, by process {job.pid} for {in_words(facts.now - job.since)}."
    if facts.view is not None and (then := _AFTERWARDS.get(facts.view.ordered)):
        text += f" {then}"
    found = _with(blank, "delivering", text, since=job.since, advice=(show(facts.envelope.id),))
    return msgspec.structs.replace(found, process=job.pid)


def _in_lane(facts: Facts, blank: Cause, job: JobView) -> Cause:
    lane = job.lane
    blank = msgspec.structs.replace(blank, ahead=job.ahead)
    before = f" {job.ahead:,} before it." if job.ahead else " It is the next one."
    if lane.suspended_since:
        return suspended(facts, blank, lane)
    match job.blocked:
        case "rate":
            policy = f" by the policy {lane.group}" if lane.group else ""
            wait = in_words(lane.next_start - facts.now) if lane.next_start > facts.now else ""
            begins = f"in {wait}" if wait else "at once"
            text = f"It waits for its turn: mail to {_place(lane)} may go at a rate of {lane.rate}{policy}."
            advice = Advice("mtad reload", "after you have changed `rate` in that [[delivery.policy]]")
            found = _with(blank, "rate", f"{text} The next one starts {begins}.{before}", since=job.since, advice=(advice,))
            return msgspec.structs.replace(found, until=lane.next_start)
        case "processes":
            text = f"It waits for a free delivery process: all have their hands full.{before}"
            raised = Advice("mtad reload", "after you have raised `processes` or `threads` in [delivery]")
            watch = Advice("mtaq watch", "shows what they are busy with")
            return _with(blank, "processes", text, since=job.since, advice=(watch, raised))
        case "concurrency":
            return _crowded(blank, job, before)
    return _with(blank, "turn", f"Its turn comes at once.{before}", since=job.since)


def _crowded(blank: Cause, job: JobView, before: str) -> Cause:
    lane = job.lane
    # The lane's own window may have room when the policy that it shares with others has none.
    shared = f", with the others of the policy {lane.group}" if lane.group else ""
    text = f"It waits for its turn: {lane.in_flight} of {max(lane.window, lane.in_flight)} deliveries to {_place(lane)}"
    text += f" are under way{shared}.{before}"
    if lane.window >= lane.limit:
        setting = (
            "`concurrency` of that policy" if lane.group else "`destination_concurrency`, or `concurrency` of its policy"
        )
        advice = Advice("mtad reload", f"after you have raised {setting}: it is {lane.limit} now")
        return _with(blank, "concurrency", text, since=job.since, advice=(advice,))
    text += f" It may be {lane.limit}; each success opens one more."
    found = _with(blank, "concurrency", text, since=job.since, advice=(Advice("mtaq watch", "shows how that goes"),))
    return msgspec.structs.replace(found, reason=lane.reason, reply=lane.reply)


def suspended(facts: Facts, blank: Cause, lane: LaneView) -> Cause:
    """The answer for a recipient whose lane is suspended now."""
    queue_id, address = facts.envelope.id, blank.recipient
    lasted = in_words(facts.now - lane.suspended_since)
    text = f"Mail to {_place(lane)} has been suspended for {lasted}: no attempt there came through."
    if lane.suspended_until > facts.now:
        text += f" In {in_words(lane.suspended_until - facts.now)} the next message that is due tries it for all."
    else:
        text += " The next message that is due tries it for all."
    advice = (
        Advice(f"mtad explain --to {address} --probe", "connects to its servers, and sends nothing"),
        Advice(f"mtad-flush {queue_id}", "ends the suspension, and tries this message now"),
    )
    found = _with(blank, "suspended", text, since=lane.suspended_since, advice=advice)
    return msgspec.structs.replace(
        found, until=lane.suspended_until, reason=lane.reason or found.reason, reply=lane.reply or found.reply
    )
