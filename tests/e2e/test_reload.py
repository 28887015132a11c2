"""Issue 2, Processes: `mtad reload` (SIGHUP). Each test names the sentence that it shows."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client import Client, is_refused
from tests.procs import alive, suspend
from tests.site import Site, await_value

EHLO = "EHLO client.test"
TRANSACTION = (EHLO, "MAIL FROM:<a@sender.test>", "RCPT TO:<alice@example.org>")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Site(tmp_path) as site:
        yield site


def _reload(site: Site) -> None:
    result = site.reload()
    assert (result.returncode, result.stdout) == (0, "reloaded\n"), result.stderr


def _refused(site: Site) -> str:
    result = site.reload()
    assert result.returncode == 78, result.stdout
    return result.stderr


def _greeting(address: tuple[str, int]) -> str:
    with Client(address) as client:
        return client.reply()


def _await_greeting(address: tuple[str, int], greeting: str) -> None:
    """Wait for it: a client or two may still get to an old listener that has not looked at its signal yet."""
    await_value(lambda: _greeting(address) == greeting, what=greeting)


def test_new_workers_have_the_new_configuration(site: Site) -> None:
    """`mtad reload`: new workers with the new configuration, and the old ones are gone."""
    before = set(site.pids("listener") + site.pids("scheduler"))
    address = site.address()
    site.configure(top={"hostname": "new.example.org"}, processes={"listeners": 3})
    _reload(site)
    _await_greeting(address, "220 new.example.org ESMTP mtad")
    assert len(site.pids("listener")) == 3
    assert not before & set(site.pids("listener") + site.pids("scheduler"))
    await_value(lambda: not any(alive(pid) for pid in before), what="the old ones have ended")
    status = await_value(lambda: found if not (found := site.status()).draining else None, what="they are buried")
    assert (status.hostname, status.reloads, status.reload_fault) == ("new.example.org", 1, "")
    site.send("a@sender.test", "alice@example.org", "Subject: x\r\n\r\nx\r\n")
    assert b"\n\tby new.example.org (mtad) with ESMTP id " in site.await_mail("alice")[0]


def test_listeners_that_are_dead_at_a_reload_leave_room_for_others(site: Site) -> None:
    """There is room for 128 of them, and those that wait for their restart are not started any more."""
    site.configure(processes={"listeners": 50})
    _reload(site)
    await_value(lambda: site.status().draining == 0, what="the old ones have ended")
    for reloads in (2, 3, 4):
        await_value(lambda: len(site.pids("listener")) == 50, what="all are there")
        await_value(lambda: _most_are_dead(site), what="most are dead, and wait")
        os.kill(site.status().pid, signal.SIGHUP)
        await_value(lambda reloads=reloads: site.status().reloads == reloads, what="reloaded")  # type: ignore[misc]
        assert site.status().reload_fault == ""


def _most_are_dead(site: Site) -> bool:
    """Kill them once more, if they are not; their pauses grow."""
    pids = site.pids("listener")
    if len(pids) >= 10:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return len(pids) < 10


def test_sighup(site: Site) -> None:
    """SIGHUP does the same."""
    site.configure(top={"hostname": "new.example.org"})
    os.kill(site.status().pid, signal.SIGHUP)
    await_value(lambda: site.status().hostname == "new.example.org", what="reloaded")
    _await_greeting(site.address(), "220 new.example.org ESMTP mtad")


def test_old_ones_drain(site: Site) -> None:
    """Old ones drain: a session that is in a transaction over the reload finishes it, an idle one gets 421."""
    idle = Client(site.address()).begin(EHLO)
    busy = Client(site.address()).begin(*TRANSACTION)
    site.configure(top={"hostname": "new.example.org"})
    _reload(site)
    assert idle.reply().startswith("421 4.3.2 ")
    await_value(lambda: (found := site.status()).draining == 1 and found.sessions == 1, what="only the busy one is left")
    assert "draining       1 process of the configuration before" in site.run("mtad", "status").stdout
    assert busy.say("DATA").startswith("354 ")
    busy.send(b"Subject: over a reload\r\n\r\n.\r\n")
    assert busy.reply().startswith("250 2.0.0 Ok: queued as ")
    assert busy.reply().startswith("421 4.3.2 ")
    [stored] = site.await_mail("alice")
    assert b"by mx.example.org (mtad)" in stored, "with the configuration under which it began"
    await_value(lambda: site.status().draining == 0, what="nothing drains any more")
    idle.socket.close()
    busy.socket.close()


REFUSED: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "a fault in the file": ({"limits": {"recipients": 1}}, "limits.recipients: "),
    "a machine that does not fit": ({"local": {"users": "/nowhere/users"}}, "local.users: /nowhere/users"),
    "what belongs to the master": ({"top": {"pid_file": "/tmp/mtad.pid"}}, "pid_file: cannot be changed by a reload"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_one_that_does_not_checkis_refused(site: Site, what: str) -> None:
    """One that does not check is refused and the old one stays; the log and the command say why."""
    settings, complaint = REFUSED[what]
    before = site.status()
    site.configure(top={"hostname": "new.example.org"})
    site.configure(**settings)
    assert complaint in _refused(site)
    os.kill(before.pid, signal.SIGHUP)  # for the command looks itself, before it asks the master
    site.await_log(f"mtad/master.* warning: reload refused, the old configuration stays: .*{complaint}")
    status = await_value(lambda: site.status() if site.status().reloads else None, what="it was tried")
    assert complaint in status.reload_fault
    assert [process.pid for process in status.processes] == [process.pid for process in before.processes]
    assert _greeting(site.address()) == "220 mx.example.org ESMTP mtad"


def test_an_address_in_use_refuses_a_reload(site: Site) -> None:
    """One that cannot be honoured is refused as a whole: no half of it holds."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        old = site.address()
        site.listeners[0]["address"] = ["127.0.0.1:0", taken]
        site.configure(top={"hostname": "new.example.org"})
        assert f"cannot listen on {taken}: Address already in use" in _refused(site)
        assert f"last reload refused: cannot listen on {taken}" in site.run("mtad", "status").stdout
        assert site.address() == old
        assert _greeting(old) == "220 mx.example.org ESMTP mtad"
    _reload(site)
    _await_greeting(site.address(), "220 new.example.org ESMTP mtad")
    assert site.run("mtad", "status").stdout.count("refused") == 0


