"""Mail that nobody asked for: Q-1 to Q-4 of the list of attacks, over real processes.

The count is always of messages in mailboxes, at exchangers and in the queue, and of the envelopes there.
"""

from __future__ import annotations

import email
import email.policy
import re
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.world import MESSAGE, Report, World, await_gone
from tests.peers.mx import Raw, Say, Script
from tests.site import Site

FORGED = "victim@elsewhere.test"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One site; each test has a mailbox of its own."""
    users = ("root", "alice", "looped", "many", "large", "eight", "boundary", "fields", "noreply")
    with World(tmp_path_factory.mktemp("world"), users=users) as world:
        yield world


# -- Q-1 --------------------------------------------------------------------------------------------------------------


def test_q1_what_is_refused_in_the_session_is_nobody_elses_business(tmp_path: Path) -> None:
    """Unknown recipients at RCPT, content at the dot: the client is told, and no report goes to whom it named."""
    with Site(tmp_path, limits={"message_size": "64KiB"}) as site:
        contents = [
            b"Subject: bare\nline\r\n\r\n.\r\n",
            b"Subject: x\r\n\r\n" + (b"x" * 70 + b"\r\n") * 2000 + b".\r\n",
            b"Received: by x\r\n" * 60 + b"\r\n.\r\n",
        ]
        for content in contents:
            with site.client() as client:
                client.ehlo()
                client.mail(FORGED)
                assert client.rcpt("nobody@example.org")[0] == 550
                assert client.rcpt("x@far.test")[0] == 550
                assert client.rcpt("alice@example.org")[0] == 250
                client.putcmd("DATA")
                assert client.getreply()[0] == 354
                client.send(content)
                code, text = client.getreply()
                assert 500 <= code < 560, text
        site.send(FORGED, "alice@example.org", MESSAGE)
        assert len(site.await_mail("alice")) == 1
        site.await_empty_queue()
        assert len(site.mailbox("alice")) == 1
        assert site.mailbox("root") == []
        assert "notification" not in site.log()


def test_q1_a_report_about_a_large_message_is_small(world: World) -> None:
    """What a stranger has us send to a forged sender is less than what he sent."""
    domain = world.domain(world.mx(Script(rcpt=Say("550 5.1.1 no"))))
    header = b"From: a@b.test\r\n" + b"".join(b"X-%d: %s\r\n" % (number, b"y" * 900) for number in range(200))
    world.send(f"b@{domain}", sender="large@example.org", content=header + b"\r\n" + (b"secret" * 12 + b"\r\n") * 20_000)
    [stored] = world.site.await_mail("large")
    assert len(stored) < 60_000
    assert b"secretsecret" not in stored
    assert Report(stored).failed == {f"b@{domain}": "5.1.1"}


# -- Q-2 --------------------------------------------------------------------------------------------------------------


class Forward:
    """A port at an address of its own behind which there is another one: a next hop that is ourselves, unrecognised."""

    def __init__(self, address: str, port: int, target: tuple[str, int]) -> None:
        self._listener = socket.create_server((address, port))
        self._target = target
        self.connections = 0
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Forward:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        ends: dict[socket.socket, socket.socket] = {}
        while True:
            for ready in select.select([self._listener, *ends], [], [])[0]:
                try:
                    if ready is self._listener:
                        here, there = self._listener.accept()[0], socket.create_connection(self._target)
                        ends |= {here: there, there: here}
                        self.connections += 1
                    elif ready in ends:
                        data = ready.recv(65536)
                        if not data:
                            raise ConnectionError
                        ends[ready].sendall(data)
                except OSError:
                    other = ends.pop(ready, None)
                    if other is not None:
                        ends.pop(other, None)
                        other.close()
                        ready.close()
                    if ready is self._listener:
                        for end in ends:
                            end.close()
                        return


def test_q2_a_circle_that_nobody_sees_ends_with_one_report(world: World) -> None:
    """A domain whose exchanger leads back to us by an address that we do not know for ours: fifty rounds and one report."""
    address = world.address()
    domain = world.domain(address)
    with Forward(address, world.port, world.site.address("relay")) as forward:
        queue_id = world.send(f"b@{domain}", sender="looped@example.org")
        report = world.report("looped")
        assert report.failed == {f"b@{domain}": "5.4.6"}
        await_gone(world, queue_id)
        world.site.await_empty_queue()
    assert forward.connections >= 1
    assert len(world.site.mailbox("looped")) == 1
    rounds = world.site.log().count(f"to=<b@{domain}>")
    assert 50 <= rounds <= 52, "neither at once nor for ever"


def test_q2_mail_with_our_own_delivered_to_is_stored_once_and_goes_nowhere(world: World) -> None:
    """There are no aliases, forwards or programs here: what is in a mailbox stays there, whatever its header says."""
    before = len(world.site.mailbox("noreply"))
    content = (
        b"Delivered-To: noreply@example.org\r\n" * 3 + b"Precedence: bulk\r\nAuto-Submitted: auto-replied\r\n" + MESSAGE
    )
    for sender in ("", "noreply@example.org", "alice@example.org"):
        world.site.send(sender, "noreply@example.org", content)
    assert len(world.site.await_mail("noreply", before + 3)) == before + 3
    world.site.await_empty_queue()
    assert len(world.site.mailbox("noreply")) == before + 3
    assert world.site.mailbox("root") == []


def test_q2_addresses_that_expand_to_programs_or_files_are_nobody(world: World) -> None:
    with world.site.client() as client:
        client.ehlo()
        client.mail("a@sender.test")
        for name in ('"|/bin/sh"', '"/etc/passwd"', '":include:/etc/passwd"', "alice+tag", '"\\\\alice"'):
            code, _ = client.rcpt(f"{name}@example.org")
            assert code == 550, name


# -- Q-3 --------------------------------------------------------------------------------------------------------------


def test_q3_a_thousand_recipients_with_long_errors_are_one_bounded_report(world: World) -> None:
    lines = [f"550-5.1.1 {'x' * 480}", f"550 5.1.1 {'y' * 490}"]
    domain = world.domain(world.mx(Script(rcpt=Say(lines))))
    to = [f"u{number}@{domain}" for number in range(1000)]
    queue_id = world.send(*to, sender="many@example.org")
    report = world.report("many")
    await_gone(world, queue_id)
    assert list(report.failed) == to
    [stored] = world.site.mailbox("many")
    assert stored.stat().st_size < 400_000, "a megabyte of errors came in"


# -- Q-4 --------------------------------------------------------------------------------------------------------------


def read(stored: bytes) -> email.message.EmailMessage:
    message = email.message_from_bytes(stored, policy=email.policy.default)
    assert [part.defects for part in message.walk()] == [[] for _ in message.walk()]
    assert [part.get_content_type() for part in message.iter_parts()] == [
        "text/plain",
        "message/delivery-status",
        "text/rfc822-headers",
    ]
    return message


@pytest.mark.parametrize(
    ("user", "octets"),
    [
        ("fields", b"550 5.1.1 no\rBcc: victim@v.test\rStatus: 2.0.0\x00\x0bFinal-Recipient: rfc822; x\r\n"),
        ("eight", b"550 5.1.1 \xe2\x80\xa8\xc3\xa9\xff\xfe\x85\x9b2J ok\r\n"),
    ],
)
def test_q4_the_words_of_a_server_are_data(world: World, user: str, octets: bytes) -> None:
    """Bare carriage returns, NUL, what some take for the end of a line, octets that are no text at all."""
    domain = world.domain(world.mx(Script(rcpt=Raw(octets))))
    queue_id = world.send(f"b@{domain}", sender=f"{user}@example.org")
    [stored] = world.site.await_mail(user)
    await_gone(world, queue_id)
    assert re.fullmatch(rb"[\t\n -~]*", stored), "seven bits, and lines end where we end them"
    message = read(stored)
    assert message["Bcc"] is None
    report = Report(stored)
    assert report.failed == {f"b@{domain}": "5.1.1"}
    [block] = report.recipients
    assert block.keys() == ["Final-Recipient", "Action", "Status", "Remote-MTA", "Diagnostic-Code"]


def test_q4_a_header_and_a_reply_that_guess_the_boundary(world: World) -> None:
    """The boundary has the report's queue id, which a message that loops back could know; every guess gives another one."""
    ids = world.send("alice@example.org", sender="alice@example.org")
    guesses = [f"=_{number}_{ids[:6]}" for number in range(3)]
    domain = world.domain(world.mx(Script(rcpt=Say(f"550 5.1.1 --{guesses[0]}"))))
    ends = [b"--" + guess.encode() + b"--" for guess in guesses]
    header = (
        b"".join(b"X-%d: a\r\n %s\r\n" % pair for pair in enumerate(ends))
        + b"Content-Type: multipart/mixed; boundary=x\r\n"
    )
    queue_id = world.send(f"b@{domain}", sender="boundary@example.org", content=header + MESSAGE)
    [stored] = world.site.await_mail("boundary")
    await_gone(world, queue_id)
    message = read(stored)
    boundary = message.get_boundary()
    assert boundary
    assert stored.count(b"\n--" + boundary.encode()) == 4
    original = list(message.iter_parts())[2].get_content()
    assert all(end.decode() in original for end in ends), "and the header came back as it was"


def test_q4_a_message_in_eight_bits_comes_back_in_seven(world: World) -> None:
    """Through a next hop that takes nothing else: the original's header may hold any octet."""
    home = world.mx(Script(extensions=("SIZE", "ENHANCEDSTATUSCODES")))
    domain = world.domain(world.mx(Script(rcpt=Say("550 5.1.1 no"))))
    sender = f"a@{world.domain(home)}"
    world.send(f"b@{domain}", sender=sender, content=b"Subject: \xff\xc3\xa9\x80\r\nFrom: x@y.test\r\n\r\n\xff\r\n")
    [taken] = home.await_messages(1)
    assert taken.sender == ""
    assert taken.recipients == [sender]
    assert taken.content.isascii()
    assert not home.bare
    original = list(read(taken.content).iter_parts())[2]
    assert isinstance(original, email.message.EmailMessage)
    assert b"\xff\xc3\xa9\x80" in original.get_payload(decode=True)
