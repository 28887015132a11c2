"""One connection from its greeting to its end, in the thread of its session.

The thread moves octets between the connection and the dialogue, shakes hands, and watches deadlines: one for each command,
one for a handshake, one for the whole of a message's content. A client that sends a byte a minute moves none of them.

A handshake that fails ends its session: what the client thinks of the connection now, nobody knows. It is logged in the
words that Postfix has for it, which fail2ban looks for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from mtad import log
from mtad.config import Limits
from mtad.errors import MtadError
from mtad.net.connection import Connection, ConnectionLost, TimedOut
from mtad.reply import Reply, reply
from mtad.session.dialogue import Dialogue
from mtad.session.state import TlsFacts
from mtad.tls.connection import TlsConnection, TlsFailed
from mtad.tls.server import ServerTls

#: Seconds for a last word to a client that may not listen.
_LAST_WORD: Final = 5.0

_TIMEOUT: Final = reply(421, "4.4.2", "Error: timeout exceeded")
_STOPPING: Final = reply(421, "4.3.2", "Service shutting down, try again later")
_BUG: Final = reply(421, "4.3.0", "Error: internal error, try again later")


class Visit:
    """One connection and its dialogue, as the main thread sees it."""

    __slots__ = ("connection", "dialogue", "patience", "slot")

    def __init__(self, connection: Connection, dialogue: Dialogue, patience: float | None, slot: int) -> None:
        """``patience``: see `Service`; ``slot`` is the client's in the occupancy table."""
        self.connection: Connection | TlsConnection = connection
        self.dialogue = dialogue
        self.patience = patience
        self.slot = slot

    def __str__(self) -> str:
        return str(self.dialogue.session.client)


class Conversation:
    """How all visits of a listener process go."""

    def __init__(self, limits: Limits, tls: ServerTls | None, draining: Callable[[], bool]) -> None:
        """``draining`` says whether the process is about to end."""
        self._limits = limits
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
        except Exception as bug:
            log.panic(f"session with {client} ended", bug)
            self.last_word(visit, _BUG, "internal error")
        finally:
            log.disconnect(client, visit.dialogue.session.commands)

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
        in_content = False
        # The connection waits no longer than this at a time, so that its setting hardly ever changes.
        longest = timeout = float(self._limits.command_timeout)
        deadline = time.monotonic() + timeout
        while not dialogue.closing:
            if self._draining() and dialogue.waiting:
                self.last_word(visit, _STOPPING, "shutdown")
                return
            try:
                data = visit.connection.receive(min(timeout, longest))
            except TimedOut:
                timeout = deadline - time.monotonic()
                if in_content and timeout > 0:
                    continue
                self.last_word(visit, _TIMEOUT, "timeout")
                return
            if not data:
                if self._draining():
                    self.last_word(visit, _STOPPING, "shutdown")
                else:
                    dialogue.lost()
                return
            answer = dialogue.receive(data)
            if answer:
                self._say(visit, answer)
                if dialogue.wants_tls:
                    self._shake_hands(visit)
            if answer or dialogue.in_content is not in_content:
                in_content = dialogue.in_content
                timeout = float(self._limits.data_timeout if in_content else self._limits.command_timeout)
                deadline = time.monotonic() + timeout
                continue
            timeout = deadline - time.monotonic()
            if timeout <= 0:  # the octets keep coming, and nothing is ever complete
                self.last_word(visit, _TIMEOUT, "timeout")
                return

    def _greeting(self, visit: Visit) -> bytes:
        connection = visit.connection
        early = visit.patience is not None and isinstance(connection, Connection) and connection.speaks(visit.patience)
        return visit.dialogue.spoke_early() if early else visit.dialogue.greeting()

    def _say(self, visit: Visit, answer: bytes) -> None:
        pause = visit.dialogue.pause
        if pause:
            time.sleep(pause)
        visit.connection.send(answer, self._limits.command_timeout)

    def _shake_hands(self, visit: Visit) -> None:
        """Go on in TLS.

        Raises:
            TlsFailed: the handshake failed, and there is nothing more to say.
        """
        tls, connection = self._tls, visit.connection
        assert tls is not None
        assert isinstance(connection, Connection)
        secured = visit.connection = tls.handshake(connection, self._limits.tls_timeout)
        log.info(f"Anonymous TLS connection established from {visit}: {secured.tls}")
        visit.dialogue.secured(TlsFacts(secured.version, secured.cipher, secured.bits, secured.channel_bindings))

    def last_word(self, visit: Visit, answer: Reply, why: str) -> None:
        """End a session from our side; whether the client hears it is its own affair."""
        try:
            visit.connection.send(visit.dialogue.end(answer, why), _LAST_WORD)
        except (ConnectionLost, TimedOut):
            pass  # it was said into the void
