"""Where log lines go, and what they look like there: one `Sink` for each place, and the two formats.

Python's logging does the talking to syslog, and what other libraries log through it comes out here. Our own lines go the
short way: a string, a write(2), no record, no lock. That is safe for several threads and several processes on one file,
because the file is open for appending and a line is written whole; lines keep below the 4,096 octets that a pipe takes at
once.

Invariants: a line has no control character and no line end but its own; logging never raises, whatever the disk says; after
a fork the child may go on at once.
Errors: OSError from `open_sink` alone: the file cannot be opened, or there is no syslog socket. A write that fails later is
dropped, and so is what a reader does not take who has stopped reading: mail goes on without its log.
Standards: RFC 3164 (format of the lines), sd-daemon(3) (priority prefixes).
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import select
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

#: Octets that a pipe takes at once or not at all (PIPE_BUF of Linux).
MAX_LINE: Final = 4096
# Octets of a line without its end and what a sink puts before it.
_ROOM: Final = MAX_LINE - 8
#: Characters of the text of a line.
MAX_TEXT: Final = 2000
#: Characters of the text when a JSON line would be too long otherwise.
MAX_TEXT_ALONE: Final = 500
#: The socket of the system's log.
SYSLOG_SOCKET: Final = "/dev/log"

#: Seconds for a reader of the log who takes nothing.
_STALLED: Final = 1.0

_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# Names of levels, as logging knows them, with the priority of syslog (RFC 5424 table 2).
_PRIORITY: Final = {logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_LEVEL_NAME: Final = {
    logging.INFO: "info",
    logging.WARNING: "warning",
    logging.ERROR: "error",
    logging.CRITICAL: "critical",
}

_encode_json = msgspec.json.Encoder().encode

Fields = Mapping[str, str | int | float]


def clean(text: str) -> str:
    """The text with ``?`` for everything that is not printable, control characters and line ends foremost."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def stamp(seconds: int) -> str:
    """Local time as syslog writes it: ``Nov 24 02:43:06``."""
    at = time.localtime(seconds)
    return f"{_MONTHS[at.tm_mon - 1]} {at.tm_mday:2} {at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02}"


class Line(msgspec.Struct, frozen=True, gc=False):
    """One line: who says it, about which message ("" for none), as text and as the fields of the JSON object."""

    level: int
    program: str
    pid: int
    queue_id: str
    text: str
    fields: Fields


class Formatter:
    """Makes the octets of a line."""

    def __init__(self, *, json: bool, dated: bool) -> None:
        """``dated``: lines begin with time and host, for places that do not add them; JSON always has the time."""
        self._json = json
        self._dated = dated
        self._host = os.uname().nodename.partition(".")[0]
        self._second: tuple[int, str] = (-1, "")

    def format(self, line: Line) -> bytes:
        """One line without its line end, of less than `MAX_LINE` octets."""
        text = clean(line.text[:MAX_TEXT])
        if self._json:
            return self._object(line, text)
        subject = f"{line.queue_id}: " if line.queue_id else ""
        encoded = f"{self._date()}mtad/{line.program}[{line.pid}]: {subject}{text}".encode()
        return encoded if len(encoded) <= _ROOM else encoded[:_ROOM].decode(errors="ignore").encode()

    def _date(self) -> str:
        if not self._dated:
            return ""
        now = int(time.time())
        second, date = self._second
        if second != now:
            date = f"{stamp(now)} {self._host} "
            self._second = (now, date)
        return date

    def _object(self, line: Line, text: str) -> bytes:
        now = time.time()
        head: dict[str, str | int | float] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03}Z",
            "program": f"mtad/{line.program}",
            "pid": line.pid,
            "level": _LEVEL_NAME[line.level],
        }
        if line.queue_id:
            head["queue_id"] = line.queue_id
        values = {name: clean(value) if isinstance(value, str) else value for name, value in line.fields.items()}
        encoded = _encode_json(head | {"message": text} | values)
        if len(encoded) <= _ROOM:
            return encoded
        return _encode_json(head | {"message": text[:MAX_TEXT_ALONE], "truncated": True})


class Sink(Protocol):
    """A place for lines."""

    formatter: Formatter

    def write(self, level: int, *lines: bytes) -> None:
        """Write lines of one level, given without their line ends. Never raises."""

    def close(self) -> None:
        """Give back what was opened; nothing is written after this."""


def _pieces(lines: Sequence[bytes]) -> Iterator[bytes]:
    """Lines with their ends, all in one piece if a pipe takes it as such, else one by one."""
    data = b"\n".join(lines) + b"\n"
    if len(data) > MAX_LINE and len(lines) > 1:
        yield from (line + b"\n" for line in lines)
    else:
        yield data


def _write(fd: int, data: bytes) -> None:
    try:
        done = os.write(fd, data)
        if done < len(data):
            os.write(fd, data[done:])
    except OSError:
        pass  # no disk space, or a terminal that went away: there is nobody left to tell


