"""Keeping (issue 2): the ten promises of the spool (design, section 3), seen from outside of real processes.

That each step of each durable write may fail is tested with the modules; here is what an administrator would try.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mtad.outcome import Deferred
from mtad.spool.queue_id import is_queue_id
from mtad.spool.queues import Queue
from tests.e2e.world import MESSAGE, World, await_gone
from tests.peers.mx import Say, Script
from tests.site import Site, await_value
from tests.unit.spool_aid import needs_strace

MIB = 1024 * 1024


def kill_all(site: Site) -> None:
    """SIGKILL every process."""
    for pid in site.processes():
        with contextlib.suppress(ProcessLookupError):  # its master is dead, and it may know already
            os.kill(pid, signal.SIGKILL)
    assert site.process is not None
    site.process.wait()
    site.process = None


# -- promise 1 --------------------------------------------------------------------------------------------------------


def test_1_after_250_no_kill_loses_it(tmp_path: Path) -> None:
    """`250` after end-of-data means: [...] it will be delivered, bounced to its sender, or kept for a human."""
    with Site(tmp_path) as site:
        client = site.client()
        for number in range(10):
            client.sendmail("a@sender.test", "alice@example.org", b"Subject: %d\r\n\r\n" % number)
        kill_all(site)
        client.close()
        site.start()
        site.await_empty_queue()  # first: whoever was in doubt is there twice before others are there at all
        stored = site.await_mail("alice", 10)
    assert len({line for message in stored for line in message.split(b"\n") if line.startswith(b"Subject: ")}) == 10


@needs_strace
def test_1_file_and_directory_are_flushed_before_the_250(tmp_path: Path) -> None:
    """the whole queue file and its directory entry are on stable storage (fsync) [before the 250]"""
    trace = tmp_path / "trace"
    with Site(tmp_path, processes={"listeners": 1}, deliver=False) as site:
        [pid] = site.pids("listener")
        command = ["strace", "-f", "-o", str(trace), "-e", "trace=fsync,fdatasync,sendto,sendmsg,write", "-p", str(pid)]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
        assert tracer.stderr is not None
        if b"attached" not in tracer.stderr.readline():
            tracer.communicate()
            pytest.skip("strace may not attach here")
        site.send("a@sender.test", "alice@example.org", MESSAGE)
        os.kill(tracer.pid, signal.SIGINT)
        tracer.communicate()
    lines = trace.read_text().splitlines()
    [answer] = [number for number, line in enumerate(lines) if '"250 2.0.0 Ok: queued' in line and "send" in line]
    [begin] = [number for number, line in enumerate(lines) if '"354 ' in line]
    flushed = [line for line in lines[begin:answer] if re.search(r"\bf(data)?sync\b.* = 0$", line)]
    assert len(flushed) >= 2, "the file, and the directory"


# -- promise 2 --------------------------------------------------------------------------------------------------------


@contextmanager
def half_a_message(site: Site) -> Iterator[socket.socket]:
    """A connection over which a quarter of a megabyte of a message for alice has come, and not its end."""
    client = site.client()
    client.ehlo()
    client.mail("a@sender.test")
    client.rcpt("alice@example.org")
    client.putcmd("DATA")
    assert client.getreply()[0] == 354
    assert client.sock is not None
    client.sock.sendall((b"x" * 78 + b"\r\n") * 3000)
    yield client.sock
    client.close()


def test_2_what_was_half_written_is_swept_at_the_next_start(tmp_path: Path) -> None:
    """A file is committed or it does not exist: whatever was half written when the power went is swept [...]"""
    with Site(tmp_path) as site:
        with half_a_message(site):
            [name] = await_value(lambda: site.files("incoming"))
            kill_all(site)
        assert site.files("incoming") == [name]
        os.utime(site.spool_path / "incoming" / name, (time.time() - 2,) * 2)  # what is too young is left alone
        site.start()
        site.await_log(rf"{name}: removed: its receiver died before it was complete; it was never acknowledged")
        assert site.files("incoming") == []
        assert site.mailbox("alice") == []


def test_2_a_message_in_the_making_is_left_alone(tmp_path: Path) -> None:
    """[...] is swept at the next start: but not under the hands of its receiver"""
    with Site(tmp_path) as site, half_a_message(site) as connection:
        [name] = await_value(lambda: site.files("incoming"))
        # Older than the second that the sweep leaves to everybody.
        os.utime(site.spool_path / "incoming" / name, (time.time() - 2,) * 2)
        [scheduler] = site.pids("scheduler")
        os.kill(scheduler, signal.SIGKILL)  # the next one scans at once
        await_value(lambda: scheduler not in (pids := site.pids("scheduler")) and pids)
        site.send("a@sender.test", "bob@example.org", MESSAGE)
        site.await_mail("bob")
        assert site.files("incoming") == [name]
        connection.sendall(b".\r\n")
        site.await_mail("alice")


# -- promise 3 --------------------------------------------------------------------------------------------------------


def peak(pid: int) -> int:
    """The most memory that a process ever had, in octets."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def test_3_memory_does_not_depend_on_the_size_of_a_message(tmp_path: Path) -> None:
    """a message costs memory independent of its size"""
    with World(tmp_path, processes={"listeners": 1}, delivery={"processes": 1}) as world:
        mx = world.mx()
        domain = world.domain(mx)
        for recipients in ([f"b@{domain}"], ["bob@example.org"]):
            world.send(*recipients)
        mx.await_messages(1)
        world.site.await_mail("bob")
        pids = world.site.processes()
        before = {pid: peak(pid) for pid in pids}
        world.send(f"b@{domain}", "bob@example.org", content=b"Subject: big\r\n\r\n" + (b"y" * 76 + b"\r\n") * 260_000)
        mx.await_messages(2, timeout=30)
        world.site.await_mail("bob", 2)
        grown = {pid: peak(pid) - before[pid] for pid in pids if Path(f"/proc/{pid}").exists()}
        assert len(mx.messages[1].content) > 20_000_000
        assert max(grown.values()) < 4 * MIB, grown


