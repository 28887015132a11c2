"""Listening sockets: made by the master, inherited by the listeners, accepted from without blocking.

An address is text, ``192.0.2.1:25`` or ``[2001:db8::1]:25``. An IPv6 socket takes IPv6 only, so that each address family
has its own socket and its own limits. Errors: OSError, with the address in its text.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Final

#: Connections that the kernel completes while all listeners are busy. Also bounded by net.core.somaxconn.
BACKLOG: Final = 4096

#: Octets of replies that the kernel keeps for a client that does not read them yet; Linux takes it twice.
_REPLIES: Final = 64 * 1024

#: What accept() says when the client is gone already, or when nobody is there: not worth a word (accept(2)).
_NOBODY: Final = frozenset(
    {
        errno.EAGAIN,
        errno.EINTR,
        errno.ECONNABORTED,
        errno.ENETDOWN,
        errno.EPROTO,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
    }
)


def split_address(text: str) -> tuple[str, int]:
    """Take ``ADDRESS:PORT`` apart; the address without brackets.

    Raises:
        ValueError: it is not of that form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise ValueError(f"{text!r} is not ADDRESS:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """The reverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class ListeningSocket:
    """One socket that listens. Survives forks: the master keeps it open, so no connection is lost when a listener dies."""

    def __init__(self, address: str, interface: str = "") -> None:
        """Bind to ``address`` and listen, on the device ``interface`` only when one is named.

        Raises:
            OSError: it cannot be bound; the text says which and why.
        """
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.address = address
        self.interface = interface
        self._family = family
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if interface:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
            # Accepted sockets inherit it: replies are short and waited for.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # So do they this: the kernel would keep megabytes for a client that never reads its replies.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _REPLIES)
            self._socket.bind((host, port))
            self._socket.listen(BACKLOG)
            name = self._socket.getsockname()
            #: The address with the port that was really given, when the configuration asked for port 0.
            self.bound = join_address(name[0], name[1])
        except OSError as fault:
            self._socket.close()
            where = f"{address} on {interface}" if interface else address
            raise OSError(fault.errno, f"cannot listen on {where}: {fault.strerror or fault}") from fault

    def fileno(self) -> int:
        """For a poll."""
        return self._socket.fileno()

    def accept(self) -> tuple[socket.socket, str, int] | None:
        """The next connection, blocking from now on, with the client's address and port; None when there is none.

        Raises:
            OSError: the process or the machine has run out of something (EMFILE, ENFILE, ENOBUFS, ENOMEM).
        """
        try:
            # What socket.accept() does, without asking each time of what family the sockets are: that is a third of the
            # cost of taking a connection. The method is Python's own, and only not in its documentation.
            descriptor, peer = self._socket._accept()  # type: ignore[attr-defined]
        except OSError as fault:
            if fault.errno in _NOBODY:
                return None
            raise
        try:
            host: str = peer[0]
            if host.startswith("::ffff:") and "." in host:
                host = host[7:]
            return socket.socket(self._family, socket.SOCK_STREAM, 0, fileno=descriptor), host, peer[1]
        except MemoryError:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Stop listening in this process; others that inherited the socket go on."""
        self._socket.close()


def bind_all(
    wanted: Iterable[tuple[str, str, str]], bound: Iterable[tuple[str, ListeningSocket]] = (), patience: float = 0.0
) -> list[ListeningSocket]:
    """A socket for each wanted ``(service name, address, device)``, in this order.

    Args:
        wanted: what to listen on. The name is for choosing among those with the same address, as with port 0 there may be.
        bound: sockets with the names of their services, to be used again where the address is wanted still.
        patience: how long to wait for an address in use, in seconds for all of them.

    Raises:
        OSError: one cannot be bound; those that were bound for nothing are closed again.
    """
    rest = list(bound)
    deadline = time.monotonic() + patience
    sockets: list[ListeningSocket] = []
    new: list[ListeningSocket] = []
    try:
        for name, address, interface in wanted:
            found = _take(rest, name, address, interface)
            if found is None:
                found = _bind_patiently(address, interface, deadline)
                new.append(found)
            sockets.append(found)
    except OSError:
        close_all(new)
        raise
    return sockets


def _take(rest: list[tuple[str, ListeningSocket]], name: str, address: str, interface: str) -> ListeningSocket | None:
    fitting = [row for row in rest if (row[1].address, row[1].interface) == (address, interface)]
    row = next((row for row in fitting if row[0] == name), fitting[0] if fitting and not address.endswith(":0") else None)
    if row is None:
        return None
    rest.remove(row)
    return row[1]


def _bind_patiently(address: str, interface: str, deadline: float) -> ListeningSocket:
    while True:
        try:
            return ListeningSocket(address, interface)
        except OSError as fault:
            if fault.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                raise
        time.sleep(0.05)


def close_all(sockets: Iterable[ListeningSocket], keep: Sequence[ListeningSocket] = ()) -> None:
    """Close sockets, but for those to ``keep``."""
    kept = {id(kept) for kept in keep}
    for one in sockets:
        if id(one) not in kept:
            one.close()


def probe(address: str, interface: str = "") -> str | None:
    """Whether one could listen there now: None, or why not, in the words of strerror."""
    try:
        ListeningSocket(address, interface).close()
    except OSError as fault:
        return os.strerror(fault.errno) if fault.errno and fault.errno > 0 else str(fault)
    return None


def has_device(name: str) -> bool:
    """Whether this machine has a network device of that name."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def is_own_address(host: str) -> bool:
    """Whether an address belongs to this machine: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as trial:
            trial.bind((host, 0))
    except OSError:
        return False
    return True


def host_name() -> str:
    """What this machine calls itself, as a domain name where it knows one."""
    return socket.getfqdn()
