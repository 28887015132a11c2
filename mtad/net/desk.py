"""The scheduler's desk: a named socket where commands ask, and are answered, one packet each way, as often as they like.

The server's side never waits: a visitor who asks and does not read costs a few kilobytes until it goes, and there are only
so many at a time. What is asked and answered is said in `mtad.desk`; here it is octets.

The packets of one socket keep their boundaries. An answer longer than `MAX_PACKET` goes out in several; each begins with an
octet that says whether more follow.

Errors: a visitor who breaks the rules, or has gone, is shown out. `ask` answers None for every way in which there is nobody
who answers.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from mtad.desk import Answer, Question, answer_decoder, encoder
from mtad.net.channels import ANSWER_TIMEOUT, MAX_PACKET, bind, short_name

#: Visitors at a time; more wait in the line of the kernel.
MOST_VISITORS: Final = 32
#: Seconds of silence after which a visitor may be shown out when there is no place for others.
IDLE: Final = 10.0
#: Questions that one call of `Desk.serve` answers.
TURN: Final = 4
#: Octets of an answer in one packet: two fit into what Linux lets an unprivileged user have in a socket.
_PIECE: Final = 64 * 1024
_MORE: Final = b"+"
_LAST: Final = b"."


class _Visitor:
    """Somebody at the desk; ``pieces`` is what is still to be given to him."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pieces: deque[bytes] = deque()
        self.heard = time.monotonic()


class Desk:
    """The server's side, in one thread."""

    def __init__(self, path: str) -> None:
        """Bind to ``path``; one that a dead process left behind is replaced.

        Raises:
            OSError: it cannot be made.
        """
        self._socket = bind(path, socket.SOCK_SEQPACKET)
        self._socket.listen(MOST_VISITORS)
        self._visitors: dict[int, _Visitor] = {}
        self._ready = select.epoll()
        self._ready.register(self._socket.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """For a poll: readable when `serve` has something to do."""
        return self._ready.fileno()

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        """Answer those who wait, but not more than `TURN` of them; what is left makes `fileno` readable again."""
        for fd, events in self._ready.poll(0, TURN):
            if fd == self._socket.fileno():
                self._let_in()
            elif events & select.EPOLLHUP:  # what he wanted he wants no more, and believes that it was not done
                self._show_out(self._visitors[fd])
            elif events & select.EPOLLOUT:
                self._give(self._visitors[fd])
            else:
                self._hear(self._visitors[fd], answer)

    def tidy(self) -> None:
        """To be called now and then: make room for others when all places are taken by visitors who say nothing."""
        if len(self._visitors) >= MOST_VISITORS:
            latest = time.monotonic() - IDLE
            for visitor in [visitor for visitor in self._visitors.values() if visitor.heard < latest]:
                self._show_out(visitor)
        if len(self._visitors) < MOST_VISITORS:
            self._ready.modify(self._socket.fileno(), select.EPOLLIN)

    def close(self) -> None:
        """Close this process's descriptors. In a child of fork the parent's desk goes on."""
        self._ready.close()
        self._socket.close()
        for visitor in self._visitors.values():
            visitor.connection.close()
        self._visitors.clear()

    def _let_in(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError:
            return  # he has gone again
        except OSError:
            self._ready.modify(self._socket.fileno(), 0)  # no descriptor for him, until `tidy`
            return
        connection.setblocking(False)
        self._visitors[connection.fileno()] = _Visitor(connection)
        self._ready.register(connection.fileno(), select.EPOLLIN)
        if len(self._visitors) >= MOST_VISITORS:
            self._ready.modify(self._socket.fileno(), 0)

    def _hear(self, visitor: _Visitor, answer: Callable[[bytes], bytes]) -> None:
        try:
            question = visitor.connection.recv(MAX_PACKET)
        except BlockingIOError:
            return
        except OSError:
            question = b""
        if not question:
            self._show_out(visitor)
            return
        visitor.heard = time.monotonic()
        data = answer(question)
        starts = range(0, max(1, len(data)), _PIECE)
        visitor.pieces.extend(
            (_MORE if start + _PIECE < len(data) else _LAST) + data[start : start + _PIECE] for start in starts
        )
        self._give(visitor)

    def _give(self, visitor: _Visitor) -> None:
        """Send what goes; whoever has not got all is not heard before."""
        try:
            while visitor.pieces:
                visitor.connection.send(visitor.pieces[0])
                visitor.pieces.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._show_out(visitor)
            return
        self._ready.modify(visitor.connection.fileno(), select.EPOLLOUT if visitor.pieces else select.EPOLLIN)

    def _show_out(self, visitor: _Visitor) -> None:
        # Unregistered by name: a child that was forked a moment ago may still have the connection open.
        fd = visitor.connection.fileno()
        self._ready.unregister(fd)
        del self._visitors[fd]
        visitor.connection.close()
        self._ready.modify(self._socket.fileno(), select.EPOLLIN)


def ask(path: str, question: Question, timeout: float = ANSWER_TIMEOUT) -> Answer | None:
    """The answer of the desk at ``path``; None when nobody answers there within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    parts: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as visitor:
        try:
            visitor.settimeout(timeout)
            with short_name(path) as name:
                visitor.connect(name)
            visitor.send(encoder.encode(question))
            while not parts or parts[-1][:1] == _MORE:
                visitor.settimeout(max(0.001, deadline - time.monotonic()))
                packet = visitor.recv(_PIECE + 1)
                if not packet:
                    return None
                parts.append(packet)
            answer: Answer = answer_decoder.decode(b"".join(part[1:] for part in parts))
            return answer
        except (OSError, msgspec.MsgspecError):
            return None
