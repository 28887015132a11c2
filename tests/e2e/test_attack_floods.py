"""Much, endlessly, slowly, or all at once: S-PA6, S-PA7, S-PA10, S-PA14, S-PA15 and S-PA16 of the attacks.

Limits are small, so that what takes minutes on the internet takes a moment here. Memory and processor time are those of the
server's processes. What is cut off here is cut off by a deadline; the least rate of content is in test_floods.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.client import Client
from tests.e2e.attack_aid import EHLO, MAIL, MIB, PATIENT, RCPT, Memory, deliver, harvest, listeners, pour
from tests.e2e.test_auth import auth_site
from tests.e2e.tls_site import TlsClient, tls_site
from tests.peers.mx import Mx, Say, Script
from tests.procs import cpu_seconds
from tests.site import Site, await_value

#: What a process may use for whatever one client does.
BOUND: Final = 3 * MIB


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with the limits that everybody has."""
    with Site(tmp_path_factory.mktemp("floods"), deliver=False) as site:
        yield site


# -- S-PA6: recipients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listener", "domain", "taken", "borne"),
    [("relay", "far.test", 1000, ["452"] * 1000), ("inbound", "example.org", 0, ["550"] * 100)],
    ids=["to anywhere", "guesses"],
)
def test_s_pa6_a_hundred_thousand_recipients(site: Site, listener: str, domain: str, taken: int, borne: list[str]) -> None:
    """Those that can be taken are, as many again are put off, and refused, one by one; then it is over."""
    with Client(site.address(listener)) as client, listeners(site) as memory:
        client.begin(EHLO, MAIL)
        answers = pour(client, b"".join(b"RCPT TO:<u%d@%s>\r\n" % (n, domain.encode()) for n in range(100_000)))
    assert [answer[:3] for answer in answers[: taken + len(borne)]] == ["250"] * taken + borne
    assert taken + len(borne) < len(answers) <= taken + len(borne) + 10
    assert answers[-1].startswith("421 4.7.0 ")
    assert memory.growth < BOUND
    harvest(site, 0)


def test_s_pa6_one_recipient_a_hundred_thousand_times(site: Site) -> None:
    """That is one recipient, and none of the others is forgotten."""
    with Client(site.address()) as client, listeners(site) as memory:
        client.begin(EHLO, MAIL, "RCPT TO:<bob@example.org>")
        for _ in range(20):
            client.send(f"{RCPT}\r\n".encode() * 5000)
            assert {client.reply() for _ in range(5000)} == {"250 2.1.5 Ok"}
        assert deliver(client).startswith("250 ")
    assert memory.growth < BOUND
    [message] = harvest(site, 1)
    assert [recipient.address for recipient in message.envelope.recipients] == ["bob@example.org", "alice@example.org"]


# -- S-PA7: headers -----------------------------------------------------------------------------------------------------


def _nested(depth: int) -> bytes:
    levels = (b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (level, level) for level in range(depth))
    return b"MIME-Version: 1.0\r\n" + b"".join(levels) + b"\r\n\xe4\r\n"


HEADERS: Final[dict[str, Callable[[], bytes]]] = {
    "100,000 lines": lambda: b"X-Header: y\r\n" * 100_000 + b"\r\n\xe4\r\n",
    "one of 1 MiB": lambda: b"Subject: " + b"x" * MIB + b"\r\n\r\n\xe4\r\n",
    "100,000 continuations": lambda: b"Subject: x\r\n" + b" y\r\n" * 100_000 + b"\r\n\xe4\r\n",
    "20,000 addresses": lambda: b"To: a@b.test" + b",\r\n user@host.test" * 20_000 + b"\r\n\r\n\xe4\r\n",
    "10,000 parts in parts": lambda: _nested(10_000),
    "1,000,000 parameters": lambda: b"Content-Type: text/plain" + b"; a=b" * 1_000_000 + b"\r\n\r\n\xe4\r\n",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Mx]]:
    """A site whose next hop knows neither 8BITMIME nor one of two recipients: all is converted, and reported on."""
    script = Script(rcpt={"gone@far.test": Say("550 5.1.1 gone")}, extensions=("PIPELINING",))
    with Mx("127.0.0.1", script=script) as mx:
        hop = {"next_hop": f"[127.0.0.1]:{mx.port}", "processes": 1}
        with Site(tmp_path_factory.mktemp("headers"), delivery=hop) as site:
            yield site, mx


