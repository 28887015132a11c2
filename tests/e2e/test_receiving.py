"""Issue 2, Receiving, over real sockets. Each test names the sentence that it shows.

What each command says in each state is in tests/dialogues, and played by test_dialogues_live.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client import Client
from tests.procs import needs_networks
from tests.site import PATIENCE, Site, Taken, await_value

EHLO = "EHLO client.test"
MAIL = "MAIL FROM:<a@sender.test>"
RCPT = "RCPT TO:<alice@example.org>"

families = pytest.mark.parametrize("family", ["4", "6"], ids=["IPv4", "IPv6"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    listeners = [
        {"name": "inbound", "service": "mx", "address": ["127.0.0.1:0", "[::1]:0"]},
        {"name": "relay", "service": "relay", "address": ["127.0.0.1:0"], "trusted": ["127.0.0.2/32"]},
    ]
    site = Site(tmp_path_factory.mktemp("receiving"), listeners=listeners, deliver=False)
    site.configure(local={"domains": ["example.org", "second.example"]})
    with site:
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    with Client(site.address()) as client:
        yield client


def _deliver(site: Site, client: Client, content: bytes, *lines: str) -> Taken:
    """Send a message and return what was kept of it."""
    client.begin(*(lines or (EHLO, MAIL, RCPT)), "DATA")
    client.send(content + b".\r\n")
    answer = client.reply()
    assert answer.startswith("250 2.0.0 Ok: queued as "), answer
    queue_id = answer.rpartition(" ")[2]
    return next(message for message in site.taken() if message.envelope.id == queue_id)


@families
def test_it_greets_with_its_host_name(site: Site, family: str) -> None:
    """A listener binds addresses, IPv4 and IPv6. It greets with its host name."""
    with Client(site.address(family=family)) as client:
        assert client.reply() == "220 mx.example.org ESMTP mtad"
        assert client.say(EHLO).startswith("250-mx.example.org\n250-")


def test_one_thread_per_connection(site: Site) -> None:
    """One thread per connection: those who are slow, or in the middle of something, keep nobody waiting."""
    slow = [Client(site.address()) for _ in range(20)]
    for number, client in enumerate(slow):
        client.begin(*(EHLO, MAIL, RCPT, "DATA")[: number % 5])
        client.send(b"RS"[: number % 3])
    with Client(site.address()) as client:
        _deliver(site, client, b"Subject: fast\r\n")
    for client in slow:
        client.socket.close()


def test_a_whole_session(site: Site, client: Client) -> None:
    """EHLO, HELO, MAIL, RCPT, DATA, RSET, NOOP, QUIT, HELP."""
    client.begin("HELO client.test", "HELP", "NOOP", MAIL, "RSET", EHLO, MAIL, RCPT, "DATA")
    client.send(b"Subject: x\r\n.\r\n")
    assert client.reply().startswith("250 2.0.0 Ok: queued as ")
    assert client.say("QUIT") == "221 2.0.0 Bye"
    assert client.closed()


@pytest.mark.parametrize("command", ["EXPN list", "TURN", "SEND FROM:<a@b>", "XYZZY", "X"])
def test_what_is_not_implemented(client: Client, command: str) -> None:
    """EXPN is not implemented: 502 5.5.1; so is any unknown verb."""
    client.begin(EHLO)
    assert client.say(command).startswith("502 5.5.1 ")


@pytest.mark.parametrize(
    ("before", "command"),
    [
        ((), MAIL),
        ((), RCPT),
        ((), "DATA"),
        ((EHLO,), RCPT),
        ((EHLO,), "DATA"),
        ((EHLO, MAIL), MAIL),
        ((EHLO, MAIL), "DATA"),
        ((EHLO, MAIL, RCPT), MAIL),
        ((EHLO, MAIL, RCPT, "RSET"), "DATA"),
        ((EHLO, MAIL, RCPT, EHLO), RCPT),
    ],
)
def test_out_of_order(client: Client, before: tuple[str, ...], command: str) -> None:
    """Commands out of order 503 5.5.1."""
    client.begin(*before)
    assert client.say(command).startswith("503 5.5.1 ")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("MAIL", "501 5.5.4 "),
        ("MAIL FROM:<a@b> SIZE=x", "501 5.5.4 "),
        ("MAIL FROM:<a@@b>", "501 5.1.7 "),
        ("MAIL FROM:<a@-b>", "501 5.1.7 "),
        ("EHLO", "501 5.5.4 "),
        ("DATA now", "503 5.5.1 "),
        ("QUIT now", "501 5.5.4 "),
        ("RSET now", "501 5.5.4 "),
    ],
)
def test_bad_syntax(client: Client, command: str, code: str) -> None:
    """Bad syntax 501 5.5.4 / 5.1.7."""
    client.begin(EHLO)
    assert client.say(command).startswith(code)


def test_bad_recipients(client: Client) -> None:
    """Bad syntax 501 5.5.4 / 5.1.3."""
    client.begin(EHLO, MAIL)
    assert client.say("RCPT TO:<alice@@example.org>").startswith("501 5.1.3 ")
    assert client.say("RCPT FROM:<alice@example.org>").startswith("501 5.5.4 ")


def test_typed_by_hand(site: Site, client: Client) -> None:
    """What people type by hand works: `MAIL FROM: user@host` with a space and without brackets."""
    message = _deliver(
        site,
        client,
        b"Subject: by hand\r\n\r\nhello\r\n",
        "helo  me.test",
        "mail from: a@sender.test",
        "RcPt To:alice@example.org",
        "rcpt to: <bob@example.org> ",
    )
    assert message.envelope.sender == "a@sender.test"
    assert [recipient.address for recipient in message.envelope.recipients] == ["alice@example.org", "bob@example.org"]


def test_source_routes_are_dropped(site: Site, client: Client) -> None:
    """Source routes are never followed: the route is dropped."""
    message = _deliver(
        site,
        client,
        b"\r\n",
        EHLO,
        "MAIL FROM:<@evil.test,@worse.test:a@sender.test>",
        "RCPT TO:<@evil.test:alice@example.org>",
    )
    assert message.envelope.sender == "a@sender.test"
    assert [recipient.address for recipient in message.envelope.recipients] == ["alice@example.org"]


@pytest.mark.parametrize(
    ("recipient", "code"),
    [
        ("alice%far.test@example.org", "550 5.1.1 "),
        ("far.test!alice@example.org", "550 5.1.1 "),
        ("nobody@example.org", "550 5.1.1 "),
        ("b@far.test", "550 5.7.1 "),
        ("@example.org:b@far.test", "550 5.7.1 "),
        ("ALICE@Example.ORG", "250 2.1.5 "),
        ("postmaster@example.org", "250 2.1.5 "),
        ("PostMaster@second.example", "250 2.1.5 "),
        ("postmaster", "250 2.1.5 "),
        ("alice@second.example", "550 5.1.1 "),
    ],
)
def test_for_whom_mail_is_taken(client: Client, recipient: str, code: str) -> None:
    """Mail is taken for users in the users file, for `postmaster`, and refused for everybody else at RCPT."""
    client.begin(EHLO, MAIL)
    assert client.say(f"RCPT TO:<{recipient}>").startswith(code)


@pytest.mark.parametrize(("source", "code"), [("127.0.0.2", "250 2.1.5 "), ("127.0.0.1", "554 5.7.1 ")])
def test_who_may_relay(site: Site, source: str, code: str) -> None:
    """... unless the client may relay (a `relay` listener and a trusted address)."""
    with Client(site.address("relay"), source=source) as client:
        client.begin(EHLO, MAIL)
        assert client.say("RCPT TO:<b@far.test>").startswith(code)
        assert client.say(RCPT)[:1] == code[:1], "others may not even send to local users through a relay"


@families
@pytest.mark.parametrize(("verb", "protocol"), [("EHLO", "ESMTP"), ("HELO", "SMTP")])
def test_received(site: Site, family: str, verb: str, protocol: str) -> None:
    """Received: is added with the queue id, `with ESMTP`/`SMTP`, the client's address and name as given."""
    with Client(site.address(family=family)) as client:
        message = _deliver(site, client, b"Subject: x\r\n\r\nbody\r\n", f"{verb} Some.Name.test", MAIL, RCPT)
    literal = {"4": r"\[127\.0\.0\.1\]", "6": r"\[IPv6:::1\]"}[family]
    field = (
        rf"Received: from Some\.Name\.test \(unknown {literal}\)\r\n"
        rf"\tby mx\.example\.org \(mtad\) with {protocol} id {message.envelope.id}\r\n"
        r"\tfor <alice@example\.org>; \w{3}, \d{2} \w{3} \d{4} \d{2}:\d{2}:\d{2} [+-]\d{4}\r\n"
    )
    assert re.fullmatch(field + "Subject: x\r\n\r\nbody\r\n", message.content.decode())


