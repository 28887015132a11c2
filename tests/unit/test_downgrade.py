"""MIME messages made fit for 7 bit and short lines: what changes, what does not, and that nothing is lost."""

from __future__ import annotations

import email
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtad.smtp.downgrade import convert
from mtad.smtp.mime import DEPTH_LIMIT, FRAGMENT, TooDeep, parse
from mtad.smtp.outgoing import survey

MULTIPART = b"""\
Received: by me
MIME-Version: 1.0
Content-Type: multipart/mixed;
 boundary="b b"; x=y
Content-Transfer-Encoding: 8bit

preamble \xe9
--b b

plain \xc3\xa4 =
--b b\x20
Content-Type: application/pdf; name=x
Content-Transfer-Encoding: binary

\xff\0binary
--b b
Content-Transfer-Encoding: 7bit
Content-Type: text/plain

not touched \t
--b b
Content-Type: message/rfc822
Content-Transfer-Encoding: 8bit

Subject: inner \xc3\xbc
Content-Type: text/html; charset=latin1
Content-Transfer-Encoding: 8bit

<b>\xfc</b>
--b b--
epilogue
""".replace(b"\n", b"\r\n")


def converted(content: bytes, *, eight_bit: bool = False, step: int = 4096) -> bytes:
    def chunks() -> Iterator[bytes]:
        return iter([content[at : at + step] for at in range(0, len(content), step)])

    out = b"".join(convert(chunks, eight_bit=eight_bit))
    found = survey([out])
    assert found.clean
    assert not found.long_lines
    assert not found.nul
    assert eight_bit or not found.eight_bit
    return out


def leaves(content: bytes) -> list[tuple[str, bytes]]:
    """Type and decoded octets of each part."""
    parts = [part for part in email.message_from_bytes(content).walk() if not part.is_multipart()]
    return [(part.get_content_type(), bytes(part.get_payload(decode=True))) for part in parts]


def test_each_part_is_encoded_as_it_needs() -> None:
    out = converted(MULTIPART)
    assert leaves(out) == leaves(MULTIPART)
    parts = list(email.message_from_bytes(out).walk())
    assert [part["Content-Transfer-Encoding"] for part in parts] == [
        "7bit", "quoted-printable", "base64", "7bit", "7bit", "quoted-printable",
    ]  # fmt: skip
    assert parts[1]["Content-Type"] == "text/plain; charset=utf-8"
    assert b"\r\npreamble ?\r\n--b b\r\n" in out
    assert b"\r\n\r\nnot touched \t\r\n--b b\r\n" in out
    assert b"\r\nSubject: inner =?utf-8?B?w7w=?=\r\n" in out


def test_the_result_does_not_depend_on_the_cuts() -> None:
    whole = converted(MULTIPART)
    assert all(converted(MULTIPART, step=step) == whole for step in range(1, 80))


def test_a_part_that_needs_nothing_stays_as_it_is_to_the_octet() -> None:
    signed = (
        b"Content-Type: multipart/signed; boundary=s\r\nContent-Transfer-Encoding: 8bit\r\n\r\n--s\r\n"
        b"content-transfer-encoding:  8BIT\r\nX-Long: "
        + b"y" * 900
        + b"\r\n\r\nsigned \t\r\n--s\r\n\r\nsignature\r\n--s--\r\n"
    )
    mixed = b"Content-Type: multipart/mixed; boundary=m\r\n\r\n--m\r\n%b\r\n--m\r\n\r\n\xff\r\n--m--\r\n" % signed
    assert signed in converted(mixed)
    assert converted(signed) == signed


@pytest.mark.parametrize(("text", "charset"), [("gr\u00fc\u00dfe".encode(), "utf-8"), (b"gr\xfc\xdfe", "unknown-8bit")])
def test_text_that_is_not_mime_becomes_it(text: bytes, charset: str) -> None:
    out = converted(b"Subject: x\r\n\r\n" + text + b" \r\n.\r\n")
    message = email.message_from_bytes(out)
    assert message["MIME-Version"] == "1.0"
    assert message["Content-Type"] == f"text/plain; charset={charset}"
    assert message.get_payload(decode=True) == text + b" \r\n.\r\n"


def test_what_is_encoded_already_is_mended() -> None:
    quoted = b"Content-Transfer-Encoding: quoted-printable\r\n\r\n=C3\xa4 =\r\n" + b"z=3D" * 300 + b"\r\n"
    assert email.message_from_bytes(converted(quoted)).get_payload(decode=True) == b"\xc3\xa4 " + b"z=" * 300 + b"\r\n"
    base64 = b"Content-Transfer-Encoding: base64\r\n\r\naGVs\xff\r\nbG8=" + b" " * 2000 + b"\r\n"
    assert email.message_from_bytes(converted(base64)).get_payload(decode=True) == b"hello"


