"""A mail exchanger for tests: a scripted SMTP server that remembers everything.

    script = Script(rcpt={"bad@example.org": Say("550 5.1.1 No such user")}, dot=[Say("451 4.3.0 Later"), OK])
    with Mx("127.0.0.5", script=script) as mx:
        ...
        mx.await_messages(1)
        assert mx.messages[0].content == b"Subject: x\r\n\r\nhello\r\n"

What it does with each verb is data: an `Action`, or a list of them that is used up one per occurrence, the last one for
ever; for RCPT also a mapping from the recipient. Verbs that the script does not name succeed. A script may be exchanged
while the server runs; connections use the new one from their next command on.

The server reads as strictly as RFC 5321 has it: only CRLF ends a line, only CRLF.CRLF a message, and a bare CR or LF is
remembered in `Mx.bare`. It answers pipelined commands in one write, when it has nothing more to read, as real ones do.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final

from tests.peers.ports import free_port, listen, shut
from tests.peers.script import (
    CLOSE,
    HANG,
    OK,
    RESET,
    Action,
    Actions,
    Close,
    Hang,
    Raw,
    Say,
    Script,
    Transaction,
    path_of,
    text_of,
)

__all__ = (
    "CLOSE", "HANG", "OK", "RESET", "Action", "Actions", "Close", "Hang",
    "Mx", "Raw", "Say", "Script", "Transaction", "free_port",
)  # fmt: skip


class Mx:
    """The server; a context manager. Methods may be called from any thread; lists only grow while it runs."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0, script: Script | None = None, name: str = "") -> None:
        """Bind to an address of the loopback and a port, 0 for any; ``name`` is for greetings."""
        self.script = script or Script()
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
        if actions is None or isinstance(actions, Say | Raw | Hang | Close):
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

    def _serve(self, connection: socket.socket, peer: str, number: int) -> None:
        try:
            _Dialogue(self, connection, peer, number).run()
        except (OSError, _Over):
            pass  # the client or the script ended it
        finally:
            connection.close()
            self.note(lambda: self._open.discard(connection))


class _Over(Exception):
    """The connection is done."""


