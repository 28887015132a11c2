"""What the next hop offers is used, what it lacks is made up for, what it limits is kept to: against scripted servers."""

from __future__ import annotations

import email
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from mtad.envelope import Recipient
from mtad.outcome import Deferred, Delivered, Failed
from mtad.smtp.client import PIECE
from tests.peers.mx import CLOSE, RESET, Action, Say, Script
from tests.peers.outbound import BODY, Site, only

RECEIVED = b"Received: from a (b [192.0.2.1]) by me.test\r\n"
MESSAGE = RECEIVED + BODY


@pytest.fixture
def site() -> Iterator[Site]:
    with ExitStack() as stack:
        site = Site(stack)
        site.domain("127.0.0.5")
        yield site


def offer(*extensions: str, **script: object) -> Script:
    return Script(**{"extensions": extensions, **script})  # type: ignore[arg-type]  # a test's own words


# --- CHUNKING -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelining", [True, False])
def test_chunking_sends_the_first_line_ahead_and_then_the_rest(site: Site, pipelining: bool) -> None:
    mx = site.mx(script=offer("CHUNKING", *["PIPELINING"] * pipelining))
    outcomes = site.send("b@x.test", "c@x.test", body=MESSAGE)
    assert all(isinstance(outcome, Delivered) for outcome in outcomes.values())
    message = mx.messages[-1]
    assert message.content == MESSAGE
    assert message.chunks == [len(RECEIVED), len(MESSAGE) - len(RECEIVED)]
    assert "DATA" not in mx.verbs()


def test_a_content_without_a_header_goes_by_data(site: Site) -> None:
    mx = site.mx(script=offer("CHUNKING"))
    for body in (b"", b"\r\nMAIL FROM:<x@y>\r\n", b"MAIL FROM:<x@y>\r\n", b"x" * 1500 + b": y\r\n\r\n"):
        assert isinstance(only(site.send(body=body)), Delivered)
    assert all(not message.chunks for message in mx.messages)