@pytest.mark.parametrize("kind", [b"text/plain", b"application/octet-stream"])
@pytest.mark.parametrize("size", [999, FRAGMENT - 1, FRAGMENT, FRAGMENT + 1, 3 * FRAGMENT + 5])
def test_a_line_of_any_length_is_kept(kind: bytes, size: int) -> None:
    body = b"a " * (size // 2) + b"=\t\r\nend\r\n"
    out = converted(b"Content-Type: " + kind + b"\r\n\r\n" + body, eight_bit=True)
    assert email.message_from_bytes(out).get_payload(decode=True) == body


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"Subject: \xc3\xbc", b"Subject: =?utf-8?B?w7w=?="),
        (b"Subject: a \xc3\xbc \xc3\xbc b", b"Subject: a =?utf-8?B?w7wgw7w=?= b"),
        (b"Subject: \xfc", b"Subject: =?unknown-8bit?B?/A==?="),
        (b"From: J\xc3\xbcrgen X <j@x>", b"From: =?utf-8?B?SsO8cmdlbg==?= X <j@x>"),
        (b"From: \"\xc3\xbc\" <j@x> (c\xc3\xbc)", b"From: \"=?utf-8?B?w7w=?=\" <j@x> (=?utf-8?B?Y8O8?=)"),
        (
            b"Subject: " + b"\xc3\xbc" * 11,
            b"Subject: =?utf-8?B?w7zDvMO8w7zDvMO8w7zDvMO8?= =?utf-8?B?w7zDvA==?=",
        ),
    ],
)  # fmt: skip
def test_headers_become_encoded_words(line: bytes, expected: bytes) -> None:
    assert converted(line + b"\r\n\r\nx\r\n").startswith(expected + b"\r\n")


def test_a_header_line_is_folded_before_a_blank() -> None:
    out = converted(b"Subject: " + b"word " * 500 + b"\r\nX: " + b"y" * 3000 + b"\r\n\r\nx\r\n", eight_bit=True)
    assert email.message_from_bytes(out)["Subject"].replace("\r\n", "").split() == ["word"] * 500
    assert out.endswith(b"\r\n\r\nx\r\n")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\r\n",
        b"\xff",
        b"\xff\r\n",
        b"no header at all \xff\r\nreally\r\n",
        b"Content-Type: multipart/mixed; boundary=b\r\n",
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n--b\r\n--b--\r\n--b\r\n\xff",
        b"Content-Type: multipart/mixed; boundary=\"\"\r\n\r\n--\r\n\xff\r\n----\r\n",
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: message/rfc822\r\n\r\n--b\r\n\xff\r\n",
        b"Content-Type: multipart/digest; boundary=b\r\n\r\n--b\r\n\r\nSubject: \xff\r\n\r\n\xff\r\n--b--\r\n",
        b"Content-Type: multipart/mixed; boundary=b\r\nContent-Transfer-Encoding: base64\r\n\r\n--b\r\n\r\n\xff\r\n",
        b"Content-Type: text/plain (\xff\r\nContent-Transfer-Encoding: 8bit (\r\n \xff)\r\n\r\n\xff\r\n",
    ],
)  # fmt: skip
def test_what_is_not_well_formed_is_made_fit_all_the_same(content: bytes) -> None:
    converted(content)
    converted(content, eight_bit=True)


def test_containers_do_not_nest_for_ever() -> None:
    def nested(depth: int) -> bytes:
        heads = [b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n) for n in range(depth)]
        return b"".join(heads) + b"\r\n\xff\r\n"

    converted(nested(DEPTH_LIMIT))
    for deep in (nested(10_000), b"Content-Type: message/rfc822\r\n\r\n" * 10_000):
        with pytest.raises(TooDeep):
            converted(deep)


TOKENS = st.sampled_from([
    b"\r\n", b"--b", b"\r\n--b\r\n", b"\r\n--b--\r\n", b"a: b\r\n", b"\xe4", b"\xc3\xa4", b"x" * 1200, b" ", b"\n", b"\r",
    b"Content-Type: multipart/mixed; boundary=b\r\n", b"Content-Type: multipart/digest; boundary=bb\r\n", b"\r\n--bb\r\n",
    b"Content-Type: text/plain\r\n", b"Content-Type: message/rfc822\r\n", b"Content-Type: a/b; boundary=c\r\n",
    b"Content-Transfer-Encoding: 8bit\r\n", b"Content-Transfer-Encoding: base64\r\n", b"\0", b"=",
    b"Content-Transfer-Encoding: binary\r\n", b"Content-Transfer-Encoding: quoted-printable\r\n", b"MIME-Version: 1.0\r\n",
])  # fmt: skip


@given(st.lists(TOKENS, max_size=30), st.booleans(), st.integers(1, 50))
@settings(max_examples=300)
def test_anything_is_made_fit(tokens: list[bytes], eight_bit: bool, step: int) -> None:
    # Invariant: CRLF lines of bearable length, US-ASCII if asked for, the same whatever the cuts; and a content that is
    # fit already comes out as it is.
    content = b"".join(tokens)
    assert b"".join(event.data for event in parse([content])) == content
    out = converted(content, eight_bit=eight_bit)
    assert converted(content, eight_bit=eight_bit, step=step) == out
    found = survey([content])
    if found.clean and not (found.long_lines or found.nul or b"binary" in content or (found.eight_bit and not eight_bit)):
        assert out == content


@pytest.mark.parametrize(
    "content",
    [
        b"A: \xe4\r\n" * 20_000,
        b"A: b\r\n" + b" \xe4\r\n" * 20_000,
        b"A: " + b"\xe4" * 200_000,
        b"A: " + b"a " * 100_000 + b"\xe4",
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\n\xe4\r\n" * 15_000,
        b"Content-Type: text/plain" + b"; a=b" * 40_000 + b"\r\n\r\n\xe4\r\n",
        b"Content-Transfer-Encoding: " + b"(" * 200_000 + b"\r\n\r\n\xe4\r\n",
        b"\r\n" + b"\xe4" * 200_000,
    ],
    ids=["fields", "continuations", "word", "words", "parts", "parameters", "comments", "line"],
)
def test_s_pa7_time_is_linear(content: bytes) -> None:
    def seconds(text: bytes) -> float:
        start = time.process_time()
        converted(text, step=FRAGMENT)
        return time.process_time() - start

    assert seconds(content + content) < 4 * seconds(content) + 0.5