def test_addresses_come_and_go(site: Site) -> None:
    """A listener that is new is there after the reload, one that is not wanted any more closes, one that stays, stays."""
    inbound, relay = site.address("inbound"), site.address("relay")
    site.listeners[1:] = [{"name": "second", "service": "mx", "address": ["127.0.0.1:0"]}]
    site.configure()
    _reload(site)
    assert site.address("inbound") == inbound
    assert _greeting(inbound).startswith("220 ")
    assert _greeting(site.address("second")).startswith("220 ")
    await_value(lambda: is_refused(relay), what="the relay is closed")


def test_services_keep_to_their_sockets(site: Site) -> None:
    """After a reload a relay is still a relay and an inbound listener none, also when both are bound to port 0."""
    inbound, relay = site.address("inbound"), site.address("relay")
    for _ in range(2):
        site.listeners.reverse()
        site.configure()
        site.renew()
        assert (site.address("inbound"), site.address("relay")) == (inbound, relay)
        for address, code in ((inbound, "550 5.7.1"), (relay, "250 2.1.5")):
            with Client(address).begin(EHLO, "MAIL FROM:<alice@example.org>") as client:
                assert client.say("RCPT TO:<b@far.test>").startswith(code)


def test_no_connection_is_refused_during_reloads(site: Site) -> None:
    """New workers take over the sockets of the old ones: during 20 reloads no connection is refused, no message lost."""
    address = site.address()
    failures: list[str] = []
    accepted: list[str] = []
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            try:
                with Client(address) as client:
                    # 421 may come at any moment when no transaction is under way; a connection that breaks may not.
                    for line in ("", *TRANSACTION, "DATA", "Subject: load\r\n\r\n."):
                        answer = client.say(line) if line else client.reply()
                        if answer.startswith("421 4.3.2 "):
                            break
                        if answer[:1] not in {"2", "3"}:
                            failures.append(f"{line}: {answer!r}")
                    else:
                        accepted.append(answer.rpartition(" ")[2])
            except OSError as fault:
                failures.append(repr(fault))

    senders = [threading.Thread(target=send) for _ in range(4)]
    for sender in senders:
        sender.start()
    for number in range(1, 21):
        os.kill(site.status().pid, signal.SIGHUP)
        await_value(lambda number=number: site.status().reloads >= number, what="reloaded")  # type: ignore[misc]
    over.set()
    for sender in senders:
        sender.join()
    assert failures == []
    assert len(accepted) > 20
    await_value(lambda: site.status().draining == 0, what="all old processes have ended")
    assert len(site.processes()) <= 1 + 1 + 2 + 2
    site.await_mail("alice", len(accepted))
    site.await_empty_queue()
    assert len(site.mailbox("alice")) == len(accepted), "nothing came twice"
    assert "killed" not in site.log()


def test_too_many_generations(tmp_path: Path) -> None:
    """A reload for which there is no room yet is refused, and works later."""
    with Site(tmp_path, processes={"listeners": 64}) as site:
        pids = site.pids("listener")
        for pid in pids:
            suspend(pid)
        _reload(site)
        assert "64 processes of earlier reloads still finish their work" in _refused(site)
        assert len(site.pids("listener")) == 64
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        await_value(lambda: site.status().draining == 0, what="the old ones have ended")
        site.configure(processes={"listeners": 1})
        _reload(site)


def test_a_log_that_cannot_be_opened_refuses_a_reload(site: Site, tmp_path: Path) -> None:
    """One that does not work is refused: the master survives whatever a reload runs into."""
    (tmp_path / "logs").mkdir()
    site.configure(log={"to": str(tmp_path / "logs" / "mtad.log")})
    (tmp_path / "logs" / "mtad.log").symlink_to("/proc/self/mem/nowhere")
    os.kill(site.status().pid, signal.SIGHUP)
    await_value(lambda: site.status().reload_fault, what="it is refused")
    site.send("a@sender.test", "alice@example.org", "Subject: x\r\n\r\nx\r\n")


def test_reload_of_nothing(tmp_path: Path) -> None:
    """`mtad reload` exits with 1 and says so when nothing runs."""
    site = Site(tmp_path)
    result = site.reload()
    assert result.returncode == 1
    assert "not running" in result.stderr
