"""A real Postfix as our next hop: over TLS and in clear text, by BDAT and by DATA, converted where it lacks something."""

from __future__ import annotations

import email
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mtad.envelope import Recipient
from mtad.outcome import Delivered, Failed, Outcome
from tests.peers.outbound import Site, only
from tests.peers.postfix import Postfix, needs_postfix
from tests.unit.tls_aid import authority, issue

pytestmark = needs_postfix

CA = authority()
TEXT = b"Received: from a by b; now\r\nSubject: x\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n"
BODY = ".dot\r\nh\u00e4\r\n..\r\n".encode()


class World:
    """A transport of ours in front of a Postfix."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._stack = stack
        self._pair = issue("next.test", by=CA).write(directory, "next")
        self._ca = CA.write(directory, "ca").certificate
        self.site = Site(stack)
        self.site.dns.set("next.test", {"A": "127.0.0.9"})

    def start(self, *discarded: str, **settings: object) -> Postfix:
        postfix = Postfix("127.0.0.9", certificate=self._pair, discarded=discarded)
        self._stack.enter_context(postfix)
        self.site.make(next_hop=f"[next.test]:{postfix.port}", ca_file=self._ca, **settings)
        return postfix

    def send(self, body: bytes, *recipients: str | Recipient, **envelope: object) -> dict[str, Outcome]:
        return self.site.send(*recipients, body=TEXT + body, **envelope)  # type: ignore[arg-type]  # more fields


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack, tmp_path)


def payload(message: bytes) -> bytes:
    found = email.message_from_bytes(message).get_payload(decode=True)
    assert isinstance(found, bytes)
    return found


def test_over_verified_tls_by_bdat(world: World) -> None:
    postfix = world.start(tls="required")
    outcome = only(world.send(BODY))
    assert isinstance(outcome, Delivered)
    assert outcome.dsn
    assert world.site.attempts[0].tls.startswith("TLSv1.3")
    (message,) = postfix.messages(1)
    assert payload(message) == BODY.replace(b"\r\n", b"\n")
    assert b"using TLSv1.3" in message
    for number in range(3):
        assert isinstance(only(world.send(b"%d\r\n" % number)), Delivered)
    postfix.messages(4)
    world.site.transport.close()
    postfix.await_log("ehlo=2 starttls=1 mail=4 rcpt=4 bdat=8 quit=1")


@pytest.mark.parametrize(
    "discarded",
    [("chunking",), ("starttls",), ("chunking", "pipelining", "dsn"), ("8bitmime", "smtputf8"), ("8bitmime", "chunking")],
)
def test_without_this_and_that(world: World, discarded: tuple[str, ...]) -> None:
    postfix = world.start(*discarded)
    outcomes = world.send(BODY, "b@x.test", "c@x.test")
    assert all(isinstance(outcome, Delivered) for outcome in outcomes.values())
    assert all(one.dsn is ("dsn" not in discarded) for one in outcomes.values() if isinstance(one, Delivered))
    for message in postfix.messages(2):
        assert payload(message) == BODY.replace(b"\r\n", b"\n")
        assert message.isascii() is ("8bitmime" in discarded)
    assert bool(world.site.attempts[0].tls) is ("starttls" not in discarded)


def test_large_messages_and_long_lines(world: World) -> None:
    postfix = world.start()
    text = b"".join(b"%d %b\r\n" % (number, b"." * (number % 200)) for number in range(20_000)) + b"z" * 3000 + b"\r\n"
    assert isinstance(only(world.send(text)), Delivered)
    (message,) = postfix.messages(1)
    assert payload(message) == text.replace(b"\r\n", b"\n")


def test_refusals_and_wishes(world: World) -> None:
    postfix = world.start()
    names: list[str | Recipient] = [
        Recipient("b@x.test", ("never",), "rfc822;old+x@y.test"),
        "c@elsewhere.test",
        "\u00fc@x.test",
    ]
    outcomes = world.send(BODY, *names, envid="Q+1", ret="hdrs")
    assert isinstance(outcomes["c@elsewhere.test"], Failed)
    assert isinstance(outcomes["\u00fc@x.test"], Delivered)
    found = postfix.messages(2)
    assert sorted(b"X-Original-To: b@x.test" in one for one in found) == [False, True]
