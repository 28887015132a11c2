"""SMTP sessions with next hops: how a dialogue is played over a connection, and which connections are kept.

`Session` plays the dialogues of `mtad.smtp.client` over a `Stream`. `ConnectionCache` keeps sessions that are idle for the
next message to the same destination, for a short time: a connection costs both sides more than a small message.

Invariants:

- A session is used by one thread at a time: the cache hands it out to one, and has it back only when it is idle.
- No reply is taken for an answer that came before its question: whatever a server says unasked is a fault, unless it is the
  421 of a server that goes down (RFC 5321 section 3.8). In front of TLS that is an attack (CVE-2021-38371, in Exim).
- A reply is complete within its time-out, however slowly it comes, and all replies of a dialogue up to the content within
  `DIALOGUE_LIMIT`. The content leaves at `SLOWEST` at least. So a server cannot hold a thread for ever, whatever it does
  (attack D-11).
- TLS begins with nothing in the buffer: what came before is not read as if it had come through TLS, and what was known of
  the server is forgotten (RFC 3207 section 4.2).
- The hook ``in_doubt`` runs right before the octets that end a message are handed to the kernel.

Errors: `TimedOut`, `ConnectionLost`, `ProtocolFault` (the world's) leave `Session.play` as they are; `Session.phase` says
where. The session is good for `Session.close` only, then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from threading import Lock
from time import monotonic
from typing import Final, TypeVar

from mtad.config import Delivery
from mtad.errors import MtadError
from mtad.net.connection import ConnectionLost, Stream, TimedOut
from mtad.reply import Reply
from mtad.smtp.capabilities import NO_EXTENSIONS, Capabilities
from mtad.smtp.dialogue import PHASES, QUIT, Phase, Step
from mtad.smtp.replies import ProtocolFault, ReplyReader
from mtad.tls.connection import ChannelBindings, TlsConnection

#: Messages over one connection (others: Exim 500, OpenSMTPD 100). Some servers count, and none dislikes 100.
MESSAGE_LIMIT: Final = 100

#: Seconds from connect on that a connection may be reused (Postfix: smtp_connection_reuse_time_limit).
AGE_LIMIT: Final = 300.0

#: Idle connections of one process; the one that has been idle longest gives way.
CACHE_LIMIT: Final = 500

#: Seconds for all replies of one dialogue up to the content: a server that takes four minutes for each of 50 recipients is
#: not worth a thread.
DIALOGUE_LIMIT: Final = 1800.0

#: Octets in a second that a server has to take, on top of one data_xfer_timeout. Postfix's smtp_min_data_rate=500 would
#: give our largest message 14 hours; this is what the slowest line that still carries mail does: 53 minutes for 25 MiB.
SLOWEST: Final = 8192

#: Seconds between two looks at what has been idle for too long, when there is traffic.
_SWEEP: Final = 0.5

#: Seconds for a QUIT to be taken by the kernel: it always has room, or the peer is dead.
_QUIT_TIMEOUT: Final = 0.1

#: Seconds to wait for what a server said before it closed on us.
_LAST_WORDS: Final = 1.0

#: Octets of replies that are taken at a time.
_REPLIES: Final = 4096

T = TypeVar("T")


class Timeouts:
    """Seconds for each phase, from the settings."""

    __slots__ = ("reply", "send", "turn")

    def __init__(self, settings: Delivery) -> None:
        self.reply: Mapping[Phase, float] = {
            phase: float(getattr(settings, words.timeout)) for phase, words in PHASES.items()
        }
        # One for all that is sent, so that the socket's setting never changes: commands fit into any buffer anyway. And
        # replies are waited for in turns of one length, the shortest that a message meets, for the same reason.
        self.send = float(settings.data_xfer_timeout)
        self.turn = min(self.reply[phase] for phase in (Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.DOT))


class Session:
    """A connection to a next hop and what we know about it. Not thread-safe."""

    __slots__ = (
        "_broken",
        "_reader",
        "_replies",
        "_secured",
        "_stream",
        "_timeouts",
        "capabilities",
        "created",
        "host",
        "idle_since",
        "key",
        "messages",
        "most",
        "moved",
        "needs_reset",
        "phase",
        "port",
        "spent",
    )

    def __init__(self, stream: Stream, key: str, host: str, port: int, timeouts: Timeouts, *, now: float) -> None:
        """Take over a new connection to ``host`` for the destination ``key``; ``now`` is monotonic, in seconds."""
        self._stream = stream
        self._reader = ReplyReader()
        self._replies: deque[Reply] = deque()
        self._timeouts = timeouts
        self._secured: TlsConnection | None = None
        self._broken = False
        self.key = key
        self.host = host
        self.port = port
        self.created = now
        self.idle_since = now
        self.moved = monotonic()
        """When an octet was last sent or received."""
        self.messages = 0
        self.most = MESSAGE_LIMIT
        """Messages that may go over it."""
        self.needs_reset = False
        self.spent = False
        """Nothing more can be said: it broke, or was closed."""
        self.capabilities: Capabilities = NO_EXTENSIONS
        self.phase = Phase.GREETING

    @property
    def address(self) -> str:
        """The address of the server, without port."""
        return self._stream.address

    @property
    def tls(self) -> str:
        """Protocol and cipher, or "" for clear text."""
        return self._stream.tls

    @property
    def bindings(self) -> ChannelBindings:
        """What a SASL mechanism may bind to; nothing in clear text."""
        return self._secured.channel_bindings if self._secured is not None else {}

    def secure(self, shake_hands: Callable[[], TlsConnection]) -> TlsConnection:
        """Go on in TLS. ``shake_hands`` encrypts the connection that the session was made with.

        Raises:
            ProtocolFault: the server said something after the reply to STARTTLS (attack C-TL1).
            TlsFailed: see `mtad.tls.client`; the session is good for `close` only.
        """
        self.phase = Phase.STARTTLS
        self._broken = True
        if self.spent or self._replies or not self._reader.empty:
            raise ProtocolFault("octets between the reply to STARTTLS and the TLS handshake")
        self._secured = self._stream = shake_hands()
        self._broken = False
        self._reader = ReplyReader()
        self.capabilities = NO_EXTENSIONS
        return self._secured

    def play(self, steps: Generator[Step, Reply | None, T], in_doubt: Callable[[], None] | None = None, size: int = 0) -> T:
        """Play a dialogue to its end and return its result; ``size``: octets of the content in it, for its time.

        Raises:
            TimedOut: the server did not take bytes or did not answer in time.
            ConnectionLost: the connection broke, or the server closed it.
            ProtocolFault: the server does not speak SMTP.
        """
        reply: Reply | None = None
        end = monotonic() + DIALOGUE_LIMIT
        in_content = False
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as stop:
                result: T = stop.value
                return result
            self.phase = phase = step.phase
            reply = None
            if phase is Phase.CONTENT or phase is Phase.DOT:
                if not in_content:
                    in_content = True
                    end = monotonic() + self._timeouts.send + size / SLOWEST
                if step.send:
                    reply = self._send(step, in_doubt, min(self._timeouts.send, end - monotonic()))
                timeout = self._timeouts.reply[phase]
            else:
                reply = self._send(step, in_doubt, self._timeouts.send) if step.send else None
                timeout = min(self._timeouts.reply[phase], end - monotonic())
            if reply is None and step.reply:
                if timeout <= 0:
                    raise TimedOut("the dialogue takes too long")
                reply = self._receive(timeout)

    def close(self, quit_first: bool = True) -> None:
        """Close the connection, after a QUIT whose reply is not waited for (Postfix: smtp_skip_quit_response)."""
        if quit_first and not self._broken:
            try:
                self._stream.send(QUIT, _QUIT_TIMEOUT)
            except MtadError:
                pass  # a farewell to a server that has gone
        self._stream.close()

    def interrupt(self) -> None:
        """End the connection under the thread that waits on it, from another one."""
        self._stream.shutdown()

    def reusable(self, now: float) -> bool:
        """Whether another message may go over this connection: nothing unread, not too many messages, not too old."""
        if self.spent or self._replies or not self._reader.empty or now - self.created >= AGE_LIMIT:
            return False
        return self.messages < min(self.most, self.capabilities.message_limit or self.most)

    def _send(self, step: Step, in_doubt: Callable[[], None] | None, timeout: float) -> Reply | None:
        """Send the bytes of a step; a reply only if the server gave up before it had them all."""
        if self.spent or self._replies or not self._reader.empty:
            return self._unasked()
        if step.final and in_doubt is not None:
            in_doubt()
        if timeout <= 0:
            raise TimedOut("the server takes the content too slowly")
        try:
            self._stream.send(step.send, timeout)
        except ConnectionLost:
            return self._last_words()
        self.moved = monotonic()
        return None

    def _unasked(self) -> Reply:
        reply = self._receive(0.0)
        if reply.code != 421:
            raise ProtocolFault(f"reply that nobody asked for: {reply.text}")
        return reply

    def _last_words(self) -> Reply:
        """The connection broke while we were sending: what did the server say before that?

        Raises:
            ConnectionLost: nothing, or nothing that explains it.
        """
        try:
            reply = self._receive(_LAST_WORDS)
        except (TimedOut, ProtocolFault) as error:
            raise ConnectionLost(str(error)) from None
        if reply.positive:
            raise ConnectionLost("closed while we were sending")
        return reply

    def _receive(self, timeout: float) -> Reply:
        """The next reply. The time-out is for the whole of it."""
        if self._replies:
            return self._replies.popleft()
        self._replies.extend(self._reader.feed(b""))  # a fault that stood behind the last reply
        end = monotonic() + timeout
        remaining = timeout
        while True:
            try:
                data = self._stream.receive(min(remaining, self._timeouts.turn), _REPLIES)
            except TimedOut:
                if monotonic() < end - 0.5:  # a turn is over, the time-out is not
                    remaining = end - monotonic()
                    continue
                raise
            if not data:
                raise ConnectionLost("closed by the server")
            self.moved = now = monotonic()
            self._replies.extend(self._reader.feed(data))
            if self._replies:
                return self._replies.popleft()
            remaining = end - now
            if remaining <= 0:
                raise TimedOut("the reply did not come to its end in time")


class ConnectionCache:
    """Idle sessions by destination. Thread-safe.

    Time is a parameter, in seconds of one monotonic clock. Sessions that are idle for too long are closed by `expire`,
    which is also called by `put` and `take` now and then; without traffic somebody has to call it.
    """

    def __init__(self, idle: float, limit: int = CACHE_LIMIT) -> None:
        """Keep at most ``limit`` sessions, each for at most ``idle`` seconds; 0 of either keeps none."""
        self._idle = idle
        self._limit = limit
        self._lock = Lock()
        self._sessions: dict[str, list[Session]] = {}
        self._count = 0
        self._swept = 0.0
        self._closed = False

    def __len__(self) -> int:
        return self._count

    def take(self, key: str, now: float) -> Session | None:
        """The session for this destination that was idle for the shortest time, for the caller to keep; None: no such."""
        stale: list[Session] = []
        found: Session | None = None
        with self._lock:
            waiting = self._sessions.get(key)
            while waiting and found is None:
                session = waiting.pop()
                self._count -= 1
                if now - session.idle_since < self._idle and session.reusable(now):
                    found = session
                else:
                    stale.append(session)
            if waiting is not None and not waiting:
                del self._sessions[key]
        for session in stale:
            session.close()
        return found

    def put(self, session: Session, now: float) -> None:
        """Give a session back, or hand a new one over. It is closed at once when it cannot be kept."""
        stale: list[Session] = []
        with self._lock:
            if self._closed or self._idle <= 0 or self._limit <= 0 or not session.reusable(now):
                stale.append(session)
            else:
                session.idle_since = now
                self._sessions.setdefault(session.key, []).append(session)
                self._count += 1
                if self._count > self._limit:
                    stale.append(self._oldest())
            if now - self._swept > _SWEEP:
                stale.extend(self._expired(now))
        for old in stale:
            old.close()

    def expire(self, now: float) -> int:
        """Close what has been idle for too long; how many that were."""
        with self._lock:
            stale = self._expired(now)
        for session in stale:
            session.close()
        return len(stale)

    def close_all(self) -> None:
        """Close every idle session, and from now on each that is given back."""
        with self._lock:
            self._closed = True
            stale = [session for waiting in self._sessions.values() for session in waiting]
            self._sessions.clear()
            self._count = 0
        for session in stale:
            session.close()

    def _expired(self, now: float) -> list[Session]:
        self._swept = now
        stale: list[Session] = []
        for key, waiting in list(self._sessions.items()):
            # the list is in the order of idle_since, so that the old ones stand in front
            old = 0
            while old < len(waiting) and now - waiting[old].idle_since >= self._idle:
                old += 1
            stale.extend(waiting[:old])
            del waiting[:old]
            if not waiting:
                del self._sessions[key]
        self._count -= len(stale)
        return stale

    def _oldest(self) -> Session:
        key = min(self._sessions, key=lambda name: self._sessions[name][0].idle_since)
        session = self._sessions[key].pop(0)
        if not self._sessions[key]:
            del self._sessions[key]
        self._count -= 1
        return session