def _has_room(fd: int, timeout: float) -> bool:
    """Whether something can be written now, or within so many seconds."""
    poll = select.poll()  # one for each call: no two threads may use one
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(timeout * 1000))


class DescriptorSink:
    """A descriptor that is open already: standard error, at a terminal or with the journal behind it.

    A reader who takes nothing any more is waited for once, for `_STALLED`; what comes then is dropped until there is room.
    """

    def __init__(self, fd: int, formatter: Formatter, *, priorities: bool) -> None:
        """``priorities``: lines begin with sd-daemon's ``<N>``."""
        self.formatter = formatter
        self._fd = fd
        self._priorities = priorities
        self._stalled = False

    def write(self, level: int, *lines: bytes) -> None:
        """See `Sink`."""
        if self._priorities:
            lines = tuple(b"<%d>%s" % (_PRIORITY[level], line) for line in lines)
        for piece in _pieces(lines):
            self._stalled = not _has_room(self._fd, 0.0 if self._stalled else _STALLED)
            if not self._stalled:
                _write(self._fd, piece)

    def close(self) -> None:
        """Nothing: the descriptor was there before us."""


class FileSink:
    """A file, opened anew when somebody moved it away; that is looked at once a second at most."""

    def __init__(self, path: str, formatter: Formatter) -> None:
        """Open the file, or make it (0640).

        Raises:
            OSError: it cannot be opened.
        """
        self.formatter = formatter
        self._path = path
        self._fd = self._open()
        self._checked = time.monotonic()
        # Never held over a fork: whoever forks has one thread, and that one is not in here.
        self._lock = threading.Lock()

    def write(self, level: int, *lines: bytes) -> None:
        """See `Sink`."""
        del level
        now = time.monotonic()
        if now - self._checked >= 1.0:
            self._checked = now
            self._follow()
        for piece in _pieces(lines):
            _write(self._fd, piece)

    def close(self) -> None:
        """See `Sink`."""
        os.close(self._fd)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, 0o640)

    def _follow(self) -> None:
        """Go over to the file that now has the name. The descriptor keeps its number, so that no writer can miss it."""
        with self._lock:
            try:
                try:
                    found = os.stat(self._path)
                    ours = os.fstat(self._fd)
                    if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino):
                        return
                except FileNotFoundError:
                    pass  # moved away, and no new one yet: make it
                fresh = self._open()
                os.dup2(fresh, self._fd, inheritable=False)
                os.close(fresh)
            except OSError:
                pass  # the old file is better than none


class _QuietSysLogHandler(logging.handlers.SysLogHandler):
    """Logging's handler, silent about a syslog that is away: it would write to standard error, which may be closed.

    One that takes nothing any more is waited for once, for `_STALLED`; what comes then is dropped until it takes a line.
    """

    socket: Any  # the handler's own: a socket, or None
    _stalled = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002  # the name is logging's
        """Drop the line."""
        self._stalled = True

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line."""
        stalled, self._stalled = self._stalled, False
        if self.socket is not None:
            with contextlib.suppress(OSError):  # it is closed, and made anew
                self.socket.settimeout(0.0 if stalled else _STALLED)
        super().emit(record)

    def _connect_unixsocket(self, address: str) -> None:
        """What the handler does at first, and again when a line was refused: that must not wait a second time."""
        super()._connect_unixsocket(address)  # type: ignore[misc]  # the method is Python's own
        if self.socket is not None:
            self.socket.settimeout(0.0)


class SyslogSink:
    """The system's log, facility mail."""

    def __init__(self, formatter: Formatter, path: str = SYSLOG_SOCKET) -> None:
        """Connect to the socket; a syslog that is down for the moment is tried again with each line.

        Raises:
            OSError: there is no such socket.
        """
        os.stat(path)  # the handler keeps silent about this, and every line would be lost
        self.formatter = formatter
        self._handler = _QuietSysLogHandler(address=path, facility=logging.handlers.SysLogHandler.LOG_MAIL)

    def write(self, level: int, *lines: bytes) -> None:
        """See `Sink`."""
        for line in lines:
            self._handler.handle(logging.LogRecord("mtad", level, "", 0, line.decode(), None, None))

    def close(self) -> None:
        """See `Sink`."""
        self._handler.close()


def open_sink(to: str, json: bool) -> Sink:
    """The sink for a value of ``log.to``.

    Raises:
        OSError: the file or the syslog socket cannot be opened.
    """
    if to == "stderr":
        return DescriptorSink(2, Formatter(json=json, dated=True), priorities=False)
    if to == "journal":
        return DescriptorSink(2, Formatter(json=json, dated=False), priorities=True)
    if to == "syslog":
        return SyslogSink(Formatter(json=json, dated=False))
    return FileSink(to, Formatter(json=json, dated=True))
