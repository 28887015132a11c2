"""The SMTP transport against scripted exchangers: what arrives, and which host is tried. One test for each promise."""

from __future__ import annotations

import errno
import io
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from mtad.delivery.transport import Interrupted
from mtad.outcome import Deferred, Delivered, Failed
from mtad.smtp.client import PIECE
from tests.peers.dns import SERVFAIL
from tests.peers.mx import CLOSE, HANG, RESET, Action, Raw, Say, Script
from tests.peers.outbound import ADDRESSES, BODY, SHORT, Site, only


@pytest.fixture
def site() -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack)


@pytest.mark.parametrize("address", ["127.0.0.5", "::1"])
@pytest.mark.parametrize("extensions", [("PIPELINING", "SIZE", "8BITMIME"), ()])
def test_a_message_arrives_whole(site: Site, address: str, extensions: tuple[str, ...]) -> None:
    mx = site.mx(address, Script(extensions=extensions, dot=Say("250 2.0.0 Ok: queued as 4711")))
    site.domain(address)
    before = time.time()
    outcome = only(site.send("b@x.test"))
    assert outcome == Delivered("2.0.0", "250 2.0.0 Ok: queued as 4711", "mx1.x.test", "250 2.0.0 Ok: queued as 4711")
    (message,) = mx.await_messages(1)
    assert (message.helo, message.sender, message.recipients) == ("me.test", "a@me.test", ["b@x.test"])
    assert message.content == BODY
    assert mx.bare == []
    (attempt,) = site.attempts
    shown = f"[{address}]:{site.port}" if ":" in address else f"{address}:{site.port}"
    assert (attempt.host, attempt.address, attempt.tls) == ("mx1.x.test", shown, "")
    assert before <= attempt.started <= time.time()
    assert attempt.connection > 0
    assert attempt.transmission > 0
    assert site.doubts == ["mx1.x.test"]


def test_mail_has_size_and_body_when_offered(site: Site) -> None:
    mx = site.mx("127.0.0.5", Script(extensions=("SIZE 1000", "8BITMIME")))
    site.domain("127.0.0.5")
    body = BODY + b"\xfc\r\n"
    site.send(sender="")
    assert mx.messages[0].mail == f"FROM:<> SIZE={len(BODY)}"
    site.send(sender="", body=body)
    assert mx.messages[1].mail == f"FROM:<> SIZE={len(body)} BODY=8BITMIME"


def test_helo_when_ehlo_is_refused(site: Site) -> None:
    mx = site.mx("127.0.0.5", Script(ehlo=Say("500 5.5.1 what?")))
    site.domain("127.0.0.5")
    assert isinstance(only(site.send()), Delivered)
    assert mx.verbs() == ["EHLO", "HELO", "MAIL", "RCPT", "DATA"]
    assert mx.messages[0].mail == "FROM:<a@me.test>"


def test_with_pipelining_a_message_takes_two_sends(site: Site) -> None:
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")
    site.send("b@x.test", "c@x.test")
    ehlo, envelope, content = (data for _, data in mx.reads)
    assert ehlo == b"EHLO me.test\r\n"
    assert envelope.count(b"\r\n") == 4
    assert content == BODY.replace(b"\r\n.", b"\r\n..") + b".\r\n"


def test_recipients_share_a_transaction_up_to_the_limit(site: Site) -> None:
    site.make(destination_recipients=50)
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")
    names = [f"r{number}@x.test" for number in range(120)]
    outcomes = site.send(*names)
    assert all(isinstance(outcome, Delivered) for outcome in outcomes.values())
    assert [len(message.recipients) for message in mx.messages] == [50, 50, 20]
    assert mx.connections == 1


def test_a_large_message_arrives_whole(site: Site) -> None:
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")
    body = b"".join(b".%d\r\n" % number for number in range(300_000))
    assert len(body) > 20 * PIECE
    site.send(body=body)
    assert mx.messages[0].content == body


def test_the_final_dot_waits_until_the_doubt_is_recorded(site: Site) -> None:
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")
    body = b"x" * 62 + b"\r\n"

    def look() -> None:
        mx.wait(lambda: mx.verbs()[-1:] == ["DATA"])
        received.append(b"".join(data for _, data in mx.reads))

    received: list[bytes] = []
    site.on_doubt = look
    site.send(body=body * 2048)
    assert b"\r\n.\r\n" not in received[0]
    assert len(mx.messages) == 1


