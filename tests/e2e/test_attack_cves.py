"""Old faults of other servers that no row of the list of attacks has, each named by its CVE."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mtad.address import Address
from mtad.control import control_path, mailslot_path
from mtad.policy import Policy
from mtad.spool.queues import Queue
from mtad.tls.connection import TlsFailed
from mtad.tls.server import ServerTls
from mtad.users import Users
from tests.dialogue_engine import Engine
from tests.e2e.world import MESSAGE, World
from tests.site import Site
from tests.unit.test_tls_certificates import hello
from tests.unit.tls_aid import at_once, bare_ends, issue


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("world")) as world:
        yield world


def link_local() -> tuple[str, str] | None:
    """An address of this machine that means nothing without its device, and the device."""
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        digits, _, _, _, flags, device = line.split()
        if digits.startswith("fe80") and not int(flags, 16) & 0x48:  # neither tentative nor a duplicate
            return ":".join(re.findall("....", digits)), device
    return None


def test_cve_2023_29323_a_client_whose_address_has_a_scope(tmp_path: Path) -> None:
    """OpenSMTPD ended when a local, scoped IPv6 address connected."""
    found = link_local()
    if found is None:
        pytest.skip("no device has a link-local address")
    address, device = found
    listeners = [{"name": "inbound", "service": "mx", "address": ["127.0.0.1:0", "[::]:0"]}]
    with Site(tmp_path, listeners=listeners) as site:
        _, port = site.address(family="6")
        for number in (1, 2):
            where = (address, port, 0, socket.if_nametoindex(device))
            with socket.socket(socket.AF_INET6) as client, client.makefile("rb") as replies:
                client.settimeout(10)
                client.connect(where)
                lines = ["EHLO client.test", "MAIL FROM:<a@b.test>", "RCPT TO:<alice@example.org>", "DATA"]
                assert replies.readline().startswith(b"220 ")
                for line in lines:
                    client.sendall(line.encode() + b"\r\n")
                    while (answer := replies.readline())[3:4] == b"-":
                        pass
                    assert answer[:1] in b"23", (line, answer)
                client.sendall(MESSAGE + b".\r\n")
                assert replies.readline().startswith(b"250 ")
            stored = site.await_mail("alice", number)[-1]
            [trace] = re.findall(rb"\[IPv6:([^\]]*)\]", stored)
            assert b"%" not in trace, "a scope is no part of an address literal (RFC 5321 section 4.1.3)"
        assert "panic" not in site.log()


@pytest.mark.parametrize("junk", [b"", b"\0", b"{", b'{"flush": ["../../etc/passwd", "x"]}', b"\xff" * 5000, b"9" * 60_000])
def test_cve_2025_62875_junk_for_the_sockets_of_the_spool(world: World, junk: bytes) -> None:
    """OpenSMTPD ended when any local user wrote nonsense into its socket. Ours are the owner's, and bear it."""
    spool = str(world.site.spool_path)
    before = world.site.processes()
    directory = os.open(spool, os.O_PATH)  # the path is longer than the name of a socket may be
    for path in (mailslot_path(spool), control_path(spool)):
        assert os.stat(path).st_mode & 0o077 == 0
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
            with socket.socket(socket.AF_UNIX, kind) as client:
                client.settimeout(5)
                try:
                    client.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
                    client.send(junk)
                except OSError:
                    continue  # a socket of another kind
    os.close(directory)
    count = len(world.site.mailbox("bob"))
    world.site.send("a@sender.test", "bob@example.org", MESSAGE)
    world.site.await_mail("bob", count + 1)
    assert set(before) <= set(world.site.processes()), "none has ended"


@pytest.mark.parametrize("name", [b"mail.example.com\\", b"\\", b"a\\0", b"x" * 40 + b"\\"])
def test_cve_2019_15846_a_server_name_that_ends_in_a_backslash(tmp_path: Path, name: bytes) -> None:
    """Exim wrote it, with what stood behind it in memory, into the spool. Here it finds a certificate or does not."""
    warnings: list[str] = []
    server = ServerTls([issue("mx.example.org").write(tmp_path)], warnings.append)
    far, near = bare_ends()

    def speak() -> bytes:
        with near:
            near.sendall(hello(name))
            return near.recv(65536)

    ours, answer = at_once(partial(server.handshake, far, 5.0), speak, far.close)
    assert isinstance(ours, TlsFailed), "the client goes away after the first flight"
    assert isinstance(answer, bytes)
    assert answer[:1] == b"\x16", "which it got"


def test_cve_2020_12063_a_sender_that_only_looks_like_somebody(tmp_path: Path) -> None:
    """A list of senders that are refused misses what looks alike; who may send as whom is a list of what is allowed."""
    (tmp_path / "users").write_text("bob : bob@example.org\nalice : alice@example.org\n")
    users = Users.load(str(tmp_path / "users"), ["example.org"], "root")
    policy = Policy(users, ["example.org"], "submission", (), ())
    assert policy.owns("bob", Address("bob", "example.org"))
    for local in ("b\u03bfb", "\uff42ob", "b\u043eb", "bob\u200b", "alice", "\u0430lice"):
        assert not policy.owns("bob", Address(local, "example.org")), local
    assert not policy.owns("bob", Address("bob", "ex\u0430mple.org"))


def test_cve_2025_26794_etrn_reaches_no_database() -> None:
    engine = Engine()
    start = len(engine.transcript)
    engine.send(b"EHLO a.test\r\n")
    assert b"ETRN" not in engine.transcript
    for argument in (b"example.org", b"#,1) union SELECT 0x41414141--", b"';DROP TABLE queue;--"):
        start = len(engine.transcript)
        engine.send(b"ETRN " + argument + b"\r\n")
        assert engine.transcript[start:].startswith(b"502 5.5.1")


def test_cve_2006_0058_a_storm_of_signals_changes_nothing(tmp_path: Path) -> None:
    """Sendmail jumped out of a handler into code that was half done. Ours write one octet into a pipe."""
    with Site(tmp_path) as site:
        pids = [site.processes()[0], *site.pids("listener"), *site.pids("scheduler")]
        ended = threading.Event()
        harmless = (signal.SIGCHLD, signal.SIGWINCH, signal.SIGURG, signal.SIGCONT)

        def storm() -> None:
            while not ended.wait(0.001):
                for pid in pids:
                    for number in harmless:
                        os.kill(pid, number)

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            for _ in range(40):
                site.send("a@sender.test", ["alice@example.org", "bob@example.org"], MESSAGE)
            for user in ("alice", "bob"):
                site.await_mail(user, 40)
        finally:
            ended.set()
            thread.join()
        site.await_empty_queue()
        assert [len(site.mailbox(user)) for user in ("alice", "bob")] == [40, 40]
        assert site.files(Queue.CORRUPT.value) == []
        assert "panic" not in site.log()
