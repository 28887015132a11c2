"""Log lines: what they look like, where they go, and that nothing can break them."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad import log, log_sinks
from mtad.envelope import Envelope, Recipient
from mtad.log_sinks import DescriptorSink, FileSink, Formatter, Line, SyslogSink, clean, stamp
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from mtad.reply import reply

ARRIVAL = 1_700_000_000.0
MESSAGE = Envelope("4bVQkR2JbSz9bc", ARRIVAL, "a@b.example", (Recipient("x@y.example"), Recipient("z@y.example")))
ATTEMPT = Attempt(ARRIVAL + 0.104, (), "mx.y.example", "192.0.2.1:25", connection=0.3, transmission=0.123)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """Give the process its first setting back."""
    yield
    log.setup("stderr", "postfix", "master")
    logging.getLogger().removeHandler(log._bridge)


@pytest.fixture
def lines(tmp_path: Path) -> Callable[[], list[str]]:
    """What was logged, without date and host."""
    log.setup(str(tmp_path / "log"), "postfix", "master")
    host = os.uname().nodename.split(".")[0]
    head = re.compile(rf"[A-Z][a-z]{{2}} [ \d]\d \d\d:\d\d:\d\d {re.escape(host)} (mtad/[a-z]+)\[{os.getpid()}\]: (.*)")

    def read() -> list[str]:
        found = [head.fullmatch(line) for line in (tmp_path / "log").read_text().splitlines()]
        return [f"{match[1]}: {match[2]}" for match in found if match is not None and len(found)]

    return read


def test_logins(lines: Callable[[], list[str]]) -> None:
    """In Postfix's words; fail2ban looks for the last line."""
    log.accepted("4bVQ", "unknown[192.0.2.7]", "alice", "PLAIN", "")
    log.login_failed("unknown[192.0.2.7]", "PLAIN", reply(535, "5.7.8", "no"), "al ice")
    assert lines() == [
        "mtad/smtpd: 4bVQ: client=unknown[192.0.2.7], sasl_method=PLAIN, sasl_username=alice",
        "mtad/cleanup: 4bVQ: message-id=",
        "mtad/smtpd: warning: unknown[192.0.2.7]: SASL PLAIN authentication failed: 535 5.7.8 no, sasl_username=al ice",
    ]


def everything() -> None:
    client = "mail.b.example[192.0.2.7]"
    log.connect(client)
    log.accepted(MESSAGE.id, client, "", "", "<1@b.example>")
    log.disconnect(client, {"EHLO": (1, 1), "RCPT": (1, 2), "QUIT": (1, 1)})
    log.lost(client, "DATA")
    log.lost(client, "CONNECT", timeout=True)
    log.queue_active(MESSAGE, 1234)
    for outcome in (
        Delivered("2.0.0", "250 2.0.0 Ok"),
        Deferred("4.2.0", "host mx.y.example[192.0.2.1] said: 450 4.2.0 later"),
        Failed("5.1.1", "host mx.y.example[192.0.2.1] said: 550 5.1.1 no"),
    ):
        log.delivery(MESSAGE, "x@y.example", ATTEMPT, outcome, ARRIVAL + 0.1)
    log.delivery(MESSAGE, "z@y.example", Attempt(ARRIVAL, (), "local"), Delivered("2.0.0", "to maildir"), ARRIVAL)
    log.expired(MESSAGE.id, MESSAGE.sender)
    log.notified(MESSAGE.id, "4bVQkR2JbSz9bd")
    log.notified(MESSAGE.id, "4bVQkR2JbSz9be", "postmaster")
    log.removed(MESSAGE.id)
    refusal = reply(550, "5.1.1", "Recipient address rejected: no such user")
    names = {"protocol": "ESMTP", "helo": "mail.b.example"}
    log.reject(client, "RCPT", refusal, about="x@y", sender="", recipient="x@y", **names)
    log.reject(client, "CONNECT", reply(421, "4.7.0", "too many connections"))
    log.info("ready")
    log.warning("disk is nearly full; nothing was done", MESSAGE.id)
    log.fatal("no disk")