def test_hops(site: Site, client: Client) -> None:
    """More than 50 Received: headers 554 5.4.6."""
    _deliver(site, client, b"Received: from a by b; now\r\n" * 50 + b"\r\nbody\r\n")
    before = len(site.taken())
    for line in (MAIL, RCPT, "DATA"):
        client.say(line)
    client.send(b"Received: from a by b; now\r\n" * 51 + b"\r\nbody\r\n.\r\n")
    assert client.reply() == "554 5.4.6 Error: too many hops"
    assert len(site.taken()) == before


def test_what_ends_a_message(site: Site, client: Client) -> None:
    """CRLF.CRLF alone ends a message."""
    message = _deliver(site, client, b"Subject: dots\r\n\r\n..\r\n. \r\n...\r\n.x\r\n")
    assert message.content.endswith(b"\r\n\r\n.\r\n \r\n..\r\nx\r\n")
    for false_end in (b"\n.\n", b"\r.\r", b"\n.\r\n", b"\r\n.\n", b"\r\n.\r"):
        for line in (MAIL, RCPT, "DATA"):
            assert client.say(line)[:1] in {"2", "3"}
        client.send(b"Subject: x\r\n\r\n" + false_end + b"MAIL FROM:<smuggled@evil.test>\r\n")
        assert client.quiet(0.05), false_end
        client.send(b"\r\n.\r\n")
        assert client.reply().startswith("550 5.5.2 ")
    assert not any("smuggled" in message.envelope.sender for message in site.taken())


