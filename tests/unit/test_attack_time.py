"""Nothing that a client sends costs more than in proportion to its length (S-PA7), and no answer betrays by its time who
has a login (S-PA13).

No time is judged by itself, for machines differ and are busy: what is n times as long may take so many times as long, in
the same run and in processor time. What is quadratic takes sixteen times as long for four times the length.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from mtad import dsn
from mtad.config import Limits, Size
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Failed
from mtad.passwords import Passwords, change_password, make_keys
from mtad.smtp.downgrade import convert
from mtad.smtp.mime import TooDeep
from mtad.smtp.outgoing import survey
from mtad.throttle import Throttle
from tests.dialogue_engine import Engine, MemoryLogins
from tests.unit.test_session_auth import STRANGER, WRONG, b64

#: Four times the length may take so many times as long.
MOST: Final = 9.0
#: Seconds below which a time says nothing: a collection of garbage, a page fault.
NOISE: Final = 0.01


def nested(depth: int) -> bytes:
    parts = [b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (level, level) for level in range(depth)]
    return b"MIME-Version: 1.0\r\n" + b"".join(parts) + b"\r\n\xe4\r\n"


#: Makers of messages that are about as many KiB long as they are told, each ending in an octet that must be encoded.
SHAPES: Final[dict[str, Callable[[int], bytes]]] = {
    "header lines": lambda n: b"X-Header: y z\r\n" * (66 * n) + b"\r\n\xe4\r\n",
    "names only": lambda n: b"X:\r\n" * (205 * n) + b"\r\n\xe4\r\n",
    "one line": lambda n: b"Subject: " + b"x" * (1024 * n) + b"\r\n\r\n\xe4\r\n",
    "one line of blanks": lambda n: b"Subject:" + b" " * (1024 * n) + b"\r\n\r\n\xe4\r\n",
    "continuations": lambda n: b"Subject: x\r\n" + b" y\r\n" * (205 * n) + b"\r\n\xe4\r\n",
    "empty continuations": lambda n: b"Subject: x\r\n" + b" \r\n" * (256 * n) + b"\r\n\xe4\r\n",
    "recipients": lambda n: b"To: a@b.test" + b",\r\n user@host.test" * (51 * n) + b"\r\n\r\n\xe4\r\n",
    "authors": lambda n: b"From: a@b.test" + b",\r\n user@host.test" * (51 * n) + b"\r\n\r\n\xe4\r\n",
    "author in comments": lambda n: b"From: " + b"(a " * (170 * n) + b"(x) " * (90 * n) + b"a@b.test\r\n\r\n\xe4\r\n",
    "author in quotes": lambda n: b'From: "' + b'\\" ' * (340 * n) + b"a@b.test\r\n\r\n\xe4\r\n",
    "received": lambda n: b"Received: from a by b; c\r\n" * (40 * n) + b"\r\n\xe4\r\n",
    "message-id": lambda n: b"Message-ID:\r\n" * (40 * n) + b"\r\n" + b"Message-ID: <a@b>\r\n" * (20 * n) + b"\xe4\r\n",
    "message-id folded": lambda n: b"Message-ID:\r\n" + b" <\r\n" * (205 * n) + b"\r\n\xe4\r\n",
    "nesting": lambda n: nested(18 * n),
    "parameters": lambda n: b"Content-Type: text/plain" + b"; a=b" * (205 * n) + b"\r\n\r\n\xe4\r\n",
    "boundaries": lambda n: b"Content-Type: multipart/mixed" + b';boundary="' * (93 * n) + b"\r\n\r\n--\r\n\xe4\r\n",
    "parts": lambda n: b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\nx\xe4\r\n" * (85 * n),
    "near boundaries": lambda n: (
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--bb\r\n" * (170 * n) + b"\xe4\r\n"
    ),
    "comments": lambda n: b"Content-Transfer-Encoding: " + b"(" * (512 * n) + b")" * (512 * n) + b"\r\n\r\n\xe4\r\n",
    "dots": lambda n: b"\r\n" + b"..\r\n" * (256 * n) + b"\xe4\r\n",
    "no line": lambda n: b"\r\n" + b"\xe4" * (1024 * n) + b"\r\n",
}


def cpu(work: Callable[[bytes], object], content: bytes) -> float:
    """Processor time; the shortest of three, which has least of what else happened."""

    def once() -> float:
        start = time.process_time()
        work(content)
        return time.process_time() - start

    return min(once() for _ in range(3))


def assert_linear(work: Callable[[bytes], object], shape: Callable[[int], bytes], size: int) -> None:
    short, long = cpu(work, shape(size)), cpu(work, shape(4 * size))
    assert long < MOST * max(short, NOISE), f"{long:.3f} s for four times of what takes {short:.3f} s"


def pieces(content: bytes, size: int) -> Iterator[bytes]:
    return (content[first : first + size] for first in range(0, len(content), size))


def receive(service: str, size: int) -> Callable[[bytes], object]:
    """Take a message in pieces of this many octets; on submission with a login, whose header is looked at."""

    def work(content: bytes) -> None:
        site = {"logins": MemoryLogins(), "tls": "implicit"} if service == "submission" else {}
        limits = Limits(message_size=Size(1 << 26))
        engine = Engine(service, limits=limits, cut=lambda data: pieces(data, size), **site)  # type: ignore[arg-type]
        engine.say("EHLO client.test")
        if site:
            engine.dialogue.session.login = "alice"
        engine.say("MAIL FROM:<alice@example.org>", "RCPT TO:<bob@example.org>", "DATA")
        # the entry in memory copies all of it at each write, which a file does not
        engine.spool.entries[-1].write = lambda _: None  # type: ignore[method-assign, assignment]
        engine.send(content.replace(b"\r\n.", b"\r\n..") + b".\r\n")
        assert engine.transcript.rpartition(b"\r\n")[0].rpartition(b"\r\n")[2][:3] in {b"250", b"550", b"552", b"554"}

    return work


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("service", ["mx", "submission"])
def test_s_pa7_to_receive_a_message(service: str, shape: Callable[[int], bytes]) -> None:
    assert_linear(receive(service, 65536), shape, 250)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("service", ["mx", "submission"])
def test_s_pa7_to_receive_a_message_in_small_pieces(service: str, shape: Callable[[int], bytes]) -> None:
    assert_linear(receive(service, 16), shape, 60)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_s_pa7_to_make_a_message_fit_for_a_next_hop(shape: Callable[[int], bytes]) -> None:
    def work(content: bytes) -> None:
        survey(pieces(content, 65536))
        try:
            for _ in convert(lambda: pieces(content, 65536), eight_bit=False):
                pass
        except TooDeep:
            pass  # and refused

    assert_linear(work, shape, 30)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_s_pa7_to_report_on_a_message(shape: Callable[[int], bytes]) -> None:
    envelope = Envelope("ID", 0.0, "a@b.test", (Recipient("c@d.test"),))
    failures = [(Recipient("c@d.test"), Failed("5.1.1", "no"))]

    def work(content: bytes) -> None:
        for full in (False, True):
            dsn.report(envelope, failures, content, hostname="mx.test", now=0.0, report_id="R", full=full)

    assert_linear(work, shape, 60)


def test_s_pa13_a_login_that_there_is_not_takes_as_long_as_a_wrong_password(tmp_path: Path) -> None:
    """The same words, the same processor time within 10 ms, the same pause before the reply, also when it grows."""
    change_password(str(tmp_path / "passwords"), "alice", make_keys("open sesame"))
    passwords = Passwords.load(str(tmp_path / "passwords"))
    lines = {"there": WRONG, "not": b64("\0nobody\0wrong")}
    seconds: dict[str, list[float]] = {"there": [], "not": []}
    said: dict[str, list[tuple[str, float]]] = {"there": [], "not": []}
    throttles = {name: Throttle(b"k" * 16, 1000, lambda: 1e9) for name in lines}
    for _ in range(12):
        for name, response in lines.items():
            engine = Engine("submission", client=STRANGER, logins=passwords, tls="implicit", guard=throttles[name])
            engine.say("EHLO c")
            start = time.thread_time()
            [answer] = engine.say(f"AUTH PLAIN {response}")
            seconds[name].append(time.thread_time() - start)
            said[name].append((answer, engine.dialogue.pause))
    assert said["there"] == said["not"]
    assert said["there"][0][0].startswith("535 5.7.8 ")
    assert [pause for _, pause in said["not"][:4]] == [1.0, 2.0, 4.0, 8.0]
    assert abs(statistics.median(seconds["there"]) - statistics.median(seconds["not"])) < 0.010