@pytest.mark.parametrize("name", HEADERS)
def test_s_pa7_a_monstrous_header_goes_its_way(world: tuple[Site, Mx], name: str) -> None:
    """Taken, kept, converted, sent on, and reported on, each once, and none of it costs memory; time is in
    tests/unit/test_attack_time."""
    site, mx = world
    content = HEADERS[name]()
    kept, reports, sent = len(site.mailbox("bob")), len(site.mailbox("alice")), len(mx.messages)
    site.send("alice@example.org", "bob@example.org", "Subject: first, so that there is a process\r\n\r\n", "relay")
    site.await_mail("bob", kept + 1)
    with Memory(site.pids("listener")) as taking, Memory(site.deliveries()) as sending:
        recipients = ["bob@example.org", "friend@far.test", "gone@far.test"]
        site.send("alice@example.org", recipients, content, "relay")
        site.await_empty_queue()
    assert taking.growth < BOUND
    assert sending.growth < 2 * BOUND
    assert site.await_mail("bob", kept + 2)[-1].endswith(b"\n" + content.replace(b"\r\n", b"\n"))
    [report] = site.await_mail("alice", reports + 1)[reports:]
    assert b"gone@far.test" in report
    assert len(report) < 100_000, "a report is no way to have somebody flooded"
    messages = mx.messages[sent:]
    if name == "10,000 parts in parts":
        assert messages == []
        assert b"5.6.3" in report
    else:
        assert [message.recipients for message in messages] == [["friend@far.test"]]
        assert messages[0].content.isascii()
    assert "panic" not in site.log()


def test_s_pa7_ten_thousand_hops_are_a_loop(site: Site) -> None:
    with Client(site.address()) as client, listeners(site) as memory:
        client.begin(EHLO, MAIL, RCPT)
        assert deliver(client, b"Received: from a by b; c\r\n" * 10_000 + b"\r\nx\r\n").startswith("554 5.4.6 ")
        assert client.say("NOOP").startswith("250 ")
    assert memory.growth < BOUND
    harvest(site, 0)


# -- S-PA10: commands that lead nowhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["NOOP", "NOOP x", "RSET", "HELP", "VRFY alice", "EXPN all", "XYZZY", "\t", MAIL])
@pytest.mark.parametrize("greeted", [False, True], ids=["before EHLO", "after EHLO"])
def test_s_pa10_ten_thousand_commands_that_lead_nowhere(site: Site, command: str, greeted: bool) -> None:
    with Client(site.address()) as client, listeners(site) as memory:
        client.begin(*[EHLO] * greeted)
        answers = pour(client, f"{command}\r\n".encode() * 10_000)
    assert answers[-1].startswith("421 4.7.0 mx.example.org Error: too many errors")
    junk = command.split()[:1] in (["NOOP"], ["RSET"], ["HELP"])
    assert len(answers) <= (110 if junk else 11)
    assert memory.growth < BOUND


@pytest.mark.parametrize("command", [EHLO, "HELO client.test"])
def test_s_pa10_a_storm_of_greetings(site: Site, command: str) -> None:
    """All at once is out of order; one after the other leads nowhere."""
    with Client(site.address()) as client:
        client.begin()
        answers = pour(client, f"{command}\r\n".encode() * 10_000)
        assert [answer[:9] for answer in answers] == ["554 5.5.0"]
    with Client(site.address()) as client:
        client.begin()
        answers = [client.say(command)[:3] for _ in range(111)]
        cut_off = answers.index("421")
        assert set(answers[:cut_off]) == {"250"}
        assert 100 <= cut_off <= 110


def test_s_pa10_a_message_now_and_then_does_not_buy_more(site: Site) -> None:
    """Half begun transactions do not count as messages."""
    with Client(site.address()) as client:
        client.begin(EHLO)
        answers = pour(client, f"{MAIL}\r\n{RCPT}\r\nRSET\r\n".encode() * 5000)
    assert answers[-1].startswith("421 4.7.0 ")
    assert len(answers) < 400
    harvest(site, 0)


# -- S-PA14: slowly -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site that waits for nobody, and for few at a time."""
    limits = {
        "command_timeout": "2s",
        "data_timeout": "3s",
        "tls_timeout": "2s",
        "connections_per_client": 18,
        "connections": 40,
    }
    with auth_site(tmp_path_factory.mktemp("hasty"), limits=limits, deliver=False) as site:
        yield site


#: Where, after which lines, and what then comes octet by octet.
SLOW: Final = {
    "greeting": ("inbound", [], b""),
    "EHLO": ("inbound", [], b"EHLO client.test."),
    "command": ("inbound", [EHLO], b"NOOP x"),
    "RCPT": ("inbound", [EHLO, MAIL], b"RCPT TO:<alice"),
    "DATA": ("inbound", [EHLO, MAIL, RCPT, "DATA"], b"Subject: x\r\n\r\nx\r\n.."),
    "BDAT": ("inbound", [EHLO, MAIL, RCPT], b"BDAT 10000\r\n"),
    "AUTH": ("loopback", ["EHLO laptop", "AUTH LOGIN"], b"YWxpY2U"),
    "TLS": ("submissions", None, b"\x16\x03\x01\x02\x00\x01\x00"),
    "STARTTLS": ("inbound", [EHLO, "STARTTLS"], b"\x16\x03\x01\x02\x00\x01\x00"),
}


