"""Issue 5, floods and slowness: the short forms of `tools/crashtest floods`, and that it notices broken promises.

Attacks that are one client's are in test_attack_floods; what happens when the machine has no more is in test_room.
"""

from __future__ import annotations

import select
from pathlib import Path
from typing import Any, Final

import pytest

from mtad.config import Limits
from tests.client import Client
from tests.e2e.attack_aid import EHLO, MAIL, RCPT, deliver
from tests.e2e.tls_site import tls_site
from tests.site import Site, await_value
from tools.lib.flood_clients import descriptors_for
from tools.lib.sweep_floods import PARTS, Flood, Found

#: Seconds for what takes less than one on a machine that has nothing else to do.
WITHIN: Final = 10.0
LENGTH: Final = {"idle": 1000, "slow": 100, "stress": 300, "deaf": 1000, "churn": 1000, "tedious": 1000}


def _play(name: str, root: Path, length: int = 0, pace: float = 0.4, **limits: Any) -> list[Found]:
    length = length or LENGTH[name]
    if lack := descriptors_for(length):
        pytest.skip(lack)
    return PARTS[name](Flood(root, length, pace, WITHIN, limits))


@pytest.mark.parametrize("name", PARTS)
def test_floods_harm_nobody(tmp_path: Path, name: str) -> None:
    rows = _play(name, tmp_path)
    assert [fault for found in rows for fault in found.faults] == []
    assert all(found.messages for found in rows)


@pytest.mark.parametrize(
    ("name", "limits", "faults"),
    [
        ("idle", {"connections": 40}, ["421 4.7.0"]),
        (
            "slow",
            {"data_rate": 0, "data_timeout": "60s"},
            ["slow: DATA inside TLS: still there", "slow: BDAT: still there"],
        ),
        ("stress", {"stress_timeout": "60s", "stress_bad_commands": 20}, [" are still there", "errors under stress"]),
    ],
    ids=["too few connections", "no least rate", "no stress"],
)
def test_broken_promises_are_noticed(tmp_path: Path, name: str, limits: dict[str, Any], faults: list[str]) -> None:
    """The negative controls: with limits that break the promise the sweep says so."""
    found = "\n".join(fault for row in _play(name, tmp_path, 50, **limits) for fault in row.faults)
    assert all(fault in found for fault in faults), found


def test_a_client_that_sends_at_the_least_rate_is_waited_for(tmp_path: Path) -> None:
    """The rate is an average over the window: bursts with pauses are as good as a steady stream, and one octet is not."""
    limits = {"data_rate": 1000, "data_window": "600ms", "command_timeout": "600ms"}
    with Site(tmp_path, limits=limits, deliver=False) as site:
        with Client(site.address()) as client:
            client.begin(EHLO, MAIL, RCPT, "DATA")
            for _ in range(5):
                client.send(b"x" * 998 + b"\r\n")
                assert client.quiet(0.3), "1,000 octets are a second of credit, kept up to 0.6 s"
            client.send(b".\r\n")
            assert client.reply().startswith("250 ")
            for line in (MAIL, RCPT, "DATA"):
                assert client.say(line)[:1] in {"2", "3"}
            client.send(b"x" * 998 + b"\r\n")
            assert client.reply() == "421 4.4.2 Error: timeout exceeded", "silence"
            assert client.closed()
        await_value(lambda: len(site.files("incoming")) == 1, what="the second one is gone")


def test_silence_in_content_ends_under_stress_too(tmp_path: Path) -> None:
    """Who has begun to send when there was room, and says no more, is no exception."""
    limits = {"connections": 6, "stress_timeout": "500ms"}
    # One process: with two, those of the other may be gone before the one that has this client sees how many they were.
    with Site(tmp_path, limits=limits, processes={"listeners": 1}, deliver=False) as site:
        with Client(site.address()) as client:
            client.begin(EHLO, MAIL, RCPT, "DATA")
            client.send(b"Subject: x\r\n")
            assert client.quiet(0.8), "there is room"
            others = [Client(site.address()).begin() for _ in range(4)]
            assert client.reply() == "421 4.4.2 Error: timeout exceeded"
            for other in others:
                assert other.reply() == "421 4.4.2 Error: timeout exceeded"
                other.socket.close()
        site.await_log(r"warning: 5 of 6 connections are in use: deadlines are short, until there are fewer$")
        with Client(site.address()).begin():  # it looks as long as somebody is there
            site.await_log(r"[0123] of 6 connections are in use: deadlines are as they were$")


def test_who_hangs_in_a_handshake_or_reads_nothing_ends_under_stress_too(tmp_path: Path) -> None:
    """They began when there was room, with the deadlines of then."""
    limits = {"connections": 6, "stress_timeout": "500ms"}
    with tls_site(tmp_path, limits=limits, processes={"listeners": 1}, deliver=False) as site:
        with Client(site.address()) as deaf, Client(site.address()) as shaking:
            shaking.begin(EHLO, "STARTTLS")
            deaf.begin(EHLO, MAIL)
            deaf.socket.setblocking(False)
            # Until its window, and all that the server may keep for it, is full.
            await_value(lambda: _asks_in_vain(deaf), what="the server is stuck in its replies")
            others = [Client(site.address()).begin() for _ in range(3)]
            assert shaking.closed()
            await_value(lambda: site.status().sessions <= 3, what="both have ended")
            for other in others:
                other.socket.close()
        site.await_log(r"deadlines are short, until there are fewer$")


def _asks_in_vain(client: Client) -> bool:
    """Name a recipient again and again, without reading what is said to it; whether not even that is taken any more."""
    try:
        while True:
            client.socket.send(f"{RCPT}\r\n".encode() * 200)
    except BlockingIOError:
        return not select.select([], [client.socket], [], 0.5)[1]


def test_under_stress_mail_that_comes_without_delay_is_taken_all_the_same(tmp_path: Path) -> None:
    """Several messages over one connection, and the usual commands between them."""
    with Site(tmp_path, limits={"connections": 3, "stress_timeout": "5s"}, deliver=False) as site:
        clients = [Client(site.address()).begin(EHLO) for _ in range(3)]
        site.await_log("deadlines are short")
        for _ in range(Limits().stress_bad_commands):
            for client in clients:
                for line in ("RSET", MAIL, RCPT):
                    assert client.say(line).startswith("250 ")
                assert deliver(client).startswith("250 ")
        for client in clients:
            assert client.say("QUIT").startswith("221 ")
            client.socket.close()
        assert len(site.taken()) == 15