def test_postfix_lines(lines: Callable[[], list[str]]) -> None:
    everything()
    sent = "4bVQkR2JbSz9bc: to=<x@y.example>, relay=mx.y.example[192.0.2.1]:25, delay=0.53, delays=0.1/0/0.3/0.12"
    assert lines() == [
        "mtad/smtpd: connect from mail.b.example[192.0.2.7]",
        "mtad/smtpd: 4bVQkR2JbSz9bc: client=mail.b.example[192.0.2.7]",
        "mtad/cleanup: 4bVQkR2JbSz9bc: message-id=<1@b.example>",
        "mtad/smtpd: disconnect from mail.b.example[192.0.2.7] ehlo=1 rcpt=1/2 quit=1 commands=3/4",
        "mtad/smtpd: lost connection after DATA from mail.b.example[192.0.2.7]",
        "mtad/smtpd: timeout after CONNECT from mail.b.example[192.0.2.7]",
        "mtad/qmgr: 4bVQkR2JbSz9bc: from=<a@b.example>, size=1234, nrcpt=2 (queue active)",
        f"mtad/smtp: {sent}, dsn=2.0.0, status=sent (250 2.0.0 Ok)",
        f"mtad/smtp: {sent}, dsn=4.2.0, status=deferred (host mx.y.example[192.0.2.1] said: 450 4.2.0 later)",
        f"mtad/smtp: {sent}, dsn=5.1.1, status=bounced (host mx.y.example[192.0.2.1] said: 550 5.1.1 no)",
        "mtad/local: 4bVQkR2JbSz9bc: to=<z@y.example>, relay=local, delay=0, delays=0/0/0/0, dsn=2.0.0, "
        "status=sent (to maildir)",
        "mtad/qmgr: 4bVQkR2JbSz9bc: from=<a@b.example>, status=expired, returned to sender",
        "mtad/bounce: 4bVQkR2JbSz9bc: sender non-delivery notification: 4bVQkR2JbSz9bd",
        "mtad/bounce: 4bVQkR2JbSz9bc: postmaster non-delivery notification: 4bVQkR2JbSz9be",
        "mtad/qmgr: 4bVQkR2JbSz9bc: removed",
        "mtad/smtpd: NOQUEUE: reject: RCPT from mail.b.example[192.0.2.7]: 550 5.1.1 <x@y>: Recipient address rejected: "
        "no such user; from=<> to=<x@y> proto=ESMTP helo=<mail.b.example>",
        "mtad/smtpd: NOQUEUE: reject: CONNECT from mail.b.example[192.0.2.7]: 421 4.7.0 too many connections; proto=SMTP",
        "mtad/master: ready",
        "mtad/master: 4bVQkR2JbSz9bc: warning: disk is nearly full; nothing was done",
        "mtad/master: fatal: no disk",
    ]


def test_json_has_the_same_facts(tmp_path: Path) -> None:
    for name in ("postfix", "json"):
        log.setup(str(tmp_path / name), name, "master")
        everything()
    texts = [line.split("]: ", 1)[1] for line in (tmp_path / "postfix").read_text().splitlines()]
    found = [json.loads(line) for line in (tmp_path / "json").read_text().splitlines()]
    assert [f"{o['queue_id']}: {o['message']}" if "queue_id" in o else o["message"] for o in found] == texts
    assert {key: found[8][key] for key in ("event", "to", "dsn", "status", "delay", "level", "program", "pid")} == {
        "event": "delivery",
        "to": "x@y.example",
        "dsn": "4.2.0",
        "status": "deferred",
        "delay": 0.527,
        "level": "info",
        "program": "mtad/smtp",
        "pid": os.getpid(),
    }
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", o["time"]) for o in found)
    assert (found[-2]["level"], found[-1]["level"]) == ("warning", "error")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0"), (0.004, "0"), (0.006, "0.01"), (0.1, "0.1"), (0.126, "0.13"), (0.994, "0.99"), (0.996, "1")),
        *((1.04, "1"), (1.26, "1.3"), (9.94, "9.9"), (9.96, "10"), (12.6, "13"), (432000.4, "432000"), (-1, "0")),
    ],
)
def test_delays_have_two_digits(seconds: float, text: str) -> None:
    assert log._short(seconds) == text


