"""Issue 5: when threads or memory are at an end new sessions get 421, those that there are go on, and nothing spins.

The limits are those of control groups, as a container or a unit file sets them. Descriptors are in test_limits.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.client import Client
from tests.e2e.attack_aid import EHLO, MAIL, RCPT, deliver
from tests.procs import AS_ROOT, alive, cpu_seconds, descriptors
from tests.site import Site, await_value

BUSY = "421 4.3.2 Error: server is too busy, try again later"
MIB = 1 << 20

#: Per controller: where it is, and the file with the limit, in version 1 and in version 2.
GROUPS = {
    "pids": (("/sys/fs/cgroup/pids", "pids.max"), ("/sys/fs/cgroup", "pids.max")),
    "memory": (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")),
}


class Group:
    """A control group of our own."""

    def __init__(self, path: Path, limit: str) -> None:
        self.path = path
        self._limit = limit

    def join(self) -> None:
        """The process that calls it goes into the group, and all that it forks."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, value: int) -> None:
        (self.path / self._limit).write_text(str(value))

    def use(self) -> int:
        name = {"pids.max": "pids.current", "memory.max": "memory.current"}.get(self._limit, "memory.usage_in_bytes")
        return int((self.path / name).read_text())


def _remove(path: Path) -> None:
    await_value(lambda: not (path / "cgroup.procs").read_text(), what="its processes are gone")
    path.rmdir()


@contextmanager
def group(controller: str) -> Iterator[Group]:
    """One that is gone at the end, when its processes are."""
    if not AS_ROOT:
        pytest.skip("only root can make control groups")
    for parent, limit in GROUPS[controller]:
        path = Path(parent) / f"mtad-test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            if (path / limit).exists():
                yield Group(path, limit)
                return
        finally:
            _remove(path)
    pytest.skip(f"this machine has no control group for {controller} that we may use")


def _site(root: Path, within: Group) -> Site:
    site = Site(root, limits={"connections_per_client": 10_000}, processes={"listeners": 1}, delivery={"processes": 1})
    site.start(preexec_fn=within.join)
    return site


def _crowd_out(site: Site, most: int) -> list[Client]:
    """Idle sessions until one is refused; those that were not."""
    clients: list[Client] = []
    while len(clients) < most:
        client = Client(site.address(), source=f"127.0.1.{len(clients) % 200 + 1}")
        answer = client.reply()
        if answer.startswith("421 "):
            assert answer == BUSY
            assert client.closed()
            return clients
        assert answer.startswith("220 ")
        clients.append(client)
    raise AssertionError(f"{most} sessions, and no end")


def _shed(site: Site, clients: list[Client]) -> None:
    """New ones are refused at once, without a spin; those that there are send their messages, and stay."""
    [listener] = pids = site.pids("listener")
    before, start = cpu_seconds(listener), time.monotonic()
    for _ in range(50):
        with Client(site.address()) as client:
            assert client.reply() == BUSY
    assert time.monotonic() - start < 5, "at once, one after the other"
    now = time.monotonic()
    await_value(lambda: time.monotonic() - now > 0.5, what="time passes")
    assert cpu_seconds(listener) - before < 0.3
    for client in clients[:3] + clients[-3:]:
        for line in (EHLO, MAIL, RCPT):
            assert client.say(line).startswith("250"), line
        assert deliver(client).startswith("250 ")
    for client in clients:
        assert client.say("NOOP").startswith("250 ")
    assert site.pids("listener") == pids
    assert all(map(alive, pids))


def _recover(site: Site, clients: list[Client]) -> None:
    for client in clients:
        client.socket.close()
    await_value(lambda: site.status().sessions == 0, what="all have left")
    site.send("a@sender.test", "bob@example.org", "Subject: x\r\n\r\nthere is room again\r\n")
    site.await_mail("bob")
    site.await_mail("alice", 6)
    assert "panic" not in site.log()


def _deliver_first(site: Site) -> None:
    """So that there is a delivery process before there is no room for one."""
    site.send("a@sender.test", "bob@example.org", "Subject: the first\r\n\r\n")
    site.await_mail("bob")
    for path in site.mailbox("bob"):
        path.unlink()


def test_no_threads_left(tmp_path: Path) -> None:
    """The limit of processes and threads: a 421 for whoever would need one more."""
    with group("pids") as pids, _site(tmp_path, pids) as site:
        _deliver_first(site)
        pids.limit(pids.use() + 40)
        clients = _crowd_out(site, 100)
        assert 30 <= len(clients) <= 45
        site.await_log("warning: new sessions are refused: can't start new thread$")
        _shed(site, clients)
        pids.limit(10_000)
        _recover(site, clients)


def test_no_memory_left(tmp_path: Path) -> None:
    """The limit of memory: a 421 before the kernel kills somebody."""
    with group("memory") as memory, _site(tmp_path, memory) as site:
        _deliver_first(site)
        memory.limit(memory.use() + 48 * MIB)
        clients = _crowd_out(site, 4000)
        assert len(clients) > 100
        site.await_log("warning: new sessions are refused: too little memory$")
        _shed(site, clients)
        memory.limit(1024 * MIB)
        _recover(site, clients)


def test_no_descriptors_left_where_nobody_knew(tmp_path: Path) -> None:
    """The limit is set below what was counted on: with the one descriptor that is kept whoever comes is sent away."""
    site = Site(tmp_path, limits={"connections_per_client": 10_000}, processes={"listeners": 1})
    site.start()
    with site:
        _deliver_first(site)
        clients = [Client(site.address()).begin() for _ in range(20)]
        [listener] = site.pids("listener")
        before = resource.prlimit(listener, resource.RLIMIT_NOFILE)
        used = descriptors(listener)
        free = [number for number in range(len(used) + 4) if number not in used]
        resource.prlimit(listener, resource.RLIMIT_NOFILE, (free[3], before[1]))
        clients += _crowd_out(site, 10)
        assert len(clients) == 23
        site.await_log("warning: new sessions are refused: no descriptor left$")
        for client in clients[:3]:
            client.socket.close()
        await_value(lambda: site.status().sessions == 20, what="three have left")
        clients = clients[3:] + [Client(site.address()).begin() for _ in range(3)]
        start, used_before = time.monotonic(), cpu_seconds(listener)
        waiting = [Client(site.address()) for _ in range(50)]
        assert [client.reply() for client in waiting] == [BUSY] * 50
        assert time.monotonic() - start < 5
        assert cpu_seconds(listener) - used_before < 0.3
        for client in clients:
            assert client.say(EHLO).startswith("250")
            assert client.say(MAIL).startswith("250 ")
            assert client.say(RCPT).startswith("250 ")
        assert deliver(clients[0]).startswith("451 4.3.0 "), "there is none for a queue file"
        resource.prlimit(listener, resource.RLIMIT_NOFILE, before)
        for client in clients[1:7]:
            assert deliver(client).startswith("250 ")
        _recover(site, clients)
