"""Deciding (issue 2): when a message is tried, tried again, and given up; over real processes."""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mtad.spool.queues import Queue
from tests.e2e.world import MESSAGE, SENDER, Report, World, await_gone
from tests.peers.mx import Say, Script
from tests.site import await_value

#: Seconds between two scans of incoming, see `mtad.scheduler.process`: what is much faster was not found by one.
SCAN = 5.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One site for the tests that leave its settings alone; each has domains and addresses of its own."""
    with World(tmp_path_factory.mktemp("world")) as world:
        yield world


def test_a_new_message_is_under_way_within_milliseconds(world: World) -> None:
    """A new message is under way within milliseconds of its `250`, without waiting for a scan."""
    mx = world.mx()
    domain = world.domain(mx)
    delays = []
    with world.site.client("relay") as client:
        for number in range(1, 61):
            client.sendmail(SENDER, f"b@{domain}", MESSAGE)
            accepted = time.monotonic()
            mx.await_messages(number)
            delays.append(time.monotonic() - accepted)
    assert statistics.median(delays) < SCAN / 5, "a scan is no explanation"


def test_a_new_local_message_is_stored_within_milliseconds(world: World) -> None:
    """A new message is under way within milliseconds of its `250`: the same for local mail"""
    delays = []
    with world.site.client() as client:
        for number in range(1, 41):
            client.sendmail("a@sender.test", "bob@example.org", MESSAGE)
            accepted = time.monotonic()
            world.site.await_mail("bob", number)
            delays.append(time.monotonic() - accepted)
    assert statistics.median(delays) < SCAN / 5


def test_a_message_whose_wake_up_was_lost_is_found(world: World) -> None:
    """Design 1: a wake-up datagram that may be lost: the scan finds the message anyway"""
    mx = world.mx()
    domain = world.domain(mx)
    placed = {world.place(Queue.INCOMING, f"u{number}@{domain}") for number in range(3)}
    mx.await_messages(3, timeout=2 * SCAN)
    for queue_id in placed:
        world.site.await_log(rf"{queue_id}: removed")


def later(world: World, queue_id: str, than: float) -> float | None:
    """When the next attempt of a message is, once that is after ``than``; it may be on the move at any moment."""
    with closing(world.site.spool()) as spool:
        return next((due for name, due in spool.times(Queue.DEFERRED) if name == queue_id and due > than), None)


def test_the_next_attempt_is_after_the_time_already_spent_in_the_queue(tmp_path: Path) -> None:
    """Deferred: next attempt after the time already spent in the queue, clamped to minimum and maximum, with jitter."""
    ages = {"young": 0.0, "middle": 1000.0, "old": 20_000.0}
    waits = {"young": 300.0, "middle": 1000.0, "old": 4000.0}
    with World(tmp_path, start=False) as world:
        domain = world.domain(world.address())
        now = time.time()
        ids = {name: world.place(Queue.DEFERRED, f"b@{domain}", arrival=now - age, due=now) for name, age in ages.items()}
        world.site.start()
        for name, queue_id in ids.items():
            due = await_value(lambda wanted=queue_id: later(world, wanted, now + 100))  # type: ignore[misc]
            wait = due - time.time()
            assert waits[name] - 30 <= wait <= waits[name] * 1.1 + 30, name


def test_what_was_deferred_together_does_not_come_back_together(world: World) -> None:
    """Deferred: [...] with jitter."""
    domain = world.domain(world.address())
    ids = [world.send(f"b@{domain}") for _ in range(25)]
    await_value(lambda: set(ids) <= set(world.site.files("deferred")))
    due = [(world.site.spool_path / "deferred" / queue_id).stat().st_mtime for queue_id in ids]
    sent = time.time()
    assert max(due) - min(due) > 3, "up to 30 of 300 seconds"
    assert all(sent + 280 < when < sent + 335 for when in due)


def test_a_deferred_message_is_tried_again_with_growing_gaps(tmp_path: Path) -> None:
    """Deferred: next attempt after the time already spent in the queue: it doubles by itself"""
    with World(tmp_path, retry={"minimum": "200ms"}) as world:
        mx = world.mx(Script(dot=Say("451 4.3.0 later")))
        queue_id = world.send(f"b@{world.domain(mx)}")

        def started() -> list[float]:
            try:
                found = [attempt.started for attempt in world.attempts(Queue.DEFERRED, queue_id)]
            except FileNotFoundError:  # it is being tried
                return []
            return found[:5] if len(found) >= 5 else []

        times = await_value(started, what="it was tried five times")
        mx.script = Script()
        mx.await_messages(1, timeout=30)
        await_gone(world, queue_id)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps[0] >= 0.15
    assert gaps[3] > 1.5 * gaps[2] > 1.5 * 1.2 * gaps[1]


def test_past_its_lifetime_in_any_queue_it_bounces(tmp_path: Path) -> None:
    """Past its lifetime in *any* queue it bounces."""
    with World(tmp_path, start=False) as world:
        domain = world.domain(world.address())
        arrival = time.time() - 6 * 86400
        queues = (Queue.INCOMING, Queue.ACTIVE, Queue.DEFERRED)
        ids = [world.place(queue, f"{queue.value}@{domain}", arrival=arrival, due=arrival + 100) for queue in queues]
        world.site.start()
        reports = [Report(stored) for stored in world.site.await_mail("alice", 3)]
        failed = {name: status for report in reports for name, status in report.failed.items()}
        assert failed == {f"{queue.value}@{domain}": "4.4.7" for queue in queues}
        assert all("expired after 6 days" in report.recipients[0]["Diagnostic-Code"] for report in reports)
        for queue_id in ids:
            await_gone(world, queue_id)
            assert f"{queue_id}: from=<{SENDER}>, status=expired, returned to sender" in world.site.log()


def test_a_message_that_grows_old_while_it_waits_bounces(tmp_path: Path) -> None:
    """Past its lifetime in *any* queue it bounces: with the server running, at the time and not long after"""
    with World(tmp_path, retry={"minimum": "400ms", "lifetime": "1s"}) as world:
        domain = world.domain(world.address())
        sent = time.monotonic()
        world.send(f"b@{domain}")
        report = world.report()
        assert 0.9 < time.monotonic() - sent < 8
        assert report.failed == {f"b@{domain}": "4.4.7"}
        assert "Connection refused" in report.recipients[0]["Diagnostic-Code"], "what was last in the way"


def test_a_flush_does_not_wait(world: World) -> None:
    """mtad-flush: tried now, at a destination that was dead a moment ago as well"""
    address = world.address()
    domain = world.domain(address)
    ids = [world.send(f"b@{domain}") for _ in range(8)]
    await_value(lambda: set(ids) <= set(world.site.files("deferred")))
    assert "suspended" in "".join(
        recipient["delay_reason"] for row in world.site.queue() for recipient in row["recipients"]
    )
    mx = world.mx(address=address)
    assert world.site.run("mtad-flush", "--domain", domain).stdout == "8 messages: tried now\n"
    mx.await_messages(8)
    for queue_id in ids:
        await_gone(world, queue_id)


# -- what it costs when there is nothing to do ------------------------------------------------------------------------


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_server_does_nothing(tmp_path: Path) -> None:
    """No loop spins: with mail deferred, a destination suspended, and after a delivery process died"""
    with World(tmp_path) as world:
        domain = world.domain(world.address())
        for _ in range(7):
            world.send(f"b@{domain}")
        await_value(lambda: len(world.site.files("deferred")) == 7)
        for pid in world.site.deliveries():
            os.kill(pid, signal.SIGKILL)
        await_value(lambda: not world.site.deliveries())
        pids = world.site.processes()
        time.sleep(0.3)  # the last of the work above
        before = {pid: cpu(pid) for pid in pids}
        switches = voluntary(world.site.pids("scheduler")[0])
        time.sleep(1.5)
        used = {pid: cpu(pid) - before[pid] for pid in pids}
        assert max(used.values()) <= 0.04, used
        assert voluntary(world.site.pids("scheduler")[0]) - switches < 60, "times that the scheduler woke up"


def voluntary(pid: int) -> int:
    """How often a process has gone to sleep."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("voluntary_ctxt_switches:")[2].split()[0])
