"""ATTACKS section 1, outbound, C-SM1 to C-SM24: whatever is in our spool, nobody can read two messages in what we send.

Each sequence gets into the spool on each of the ways that there are: from a trusted client, by DATA and by BDAT, as binary,
in a report that quotes an attacker, and in a queue file made by hand. From there it goes to three exchangers: one that
takes 8-bit text, one that takes 7-bit text only, and one that takes BDAT. What counts is what they have read: one message
for each, the octets themselves looked at by a strict reader and by a lenient one.
"""

from __future__ import annotations

import email
import email.message
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Final, Literal

import pytest

from mtad.cli.mtad_flush import flush
from mtad.envelope import Envelope, Recipient
from mtad.spool.queues import Spool
from tests.client import Client
from tests.e2e.world import World
from tests.peers.mx import Mx, Say, Script, Transaction
from tests.site import await_value
from tests.smuggling import BARE, HIDDEN, LENIENT, SEQUENCES, SMUGGLER, every_client_row, stuffed, unstuffed, with_crlf

BOTH: Final = ["127.0.0.1:0", "[::1]:0"]
SENDER: Final = "a@sender.test"
#: A recipient whom every exchanger refuses, in words that are an attack themselves.
REFUSED: Final = "refused"
REFUSAL: Final = ["550-5.1.1 no", "550-.", "550-MAIL FROM:<smuggled@a>", "550 ."]
KINDS: Final[dict[str, tuple[str, ...]]] = {
    "eight": ("PIPELINING", "8BITMIME"),
    "seven": (),
    "chunks": ("PIPELINING", "8BITMIME", "CHUNKING"),
}

Ret = Literal["full", "hdrs"]


