"""Listening sockets, and the choice among those that are bound already."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable

import pytest

from mtad.net.listening import (
    ListeningSocket,
    bind_all,
    close_all,
    has_device,
    is_own_address,
    join_address,
    probe,
    split_address,
)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("192.0.2.1:25", "192.0.2.1", 25), ("[2001:db8::1]:2525", "2001:db8::1", 2525), ("[::]:0", "::", 0)],
)
def test_addresses_are_taken_apart_and_put_together(text: str, host: str, port: int) -> None:
    assert split_address(text) == (host, port)
    assert join_address(host, port) == text


@pytest.mark.parametrize("text", ["", "25", ":25", "192.0.2.1", "192.0.2.1:", "192.0.2.1:smtp", "192.0.2.1:-1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="is not ADDRESS:PORT"):
        split_address(text)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0"])
def test_accept(address: str) -> None:
    listening = ListeningSocket(address)
    assert listening.accept() is None, "it does not wait"
    with socket.create_connection(split_address(listening.bound)) as client:
        accepted = None
        while accepted is None:
            accepted = listening.accept()
        connection, host, port = accepted
        assert (host, port) == client.getsockname()[:2]
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        connection.close()
    listening.close()


def test_an_ipv6_socket_takes_ipv6_only() -> None:
    first = ListeningSocket("[::]:0")
    port = split_address(first.bound)[1]
    second = ListeningSocket(f"0.0.0.0:{port}")
    close_all([first, second])


def _fill_descriptors(filler: list[int]) -> None:
    try:
        while True:
            filler.append(os.dup(0))
    except OSError:
        pass  # now there are none


def test_no_descriptors_left_is_an_error() -> None:
    """EMFILE must be seen by the caller, who has to pause: the connection waits and the socket stays readable."""
    import resource

    listening = ListeningSocket("127.0.0.1:0")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_connection(split_address(listening.bound)):
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        filler: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
            _fill_descriptors(filler)
            with pytest.raises(OSError, match="Too many open files") as caught:
                listening.accept()
            assert caught.value.errno == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in filler:
                os.close(fd)
        accepted = listening.accept()
        assert accepted is not None
        accepted[0].close()
    listening.close()


def test_no_memory_for_a_connection_leaves_no_descriptor_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    listening = ListeningSocket("127.0.0.1:0")
    with socket.create_connection(split_address(listening.bound)) as client:
        before = set(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socket", _no_memory)
            select.select([listening], [], [])
            with pytest.raises(MemoryError):
                listening.accept()
        assert set(os.listdir("/proc/self/fd")) == before
        assert client.recv(1) == b""
    listening.close()


def _no_memory(*_: object, **__: object) -> None:
    raise MemoryError


def test_the_error_names_the_address() -> None:
    taken = ListeningSocket("127.0.0.1:0")
    with pytest.raises(OSError, match=f"cannot listen on {taken.bound}: Address already in use") as caught:
        ListeningSocket(taken.bound)
    assert caught.value.errno == errno.EADDRINUSE
    assert probe(taken.bound) == "Address already in use"
    taken.close()
    assert probe(taken.bound) is None


def test_a_device_that_is_not_there() -> None:
    assert has_device("lo")
    assert not has_device("nowhere0")
    with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:0 on nowhere0: "):
        ListeningSocket("127.0.0.1:0", "nowhere0")


def test_own_addresses() -> None:
    assert is_own_address("127.0.0.1")
    assert is_own_address("::1")
    assert not is_own_address("192.0.2.1")
    assert not is_own_address("2001:db8::1")


# -- many at once -----------------------------------------------------------------------------------------------------


def test_a_socket_for_each_in_order() -> None:
    wanted = [("a", "127.0.0.1:0", ""), ("a", "[::1]:0", ""), ("b", "127.0.0.1:0", "")]
    sockets = bind_all(wanted)
    assert [socket.address for socket in sockets] == [address for _, address, _ in wanted]
    assert len({socket.bound for socket in sockets}) == 3
    close_all(sockets)


def test_bound_ones_are_used_again() -> None:
    first, second = bind_all([("a", "127.0.0.1:0", ""), ("b", "127.0.0.1:0", "")])
    bound = [("a", first), ("b", second)]
    again = bind_all([("b", "127.0.0.1:0", ""), ("c", "127.0.0.1:0", ""), ("a", "127.0.0.1:0", "")], bound)
    assert again[0] is second
    assert again[2] is first
    assert again[1] not in {first, second}, "port 0 of another name is another port"
    close_all(again)


def test_a_port_is_used_again_by_another_name() -> None:
    free = ListeningSocket("127.0.0.1:0")
    free.close()
    [old] = bind_all([("old", free.bound, "")])
    assert bind_all([("new", free.bound, "")], [("old", old)]) == [old]
    with pytest.raises(OSError, match="cannot listen"):
        bind_all([("new", free.bound, "lo")], [("old", old)])
    old.close()


def test_when_one_fails_the_new_ones_are_closed_and_the_old_ones_are_not() -> None:
    taken = ListeningSocket("127.0.0.1:0")
    [kept] = bind_all([("a", "127.0.0.1:0", "")])
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="already in use"):
        bind_all([("a", "127.0.0.1:0", ""), ("b", "127.0.0.1:0", ""), ("c", taken.bound, "")], [("a", kept)])
    assert set(os.listdir("/proc/self/fd")) == before
    socket.create_connection(split_address(kept.bound)).close()
    close_all([taken, kept])


def _later(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Timer(0.15, act)
    thread.start()
    return thread


def test_patience() -> None:
    """An address that a dead server's children still hold is waited for, but not for ever."""
    taken = ListeningSocket("127.0.0.1:0")
    start = time.monotonic()
    with pytest.raises(OSError, match="already in use"):
        bind_all([("a", taken.bound, "")], patience=0.1)
    assert 0.1 <= time.monotonic() - start < 1
    thread = _later(taken.close)
    close_all(bind_all([("a", taken.bound, "")], patience=10))
    thread.join()
    start = time.monotonic()
    with pytest.raises(OSError, match="Cannot assign requested address"):
        bind_all([("a", "192.0.2.1:0", "")], patience=10)
    assert time.monotonic() - start < 1, "what will not get better is not waited for"


def test_close_all_keeps_what_is_to_be_kept() -> None:
    first, second = bind_all([("a", "127.0.0.1:0", ""), ("b", "127.0.0.1:0", "")])
    close_all([first, second], keep=[second])
    assert first.fileno() == -1
    assert second.fileno() >= 0
    second.close()
