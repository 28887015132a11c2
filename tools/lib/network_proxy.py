"""A relay between two who speak SMTP, which does harm at one point of their dialogue, and exactly there.

The dialogue is taken apart into events, each with a name that says what it is and which of its kind: ``greeting``,
``MAIL``, ``RCPT 2``, ``reply to RCPT 2``, ``content``, ``dot``. A `Point` is an event and a place: ``before`` it (it has
come, and nothing of it was passed on), ``within`` it (half of it was), or ``after`` it. Names do not depend on how the two
group what they send, so that a point is the same in each run. Within TLS an event is a record: ``client record 3``.

Harm comes to both sides, as that of a network does, and once; whoever connects after that is served.

Errors: a peer that ends is not one; `Proxy.reached` and `Proxy.harmed_at` tell whether the harm was done.
"""

from __future__ import annotations

import re
import select
import socket
import struct
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self

from tests.peers.ports import listen, shut

Harm = Literal["reset", "FIN", "silence", "zero window"]
HARMS: Final[tuple[Harm, ...]] = ("reset", "FIN", "silence", "zero window")
Place = Literal["before", "within", "after"]
Role = Literal["server", "client"]

#: Octets that a side takes whose window is to be closed: the least that Linux allows is about half of it.
_SMALL: Final = 4096
#: What a client goes on to say that reads nothing: few octets, to which the answer has many.
_POUR: Final = b"EHLO client.test\r\n" * 200
#: Seconds after which that must have filled all buffers.
_POURS: Final = 10.0
#: Seconds between two looks of a proxy that waits for an end.
_PAUSE: Final = 0.02
_REPLY: Final = re.compile(rb"(?:\d{3}-[^\r\n]*\r\n)*\d{3}(?: [^\r\n]*)?\r\n")
_DOT: Final = b"\r\n.\r\n"


class Point(NamedTuple):
    """Where in a dialogue."""

    event: str
    place: Place

    def __str__(self) -> str:
        return f"{self.place} {self.event}"


class Harmed(Exception):
    """The point was reached, and the harm is done."""


class Proxy:
    """Listens at one address and goes on to another; a context manager that ends all of it."""

    def __init__(
        self,
        here: tuple[str, int],
        there: tuple[str, int],
        mtad: Role,
        point: Point | None = None,
        harm: Harm = "reset",
        source: str = "",
    ) -> None:
        """``mtad`` is which of the two it is in the dialogue; without a ``point`` the proxy only takes notes."""
        self.there = there
        self.mtad = mtad
        self.harm = harm
        self.source = source
        self.point = point
        self.reached = threading.Event()
        """The point was."""
        self.harmed_at = 0.0
        """When the harm was done, or when it last took anything from the other side; monotonic."""
        self.release = threading.Event()
        """Nobody waits any more for what mtad makes of it."""
        self.events: list[str] = []
        """Of the first dialogue."""
        self.acknowledged = ""
        """What the final dot was answered with, also when it was not passed on."""
        self.connections = 0
        """How many there were."""
        self.deaf = harm == "zero window" and point is not None
        self._listener = listen(*here)
        if self.deaf and mtad == "client":
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self._closed = False

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed = True
        self.release.set()
        shut(self._listener)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                shut(connection)
        for thread in self._threads:
            thread.join(10)

    def over(self) -> bool:
        """Whether somebody was there, and nobody is any more."""
        with self._lock:
            return self.connections > 0 and not self._open

    def claim(self) -> bool:
        """Whether the harm is the caller's to do; true once."""
        with self._lock:
            if self.point is None:
                return False
            self.point = None
            if self.deaf:
                self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # the next one need not suffer
            return True

    def _spawn(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self._open.append(connection)
            self._spawn(self._serve, connection)

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with self._lock:
            self._open.append(server)
        try:
            if self.source:
                server.bind((self.source, 0))
            if self.deaf and self.mtad == "server":
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL)
            for connection in (client, server):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.connect(self.there)
            Passage(self, client, server).run()
        except (OSError, Harmed):
            pass  # one of the two has gone
        finally:
            with self._lock:
                self._open = [one for one in self._open if one not in (client, server)]
            client.close()
            server.close()


