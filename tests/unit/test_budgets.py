"""Budgets: a rate that holds in every window of time, and what the lanes of a group share."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtad.config import Delivery, DeliveryPolicy
from mtad.nexthop import Rate, Rules
from mtad.outcome import Deferred
from mtad.scheduler.budgets import INITIAL_WINDOW, Bucket, Budget
from mtad.scheduler.lane import Lane, LaneKey
from mtad.scheduler.lanes import IDLE_LANE, MEMORY, REMEMBERED, Lanes
from mtad.scheduler.line import LaneJob
from mtad.scheduler.memory import Memory
from tests.unit.lanes_aid import BUSY, DEAD, drain, job, key, lanes_of, take

Taken = tuple[Lane, LaneJob]


def starts(bucket: Bucket, count: int, begin: float = 0.0) -> list[float]:
    """When so many jobs start that have all been waiting since ``begin``."""
    now, found = begin, []
    for _ in range(count):
        now = max(now, bucket.opens)
        bucket.take(now)
        found.append(now)
    return found


# -- rates ------------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.integers(1, 300), st.floats(0.1, 3600), st.lists(st.floats(0, 2), max_size=20))
def test_a_rate_holds_in_every_window_of_its_time(count: int, seconds: float, pauses: list[float]) -> None:
    # Invariant: whenever jobs come and in whatever numbers, no window of the rate's time has more of them than the rate.
    bucket = Bucket(Rate(count, seconds, ""))
    found = starts(bucket, count + 5)
    for pause in pauses:
        found += starts(bucket, max(1, count // 3), found[-1] + pause * seconds)
    for first, after in zip(found, found[count:], strict=False):
        assert after - first >= seconds * 0.999999


def test_a_tenth_of_a_rate_starts_at_once_and_the_rest_is_spread() -> None:
    found = starts(Bucket(Rate(100, 60.0, "")), 101)
    assert found[9] == 0.0
    steps = {round(after - before, 6) for before, after in itertools.pairwise(found[9:])}
    assert steps == {round(60 / 91, 6)}
    assert found[100] == pytest.approx(60.0)
    assert starts(Bucket(Rate(1, 5.0, "")), 3) == [0.0, 5.0, 10.0]


def test_a_job_that_did_not_start_does_not_count() -> None:
    bucket = Bucket(Rate(1, 5.0, ""))
    bucket.take(100.0)
    before = bucket.opens
    bucket.take(before)
    bucket.undo()
    assert bucket.opens == before == 105.0


def test_a_lane_starts_as_many_as_its_rate_allows() -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(domain=("a",), rate="2/1s"))
    for number in range(5):
        lanes.add(key("a"), job(str(number)), 0.0)
    lanes.add(key("b"), job("b"), 0.0)
    assert [taken.message.id for _, taken in drain(lanes)] == ["0", "b"], "the others do not wait for it"
    assert lanes.wait(0.0) == 0.5
    assert lanes.wait(0.4) == pytest.approx(0.1)
    assert lanes.take(0.4) is None
    assert take(lanes, 0.5)[1].message.id == "1"
    assert lanes.take(0.9) is None
    assert lanes.take(1.0) is not None


def test_a_lane_that_waits_for_its_rate_costs_nothing() -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(domain=(".slow",), rate="1/1h"))
    for number in range(2000):
        lanes.add(key(f"{number}.slow"), job(), 0.0)
        lanes.add(key(f"{number}.slow"), job(), 0.0)
    assert len(drain(lanes)) == 2000
    assert len(lanes._ring) == 0
    assert len(lanes._timers) == 2000
    lanes.add(key("fast"), job("fast"), 1.0)
    assert take(lanes, 1.0)[1].message.id == "fast"
    assert len(lanes._timers) == 2000, "nobody was looked at again"


@pytest.mark.parametrize("policy", [{"domain": ("a",)}, {"mx": (".big.test",), "domain": ("a", "b")}])
def test_no_more_wait_for_a_rate_than_it_lets_go_until_they_are_back(policy: dict[str, Any]) -> None:
    rules = Rules(Delivery(policy=(DeliveryPolicy(rate="100/1m", **policy),)))
    lanes = Lanes(rules, 60.0, horizon=600.0)
    allowed = 10 + 910
    answers = [lanes.add(key("b" if "mx" in policy and number % 2 else "a"), job(), 0.0) for number in range(allowed + 1)]
    assert answers[:-1] == [None] * allowed
    assert answers[-1] is not None
    assert "100/1m" in answers[-1].text
    assert lanes.add(key("a"), job(), 0.0, urgent=True) is None
    lane, taken = take(lanes)
    lanes.give_back(lane, taken)
    assert lanes.add(key("a"), job(), 0.0) is not None
    drain(lanes)
    assert [lanes.add(key("a"), job(), 0.0) is None for _ in range(6)] == [True] * 4 + [False] * 2, (
        "five went, one was urgent"
    )


def test_a_group_knows_how_many_wait_in_its_lanes() -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(mx=(".big.test",), domain=("a",)), DeliveryPolicy(mx=("mx.small.test",)))
    for name in "aab":
        for _ in range(7):
            lanes.add(key(name), job(), 0.0)
    (lane, first), (other, second), *rest = drain(lanes)
    lanes.done(other, second, 0.0, host="mx.small.test")
    lanes.done(lane, first, 0.0, host="mx.small.test")
    counts = {shared.group.name: shared.waiting for shared in lanes._shared.values()}
    waiting = {shared.group.name: 0 for shared in lanes._shared.values()}
    for each in lanes:
        assert each.shared is not None
        waiting[each.shared.group.name] += len(each.waiting)
    assert counts == waiting
    rest += drain(lanes)
    while rest:
        lanes.done(*rest.pop(), 0.0, failure=DEAD, host="mx.small.test")
        rest += drain(lanes)
    assert lane.suspended
    assert [shared.waiting for shared in lanes._shared.values()] == [0, 0]


def test_nothing_is_waited_for_that_nobody_limits() -> None:
    lanes = lanes_of(1)
    lanes.add(key("a"), job(), 0.0)
    lanes.add(key("a"), job(), 0.0)
    assert len(drain(lanes)) == 1
    assert lanes.wait(0.0) is None


@pytest.mark.parametrize("how", ["give_back", "cancel"])
def test_what_was_not_started_is_not_counted(how: str) -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(domain=("a",), rate="1/1h"))
    for name in ("one", "two"):
        lanes.add(key("a"), job(name), 0.0)
    getattr(lanes, how)(*take(lanes))
    assert take(lanes)[1].message.id == ("one" if how == "give_back" else "two")
    assert lanes.take(0.0) is None


def test_a_lane_with_a_rate_is_remembered_as_long_as_that_counts() -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(domain=("a",), rate="1/1h"))
    lanes.add(key("a"), job(), 0.0)
    lanes.done(*take(lanes), 1.0)
    lanes.forget(3599.0)
    lanes.add(key("a"), job(), 3599.0)
    assert lanes.take(3599.0) is None
    assert lanes.wait(3599.0) == 1.0
    lanes.done(*take(lanes, 3600.0), 3600.0)
    lanes.forget(7200.1 + IDLE_LANE)
    assert len(lanes) == 0


def test_a_policy_has_its_own_concurrency() -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(domain=("a",), concurrency=2), DeliveryPolicy(domain=("b",), concurrency=50))
    for number in range(100):
        for name in "abc":
            lanes.add(key(name), job(str(number)), 0.0)
    flying: dict[str, list[Taken]] = {"a": [], "b": [], "c": []}
    for taken in drain(lanes):
        flying[taken[0].key.destination].append(taken)
    assert {name: len(jobs) for name, jobs in flying.items()} == {"a": 2, "b": INITIAL_WINDOW, "c": INITIAL_WINDOW}
    for _ in range(60):
        for jobs in flying.values():
            if jobs:
                lanes.done(*jobs.pop(0), 0.0)
        for taken in drain(lanes):
            flying[taken[0].key.destination].append(taken)
    assert {name: next(iter(jobs))[0].budget.window for name, jobs in flying.items() if jobs}["b"] == 50


# -- groups -----------------------------------------------------------------------------------------------------------

BIG = DeliveryPolicy(mx=(".big.test",), domain=("member",), concurrency=3)


def learn(lanes: Lanes, *names: str, now: float = 0.0, host: str = "mx.big.test") -> None:
    """Let a first job for each of these domains say who takes their mail."""
    for name in names:
        lanes.add(key(name), job("first"), now)
    for taken in drain(lanes, now):
        lanes.done(*taken, now, host=host)


def in_flight(taken: list[Taken]) -> dict[str, int]:
    """How many jobs of each lane."""
    names = [lane.key.destination for lane, _ in taken]
    return {name: names.count(name) for name in names}


def test_the_domains_of_one_exchanger_share_its_limits() -> None:
    lanes = lanes_of(20, 60.0, BIG)
    names = [f"d{number}" for number in range(10)]
    learn(lanes, *names)
    learn(lanes, "other", host="mx.other.test")
    for name in [*names, "member", "other"]:
        for number in range(10):
            lanes.add(key(name), job(str(number)), 0.0)
    flying = drain(lanes)
    assert in_flight(flying) == {"d0": 1, "other": 6, "d1": 1, "d2": 1}, "three of the group, in turn"
    order = []
    while flying:
        lane, ended = flying.pop(0)
        lanes.done(lane, ended, 1.0, host="mx.other.test" if lane.key.destination == "other" else "mx.big.test")
        new = drain(lanes, 1.0)
        flying += new
        order += [lane.key.destination for lane, _ in new]
        group = [lane for lane, _ in flying if lane.key.destination != "other"]
        assert len(group) <= 3
    assert [name for name in order if name != "other"][:9] == [*names[3:], "member", "d0"]
    assert len(order) == 10 * 12 - 9


def test_who_takes_the_mail_of_a_domain_is_found_out_by_one_job() -> None:
    lanes = lanes_of(20, 60.0, BIG)
    for _ in range(9):
        lanes.add(key("new"), job(), 0.0)
    [(lane, first)] = drain(lanes)
    lanes.release(lane, first, 0.0)
    [(lane, second)] = drain(lanes)
    lanes.done(lane, second, 0.0, failure=DEAD)
    [(lane, third)] = drain(lanes)
    lanes.done(lane, third, 0.0, host="mx.elsewhere.test")
    assert len(drain(lanes)) == INITIAL_WINDOW


def test_that_is_remembered_for_a_day_also_without_the_lane() -> None:
    lanes = lanes_of(20, 60.0, BIG)
    learn(lanes, "d")
    lanes.forget(1000.0)
    assert len(lanes) == 0
    for _ in range(9):
        lanes.add(key("d"), job(), 1000.0)
    assert len(drain(lanes, 1000.0)) == 3
    late = REMEMBERED + 10.0
    fresh = lanes_of(20, 60.0, BIG)
    learn(fresh, "d")
    fresh.forget(late)
    for _ in range(9):
        fresh.add(key("d"), job(), late)
    assert len(drain(fresh, late)) == 1


def test_a_domain_that_moves_to_another_exchanger_changes_its_group() -> None:
    lanes = lanes_of(20, 60.0, BIG, DeliveryPolicy(mx=("mx.small.test",), concurrency=1))
    learn(lanes, "d")
    for _ in range(20):
        lanes.add(key("d"), job(), 0.0)
    flying = drain(lanes)
    assert len(flying) == 3
    lanes.done(*flying.pop(), 0.0, host="mx.small.test")
    assert len(drain(lanes)) == 1, "of the new group; the others still count in the old one"
    for ended in flying:
        lanes.release(*ended, 0.0)
    assert [shared.budget.in_flight for shared in lanes._shared.values()] == [0, 1]


def test_the_rate_of_a_group_is_one_for_all_and_counts_who_was_not_known() -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(mx=(".big.test",), rate="6/6s"))
    for name in ("a", "b", "c"):
        lanes.add(key(name), job(), 0.0)
    for taken in drain(lanes):
        lanes.done(*taken, 0.0, host="mx.big.test")
    for name in ("a", "b", "c", "a"):
        lanes.add(key(name), job(), 0.0)
    assert lanes.take(0.0) is None
    assert lanes.wait(0.0) == 3.0
    assert lanes.take(2.9) is None
    order = []
    for now in (3.0, 4.0, 5.0, 6.0):
        [(lane, _)] = drain(lanes, now)
        order.append(lane.key.destination)
    assert sorted(order[:3]) == ["a", "b", "c"]


def test_one_dead_domain_does_not_suspend_the_others_of_its_exchanger() -> None:
    lanes = lanes_of(20, 60.0, BIG)
    learn(lanes, "dead", "alive")
    while (lane := lanes.get(key("dead"))) is not None and not lane.suspended:
        lanes.add(key("dead"), job(), 0.0)
        lanes.done(*take(lanes), 0.0, failure=DEAD, host="mx.big.test")
    lanes.add(key("alive"), job("alive"), 0.0)
    lane, ended = take(lanes)
    assert ended.message.id == "alive"
    assert lane.shared is not None
    assert lane.shared.budget.window == 1


def test_too_many_connections_is_said_to_all_of_a_group() -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(mx=(".big.test",)))
    learn(lanes, "a", "b")
    for _ in range(20):
        lanes.add(key("a"), job(), 0.0)
        lanes.add(key("b"), job(), 0.0)
    flying = drain(lanes)
    assert len(flying) == 7
    for ended in flying:
        lanes.done(*ended, 1.0, failure=BUSY, less=BUSY, host="mx.big.test")
    assert len(drain(lanes, 2.0)) == 3


def test_a_lane_of_a_group_keeps_its_own_rate() -> None:
    lanes = lanes_of(20, 60.0, DeliveryPolicy(domain=("slow",), rate="1/10s"), DeliveryPolicy(mx=(".big.test",)))
    learn(lanes, "slow", "fast")
    for _ in range(3):
        lanes.add(key("slow"), job("slow"), 1.0)
        lanes.add(key("fast"), job("fast"), 1.0)
    assert [taken.message.id for _, taken in drain(lanes, 1.0)] == ["fast", "fast", "fast"]
    assert lanes.wait(1.0) == 9.0
    assert [taken.message.id for _, taken in drain(lanes, 10.0)] == ["slow"]


def test_a_job_of_a_group_that_is_given_back_is_the_next() -> None:
    lanes = lanes_of(20, 60.0, BIG)
    learn(lanes, "a", "b")
    for name in ("a", "b", "c"):
        lanes.add(key(name), job(name), 1.0)
    lane, taken = take(lanes, 1.0)
    lanes.give_back(lane, taken)
    assert take(lanes, 1.0) == (lane, taken)


def test_local_mail_has_no_group() -> None:
    lanes = lanes_of(20, 60.0, BIG)
    for _ in range(9):
        lanes.add(LaneKey("local", ""), job(), 0.0)
    lane, ended = take(lanes)
    lanes.done(lane, ended, 0.0, host="local")
    assert len(drain(lanes)) == INITIAL_WINDOW + 1


def test_how_many_recipients_a_job_has_depends_on_who_takes_it() -> None:
    policies = (DeliveryPolicy(mx=(".big.test",), recipients=5), DeliveryPolicy(domain=("own",), recipients=7))
    lanes = Lanes(Rules(Delivery(destination_recipients=9, policy=policies)), 60.0)
    assert [lanes.recipients(key(name), 0.0) for name in ("own", "a")] == [7, 9]
    learn(lanes, "own", "a")
    assert [lanes.recipients(key(name), 0.0) for name in ("own", "a")] == [5, 5]


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_in_time_and_number() -> None:
    memory: Memory[str, int] = Memory(3, 10.0)
    for number, name in enumerate("abcd"):
        memory.learn(name, number, float(number))
    assert (len(memory), memory.get("a", 4.0), memory.get("b", 4.0)) == (3, None, 1)
    memory.learn("b", 9, 5.0)
    assert (memory.get("b", 14.9), memory.get("b", 15.0)) == (9, None)
    assert (memory.until("c", 5.0), memory.until("c", 12.0), memory.until("z", 5.0)) == (12.0, 0.0, 0.0)
    memory.forget(13.0)
    assert len(memory) == 1
    memory.learn("e", 1, 13.0)
    assert memory.get("b", 13.0) == 9
    assert MEMORY <= 100_000


def test_a_window_is_never_above_its_limit() -> None:
    budget = Budget(3)
    assert budget.window == 3
    budget.failed(Deferred("4.4.1", "x"), 0)
    for _ in range(5):
        budget.succeeded(0.0)
    assert budget.window == 3