def test_s_pa14_who_is_slow_is_cut_off_and_holds_up_nobody(hasty: Site) -> None:
    """As many slow ones as one client may be, two in each state, an octet every 30 ms: everybody else is served at once,
    and each of them is gone at its deadline, which no octet moves."""
    slow: dict[Client, tuple[str, Iterator[int]]] = {}
    for _ in range(2):
        for name, (listener, lines, drip) in SLOW.items():
            client = Client(hasty.address(listener), source="127.0.0.2")
            if lines is not None:
                client.begin(*lines)
            slow[client] = (name, iter(drip + drip[-1:] * 1000))
    start = time.monotonic()
    with Client(hasty.address(), source="127.0.0.2") as one_more:
        assert one_more.reply().startswith("421 4.7.0 "), "one client is not more than it may be"
    with Client(hasty.address(), source="127.0.0.3") as other:
        other.begin(EHLO, MAIL, RCPT)
        assert deliver(other).startswith("250 ")
        assert time.monotonic() - start < 1.7, "nobody was cut off yet"
    last_words: dict[str, set[str]] = {name: set() for name in SLOW}
    while slow and time.monotonic() - start < 15:
        ready = select.select([client.socket for client in slow], [], [], 0.03)[0]
        for ended in [client for client in slow if client.socket in ready]:
            last_words[slow.pop(ended)[0]].add(ended.reply())
            ended.socket.close()
        for client, (_, octets) in slow.items():
            client.send(bytes([octet]) if (octet := next(octets, None)) is not None else b"")
    assert not slow, f"still there: {sorted(name for name, _ in slow.values())}"
    assert time.monotonic() - start < 10
    told = {"421 4.4.2 Error: timeout exceeded"}
    assert last_words == {name: {""} if "TLS" in name else told for name in SLOW}
    await_value(lambda: hasty.status().sessions == 0, what="all sessions have ended")
    harvest(hasty, 1)


# -- S-PA15: many -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with room for forty."""
    with Site(tmp_path_factory.mktemp("crowded"), limits={"connections": 40}, deliver=False) as site:
        yield site


@pytest.mark.parametrize("how", ["and stay", "and leave", "and break off", "and talk"])
def test_s_pa15_a_flood_of_connections(crowded: Site, how: str) -> None:
    """Far more than there may be, from several places: each is served or told, the processes live, and it is over when
    it is over. That running out of descriptors does not spin is in test_limits."""
    pids = crowded.processes()
    cpu = sum(map(cpu_seconds, pids))
    clients = []
    for number in range(400):
        client = Client(crowded.address(), source=f"127.0.0.{number % 10 + 10}")
        if how == "and stay":
            clients.append(client)
        elif how == "and break off":
            client.reset()
        else:
            client.send(f"{EHLO}\r\nQUIT\r\n".encode() if how == "and talk" else b"")
            client.socket.close()
    if how == "and stay":
        answers = [client.reply()[:9] for client in clients]
        assert set(answers) == {"220 mx.ex", "421 4.7.0"}
        assert 36 <= answers.count("220 mx.ex") <= 40
    for client in clients:
        client.socket.close()
    await_value(lambda: crowded.status().sessions == 0, what="all sessions have ended")
    assert crowded.processes() == pids
    with Client(crowded.address()) as client:
        client.begin(EHLO, MAIL, RCPT)
        assert deliver(client).startswith("250 ")
    harvest(crowded, 1)
    assert sum(map(cpu_seconds, pids)) - cpu < 4
    assert "panic" not in crowded.log()


# -- S-PA16: never listening --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["in clear", "inside TLS"])
def test_s_pa16_who_never_reads_its_replies_is_left(tmp_path: Path, tls: bool) -> None:
    """The server stops reading when it cannot write, holds no more than the kernel does, and goes at its deadline."""
    limits = PATIENT | {"command_timeout": "600ms"}
    with tls_site(tmp_path, limits=limits, processes={"listeners": 1}, deliver=False) as site:

        def begun() -> TlsClient:
            client = TlsClient(site.address("smtps" if tls else "plain"))
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            return (client.secure() if tls else client).begin(EHLO, MAIL)

        with begun() as first:
            first.say("QUIT")  # the first one costs what all that follow use
        with listeners(site) as memory, begun() as client:
            commands = b"RCPT TO:<nobody@example.org>\r\n" * 10_000
            client.socket.settimeout(0.2)
            assert _until_stuck(client.socket, commands) < 40 * len(commands), "the server would read for ever"
            await_value(lambda: site.status().sessions == 0, timeout=5, what="it is given up")
        assert memory.growth < BOUND
        site.await_log(r"(lost connection|timeout) after RCPT from unknown\[127\.0\.0\.1\]")
        harvest(site, 0)


def _until_stuck(connection: socket.socket, data: bytes) -> int:
    """Send it again and again until the other side takes no more; how many octets that were."""
    said = 0
    try:
        while said < 100 * len(data):
            said += connection.send(data[: 1 << 14])
    except (TimeoutError, ConnectionError, ssl.SSLError):
        pass  # stuck, or left
    return said