@pytest.mark.parametrize("bad", ["a\r\nb", "\x1b[2J", "\0", "\x7f", "\u2028", "\x85", "\ud800", "a\tb"])
def test_control_characters_never_reach_the_log(bad: str, tmp_path: Path) -> None:
    def hostile() -> None:
        log.connect(f"u[{bad}]")
        log.accepted("ID", f"u[{bad}]", bad, bad, bad)
        outcome: Outcome = Failed("5.0.0", bad)
        log.delivery(MESSAGE, bad, ATTEMPT, outcome, ARRIVAL)
        log.panic(bad, ValueError(bad))

    for form in ("postfix", "json"):
        path = tmp_path / f"hostile.{form}"
        log.setup(str(path), form, "smtpd")
        hostile()
        data = path.read_bytes()
        assert data.count(b"\n") == 5
        assert all(line.decode().isprintable() for line in data.splitlines())


@given(st.text(max_size=3000), st.text(max_size=3000), st.booleans())
def test_any_text_makes_one_short_line(text: str, field: str, as_json: bool) -> None:
    # Invariant: one line of printable characters below 4,096 octets; in JSON, an object with all of the head.
    line = Formatter(json=as_json, dated=True).format(Line(logging.INFO, "smtp", 1, "ID", text, {"field": field}))
    assert len(line) + 8 <= log_sinks.MAX_LINE
    assert line.decode().isprintable()
    if as_json:
        assert json.loads(line).keys() >= {"time", "program", "pid", "level", "queue_id", "message"}


def test_clean() -> None:
    assert clean("Grüße 你好 a\nb") == "Grüße 你好 a?b"


def test_stamp() -> None:
    at = time.mktime((2025, 11, 4, 2, 43, 6, 0, 0, -1))
    assert stamp(int(at)) == "Nov  4 02:43:06"


def test_panic_says_where(lines: Callable[[], list[str]]) -> None:
    try:
        int("x")
    except ValueError as error:
        log.panic("cannot count", error, "ID")
    assert re.fullmatch(
        r"mtad/master: ID: panic: cannot count: ValueError: invalid .*'x' \[test_panic_says_where test_log\.py:\d+\]",
        lines()[0],
    )


def test_what_others_log_comes_out_too(lines: Callable[[], list[str]]) -> None:
    log.become("smtp")
    logging.getLogger("dns.query").warning("odd\nanswer %d", 5)
    logging.getLogger("dns.query").info("not wanted")
    assert lines() == ["mtad/smtp: warning: dns.query: odd?answer 5"]


def test_journal_and_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    log.setup("journal", "postfix", "qmgr")
    log.removed("ID")
    log.warning("odd")
    log.panic("bug")
    head = f"mtad/qmgr[{os.getpid()}]: "
    assert capfd.readouterr().err.splitlines() == [
        f"<6>{head}ID: removed",
        f"<4>{head}warning: odd",
        f"<2>{head}panic: bug",
    ]
    log.setup("stderr", "postfix", "qmgr")
    log.removed("ID")
    assert capfd.readouterr().err.endswith(f" {head}ID: removed\n")


