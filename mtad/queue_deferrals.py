"""Why a deferred recipient waits: the answers of `mtad.queue_causes` for messages whose time has not come, and all of them.

`causes` is what `mtaq why` calls. For each kind of reason (`mtad.reasons`) there is a sentence for people, and something
that an administrator can type.
"""

from __future__ import annotations

from typing import Final

import msgspec

from mtad.outcome import Deferred, Failed
from mtad.progress import REPORT, RecipientState
from mtad.queue_causes import (
    Advice,
    Cause,
    CauseName,
    Facts,
    Past,
    at_rest,
    at_work,
    base,
    deletion,
    how_doubtful,
    pasts,
    somebody,
    suspended,
)
from mtad.reasons import SUSPENDED, Kind, kind_of
from mtad.retry import in_words

#: What is in the way, for a recipient of {destination} that {host} has refused.
_TEXTS: Final[dict[Kind, str]] = {
    "dns": "The DNS does not say where mail for {destination} goes.",
    "tls": "Mail to {destination} must be encrypted, and {host} was not up to that.",
    "login": "The next hop {host} does not take our login.",
    "connect": "No server of {destination} took the connection.",
    "broken": "The dialogue with {host} broke off.",
    "greylisted": "Greylisted: {host} wants to see it a second time. That is usual for a first message, and passes.",
    "limited": "{host} takes no more from us at the moment.",
    "reply": "{host} did not want it yet.",
    "mailbox": "It could not be stored in the mailbox here.",
    "machine": "It was not delivered because of a fault on this machine.",
}


def causes(facts: Facts) -> list[Cause]:
    """One answer for each recipient, in the order of the envelope."""
    history = pasts(facts)
    return [_cause(facts, index, past) for index, past in enumerate(history)]


def _cause(facts: Facts, index: int, past: Past) -> Cause:
    known = facts.view is not None and facts.view.known
    found = at_rest(facts, index, past)
    if found is None and (facts.queue in {"incoming", "active"} or known):  # it may be claimed since the file was seen
        found = at_work(facts, index, past)
    if found is None:
        return _deferred(facts, index, past)
    return _also_in_doubt(facts.states[index], found)


def _also_in_doubt(state: RecipientState, cause: Cause) -> Cause:
    """The answer, and the doubt that is not the cause. Between final dot and reply there is one that means nothing yet."""
    usual = cause.cause in {"delivering", "earlier"} and not state.named
    if not state.doubt or state.held or usual:
        return cause
    if state.doubt == REPORT:
        return msgspec.structs.replace(cause, text=f"{cause.text} In doubt: its sender may have been told already.")
    return msgspec.structs.replace(cause, text=f"{cause.text} In doubt: {somebody(state.doubt)} may have it already.")


def _deferred(facts: Facts, index: int, past: Past) -> Cause:
    state, queue_id, now = facts.states[index], facts.envelope.id, facts.now
    due = (facts.view.due if facts.view else 0.0) or facts.due
    blank = msgspec.structs.replace(base(facts, index, past), next_attempt=max(due, now), since=past.last)
    flush = Advice(f"mtad-flush {queue_id}", "tries it now")
    if state.doubt:
        return _doubtful(facts, blank, state.doubt)
    if isinstance(state.outcome, Failed):
        text = "It failed. The report to its sender could not be stored; that is tried again at the next attempt."
        return _answer(blank, "report", text, flush, Advice(f"df -h {facts.spool}", "shows the room that is left"))
    if blank.expires and now >= blank.expires:
        return _answer(
            blank, "expired", "Its time in the queue is over: after one more attempt it goes back to its sender.", flush
        )
    lane = facts.lanes.get(index)
    if lane is not None and lane.suspended_since:
        return suspended(facts, blank, lane)
    if due <= now:
        return _overdue(facts, blank, due)
    if isinstance(state.outcome, Deferred):
        return _put_off(facts, blank, state.outcome, flush)
    return _answer(blank, "untried", "It was not tried yet, and waits for its time.", flush)


def _answer(blank: Cause, cause: CauseName, text: str, *advice: Advice) -> Cause:
    return msgspec.structs.replace(blank, cause=cause, text=text, advice=advice)


def _doubtful(facts: Facts, blank: Cause, host: str) -> Cause:
    queue_id = facts.envelope.id
    again = f"in {in_words(blank.next_attempt - facts.now)}"
    if host == REPORT:
        text = f"In doubt: a process died while it told the sender that this failed. The sender is told again {again}."
        return _answer(blank, "doubt", text, Advice(f"mtad-flush {queue_id}", "tells the sender now"))
    text = f"In doubt: {how_doubtful(host)} It is sent again {again}."
    advice = Advice(f"mtad-flush {queue_id}", "sends it now, perhaps a second time")
    return _answer(blank, "doubt", text, advice, *deletion(facts, host))


def _overdue(facts: Facts, blank: Cause, due: float) -> Cause:
    late = in_words(facts.now - due)
    if facts.scheduler == "silent":
        text = f"It has been due for {late}, and the scheduler does not answer."
        return _answer(blank, "silent", text, Advice("mtad status", "shows the processes"))
    if facts.view is not None and not facts.view.due:
        text = f"It has been due for {late}. The scheduler has not seen it yet: it looks there again within five minutes."
        return _answer(blank, "due", text, Advice(f"mtad-flush {facts.envelope.id}", "tells the scheduler"))
    text = f"It has been due for {late}, and is taken up as soon as the messages in hand leave room."
    return _answer(blank, "due", text, Advice("mtaq watch", "shows what is in hand"))


def _put_off(facts: Facts, blank: Cause, outcome: Deferred, flush: Advice) -> Cause:
    kind, address = kind_of(outcome), blank.recipient
    text = _TEXTS[kind].format(destination=blank.destination, host=outcome.remote or "the server")
    if outcome.text.startswith(SUSPENDED):
        text += " It was put off with the other mail to there, without an attempt of its own."
        blank = msgspec.structs.replace(blank, reason=f"{outcome.status} {outcome.text.removeprefix(SUSPENDED)}")
    probe = Advice(f"mtad explain --to {address} --probe", "connects to its servers, and sends nothing")
    match kind:
        case "dns":
            advice = [Advice(f"mtad explain --to {address}", "asks the DNS now"), flush]
        case "tls":
            weaker = f'after a [[delivery.policy]] with tls = "opportunistic" for {blank.destination}, if that will do'
            advice = [probe, Advice("mtad reload", weaker), flush]
        case "login":
            advice = [Advice("mtad reload", "after you have put the credentials right"), flush]
        case "connect" | "broken":
            advice = [probe, flush]
        case "limited":
            slower = f"after a [[delivery.policy]] with a `rate` or `concurrency` for {blank.destination}, if it goes on"
            advice = [Advice("mtad reload", slower), flush]
        case "mailbox":
            advice = [flush]
        case "machine":
            advice = [Advice(f"df -h {facts.spool}", "shows the room that is left"), flush]
        case _:
            advice = [flush]
    if kind in {"reply", "mailbox"}:
        advice.append(Advice(f"mtaq bounce {facts.envelope.id}", "sends it back to its sender now"))
    return _answer(blank, kind, text, *advice)
