"""What our own people hand in: Date: and Message-ID:, the author, and line ends."""

from __future__ import annotations

from email import message_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.address import Address
from mtad.session.submission import HEADER_LIMIT, NOT_YOURS, TOO_LONG, SubmittedHeader, parse_author
from tests.dialogue_engine import Engine, MemoryLogins, octets, whole
from tests.unit.test_session_chunks import bdat

ALICE = Address("alice", "example.org")
DATE, ID = "Tue, 14 Nov 2023 22:13:20 +0000", "<1@mx.example.org>"
ADDED = f"Date: {DATE}\r\nMessage-ID: {ID}\r\n".encode()


def through(
    content: bytes, size: int | None = None, date: str = DATE, message_id: str = ID
) -> tuple[bytes, SubmittedHeader]:
    header = SubmittedHeader(lambda address: address == ALICE, date, message_id)
    size = size or max(len(content), 1)
    kept = b"".join(header.feed(content[at : at + size]) for at in range(0, len(content), size))
    return kept + header.finish(), header


@pytest.mark.parametrize("size", [1, 2, 3, None])
@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"Subject: x\r\n\r\nbody\r\n", b"Subject: x\r\n" + ADDED + b"\r\nbody\r\n"),
        (b"Subject: x\r\n folded\r\n\tmore\r\n\r\n", b"Subject: x\r\n folded\r\n\tmore\r\n" + ADDED + b"\r\n"),
        (b"DATE: x\r\n\r\nbody", f"DATE: x\r\nMessage-ID: {ID}\r\n\r\nbody".encode()),
        (b"message-id : <x@y>\r\n\r\n", f"message-id : <x@y>\r\nDate: {DATE}\r\n\r\n".encode()),
        (b"Date: x\r\nMessage-ID:\r\n <x@y>\r\n\r\nDate: z\r\n", b"Date: x\r\nMessage-ID:\r\n <x@y>\r\n\r\nDate: z\r\n"),
        (b"", ADDED),
        (b"Subject: x\r\n", b"Subject: x\r\n" + ADDED),
        (b"\r\nDate: in the body\r\n", ADDED + b"\r\nDate: in the body\r\n"),
        (b"no header at all\r\n", ADDED + b"\r\nno header at all\r\n"),
        (b"Subject: x\r\nno field\r\n", b"Subject: x\r\n" + ADDED + b"\r\nno field\r\n"),
        (b" folded from nothing\r\n", ADDED + b"\r\n folded from nothing\r\n"),
        (b"X-Date: x\r\n\r\n", b"X-Date: x\r\n" + ADDED + b"\r\n"),
    ],
)
def test_what_is_added_rfc_6409(content: bytes, kept: bytes, size: int | None) -> None:
    assert through(content, size)[0] == kept


def test_nothing_is_added_where_nothing_is_wanted() -> None:
    content = b"Subject: x\r\n\r\nbody\r\n"
    assert through(content, date="", message_id="")[0] == content


@pytest.mark.parametrize(
    "value",
    [
        "alice@example.org",
        "<alice@example.org>",
        "Alice <alice@example.org>",
        "  Alice  B. Smith\r\n <alice@example.org> ",
        '"Smith, Alice <x@y>; (z)" <alice@example.org>',
        '"a\\"b" <ALICE@example.org>',
        "=?utf-8?q?=C3=A9?= <alice@example.org>",
        "Al\u00edce \u00dc <alice@example.org>",
        "alice@example.org (Alice, from <x@y>)",
        "(a) Alice (b) <alice@example.org> (c)",
        "Alice (\\) x) <alice@example.org>",
    ],
)
def test_one_author(value: str) -> None:
    author = parse_author(f" {value}".encode())
    assert author is not None
    assert author.key == "alice@example.org"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "alice",
        "alice@example.org, bob@example.org",
        "<alice@example.org>, <bob@example.org>",
        "<alice@example.org> <bob@example.org>",
        "bob@example.org <alice@example.org>",
        "Alice <alice@example.org> bob@example.org",
        "alice@example.org bob@example.org",
        "friends: alice@example.org;",
        "undisclosed-recipients:;",
        "<alice@example.org",
        "alice@example.org>",
        "<<alice@example.org>>",
        "<@evil.example:alice@example.org>",
        "<>",
        '"alice <alice@example.org>',
        "(alice <alice@example.org>",
        "Alice ((nested)) <alice@example.org>",
        "alice@example.org\0",
        "alice@example.org;bob@example.org",
        "[x] <alice@example.org>",
    ],
)
def test_what_is_read_in_two_ways_s_en5(value: str) -> None:
    assert parse_author(f" {value}".encode()) is None


def test_not_utf8_is_no_author_s_en5() -> None:
    assert parse_author(b"\xff <alice@example.org>") is None


@pytest.mark.parametrize("size", [1, None])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"Subject: x\r\n\r\nFrom: bob@example.org\r\n", None),
        (b"From: alice@example.org\r\n\r\n", None),
        (b"From: bob@example.org\r\n\r\n", NOT_YOURS),
        (b"from :\r\n bob@example.org\r\n\r\n", NOT_YOURS),
        (b"From: alice@example.org\r\nFrom: alice@example.org\r\n\r\n", NOT_YOURS),
        (b"From: alice@example.org\r\nFROM: bob@example.org\r\n", NOT_YOURS),
        (b"From: alice@example.org,\r\n bob@example.org\r\n\r\n", NOT_YOURS),
        (b"X: y\r\n" * 60_000, TOO_LONG),
        (b"X: " + b"y" * HEADER_LIMIT, TOO_LONG),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_faults_s_en5(content: bytes, fault: object, size: int | None) -> None:
    kept, header = through(content, size if len(content) < 1000 else 4096, date="", message_id="")
    assert header.fault is fault
    assert kept == content


