"""The line of a lane: by arrival, mailings in turn, and how many stand before a job."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mtad.scheduler.line import LaneJob, Line
from tests.unit.lanes_aid import job, mailing


def fill(line: Line, sizes: list[int]) -> list[LaneJob]:
    """Messages with so many jobs each, in order of arrival."""
    found = []
    for number, size in enumerate(sizes):
        for one in mailing(str(number), size):
            one.since = float(number)
            line.append(one)
            found.append(one)
    return found


@settings(max_examples=150)
@given(st.lists(st.integers(1, 5), max_size=8), st.integers(0, 12), st.booleans())
def test_how_many_come_before_a_job_is_what_comes_before_it(sizes: list[int], taken: int, back: bool) -> None:
    # Invariant: `of` tells for each job of each message the place at which it is served if nothing else arrives.
    line = Line()
    jobs = fill(line, sizes)
    for _ in range(min(taken, len(jobs))):
        last = line.popleft()
        jobs.remove(last)
        if back:
            line.put_back(last)
            assert line.popleft() is last
    if back and jobs:
        line.put_back(line.popleft())
    told = {}
    for message in {one.message for one in jobs}:
        told.update({id(one): place for one, place in line.of(message)})
    assert len(line) == len(jobs)
    assert line.oldest() == min((one.since for one in jobs), default=0.0)
    served = [id(line.popleft()) for _ in range(len(line))]
    assert [told[one] for one in served] == list(range(len(jobs)))
    assert sorted(served) == sorted(map(id, jobs))
    assert len(line) == 0


@given(st.lists(st.integers(1, 5), max_size=8))
def test_all_are_handed_back_once(sizes: list[int]) -> None:
    line = Line()
    jobs = fill(line, sizes)
    if jobs:
        line.put_back(line.popleft())
    assert set(map(id, line)) == set(map(id, jobs))
    assert sorted(map(id, line.empty())) == sorted(map(id, jobs))
    assert len(line) == len(list(line)) == 0
    line.append(job("later"))
    assert line.popleft().message.id == "later"


@given(st.integers(1, 200), st.integers(0, 50))
def test_a_mailing_delays_a_single_message_by_as_much_again_at_most(size: int, before: int) -> None:
    line = Line()
    fill(line, [size] + [1] * before)
    single = job("single")
    line.append(single)
    [(_, ahead)] = line.of(single.message)
    assert ahead <= 2 * (before + 1)
