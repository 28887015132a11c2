"""The agenda: who is due, compared with a picture of it that is too simple to be wrong."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mtad.scheduler.agenda import Agenda


def test_the_one_that_is_due_the_longest_comes_first() -> None:
    agenda = Agenda()
    for name, when in (("b", 2.0), ("a", 1.0), ("c", 3.0)):
        agenda.set(name, when)
    assert agenda.next_time() == 1.0
    assert [agenda.pop(2.0) for _ in range(3)] == ["a", "b", None]
    assert "c" in agenda
    assert len(agenda) == 1


def test_setting_a_time_again_overrules() -> None:
    agenda = Agenda()
    agenda.set("a", 10.0)
    agenda.set("a", 1.0)
    agenda.set("b", 1.0)
    agenda.set("b", 20.0)
    assert agenda.pop(15.0) == "a"
    assert agenda.pop(15.0) is None
    assert agenda.next_time() == 20.0


def test_what_was_dropped_is_never_due() -> None:
    agenda = Agenda()
    agenda.set("a", 1.0)
    agenda.drop("a")
    agenda.drop("never there")
    assert agenda.pop(5.0) is None
    assert agenda.next_time() is None


def test_memory_goes_with_the_messages_and_not_with_how_often_they_were_set() -> None:
    agenda = Agenda()
    for round_number in range(200):
        for number in range(100):
            agenda.set(f"m{number}", float(round_number * 7 % 31 + number))
    assert len(agenda) == 100
    assert len(agenda._heap) <= 1025
    assert sorted(filter(None, (agenda.pop(1e9) for _ in range(200)))) == sorted(f"m{number}" for number in range(100))


Step = st.one_of(
    st.tuples(st.just("set"), st.sampled_from("abcdef"), st.integers(0, 9)),
    st.tuples(st.just("drop"), st.sampled_from("abcdef"), st.just(0)),
    st.tuples(st.just("pop"), st.just(""), st.integers(0, 9)),
)


@given(st.lists(Step, max_size=60))
def test_it_is_a_table_of_times(steps: list[tuple[str, str, int]]) -> None:
    # Invariant: a pop takes an entry with the smallest time out of the table, if that time has come.
    agenda, table = Agenda(), dict[str, float]()
    for verb, name, when in steps:
        if verb == "set":
            agenda.set(name, float(when))
            table[name] = float(when)
        elif verb == "drop":
            agenda.drop(name)
            table.pop(name, None)
        else:
            found = agenda.pop(float(when))
            earliest = min(table.values(), default=None)
            if earliest is None or earliest > when:
                assert found is None
            else:
                assert found is not None
                assert table.pop(found) == earliest
        assert len(agenda) == len(table)
        assert agenda.next_time() == min(table.values(), default=None)