class Passage:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        """Both are connected."""
        self._proxy = proxy
        self._client = client
        self._server = server
        self._said = {client: bytearray(), server: bytearray()}
        self._point = proxy.point
        self._counts: Counter[str] = Counter()
        self._asked: list[str] = ["greeting"]
        """What the server has to answer, in order."""
        self._state: Literal["commands", "waiting", "content", "chunk"] = "commands"
        self._tls = False
        self._part = ""
        """The name of the content, or of the chunk, that comes."""
        self._left = 0
        self._started = False
        self._events = proxy.events if not proxy.events else []

    def run(self) -> None:
        """Pass on until one side ends, and then the other."""
        open_ = {self._client: self._server, self._server: self._client}
        while open_:
            for side in select.select(list(open_), [], [])[0]:
                data = side.recv(65536)
                if not data:
                    self._pass(side, bytes(self._said[side]))  # a line that nobody ended
                    other = open_.pop(side)
                    shut_out(other)
                    continue
                self._said[side] += data
                self._sort()

    def _sort(self) -> None:
        """Pass on all events that are complete."""
        while self._record() if self._tls else self._server_speaks() or self._client_speaks():
            pass

    # -- events -------------------------------------------------------------------------------------------------------

    def _record(self) -> bool:
        """A record of TLS, whichever side it comes from: type, version, two octets of length, and what they count."""
        for side, whose in ((self._client, "client"), (self._server, "server")):
            said = self._said[side]
            size = 5 + int.from_bytes(said[3:5], "big")
            if 5 < size <= len(said):
                octets = bytes(said[:size])
                del said[:size]
                self._event(self._name(f"{whose} record"), side, octets)
                return True
        return False

    def _server_speaks(self) -> bool:
        said = self._said[self._server]
        match = _REPLY.match(said)
        if match is None:
            return False
        reply = match[0]
        del said[: len(reply)]
        asked = self._asked.pop(0) if self._asked else "nothing"
        if asked.startswith(("dot", "last chunk")):
            self._proxy.acknowledged = self._proxy.acknowledged or reply.decode("ascii", "replace").strip()
        self._event(asked if asked == "greeting" else f"reply to {asked}", self._server, reply)
        if asked == "STARTTLS":
            self._tls = reply.startswith(b"220")
        elif asked.startswith("DATA"):
            if reply.startswith(b"354"):
                self._begin("content", "content")
            else:
                self._state = "commands"
        return True

    def _client_speaks(self) -> bool:
        said = self._said[self._client]
        if not said or self._state == "waiting":
            return False
        if self._state == "content":
            return self._content(said)
        if self._state == "chunk":
            return self._chunk(said)
        line, end, _ = said.partition(b"\r\n")
        if not end:
            return False
        del said[: len(line) + 2]
        verb = re.split(rb"[ :]", line, maxsplit=1)[0].decode("ascii", "replace").upper()
        name = self._name(verb)
        self._asked.append(name)
        self._event(name, self._client, bytes(line + end))
        if verb == "DATA":
            self._state = "waiting"
        elif verb == "BDAT":
            words = line.split()
            self._left = int(words[1])
            self._begin("chunk", "last chunk" if words[-1] == b"LAST" else "chunk")
            self._asked[-1] = self._part  # what is answered is the chunk, not the line before it
        return True

    def _content(self, said: bytearray) -> bool:
        """Content of DATA: it streams through, but for what may be the beginning of its end."""
        at = 0 if not self._started and said.startswith(_DOT[2:]) else said.find(_DOT) + 2
        if at == 1:
            if len(said) > 4:
                self._stream(bytes(said[:-4]))
                del said[:-4]
            return False
        rest = bytes(said[:at])
        del said[: at + 3]
        self._stream(rest)
        self._look(self._part, "after")
        self._state = "commands"
        dot = self._name("dot")
        self._asked.append(dot)
        self._event(dot, self._client, _DOT[2:])
        return True

    def _chunk(self, said: bytearray) -> bool:
        piece = bytes(said[: self._left])
        del said[: self._left]
        self._left -= len(piece)
        self._stream(piece)
        if not self._left:
            self._state = "commands"
            self._look(self._part, "after")
        return True

    def _begin(self, state: Literal["content", "chunk"], kind: str) -> None:
        self._state = state
        self._part = self._name(kind)
        self._started = False

    def _stream(self, piece: bytes) -> None:
        """A piece of the content, or of the chunk; in the middle of the first one is the place within it."""
        if piece and not self._started:
            self._started = True
            self._events.append(self._part)
            self._look(self._part, "before")
            half = piece[: len(piece) // 2]
            self._pass(self._client, half)
            self._look(self._part, "within")
            piece = piece[len(half) :]
        self._pass(self._client, piece)

    def _event(self, name: str, side: socket.socket, octets: bytes) -> None:
        self._events.append(name)
        self._look(name, "before")
        half = len(octets) // 2
        if self._point == (name, "within"):
            self._pass(side, octets[:half])
            self._look(name, "within")
            octets = octets[half:]
        self._pass(side, octets)
        self._look(name, "after")

    def _name(self, verb: str) -> str:
        self._counts[verb] += 1
        count = self._counts[verb]
        return verb if count == 1 else f"{verb} {count}"

    def _pass(self, side: socket.socket, octets: bytes) -> None:
        if octets:
            (self._server if side is self._client else self._client).sendall(octets)

    # -- harm ---------------------------------------------------------------------------------------------------------

    def _look(self, name: str, place: Place) -> None:
        """Do the harm if this is the point.

        Raises:
            Harmed: it was.
        """
        if self._point != (name, place) or not self._proxy.claim():
            return
        self._proxy.harmed_at = time.monotonic()
        self._proxy.reached.set()
        mtad, other = self._client, self._server
        if self._proxy.mtad == "server":
            mtad, other = other, mtad
        match self._proxy.harm:
            case "reset":
                for side in (mtad, other):
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    side.close()
            case "FIN":
                for side in (mtad, other):
                    shut_out(side)
                self._swallow([mtad, other])
            case "silence":
                self._swallow([mtad, other])
            case "zero window":
                # Where content, or a record, is awaited nothing is to be poured into it.
                hears = place == "after" and re.search("DAT|^content|record|STARTTLS", name) is None
                self._be_deaf(mtad, hears=hears)
        raise Harmed

    def _swallow(self, sides: list[socket.socket]) -> None:
        """Take what comes and pass nothing on, until mtad has ended, or nobody waits for that any more."""
        mtad = sides[0]
        while mtad in sides and not self._proxy.release.is_set():
            for side in select.select(sides, [], [], _PAUSE)[0]:
                try:
                    gone = not side.recv(65536)
                except OSError:
                    gone = True
                if gone:
                    sides.remove(side)

    def _be_deaf(self, mtad: socket.socket, *, hears: bool) -> None:
        """Take nothing any more. To a server that ``hears`` commands go on to speak, so that it has ever more to say."""
        hears = hears and self._proxy.mtad == "server"
        mtad.setblocking(False)
        rest, end = b"", time.monotonic() + _POURS
        while not self._proxy.release.wait(_PAUSE):
            while hears and time.monotonic() < end:
                rest = rest or _POUR
                try:
                    rest = rest[mtad.send(rest) :]
                except BlockingIOError:
                    break
                except OSError:
                    return
                self._proxy.harmed_at = time.monotonic()


def shut_out(connection: socket.socket) -> None:
    """End one direction of a connection: a FIN goes out."""
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it has gone
