"""Issue 2, Processes: how the server ends. Each test names the sentence that it shows."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client import Client, is_refused
from tests.procs import Orphanage, alive, suspend
from tests.site import PATIENCE, Site, await_value

EHLO = "EHLO client.test"
MAIL = "MAIL FROM:<a@sender.test>"
RCPT = "RCPT TO:<alice@example.org>"
SHUTDOWN = "421 4.3.2 Service shutting down, try again later"


def _stop(site: Site) -> None:
    result = site.run("mtad", "stop")
    assert (result.returncode, result.stdout) == (0, "stopped\n"), result.stderr


def _terminate(site: Site) -> None:
    master = site.master()
    assert master is not None
    os.kill(master, signal.SIGTERM)
    await_value(lambda: site.master() is None, what="the master is gone")


class Stopping:
    """A stop that is under way in a thread of its own."""

    def __init__(self, site: Site, stop: Callable[[Site], None] = _stop) -> None:
        self.site = site
        self.pids = site.processes()
        self.thread = threading.Thread(target=stop, args=(site,))
        self.thread.start()
        site.await_log(r"mtad/master\[\d+\]: stopping")

    def over(self) -> None:
        """Wait until it has returned: at that moment nothing runs any more."""
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        if self.site.process is not None:
            self.site.process.wait(PATIENCE)
        assert [pid for pid in self.pids if alive(pid)] == []


ways = pytest.mark.parametrize("stop", [_stop, _terminate], ids=["mtad stop", "SIGTERM"])


@ways
def test_stop(tmp_path: Path, stop: Callable[[Site], None]) -> None:
    """`mtad stop`, and SIGTERM: all children are gone when it returns; no pid file and no sockets stay."""
    orphanage = Orphanage()
    site = Site(tmp_path)
    site.start_daemon()
    site.send("a@sender.test", "alice@example.org", "Subject: x\r\n\r\nx\r\n")
    site.await_mail("alice")
    pids = site.processes()
    assert len(pids) >= 5
    stop(site)
    assert orphanage.left() == []
    assert [pid for pid in pids if alive(pid)] == []
    assert not (tmp_path / "mtad.pid").exists()
    assert sorted(path.name for path in site.spool_path.iterdir() if not path.is_dir()) == [
        "master.lock",
        "scheduler.boot",
        "scheduler.lock",
    ]


@ways
def test_sessions_in_progress_finish_their_transaction(tmp_path: Path, stop: Callable[[Site], None]) -> None:
    """No new connections, sessions in progress finish their transaction, also in the middle of DATA; idle ones get 421."""
    site = Site(tmp_path, deliver=False)
    with site:
        address = site.address()
        idle = [Client(address).begin(), Client(address).begin(EHLO), Client(address).begin(EHLO, MAIL, "RSET")]
        sender = Client(address).begin(EHLO, MAIL)
        content = Client(address).begin(EHLO, MAIL, RCPT, "DATA")
        content.send(b"Subject: half\r\n")
        stopping = Stopping(site, stop)
        for client in idle:
            assert client.reply() == SHUTDOWN
            assert client.closed()
        await_value(lambda: is_refused(address), what="nobody listens any more")
        assert sender.say(RCPT).startswith("250 2.1.5 ")
        assert sender.say("DATA").startswith("354 ")
        sender.send(b"Subject: whole\r\n\r\n.\r\n")
        content.send(b"\r\nthe other half\r\n.\r\n")
        for client in (sender, content):
            assert re.match(r"250 2\.0\.0 Ok: queued as \S+$", client.reply())
            assert client.reply() == SHUTDOWN
            assert client.closed()
        stopping.over()
        for client in (*idle, sender, content):
            client.socket.close()
        assert len(site.taken()) == 2
        assert [message for message in site.taken() if message.content.endswith(b"\r\n\r\nthe other half\r\n")]


def test_a_transaction_that_ends_otherwise_ends_the_session(tmp_path: Path) -> None:
    """Sessions in progress finish their transaction: with RSET it is finished, too; with QUIT all is said."""
    with Site(tmp_path) as site:
        clients = [Client(site.address()).begin(EHLO, MAIL) for _ in range(2)]
        stopping = Stopping(site)
        assert clients[0].say("RSET") == "250 2.0.0 Ok"
        assert clients[0].reply() == SHUTDOWN
        assert clients[1].say("QUIT") == "221 2.0.0 Bye"
        for client in clients:
            assert client.closed()
            client.socket.close()
        stopping.over()


def test_bounded_by_a_setting(tmp_path: Path) -> None:
    """Sessions in progress finish their transaction (bounded by a setting): then they get 421, and nothing is kept."""
    with Site(tmp_path, deliver=False, processes={"stop_timeout": "500ms"}) as site:
        silent = Client(site.address()).begin(EHLO, MAIL)
        content = Client(site.address()).begin(EHLO, MAIL, RCPT, "DATA")
        content.send(b"Subject: never finished\r\n")
        before = time.monotonic()
        stopping = Stopping(site)
        for client in (silent, content):
            assert client.reply() == SHUTDOWN
            assert client.closed()
            client.socket.close()
        assert 0.4 < time.monotonic() - before < 3
        stopping.over()
        assert site.files("incoming") == []
        assert "2 sessions did not finish" in site.log() or site.log().count("1 sessions did not finish") == 2


def _fill(client: Client) -> None:
    """Ask until the server cannot send any more, and then until it does not take any more."""
    client.socket.settimeout(0.3)
    try:
        while True:
            client.socket.sendall(b"HELP\r\n" * 10_000)
    except TimeoutError:
        pass


def test_a_client_that_takes_nothing_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    """All children are gone within the setting, even when a client neither reads nor goes away."""
    with Site(tmp_path, limits={"junk_commands": 1_000_000}, processes={"stop_timeout": "300ms"}) as site:
        client = Client(site.address()).begin()
        _fill(client)
        before = time.monotonic()
        _stop(site)
        assert time.monotonic() - before < 5
        client.socket.close()


def test_ctrl_c_ends_a_foreground_server(tmp_path: Path) -> None:
    """SIGINT, which a terminal sends to all processes of the group, ends it in order."""
    site = Site(tmp_path)
    site.start(start_new_session=True)
    with site:
        client = Client(site.address()).begin(EHLO, MAIL, RCPT)
        pids = site.processes()
        assert site.process is not None
        os.killpg(site.process.pid, signal.SIGINT)
        site.await_log(r"mtad/master\[\d+\]: stopping")
        assert client.say("DATA").startswith("354 ")
        client.send(b".\r\n")
        assert client.reply().startswith("250 2.0.0 ")
        client.socket.close()
        assert site.process.wait(PATIENCE) == 0
        site.process = None
        assert not [pid for pid in pids if alive(pid)]


def test_stop_at_once_after_the_start(tmp_path: Path) -> None:
    """A stop is heard by children that have only just been forked."""
    site = Site(tmp_path, processes={"stop_timeout": "10s", "listeners": 8})
    for _ in range(3):
        assert site.start_daemon().returncode == 0
        before = time.monotonic()
        _terminate(site)
        assert time.monotonic() - before < 3


def test_a_stop_of_nothing(tmp_path: Path) -> None:
    """`mtad stop` exits with 1 and says so when nothing runs."""
    site = Site(tmp_path)
    result = site.run("mtad", "stop")
    assert result.returncode == 1
    assert result.stderr == f"mtad: not running (no server has the spool {site.spool_path})\n"
    with site:
        _stop(site)
        assert site.run("mtad", "stop").returncode == 1


def test_a_stop_while_a_child_waits_for_its_restart(tmp_path: Path) -> None:
    """A place that is empty at the moment is not filled again."""
    with Site(tmp_path, processes={"listeners": 1}) as site:
        for _ in range(2):
            [pid] = await_value(lambda: site.pids("listener"), what="a listener")
            os.kill(pid, signal.SIGKILL)
            await_value(lambda pid=pid: site.pids("listener") != [pid], what="it is missed")  # type: ignore[misc]
        _stop(site)
        assert site.log().rstrip().endswith("stopped")


def test_a_child_that_does_not_end_is_killed(tmp_path: Path) -> None:
    """All children are gone when it returns, whatever it takes."""
    with Site(tmp_path, processes={"stop_timeout": "100ms"}) as site:
        [stuck, *_] = site.pids("listener")
        suspend(stuck)
        before = time.monotonic()
        _stop(site)
        assert time.monotonic() - before < 8
        assert not alive(stuck)
        site.await_log(f"process {stuck} did not end in time and is killed")


def test_a_server_is_seen_and_stopped_also_when_its_file_has_faults_by_now(tmp_path: Path) -> None:
    """What looks at a running server, or ends it, needs to know where the spool is, and no more."""
    with Site(tmp_path) as site:
        site.configure(limits={"recipients": 1})
        assert site.run("mtad", "check").returncode == 78
        result = site.run("mtad", "status")
        assert (result.returncode, result.stderr) == (0, "")
        assert site.run("mtaq").stdout == "Mail queue is empty\n"
        _stop(site)
        assert site.run("mtad", "status").returncode == 1
        site.config_path.write_text("spool = [\n")
        result = site.run("mtad", "status")
        assert result.returncode == 78
        assert "mtad.toml" in result.stderr
