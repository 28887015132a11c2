"""The log: one function for each line that we write, so that both formats say the same.

Lines are those of Postfix with ``mtad/`` for ``postfix/`` in the program name; pflogsumm, fail2ban and exporters read them.
With ``format = "json"`` the facts of a line are fields of an object, beside the line itself in ``message``.

Call `setup` once in each process; a child of fork keeps its parent's setting, and calls `setup` again only to change the
program. Before the first call lines go to standard error. What other libraries log through Python's logging comes out as
warnings of the process's program.

Invariants: no message content, no credentials, no control characters; a line is written whole; nothing here raises but
`setup`.
Errors: see `mtad.log_sinks`.
Standards: RFC 3164 (lines), RFC 3463 (dsn=).
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Mapping
from typing import Final, Literal

from mtad.envelope import Envelope
from mtad.log_sinks import DescriptorSink, Fields, Formatter, Line, Sink, open_sink
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.reply import Reply

Program = Literal["master", "smtpd", "cleanup", "qmgr", "smtp", "local", "bounce"]

_STATUS: Final[dict[type[Outcome], str]] = {Delivered: "sent", Deferred: "deferred", Failed: "bounced"}
#: What Postfix calls the kinds of reports.
_NOTIFICATIONS: Final = {"failure": "non-delivery", "success": "delivery status", "delay": "delay"}
_NONE: Final[Fields] = {}


class _Process:
    """The setting of this process."""

    sink: Sink = DescriptorSink(2, Formatter(json=False, dated=True), priorities=False)
    program: Program = "master"
    pid: int = os.getpid()

    @classmethod
    def forked(cls) -> None:
        cls.pid = os.getpid()


os.register_at_fork(after_in_child=_Process.forked)


class _Bridge(logging.Handler):
    """Takes what others log."""

    def emit(self, record: logging.LogRecord) -> None:
        level = min(max(record.levelno // 10 * 10, logging.INFO), logging.CRITICAL)
        text = f"{record.name}: {record.getMessage()}"
        if record.exc_info is not None and record.exc_info[1] is not None:
            text += f" ({_where(record.exc_info[1])})"
        _emit(level, _Process.program, "", f"warning: {text}" if level > logging.INFO else text)


_bridge: Final = _Bridge(logging.WARNING)


def setup(to: str, log_format: Literal["postfix", "json"], program: Program) -> None:
    """Say where the lines of this process go.

    Args:
        to: ``stderr``, ``syslog``, ``journal`` or the path of a file, as ``log.to``.
        log_format: as ``log.format``.
        program: what `info`, `warning` and `panic` sign with; the other functions know theirs.

    Raises:
        OSError: the file or the syslog socket cannot be opened.
    """
    before, _Process.sink = _Process.sink, open_sink(to, log_format == "json")
    before.close()
    _Process.program = program
    logging.getLogger().addHandler(_bridge)


def become(program: Program) -> None:
    """Change the program of this process, as a child does after fork."""
    _Process.program = program


def _emit(level: int, program: str, queue_id: str, text: str, fields: Fields = _NONE) -> None:
    sink = _Process.sink
    sink.write(level, sink.formatter.format(Line(level, program, _Process.pid, queue_id, text, fields)))


def connect(client: str) -> None:
    """A session begins. ``client`` is ``name[address]`` here and in all functions below."""
    _emit(logging.INFO, "smtpd", "", f"connect from {client}", {"event": "connect", "client": client})


def disconnect(client: str, commands: Mapping[str, tuple[int, int]]) -> None:
    """A session ended. ``commands`` maps each verb to how many were accepted, and how many there were in all."""
    total = {"commands": (sum(good for good, _ in commands.values()), sum(count for _, count in commands.values()))}
    words = [
        f"{verb.lower()}={good}" if good == count else f"{verb.lower()}={good}/{count}"
        for verb, (good, count) in {**commands, **total}.items()
    ]
    text = f"disconnect from {client} {' '.join(words)}"
    _emit(logging.INFO, "smtpd", "", text, {"event": "disconnect", "client": client, "commands": total["commands"][1]})


def lost(client: str, after: str, *, timeout: bool = False) -> None:
    """The client went away, or was silent for too long (``timeout``), after the command ``after`` (CONNECT at first)."""
    what = "timeout" if timeout else "lost connection"
    _emit(
        logging.INFO, "smtpd", "", f"{what} after {after} from {client}", {"event": what, "client": client, "after": after}
    )


def accepted(queue_id: str, client: str, login: str, mechanism: str, message_id: str) -> None:
    """A message is ours: two lines, who brought it and what its Message-ID is ("" when it has none).

    The id is from now on the first word of every line about it. Who had shown who it is, ``login``, and how.
    """
    fields: dict[str, str | int | float] = {"event": "client", "client": client}
    text = f"client={client}"
    if login:
        text += f", sasl_method={mechanism}, sasl_username={login}"
        fields |= {"sasl_method": mechanism, "sasl_username": login}
    of_message: Fields = {"event": "message-id", "message_id": message_id}
    sink, pid = _Process.sink, _Process.pid
    sink.write(
        logging.INFO,
        sink.formatter.format(Line(logging.INFO, "smtpd", pid, queue_id, text, fields)),
        sink.formatter.format(Line(logging.INFO, "cleanup", pid, queue_id, f"message-id={message_id}", of_message)),
    )


def login_failed(client: str, mechanism: str, reply: Reply, login: str) -> None:
    """Somebody could not show who it is, ``login``; in the words that fail2ban looks for in Postfix's log."""
    _emit(
        logging.WARNING,
        "smtpd",
        "",
        f"warning: {client}: SASL {mechanism} authentication failed: {reply.text}, sasl_username={login}",
        {"event": "login-failed", "client": client, "sasl_method": mechanism, "reply": reply.text, "sasl_username": login},
    )


