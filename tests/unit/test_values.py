"""The values: addresses, replies, outcomes, envelopes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.address import NULL, Address, domain_of
from mtad.envelope import Envelope, Recipient
from mtad.errors import ConfigError, Problem
from mtad.outcome import Attempt, Deferred, Delivered, Failed
from mtad.reply import MAX_LINE, Reply, reply

_local = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="\x7f"), min_size=1, max_size=20)
_domain = st.from_regex(r"[a-z0-9-]{1,10}(\.[a-z0-9-]{1,10}){0,3}", fullmatch=True) | st.just("[ipv6:2001:db8::1]")


@pytest.mark.parametrize(
    ("local", "domain", "text"),
    [
        ("alice", "example.org", "alice@example.org"),
        ("a.b+c", "example.org", "a.b+c@example.org"),
        (".a", "example.org", '".a"@example.org'),
        ("a..b", "example.org", '"a..b"@example.org'),
        ("a b", "example.org", '"a b"@example.org'),
        ('a"b\\', "example.org", '"a\\"b\\\\"@example.org'),
        ("a@b", "example.org", '"a@b"@example.org'),
        ("", "example.org", '""@example.org'),
        ("\u00fc", "example.org", "\u00fc@example.org"),
        ("alice", "[192.0.2.1]", "alice@[192.0.2.1]"),
        ("postmaster", "", "postmaster"),
        ("", "", ""),
    ],
)
def test_an_address_is_written_as_a_mailbox(local: str, domain: str, text: str) -> None:
    assert str(Address(local, domain)) == text
    assert domain_of(text) == domain


@given(_local, _domain)
def test_the_domain_of_an_address_is_found_whatever_is_quoted_before_it(local: str, domain: str) -> None:
    assert domain_of(str(Address(local, domain))) == domain


@given(_local, _domain, _local, _domain)
def test_different_addresses_are_written_differently(local: str, domain: str, other: str, place: str) -> None:
    first, second = Address(local, domain), Address(other, place)
    assert (str(first) == str(second)) == (first == second)


def test_addresses_are_compared_without_case() -> None:
    assert Address("Alice", "example.org").key == Address("aLICE", "example.org").key
    assert Address("alice", "example.org").key != Address("alice", "example.net").key
    assert domain_of("x@EXAMPLE.org") == "example.org"
    assert str(NULL) == ""
    assert domain_of("") == domain_of("postmaster") == ""


@pytest.mark.parametrize(
    ("code", "enhanced", "lines"),
    [
        (199, "", ("x",)),
        (600, "", ("x",)),
        (250, "", ()),
        (250, "5.1.1", ("x",)),
        (550, "4.1.1", ("x",)),
        (354, "3.0.0", ("x",)),
        (250, "2.0", ("x",)),
        (250, "2.0.1234", ("x",)),
        (250, "2.0.0 ", ("x",)),
        (250, "2.0.0", ("x\r\n550 y",)),
        (250, "2.0.0", ("fine", "x\ny")),
        (250, "2.0.0", ("x\0",)),
        (250, "2.0.0", ("\x1b[2J",)),
        (250, "2.0.0", ("a\u2028b",)),
    ],
)
def test_a_reply_cannot_be_built_wrong(code: int, enhanced: str, lines: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"reply|status"):
        reply(code, enhanced, *lines)


def test_a_reply_goes_over_the_wire_with_its_code_on_each_line() -> None:
    assert reply(250, "2.1.0", "ok").encode() == b"250 2.1.0 ok\r\n"
    assert reply(354, "", "go on").encode() == b"354 go on\r\n"
    assert reply(250, "", "mx.example.org", "SIZE 100", "PIPELINING").encode() == (
        b"250-mx.example.org\r\n250-SIZE 100\r\n250 PIPELINING\r\n"
    )
    assert reply(550, "5.7.1", "no", "really").encode() == b"550-5.7.1 no\r\n550 5.7.1 really\r\n"
    assert reply(250, "", "").encode() == b"250 \r\n"


@given(
    st.integers(200, 599),
    st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=600), min_size=1, max_size=3),
)
def test_no_reply_line_is_longer_than_the_standard_allows(code: int, lines: list[str]) -> None:
    wire = reply(code, "", *lines).encode()
    *parts, rest = wire.split(b"\r\n")
    assert rest == b""
    assert len(parts) == len(lines)
    assert all(len(part) + 2 <= MAX_LINE for part in parts)
    marks = [part[3:4] for part in parts]
    assert marks == [b"-"] * (len(parts) - 1) + [b" "]


def test_a_line_of_non_ascii_text_is_not_longer_than_the_standard_allows() -> None:
    wire = reply(550, "5.1.1", "\u00fc" * 400).encode()
    assert len(wire) <= MAX_LINE
    wire.decode("utf-8")


def test_a_reply_tells_its_class() -> None:
    for code, expected in ((250, (True, False, False)), (354, (True, False, False)), (451, (False, True, False))):
        answer = Reply(code, "", ("x",))
        assert (answer.positive, answer.temporary, answer.permanent) == expected
    assert Reply(550, "", ("x",)).permanent
    assert Reply(550, "5.1.1", ("no such", "user")).text == "550 5.1.1 no such user"
    assert Reply(220, "", ("mx ESMTP",)).text == "220 mx ESMTP"
    assert Reply(250, "2.0.0", ("",)).text == "250 2.0.0"


@pytest.mark.parametrize(
    ("host", "address", "relay"),
    [
        ("mx.example.org", "192.0.2.1:25", "mx.example.org[192.0.2.1]:25"),
        ("mx.example.org", "[2001:db8::1]:2525", "mx.example.org[2001:db8::1]:2525"),
        ("local", "", "local"),
        ("", "", "none"),
    ],
)
def test_a_relay_is_shown_as_log_readers_know_it(host: str, address: str, relay: str) -> None:
    assert Attempt(1.0, (), host, address).relay == relay


@pytest.mark.parametrize("outcome", [Delivered("2.0.0", "a", "b", "c"), Failed("5.0.0", "x"), Deferred("4.0.0", "x")])
def test_an_outcome_is_still_itself_after_it_was_stored(outcome: Delivered | Failed | Deferred) -> None:
    stored = msgspec.json.encode(Attempt(1.0, ((0, outcome),)))
    assert msgspec.json.decode(stored, type=Attempt).outcomes == ((0, outcome),)


@pytest.mark.parametrize(
    "value", [Address("a", "b"), Reply(250, "", ("x",)), Delivered("2.0.0", ""), Envelope("i", 1.0, "", (Recipient("a"),))]
)
def test_values_do_not_change(value: msgspec.Struct) -> None:
    with pytest.raises(AttributeError):
        setattr(value, value.__struct_fields__[0], "changed")
    assert hash(value) == hash(msgspec.structs.replace(value))


def test_a_fault_of_the_configuration_names_its_place() -> None:
    problems = [Problem("mtad.toml", 3, "tls.key", "no such file"), Problem("mtad.toml", None, "", "unreadable")]
    error = ConfigError(problems)
    assert str(error) == "mtad.toml:3: tls.key: no such file\nmtad.toml: unreadable"
    assert error.problems == tuple(problems)
