"""Clients of a server that is about to be full: each comes to a point of its dialogue, waits there, and ends it later.

Any number of them is held without a thread for each; one step is taken at a time.
"""

from __future__ import annotations

import random
import select
import time
from typing import Final

import msgspec

from tests.client import Client
from tools.lib.crash_load import Ledger, compose

#: Seconds within which a new client must hear something.
SILENT: Final = 3.0
#: Where a client waits, while the server is full.
POINTS: Final = ("greeting", "EHLO", "MAIL", "RCPT", "DATA", "content")
#: Addresses on loopback from which they come.
_SOURCES: Final = 200


class Knock:
    """A new connection, and what it is told: 220, 421, ``silence``, or ``cut``."""

    def __init__(self, address: tuple[str, int], number: int) -> None:
        """Connect; nothing is read yet."""
        self._came = time.monotonic()
        self.client = Client(address, source=f"127.0.1.{number % _SOURCES + 1}")

    @property
    def age(self) -> float:
        """Seconds since it came."""
        return time.monotonic() - self._came

    @property
    def answered(self) -> bool:
        """Whether something has been said already."""
        ready = select.poll()  # select(2) knows no descriptor above 1023
        ready.register(self.client.socket, select.POLLIN)
        return bool(ready.poll(0))

    def answer(self) -> str:
        """What was, or will be, said within `SILENT` seconds of the coming."""
        self.client.socket.settimeout(max(0.05, SILENT - self.age))
        try:
            line = self.client.reply()
        except TimeoutError:
            return "silence"
        finally:
            self.client.socket.settimeout(30)
        self.took = self.age
        return line[:3] or "cut"

    def leave(self) -> None:
        """Close the connection."""
        self.client.socket.close()


class Guest:
    """One who was let in, and has a message to send, or (no ``ledger``) nothing to say but NOOP."""

    def __init__(self, client: Client, name: str, chance: random.Random, ledger: Ledger | None) -> None:
        """``chance`` chooses the message and the point."""
        self._client = client
        self._ledger = ledger
        self._point = chance.choice(POINTS) if ledger is not None else "greeting"
        self._message, self._content = compose(chance, name)
        self._content = self._content.replace(b"\r\n.", b"\r\n..")

    def come(self) -> None:
        """Go on to the point."""
        if self._ledger is not None:
            self._ledger.note(self._message)
        self._walk(POINTS[1 : POINTS.index(self._point) + 1])

    def end(self) -> str:
        """Go on to the end: what was heard last, "" when the server has hung up. Nobody was let in for a 421."""
        if self._ledger is None:
            return self._say("NOOP")
        answer = self._walk(POINTS[POINTS.index(self._point) + 1 :])
        if answer[:1] not in {"", "3"} or (not answer and self._point != "content"):
            return answer
        self._client.send(b".\r\n")
        answer = self._hear()
        if answer.startswith("250"):
            self._ledger.note(msgspec.structs.replace(self._message, queue_id=answer.rpartition(" ")[2]))
        return answer

    def leave(self) -> None:
        """Close the connection."""
        self._client.socket.close()

    def _walk(self, points: tuple[str, ...]) -> str:
        """Go on through these points until one is refused; what was heard last."""
        answer = ""
        for point in points:
            match point:
                case "EHLO":
                    answer = self._say("EHLO client.test")
                case "MAIL":
                    answer = self._say(f"MAIL FROM:<{self._message.sender}>")
                case "RCPT":
                    for recipient in self._message.recipients:
                        answer = self._say(f"RCPT TO:<{recipient}>")
                        if answer[:1] != "2":
                            return answer
                case "DATA":
                    answer = self._say("DATA")
                case _:
                    self._client.send(self._content)
                    return "354"
            if answer[:1] not in {"2", "3"}:
                return answer
        return answer

    def _say(self, line: str) -> str:
        self._client.send(line.encode() + b"\r\n")
        return self._hear()

    def _hear(self) -> str:
        try:
            return self._client.reply()
        except TimeoutError:
            return ""