lines = st.sampled_from(
    [b"From: a@b\r\n", b"Date: x\r\n", b" folded\r\n", b"\r\n", b"text\r\n", b"a:b\r\n", b"\r", b"\n", b":\r\n", b"x"]
)


@given(st.lists(lines, max_size=12).map(b"".join), st.integers(1, 9))
def test_any_header_however_it_is_cut(content: bytes, size: int) -> None:
    """Invariant: the content with whole lines added, in one place, and the same whatever the cuts."""
    kept, header = through(content, size)
    assert (kept, header.fault) == (through(content)[0], through(content)[1].fault)
    date, message_id = ADDED.splitlines(keepends=True)
    additions = [one + two + blank for one in (b"", date) for two in (b"", message_id) for blank in (b"", b"\r\n")]
    assert any(kept == content[:at] + added + content[at:] for at in range(len(content) + 1) for added in additions)


# -- on a session ---------------------------------------------------------------------------------------------------------

LOGIN = "AUTH PLAIN AGFsaWNlAG9wZW4gc2VzYW1l"


def submit(engine: Engine, content: bytes, *, chunks: bool = False) -> str:
    engine.say("EHLO c", LOGIN, "MAIL FROM:<alice@example.org>", "RCPT TO:<bob@example.org>")
    if chunks:
        engine._unread = b""
        engine.send(bdat(content[:3], content[3:]))
        return engine._unread.decode().splitlines()[-1]
    assert engine.say("DATA")[0].startswith("354")
    engine._unread = b""
    engine.send(content + b".\r\n")
    return engine._unread.decode().splitlines()[-1]


def site(service: str = "submission", **settings: object) -> Engine:
    return Engine(service, logins=MemoryLogins(), auth_without_tls=True, **settings)  # type: ignore[arg-type]


def own_field_off(engine: Engine) -> bytes:
    (entry,) = engine.spool.committed
    return entry.content.partition(b"; ")[2].partition(b"\r\n")[2]


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("cut", [whole, octets])
def test_submission_completes(chunks: bool, cut: object) -> None:
    engine = site(cut=cut)
    assert submit(engine, b"From: alice@example.org\r\nSubject: x\r\n\r\nbody\r\n", chunks=chunks).startswith("250 2.0.0")
    message = message_from_bytes(own_field_off(engine))
    assert message.keys() == ["From", "Subject", "Date", "Message-ID"]
    assert message["Message-ID"] == "<20231114221320.ID0001@mx.example.org>"
    assert message.get_payload() == "body\r\n"
    assert engine.log.events == ["accepted ID0001 size 45 nrcpt 1 id <20231114221320.ID0001@mx.example.org>"]


@pytest.mark.parametrize("service", ["mx", "submission"])
@pytest.mark.parametrize("chunks", [False, True])
def test_nobody_writes_in_anothers_name_s_en5(service: str, chunks: bool) -> None:
    """CVE-2024-7208: the envelope is right and the header is not."""
    for author in ("bob@example.org", "alice@example.org, bob@example.org", "ceo@example.com"):
        engine = site(service)
        answer = submit(engine, f"From: {author}\r\n\r\nbody\r\n".encode(), chunks=chunks)
        assert answer == "550 5.7.1 Error: From: must be one address of the authenticated user"
        assert engine.spool.committed == []


def test_a_stranger_is_not_looked_after() -> None:
    """RFC 6409 section 8: what only passes through is not changed."""
    engine = Engine()
    engine.say("EHLO c", "MAIL FROM:<x@example.net>", "RCPT TO:<bob@example.org>", "DATA", "From: any@example.com", ".")
    assert own_field_off(engine) == b"From: any@example.com\r\n"


def test_a_header_without_end_costs_no_memory() -> None:
    engine = site()
    assert submit(engine, b"X: " + b"y" * 300_000 + b"\r\n").startswith("552 5.3.4 Error: header")
    assert engine.spool.open_entries == []


@pytest.mark.parametrize("cut", [whole, octets])
@pytest.mark.parametrize("chunks", [False, True])
def test_bare_line_ends_of_our_own_people_are_mended(chunks: bool, cut: object) -> None:
    content = b"Date: x\r\nMessage-ID: <a@b>\r\n\r\na\nb\rc\r\r\nd\n\n.\ne\r\n"
    engine = site(bare_line_ends="normalize", cut=cut)
    assert submit(engine, content, chunks=chunks).startswith("250 2.0.0")
    assert own_field_off(engine) == b"Date: x\r\nMessage-ID: <a@b>\r\n\r\na\r\nb\r\nc\r\n\r\nd\r\n\r\n.\r\ne\r\n"
    assert submit(site(cut=cut), content, chunks=chunks).startswith("550 5.5.2")


def test_bare_line_ends_of_strangers_are_refused_all_the_same_sm() -> None:
    engine = Engine(bare_line_ends="normalize")
    engine.say("EHLO c", "MAIL FROM:<x@example.net>", "RCPT TO:<bob@example.org>", "DATA")
    engine._unread = b""
    engine.send(b"a\nb\r\n.\r\n")
    assert engine._unread.startswith(b"550 5.5.2")
    trusted = Engine("relay", bare_line_ends="normalize")
    trusted.say("EHLO c", "MAIL FROM:<x@example.net>", "RCPT TO:<bob@example.org>", "DATA")
    trusted.send(b"a\n.\nMAIL FROM:<smuggled@a>\nb\r\n.\r\n")
    assert own_field_off(trusted) == b"a\r\n.\r\nMAIL FROM:<smuggled@a>\r\nb\r\n"
