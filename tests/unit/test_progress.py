"""Progress: the records of a message, folded into one state per recipient. Nothing is ever taken back."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.progress import REPORT, Doubt, Event, Named, RecipientState, Reported, replay

SENT: Final = Delivered("2.0.0", "sent")
LATER: Final = Deferred("4.4.1", "timed out")
NEVER: Final = Failed("5.1.1", "no such user")

_indexes = st.lists(st.integers(0, 3), max_size=4).map(tuple)
_outcomes: st.SearchStrategy[Outcome] = st.sampled_from([SENT, LATER, NEVER])
_events: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        Attempt,
        st.just(1.0),
        st.lists(st.tuples(st.integers(0, 3), _outcomes), max_size=4).map(tuple),
        st.sampled_from(["mx", ""]),
    ),
    st.builds(Doubt, st.just(1.0), _indexes, st.just("mx")),
    st.builds(Reported, st.just(1.0), _indexes, st.just("id")),
)


def attempt(*outcomes: tuple[int, Outcome]) -> Attempt:
    """An attempt at a host with these outcomes."""
    return Attempt(1.0, outcomes, "mx.example.net")


def test_without_events_nobody_was_tried() -> None:
    assert replay(3, []) == (RecipientState(),) * 3
    assert replay(0, []) == ()
    assert not RecipientState().settled


def test_the_last_outcome_counts() -> None:
    states = replay(2, [attempt((0, LATER), (1, LATER)), attempt((1, SENT))])
    assert [state.outcome for state in states] == [LATER, SENT]
    assert [state.settled for state in states] == [False, True]


def test_a_failure_is_settled_once_its_sender_was_told() -> None:
    assert not replay(1, [attempt((0, NEVER))])[0].settled
    (state,) = replay(1, [attempt((0, NEVER)), Reported(2.0, (0,), "id")])
    assert (state.settled, state.reported, state.outcome) == (True, True, NEVER)


@pytest.mark.parametrize("after", [attempt((0, LATER)), attempt((0, NEVER)), Doubt(2.0, (0,), "mx")])
def test_promise_4_a_delivered_recipient_stays_delivered(after: Event) -> None:
    assert replay(1, [attempt((0, SENT)), after]) == (RecipientState(SENT),)


@pytest.mark.parametrize("after", [attempt((0, LATER)), attempt((0, SENT)), Doubt(2.0, (0,), "mx")])
def test_a_reported_failure_stays_reported(after: Event) -> None:
    events: list[Event] = [attempt((0, NEVER)), Reported(2.0, (0,), "id"), after]
    assert replay(1, events) == (RecipientState(NEVER, reported=True),)


def test_promise_4_a_doubt_stays_until_an_attempt_resolves_it() -> None:
    doubt = Doubt(1.0, (0, 1), "mx.example.net")
    states = replay(3, [attempt((0, LATER)), doubt])
    assert [state.doubt for state in states] == ["mx.example.net", "mx.example.net", ""]
    assert [state.outcome for state in states] == [LATER, None, None]
    assert not any(state.settled for state in states)
    states = replay(3, [doubt, attempt((1, LATER), (2, LATER))])
    assert [state.doubt for state in states] == ["mx.example.net", "", ""]


def test_a_report_of_a_delay_leaves_no_doubt_behind() -> None:
    [state] = replay(1, [attempt((0, LATER)), Doubt(1.0, (0,), REPORT), Named(1.0, (0,), hold=False)])
    assert (state.doubt, state.named) == (REPORT, True)
    [state] = replay(
        1, [attempt((0, LATER)), Doubt(1.0, (0,), REPORT), Named(1.0, (0,), hold=False), Reported(1.0, (0,), "id", "delay")]
    )
    assert (state.doubt, state.named, state.warned) == ("", False, True)


def test_a_report_of_a_delay_does_not_let_go_who_is_held_and_one_of_a_failure_is_in_doubt_itself() -> None:
    held: list[Event] = [Doubt(1.0, (0,), "mx"), Named(1.0, (0,), hold=True)]
    [state] = replay(1, [*held, Doubt(1.0, (0,), REPORT), Reported(1.0, (0,), "id", "delay")])
    assert (state.doubt, state.held, state.warned) == ("mx", True, True)
    failed = Attempt(1.0, ((0, NEVER),))
    [state] = replay(1, [*held, failed, Doubt(1.0, (0,), REPORT)])
    assert (state.doubt, state.held) == (REPORT, False)


def test_recipients_do_not_mix() -> None:
    states = replay(1000, [attempt((999, SENT)), Reported(1.0, (500,), "id")])
    assert [number for number, state in enumerate(states) if state.settled] == [500, 999]


@pytest.mark.parametrize("event", [attempt((2, SENT)), Doubt(1.0, (2,), "mx"), Reported(1.0, (2,), "id")])
def test_an_event_for_nobody_is_an_error(event: Event) -> None:
    with pytest.raises(IndexError):
        replay(2, [event])


@given(st.lists(_events, max_size=12), st.lists(_events, max_size=12))
def test_nothing_is_ever_taken_back(before: list[Event], after: list[Event]) -> None:
    for earlier, later in zip(replay(4, before), replay(4, before + after), strict=True):
        if earlier.settled:
            assert later.settled
            assert later.outcome == earlier.outcome
        if earlier.reported:
            assert later.reported


@given(st.lists(_events, max_size=12))
def test_states_tell_what_the_events_say(events: list[Event]) -> None:
    # The fold again, one recipient at a time and told differently: the first thing that settles it ends the story.
    for index, state in enumerate(replay(4, events)):
        outcome: Outcome | None = None
        reported, doubt = False, ""
        for event in events:
            settled = reported or isinstance(outcome, Delivered)
            if isinstance(event, Reported):
                if index in event.recipients:
                    reported, doubt = True, ""
            elif isinstance(event, Doubt):
                if index in event.recipients and not settled:
                    doubt = event.host
            elif isinstance(event, Attempt):
                for place, result in event.outcomes:
                    if place == index and not (reported or isinstance(outcome, Delivered)):
                        kept = event.host == "" and isinstance(result, Deferred)
                        outcome, doubt = result, doubt if kept else ""
        assert (state.outcome, state.reported, state.doubt) == (outcome, reported, doubt)