def test_many_messages_in_one_session(site: Site, client: Client) -> None:
    """The session goes on after a message, and after one that was refused."""
    before = len(site.taken())
    client.begin(EHLO)
    for number in range(5):
        batch = f"{MAIL}\r\n{RCPT}\r\nDATA\r\n"
        client.send(batch.encode())
        assert [client.reply()[:4] for _ in range(3)] == ["250 ", "250 ", "354 "]
        client.send(b"Subject: %d\r\n\r\n.\r\n" % number)
        assert client.reply().startswith("250 2.0.0 ")
    assert len(site.taken()) == before + 5


def test_the_log_tells_the_commands(site: Site, client: Client) -> None:
    """The line at the end of a session counts its commands as Postfix's does."""
    client.begin("EHLO disconnect.test", MAIL, RCPT)
    client.say("RCPT TO:<nobody@example.org>")
    client.say("NONSENSE")
    client.say("DATA")
    client.send(b".\r\n")
    client.reply()
    for line in (MAIL, RCPT, "DATA"):
        client.say(line)
    client.send(b"bare\n\r\n.\r\n")
    assert client.reply().startswith("550 5.5.2 ")
    client.say("QUIT")
    site.await_log(
        r"disconnect from unknown\[127\.0\.0\.1\] ehlo=1 mail=2 rcpt=2/3 unknown=0/1 data=1/2 quit=1 commands=7/10$"
    )


