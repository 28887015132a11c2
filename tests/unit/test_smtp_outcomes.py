"""The SMTP transport against scripted exchangers: what their words, and their silence, mean for each recipient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from mtad.delivery.transport import Interrupted
from mtad.delivery.words import REPLY_LIMIT
from mtad.outcome import Deferred, Delivered, Failed
from tests.peers.mx import CLOSE, HANG, RESET, Raw, Say, Script
from tests.peers.outbound import BODY, Site, only


@pytest.fixture
def site() -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack)


@pytest.mark.parametrize("pipelining", [True, False])
def test_d9_a_mix_of_replies_is_accounted_for_exactly(site: Site, pipelining: bool) -> None:
    rcpt = {
        "full@x.test": Say("452 4.2.2 mailbox full"),
        "no@x.test": Say(["550-5.1.1 no", "550 5.1.1 such user"]),
        "many@x.test": Say("552 5.5.3 too many"),
        "plain@x.test": Say("550 no"),
    }
    script = Script(rcpt=rcpt, extensions=["PIPELINING"] if pipelining else [])
    mx = site.mx("127.0.0.5", script)
    site.domain("127.0.0.5")
    outcomes = site.send("ok@x.test", *rcpt)
    where = "host mx1.x.test[127.0.0.5] said"
    reply_to = "(in reply to RCPT TO command)"
    assert outcomes["full@x.test"] == Deferred(
        "4.2.2", f"{where}: 452 4.2.2 mailbox full {reply_to}", "mx1.x.test", "452 4.2.2 mailbox full"
    )
    assert outcomes["no@x.test"] == Failed(
        "5.1.1", f"{where}: 550 5.1.1 no such user {reply_to}", "mx1.x.test", "550 5.1.1 no such user"
    )
    assert outcomes["many@x.test"] == Deferred(
        "4.5.3", f"{where}: 552 5.5.3 too many {reply_to}", "mx1.x.test", "552 5.5.3 too many"
    )
    assert outcomes["plain@x.test"] == Failed("5.0.0", f"{where}: 550 no {reply_to}", "mx1.x.test", "550 no")
    assert isinstance(outcomes["ok@x.test"], Delivered)
    assert mx.messages[0].recipients == ["ok@x.test"]


@pytest.mark.parametrize(
    ("script", "command"),
    [
        (Script(mail=Say("550 5.7.1 not you")), "MAIL FROM command"),
        (Script(data=Say("550 5.7.1 not you")), "DATA command"),
        (Script(dot=Say("550 5.7.1 not you")), "end of DATA command"),
    ],
)
def test_a_5xx_reply_is_the_end_for_the_recipients_concerned(site: Site, script: Script, command: str) -> None:
    site.mx("127.0.0.5", script)
    second = site.mx("127.0.0.6")
    site.domain("127.0.0.5", "127.0.0.6")
    outcome = only(site.send())
    assert isinstance(outcome, Failed)
    assert outcome.text == f"host mx1.x.test[127.0.0.5] said: 550 5.7.1 not you (in reply to {command})"
    assert second.connections == 0


def test_d9_all_refused_and_354_without_asking_sends_an_empty_message(site: Site) -> None:
    script = Script(rcpt=Say("550 5.1.1 no"), data=Say("354 go"), dot=[Say("554 5.5.1 no valid recipients"), Say("250 ok")])
    mx = site.mx("127.0.0.5", script)
    site.domain("127.0.0.5")
    assert isinstance(only(site.send()), Failed)
    assert mx.transactions[0].content == b""
    assert site.doubts == []
    mx.script = Script()
    assert isinstance(only(site.send()), Delivered)
    assert mx.connections == 1


@pytest.mark.parametrize(
    ("script", "activity"),
    [
        (Script(mail=CLOSE), "sending MAIL FROM"),
        (Script(rcpt=RESET), "sending RCPT TO"),
        (Script(data=CLOSE), "sending DATA command"),
        (Script(dot=CLOSE), "sending end of data -- message may be sent more than once"),
        (Script(dot=RESET), "sending end of data -- message may be sent more than once"),
    ],
)
def test_d9_a_server_that_closes(site: Site, script: Script, activity: str) -> None:
    site.mx("127.0.0.5", one_by_one(script))
    site.domain("127.0.0.5")
    outcome = only(site.send())
    assert outcome == Deferred("4.4.2", f"lost connection with mx1.x.test[127.0.0.5] while {activity}", "mx1.x.test")


def one_by_one(script: Script) -> Script:
    """The same without PIPELINING, so that every command has its own moment."""
    return Script(**{**script.__dict__, "extensions": ()})


@pytest.mark.parametrize(
    ("script", "activity"),
    [
        (Script(ehlo=HANG), "performing the EHLO handshake"),
        (Script(mail=HANG), "sending MAIL FROM"),
        (Script(rcpt=HANG), "sending RCPT TO"),
        (Script(data=HANG), "sending DATA command"),
        (Script(dot=HANG), "sending end of data -- message may be sent more than once"),
    ],
)
def test_a_server_that_says_nothing_more_times_out_in_its_phase(site: Site, script: Script, activity: str) -> None:
    site.make(short=True)
    mx = site.mx("127.0.0.5", one_by_one(script))
    site.domain("127.0.0.5")
    outcome = only(site.send())
    assert outcome.text == f"conversation with mx1.x.test[127.0.0.5] timed out while {activity}"
    assert isinstance(outcome, Deferred)
    mx.await_closed()


def test_d9_no_reply_to_the_dot_is_not_tried_elsewhere_at_once(site: Site) -> None:
    first = site.mx("127.0.0.5", Script(dot=CLOSE, rcpt={"no@x.test": Say("550 5.1.1 no")}))
    second = site.mx("127.0.0.6")
    site.domain("127.0.0.5", "127.0.0.6")
    outcomes = site.send("b@x.test", "no@x.test")
    assert isinstance(outcomes["b@x.test"], Deferred)
    assert isinstance(outcomes["no@x.test"], Failed)
    assert first.transactions[0].content == BODY
    assert second.connections == 0


def test_d9_250_and_then_a_reset_is_delivered(site: Site) -> None:
    site.mx("127.0.0.5", Script(dot=Say("250 2.0.0 Ok", reset=True)))
    site.domain("127.0.0.5")
    assert isinstance(only(site.send()), Delivered)
    assert isinstance(only(site.send()), Delivered)


def test_a_connection_lost_in_the_middle_keeps_what_was_decided(site: Site) -> None:
    site.mx("127.0.0.5", Script(rcpt={"no@x.test": Say("550 5.1.1 no")}, data=CLOSE))
    second = site.mx("127.0.0.6")
    site.domain("127.0.0.5", "127.0.0.6")
    outcomes = site.send("no@x.test", "b@x.test")
    assert isinstance(outcomes["no@x.test"], Failed)
    assert isinstance(outcomes["b@x.test"], Delivered)
    assert second.messages[0].recipients == ["b@x.test"]


def test_a_server_that_gives_up_in_the_middle_of_the_content_is_heard(site: Site) -> None:
    site.mx("127.0.0.5", Script(read_content=100_000, dot=Say("552 5.3.4 too big", close=True)))
    site.domain("127.0.0.5")
    outcome = only(site.send(body=b"x" * 70 + b"\r\n" + (b"y" * 998 + b"\r\n") * 20_000))
    assert isinstance(outcome, Failed)
    assert outcome.status == "5.3.4"
    assert site.doubts == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"250-a\r\n550 b\r\n",
        b"250-" + b"x" * 5000,
        b"250-x\r\n" * 200,
        b"\xff\x00\x1b[2J\r\n",
        b"354 not yet\r\n",
    ],
)
def test_s_en2_garbage_defers_and_closes(site: Site, garbage: bytes) -> None:
    mx = site.mx("127.0.0.5", Script(mail=Raw(garbage)))
    site.domain("127.0.0.5")
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert outcome.status == "4.5.0"
    assert "protocol error" in outcome.text
    assert outcome.text.isprintable()
    mx.await_closed()


def test_s_en2_a_hostile_reply_is_one_short_printable_line(site: Site) -> None:
    lines = ["550-5.7.1 a\x1b[31m\0b\rInjected: yes"] + ["550-5.7.1 " + "x" * 400] * 50 + ["550 5.7.1 end"]
    site.mx("127.0.0.5", Script(rcpt=Say(lines)))
    site.domain("127.0.0.5")
    outcome = only(site.send())
    assert isinstance(outcome, Failed)
    assert outcome.text.isprintable()
    assert len(outcome.reply) == REPLY_LIMIT


def test_d10_a_reply_that_nobody_asked_for_is_a_fault(site: Site) -> None:
    site.mx("127.0.0.5", Script(greeting=Raw(b"220 mx\r\n250-mx\r\n250 PIPELINING\r\n")))
    site.domain("127.0.0.5")
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert "nobody asked for" in outcome.text


def test_s_en1_an_address_that_cannot_be_sent_fails_alone(site: Site) -> None:
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")
    outcomes = site.send("b@x.test", "c\r\nDATA@x.test", "\u00fc@x.test")
    assert [outcome.status for outcome in outcomes.values()] == ["5.1.3", "5.6.7", "2.0.0"]
    assert mx.messages[0].rcpts == [("b@x.test", "250 2.1.5 Ok")]
    assert isinstance(only(site.send(sender="a\nb@x.test")), Failed)
    assert len(mx.messages) == 1


def test_a_message_that_cannot_be_read_or_recorded_is_not_finished(site: Site) -> None:
    mx = site.mx("127.0.0.5")
    site.domain("127.0.0.5")

    def fail() -> None:
        raise OSError("disk full")

    site.on_doubt = fail
    with pytest.raises(Interrupted, match="disk full") as broken:
        site.send()
    assert (type(broken.value.fault), broken.value.attempts) == (OSError, ())
    mx.await_closed()
    assert mx.messages == []
    assert mx.transactions[0].content == b""
