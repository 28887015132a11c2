"""A real Postfix as our next hop: over TLS and in clear text, by BDAT and by DATA, converted where it lacks something."""

from __future__ import annotations

import email
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mtad.envelope import Recipient
from mtad.outcome import Deferred, Delivered, Failed, Outcome
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

    def start(self, *discarded: str, level: str = "may", **settings: object) -> Postfix:
        postfix = Postfix("127.0.0.9", certificate=self._pair, tls=level, discarded=discarded)
        self._stack.enter_context(postfix)
        self.start_as("next.test", postfix, **settings)
        return postfix

    def start_as(self, name: str, postfix: Postfix, **settings: object) -> None:
        """Another transport, in front of the same Postfix under this name."""
        self.site.make(next_hop=f"[{name}]:{postfix.port}", **{"ca_file": self._ca} | settings)

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


def test_required_and_not_to_be_trusted(world: World, tmp_path: Path) -> None:
    """Whoever signed it, or for whom: a certificate that is not good gets nothing, not even in clear text."""
    postfix = world.start(tls="required")
    other = authority("Another CA").write(tmp_path, "other").certificate
    world.start_as("next.test", postfix, tls="required", ca_file=other)
    assert isinstance(only(world.send(BODY)), Deferred)
    world.site.dns.set("alias.test", {"A": "127.0.0.9"})
    world.start_as("alias.test", postfix, tls="required")
    assert isinstance(only(world.send(BODY)), Deferred)
    assert "MAIL" not in postfix.log()
    assert not postfix.messages(0)
    world.start_as("alias.test", postfix, tls="opportunistic")
    assert isinstance(only(world.send(BODY)), Delivered)
    assert b"using TLSv1.3" in postfix.messages(1)[0]


def test_a_postfix_that_wants_tls(world: World) -> None:
    """It says 530 to whoever does not say STARTTLS: opportunism is enough for it, clear text is not."""
    postfix = world.start(level="encrypt", tls="opportunistic")
    assert isinstance(only(world.send(BODY)), Delivered)
    assert b"using TLSv1.3" in postfix.messages(1)[0]
    world.start_as("next.test", postfix, tls="none")
    outcome = only(world.send(BODY))
    assert isinstance(outcome, Deferred | Failed)
    assert "Must issue a STARTTLS command first" in outcome.text
    assert len(postfix.messages(1)) == 1


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