@pytest.mark.parametrize("size", [0, 1, PIECE - 200, PIECE, PIECE + 1, 3 * PIECE])
def test_chunks_of_any_size_arrive_whole(site: Site, size: int) -> None:
    mx = site.mx(script=offer("CHUNKING", "PIPELINING"))
    body = RECEIVED + b".\r\n" * (size // 3) + b"\r\n"
    site.send(body=body)
    assert mx.messages[0].content == body
    assert mx.bare == []


def test_bdat_the_end_waits_until_the_doubt_is_recorded(site: Site) -> None:
    mx = site.mx(script=offer("CHUNKING", "PIPELINING"))
    body = RECEIVED + b"x" * 70 + b"\r\n" * 50_000
    seen: list[int] = []
    site.on_doubt = lambda: seen.append(sum(len(data) for _, data in mx.reads))
    site.send(body=body)
    assert site.doubts == ["mx1.x.test"]
    assert seen[0] < len(body)
    assert mx.messages[0].content == body


def test_bdat_no_reply_to_the_last_chunk_is_not_tried_elsewhere_at_once(site: Site) -> None:
    site.domain("127.0.0.5", "127.0.0.6")
    site.mx(script=offer("CHUNKING", dot=CLOSE))
    second = site.mx("127.0.0.6")
    assert isinstance(only(site.send(body=MESSAGE)), Deferred)
    assert second.connections == 0


@pytest.mark.parametrize("reply", ["552 5.3.4 too big", "451 4.3.0 disk full"])
@pytest.mark.parametrize("where", ["bdat", "dot"])
def test_bdat_refused_is_the_verdict(site: Site, reply: str, where: str) -> None:
    mx = site.mx(script=offer("CHUNKING", "PIPELINING", **{where: Say(reply)}))
    outcome = only(site.send(body=MESSAGE))
    assert isinstance(outcome, Failed if reply.startswith("5") else Deferred)
    assert outcome.reply == reply
    mx.script = offer("CHUNKING", "PIPELINING")
    assert isinstance(only(site.send(body=MESSAGE)), Delivered)
    assert mx.connections == 1  # with a RSET in between where one is needed


def test_bdat_with_no_recipient_left_is_undone_by_rset(site: Site) -> None:
    mx = site.mx(script=offer("CHUNKING", "PIPELINING", rcpt=Say("550 5.1.1 no")))
    assert isinstance(only(site.send(body=MESSAGE)), Failed)
    mx.script = offer("CHUNKING", "PIPELINING")
    assert isinstance(only(site.send(body=MESSAGE)), Delivered)
    assert mx.verbs() == ["EHLO", "MAIL", "RCPT", "BDAT", "RSET", "MAIL", "RCPT", "BDAT", "BDAT"]


def test_binarymime_goes_as_it_is_where_it_may(site: Site) -> None:
    body = RECEIVED + b"Content-Transfer-Encoding: binary\r\nContent-Type: a/b\r\n\r\n\n.\r\n\0\xff\r" + b"\n" * 2000
    mx = site.mx(script=offer("CHUNKING", "BINARYMIME", "8BITMIME"))
    assert isinstance(only(site.send(body=body, declared="binarymime")), Delivered)
    assert mx.messages[0].content == body
    assert mx.messages[0].mail.endswith(" BODY=BINARYMIME")


@pytest.mark.parametrize("extensions", [("CHUNKING", "8BITMIME"), ("BINARYMIME", "8BITMIME"), ("8BITMIME",), ()])
def test_binarymime_is_encoded_where_it_may_not(site: Site, extensions: tuple[str, ...]) -> None:
    raw = b"\n.\r\n\0\xff\r" + b"\n" * 2000
    body = RECEIVED + b"MIME-Version: 1.0\r\nContent-Transfer-Encoding: binary\r\nContent-Type: a/b\r\n\r\n" + raw
    mx = site.mx(script=offer(*extensions))
    assert isinstance(only(site.send(body=body, declared="binarymime")), Delivered)
    assert "BINARYMIME" not in mx.messages[0].mail
    assert mx.bare == []
    assert email.message_from_bytes(mx.messages[0].content).get_payload(decode=True) == raw


# --- 8BITMIME, SIZE, SMTPUTF8 -------------------------------------------------------------------------------------------


def test_8bit_is_converted_for_a_hop_without_8bitmime(site: Site) -> None:
    mx = site.mx(script=offer("SIZE"))
    body = (
        RECEIVED
        + b"Subject: x\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n"
        + "h\u00e4\r\n".encode()
    )
    assert isinstance(only(site.send(body=body)), Delivered)
    message = mx.messages[0]
    assert message.content.isascii()
    assert message.mail == f"FROM:<a@me.test> SIZE={len(message.content)}"
    parsed = email.message_from_bytes(message.content)
    assert parsed.get_payload(decode=True) == "h\u00e4\r\n".encode()


def test_a_large_8bit_message_is_converted_too(site: Site) -> None:
    mx = site.mx(script=offer("SIZE", "CHUNKING"))
    text = "gr\u00fc\u00dfe \u20ac\r\n".encode() * 100_000
    site.send(body=RECEIVED + b"Content-Type: text/plain; charset=utf-8\r\n\r\n" + text)
    (message,) = mx.messages
    assert sum(message.chunks) == len(message.content)
    assert email.message_from_bytes(message.content).get_payload(decode=True) == text


def test_a_message_that_cannot_be_converted_fails(site: Site) -> None:
    mx = site.mx(script=offer())
    nested = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n) for n in range(200))
    outcome = only(site.send(body=nested + b"\r\n\xff\r\n"))
    assert isinstance(outcome, Failed)
    assert outcome.status == "5.6.3"
    assert mx.messages == []


def test_the_same_message_is_converted_once_and_for_each_host_as_it_needs(site: Site) -> None:
    site.domain("127.0.0.5", "127.0.0.6")
    body = RECEIVED + b"\r\n\xff\r\n"
    first = site.mx(script=offer("8BITMIME", dot=Say("451 4.3.0 later")))
    second = site.mx("127.0.0.6", offer())
    assert isinstance(only(site.send(body=body)), Delivered)
    assert first.transactions[0].content == body
    assert second.messages[0].content.isascii()


@pytest.mark.parametrize("chunking", [[], ["CHUNKING"]])
def test_long_lines_are_never_sent(site: Site, chunking: list[str]) -> None:
    mx = site.mx(script=offer("8BITMIME", *chunking))
    text = b"x" * 998 + b"\r\n" + b"y" * 5000 + b"\r\n"
    site.send(body=RECEIVED + b"Subject: " + b"z " * 1000 + b"\r\n\r\n" + text)
    content = mx.messages[0].content
    assert max(map(len, content.split(b"\r\n"))) <= 998
    parsed = email.message_from_bytes(content)
    assert parsed.get_payload(decode=True) == text
    assert str(parsed["Subject"]).replace("\r\n", "").split() == ["z"] * 1000


@pytest.mark.parametrize("limit", ["SIZE 60", f"SIZE {len(MESSAGE) - 1}"])
def test_a_message_that_is_too_large_is_not_sent(site: Site, limit: str) -> None:
    mx = site.mx(script=offer(limit, "PIPELINING"))
    outcome = only(site.send(body=MESSAGE))
    number = limit.split()[1]
    assert outcome == Failed(
        "5.3.4",
        f"message size {len(MESSAGE)} exceeds size limit {number} of server mx1.x.test[127.0.0.5]",
        "mx1.x.test",
    )
    assert mx.verbs() == ["EHLO"]
    assert site.attempts[0].host == "mx1.x.test"


