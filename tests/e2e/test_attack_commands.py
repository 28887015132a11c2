"""Commands out of order, ahead of their time, or for another purpose: S-PA10 to S-PA12, S-PA17, S-PA18 of the attacks."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator
from typing import Final

import pytest

from tests.client import Client
from tests.e2e.attack_aid import EHLO, MAIL, MIB, PATIENT, RCPT, deliver, harvest, listeners
from tests.procs import cpu_seconds
from tests.site import Site, await_value

SIZE: Final = 65536


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("commands"), limits=PATIENT | {"message_size": SIZE}, deliver=False) as site:
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    with Client(site.address()) as client:
        yield client


# -- S-PA10, S-PA11: order ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site that waits for those who cannot wait."""
    with Site(tmp_path_factory.mktemp("patient"), limits={"greeting_delay": "200ms"}, deliver=False) as site:
        yield site


@pytest.mark.parametrize("early", [f"{EHLO}\r\n", "E", "\r\n", "\0", "GET / HTTP/1.1\r\n\r\n", f"{EHLO}\r\n{MAIL}\r\n"])
def test_s_pa10_who_speaks_before_the_greeting_is_sent_away(patient: Site, early: str) -> None:
    with Client(patient.address()) as client:
        client.send(early.encode())
        assert client.reply().startswith("554 5.5.0 mx.example.org ")
        assert client.closed()
    with Client(patient.address()) as client:
        client.begin(EHLO)


AHEAD: Final = {
    "all in one": [EHLO, MAIL, RCPT, "DATA", "Subject: x", "", ".", "QUIT"],
    "all behind the greeting": [MAIL, RCPT, "DATA", "Subject: x", "", ".", "QUIT"],
    "another message behind DATA": [MAIL, RCPT, "DATA", ".", "MAIL FROM:<evil@a>", RCPT, "DATA", ".", "QUIT"],
    "a command behind DATA": [MAIL, RCPT, "DATA", "NOOP"],
}


@pytest.mark.parametrize("lines", AHEAD.values(), ids=AHEAD)
def test_s_pa10_what_must_wait_for_a_reply_is_not_obeyed(site: Site, client: Client, lines: list[str]) -> None:
    client.begin(*[EHLO] * (lines[0] != EHLO))
    client.send("".join(f"{line}\r\n" for line in lines).encode())
    answers = list(iter(client.reply, ""))
    assert answers[-1].startswith("554 5.5.0 ")
    assert not any(answer.startswith("354 ") for answer in answers)
    harvest(site, 0)


def test_s_pa10_a_group_that_ends_with_data_is_answered_in_order(site: Site, client: Client) -> None:
    client.begin(EHLO)
    group = [MAIL, "RCPT TO:<nobody@example.org>", RCPT, "NOOP", "DATA"]
    client.send("".join(f"{line}\r\n" for line in group).encode())
    assert [client.reply()[:3] for _ in group] == ["250", "550", "250", "250", "354"]
    client.send(b"Subject: x\r\n\r\n.\r\nRSET\r\nQUIT\r\n")
    assert [client.reply()[:3] for _ in range(3)] == ["250", "250", "221"]
    [message] = harvest(site, 1)
    assert [recipient.address for recipient in message.envelope.recipients] == ["alice@example.org"]


@pytest.mark.parametrize("greeting", ["HELO other.test", "EHLO other.test", "RSET"])
def test_s_pa10_a_greeting_in_a_transaction_gives_it_up(site: Site, client: Client, greeting: str) -> None:
    client.begin(EHLO, MAIL, RCPT, greeting)
    for line in (RCPT, "DATA", "BDAT 0 LAST"):
        assert client.say(line).startswith("503 "), line
    harvest(site, 0)


GROUPS: Final = {
    "recipients without a sender": ([RCPT, "DATA"], ["503", "503"]),
    "a sender within a transaction": ([MAIL, RCPT, "MAIL FROM:<evil@a>", "RSET"], ["250", "250", "503", "250"]),
    "a sender twice": ([MAIL, "MAIL FROM:<evil@a>", "RSET"], ["250", "503", "250"]),
    "no recipient": ([MAIL, "DATA"], ["250", "503"]),
    "no recipient that is one": ([MAIL, "RCPT TO:<a@evil.test>", "RCPT TO:<", "DATA"], ["250", "550", "501", "554"]),
    "a sender that is none": (["MAIL FROM:<a@@b>", RCPT, "DATA"], ["501", "503", "503"]),
}


