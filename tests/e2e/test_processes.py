"""Issue 2, Processes: children that die, and what `mtad status` and `mtad check` say of a running server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.client import Client
from tests.procs import Orphanage, alive, title
from tests.site import Site, await_value

MESSAGE = b"Subject: processes\r\n\r\nhello\r\n"


def _kill(site: Site, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Kill a child and wait until the master has noticed."""
    os.kill(pid, number)
    await_value(lambda: all(process.pid != pid for process in site.status().processes), what=f"{pid} is buried")


@pytest.mark.parametrize("role", ["listener", "scheduler"])
def test_children_that_die_are_restarted(tmp_path: Path, role: str) -> None:
    """Children that die are restarted."""
    with Site(tmp_path) as site:
        before = site.pids(role)
        _kill(site, before[0])
        await_value(lambda: len(site.pids(role)) == len(before), what="a new one")
        after = site.pids(role)
        assert before[0] not in after
        assert before[1:] == [pid for pid in after if pid in before], "the others are left alone"
        site.await_log(
            rf"mtad/master\[\d+\]: warning: {role} process {before[0]} killed by SIGKILL; the next one starts in"
        )
        site.send("a@sender.test", "alice@example.org", MESSAGE)
        site.await_mail("alice")
        [place] = [place for place in site.status().processes if place.deaths]
        assert (place.role, place.deaths) == (role, 1)
        assert place.started > site.status().started
        assert re.search(rf"{role:<13}  process {place.pid}, since \d+s", site.run("mtad", "status").stdout)


def test_the_scheduler_takes_work_back(tmp_path: Path) -> None:
    """The scheduler spawns delivery processes and takes their work back when they die."""
    with Site(tmp_path) as site:
        site.send("a@sender.test", "alice@example.org", MESSAGE)
        site.await_mail("alice")
        for pid in site.deliveries():
            os.kill(pid, signal.SIGKILL)
        site.send("a@sender.test", "alice@example.org", MESSAGE)
        site.await_mail("alice", 2)
        site.await_empty_queue()


def test_deliveries_of_a_dead_scheduler_do_not_stay(tmp_path: Path, orphanage: Orphanage) -> None:
    """A scheduler that is killed leaves no delivery process: a stop finds nothing to wait for."""
    with Site(tmp_path) as site:
        site.send("a@sender.test", "alice@example.org", MESSAGE)
        site.await_mail("alice")
        deliveries = site.deliveries()
        assert deliveries
        _kill(site, site.pids("scheduler")[0])
        await_value(lambda: not any(alive(pid) for pid in deliveries), what="deliveries have ended")
    assert orphanage.left() == []


@pytest.fixture
def orphanage() -> Orphanage:
    return Orphanage()


def test_growing_pauses_when_they_die_at_once(tmp_path: Path) -> None:
    """Children that die are restarted, with growing pauses when they die at once."""
    with Site(tmp_path, processes={"listeners": 1}) as site:
        times = []
        for pause in ("0.2", "0.4", "0.8"):
            [pid] = await_value(lambda: site.pids("listener"), what="a listener runs")
            times.append(time.monotonic())
            _kill(site, pid)
            site.await_log(f"listener process {pid} killed by SIGKILL; the next one starts in {pause} s")
        assert times[1] - times[0] >= 0.2
        assert times[2] - times[1] >= 0.4
        with Client(site.address()) as client:  # in the pause the kernel takes connections for the next one
            assert client.reply().startswith("220 ")


def test_sessions_of_a_killed_listener_are_not_counted_any_more(tmp_path: Path) -> None:
    """Connections per client are freed when the listener that had them is killed."""
    with Site(tmp_path, limits={"connections_per_client": 4}) as site:
        clients = [Client(site.address()).begin() for _ in range(4)]
        with Client(site.address()) as refused:
            assert refused.reply().startswith("421 4.7.0 ")
        for pid in site.pids("listener"):
            _kill(site, pid)
        assert site.status().sessions == 0
        for client in clients:
            assert client.closed()
            client.socket.close()
        clients = [Client(site.address()).begin() for _ in range(4)]
        for client in clients:
            client.socket.close()


def test_a_child_that_is_told_to_end_by_somebody_else_is_replaced(tmp_path: Path) -> None:
    """Children that die are restarted, also when they ended in order without being asked by the master."""
    with Site(tmp_path) as site:
        pid = site.pids("listener")[0]
        _kill(site, pid, signal.SIGTERM)
        site.await_log(f"listener process {pid} exited with 0; the next one starts in")
        await_value(lambda: len(site.pids("listener")) == 2, what="two listeners again")


