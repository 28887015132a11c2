"""Reasons of deferrals: their kinds, and the groups that they fall into."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.outcome import Deferred
from mtad.reasons import Kind, kind_of, normalised

DNS = (
    "Host or domain name not found. Name service error for name=d7.test type=MX: Host not found, try again (The DNS "
    "operation timed out)"
)

KINDS: list[tuple[Kind, Deferred]] = [
    ("dns", Deferred("4.4.3", DNS, destination=True)),
    ("tls", Deferred("4.7.4", "TLS is required, but was not offered by host a.test[192.0.2.1]", "a.test")),
    ("tls", Deferred("4.7.4", "TLS is required, but host a.test[192.0.2.1] refused to start TLS: 454 no", "a.test")),
    ("tls", Deferred("4.7.5", "Server certificate not verified: a.test[192.0.2.1]: expired", "a.test")),
    (
        "login",
        Deferred("4.7.8", "SASL authentication failed; server a.test[192.0.2.1] said: 535 5.7.8 no", "a.test", "535"),
    ),
    ("login", Deferred("4.3.5", "credentials for a.test[192.0.2.1] cannot be read")),
    ("connect", Deferred("4.4.1", "connect to a.test[192.0.2.1]:25: Connection refused", destination=True)),
    ("connect", Deferred("4.4.1", "delivery temporarily suspended: connect to a.test[192.0.2.1]:25: Connection refused")),
    ("broken", Deferred("4.4.2", "lost connection with a.test[192.0.2.1] while sending MAIL FROM", "a.test")),
    ("broken", Deferred("4.4.2", "conversation with a.test[192.0.2.1] timed out while sending RCPT TO", "a.test")),
    ("broken", Deferred("4.5.0", "protocol error of a.test[192.0.2.1] while sending MAIL FROM: no code", "a.test")),
    (
        "greylisted",
        Deferred("4.7.1", "host a.test[192.0.2.1] said: 451 4.7.1 Greylisted", "a.test", "451 4.7.1 Greylisted"),
    ),
    ("greylisted", Deferred("4.2.0", "host a.test[192.0.2.1] said: 450 see postgrey", "a.test", "450 see postgrey")),
    ("limited", Deferred("4.7.0", "host a.test[192.0.2.1] refused to talk to me: 421 No", "a.test", "421 No")),
    ("limited", Deferred("4.7.28", "host a.test[192.0.2.1] said: 421 4.7.28 x", "a.test", "421 4.7.28 x")),
    ("reply", Deferred("4.2.1", "host a.test[192.0.2.1] said: 450 4.2.1 Mailbox busy", "a.test", "450 4.2.1 Mailbox busy")),
    ("reply", Deferred("4.7.5", "host a.test[192.0.2.1] said: 450 4.7.5 x", "a.test", "450 4.7.5 x")),
    ("mailbox", Deferred("4.3.1", "cannot store in the mailbox of alice: No space left on device")),
    ("machine", Deferred("4.3.0", "delivery process killed by signal 9")),
    ("machine", Deferred("4.3.0", "no room to convert the message: No space left on device")),
]


@pytest.mark.parametrize(("kind", "reason"), KINDS)
def test_what_was_in_the_way(kind: Kind, reason: Deferred) -> None:
    assert kind_of(reason) == kind


@pytest.mark.parametrize(
    ("reasons", "group"),
    [
        (
            [
                "host mx1.d7.test[127.77.0.2] said: 450 4.2.1 <b@d7.test>: Mailbox busy (in reply to RCPT TO command)",
                "host b.test[2001:db8::1] said: 450 4.2.1 <c+x@d8.test>: Mailbox busy (in reply to RCPT TO command)",
            ],
            "host HOST said: 450 4.2.1 <ADDRESS>: Mailbox busy (in reply to RCPT TO command)",
        ),
        (
            [
                "connect to a.test[192.0.2.1]:25: Connection refused",
                "connect to b.test[2001:db8::1]:2525: Connection refused",
                "delivery temporarily suspended: connect to c.test[192.0.2.1]:25: Connection refused",
            ],
            "connect to HOST: Connection refused",
        ),
        ([DNS, DNS.replace("d7.test", "other-1.test")], DNS.replace("d7.test", "HOST")),
        (
            [
                "host a.test[192.0.2.1] said: 451 4.3.0 3hZQ2x0bWqz1Tn: try again in 180 seconds",
                "host a.test[192.0.2.1] said: 451 4.3.0 4BzR5k2jL0z9: try again in 20 seconds",
            ],
            "host HOST said: 451 4.3.0 ID: try again in N seconds",
        ),
        (
            [
                "host a.test[192.0.2.1] said: 450 Greylisted, come back in 00:04:59, see http://grey.test/help?ip=192.0.2.7",
                "host a.test[192.0.2.1] said: 450 Greylisted, come back in 00:01:00, see http://grey.test/help?ip=192.0.2.8",
            ],
            "host HOST said: 450 Greylisted, come back in N, see http://grey.test/help",
        ),
        (
            [
                "host a.test[192.0.2.1] refused to talk to me: 421 4.7.0 too many connections from [192.0.2.9]",
                "host b.test[192.0.2.2] refused to talk to me: 421 4.7.0 too many connections from 198.51.100.1",
            ],
            "host HOST refused to talk to me: 421 4.7.0 too many connections from ADDRESS",
        ),
        (
            ["cannot store in the mailbox of alice: No space left", "cannot store in the mailbox of bob: No space left"],
            "cannot store in the mailbox of HOST: No space left",
        ),
        (
            [
                "Server certificate not verified: a.test[192.0.2.1]: self-signed certificate",
                "Server certificate not verified: b.test[192.0.2.1]: self-signed certificate",
            ],
            "Server certificate not verified: HOST: self-signed certificate",
        ),
        (
            ["lost connection with a.test[192.0.2.1] while sending RCPT TO"],
            "lost connection with HOST while sending RCPT TO",
        ),
    ],
)
def test_one_reason_is_one_group(reasons: list[str], group: str) -> None:
    assert {normalised(reason) for reason in reasons} == {group}
    assert normalised(group) == group


def test_different_replies_are_different_groups() -> None:
    said = "host a.test[192.0.2.1] said: "
    replies = ["450 4.2.1 Mailbox busy", "450 4.2.2 Mailbox busy", "451 4.2.1 Mailbox busy", "450 Mailbox full"]
    assert len({normalised(said + reply) for reply in replies}) == len(replies)


@given(st.text())
def test_whatever_is_said_gives_a_group_of_one_line(text: str) -> None:
    assert normalised(text).count("\n") <= text.count("\n")