def queue_active(envelope: Envelope, size: int) -> None:
    """A message goes to the active queue. ``size``: octets of its content."""
    count = len(envelope.recipients)
    _emit(
        logging.INFO,
        "qmgr",
        envelope.id,
        f"from=<{envelope.sender}>, size={size}, nrcpt={count} (queue active)",
        {"event": "active", "from": envelope.sender, "size": size, "nrcpt": count},
    )


def delivery(envelope: Envelope, recipient: str, attempt: Attempt, outcome: Outcome, active: float) -> None:
    """What became of one recipient in one attempt.

    Args:
        envelope: of the message.
        recipient: the address.
        attempt: says where and how long.
        outcome: of this recipient.
        active: when the message entered the active queue, seconds since the epoch.
    """
    before, queued = max(0.0, active - envelope.arrival), max(0.0, attempt.started - active)
    delay = before + queued + attempt.connection + attempt.transmission
    delays = f"{_short(before)}/{_short(queued)}/{_short(attempt.connection)}/{_short(attempt.transmission)}"
    status, relay = _STATUS[type(outcome)], attempt.relay
    _emit(
        logging.INFO,
        "local" if attempt.host == "local" else "smtp",
        envelope.id,
        f"to=<{recipient}>, relay={relay}, delay={_short(delay)}, delays={delays}, dsn={outcome.status}, "
        f"status={status} ({outcome.text})",
        {
            "event": "delivery",
            "to": recipient,
            "relay": relay,
            "delay": round(delay, 3),
            "delays": delays,
            "dsn": outcome.status,
            "status": status,
            "reason": outcome.text,
        },
    )


def _short(seconds: float) -> str:
    """Two significant digits, nothing below 10 ms, no trailing zeros, as Postfix has it."""
    if seconds < 0.005:
        return "0"
    return f"{seconds:.0f}" if seconds >= 9.95 else f"{round(seconds, 1 if seconds >= 0.995 else 2):g}"


def expired(queue_id: str, sender: str) -> None:
    """The life of a message is over; its sender gets a report."""
    text = f"from=<{sender}>, status=expired, returned to sender"
    _emit(logging.INFO, "qmgr", queue_id, text, {"event": "expired", "from": sender, "status": "expired"})


def notified(
    queue_id: str,
    report_id: str,
    whom: Literal["sender", "postmaster"] = "sender",
    kind: Literal["failure", "success", "delay"] = "failure",
) -> None:
    """A report about a message was committed: to whom it goes, and what it is about."""
    text = f"{whom} {_NOTIFICATIONS[kind]} notification: {report_id}"
    fields: Fields = {"event": "notification", "notified": whom, "kind": kind, "report": report_id}
    _emit(logging.INFO, "bounce", queue_id, text, fields)


def removed(queue_id: str) -> None:
    """The last line about a message."""
    _emit(logging.INFO, "qmgr", queue_id, "removed", {"event": "removed"})


def reject(
    client: str,
    command: str,
    reply: Reply,
    *,
    about: str = "",
    sender: str | None = None,
    recipient: str | None = None,
    protocol: str = "SMTP",
    helo: str = "",
    queue_id: str = "NOQUEUE",
) -> None:
    """A command was refused by policy.

    Args:
        client: ``name[address]``.
        command: CONNECT, MAIL, RCPT, DATA or END-OF-MESSAGE.
        reply: what the client was told.
        about: what was refused, such as an address: stands as ``<about>:`` before the reply's text.
        sender: the reverse-path, None before MAIL.
        recipient: the forward-path, None outside RCPT.
        protocol: SMTP or ESMTP.
        helo: how the client called itself.
        queue_id: of the message, when it has one already.
    """
    code = f"{reply.code} {reply.enhanced}".rstrip()
    text = f"reject: {command} from {client}: {code} {f'<{about}>: ' if about else ''}{' '.join(reply.lines)};"
    fields: dict[str, str | int | float] = {"event": "reject", "client": client, "command": command, "code": reply.code}
    fields |= {"dsn": reply.enhanced, "reason": " ".join(reply.lines)}
    if sender is not None:
        text += f" from=<{sender}>"
        fields["from"] = sender
    if recipient is not None:
        text += f" to=<{recipient}>"
        fields["to"] = recipient
    text += f" proto={protocol}"
    if helo:
        text += f" helo=<{helo}>"
        fields["helo"] = helo
    _emit(logging.INFO, "smtpd", queue_id, text, fields)


def info(text: str, queue_id: str = "") -> None:
    """Anything else that an administrator may want to know."""
    _emit(logging.INFO, _Process.program, queue_id, text)


def warning(text: str, queue_id: str = "") -> None:
    """Odd and survivable; the text says what was done about it."""
    _emit(logging.WARNING, _Process.program, queue_id, f"warning: {text}")


def fatal(text: str) -> None:
    """The world failed, and this process ends."""
    _emit(logging.ERROR, _Process.program, "", f"fatal: {text}")


def panic(text: str, error: BaseException | None = None, queue_id: str = "") -> None:
    """A bug: an interface was broken. ``error`` adds its type, its text and where it came from."""
    if error is not None:
        text = f"{text}: {_where(error)}"
    _emit(logging.CRITICAL, _Process.program, queue_id, f"panic: {text}")


def _where(error: BaseException) -> str:
    """An exception on one line, the innermost four calls included."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    calls = " < ".join(f"{frame.name} {os.path.basename(frame.filename)}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__}: {error} [{calls}]"
