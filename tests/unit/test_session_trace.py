"""The Received: field."""

from __future__ import annotations

import re
from email import message_from_bytes
from email.utils import parsedate_to_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.config import Limits
from mtad.envelope import Envelope, Recipient
from mtad.policy import Policy
from mtad.session.state import Client, Session, Site, open_session
from mtad.session.trace import received_field
from tests.dialogue_engine import HOSTNAME, NOON, MemoryUsers

SITE = Site(HOSTNAME, Limits(), Policy(MemoryUsers(), ("example.org",)))


def session_of(client: Client, helo: str = "client.example", esmtp: bool = True) -> Session:
    session = open_session(SITE, client)
    session.helo, session.esmtp = helo, esmtp
    return session


def envelope_to(*recipients: str) -> Envelope:
    return Envelope(id="4XyZ", arrival=NOON + 0.9, sender="a@b", recipients=tuple(map(Recipient, recipients)))


def test_one_recipient() -> None:
    field = received_field(session_of(Client("192.0.2.1", "host.example")), envelope_to("bob@example.org"))
    head, _, date = field.partition(b"; ")
    assert head == (
        b"Received: from client.example (host.example [192.0.2.1])\r\n"
        b"\tby mx.example.org (mtad) with ESMTP id 4XyZ\r\n"
        b"\tfor <bob@example.org>"
    )
    assert date.endswith(b"\r\n")
    assert parsedate_to_datetime(date.decode().strip()).timestamp() == int(NOON)


def test_several_recipients_are_not_betrayed() -> None:
    field = received_field(session_of(Client("192.0.2.1")), envelope_to("bob@example.org", "alice@example.org"))
    assert re.fullmatch(
        rb"Received: from client\.example \(unknown \[192\.0\.2\.1\]\)\r\n"
        rb"\tby mx\.example\.org \(mtad\) with ESMTP id 4XyZ; [^\r\n]+\r\n",
        field,
    )


def test_ipv6_and_helo() -> None:
    field = received_field(session_of(Client("2001:db8::1"), "[IPv6:2001:db8::1]", esmtp=False), envelope_to("a@b"))
    assert field.startswith(b"Received: from [IPv6:2001:db8::1] (unknown [IPv6:2001:db8::1])\r\n")
    assert b" with SMTP id " in field


@given(st.text(max_size=80))
def test_a_name_from_the_dns_injects_nothing_s_en1(name: str) -> None:
    """Invariant: whatever the DNS says the field is three lines of printable text."""
    field = received_field(session_of(Client("192.0.2.1", name)), envelope_to("bob@example.org"))
    lines = field.decode("ascii").split("\r\n")
    assert len(lines) == 4
    assert lines[3] == ""
    assert all(line.removeprefix("\t").isprintable() for line in lines)
    assert list(message_from_bytes(field).keys()) == ["Received"]


@pytest.mark.parametrize("name", ["a\r\nX: y", "a b", "a)", "", "-", "x" * 300])
def test_a_name_that_is_no_domain_is_unknown(name: str) -> None:
    assert b"(unknown [192.0.2.1])" in received_field(session_of(Client("192.0.2.1", name)), envelope_to("a@b"))


def test_no_line_is_too_long() -> None:
    longest = ".".join(["d" * 63] * 4)
    session = session_of(Client("2001:db8:1111:2222:3333:4444:5555:6666", longest), longest)
    field = received_field(session, envelope_to("l" * 64 + "@" + "d" * 63 + "." + "e" * 63 + "." + "f" * 60))
    assert max(map(len, field.split(b"\r\n"))) < 998