@pytest.mark.parametrize(
    "limit", ["SIZE", "SIZE 0", f"SIZE {len(MESSAGE)}", "SIZE -1", "SIZE many", f"SIZE {'9' * 30}", "SIZE 1e2"]
)
def test_d10_a_size_that_says_nothing_is_no_limit(site: Site, limit: str) -> None:
    site.mx(script=offer(limit))
    assert isinstance(only(site.send(body=MESSAGE)), Delivered)


def test_smtputf8_is_used_where_it_is_needed(site: Site) -> None:
    mx = site.mx(script=offer("SMTPUTF8", "8BITMIME", "PIPELINING"))
    outcomes = site.send("b@x.test", "\u00fc@x.test")
    assert all(isinstance(outcome, Delivered) for outcome in outcomes.values())
    assert mx.messages[0].mail == "FROM:<a@me.test> SMTPUTF8"
    assert mx.messages[0].recipients == ["b@x.test", "\u00fc@x.test"]
    site.send("b@x.test")
    assert mx.messages[1].mail == "FROM:<a@me.test>"


def test_without_smtputf8_only_what_needs_it_fails(site: Site) -> None:
    mx = site.mx(script=offer("8BITMIME"))
    outcomes = site.send("b@x.test", "\u00fc@x.test")
    assert outcomes["\u00fc@x.test"] == Failed(
        "5.6.7", "SMTPUTF8 is required, but was not offered by host mx1.x.test[127.0.0.5]", "mx1.x.test"
    )
    assert isinstance(outcomes["b@x.test"], Delivered)
    assert mx.messages[0].recipients == ["b@x.test"]


@pytest.mark.parametrize(
    ("sender", "flag", "subject", "status"),
    [
        ("\u00fc@me.test", False, "x", "5.6.7"),
        ("a@me.test", True, "\u00fc", "5.6.7"),
        ("a@me.test", True, "x", "2.0.0"),
        ("a@me.test", False, "\u00fc", "2.0.0"),
    ],
)
def test_without_smtputf8_a_sender_or_header_that_needs_it_fails_for_all(
    site: Site, sender: str, flag: bool, subject: str, status: str
) -> None:
    mx = site.mx(script=offer("8BITMIME", "PIPELINING"))
    body = f"Subject: {subject}\r\n\r\n\u00fc\r\n".encode()
    outcomes = site.send("b@x.test", "c@x.test", sender=sender, body=body, smtputf8=flag)
    assert {outcome.status for outcome in outcomes.values()} == {status}
    assert bool(mx.messages) == (status == "2.0.0")
    site.make()
    mx.script = offer("8BITMIME", "SMTPUTF8")
    site.send("b@x.test", sender=sender, body=body, smtputf8=flag)
    assert mx.messages[-1].mail.endswith(" SMTPUTF8") == (status != "2.0.0")


@pytest.mark.parametrize("extensions", [(), ("SMTPUTF8", "8BITMIME")])
def test_idn_domains_go_out_as_a_labels(site: Site, extensions: tuple[str, ...]) -> None:
    mx = site.mx(script=offer(*extensions))
    outcomes = site.send("b@B\u00fccher.test", sender="a@stra\u00dfe.test")
    assert isinstance(only(outcomes), Delivered)
    assert (mx.messages[0].sender, mx.messages[0].recipients) == ("a@xn--strae-oqa.test", ["b@xn--bcher-kva.test"])
    assert "SMTPUTF8" not in mx.messages[0].mail


# --- DSN ----------------------------------------------------------------------------------------------------------------

WISHES = (
    Recipient("b@x.test", ("success", "delay"), "rfc822;b+x=1@old.test"),
    Recipient("c@x.test", ("never",)),
    Recipient("d@x.test", (), r"utf-8;\x{FC}@old.test"),
)


def test_dsn_is_passed_on(site: Site) -> None:
    mx = site.mx(script=offer("DSN", "PIPELINING"))
    outcomes = site.send(*WISHES, ret="hdrs", envid="a+b =\u007e")
    assert [isinstance(one, Delivered) and one.dsn for one in outcomes.values()] == [True] * 3
    lines = [line for _, line in mx.commands if line.startswith(("MAIL", "RCPT"))]
    assert lines == [
        "MAIL FROM:<a@me.test> RET=HDRS ENVID=a+2Bb+20+3D~",
        "RCPT TO:<b@x.test> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;b+2Bx+3D1@old.test",
        "RCPT TO:<c@x.test> NOTIFY=NEVER",
        r"RCPT TO:<d@x.test> ORCPT=utf-8;\x{FC}@old.test",
    ]


