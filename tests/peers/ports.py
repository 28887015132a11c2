"""Ports and listening sockets for the peers."""

from __future__ import annotations

import socket
from collections.abc import Iterable


def free_port(addresses: Iterable[str]) -> int:
    """A port that is free on all of these addresses, for exchangers that have to share one."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        try:
            for address in addresses:
                listen(address, port).close()
        except OSError:
            continue
        return port


def listen(address: str, port: int) -> socket.socket:
    """A listening socket of the right family; port 0: any."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def shut(connection: socket.socket) -> None:
    """End a connection that another thread may be waiting on."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it was faster