class Sinks:
    """A site, and exchangers of three kinds that are read over the shoulder."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.site = world.site
        self.sinks: dict[str, Mx] = {}
        for kind, extensions in KINDS.items():
            mx = world.mx()
            domain = world.domain(mx, name=f"{kind}.test")
            mx.script = Script(extensions=extensions, rcpt={f"{REFUSED}@{domain}": Say(REFUSAL)})
            self.sinks[kind] = mx
        self._reads = dict.fromkeys(KINDS, 0)
        self._messages = dict.fromkeys(KINDS, 0)

    def recipients(self, user: str) -> list[str]:
        return [f"{user}@{kind}.test" for kind in KINDS]

    def place(self, content: bytes, *recipients: str, sender: str = SENDER, ret: Ret = "full") -> None:
        """Put a queue file into the spool by hand, and have it tried: octets that no client of ours can have sent."""
        elsewhere = Spool(str(self.site.root / "elsewhere"), create=True)
        try:
            queue_id = elsewhere.ids.new()
            entry = elsewhere.enter(Envelope(queue_id, time.time(), sender, tuple(map(Recipient, recipients)), ret=ret))
            entry.write(content)
            entry.commit()
        finally:
            elsewhere.close()
        os.rename(self.site.root / "elsewhere" / "incoming" / queue_id, self.site.spool_path / "deferred" / queue_id)
        spool = self.site.spool()
        assert flush(spool, [queue_id]).told
        spool.close()

    def say(self, *steps: bytes | str, mail: str = "", recipients: list[str]) -> None:
        """A transaction of a trusted client; each step must be taken."""
        with Client(self.site.address("relay")) as client:
            client.begin("EHLO client.test", f"MAIL FROM:<{SENDER}>{mail}", *(f"RCPT TO:<{one}>" for one in recipients))
            for step in steps:
                client.send(step if isinstance(step, bytes) else step.encode() + b"\r\n")
                answer = client.reply()
                assert answer[:1] in {"2", "3"}, answer

    def await_each(self, user: str) -> dict[str, Transaction]:
        """Wait until each sink has the message for a user: one, and nothing of it is left over; by kind."""
        found = {}
        for kind, mx in self.sinks.items():
            here = f"{user}@{kind}.test"
            mx.wait(lambda mx=mx, here=here: any(here in one.recipients and one.reply for one in mx.transactions))  # type: ignore[misc]
            (found[kind],) = [one for one in mx.transactions if here in one.recipients]
            assert bool(found[kind].chunks) is (kind == "chunks")
        return found

    def await_empty(self) -> None:
        """Wait until all that was taken is gone, and look at every octet that was sent since the last time."""
        live = ("incoming", "active", "deferred")
        await_value(lambda: not any(self.site.files(queue) for queue in live), what="the queue is empty")
        for kind, mx in self.sinks.items():
            reads, messages = mx.reads[self._reads[kind] :], len(mx.messages) - self._messages[kind]
            self._reads[kind] += len(reads)
            self._messages[kind] += messages
            streams: dict[int, bytearray] = {}
            for number, data in reads:
                streams.setdefault(number, bytearray()).extend(data)
            found = [message for stream in streams.values() for message in contents(bytes(stream))]
            assert len(found) == messages, kind
            for message in found:
                check(message, chunks=kind == "chunks")
            assert mx.bare == []
            assert SMUGGLER not in {one.sender for one in mx.transactions}


def contents(stream: bytes) -> Iterator[bytes]:
    """What a strict server reads as content in all that came over one connection, as it came over the wire."""
    chunked = b""
    taken = False
    assert BARE.search(stream) is None
    while stream:
        line, _, stream = stream.partition(b"\r\n")
        if line.startswith(b"BDAT "):
            size = int(line.split()[1])
            chunked, stream = chunked + stream[:size], stream[size:]
            if line.endswith(b" LAST"):
                yield from [chunked] if taken else []
                chunked = b""
        elif line == b"DATA" and taken:  # else there is no 354, and nothing follows
            end = (b"\r\n" + stream).index(b"\r\n.\r\n")
            yield stream[: end + 3]
            stream = stream[end + 3 :]
        else:
            assert re.fullmatch(rb"(?:EHLO|MAIL FROM:|RCPT TO:|RSET|QUIT|DATA)[ -~]*", line), line
            assert b"smuggled" not in line
            taken = line.startswith(b"RCPT TO:") and REFUSED.encode() not in line


def check(sent: bytes, *, chunks: bool) -> None:
    """The octets of one message: no line end but CRLF, dots doubled, no end but the last for the most lenient reader."""
    assert BARE.search(sent) is None
    assert b"\0" not in sent
    if not chunks:
        assert not [line for line in sent.split(b"\r\n")[:-2] if line.startswith(b".") and not line.startswith(b"..")]
        assert [match.end() for match in LENIENT.finditer(b"\r\n" + sent)] == [len(sent) + 2]


@pytest.fixture(scope="module")
def sinks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sinks]:
    listeners = [
        {"name": "inbound", "service": "mx", "address": BOTH},
        {"name": "relay", "service": "relay", "address": BOTH, "bare_line_ends": "normalize"},
    ]
    with World(tmp_path_factory.mktemp("sinks"), listeners=listeners, delivery={"tls": "none"}) as world:
        yield Sinks(world)


HEADER: Final = b"From: a@sender.test\r\nSubject: x\r\n"


def body(row: int) -> bytes:
    """A body with the sequence, the hidden message behind it, and the sequence again as its last octets."""
    return b"X" + SEQUENCES[row] + HIDDEN + b"X" + SEQUENCES[row]


def payload(message: Transaction) -> bytes:
    """The body of a message as its reader gets it."""
    found = email.message_from_bytes(message.content).get_payload(decode=True)
    assert isinstance(found, bytes)
    return found


def by_data(sinks: Sinks, row: int, user: str) -> None:
    sinks.say("DATA", stuffed(HEADER + b"\r\n" + body(row)), recipients=sinks.recipients(user))


def by_bdat(sinks: Sinks, row: int, user: str) -> None:
    content = HEADER + b"\r\n" + body(row)
    middle = len(content) - len(body(row)) + 2
    sinks.say(
        b"BDAT %d\r\n%s" % (middle, content[:middle]),
        b"BDAT %d LAST\r\n%s" % (len(content) - middle, content[middle:]),
        recipients=sinks.recipients(user),
    )


def by_hand(sinks: Sinks, row: int, user: str) -> None:
    sinks.place(HEADER + b"\r\n" + body(row), *sinks.recipients(user))


WAYS: Final[dict[str, Callable[[Sinks, int, str], None]]] = {"data": by_data, "bdat": by_bdat, "hand": by_hand}


@every_client_row
@pytest.mark.parametrize("way", WAYS)
def test_c_sm1_to_24_a_body_from(sinks: Sinks, way: str, row: int) -> None:
    """A trusted client whose line ends are mended, by DATA or in chunks; or nobody: the file lies in the spool."""
    user = f"{way}{row}"
    WAYS[way](sinks, row, user)
    for message in sinks.await_each(user).values():
        assert message.sender == SENDER
        # by DATA the content has ended with CRLF, which is not the end of a line that had one of its own
        assert payload(message) == with_crlf(unstuffed(stuffed(body(row))) if way == "data" else body(row))
    sinks.await_empty()


@every_client_row
def test_c_sm1_to_24_binary(sinks: Sinks, row: int) -> None:
    """BODY=BINARYMIME is kept as it is, to the octet, and no exchanger here takes that: it goes out in other clothes."""
    user = f"binary{row}"
    kind = b"MIME-Version: 1.0\r\nContent-Type: application/octet-stream\r\nContent-Transfer-Encoding: binary\r\n"
    content = HEADER + kind + b"\r\n" + body(row)
    sinks.say(b"BDAT %d LAST\r\n%s" % (len(content), content), mail=" BODY=BINARYMIME", recipients=sinks.recipients(user))
    for message in sinks.await_each(user).values():
        assert payload(message) == body(row)
    sinks.await_empty()


@every_client_row
@pytest.mark.parametrize("ret", ["full", "hdrs"])
def test_c_sm1_to_24_a_report_that_quotes_it(sinks: Sinks, row: int, ret: Ret) -> None:
    """In the header that goes back, in the whole message that goes back, and behind a refusal with dots of its own."""
    user = f"report{ret}{row}"
    content = HEADER + b"X-Evil: X" + SEQUENCES[row] + HIDDEN + b"\r\n" + body(row)
    for kind, sender in zip(KINDS, sinks.recipients(user), strict=True):
        sinks.place(content, f"{REFUSED}@{kind}.test", sender=sender, ret=ret)
    for kind, message in sinks.await_each(user).items():
        assert message.sender == ""
        report = email.message_from_bytes(message.content)
        assert report.get_content_type() == "multipart/report"
        parts = report.get_payload()
        assert isinstance(parts, list)
        status, original = parts[1], parts[2]
        assert isinstance(original, email.message.Message)
        assert f"Final-Recipient: rfc822; {REFUSED}@{kind}.test" in str(status)
        assert "smuggled@a" in str(status)  # the refusal
        assert original.get_content_type() == ("message/rfc822" if ret == "full" else "text/rfc822-headers")
        assert b"smuggled" in message.content.partition(b"Undelivered message")[2]
    sinks.await_empty()


@every_client_row
def test_c_sm1_to_24_over_each_boundary_of_a_buffer(sinks: Sinks, row: int) -> None:
    """From three octets before each boundary, or the length of the sequence, to three behind; the last line has no end."""
    sequence = SEQUENCES[row]
    reach = max(3, len(sequence))
    user = f"boundary{row}"
    expected = {}
    for shift in range(-reach, 4):
        text = bytearray(HEADER + b"\r\n" + (b"y" * 76 + b"\r\n") * 850)
        for boundary in (4096, 8192, 65536):
            text[boundary + shift : boundary + shift + len(sequence)] = sequence
        content = bytes(text[: 65536 + shift + len(sequence)]) + HIDDEN + b"the last line"
        name = f"{user}-{shift + reach}"
        sinks.place(content, *sinks.recipients(name))
        expected[name] = with_crlf(content.partition(b"\r\n\r\n")[2])
    for name, text_ in expected.items():
        for message in sinks.await_each(name).values():
            assert payload(message) == text_
    sinks.await_empty()


@pytest.mark.parametrize("last", [b"the last line", b".", b"\r", b"x\r", b"\n", b"..", b".\r", b".\n"], ids=repr)
def test_c_sm1_to_24_a_last_line_without_crlf(sinks: Sinks, last: bytes) -> None:
    user = f"last-{last.hex()}"
    sinks.place(HEADER + b"\r\nX\r\n" + last, *sinks.recipients(user))
    for message in sinks.await_each(user).values():
        assert payload(message) == b"X\r\n" + with_crlf(last)
    sinks.await_empty()


def test_nothing_is_left(sinks: Sinks) -> None:
    assert sinks.site.files("corrupt") == []
    assert "panic" not in sinks.site.log()
