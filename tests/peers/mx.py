"""A mail exchanger for tests: a scripted SMTP server that remembers everything.

    script = Script(rcpt={"bad@example.org": Say("550 5.1.1 No such user")}, dot=[Say("451 4.3.0 Later"), OK])
    with Mx("127.0.0.5", script=script) as mx:
        ...
        mx.await_messages(1)
        assert mx.messages[0].content == b"Subject: x\r\n\r\nhello\r\n"

What it does with each verb is data: an `Action`, or a list of them that is used up one per occurrence, the last one for
ever; for RCPT also a mapping from the recipient. Verbs that the script does not name succeed. A script may be exchanged
while the server runs; connections use the new one from their next command on.

With a certificate it knows STARTTLS, or with ``implicit`` speaks TLS from the first octet; with ``logins`` it knows AUTH.
Whatever it knows, it announces what the script says.

The server reads as strictly as RFC 5321 has it: only CRLF ends a line, only CRLF.CRLF a message, and a bare CR or LF is
remembered in `Mx.bare`. It answers pipelined commands in one write, when it has nothing more to read, as real ones do.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from types import TracebackType

from tests.peers.mx_dialogue import Dialogue, Over
from tests.peers.ports import free_port, listen, shut
from tests.peers.script import (
    CLOSE,
    HANG,
    OK,
    RESET,
    STALL,
    Action,
    Actions,
    Close,
    Hang,
    Raw,
    Say,
    Script,
    Stall,
    Transaction,
)

__all__ = (
    "CLOSE", "HANG", "OK", "RESET", "STALL", "Action", "Actions", "Close", "Hang",
    "Mx", "Raw", "Say", "Script", "Stall", "Transaction", "free_port",
)  # fmt: skip


class Mx:
    """The server; a context manager. Methods may be called from any thread; lists only grow while it runs."""

    def __init__(
        self,
        address: str = "127.0.0.1",
        port: int = 0,
        script: Script | None = None,
        name: str = "",
        *,
        tls: ssl.SSLContext | None = None,
        implicit: bool = False,
        logins: Mapping[str, str] | None = None,
    ) -> None:
        """Bind to an address of the loopback and a port, 0 for any.

        ``name`` is for greetings; ``logins`` are the passwords, or tokens, of those who may log in.
        """
        self.script = script or Script()
        self.tls = tls
        self.implicit = implicit
        self.logins = dict(logins or {})
        self.secured: list[str] = []
        """The TLS versions of the handshakes that succeeded."""
        self.authenticated: list[tuple[str, str]] = []
        """Mechanism and login of each AUTH that did."""
        self.name = name or f"mx-{address.replace(':', '-').replace('.', '-')}.test"
        self.transactions: list[Transaction] = []
        self.commands: list[tuple[int, str]] = []
        """Every command line, with the number of its connection."""
        self.reads: list[tuple[int, bytes]] = []
        """What each read brought: a client that sends in one piece is seen here."""
        self.bare: list[bytes] = []
        """Lines with a CR or LF that did not belong there; empty for a client that can be trusted."""
        self.connections = 0
        """How many there were."""
        self._condition = threading.Condition()
        self._used: dict[str, int] = {}
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self.closing = threading.Event()
        self._listener = listen(address, port)
        self.address = address
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Mx:
        thread = threading.Thread(target=self._accept, name=f"mx {self.address}:{self.port}", daemon=True)
        thread.start()
        self._threads.append(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the listener and all connections; the port refuses afterwards."""
        self._closed = True
        self.closing.set()
        shut(self._listener)
        self._listener.close()
        self.drop()
        for thread in self._threads:
            thread.join(10)

    def drop(self) -> None:
        """Close all open connections, as a server that is restarted does, and wait until they are gone."""
        with self._condition:
            doomed = list(self._open)
        for connection in doomed:
            shut(connection)
        self.wait(lambda: not any(connection in self._open for connection in doomed))

    @property
    def messages(self) -> list[Transaction]:
        """The transactions whose dot got a 2yz."""
        with self._condition:
            return [transaction for transaction in self.transactions if transaction.reply.startswith("2")]

    @property
    def open_connections(self) -> int:
        """How many connections are open now."""
        with self._condition:
            return len(self._open)

    def verbs(self, connection: int | None = None) -> list[str]:
        """The verbs of all commands, in upper case, in order; of one connection only, if given."""
        with self._condition:
            return [
                line.split(" ", 1)[0].split(":", 1)[0].upper()
                for number, line in self.commands
                if connection is None or number == connection
            ]

    def wait(self, condition: Callable[[], bool], timeout: float = 10.0) -> None:
        """Wait until ``condition`` holds (looked at after each event); AssertionError after ``timeout`` seconds."""
        with self._condition:
            assert self._condition.wait_for(condition, timeout), f"did not happen; so far: {self.commands}"

    def await_messages(self, count: int, timeout: float = 10.0) -> list[Transaction]:
        """Wait for at least ``count`` messages and return all."""
        self.wait(lambda: sum(one.reply.startswith("2") for one in self.transactions) >= count, timeout)
        return self.messages

    def await_connections(self, count: int, timeout: float = 10.0) -> None:
        """Wait until at least ``count`` connections were made."""
        self.wait(lambda: self.connections >= count, timeout)

    def await_closed(self, timeout: float = 10.0) -> None:
        """Wait until no connection is open."""
        self.wait(lambda: not self._open, timeout)

    def await_command(self, verb: str, count: int = 1, timeout: float = 10.0) -> None:
        """Wait until a verb came at least ``count`` times."""
        self.wait(lambda: self.verbs().count(verb) >= count, timeout)

    def action(self, key: str, actions: Actions | None) -> Action | None:
        """The next of a verb's actions; ``key`` tells the verbs apart."""
        if actions is None or isinstance(actions, Say | Raw | Hang | Stall | Close):
            return actions
        with self._condition:
            used = self._used.get(key, 0)
            self._used[key] = used + 1
        return actions[min(used, len(actions) - 1)]

    def note(self, change: Callable[[], None]) -> None:
        """Change what is remembered, and wake those who wait for it."""
        with self._condition:
            change()
            self._condition.notify_all()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                return
            with self._condition:
                self.connections += 1
                number = self.connections
                self._open.add(connection)
                self._condition.notify_all()
            thread = threading.Thread(target=self._serve, args=(connection, peer[0], number), daemon=True)
            thread.start()
            self._threads.append(thread)

    def replace(self, connection: socket.socket, other: socket.socket) -> None:
        """A connection goes on as another one."""
        with self._condition:
            self._open.discard(connection)
            self._open.add(other)

    def _serve(self, connection: socket.socket, peer: str, number: int) -> None:
        dialogue = Dialogue(self, connection, peer, number)
        try:
            dialogue.run()
        except (OSError, Over):
            pass  # the client or the script ended it
        finally:
            dialogue.socket.close()
            self.note(lambda: self._open.discard(dialogue.socket))