def test_what_breaks_at_the_second_host_does_not_take_away_what_the_first_one_took(site: Site) -> None:
    site.mx("127.0.0.5", Script(rcpt={"c@x.test": Say("450 4.2.0 Later")}))
    site.mx("127.0.0.6")
    site.domain("127.0.0.5", "127.0.0.6")

    def refuse() -> None:
        if site.doubts[-1] == "mx2.x.test":
            raise OSError(errno.EIO, "Input/output error")

    site.on_doubt = refuse
    with pytest.raises(Interrupted) as broken:
        site.send("b@x.test", "c@x.test")
    assert isinstance(broken.value.fault, OSError)
    [attempt] = broken.value.attempts
    outcomes = dict(attempt.outcomes)
    assert isinstance(outcomes[0], Delivered)
    assert isinstance(outcomes[1], Deferred)


def test_no_room_for_what_waits_in_the_buffer_of_a_converted_message_is_said(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        """What is written is in a buffer, and there is no room for it."""

        def seek(self, *_: int) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            super().close()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda _size: Full())
    site.mx("127.0.0.5", Script(extensions=()))
    site.domain("127.0.0.5")
    outcome = only(site.send("b@x.test", body=BODY + b"\xfc\r\n"))
    assert outcome == Deferred("4.3.0", "no room to convert the message: No space left on device")


# --- which host ---------------------------------------------------------------------------------------------------------


def test_the_first_server_that_takes_the_message_ends_the_search(site: Site) -> None:
    first, second = site.mx("127.0.0.5"), site.mx("127.0.0.6")
    site.domain("127.0.0.5", "127.0.0.6")
    site.send()
    assert (len(first.messages), second.connections) == (1, 0)
    assert site.dns.count("mx2.x.test") == 0


def test_a_connection_that_is_refused_tries_the_next_host(site: Site) -> None:
    second = site.mx("127.0.0.6")
    site.domain("127.0.0.5", "127.0.0.6")
    assert isinstance(only(site.send()), Delivered)
    assert len(second.messages) == 1
    failed, delivered = site.attempts
    assert failed.outcomes == (
        (
            0,
            Deferred("4.4.1", f"connect to mx1.x.test[127.0.0.5]:{site.port}: Connection refused", destination=True),
        ),
    )
    assert delivered.host == "mx2.x.test"


@pytest.mark.parametrize("dead", ["::1", "127.0.0.5"])
def test_d8_the_other_family_is_tried_within_the_attempt(site: Site, dead: str) -> None:
    alive = "127.0.0.5" if dead == "::1" else "::1"
    mx = site.mx(alive)
    site.domain("::1 127.0.0.5")
    assert isinstance(only(site.send()), Delivered)
    assert len(mx.messages) == 1


def test_connection_failures_do_not_count_as_sessions(site: Site) -> None:
    site.mx("127.0.0.7")
    site.domain("127.0.0.5", "127.0.0.6", "::1", "127.0.0.7")
    assert isinstance(only(site.send()), Delivered)
    assert len(site.attempts) == 4


@pytest.mark.parametrize(
    "script",
    [
        Script(greeting=Say("421 4.3.2 too busy", close=True)),
        Script(greeting=Say("450 4.3.2 later")),
        Script(greeting=Say("521 no mail here")),
        Script(greeting=Say(["554-5.7.1 no", "554 5.7.1 mail"])),
        Script(ehlo=Say("421 4.3.2 too busy", close=True)),
        Script(ehlo=Say("500 what?"), helo=Say("550 no")),
        Script(greeting=CLOSE),
        Script(greeting=RESET),
        Script(greeting=Raw(b"HTTP/1.1 400 Bad Request\r\n\r\n", close=True)),
        Script(greeting=Raw(b"220-more\r\n", endless=True)),
        Script(greeting=Say("220 a"), ehlo=CLOSE),
    ],
)
def test_d9_a_server_that_does_not_talk_is_passed_over(site: Site, script: Script) -> None:
    site.mx("127.0.0.5", script)
    second = site.mx("127.0.0.6")
    site.domain("127.0.0.5", "127.0.0.6")
    assert isinstance(only(site.send()), Delivered)
    assert len(second.messages) == 1
    (_, outcome) = site.attempts[0].outcomes[0]
    assert isinstance(outcome, Deferred)
    assert outcome.destination