def test_dsn_is_not_passed_on_where_nobody_knows_it_and_the_outcome_says_so(site: Site) -> None:
    mx = site.mx(script=offer("PIPELINING"))
    outcomes = site.send(*WISHES, ret="full", envid="x")
    assert [isinstance(one, Delivered) and one.dsn for one in outcomes.values()] == [False] * 3
    assert {line for _, line in mx.commands if line.startswith("MAIL")} == {"MAIL FROM:<a@me.test>"}
    assert all(line.endswith("@x.test>") for _, line in mx.commands if line.startswith("RCPT"))


# --- LIMITS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reject", [False, True])
def test_rcptmax_cuts_a_message_into_transactions_over_one_connection(site: Site, reject: bool) -> None:
    rcpt = {"r1@x.test": Say("550 5.1.1 no"), "r3@x.test": Say("450 4.2.1 later")} if reject else None
    mx = site.mx(script=offer("LIMITS RCPTMAX=2", "PIPELINING", rcpt=rcpt))
    names = [f"r{number}@x.test" for number in range(5)]
    outcomes = site.send(*names)
    assert [len(one.rcpts) for one in mx.transactions] == [2, 2, 1]
    assert mx.connections == 1
    expected = ["2.0.0", "5.1.1", "2.0.0", "4.2.1", "2.0.0"] if reject else ["2.0.0"] * 5
    assert [outcomes[name].status for name in names] == expected
    assert len(site.attempts) == 3


@pytest.mark.parametrize("limits", ["MAILMAX=1 RCPTMAX=2", "mailmax=1 rcptmax=2", "X=y RCPTMAX=2 MAILMAX=1 Z"])
def test_mailmax_ends_a_session(site: Site, limits: str) -> None:
    mx = site.mx(script=offer(f"LIMITS {limits}", "PIPELINING"))
    names = [f"r{number}@x.test" for number in range(5)]
    outcomes = site.send(*names)
    assert {outcome.status for outcome in outcomes.values()} == {"2.0.0"}
    assert [(one.connection, len(one.rcpts)) for one in mx.transactions] == [(1, 2), (2, 2), (3, 1)]
    site.send()
    assert mx.connections == 4


def test_mailmax_of_a_kept_session_leaves_the_rest_to_a_new_one(site: Site) -> None:
    mx = site.mx(script=offer("LIMITS MAILMAX=2 RCPTMAX=1", "PIPELINING"))
    site.send("a@x.test")
    outcomes = site.send(*[f"r{number}@x.test" for number in range(4)])
    assert {outcome.status for outcome in outcomes.values()} == {"2.0.0"}
    assert [one.connection for one in mx.transactions] == [1, 1, 2, 2, 3]


def test_rcptdomainmax_keeps_domains_apart(site: Site) -> None:
    site.make(next_hop="[127.0.0.5]")
    mx = site.mx(script=offer("LIMITS RCPTDOMAINMAX=1", "PIPELINING"))
    site.send("a@x.test", "b@x.test", "c@y.test", "d@x.test")
    assert [one.recipients for one in mx.messages] == [["a@x.test", "b@x.test"], ["c@y.test"], ["d@x.test"]]


@pytest.mark.parametrize("action", [Say("421 4.3.2 down", close=True), CLOSE, RESET])
def test_who_was_not_named_when_the_server_went_has_an_outcome(site: Site, action: Action) -> None:
    site.domain("127.0.0.5", "127.0.0.6")
    usual = Say("250 2.1.0 Ok")
    site.mx(script=offer("LIMITS RCPTMAX=1", "PIPELINING", rcpt=[usual, action]))
    second = site.mx("127.0.0.6", offer("PIPELINING", rcpt={"r2@x.test": Say("450 4.2.1 later")}))
    outcomes = site.send("r0@x.test", "r1@x.test", "r2@x.test")
    assert [outcome.status for outcome in outcomes.values()] == ["2.0.0", "2.0.0", "4.2.1"]
    assert second.messages[0].recipients == ["r1@x.test"]


@pytest.mark.parametrize("limits", ["", "RCPTMAX", "RCPTMAX=0", "RCPTMAX=-1", "RCPTMAX=x", "MAILMAX=0", "RCPTMAX=99999999"])
def test_d10_limits_that_say_nothing_are_none(site: Site, limits: str) -> None:
    mx = site.mx(script=offer(f"LIMITS {limits}"))
    site.send("a@x.test", "b@x.test")
    assert len(mx.messages[0].recipients) == 2
