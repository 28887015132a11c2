"""One connection from its greeting to its end, in the thread of its session.

The thread moves octets between the connection and the dialogue, shakes hands, and watches deadlines: one for each command,
one for a handshake, one for the whole of a message's content, and a least rate in it (`mtad.listener.deadlines`). A client
that sends a byte a minute moves none of them.

A handshake that fails ends its session: what the client thinks of the connection now, nobody knows. It is logged in the
words that Postfix has for it, which fail2ban looks for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from mtad import log
from mtad.errors import MtadError
from mtad.listener.deadlines import BUSY, Deadline, Stress
from mtad.net.connection import Connection, ConnectionLost, TimedOut
from mtad.reply import Reply, reply
from mtad.session.dialogue import Dialogue
from mtad.session.state import TlsFacts
from mtad.tls.connection import TlsConnection, TlsFailed
from mtad.tls.server import ServerTls

#: Seconds for a last word to a client that may not listen.
_LAST_WORD: Final = 5.0

#: Octets taken at a time while a command is awaited: a buffer so small is one of Python's own small objects. Ten thousand
#: sessions that wait with larger ones use half as much memory again, and keep it.
_COMMAND: Final = 479
#: Octets taken at a time from a client that has more commands ready: as many replies are in memory before any is sent.
_GROUP: Final = 8192
#: Octets of content taken at a time.
_CONTENT: Final = 65536

_TIMEOUT: Final = reply(421, "4.4.2", "Error: timeout exceeded")
_STOPPING: Final = reply(421, "4.3.2", "Service shutting down, try again later")
_NO_MEMORY: Final = reply(421, "4.3.2", "Error: out of memory, try again later")
_BUG: Final = reply(421, "4.3.0", "Error: internal error, try again later")


class Visit:
    """One connection and its dialogue, as the main thread sees it."""

    __slots__ = ("connection", "cut", "dialogue", "hangs_since", "patience", "slot", "waits_since")

    def __init__(self, connection: Connection, dialogue: Dialogue, patience: float | None, slot: int) -> None:
        """``patience``: see `Service`; ``slot`` is the client's in the occupancy table."""
        self.connection: Connection | TlsConnection = connection
        self.dialogue = dialogue
        self.patience = patience
        self.slot = slot
        self.waits_since = BUSY
        """When it began to wait for the client, or last heard of it; `BUSY` while it does not wait."""
        self.hangs_since = BUSY
        """When a handshake began, or the sending of a reply; `BUSY` while there is none."""
        self.cut = False
        """Whether the main thread has ended it, since the client was too slow for a server under stress."""

    def __str__(self) -> str:
        return str(self.dialogue.session.client)


class Conversation:
    """How all visits of a listener process go."""

    def __init__(self, stress: Stress, tls: ServerTls | None, draining: Callable[[], bool]) -> None:
        """``stress`` has the deadlines of the moment, and ``draining`` says whether the process is about to end."""
        self._stress = stress
        self._tls = tls
        self._draining = draining

    def hold(self, visit: Visit) -> None:
        """Hold the conversation to its end, whatever happens."""
        client = str(visit)
        try:
            log.connect(client)
            self._converse(visit)
        except TlsFailed as fault:
            log.info(f"SSL_accept error from {client}: {fault}")
            commands = visit.dialogue.session.commands
            if "STARTTLS" in commands:  # which said yes, and came to nothing
                commands["STARTTLS"] = (0, commands["STARTTLS"][1])
            visit.dialogue.lost()
        except MtadError:
            visit.dialogue.lost()
        except MemoryError:
            log.warning(f"session with {client} ended: out of memory")
            self.last_word(visit, _NO_MEMORY, "out of memory")
        except Exception as bug:
            log.panic(f"session with {client} ended", bug)
            self.last_word(visit, _BUG, "internal error")
        finally:
            try:
                log.disconnect(client, visit.dialogue.session.commands)
            finally:
                visit.dialogue.lost()  # what is under way is given up, also when there was no memory to say so

    def _converse(self, visit: Visit) -> None:
        """The dialogue, until it is over.

        Raises:
            ConnectionLost, TimedOut: the client is gone, or does not take our replies.
            TlsFailed: a handshake failed.
        """
        dialogue = visit.dialogue
        if dialogue.session.site.tls == "implicit":
            self._shake_hands(visit)
        self._say(visit, self._greeting(visit))
        deadline = Deadline(time.monotonic(), self._stress.allowance)
        much = _COMMAND
        while not dialogue.closing:
            if deadline.wait <= 0:  # also when octets keep coming, and nothing is ever complete
                self.last_word(visit, _TIMEOUT, "timeout")
                return
            visit.waits_since = deadline.since
            if self._draining() and dialogue.waiting:
                self.last_word(visit, _STOPPING, "shutdown")
                return
            try:
                data = visit.connection.receive(deadline.wait, much)
            except TimedOut:
                deadline.silence(time.monotonic())
                continue
            visit.waits_since = BUSY
            if not data:
                self._end_of_octets(visit)
                return
            answer = dialogue.receive(data)
            if answer:
                self._say(visit, answer)
                if dialogue.wants_tls:
                    self._shake_hands(visit)
            in_content = dialogue.in_content
            now = time.monotonic()
            if answer or in_content is not deadline.in_content:
                deadline.begin(now, self._stress.allowance, dialogue.session.transaction, in_content=in_content)
            else:
                deadline.received(now, len(data), self._stress.allowance)
            much = _CONTENT if in_content else _GROUP if len(data) == much else _COMMAND

    def _end_of_octets(self, visit: Visit) -> None:
        """The client has gone, or the main thread has stopped the reading."""
        if visit.cut:
            self.last_word(visit, _TIMEOUT, "timeout")
        elif self._draining():
            self.last_word(visit, _STOPPING, "shutdown")
        else:
            visit.dialogue.lost()

    def _greeting(self, visit: Visit) -> bytes:
        connection = visit.connection
        early = visit.patience is not None and isinstance(connection, Connection) and connection.speaks(visit.patience)
        return visit.dialogue.spoke_early() if early else visit.dialogue.greeting()

    def _say(self, visit: Visit, answer: bytes) -> None:
        pause = visit.dialogue.pause
        if pause:
            time.sleep(pause)
        visit.hangs_since = time.monotonic()
        visit.connection.send(answer, self._stress.allowance.command)
        visit.hangs_since = BUSY

    def _shake_hands(self, visit: Visit) -> None:
        """Go on in TLS.

        Raises:
            TlsFailed: the handshake failed, and there is nothing more to say.
        """
        tls, connection = self._tls, visit.connection
        assert tls is not None
        assert isinstance(connection, Connection)
        visit.hangs_since = time.monotonic()
        secured = visit.connection = tls.handshake(connection, self._stress.allowance.tls)
        visit.hangs_since = BUSY
        log.info(f"Anonymous TLS connection established from {visit}: {secured.tls}")
        visit.dialogue.secured(TlsFacts(secured.version, secured.cipher, secured.bits, secured.channel_bindings))

    def last_word(self, visit: Visit, answer: Reply, why: str) -> None:
        """End a session from our side; whether the client hears it is its own affair."""
        try:
            visit.connection.send(visit.dialogue.end(answer, why), _LAST_WORD)
        except (ConnectionLost, TimedOut):
            pass  # it was said into the void
