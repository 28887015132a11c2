"""Delivery status notifications, read back by the standard library's parser."""

from __future__ import annotations

import email
import email.policy
import re
from email.message import EmailMessage
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtad import dsn
from mtad.dsn import double_bounce, report
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Failed, Outcome

NOW = 1_700_000_000.0
MESSAGE = Envelope("4bVQkR2JbSz9bc", NOW - 60, "alice@a.example", (Recipient("bob@b.example"), Recipient("eve@c.example")))
REMOTE = Failed(
    "5.1.1",
    "host mx.b.example[192.0.2.1] said: 550 5.1.1 No such user",
    remote="mx.b.example",
    reply="550 5.1.1 No such user",
)
OURS = Failed("4.4.7", "message expired after 5 days; last: connect to mx.c.example[192.0.2.2]:25: Connection refused")
FAILURES = [(MESSAGE.recipients[0], REMOTE), (MESSAGE.recipients[1], OURS)]
HEADERS = b"Received: from x\r\n\tby y\r\nMessage-ID: <1@a.example>\r\nSubject: hello\r\n\r\nthe body stays here\r\n"


def build(
    failures: list[tuple[Recipient, Outcome]] | None = None, headers: bytes = HEADERS, envelope: Envelope = MESSAGE
) -> bytes:
    return report(
        envelope, FAILURES if failures is None else failures, headers, hostname="mx.example.org", now=NOW, report_id="R1"
    )


def read(data: bytes) -> tuple[EmailMessage, EmailMessage, list[EmailMessage], str]:
    """The report, its text part, the blocks of its status part, and the original's header."""
    message = email.message_from_bytes(data, policy=email.policy.default)
    assert message.get_content_type() == "multipart/report"
    assert [part.defects for part in message.walk()] == [[] for _ in message.walk()]
    parts = cast(list[EmailMessage], message.get_payload())
    kinds = [part.get_content_type() for part in parts]
    assert kinds == ["text/plain", "message/delivery-status", "text/rfc822-headers"]
    original = cast(bytes, parts[2].get_payload(decode=True)).decode("latin-1")
    return message, parts[0], cast(list[EmailMessage], parts[1].get_payload()), original


def check_wire(data: bytes) -> None:
    """What holds for every report: 7-bit, CRLF, bounded lines."""
    lines = data.split(b"\r\n")
    assert lines[-1] == b""
    assert all(re.fullmatch(rb"[\t -~]{0,998}", line) for line in lines)


def test_the_report_as_a_whole() -> None:
    data = build()
    check_wire(data)
    message, text, status, original = read(data)
    assert {name: str(message[name]) for name in ("From", "To", "Subject", "Auto-Submitted", "MIME-Version", "Date")} == {
        "From": "MAILER-DAEMON@mx.example.org",
        "To": "alice@a.example",
        "Subject": "Undelivered Mail Returned to Sender",
        "Auto-Submitted": "auto-replied",
        "MIME-Version": "1.0",
        "Date": "Tue, 14 Nov 2023 22:13:20 +0000",
    }
    assert b"\r\nFrom: MAILER-DAEMON@mx.example.org (Mail Delivery System)\r\n" in data
    assert message["Message-ID"] == "<R1@mx.example.org>"
    assert message["In-Reply-To"] == "<1@a.example>"
    assert message.get_param("report-type") == "delivery-status"
    words = text.get_content().replace("\r\n", "\n")
    assert "<bob@b.example>\n    There is no mailbox with this name.\n    The server mx.b.example said: 550 5.1.1" in words
    assert "<eve@c.example>\n    Delivery was tried for a long time without success" in words
    assert "(message expired after 5 days; last: connect to" in words
    assert [dict(block.items()) for block in status] == [
        {
            "Reporting-MTA": "dns; mx.example.org",
            "X-Mtad-Queue-ID": "4bVQkR2JbSz9bc",
            "X-Mtad-Sender": "rfc822; alice@a.example",
            "Arrival-Date": "Tue, 14 Nov 2023 22:12:20 +0000",
        },
        {
            "Final-Recipient": "rfc822; bob@b.example",
            "Action": "failed",
            "Status": "5.1.1",
            "Remote-MTA": "dns; mx.b.example",
            "Diagnostic-Code": "smtp; 550 5.1.1 No such user",
        },
        {
            "Final-Recipient": "rfc822; eve@c.example",
            "Action": "failed",
            "Status": "4.4.7",
            "Diagnostic-Code": f"x-mtad; {OURS.text}",
        },
    ]
    assert original == "Received: from x\r\n\tby y\r\nMessage-ID: <1@a.example>\r\nSubject: hello\r\n"
    assert b"the body stays here" not in data