class _Dialogue:
    """One connection."""

    def __init__(self, mx: Mx, connection: socket.socket, peer: str, number: int) -> None:
        self._mx = mx
        self._socket = connection
        self._peer = peer
        self._number = number
        self._buffer = b""
        self._output = b""
        self._helo = ""
        self._transaction: Transaction | None = None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self) -> None:
        self._act("greeting", self._mx.script.greeting, Say(f"220 {self._mx.name} ESMTP"))
        while True:
            line = self._line()
            self._mx.note(lambda line=line: self._mx.commands.append((self._number, line)))  # type: ignore[misc]
            verb = re.split("[ :]", line, maxsplit=1)[0].upper()
            handler = self._HANDLERS.get(verb)
            if handler is None:
                self._write(b"502 5.5.1 Command not implemented\r\n")
            else:
                handler(self, line)

    def _ehlo(self, line: str) -> None:
        self._helo = line[5:]
        extensions = self._mx.script.extensions
        lines = [self._mx.name, *extensions]
        marks = ["-"] * (len(lines) - 1) + [" "]
        usual = Say([f"250{mark}{text}" for mark, text in zip(marks, lines, strict=True)])
        self._act("ehlo", self._mx.script.ehlo, usual)

    def _helo_(self, line: str) -> None:
        self._helo = line[5:]
        self._act("helo", self._mx.script.helo, Say(f"250 {self._mx.name}"))

    def _mail(self, line: str) -> None:
        if self._act("mail", self._mx.script.mail, Say("250 2.1.0 Ok")).startswith("2"):
            transaction = Transaction(self._number, self._peer, self._helo, line[5:])
            self._transaction = transaction
            self._mx.note(lambda: self._mx.transactions.append(transaction))

    def _rcpt(self, line: str) -> None:
        address = path_of(line)
        script = self._mx.script.rcpt
        if self._transaction is None:
            self._write(b"503 5.5.1 Need MAIL command\r\n")
            return
        usual = Say("250 2.1.5 Ok")
        if isinstance(script, Mapping):
            reply = self._act(f"rcpt {address}", script.get(address), usual)
        else:
            reply = self._act("rcpt", script, usual)
        transaction = self._transaction
        self._mx.note(lambda: transaction.rcpts.append((address, reply)))

    def _data(self, _: str) -> None:
        accepted = self._transaction is not None and self._transaction.recipients
        usual = Say("354 End data with <CR><LF>.<CR><LF>" if accepted else "554 5.5.1 Error: no valid recipients")
        if not self._act("data", self._mx.script.data, usual).startswith("3"):
            return
        self._flush()
        content = self._content()
        transaction = self._transaction or Transaction(self._number, self._peer, self._helo, "")
        self._mx.note(lambda: setattr(transaction, "content", content))
        action = self._mx.action("dot", self._mx.script.dot) or Say(f"250 2.0.0 Ok: queued as {len(self._mx.transactions)}")
        # noted before it is said: whoever has the reply may look at once
        self._mx.note(lambda: setattr(transaction, "reply", text_of(action)))
        self._transaction = None
        self._do(action)

    def _rset(self, _: str) -> None:
        self._transaction = None
        self._act("rset", self._mx.script.rset, OK)

    def _noop(self, _: str) -> None:
        self._act("noop", None, OK)

    def _quit(self, _: str) -> None:
        self._act("quit", self._mx.script.quit, Say("221 2.0.0 Bye", close=True))
        self._flush()
        raise _Over

    _HANDLERS: Final[Mapping[str, Callable[[_Dialogue, str], None]]] = {
        "EHLO": _ehlo,
        "HELO": _helo_,
        "MAIL": _mail,
        "RCPT": _rcpt,
        "DATA": _data,
        "RSET": _rset,
        "NOOP": _noop,
        "QUIT": _quit,
    }

    def _act(self, key: str, actions: Actions | None, usual: Action) -> str:
        """Do what the script has for a verb; the text that was said."""
        action = self._mx.action(key, actions) or usual
        self._do(action)
        return text_of(action)

    def _do(self, action: Action) -> None:
        if isinstance(action, Hang):
            self._flush()
            self._drain()
        if isinstance(action, Close):
            self._flush()
            self._close(action.reset)
        if isinstance(action, Raw):
            self._flush()
            self._raw(action)
        if isinstance(action, Say):
            if action.delay:
                self._flush()
                time.sleep(action.delay)
            self._write(action.encode())
            if action.close or action.reset:
                self._flush()
                self._close(action.reset)

    def _raw(self, action: Raw) -> None:
        while True:
            if action.pause:
                for octet in action.octets:
                    self._socket.sendall(bytes((octet,)))
                    time.sleep(action.pause)
            else:
                self._socket.sendall(action.octets)
            if action.close:
                self._close(False)
            if not action.endless:
                return

    def _close(self, reset: bool) -> None:
        if reset:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _Over

    def _drain(self) -> None:
        while self._socket.recv(65536):
            pass
        raise _Over

    def _write(self, data: bytes) -> None:
        self._output += data

    def _flush(self) -> None:
        if self._output:
            self._socket.sendall(self._output)
            self._output = b""

    def _fill(self) -> None:
        self._flush()
        data = self._socket.recv(65536)
        if not data:
            raise _Over
        self._mx.note(lambda: self._mx.reads.append((self._number, data)))
        self._buffer += data

    def _line(self) -> str:
        while b"\r\n" not in self._buffer:
            self._fill()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        if b"\r" in line or b"\n" in line:
            self._mx.bare.append(line)
        return line.decode("utf-8", "surrogateescape")

    def _content(self) -> bytes:
        limit = self._mx.script.read_content
        text = bytearray(b"\r\n")
        searched = 0
        while True:
            text += self._buffer
            self._buffer = b""
            end = text.find(b"\r\n.\r\n", max(0, searched - 4))
            if end >= 0:
                self._buffer = bytes(text[end + 5 :])
                content = bytes(text[2 : end + 2])
                break
            if limit is not None and len(text) > limit:
                return bytes(text[2:])
            searched = len(text)
            self._fill()
        if content.count(b"\r") != content.count(b"\r\n") or content.count(b"\n") != content.count(b"\r\n"):
            self._mx.bare.append(content)
        return (b"\r\n" + content).replace(b"\r\n.", b"\r\n")[2:]
