"""Lanes (issue 4): what a destination gets at a time and in a time, by itself or with all others of its exchanger, and that
a big mailing and single messages do not keep each other waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_fairness import fill
from tests.e2e.world import World
from tests.peers.mx import Mx, Say, Script
from tests.peers.script import Action, Actions
from tests.site import await_value

#: A server that takes its time between MAIL and the content: so long a message is under way.
SLOW = Script(data=Say("354 End data with <CR><LF>.<CR><LF>", delay=0.1))


class Watched(Mx):
    """An exchanger that remembers when each message came, and how many were under way at a time.

    With ``most`` it greets no more connections than that.
    """

    peak = 0
    most = 1000
    refused = 0

    def note(self, change: Callable[[], None]) -> None:
        """See `Mx.note`."""
        super().note(change)
        with self._condition:
            self.peak = max(self.peak, sum(not transaction.reply for transaction in self.transactions))

    def action(self, key: str, actions: Actions | None) -> Action | None:
        """See `Mx.action`."""
        if key == "greeting" and self.open_connections > self.most:
            self.refused += 1
            return Say("421 4.7.0 Too many connections from your host", close=True)
        return super().action(key, actions)


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    """A world whose site is not started yet; the parameter has the settings of its deliveries."""
    delivery: dict[str, Any] = getattr(request, "param", {})
    with World(tmp_path, start=False, delivery=delivery, processes={"stop_timeout": "100ms"}) as world:
        yield world


def watched(world: World, script: Script | None = None) -> Watched:
    mx = Watched(world.address(), world.port, script)
    world._stack.enter_context(mx)
    return mx


def policy(**settings: Any) -> dict[str, Any]:
    return {"policy": [settings]}


@pytest.mark.parametrize("world", [policy(domain=["slow.test"], rate="10/1s")], indirect=True)
def test_a_rate_holds_and_nobody_else_waits_for_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """messages per time"""
    slow, other = watched(world), world.mx()
    world.domain(slow, name="slow.test")
    free = world.domain(other)
    fill(world, ["slow.test"], 25, monkeypatch)
    world.site.start()
    slow.await_messages(1)
    begin = time.monotonic()
    for number in range(1, 6):
        world.send(f"b@{free}")
        other.await_messages(number)
        assert number > 1 or len(slow.messages) < 25, "it came before they were done"
    slow.await_messages(25, timeout=30)
    passed = time.monotonic() - begin
    assert 1.5 <= passed < 20, "24 more of them, ten in a second"
    world.site.await_empty_queue()


@pytest.mark.parametrize("world", [policy(domain=["few.test"], concurrency=3)], indirect=True)
def test_no_more_are_under_way_than_the_policy_allows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """concurrency"""
    few, many = watched(world, SLOW), watched(world, SLOW)
    world.domain(few, name="few.test")
    fill(world, ["few.test", world.domain(many)], 48, monkeypatch)
    world.site.start()
    few.await_messages(24)
    many.await_messages(24)
    assert few.peak == 3
    assert many.peak > 5, "its window has opened"


@pytest.mark.parametrize(
    "world", [{"destination_concurrency": 1, **policy(domain=["list.test"], recipients=2)}], indirect=True
)
def test_a_big_mailing_and_single_messages_take_turns(world: World) -> None:
    """the recipients of one big mailing in turn with single messages so that neither starves the other [...] recipients per
    message"""
    mx = watched(world, Script(data=Say("354 Go on", delay=0.02)))
    world.domain(mx, name="list.test")
    world.site.start()
    world.send(*(f"u{number}@list.test" for number in range(200)))
    mx.await_messages(3)
    before = len(mx.messages)
    for number in range(10):
        world.send(f"single{number}@list.test")
    mx.await_messages(110, timeout=20.0)
    order = [taken.recipients[0].startswith("single") for taken in mx.messages]
    last = max(place for place, single in enumerate(order) if single)
    assert last < 60, "not behind the mailing"
    assert order[before : last + 1].count(False) >= 9, "nor the other way round"
    assert {len(taken.recipients) for taken in mx.messages} == {1, 2}
    assert mx.peak == 1


@pytest.mark.parametrize("world", [policy(mx=[".big.test"], concurrency=2)], indirect=True)
def test_domains_with_one_exchanger_share_its_limit(world: World) -> None:
    """also grouped by the MX that serves many domains"""
    mx = watched(world, SLOW)
    world.host("mx.big.test", mx)
    domains = [f"tenant{number}.test" for number in range(4)]
    for domain in domains:
        world.dns.set(domain, {"MX": ["10 mx.big.test."]})
    world.site.start()
    for number, domain in enumerate(domains, 1):  # one by one it is found out who takes their mail
        world.send(f"a@{domain}")
        mx.await_messages(number)
    world.site.await_empty_queue()
    for number in range(16):
        world.send(f"u{number}@{domains[number % 4]}")
    mx.await_messages(20)
    assert mx.peak == 2


@pytest.mark.parametrize("world", [{"connection_idle": "0s"}], indirect=True)
def test_too_many_connections_are_not_made_again_and_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """shrinks [...] with replies that say so (421, 4.7.x "too many connections")"""
    mx = watched(world, SLOW)
    mx.most = 2
    fill(world, [world.domain(mx)], 30, monkeypatch)
    world.site.start()
    await_value(lambda: not world.site.files("incoming") and not world.site.files("active"), what="all were tried")
    assert 1 <= mx.refused <= 8, "the first ones, and hardly any later"
    assert len(mx.messages) == 30 - mx.refused
    reasons = {recipient["delay_reason"] for row in world.site.queue() for recipient in row["recipients"]}
    assert all("Too many connections" in reason for reason in reasons), "none was put off for another one's sake"


@pytest.mark.parametrize("world", [policy(domain=["one.test"], messages=2)], indirect=True)
def test_a_connection_gets_so_many_messages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """messages per connection"""
    mx = watched(world)
    world.domain(mx, name="one.test")
    fill(world, ["one.test"], 12, monkeypatch)
    world.site.start()
    taken = mx.await_messages(12)
    numbers = [message.connection for message in taken]
    assert max(numbers.count(number) for number in set(numbers)) == 2


@pytest.mark.parametrize("world", [policy(domain=["hour.test"], rate="1/1h")], indirect=True)
def test_a_lane_that_waits_for_its_rate_costs_no_time_of_the_processor(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane limited by rate costs nothing while it waits."""
    mx = watched(world)
    world.domain(mx, name="hour.test")
    fill(world, ["hour.test"], 100, monkeypatch)
    world.site.start()
    mx.await_messages(1)
    await_value(lambda: len(world.site.files("active")) == 99)
    [scheduler] = world.site.pids("scheduler")

    def ticks() -> int:
        fields = Path(f"/proc/{scheduler}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    threading.Event().wait(0.3)  # what it has to do at the start
    before = ticks()
    threading.Event().wait(1.0)
    assert ticks() - before <= 5, "hundredths of a second"
    assert len(mx.messages) == 1