def test_3_content_is_written_once_and_never_again(tmp_path: Path) -> None:
    """Content is streamed to the file once and never rewritten."""
    with World(tmp_path, deliver=False) as world:
        mx = world.mx(Script(dot=Say("451 4.3.0 later")))
        domain = world.domain(mx)
        queue_id = world.send(f"b@{domain}", content=MESSAGE * 3)
        incoming = world.site.spool_path / "incoming" / queue_id
        status, data = incoming.stat(), incoming.read_bytes()
        world.site.stop()
        world.site.deliver = True
        os.close(world.site._lock)
        world.site._lock = -1
        world.site.start()
        for number in (1, 2):
            mx.await_command("DATA", number)
            world.site.await_deferred(queue_id)
            world.site.run("mtad-flush", queue_id)
        deferred = await_value(lambda: [*(world.site.spool_path / "deferred").iterdir()])[0]
        assert deferred.stat().st_ino == status.st_ino
        assert deferred.read_bytes().startswith(data), "appended to, and nothing else"


# -- promise 4 --------------------------------------------------------------------------------------------------------


def test_4_each_attempt_is_recorded(tmp_path: Path) -> None:
    """each attempt's history (when, which host and address, how long each phase, TLS, the reply) [...]"""
    with World(tmp_path) as world:
        mx = world.mx(Script(dot=Say("451 4.3.0 later", delay=0.2)))
        dead = world.address()
        domain = world.domain(dead, mx)
        before = time.time()
        queue_id = world.send(f"b@{domain}")
        world.site.await_deferred(queue_id)
        first, second = world.attempts(Queue.DEFERRED, queue_id)
    assert before <= first.started <= second.started <= time.time()
    assert (first.host, first.address) == (f"mx1.{domain}", f"{dead}:{world.port}")
    assert (second.host, second.address) == (f"mx2.{domain}", f"{mx.address}:{mx.port}")
    assert second.connection > 0
    assert second.transmission >= 0.2
    assert second.tls == ""
    [(index, outcome)] = second.outcomes
    assert isinstance(outcome, Deferred)
    assert (index, outcome.reply, outcome.remote) == (0, "451 4.3.0 later", f"mx2.{domain}")
    [(_, outcome)] = first.outcomes
    assert "Connection refused" in outcome.text


# -- promise 8 --------------------------------------------------------------------------------------------------------


def test_8_the_next_attempt_is_the_mtime(tmp_path: Path) -> None:
    """Next attempt time = the file's mtime in `deferred/`"""
    with World(tmp_path, start=False) as world:
        mx = world.mx()
        domain = world.domain(mx)
        soon = time.time() + 6.0
        due = world.place(Queue.DEFERRED, f"due@{domain}", due=time.time() - 5)
        later = world.place(Queue.DEFERRED, f"later@{domain}", due=soon)
        tomorrow = world.place(Queue.DEFERRED, f"tomorrow@{domain}", due=time.time() + 3000)
        world.site.start()
        mx.await_messages(1)
        await_gone(world, due)
        assert world.site.files("deferred") == sorted([later, tomorrow])
        mx.await_messages(2, timeout=30)
        assert time.time() >= soon - 0.01
        assert [message.recipients[0].partition("@")[0] for message in mx.messages] == ["due", "later"]


