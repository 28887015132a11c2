"""One connection of the scripted exchanger `tests.peers.mx`, from its greeting to its end."""

from __future__ import annotations

import base64
import re
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from tests.peers.logins import converse
from tests.peers.script import OK, Action, Actions, Close, Hang, Raw, Say, Stall, Transaction, path_of, text_of

if TYPE_CHECKING:
    from tests.peers.mx import Mx


class Over(Exception):
    """The connection is done."""


class Dialogue:
    """One connection."""

    def __init__(self, mx: Mx, connection: socket.socket, peer: str, number: int) -> None:
        self._mx = mx
        self.socket = connection
        self._peer = peer
        self._number = number
        self._buffer = b""
        self._output = b""
        self._helo = ""
        self._transaction: Transaction | None = None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self) -> None:
        if self._mx.implicit:
            self._handshake()
        self._act("greeting", self._mx.script.greeting, Say(f"220 {self._mx.name} ESMTP"))
        while True:
            line = self._line()
            self._mx.note(lambda line=line: self._mx.commands.append((self._number, line)))  # type: ignore[misc]
            verb = re.split("[ :]", line, maxsplit=1)[0].upper()
            handler = None if verb in self._mx.script.unknown else self._HANDLERS.get(verb)
            if handler is None:
                self._write(b"502 5.5.1 Command not implemented\r\n")
            else:
                handler(self, line)

    def _ehlo(self, line: str) -> None:
        self._helo = line[5:]
        inside = isinstance(self.socket, ssl.SSLSocket) and self._mx.script.tls_extensions is not None
        extensions = (self._mx.script.tls_extensions if inside else self._mx.script.extensions) or ()
        lines = [self._mx.name, *extensions]
        marks = ["-"] * (len(lines) - 1) + [" "]
        usual = Say([f"250{mark}{text}" for mark, text in zip(marks, lines, strict=True)])
        script = self._mx.script
        inside = isinstance(self.socket, ssl.SSLSocket) and script.tls_ehlo is not None
        self._act("tls_ehlo" if inside else "ehlo", script.tls_ehlo if inside else script.ehlo, usual)

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
        self._end(transaction)

    def _end(self, transaction: Transaction) -> None:
        action = self._mx.action("dot", self._mx.script.dot) or Say(f"250 2.0.0 Ok: queued as {len(self._mx.transactions)}")
        # noted before it is said: whoever has the reply may look at once
        self._mx.note(lambda: setattr(transaction, "reply", text_of(action)))
        self._transaction = None
        self._do(action)

    def _bdat(self, line: str) -> None:
        words = line.split()
        size, last = int(words[1]), words[2:] == ["LAST"]
        while len(self._buffer) < size:
            self._fill()
        chunk, self._buffer = self._buffer[:size], self._buffer[size:]
        transaction = self._transaction
        if transaction is None or not transaction.recipients:
            self._write(b"503 5.5.1 no valid recipients\r\n")
            return
        content = transaction.content + chunk
        self._mx.note(lambda: setattr(transaction, "content", content))
        transaction.chunks.append(size)
        if not last:
            self._act("bdat", self._mx.script.bdat, Say(f"250 2.0.0 Ok: {size} octets"))
            return
        if " BODY=BINARYMIME" not in transaction.mail and (b"\n" in content.replace(b"\r\n", b"")):
            self._mx.bare.append(content)
        self._end(transaction)

    def _starttls(self, _: str) -> None:
        if not self._act("starttls", self._mx.script.starttls, Say("220 2.0.0 Ready to start TLS")).startswith("220"):
            return
        self._flush()
        instead = self._mx.action("handshake", self._mx.script.handshake)
        if instead is not None:
            self.socket.recv(65536)  # the ClientHello: what comes before it is another matter
            self._do(instead)
            self._flush()
            self._drain()
        self._handshake()

    def _handshake(self) -> None:
        assert self._mx.tls is not None
        self._buffer = b""
        plain, self._transaction = self.socket, None
        self.socket = self._mx.tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        self._mx.replace(plain, self.socket)
        self.socket.do_handshake()
        version = self.socket.version() or ""
        self._mx.note(lambda: self._mx.secured.append(version))

    def _auth(self, line: str) -> None:
        action = self._mx.action("auth", self._mx.script.auth)
        if action is not None:
            self._do(action)
            return
        _, mechanism, *initial = line.split()
        login = converse(mechanism, initial[0] if initial else None, self._mx.logins, self._ask)
        if login is None:
            self._write(b"535 5.7.8 Error: authentication failed\r\n")
            return
        self._mx.note(lambda: self._mx.authenticated.append((mechanism, login)))
        self._write(b"235 2.7.0 Authentication successful\r\n")

    def _ask(self, challenge: bytes) -> bytes:
        self._write(b"334 " + base64.b64encode(challenge) + b"\r\n")
        return base64.b64decode(self._line())

    def _rset(self, _: str) -> None:
        self._transaction = None
        self._act("rset", self._mx.script.rset, OK)

    def _noop(self, _: str) -> None:
        self._act("noop", None, OK)

    def _quit(self, _: str) -> None:
        self._act("quit", self._mx.script.quit, Say("221 2.0.0 Bye", close=True))
        self._flush()
        raise Over

    _HANDLERS: Final[Mapping[str, Callable[[Dialogue, str], None]]] = {
        "EHLO": _ehlo,
        "HELO": _helo_,
        "MAIL": _mail,
        "RCPT": _rcpt,
        "DATA": _data,
        "BDAT": _bdat,
        "STARTTLS": _starttls,
        "AUTH": _auth,
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
        if isinstance(action, Stall):
            self._flush()
            self._mx.closing.wait()
            raise Over
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
                    self.socket.sendall(bytes((octet,)))
                    time.sleep(action.pause)
            else:
                self.socket.sendall(action.octets)
            if action.close:
                self._close(False)
            if not action.endless:
                return

    def _close(self, reset: bool) -> None:
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Over

    def _drain(self) -> None:
        while self.socket.recv(65536):
            pass
        raise Over

    def _write(self, data: bytes) -> None:
        self._output += data

    def _flush(self) -> None:
        if self._output:
            self.socket.sendall(self._output)
            self._output = b""

    def _fill(self, slowly: int | None = None) -> None:
        self._flush()
        if slowly is not None and self._mx.closing.wait(0.01):
            raise Over
        data = self.socket.recv(slowly or 65536)
        if not data:
            raise Over
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
            self._fill(self._mx.script.read_slowly)
        if content.count(b"\r") != content.count(b"\r\n") or content.count(b"\n") != content.count(b"\r\n"):
            self._mx.bare.append(content)
        return (b"\r\n" + content).replace(b"\r\n.", b"\r\n")[2:]
