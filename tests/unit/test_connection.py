"""Connections over real sockets: time-outs that hold, errors that are named, and few system calls."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from mtad.net.connection import (
    SHORTEST,
    ConnectFailed,
    Connection,
    ConnectionLost,
    TimedOut,
    _timeval,
    connect,
    plain_address,
    reason,
)
from tests.peers.mx import Mx, free_port

Pair = tuple[Connection, socket.socket]


def pair(address: str) -> Pair:
    """A `Connection` and the bare socket at its other end."""
    listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    with listener:
        connection = connect(address, listener.getsockname()[1], 5.0)
        return connection, listener.accept()[0]


@pytest.fixture(params=["127.0.0.1", "::1"])
def ends(request: pytest.FixtureRequest) -> Iterator[Pair]:
    connection, peer = pair(request.param)
    yield connection, peer
    connection.close()
    peer.close()


def test_both_ends_know_their_addresses(ends: Pair) -> None:
    connection, peer = ends
    assert (connection.address, connection.port) == peer.getsockname()[:2]
    assert connection.local == peer.getpeername()[:2]
    assert connection.tls == ""


def test_bytes_go_both_ways(ends: Pair) -> None:
    connection, peer = ends
    connection.send(b"EHLO x\r\n", 1.0)
    assert peer.recv(100) == b"EHLO x\r\n"
    peer.sendall(b"250 ok\r\n")
    assert connection.receive(1.0) == b"250 ok\r\n"
    peer.sendall(b"abcdef")
    assert connection.receive(1.0, limit=4) == b"abcd"
    assert connection.receive(1.0) == b"ef"


def test_the_end_is_an_empty_answer(ends: Pair) -> None:
    connection, peer = ends
    peer.sendall(b"221 bye\r\n")
    peer.close()
    assert connection.receive(1.0) == b"221 bye\r\n"
    assert connection.receive(1.0) == b""


def test_whether_the_peer_speaks_is_seen_and_nothing_is_taken(ends: Pair) -> None:
    connection, peer = ends
    assert not connection.speaks(0.0)
    start = time.monotonic()
    assert not connection.speaks(0.05)
    assert 0.04 < time.monotonic() - start < 2
    peer.sendall(b"EHLO early.test\r\n")
    assert connection.speaks(5.0)
    assert connection.speaks(0.0)
    assert connection.receive(1.0) == b"EHLO early.test\r\n"
    peer.close()
    assert not connection.speaks(5.0), "an end is no word"
    connection.close()
    assert not connection.speaks(0.0)


def test_a_silent_peer_times_out(ends: Pair) -> None:
    connection, _ = ends
    start = time.monotonic()
    with pytest.raises(TimedOut):
        connection.receive(0.05)
    assert 0.04 < time.monotonic() - start < 2
    with pytest.raises(TimedOut):
        connection.receive(0.0)  # not for ever


def test_a_reset_is_a_lost_connection(ends: Pair) -> None:
    connection, peer = ends
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    with pytest.raises(ConnectionLost, match="Connection reset by peer"):
        connection.receive(1.0)
    with pytest.raises(ConnectionLost, match="Broken pipe"):
        connection.send(b"x", 1.0)


def test_a_closed_connection_is_lost_and_closes_again(ends: Pair) -> None:
    connection, _ = ends
    connection.close()
    connection.close()
    connection.shutdown()
    assert connection.local == ("", 0)
    assert connection.fileno() == -1
    with pytest.raises(ConnectionLost):
        connection.receive(1.0)
    with pytest.raises(ConnectionLost):
        connection.send(b"x", 1.0)


def test_shutdown_wakes_the_thread_that_waits(ends: Pair) -> None:
    connection, peer = ends
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(connection.receive(30.0)))
    thread.start()
    connection.shutdown()
    thread.join(5)
    assert got == [b""]
    assert peer.recv(10) == b""


def test_send_hands_over_everything(ends: Pair) -> None:
    connection, peer = ends
    data = os.urandom(3_000_000)
    received = bytearray()

    def read() -> None:
        while len(received) < len(data):
            received.extend(peer.recv(65536))

    thread = threading.Thread(target=read)
    thread.start()
    connection.send(data, 10.0)
    thread.join(10)
    assert bytes(received) == data


def test_d11_send_holds_its_deadline_when_the_peer_takes_a_little_at_a_time(ends: Pair) -> None:
    connection, peer = ends
    over = threading.Event()

    def sip() -> None:
        while not over.is_set():
            if select.select([peer], [], [], 0.02)[0]:
                peer.recv(64)

    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    thread = threading.Thread(target=sip)
    thread.start()
    start = time.monotonic()
    with pytest.raises(TimedOut, match="octets not taken"):
        connection.send(bytes(50_000_000), 0.5)
    assert 0.4 < time.monotonic() - start < 3
    over.set()
    thread.join(5)


class Counting(socket.socket):
    """A socket that remembers which options were set."""

    options: list[tuple[int, bytes]]

    def setsockopt(self, level: int, option: int, value: object, optlen: int | None = None) -> None:
        self.options = [*getattr(self, "options", []), (option, value if isinstance(value, bytes) else b"")]
        assert optlen is None
        super().setsockopt(level, option, value)  # type: ignore[call-overload]


def test_the_time_out_is_set_only_when_it_changes() -> None:
    left, right = socket.socketpair()
    counting = Counting(fileno=left.detach())
    connection = Connection(counting, "", 0)
    try:
        for timeout in (300.0, 300.0, 299.9, 299.2, 120.0, 120.0):
            right.sendall(b"x")
            connection.receive(timeout)
            connection.send(b"y", 180.0)
        set_to = [(option, struct.unpack("@ll", value)) for option, value in counting.options]
        assert set_to == [
            (socket.SO_RCVTIMEO, (300, 0)),
            (socket.SO_SNDTIMEO, (180, 0)),
            (socket.SO_RCVTIMEO, (120, 0)),
        ]
    finally:
        connection.close()
        right.close()


def test_connect_says_why_it_failed() -> None:
    port = free_port(["127.0.0.1", "::1"])
    for address in ("127.0.0.1", "::1"):
        with pytest.raises(ConnectFailed, match=r"^Connection refused$"):
            connect(address, port, 5.0)
    with pytest.raises(ConnectFailed):
        connect("mx.example.org", port, 5.0)  # not an address, and the DNS is not asked


def test_connect_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        fillers = []
        try:
            for _ in range(4):  # fill the queue of connections that nobody accepts
                filler = socket.socket()
                filler.setblocking(False)
                assert filler.connect_ex(address) in {0, errno.EINPROGRESS}
                fillers.append(filler)
            with pytest.raises(ConnectFailed, match=r"^Connection timed out$"):
                connect("127.0.0.1", address[1], 0.1)
        finally:
            for filler in fillers:
                filler.close()


def test_connect_from_a_source_address() -> None:
    with Mx("127.0.0.1") as mx:
        connection = connect("127.0.0.1", mx.port, 5.0, source="127.0.0.9")
        try:
            assert connection.local[0] == "127.0.0.9"
        finally:
            connection.close()
        with pytest.raises(ConnectFailed, match="Cannot assign requested address"):
            connect("127.0.0.1", mx.port, 5.0, source="192.0.2.1")


def test_small_packets_are_not_delayed(ends: Pair) -> None:
    connection, _ = ends
    duplicate = socket.socket(fileno=os.dup(connection.fileno()))
    with duplicate:
        assert duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("address", "plain"),
    [("::ffff:192.0.2.1", "192.0.2.1"), ("::ffff:1:2", "::ffff:1:2"), ("2001:db8::1", "2001:db8::1"), ("", "")],
)
def test_an_ipv4_client_of_an_ipv6_socket_is_shown_as_what_it_is(address: str, plain: str) -> None:
    assert plain_address(address) == plain


def test_reasons_are_in_the_words_of_strerror() -> None:
    assert reason(ConnectionRefusedError(errno.ECONNREFUSED, "x")) == "Connection refused"
    assert reason(TimeoutError("timed out")) == "Connection timed out"
    assert reason(OSError(errno.EHOSTUNREACH, "x")) == "No route to host"
    assert reason(socket.gaierror(socket.EAI_NONAME, "Name or service not known")) == "Name or service not known"
    assert reason(OSError("odd")) == "odd"


@pytest.mark.parametrize(
    ("seconds", "parts"),
    [
        (0.5, (0, 500_000)),
        (0.9999999, (1, 0)),
        (1.25, (1, 250_000)),
        (2.9999996, (3, 0)),
        (SHORTEST, (0, 1000)),
        (60.0, (60, 0)),
    ],
)
def test_no_time_out_becomes_for_ever(seconds: float, parts: tuple[int, int]) -> None:
    assert struct.unpack("@ll", _timeval(seconds)) == parts