@pytest.mark.parametrize(("lines", "codes"), GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("pipelined", [False, True], ids=["one by one", "in one group"])
def test_s_pa11_out_of_order(site: Site, client: Client, pipelined: bool, lines: list[str], codes: list[str]) -> None:
    client.begin(EHLO)
    if pipelined:
        client.send("".join(f"{line}\r\n" for line in lines).encode())
        assert [client.reply()[:3] for _ in lines] == codes
    else:
        assert [client.say(line)[:3] for line in lines] == codes
    # what would have been the content is commands, and none of them does anything
    client.send(b"Subject: x\r\n\r\n.\r\n")
    assert [client.reply()[:1] for _ in range(3)] == ["5"] * 3
    harvest(site, 0)


# -- S-PA12: chunks -----------------------------------------------------------------------------------------------------

SMUGGLED: Final = b"MAIL FROM:<smuggled@evil.test>\r\nRCPT TO:<alice@example.org>\r\nBDAT 3 LAST\r\nx\r\n"


@pytest.mark.parametrize(
    "argument",
    ["", "-1", "-1 LAST", "+1 LAST", "1a", "0x10", "xx", "LAST", "10 LAST LAST", "10 FIRST", "1.5", "1 0 LAST", "٣"]
    + [str(number) for number in (1 << 31 | 1, (1 << 32) + 1, 1 << 63, 1 << 64, 10**19, 10**20, 10**400)],
)
@pytest.mark.parametrize("before", [(EHLO,), (EHLO, MAIL, RCPT)], ids=["no transaction", "transaction"])
def test_s_pa12_a_chunk_of_unknown_length_ends_the_session(
    site: Site, client: Client, before: tuple[str, ...], argument: str
) -> None:
    """Nobody knows where commands begin again, so nothing behind it is one."""
    client.begin(*before)
    client.send(f"BDAT {argument}\r\n".encode() + SMUGGLED)
    answers = list(iter(client.reply, ""))
    assert [answer[:9] in {"501 5.5.4", "552 5.3.4", "500 5.5.2"} for answer in answers[:1]] == [True], answers
    if answers[0].startswith("500 "):  # a line that was no command at all, and the next ones are what they are
        pytest.fail("a BDAT was not seen as one")
    assert len(answers) == 1
    harvest(site, 0)


@pytest.mark.parametrize("before", [(), (EHLO,), (EHLO, MAIL), (EHLO, MAIL, "RCPT TO:<nobody@example.org>")], ids=len)
@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_s_pa12_a_chunk_out_of_order_is_swallowed(site: Site, before: tuple[str, ...], cut: int) -> None:
    with Client(site.address()) as client:
        client.reply()
        for line in before:
            client.say(line)
        sent = b"BDAT %d LAST\r\n" % len(SMUGGLED) + SMUGGLED
        for first in range(0, len(sent), cut):
            client.send(sent[first : first + cut])
        assert client.reply()[:3] in {"503", "554"}
        assert client.say("NOOP").startswith("250 ")
        assert client.quiet(0.02), "nothing in it was a command"
    harvest(site, 0)


def test_s_pa12_a_chunk_that_is_too_large_is_swallowed_and_costs_nothing(site: Site) -> None:
    with Client(site.address()) as client, listeners(site) as memory:
        client.begin(EHLO, MAIL, RCPT)
        client.send(b"BDAT %d LAST\r\n" % (20 * MIB) + SMUGGLED.ljust(20 * MIB, b"x"))
        assert client.reply().startswith("552 5.3.4 ")
        assert client.say("NOOP").startswith("250 ")
    assert memory.growth < 2 * MIB
    harvest(site, 0)


def test_s_pa12_chunks_end_where_they_say(site: Site, client: Client) -> None:
    """Empty ones, one within another's payload (CVE-2017-16943), dots and commands in them, RSET between."""
    client.begin(EHLO, MAIL, RCPT)
    assert client.say("BDAT 0").startswith("250 ")
    client.send(b"BDAT 10\r\nBDAT 100\r\n" + b"BDAT 26\r\n.\r\nRSET\r\nQUIT\r\nBDAT 5\r\n.\r\n" + b"BDAT 0 LAST\r\n")
    assert [client.reply()[:3] for _ in range(3)] == ["250"] * 3
    [message] = harvest(site, 1)
    assert message.content.endswith(b"\r\nBDAT 100\r\n.\r\nRSET\r\nQUIT\r\nBDAT 5\r\n.\r\n")
    for line in (MAIL, RCPT):
        assert client.say(line).startswith("250 ")
    client.send(b"BDAT 3\r\nx\r\nRSET\r\nBDAT 3 LAST\r\ny\r\nNOOP\r\n")
    assert [client.reply()[:3] for _ in range(4)] == ["250", "250", "503", "250"]
    for line in (MAIL, RCPT):
        assert client.say(line).startswith("250 ")
    assert client.say("BDAT 0 LAST").startswith("250 ")
    [message] = harvest(site, 1)
    assert b"y" not in message.content.partition(b";")[2].partition(b"\r\n")[2], "nothing of the message before"


def test_s_pa12_a_chunk_without_end_is_waited_for_and_not_spun_on(site: Site) -> None:
    """CVE-2017-16944: a dot in an unfinished chunk. Then the client goes away in the middle of it."""
    pids = site.pids("listener")
    with Client(site.address()) as client:
        client.begin(EHLO, MAIL, RCPT)
        client.send(b"BDAT 100\r\nx\r\n.\r\n")
        before = sum(map(cpu_seconds, pids))
        assert client.quiet(0.4)
        assert sum(map(cpu_seconds, pids)) - before < 0.1
    await_value(lambda: site.status().sessions == 0, what="the session has ended")
    harvest(site, 0)


# -- S-PA17, S-PA18: for another purpose --------------------------------------------------------------------------------

PROXIES: Final = {
    "PROXY": b"PROXY TCP4 127.0.0.2 127.0.0.1 5000 25\r\n",
    "PROXY UNKNOWN": b"PROXY UNKNOWN\r\n",
    "PROXY version 2": b"\r\n\r\n\0\r\nQUIT\n!\x11\0\x0c\x7f\0\0\x02\x7f\0\0\x01\x13\x88\0\x19\r\n",
    "XCLIENT": b"XCLIENT ADDR=127.0.0.2 NAME=good.test LOGIN=alice\r\n",
    "XFORWARD": b"XFORWARD ADDR=127.0.0.2 NAME=good.test\r\n",
}


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site whose relay trusts 127.0.0.2 and nobody else."""
    both = ["127.0.0.1:0", "[::1]:0"]
    rows = [
        {"name": "inbound", "service": "mx", "address": both},
        {"name": "relay", "service": "relay", "address": both, "trusted": ["127.0.0.2/32"]},
    ]
    with Site(tmp_path_factory.mktemp("trusting"), listeners=rows, limits=PATIENT, deliver=False) as site:
        yield site


@pytest.mark.parametrize("line", PROXIES.values(), ids=PROXIES)
@pytest.mark.parametrize("greeted", [False, True], ids=["before EHLO", "after EHLO"])
def test_s_pa17_nobody_says_who_somebody_else_is(trusting: Site, line: bytes, greeted: bool) -> None:
    def attack(client: Client) -> None:
        client.begin(*[EHLO] * greeted)
        client.send(line + b"NOOP\r\n")
        assert client.reply()[:3] in {"500", "502", "503"}
        while not (answer := client.reply()).startswith("250 2.0.0 "):
            assert answer[:1] == "5"
        assert not re.search("XCLIENT|XFORWARD|PROXY", client.say(EHLO))
        assert client.say(MAIL).startswith("250 ")

    with Client(trusting.address("relay")) as client:
        attack(client)
        assert client.say("RCPT TO:<b@far.test>").startswith("554 5.7.1 "), "it is no trusted client"
    with Client(trusting.address()) as client:
        attack(client)
        assert client.say(RCPT).startswith("250 ")
        assert deliver(client).startswith("250 ")
    [message] = harvest(trusting, 1)
    assert message.envelope.client == "unknown[127.0.0.1]"
    assert message.content.startswith(b"Received: from client.test (unknown [127.0.0.1])")


def test_s_pa18_no_command_tells_who_has_a_mailbox(site: Site, client: Client) -> None:
    client.begin(EHLO)
    for command in ("VRFY", "EXPN"):
        answers = {
            client.say(f"{command} {name}") for name in ("alice", "nobody", "<alice@example.org>", "root", "postmaster")
        }
        assert len(answers) == 1
        assert answers.pop()[:3] in {"252", "502"}
    for command in ("MAIL FROM:<{}@example.org>", "HELP {}", "NOOP {}", "EHLO {}.example.org"):
        answers = set()
        for name in ("alice", "nobody"):
            answers.add(client.say(command.format(name)))
            client.say("RSET")
        assert len(answers) == 1, command


def test_s_pa18_who_may_not_send_is_told_nothing(trusting: Site) -> None:
    """A relay for others, and submission without a login, are the same for all recipients."""
    with Client(trusting.address("relay")) as client:
        client.begin(EHLO, MAIL)
        answers = {client.say(f"RCPT TO:<{name}@example.org>").replace(name, "") for name in ("alice", "nobody", "root")}
        assert [answer[:9] for answer in answers] == ["554 5.7.1"]


def test_s_pa18_a_550_comes_as_fast_as_a_250(site: Site, client: Client) -> None:
    """The reply tells it, and the time nothing more; how often one may ask is S-PA6."""
    client.begin(EHLO, MAIL)
    seconds: dict[str, list[float]] = {"250": [], "550": []}
    for number in range(100):
        for address in (f"nobody{number}", "alice"):
            start = time.perf_counter()
            code = client.say(f"RCPT TO:<{address}@example.org>")[:3]
            seconds[code].append(time.perf_counter() - start)
    assert [len(times) for times in seconds.values()] == [100, 100]
    assert abs(statistics.median(seconds["250"]) - statistics.median(seconds["550"])) < 0.005