def test_status(tmp_path: Path) -> None:
    """`mtad status` says what runs, since when, sessions, queue sizes."""
    site = Site(tmp_path)
    site.configure(dns={"timeout": "100ms"})
    with site:
        queue_id = site.send("alice@example.org", "b@far.test", MESSAGE)
        site.await_deferred(queue_id)
        with Client(site.address()).begin(), Client(site.address()).begin():
            await_value(lambda: site.status().sessions == 2, what="two sessions")
            result = site.run("mtad", "status")
            plain = json.loads(site.run("mtad", "status", "--json").stdout)
    assert result.returncode == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert re.fullmatch(r"mtad 0\.\S+ runs on mx\.example\.org since \ds \(process \d+\)", lines[0])
    assert lines[1] == f"configuration {site.config_path}"
    assert re.fullmatch(r"inbound 127\.0\.0\.1:\d+, \[::1\]:\d+ \(mx\)", lines[2])
    assert re.fullmatch(r"relay 127\.0\.0\.1:\d+, \[::1\]:\d+ \(relay\)", lines[3])
    assert re.fullmatch(r"scheduler process \d+, since \ds", lines[4])
    sessions = [re.fullmatch(r"listener process \d+, since \ds, (\d) sessions?", line) for line in lines[5:7]]
    assert sum(int(found[1]) for found in sessions if found) == 2
    counts = {"incoming": 0, "active": 0, "deferred": 1, "hold": 0, "corrupt": 0}
    assert lines[7:12] == [f"{queue} {count} message{'s' * (count != 1)}" for queue, count in counts.items()]
    assert lines[12] == "lanes 1; 0 in delivery, 0 waiting (mtaq watch)"
    assert re.fullmatch(r"recipients 0 delivered, 1 put off, 0 failed in \ds", lines[13])
    assert len(lines) == 14
    assert plain["running"] is True
    assert plain["sessions"] == 2
    assert plain["queues"] == counts


def test_status_of_a_server_that_does_not_run(tmp_path: Path) -> None:
    """`mtad status` exits with 1 when nothing runs, and still says what is in the queues."""
    site = Site(tmp_path)
    result = site.run("mtad", "status")
    assert (result.returncode, result.stdout, result.stderr) == (1, "mtad is not running\n", "")
    with site:
        pass
    result = site.run("mtad", "status")
    assert result.returncode == 1
    assert [" ".join(line.split()) for line in result.stdout.splitlines()][:2] == [
        "mtad is not running",
        "incoming 0 messages",
    ]
    assert json.loads(site.run("mtad", "status", "--json").stdout)["running"] is False


def test_status_is_for_anybody_at_any_time(tmp_path: Path) -> None:
    """`mtad status` does not wait for one who asks and does not listen."""
    with Site(tmp_path) as site:
        path = str(site.spool_path / "control.sock")
        idle = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(20)]
        for visitor in idle:
            visitor.connect(path)
        assert site.status().pid == site.master()
        for visitor in idle:
            visitor.close()


def test_check_of_a_running_server(tmp_path: Path) -> None:
    """`mtad check` validates the configuration and the machine: ports are free or ours."""
    with Site(tmp_path) as site, socket.create_server(("127.0.0.1", 0)) as other:
        pid = site.master()
        bound = [address for listener in site.status().listeners for address in listener.addresses]
        site.listeners = [{"name": "inbound", "service": "mx", "address": bound}]
        site.configure()
        result = site.run("mtad", "check")
        assert (result.returncode, result.stdout) == (0, f"{site.config_path}: fine (the server runs, process {pid})\n")
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        site.listeners[0]["address"] = [*bound, taken]
        site.configure()
        result = site.run("mtad", "check")
        assert result.returncode == 78
        line = site.config_path.read_text().split("address")[0].count("\n") + 1
        complaint = f"{site.config_path}:{line}: listener[0].address[4]: cannot listen on {taken}: "
        assert complaint in result.stderr, "another's port is not ours, whoever runs"
    site.listeners[0]["address"] = bound
    site.configure()
    result = site.run("mtad", "check")
    assert (result.returncode, result.stdout) == (0, f"{site.config_path}: fine\n"), "free, now that nobody runs"


def test_process_names_tell_where_one_is(tmp_path: Path) -> None:
    """Each process names itself, also one that was restarted."""
    with Site(tmp_path) as site:
        _kill(site, site.pids("listener")[0])
        await_value(lambda: len(site.pids("listener")) == 2, what="restarted")
        await_value(lambda: {title(pid) for pid in site.pids("listener")} == {"mtad: listener"}, what="they are named")