def _network_of_its_own() -> subprocess.Popen[bytes]:
    holder = subprocess.Popen(["unshare", "-n", "sleep", "600"])
    ours = Path("/proc/self/ns/net").readlink()
    await_value(lambda: Path(f"/proc/{holder.pid}/ns/net").readlink() != ours, what="a network")
    return holder


@pytest.fixture
def two_networks() -> Iterator[tuple[int, int]]:
    """Two networks with a cable between them: 10.77.0.1 (device mx0) and 10.77.0.2; by a process in each."""
    holders = [_network_of_its_own() for _ in range(2)]
    first, second = (holder.pid for holder in holders)

    def ip(where: int, command: str) -> None:
        subprocess.run(["nsenter", "-t", str(where), "-n", "ip", *command.split()], check=True)

    try:
        subprocess.run(f"ip link add mx0 netns {first} type veth peer name out0 netns {second}".split(), check=True)
        for where, device, address in ((first, "mx0", "10.77.0.1/24"), (second, "out0", "10.77.0.2/24")):
            ip(where, f"addr add {address} dev {device}")
            ip(where, f"link set {device} up")
            ip(where, "link set lo up")
        yield first, second
    finally:
        for holder in holders:
            holder.kill()
            holder.wait(PATIENCE)


GREET = "import socket,sys; print(socket.create_connection((sys.argv[1], 2525), 5).recv(99).decode())"


@needs_networks
def test_one_network_device_by_name(tmp_path: Path, two_networks: tuple[int, int]) -> None:
    """A listener binds addresses, or one network device by name (`interface`)."""
    inside, outside = two_networks
    listeners = [
        {"name": "device", "service": "mx", "address": ["0.0.0.0:2525"], "interface": "mx0"},
        {"name": "loopback", "service": "mx", "address": ["0.0.0.0:2526"], "interface": "lo"},
    ]

    def greeting(where: int, address: str) -> str:
        command = ["nsenter", "-t", str(where), "-n", sys.executable, "-c", GREET, address]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        return result.stdout.strip() or result.stderr.strip().splitlines()[-1]

    site = Site(tmp_path, listeners=listeners)
    site.prefix = ["nsenter", "-t", str(inside), "-n"]
    with site:
        assert greeting(outside, "10.77.0.1") == "220 mx.example.org ESMTP mtad"
        assert greeting(inside, "127.0.0.1").startswith("ConnectionRefusedError"), "that comes in by another device"
    site.listeners[0]["interface"] = "nowhere0"
    site.configure()
    result = site.run("mtad", "check")
    assert result.returncode == 78
    assert "interface: there is no network device 'nowhere0'" in result.stderr


def test_a_hundred_sessions_at_once_mix_nothing_up(site: Site) -> None:
    """One thread per connection: what one says never ends up with another."""
    before = {message.envelope.id for message in site.taken()}

    def send(number: int) -> None:
        with Client(site.address(), source=f"127.0.0.{number % 4 + 1}") as client:
            client.begin(f"EHLO client{number}.test", f"MAIL FROM:<u{number}@sender.test>", RCPT, "DATA")
            for line in range(50):
                client.send(b"%d:%d\r\n" % (number, line))
            client.send(b".\r\n")
            assert client.reply().startswith("250 ")

    threads = [threading.Thread(target=send, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    new = [message for message in site.taken() if message.envelope.id not in before]
    assert len(new) == 100
    for message in new:
        number = message.envelope.sender.removeprefix("u").partition("@")[0]
        assert f"Received: from client{number}.test ".encode() in message.content
        expected = "".join(f"{number}:{line}\r\n" for line in range(50)).encode()
        assert message.content.endswith(expected)