def test_syslog(tmp_path: Path) -> None:
    place = str(tmp_path / "log.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(place)
        server.settimeout(5)
        sink = SyslogSink(Formatter(json=False, dated=False), place)
        line = sink.formatter.format(Line(logging.WARNING, "smtp", 7, "ID", "warning: é", {}))
        sink.write(logging.WARNING, line)
        # Facility mail is 2, severity warning 4: 2 * 8 + 4.
        assert server.recv(1000).rstrip(b"\0") == "<20>mtad/smtp[7]: ID: warning: é".encode()
    sink.write(logging.WARNING, b"nobody hears this, and nobody fails")
    sink.close()


def test_a_syslog_that_is_not_there_is_told_at_setup(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        SyslogSink(Formatter(json=False, dated=False), str(tmp_path / "log.sock"))


def test_a_rotated_file_is_followed(tmp_path: Path) -> None:
    path, old = tmp_path / "log", tmp_path / "log.1"
    sink = FileSink(str(path), Formatter(json=False, dated=False))
    sink.write(logging.INFO, b"one")
    path.rename(old)
    sink.write(logging.INFO, b"two")
    sink._checked -= 1.0
    sink.write(logging.INFO, b"three")
    path.unlink()
    path.write_text("")
    sink._checked -= 1.0
    sink.write(logging.INFO, b"four")
    sink.close()
    assert old.read_text() == "one\ntwo\n"
    assert path.read_text() == "four\n"


def test_a_file_that_cannot_be_opened_is_told_at_setup_and_leaves_the_log_as_it_was(
    tmp_path: Path, lines: Callable[[], list[str]]
) -> None:
    with pytest.raises(IsADirectoryError):
        log.setup(str(tmp_path), "postfix", "smtp")
    log.info("still here")
    assert lines() == ["mtad/master: still here"]


def test_a_full_disk_and_a_closed_pipe_do_no_harm() -> None:
    sink = FileSink("/dev/full", Formatter(json=False, dated=False))
    sink.write(logging.INFO, b"x")
    sink.close()
    reading, writing = os.pipe()
    os.close(reading)
    DescriptorSink(writing, Formatter(json=False, dated=False), priorities=True).write(logging.INFO, b"x")
    os.close(writing)


def _write_many(path: str, letter: str) -> None:
    log.become("smtp")
    for _ in range(300):
        log.info(letter * 1500)


def test_several_processes_write_whole_lines_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log.setup(str(path), "postfix", "master")
    context = get_context("fork")
    children = [context.Process(target=_write_many, args=(str(path), letter)) for letter in "abc"]
    for child in children:
        child.start()
    _write_many(str(path), "d")
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    texts = [re.fullmatch(r".* mtad/smtp\[(\d+)\]: (a+|b+|c+|d+)", line) for line in path.read_text().splitlines()]
    assert len(texts) == 1200
    assert all(match is not None and len(match[2]) == 1500 for match in texts)
    assert len({match[1] for match in texts if match is not None}) == 4, "each child has its own process id"


def test_two_lines_in_one_piece_or_two(tmp_path: Path) -> None:
    """What a pipe would not take at once is written line by line, so that no other line can come in between."""
    reading, writing = os.pipe()
    sink = DescriptorSink(writing, Formatter(json=False, dated=False), priorities=True)
    sink.write(logging.INFO, b"one", b"two")
    assert os.read(reading, 100) == b"<6>one\n<6>two\n"
    sink.write(logging.INFO, b"x" * 3000, b"y" * 3000)
    assert os.read(reading, 10_000) == b"<6>" + b"x" * 3000 + b"\n<6>" + b"y" * 3000 + b"\n"
    os.close(reading)
    os.close(writing)


def _in_time(act: Callable[[], None]) -> float:
    begin = time.monotonic()
    act()
    return time.monotonic() - begin


def test_a_pipe_that_nobody_reads_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that stalls must not stop the mail."""
    monkeypatch.setattr(log_sinks, "_STALLED", 0.5)
    reading, writing = os.pipe()
    sink = DescriptorSink(writing, Formatter(json=False, dated=False), priorities=False)
    took = _in_time(lambda: sink.write(logging.INFO, *[b"x" * 1000] * 1000))
    assert 0.4 < took < 10
    assert _in_time(lambda: sink.write(logging.INFO, b"dropped")) < 0.3
    while len(os.read(reading, 1 << 20)) == 1 << 16:
        pass
    sink.write(logging.INFO, b"heard")
    os.set_blocking(reading, False)
    assert os.read(reading, 1 << 20).endswith(b"heard\n")
    os.close(reading)
    os.close(writing)


def test_a_syslog_that_stops_reading_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_sinks, "_STALLED", 0.5)
    place = str(tmp_path / "log.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(place)
        sink = SyslogSink(Formatter(json=False, dated=False), place)
        took = _in_time(lambda: sink.write(logging.INFO, *[b"x" * 1000] * 1000))
        assert 0.4 < took < 10
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # noqa: PT012  # until nothing is left
            while True:
                server.recv(2000)
        sink.write(logging.INFO, b"heard")
        assert b"heard" in server.recv(2000)
        sink.close()