def test_double_bounce_goes_to_postmaster() -> None:
    bounce = Envelope("B1", NOW, "", (Recipient("alice@a.example"),), kind="bounce")
    data = double_bounce(
        bounce, [(bounce.recipients[0], REMOTE)], HEADERS, hostname="mx.example.org", now=NOW, report_id="R2"
    )
    check_wire(data)
    message, text, status, _ = read(data)
    assert message["To"] == "postmaster@mx.example.org"
    assert message["Subject"] == "Postmaster notice: undeliverable report"
    assert message["Auto-Submitted"] == "auto-generated"
    assert "could not be delivered itself" in text.get_content()
    assert "X-Mtad-Sender" not in status[0]
    assert status[1]["Final-Recipient"] == "rfc822; alice@a.example"


@pytest.mark.parametrize(
    "evil",
    [
        "550 no\r\nBcc: victim@v.example",
        "550 no\r\n\r\n--=_0_R1/mx.example.org--\r\n",
        "550 --=_0_R1/mx.example.org",
        "550 \0\x1b[2J\x7f",
        "550 é\u2028ü",
        "550 " + "x" * 5000,
        "\ud800",
    ],
)
def test_q4_replies_are_data(evil: str) -> None:
    data = build([(Recipient("bob@b.example"), Failed("5.0.0", evil, remote=evil, reply=evil))])
    check_wire(data)
    message, _, status, _ = read(data)
    assert len(status) == 2
    assert status[1].keys() == ["Final-Recipient", "Action", "Status", "Remote-MTA", "Diagnostic-Code"]
    assert message["Bcc"] is None


@pytest.mark.parametrize(
    "headers",
    [
        b"X: 1\r\n\r\n--=_0_R1/mx.example.org--\r\n",
        b"--=_0_R1/mx.example.org\r\nContent-Type: text/html\r\n",
        b"--=_0_R1/mx.example.org--\r\n--=_1_R1/mx.example.org\r\n--=_3_R1/mx.example.org\r\n",
    ],
)
def test_q4_the_boundary_stands_in_no_part(headers: bytes) -> None:
    data = build(headers=headers)
    message, _, _, original = read(data)
    assert data.count(f"--{message.get_boundary()}".encode()) == 4
    assert original.encode() == headers.split(b"\r\n\r\n")[0] + (b"\r\n" if b"\r\n\r\n" in headers else b"")


def test_q4_8_bit_text_is_kept_for_people_and_safe_for_programs() -> None:
    outcome = Failed("5.7.1", "abgelehnt: ungültig", remote="mx.b.example", reply="550 5.7.1 ungültig")
    data = build([(Recipient("jörg+a@b.example"), outcome)])
    check_wire(data)
    _, text, status, _ = read(data)
    assert "<jörg+a@b.example>" in text.get_content()
    assert "said: 550 5.7.1 ungültig" in text.get_content()
    assert status[1]["Final-Recipient"] == "utf-8; j\\x{F6}rg\\x{2B}a@b.example"
    assert status[1]["Diagnostic-Code"] == "smtp; 550 5.7.1 ung?ltig"