@needs_strace
def test_8_a_scan_needs_no_open_and_many_deferred_messages_cost_nothing(tmp_path: Path) -> None:
    """a scan needs no open. Cost stays flat with 100,000 deferred messages."""
    count = int(os.environ.get("MTAD_TEST_MESSAGES", "20000"))
    with World(tmp_path, start=False) as world:
        mx = world.mx()
        domain = world.domain(mx)
        first = world.place(Queue.DEFERRED, f"b@{domain}", due=time.time() + 3000)
        directory = world.site.spool_path / "deferred"
        stem = first[:6]
        when = time.time() + 3000
        for number in range(count):
            # What stands in them does not matter, since nobody opens them: an empty file would go to corrupt.
            path = directory / f"{stem}{number_in_base_52(number)}z9"
            path.touch()
            os.utime(path, (when, when))
        world.site.start()
        delays = []
        for number in range(1, 21):
            world.send(f"b@{domain}")
            accepted = time.monotonic()
            mx.await_messages(number)
            delays.append(time.monotonic() - accepted)
        assert sorted(delays)[10] < 1.0, "a scan would take five seconds to come"
        assert os.listdir(world.site.spool_path / "corrupt") == []
        assert len(os.listdir(directory)) == count + 1


def number_in_base_52(number: int) -> str:
    alphabet = "0123456789BCDFGHJKLMNPQRSTVWXYZbcdfghjklmnpqrstvwxyz"
    return "".join(alphabet[number // 52**place % 52] for place in (3, 2, 1, 0))


# -- promise 9 --------------------------------------------------------------------------------------------------------


def test_9_queue_ids_are_unique_and_everywhere(tmp_path: Path) -> None:
    """Queue ids are unique across processes and threads, sort by arrival, and appear in the `250` reply, in `Received:`
    and first in every log line about the message."""
    ids: list[str] = []
    with Site(tmp_path, processes={"listeners": 3}) as site:

        def submit() -> None:
            with site.client() as client:
                for _ in range(10):
                    client.ehlo_or_helo_if_needed()
                    client.mail("a@sender.test")
                    client.rcpt("alice@example.org")
                    code, text = client.data(MESSAGE)
                    assert code == 250
                    ids.append(text.decode().rpartition(" ")[2])

        threads = [threading.Thread(target=submit) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stored = site.await_mail("alice", 100)
        in_order = [site.send("a@sender.test", "bob@example.org", MESSAGE) for _ in range(20)]
        site.await_empty_queue()
        log = site.log()
    assert in_order == sorted(in_order)
    assert len(ids) == len(set(ids)) == 100
    assert all(is_queue_id(queue_id) for queue_id in ids)
    received = {match[1].decode() for message in stored if (match := re.search(rb"\bid (\w+)", message))}
    assert received == set(ids)
    for queue_id in ids[:10]:
        lines = [line for line in log.splitlines() if queue_id in line]
        assert len(lines) >= 5
        assert all(re.search(rf"\]: {queue_id}: ", line) for line in lines), "first in every line"


# -- promise 10 -------------------------------------------------------------------------------------------------------


def test_10_names_in_the_maildir(tmp_path: Path) -> None:
    """Name = `<seconds>.M<microseconds>P<pid>Q<counter>.<host>`; the counter is shared by all threads of the process."""
    with Site(tmp_path) as site:
        with site.client() as client:
            for _ in range(30):
                client.sendmail("a@sender.test", ["alice@example.org", "bob@example.org"], MESSAGE)
        site.await_mail("alice", 30)
        site.await_mail("bob", 30)
        pids = {str(pid) for pid in site.deliveries()}
        names = [path.name for user in ("alice", "bob") for path in site.mailbox(user)]
        parts = [re.fullmatch(r"(\d+)\.M(\d+)P(\d+)Q(\d+)\.mx\.example\.org", name) for name in names]
    assert all(match is not None and match[3] in pids for match in parts)
    counters = [(match[3], match[4]) for match in parts if match]
    assert len(set(counters)) == 60