@pytest.mark.parametrize(
    ("action", "status", "text"),
    [
        (Say("421 4.3.2 busy"), "4.3.2", "host {} refused to talk to me: 421 4.3.2 busy"),
        (Say("554 5.7.1 no"), "4.7.1", "host {} refused to talk to me: 554 5.7.1 no"),
        (Say("554 no"), "4.0.0", "host {} refused to talk to me: 554 no"),
        (CLOSE, "4.4.2", "lost connection with {} while receiving the initial server greeting"),
        (HANG, "4.4.2", "conversation with {} timed out while receiving the initial server greeting"),
        (
            Raw(b"220-"),
            "4.4.2",
            "conversation with {} timed out while receiving the initial server greeting",
        ),
        (
            Raw(b"hello\r\n"),
            "4.5.0",
            "protocol error of {} while receiving the initial server greeting: not a reply: 'hello'",
        ),
    ],
)
def test_d9_the_words_for_a_greeting_that_failed(site: Site, action: Action, status: str, text: str) -> None:
    site.make(short=True)
    site.mx("127.0.0.5", Script(greeting=action))
    site.domain("127.0.0.5")
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.text) == (status, text.format("mx1.x.test[127.0.0.5]"))
    assert outcome.destination


def test_a_greeting_that_trickles_does_not_stretch_its_time_out(site: Site) -> None:
    site.make(short=True)
    site.mx("127.0.0.5", Script(greeting=Raw(b"220-slowly\r\n", endless=True, pause=0.02)))
    site.domain("127.0.0.5")
    start = time.monotonic()
    assert isinstance(only(site.send()), Deferred)
    assert time.monotonic() - start < 3 * SHORT


def test_4xx_replies_leave_the_recipients_to_the_next_host(site: Site) -> None:
    rcpt = {"later@x.test": Say("450 4.2.0 greylisted"), "no@x.test": Say("550 5.1.1 no such user")}
    first = site.mx("127.0.0.5", Script(rcpt=rcpt))
    second = site.mx("127.0.0.6")
    site.domain("127.0.0.5", "127.0.0.6")
    outcomes = site.send("ok@x.test", "later@x.test", "no@x.test")
    assert first.messages[0].recipients == ["ok@x.test"]
    assert [name for name, _ in second.messages[0].rcpts] == ["later@x.test"]
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "ok@x.test": "2.0.0",
        "later@x.test": "2.0.0",
        "no@x.test": "5.1.1",
    }


@pytest.mark.parametrize(
    "script",
    [
        Script(mail=Say("451 4.7.1 later")),
        Script(data=Say("451 4.7.1 later")),
        Script(dot=Say("451 4.7.1 later")),
        Script(mail=Say("421 4.3.2 down", close=True)),
        Script(dot=Say("421 4.3.2 down", close=True)),
    ],
)
def test_a_4xx_reply_to_mail_data_or_dot_tries_the_next_host(site: Site, script: Script) -> None:
    site.mx("127.0.0.5", script)
    second = site.mx("127.0.0.6")
    site.domain("127.0.0.5", "127.0.0.6")
    assert isinstance(only(site.send()), Delivered)
    assert len(second.messages) == 1


def test_at_most_two_servers_are_talked_to(site: Site) -> None:
    later = Script(mail=Say("451 4.7.1 later"))
    first, second, third = (site.mx(address, later) for address in ADDRESSES[:3])
    site.domain(*ADDRESSES[:3])
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert not outcome.destination
    assert (first.connections, second.connections, third.connections) == (1, 1, 0)


def test_a_destination_that_said_something_is_not_out_of_reach(site: Site) -> None:
    site.mx("127.0.0.5", Script(rcpt=Say("450 4.2.0 greylisted")))
    site.domain("127.0.0.5", "127.0.0.6")
    outcome = only(site.send())
    assert outcome == Deferred("4.4.1", f"connect to mx2.x.test[127.0.0.6]:{site.port}: Connection refused")


def test_without_a_host_the_reason_is_the_outcome(site: Site) -> None:
    site.dns.set("null.test", {"MX": "0 ."})
    site.dns.set("broken.test", SERVFAIL)
    failed = only(site.send(domain="null.test"))
    assert isinstance(failed, Failed)
    assert failed.status == "5.1.10"
    assert site.attempts[0].relay == "none"
    deferred = only(site.send(domain="broken.test"))
    assert isinstance(deferred, Deferred)
    assert (deferred.status, deferred.destination) == ("4.4.3", True)
