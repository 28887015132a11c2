"""What servers ask for between the lines: the wordings of greylisting, rate limits and complaints about addresses."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.outcome import Deferred, Delivered, Failed, Outcome
from mtad.smtp.hints import asks_for_less, blames_address, retry_after


def said(reply: str) -> Outcome:
    """The outcome that a reply becomes, as in `mtad.delivery.words`."""
    head, _, rest = reply.partition(" ")
    enhanced = rest.split(" ", 1)[0] if rest[1:2] == "." and rest[:1] == head[0] else f"{head[0]}.0.0"
    if head[0] == "2":
        return Delivered(enhanced, reply, "mx.test", reply)
    kind = Failed if head[0] == "5" else Deferred
    return kind(enhanced, f"host mx.test[192.0.2.1] said: {reply}", "mx.test", reply)


@pytest.mark.parametrize(
    ("reply", "seconds"),
    [
        # postgrey, with %s in its text
        ("450 4.2.0 <u@x.test>: Recipient address rejected: Greylisted for 297 seconds, see http://postgrey.test/x", 297),
        ("450 4.2.0 <u@x.test>: Recipient address rejected: Greylisted for 5 minutes", 300),
        # milter-greylist
        ("451 4.7.1 Greylisting in action, please come back in 00:04:59", 299),
        ("451 4.7.1 Greylisting in action, please come back in 01:00:00", 3600),
        ("451 4.7.1 Greylisting in action, please come back later in 00:00:30", 30),
        # sqlgrey, greylistd, gld and their like
        ("450 4.7.1 <u@x.test>: Recipient address rejected: Greylisted for 1 minutes (1)", 60),
        ("451 4.7.1 greylisted - try again in 180 seconds", 180),
        ("451 Greylisted, please try again in 4 minutes and 12 seconds", 252),
        ("451 4.7.1 Greylisted, please try again later (in 90 s)", 90),
        ("450 4.7.1 Greylisting: wait 4m59s before you try again", 299),
        ("451 Graylisted. Retry after 600 secs.", 600),
        ("451 4.3.0 grey-listed: 240 seconds remaining", 240),
        ("450 4.7.1 New sender, please resend this message in 10 min.", 600),
        ("450 Grey listing active; please wait at least 3 minutes", 180),
        # rate limits
        ("452 4.7.1 Rate limit exceeded, try again in 3 minutes", 180),
        ("450 4.7.1 You are being rate limited for 900 seconds", 900),
        ("421 4.7.0 Too many messages, slow down and retry in 2 hrs", 7200),
        ("421 4.7.0 Connection refused; your host is blocked for 1 hour", 3600),
        ("451 4.7.1 Sender throttled (60 s)", 60),
        ("421 4.7.0 Too many connections. Try again 5 minutes later", 300),
        ("450 4.7.1 try again after 1 hour, 30 minutes", 5400),
        ("450 4.7.1 please come back in an hour", 3600),
        ("450 4.7.1 retry in one minute", 60),
        ("450 4.7.1 Retry-After: 120", 120),
        ("450 4.7.1 temporary failure; retry=45", None),
        ("451 4.7.1 TRY AGAIN IN 45 SECONDS", 45),
        ("450 4.7.1 try again in 0 seconds", 0),
        # nothing that could be used
        ("450 4.2.0 <u@x.test>: Recipient address rejected: Greylisted, see http://postgrey.schweikert.ch/help/x", None),
        ("451 4.7.1 Try again later", None),
        ("451 4.7.1 Please try again in a few minutes", None),
        ("451 4.7.1 Greylisted, please try again within 4 hours", None),
        ("450 4.7.1 Too many messages: 100 in 60 seconds", None),
        ("450 4.7.1 Sender rate overlimit - 10.0 / 1h / a@b.test", None),
        ("451 4.7.1 You sent 500 messages in 1 hour, the limit is 100 per 1 hour", None),
        ("450 4.2.2 quota exceeded, the mailbox keeps mail for 30 days", None),
        ("421 4.4.2 idle for 300 seconds, closing", None),
        ("450 4.7.1 try again in 99999999999 seconds", None),
        ("450 4.7.1 retry in 4 months", None),
        ("", None),
    ],
)
def test_when_to_come_back(reply: str, seconds: float | None) -> None:
    assert retry_after(reply) == seconds


@pytest.mark.parametrize(
    "reply",
    [
        "421 4.7.0 mx.test Error: too many connections from 192.0.2.1",
        "421 Service not available, closing transmission channel",
        "450 4.7.1 Error: too much mail from 192.0.2.1",
        "450 4.7.1 Error: too many recipients from 192.0.2.1",
        "452 4.3.2 Connection rate limit exceeded.",
        "452 4.3.2 Too many open connections.",
        "451 4.7.1 Too many concurrent SMTP connections from this IP address; please try again later.",
        "451 Sender rate overlimit - 20.4 / 1h",
        "450-4.7.28 Gmail has detected an unusual rate of mail originating from your IP",
        "450 4.7.28 To protect users from spam, mail from you has been put off",
        "451 4.7.500 Server busy. Please try again later from [192.0.2.1]. (S77719)",
        "451 4.7.650 The mail server [192.0.2.1] has been temporarily rate limited due to IP reputation.",
        "450 4.7.0 Messages from 192.0.2.1 temporarily deferred due to unexpected volume or user complaints",
        "450 4.7.1 Messages deferred due to excessive volume",
        "451 4.3.2 The maximum number of concurrent connections has exceeded a limit",
        "450 4.7.0 Concurrent connection limit reached",
        "450 4.7.1 your hourly sending limit has been reached",
        "450 4.3.0 Too many connections, slow down. ofr_104",
        "550 5.7.1 Daily message quota exceeded",
        "450 4.4.2 Message submission rate for this client has exceeded the configured limit",
        "451 4.7.1 Please slow down, you are sending too fast",
        "554 5.7.0 Too many sessions opened",
    ],
)
def test_who_asks_for_less(reply: str) -> None:
    assert asks_for_less(said(reply))


@pytest.mark.parametrize(
    "reply",
    [
        "250 2.0.0 ok, but slow down",
        "450 4.7.1 Greylisted, too many new senders, try again in 60 seconds",
        "421 4.7.1 Greylisting in action, please come back in 00:05:00",
        "450 4.2.1 The user you are trying to contact is receiving mail at a rate that prevents additional messages",
        "452 4.2.2 The recipient's inbox is out of storage space",
        "452 4.5.3 Too many recipients",
        "552 5.3.4 Message size exceeds fixed limit",
        "550 5.1.1 No such user, this accurate answer is limited to 100 characters",
        "451 4.3.0 Temporary local problem, please try later",
        "550 5.7.1 Relaying denied",
    ],
)
def test_who_does_not(reply: str) -> None:
    assert not asks_for_less(said(reply))


def test_silence_asks_for_nothing() -> None:
    silent = Deferred("4.4.2", "conversation timed out: too many connections", "mx.test")
    assert not asks_for_less(silent)
    assert not blames_address(Deferred("4.7.25", "no PTR", "mx.test"))


@pytest.mark.parametrize(
    "reply",
    [
        "550 5.7.1 [2001:db8::1] Our system has detected that this message does not meet IPv6 sending guidelines "
        "regarding PTR records and authentication.",
        "550 5.7.25 [2001:db8::1] The IP address sending this message does not have a PTR record setup",
        "550 5.7.25 policy",
        "550 5.7.26 This mail is unauthenticated, which poses a security risk to the sender and users",
        "550 5.7.23 SPF validation failed",
        "450 4.7.25 Client host rejected: cannot find your reverse hostname, [2001:db8::1]",
        "550 5.7.1 Client host rejected: cannot find your hostname, [2001:db8::1]",
        "554 5.7.1 Service unavailable; Client host [2001:db8::1] blocked using zen.dnsbl.test",
        "550 5.7.606 Access denied, banned sending IP [2001:db8::1]",
        "550 5.7.1 No reverse DNS for 2001:db8:0:0:0:0:0:1",
        "554 5.7.1 You are not allowed to connect from 2001:db8:aaaa::25.",
        "550 rDNS lookup failed",
        "554 your IP address has a poor reputation",
        "550 5.7.1 rejected by RBL",
    ],
)
def test_who_blames_our_address(reply: str) -> None:
    assert blames_address(said(reply))


@pytest.mark.parametrize(
    "reply",
    [
        "250 2.7.25 ok",
        "550 5.1.1 <u@x.test>: no such user, asked for by 2001:db8::1",
        "550 5.7.1 <u@x.test>: Relay access denied",
        "550 5.7.1 <a@b.test>: Sender address rejected: not logged in",
        "554 5.7.1 Message rejected as spam at 12:34:56",
        "550 5.7.1 message contains a virus (id a1b2:c3d4:99)",
        "451 4.7.1 Greylisted: your IP address is new here",
        "550 5.7.509 Access denied, sending domain example.test does not pass DMARC verification",
        "552 5.2.2 [2001:db8::1] mailbox full",
    ],
)
def test_who_blames_something_else(reply: str) -> None:
    assert not blames_address(said(reply))


@given(st.text(max_size=300), st.sampled_from(["450 4.7.1 ", "550 5.7.1 ", "421 "]))
def test_any_text_is_an_answer_or_none(text: str, head: str) -> None:
    outcome = said(head + text)
    asks_for_less(outcome)
    blames_address(outcome)
    seconds = retry_after(text)
    assert seconds is None or seconds >= 0


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_a_time_reads_the_same_in_every_form(hours: int, minutes: int, seconds: int) -> None:
    total = hours * 3600 + minutes * 60 + seconds
    for form in (
        f"{hours:02}:{minutes:02}:{seconds:02}",
        f"{hours} hours, {minutes} minutes and {seconds} seconds",
        f"{hours}h{minutes}m{seconds}s",
        f"{total} sec",
    ):
        assert retry_after(f"451 4.7.1 Greylisted, try again in {form}") == total


@pytest.mark.parametrize(
    "bad",
    ["again " * 170, "try again, please " * 60, "1 h 1 h " * 125, "0:" * 500, "too many a b " * 80, "wait 1 m, " * 99],
)
def test_a_hostile_reply_costs_little(bad: str) -> None:
    started = time.process_time()
    for _ in range(10):
        outcome = said("450 4.7.1 " + bad[:1000])
        asks_for_less(outcome)
        blames_address(outcome)
        retry_after(bad[:1000])
    assert time.process_time() - started < 0.5
