"""Issue 2, Receiving: the limits, and what happens when the machine has no more. Each test names what it shows."""

from __future__ import annotations

import os
import re
import resource
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.client import Client
from tests.procs import cpu_seconds, descriptors, needs_root, suspend
from tests.site import Site, await_value

EHLO = "EHLO client.test"
MAIL = "MAIL FROM:<a@sender.test>"
RCPT = "RCPT TO:<alice@example.org>"
GREETING = "220 mx.example.org ESMTP mtad"
TIMEOUT = "421 4.4.2 Error: timeout exceeded"
SIZE = 65536


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    limits = {
        "message_size": SIZE,
        "recipients": 100,
        "command_timeout": "800ms",
        "data_timeout": "1500ms",
        "bad_commands": 8,
        "bad_commands_in_a_row": 4,
        "junk_commands": 20,
    }
    with Site(tmp_path_factory.mktemp("limits"), limits=limits, deliver=False) as site:
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    with Client(site.address()) as client:
        yield client


def _content(size: int) -> bytes:
    line = b"0123456789" * 7 + b"\r\n"
    return (line * (size // len(line) + 1))[: size - 2] + b"\r\n"


def test_message_size(site: Site, client: Client) -> None:
    """Limits: message size 552 5.3.4, when it is announced and when it has come; one octet less is taken."""
    client.begin(EHLO)
    assert client.say(f"{MAIL} SIZE={SIZE + 1}") == "552 5.3.4 Error: message size exceeds fixed limit"
    for size, code in ((SIZE, "250 2.0.0 "), (SIZE + 1, "552 5.3.4 "), (20 * SIZE, "552 5.3.4 ")):
        before = len(site.taken())
        for line in (f"{MAIL} SIZE=1", RCPT, "DATA"):
            assert client.say(line)[:1] in {"2", "3"}
        client.send(_content(size) + b".\r\n")
        assert client.reply().startswith(code), size
        assert len(site.taken()) == before + code.startswith("250")
    assert len(site.files("incoming")) == len(site.taken())


def test_recipients(client: Client) -> None:
    """Limits: recipients 452 4.5.3; those before are taken."""
    client.begin(EHLO, MAIL)
    for number in range(100):
        client.send(f"RCPT TO:<alice+{number}@example.org>\r\n".encode())
    refused = [client.reply()[:9] for _ in range(100)]
    assert set(refused) == {"550 5.1.1"}, "of one session a hundred may be unknown"


def test_too_many_recipients(site: Site) -> None:
    """Limits: recipients 452 4.5.3; the message is taken for those before."""
    with Client(site.address("relay")) as client:
        client.begin(EHLO, MAIL)
        for number in range(102):
            client.send(f"RCPT TO:<u{number}@far.test>\r\n".encode())
        assert [client.reply()[:9] for _ in range(102)] == ["250 2.1.5"] * 100 + ["452 4.5.3"] * 2
        client.say("DATA")
        client.send(b".\r\n")
        queue_id = client.reply().rpartition(" ")[2]
    [message] = [message for message in site.taken() if message.envelope.id == queue_id]
    assert len(message.envelope.recipients) == 100


def test_lines(client: Client) -> None:
    """Limits: lines. One that is too long is refused, whatever is in it, and the session goes on after it."""
    client.begin(EHLO)
    client.send(b"NOOP " + b"x" * 100_000 + b"\r\n")
    assert client.reply().startswith("500 5.5.2 ")
    assert client.say("NOOP").startswith("250 ")


def test_bad_commands_in_a_row(client: Client) -> None:
    """Limits: bad commands in a row (421 and gone)."""
    client.begin(EHLO)
    assert [client.say("X")[:3] for _ in range(4)] == ["502", "502", "502", "421"]
    assert client.closed()


def test_bad_commands_in_total(client: Client) -> None:
    """Limits: bad commands in total (421 and gone)."""
    client.begin(EHLO)
    for _ in range(7):
        assert client.say("X")[:3] == "502"
        client.say("NOOP")
    assert client.say("X").startswith("421 4.7.0 mx.example.org ")
    assert client.closed()


@pytest.mark.parametrize("before", [(), (EHLO,), (EHLO, MAIL), (EHLO, MAIL, RCPT)], ids=len)
def test_a_deadline_for_each_command(site: Site, before: tuple[str, ...]) -> None:
    """A deadline for each command: whoever is silent gets 421 4.4.2 and is gone."""
    start = time.monotonic()
    with Client(site.address()).begin(*before) as client:
        assert client.reply() == TIMEOUT
        assert client.closed()
    assert 0.7 < time.monotonic() - start < 8


def _trickle(client: Client, data: bytes, pause: float, start: float) -> float:
    """Send octets one by one until the server says something; how long that was after ``start``."""
    while time.monotonic() - start < 10:
        for number in range(len(data)):
            client.send(data[number : number + 1])
            if select.select([client.socket], [], [], pause)[0]:
                return time.monotonic() - start
    raise AssertionError("it would have gone on for ever")


@pytest.mark.parametrize("pause", [0.05, 0.0003], ids=["slowly", "fast"])
def test_trickling_does_not_stretch_the_deadline_of_a_command(client: Client, pause: float) -> None:
    """A deadline for each command that trickling cannot stretch, neither slowly nor so fast that the server never waits."""
    start = time.monotonic()
    client.begin(EHLO)
    assert 0.7 < _trickle(client, b"x" * 1000, pause, start) < 8
    assert client.reply() == TIMEOUT
    assert client.closed()


@pytest.mark.parametrize("pause", [0.05, 0.0003], ids=["slowly", "fast"])
def test_trickling_does_not_stretch_the_deadline_of_data(site: Site, client: Client, pause: float) -> None:
    """... and for the whole of DATA that trickling a byte a minute cannot stretch."""
    before = len(site.taken())
    start = time.monotonic()
    client.begin(EHLO, MAIL, RCPT, "DATA")
    assert 1.4 < _trickle(client, b"Subject: slow\r\n\r\n" + b"x\r\n" * 100, pause, start) < 8
    assert client.reply() == TIMEOUT
    assert client.closed()
    await_value(lambda: len(site.files("incoming")) == before, what="nothing of it is left")


def test_data_may_take_longer_than_a_command(tmp_path: Path) -> None:
    """The deadline of DATA is another than that of a command, and each command has its own."""
    limits = {"command_timeout": "1500ms", "data_timeout": "20s"}
    with Site(tmp_path, limits=limits, deliver=False) as site, Client(site.address()) as client:
        client.begin(EHLO, MAIL, RCPT, "DATA")
        client.send(b"Subject: x\r\n")
        assert client.quiet(2.0), "longer than a command may take"
        client.send(b".\r\n")
        assert client.reply().startswith("250 2.0.0 ")
        for _ in range(3):
            assert client.quiet(0.6)
            assert client.say("NOOP").startswith("250 ")


def test_a_deadline_is_written_in_the_log(site: Site, client: Client) -> None:
    """The log tells a client that was too slow from one that went away."""
    client.begin("EHLO slow.test", MAIL, RCPT, "DATA")
    assert client.reply() == TIMEOUT
    site.await_log(r"timeout after DATA from unknown\[127\.0\.0\.1\]$")


STATES = [
    (),
    (EHLO,),
    (EHLO, MAIL),
    (EHLO, MAIL, RCPT),
    (EHLO, MAIL, RCPT, "DATA"),
]


@pytest.mark.parametrize("how", ["FIN", "RST", "half a line"])
def test_early_disconnects_leave_nothing(site: Site, how: str) -> None:
    """A client that goes away in any state leaves nothing in the spool, and no session."""
    before = site.files("incoming")
    for state in STATES:
        for more in (b"", b"Subject: x\r\n", b"Subject: x\r\n" * 20_000):
            if more and state[-1:] != ("DATA",):
                continue
            client = Client(site.address()).begin(*state)
            client.send(more)
            if how == "half a line":
                client.send(b"QUI")
            if how == "RST":
                client.reset()
            client.socket.close()
    with Client(site.address()):
        pass  # not even the greeting is waited for
    await_value(lambda: site.status().sessions == 0, what="no session is left")
    assert site.files("incoming") == before
    assert "panic" not in site.log()


def test_a_message_that_was_acknowledged_stays_whoever_reads_that(site: Site, client: Client) -> None:
    """A client that goes away right after the final dot: the message is ours all the same."""
    before = len(site.taken())
    client.begin(EHLO, MAIL, RCPT, "DATA")
    client.send(b"Subject: in haste\r\n\r\n.\r\n")
    client.socket.close()
    await_value(lambda: len(site.taken()) == before + 1, what="it is kept")


# -- connections ------------------------------------------------------------------------------------------------------


def _by_turns(site: Site, act: Callable[[], None]) -> None:
    """Do something once with each listener alone accepting."""
    pids = site.pids("listener")
    assert len(pids) == 2
    for asleep in pids:
        suspend(asleep)
        try:
            act()
        finally:
            os.kill(asleep, signal.SIGCONT)


def test_connections_per_client(tmp_path: Path) -> None:
    """Connections per client (421 4.7.0), counted exactly over all listeners, and free again when sessions end."""
    with Site(tmp_path, limits={"connections_per_client": 6}) as site:
        clients: list[Client] = []

        def open_three() -> None:
            clients.extend(Client(site.address()).begin() for _ in range(3))

        _by_turns(site, open_three)
        assert sorted(process.sessions for process in site.status().processes) == [0, 3, 3]

        def refused() -> None:
            for source in ("127.0.0.1", ""):
                with Client(site.address("relay"), source=source) as client:
                    assert client.reply() == "421 4.7.0 mx.example.org Error: too many connections from 127.0.0.1"
                    assert client.closed()
            with Client(site.address(), source="127.0.0.9") as other:
                assert other.reply().startswith("220 "), "it is the limit of one client"

        _by_turns(site, refused)
        site.await_log(r"NOQUEUE: reject: CONNECT from unknown\[127\.0\.0\.1\]: 421 4\.7\.0 .*too many connections from")
        for number in range(3):
            clients.pop(0).socket.close()
            await_value(lambda: site.status().sessions == 5, what="it has left")
            clients.append(Client(site.address()).begin())
            with Client(site.address()) as client:
                assert client.reply().startswith("421 4.7.0 "), number
        for client in clients:
            client.socket.close()
        await_value(lambda: site.status().sessions == 0, what="all have left")


def test_connections_in_all(tmp_path: Path) -> None:
    """Connections in all (421 4.7.0), whoever they are from."""
    with Site(tmp_path, limits={"connections": 4}) as site:
        clients = [Client(site.address(), source=f"127.0.0.{number}").begin() for number in (1, 2, 3)]
        clients.append(Client(site.address(family="6")).begin())
        for family in ("4", "6"):
            with Client(site.address("relay", family)) as client:
                assert client.reply() == "421 4.7.0 mx.example.org Error: too many connections"
                assert client.closed()
        clients.pop().socket.close()
        await_value(lambda: site.status().sessions == 3, what="one has left")
        clients.append(Client(site.address()).begin())
        for client in clients:
            client.socket.close()


def test_a_burst_never_gets_past_the_limit(tmp_path: Path) -> None:
    """Connections in all: never one more, however many come at once over two listeners."""
    with Site(tmp_path, limits={"connections": 20, "connections_per_client": 1000}) as site:
        for _ in range(3):
            clients = [Client(site.address()) for _ in range(100)]
            answers = [client.reply()[:3] for client in clients]
            assert set(answers) == {"220", "421"}
            assert 18 <= answers.count("220") <= 20
            for client in clients:
                client.socket.close()
            await_value(lambda: site.status().sessions == 0, what="all have left")


# -- a machine that has no more ---------------------------------------------------------------------------------------


def test_s_pa15_no_descriptors_left(tmp_path: Path) -> None:
    """Where there are no descriptors for more, new sessions get 421 at once, those there are can send messages, nothing
    spins, and it is over when it is over."""

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    site = Site(tmp_path, limits={"connections_per_client": 1000}, processes={"listeners": 1}, deliver=False)
    site.start(preexec_fn=restrict)
    with site:
        clients = [Client(site.address()) for _ in range(80)]
        greetings = [client.reply() for client in clients]
        assert set(greetings) == {GREETING, "421 4.3.2 Error: server is too busy, try again later"}
        site.await_log(r"warning: new sessions are refused: too few descriptors$")
        greeted = [client for client, greeting in zip(clients, greetings, strict=True) if greeting == GREETING]
        assert 15 <= len(greeted) <= 25
        [listener] = site.pids("listener")
        before, lines, start = cpu_seconds(listener), site.log().count("\n"), time.monotonic()
        await_value(lambda: time.monotonic() - start > 0.6, what="time passes")
        assert cpu_seconds(listener) - before < 0.1
        assert site.log().count("\n") == lines, "and the log is not filled with it"
        for client in greeted:  # all of them at a time, each with its queue file
            for line in (EHLO, MAIL, RCPT, "DATA"):
                assert client.say(line)[:1] in {"2", "3"}, line
        for client in greeted:
            client.send(b"Subject: x\r\n.\r\n")
            assert client.reply().startswith("250 2.0.0 ")
            client.socket.close()
        await_value(lambda: site.status().sessions == 0, what="all have left")
        site.send("a@sender.test", "alice@example.org", "Subject: x\r\n\r\nx\r\n")
        assert len(site.taken()) == len(greeted) + 1
        assert len(descriptors(listener)) < 30
        assert "panic" not in site.log()


@needs_root
def test_no_space_left(tmp_path: Path) -> None:
    """A full disk: 452 4.3.1, never a 250 for what is not kept, and no half of a message stays."""
    spool = tmp_path / "spool"
    spool.mkdir()
    # In a mount namespace of the server's own, so that no mount can outlive it.
    prefix = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=400k,mode=700 tmpfs "$0" && exec "$@"', str(spool)]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    site = Site(tmp_path, top={"spool": str(spool)}, delivery={"processes": 1})
    site.configure(dns={"timeout": "100ms"})
    site.prefix = prefix
    site.launch()
    assert site.process is not None
    site.spool_path = Path(f"/proc/{site.process.pid}/root{spool}")
    site.await_up()
    with site:
        _fill(site)
        site.stop()


def _fill(site: Site) -> None:
    def send(content: bytes) -> str:
        for line in (MAIL, "RCPT TO:<b@far.test>", "DATA"):
            if not (answer := session.say(line)).startswith(("250 ", "354 ")):
                session.say("RSET")
                return answer
        session.send(content + b".\r\n")
        return session.reply()

    accepted: set[str] = set()
    answers: list[str] = []
    with Client(site.address("relay")).begin(EHLO) as session:
        while len(answers) - len(accepted) < 5:
            answers.append(send(b"Subject: fill\r\n\r\n" + _content(50_000)))
            if answers[-1].startswith("250 "):
                accepted.add(answers[-1].rpartition(" ")[2])
            else:
                assert answers[-1].startswith("452 4.3.1 "), answers[-1]
        assert 3 <= len(accepted) <= 8
        await_value(lambda: accepted == set(site.files("deferred")), what="all that was acknowledged is there")
        assert site.files("incoming") == [], "no half of a message"
        os.unlink(site.spool_path / "deferred" / accepted.pop())
        assert send(b"Subject: there is space again\r\n").startswith("250 2.0.0 ")


def test_reply_texts_of_limits_are_421(site: Site, client: Client) -> None:
    """421 tells the client to come back later (RFC 5321 section 4.2.2): junk without end is cut, too."""
    client.begin()
    client.send(b"NOOP\r\n" * 100)
    replies = []
    while answer := client.reply():
        replies.append(answer)
    assert re.match(r"421 4\.7\.0 ", replies[-1])
    assert 20 < len(replies) < 30