def test_odd_headers_come_back_as_they_were() -> None:
    headers = b"Subject: caf\xe9\x00\rx\ny\r\n" + b"X-Long: " + b"y" * 3000 + b"\r\n.\r\nEnd: blank \r\n"
    data = build(headers=headers)
    check_wire(data)
    assert read(data)[3].encode("latin-1") == headers


def test_the_original_is_cut_at_a_line() -> None:
    line = b"X-Filler: " + b"z" * 88 + b"\r\n"
    original = read(build(headers=line * 1000))[3].encode()
    assert len(original) == dsn.MAX_HEADERS // len(line) * len(line)
    assert original == line * (len(original) // len(line))
    assert len(read(build(headers=b"z" * 90_000))[3]) == dsn.MAX_HEADERS + 2


@pytest.mark.parametrize("headers", [b"", b"\r\nbody\r\n", b"\r\n"])
def test_no_header_at_all(headers: bytes) -> None:
    data = build(headers=headers)
    assert read(data)[3].strip() == ""
    assert b"body" not in data


def test_q3_a_report_about_thousands_is_bounded_and_names_all() -> None:
    recipients = tuple(Recipient(f"user{number}@{'d' * 60}.example") for number in range(5000))
    envelope = Envelope("ID", NOW, "a@b.example", recipients)
    outcome = Failed("5.1.1", "x" * 1000, remote="m" * 300, reply="y" * 1000)
    data = build([(recipient, outcome) for recipient in recipients], envelope=envelope)
    check_wire(data)
    assert len(data) < 1_000_000
    _, text, status, _ = read(data)
    assert [block["Final-Recipient"] for block in status[1:]] == [f"rfc822; {entry.address}" for entry in recipients]
    assert "Diagnostic-Code" in status[1]
    assert "Diagnostic-Code" not in status[-1]
    assert text.get_content().count("@") < 100
    assert "and 4950 more" in text.get_content()


@pytest.mark.parametrize(
    "line",
    [
        b"Message-ID: <a@b>\x00",
        b"Message-ID: a@b",
        b"Message-ID: <" + b"x" * 300 + b">",
        b"X-Message-ID: <a@b>",
        b"Message-ID:",
    ],
)
def test_a_message_id_that_is_none_is_not_repeated(line: bytes) -> None:
    assert read(build(headers=b"A: b\r\n" + line + b"\r\n"))[0]["In-Reply-To"] is None


def test_a_folded_message_id_is_found() -> None:
    assert read(build(headers=b"A: b\r\nMESSAGE-ID:\r\n <a@b>\r\n"))[0]["In-Reply-To"] == "<a@b>"


def test_a_status_of_another_form_does_not_get_out() -> None:
    assert read(build([(Recipient("a@b"), Failed("nonsense", "x"))]))[2][1]["Status"] == "5.0.0"


@settings(max_examples=100)
@given(st.text(max_size=200), st.text(max_size=80), st.text(max_size=80), st.binary(max_size=300))
def test_q4_whatever_comes_from_outside_the_form_stands(reply: str, remote: str, address: str, headers: bytes) -> None:
    # Invariant: 7-bit lines of bounded length, three parts, one block per recipient, no field but ours.
    data = build([(Recipient(address), Failed("5.0.0", reply, remote, reply))] * 2, headers)
    check_wire(data)
    top = data[: data.index(b"\r\n\r\n")]
    names = [line.split(b":")[0] for line in top.split(b"\r\n") if not line.startswith(b" ")]
    assert set(names) <= {
        *(b"Date", b"From", b"To", b"Subject", b"Auto-Submitted", b"In-Reply-To", b"Message-ID", b"MIME-Version"),
        b"Content-Type",
    }
    blocks = data.split(b"message/delivery-status\r\n\r\n")[1].split(b"\r\n--=_")[0].split(b"\r\n\r\n")
    assert len(blocks) == 3
    assert all(block.startswith(b"Final-Recipient: ") for block in blocks[1:])
