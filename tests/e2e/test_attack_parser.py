"""Lines, octets, sizes and parameters that are meant to upset a parser: S-PA1 to S-PA5, S-PA8, S-PA9 of the attacks.

The oracle is always what was taken, and the envelope of it; a session that was upset takes a message afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.client import Client
from tests.e2e.attack_aid import EHLO, MAIL, MIB, PATIENT, RCPT, deliver, harvest, listeners
from tests.site import Site, Taken

LIMIT: Final = 64 * MIB
#: What a process may use for whatever one client sends. Its own buffers are some 100 KiB.
BOUND: Final = 3 * MIB


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("parser"), limits=PATIENT | {"message_size": LIMIT}, deliver=False) as site:
        yield site


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    with Client(site.address()) as client:
        yield client


def only(site: Site) -> Taken:
    """The one message that was taken, from the sender and to the recipient that it was sent from and to."""
    [message] = harvest(site, 1)
    assert message.envelope.sender == "a@sender.test"
    assert [recipient.address for recipient in message.envelope.recipients] == ["alice@example.org"]
    return message


# -- S-PA1, S-PA2: lines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [512, 513, 1000, 2048])
def test_s_pa1_a_command_line_that_is_long_is_heard(client: Client, length: int) -> None:
    client.begin(EHLO)
    assert client.say("NOOP ".ljust(length, "x")).startswith("250 ")
    assert client.say("NOOP").startswith("250 ")


@pytest.mark.parametrize("length", [2049, 64 * 1024, 10 * MIB])
@pytest.mark.parametrize("filler", [b"x", b"x@evil.test> RCPT TO:<", b"\0", b"\r"], ids=repr)
def test_s_pa1_a_command_line_without_end_is_one_500_and_costs_nothing(site: Site, length: int, filler: bytes) -> None:
    with Client(site.address()) as client, listeners(site) as memory:
        client.begin(EHLO, MAIL)
        client.send((b"RCPT TO:<" + filler * (length // len(filler) + 1))[:length])
        assert client.reply().startswith("500 5.5.2 "), "told before its end has come"
        client.send(b"\r\n" + RCPT.encode() + b"\r\n")
        assert client.reply().startswith("250 2.1.5 "), "one line is one reply"
        assert deliver(client).startswith("250 2.0.0 ")
    assert memory.growth < BOUND
    only(site)


@pytest.mark.parametrize("length", [998, 1000, 1001, MIB, 50 * MIB])
def test_s_pa2_a_line_of_text_of_any_length_is_kept_to_the_octet(site: Site, length: int) -> None:
    content = b"Subject: x\r\n\r\n" + b"y" * length + b"\r\nlast\r\n"
    with Client(site.address()) as client, listeners(site) as memory:
        client.begin(EHLO, MAIL, RCPT)
        assert deliver(client, content).startswith("250 2.0.0 ")
    assert memory.growth < BOUND
    kept = only(site).content
    assert kept.startswith(b"Received: ")
    assert kept.endswith(b"\r\n" + content)


def test_s_pa2_a_line_that_is_larger_than_a_message_may_be_is_refused(tmp_path: Path) -> None:
    with Site(tmp_path, limits={"message_size": 65536}, deliver=False) as site:
        with Client(site.address()) as client, listeners(site) as memory:
            client.begin(EHLO, MAIL, RCPT)
            assert deliver(client, b"y" * 20 * MIB + b"\r\n").startswith("552 5.3.4 ")
            assert client.say("RSET").startswith("250 "), "what is behind the dot is commands again"
        assert memory.growth < BOUND
        harvest(site, 0)


# -- S-PA3, S-PA4, S-PA5: octets ----------------------------------------------------------------------------------------

CONTROLS: Final = {
    "NUL": b"\0",
    "BEL": b"\a",
    "BS": b"\b",
    "TAB": b"\t",
    "VT": b"\v",
    "FF": b"\f",
    "SUB": b"\x1a",
    "ESC": b"\x1b[2J",
    "DEL": b"\x7f",
    "C1": b"\x80",
    "NEL": b"\x85",
    "CSI": b"\x9b2J",
    "the last C1": b"\x9f",
    "NEL in UTF-8": b"\xc2\x85",
    "CSI in UTF-8": b"\xc2\x9b2J",
    "Latin-1": b"\xfc",
    "overlong NUL": b"\xc0\x80",
    "overlong solidus": b"\xc0\xaf",
    "overlong CR": b"\xe0\x80\x8d",
    "overlong at": b"\xf0\x80\x81\x80",
    "surrogate": b"\xed\xa0\x80",
    "pair of surrogates": b"\xed\xa0\xbd\xed\xb8\x80",
    "beyond Unicode": b"\xf4\x90\x80\x80",
    "never in UTF-8": b"\xff",
    "half a character": b"\xc3",
    "line separator": "\u2028".encode(),
    "paragraph separator": "\u2029".encode(),
    "right to left": "\u202e".encode(),
    "byte order mark": "\ufeff".encode(),
    "joiner": "\u200d".encode(),
}

PLACES: Final = [
    b"NO%OP",
    b"%NOOP",
    b"NOOP a%b",
    b"HELP a%b",
    b"VRFY a%b",
    b"EHLO a%b.test",
    b"MAIL FROM:<a%b@sender.test>",
    b"MAIL FROM:<a@sen%der.test>",
    b'MAIL FROM:<"a%b"@sender.test>',
    b"MAIL FROM:<a@sender.test>%",
    b"MAIL FROM:<a@sender.test> SIZE=1%0",
    b"MAIL FROM:<a@sender.test> ENVID=a%b",
    b"MAIL FROM:<a%b@sender.test> SMTPUTF8",
    b"MAIL FROM:<a@sen%der.test> SMTPUTF8",
    b"MAIL FROM:<> BODY=7BIT%",
]
RECIPIENTS: Final = [
    b"RCPT TO:<al%ice@example.org>",
    b"RCPT TO:<alice%@example.org>",
    b"RCPT TO:<alice@example.org%@evil.test>",
    b"RCPT TO:<alice@exam%ple.org>",
    b"RCPT TO:<alice@example.org> NOTIFY=NEVER%",
    b"RCPT TO:<alice@example.org> ORCPT=rfc822;a%b",
    b"RSET%x",
    b"DATA%x",
]


@pytest.mark.parametrize("odd", CONTROLS.values(), ids=CONTROLS)
def test_s_pa3_to_5_what_does_not_print_is_in_no_command(site: Site, client: Client, odd: bytes) -> None:
    """Wherever it stands the whole line is refused, and nothing is cut off at it or repaired."""

    def refused(line: bytes) -> None:
        if odd == b"\t" and line.endswith(b"%"):
            return  # white space at the end of a line is none of it (RFC 5321 section 4.1.1)
        client.send(line.replace(b"%", odd) + b"\r\n")
        assert client.reply()[:1] == "5", line

    client.begin(EHLO)
    for line in PLACES:
        refused(line)
        assert client.say("RCPT TO:<alice@example.org>").startswith("503 "), f"{line!r} began a transaction"
    assert client.say(MAIL).startswith("250 ")
    for line in RECIPIENTS:
        refused(line)
    assert client.say("DATA")[:1] == "5", "no recipient was taken"
    assert client.say(RCPT).startswith("250 ")
    assert deliver(client).startswith("250 ")
    message = only(site)
    assert (message.envelope.envid, message.envelope.smtputf8, message.envelope.recipients[0].orcpt) == ("", False, "")


@pytest.mark.parametrize("odd", CONTROLS.values(), ids=CONTROLS)
def test_s_pa3_to_5_in_content_it_is_kept_as_it_came(site: Site, client: Client, odd: bytes) -> None:
    """Content is not judged here, and above all not cut off: NUL is an octet like any other."""
    content = b"Subject: a" + odd + b"b\r\nX-" + odd + b": c\r\n\r\nd" + odd + b"e\r\n" + odd + b"\r\nf\r\n"
    client.begin(EHLO, MAIL, RCPT)
    assert deliver(client, content).startswith("250 ")
    assert only(site).content.endswith(b"\r\n" + content)


def test_s_pa4_more_than_ascii_needs_smtputf8(site: Site, client: Client) -> None:
    client.begin(EHLO)
    assert client.say("MAIL FROM:<jürgen@sender.test>").startswith("553 5.6.7 ")
    assert client.say("MAIL FROM:<a@bücher.test>").startswith("553 5.6.7 ")
    assert client.say("MAIL FROM:<a@sender.test>").startswith("250 ")
    assert client.say("RCPT TO:<älice@example.org>").startswith("553 5.6.7 ")
    assert client.say("RCPT TO:<alice@éxample.org>").startswith("553 5.6.7 ")
    assert client.say("RSET").startswith("250 ")
    for line in ("EHLO ü", "NOOP ü", "HELP ü", "VRFY ü", "ü"):
        assert client.say(line)[:3] in {"500", "501", "502"}, line
    assert client.say("MAIL FROM:<a@sender.test> SMTPUTF8").startswith("250 ")
    assert client.say("RCPT TO:<alice@éxample.org>").startswith("550 5.7.1 "), "an A-label is no domain of ours"
    assert client.say("RCPT TO:<alice@\uff45xample.org>").startswith("250 "), "a fullwidth letter is the letter (UTS 46)"
    assert client.say(RCPT).startswith("250 ")
    assert deliver(client).startswith("250 ")
    assert only(site).envelope.smtputf8


# -- S-PA8, S-PA9: parameters -------------------------------------------------------------------------------------------

MAIL_PARAMETERS: Final = {
    "SIZE=99999999999999999999": "552 5.3.4",
    "SIZE=18446744073709551616": "552 5.3.4",
    "SIZE=4294967297": "552 5.3.4",
    f"SIZE={LIMIT + 1}": "552 5.3.4",
    "SIZE=999999999999999999999": "501 5.5.4",  # more digits than RFC 1870 has
    "SIZE=-1": "501 5.5.4",
    "SIZE=+1": "501 5.5.4",
    "SIZE=1e9": "501 5.5.4",
    "SIZE=0x10": "501 5.5.4",
    "SIZE=1,000": "501 5.5.4",
    "SIZE=": "501 5.5.4",
    "SIZE": "501 5.5.4",
    "SIZE=1 SIZE=1": "501 5.5.4",
    "SIZE=1 size=2": "501 5.5.4",
    "BODY=X": "501 5.5.4",
    "BODY=": "501 5.5.4",
    "BODY=7BIT BODY=8BITMIME": "501 5.5.4",
    "RET=": "501 5.5.4",
    "RET=ALL": "501 5.5.4",
    "RET=FULL RET=HDRS": "501 5.5.4",
    "ENVID=": "501 5.5.4",
    "ENVID=a+00b": "501 5.5.4",
    "ENVID=a+0D+0Ab": "501 5.5.4",
    "ENVID=a+0ab": "501 5.5.4",
    "ENVID=a+": "501 5.5.4",
    f"ENVID={'a' * 101}": "501 5.5.4",
    "ENVID=a ENVID=a": "501 5.5.4",
    "SMTPUTF8=yes": "501 5.5.4",
    "SMTPUTF8 SMTPUTF8": "501 5.5.4",
    "AUTH=<>": "555 5.5.4",  # there is no AUTH here
    "XVERP": "555 5.5.4",
    "NOTIFY=NEVER": "555 5.5.4",
    "X": "555 5.5.4",
    "=1": "501 5.5.4",
    "SIZE=1 =": "501 5.5.4",
    "SIZE = 1": "501 5.5.4",
}

RCPT_PARAMETERS: Final = {
    "NOTIFY=NEVER,SUCCESS": "501 5.5.4",
    "NOTIFY=": "501 5.5.4",
    "NOTIFY": "501 5.5.4",
    "NOTIFY=,": "501 5.5.4",
    "NOTIFY=SOMETIMES": "501 5.5.4",
    "NOTIFY=SUCCESS NOTIFY=FAILURE": "501 5.5.4",
    "ORCPT=": "501 5.5.4",
    "ORCPT=rfc822": "501 5.5.4",
    "ORCPT=;a@b": "501 5.5.4",
    "ORCPT=rfc822;": "501 5.5.4",
    "ORCPT=rfc822;a+0Ab": "501 5.5.4",
    "ORCPT=rfc822;a=b": "501 5.5.4",
    f"ORCPT=rfc822;{'a' * 500}": "501 5.5.4",
    "ORCPT=rfc822;a ORCPT=rfc822;b": "501 5.5.4",
    "SIZE=1": "555 5.5.4",
    "AUTH=<>": "555 5.5.4",
    "X-NOTIFY=NEVER": "555 5.5.4",
}


def test_s_pa8_to_9_parameters_that_are_none_change_nothing(site: Site, client: Client) -> None:
    client.begin(EHLO)
    for parameter, answer in MAIL_PARAMETERS.items():
        assert client.say(f"{MAIL} {parameter}")[:9] == answer, parameter
        assert client.say(RCPT)[:9] == "503 5.5.1", parameter
    assert client.say(MAIL).startswith("250 ")
    for parameter, answer in RCPT_PARAMETERS.items():
        assert client.say(f"{RCPT} {parameter}")[:9] == answer, parameter
        assert client.say("DATA")[:9] == "554 5.5.1", parameter
    assert client.say(RCPT).startswith("250 ")
    assert deliver(client).startswith("250 ")
    envelope = only(site).envelope
    assert (envelope.ret, envelope.envid, envelope.body, envelope.smtputf8) == ("", "", "", False)
    assert (envelope.recipients[0].notify, envelope.recipients[0].orcpt) == ((), "")


def test_s_pa8_a_declaration_binds_nobody(tmp_path: Path) -> None:
    """Less than comes is no fault by itself; what comes is counted, and the limit is the limit whatever was declared."""
    with Site(tmp_path, limits={"message_size": 65536}, deliver=False) as site, Client(site.address()) as client:
        client.begin(EHLO)
        for declared, size, answer in (
            (0, 1000, "250 2.0.0"),
            (1, 65536, "250 2.0.0"),
            (65536, 1000, "250 2.0.0"),
            (1, 65538, "552 5.3.4"),
            (65536, 500_000, "552 5.3.4"),
        ):
            assert client.say(f"{MAIL} SIZE={declared}").startswith("250 ")
            assert client.say(RCPT).startswith("250 ")
            assert deliver(client, b"x" * (size - 2) + b"\r\n")[:9] == answer, (declared, size)
            for message in harvest(site, 1) if answer.startswith("250 ") else harvest(site, 0):
                assert message.content.endswith(b"\nxx" + b"x" * (size - 4) + b"\r\n")
