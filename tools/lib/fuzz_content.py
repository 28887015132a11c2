"""Fuzz target: content as strangers wrote it: its structure, and its conversion for a server that lacks something."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Final

from mtad.smtp.downgrade import convert
from mtad.smtp.mime import TooDeep, parse
from mtad.smtp.outgoing import normalise, survey
from tools.lib.fuzz import Target, require
from tools.lib.fuzz_wire import cuts

_BARE: Final = re.compile(rb"\r(?!\n)|(?<!\r)\n")


def content(data: bytes) -> Iterable[Hashable]:
    # The structure of a message is read without losing an octet; what a survey finds is so; both do not depend on how the
    # octets were cut. A conversion gives CRLF lines of at most 998 octets, without 8 bit where the next hop does not take
    # it, or says that it cannot; and its result needs no further conversion.
    looked = survey((data,))
    require(looked == survey(cuts(data)), "a survey depends on how octets were cut")
    require(looked.eight_bit is not data.isascii() and looked.size == len(data), "a survey is wrong")
    require(looked.clean is (_BARE.search(data) is None and (not data or data.endswith(b"\r\n"))), "a survey is wrong")
    happened: set[Hashable] = {(looked.eight_bit, looked.clean, looked.long_lines)}
    try:
        events = list(parse((data,)))
        require(b"".join(event.data for event in events) == data, "octets are lost in parsing")
        for event in events:
            part = event.part
            happened.add(
                (event.what, min(part.number, 4), part.container, part.encoding[:8], part.type[:10], part.versioned)
            )
    except TooDeep:
        return {"too deep"}
    for eight_bit in (False, True):
        out = _convert(lambda: iter((data,)), eight_bit)
        require(out == _convert(lambda: cuts(data, "convert"), eight_bit), "a conversion depends on how octets were cut")
        mended = survey((out,))
        require(not mended.long_lines and (mended.clean or not out), "lines that no server has to take")
        require(eight_bit or not mended.eight_bit, "8 bit where only 7 may be")
        require(_convert(lambda out=out: iter((out,)), eight_bit) == out, "a conversion that needs another one")  # type: ignore[misc]
    require(b"".join(normalise(cuts(data))) == b"".join(normalise((data,))), "line ends depend on how octets were cut")
    return happened


def _convert(content: Callable[[], Iterator[bytes]], eight_bit: bool) -> bytes:
    return b"".join(convert(content, eight_bit=eight_bit))


def content_seeds() -> Sequence[bytes]:
    """Messages of every structure that conversion knows."""
    plain = "Subject: é\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\r\né\r\n".encode()
    part = b"--x\r\nContent-Type: text/plain\r\nContent-Transfer-Encoding: 8bit\r\n\r\n\xe9\r\n"
    mixed = b'Content-Type: multipart/mixed; boundary="x"\r\nContent-Transfer-Encoding: 8bit\r\n\r\npre\xe9\r\n' + part
    nested = mixed + b"--x\r\nContent-Type: message/rfc822\r\n\r\n" + plain + b"--x--\r\nepilogue\r\n"
    image = (
        b"--x\r\nContent-Type: image/png\r\nContent-Transfer-Encoding: binary\r\n\r\n\x89PNG\r\n\x1a\n\0\xff\r\n--x--\r\n"
    )
    coded = b"Content-Transfer-Encoding: base64\r\n\r\nAAAA\xff\r\n" + b"A" * 1200 + b"\r\n"
    quoted = b"Content-Transfer-Encoding: quoted-printable\r\n\r\na=E9\xe9=\r\n" + b"=41" * 400 + b"\r\n"
    long = b"Subject: " + b"x " * 600 + b"\r\nX: " + b"y" * 1500 + b"\r\n\r\n" + b"z" * 2500 + b"\r\n"
    return [
        plain,
        mixed + b"--x--\r\n",
        nested,
        mixed + image,
        coded,
        quoted,
        long,
        b"",
        b"\r\n",
        b"a",
        b"\xe9",
        b"a\nb\rc",
    ]


_WORDS: Final = (
    b"--x\r\n|--x--\r\n|Content-Type: |multipart/mixed; boundary=x\r\n|message/rfc822\r\n|text/plain\r\n"
    b"|MIME-Version: 1.0\r\n"
    b"|Content-Transfer-Encoding: |base64\r\n|quoted-printable\r\n|8bit\r\n|binary\r\n|\r\n\r\n|\xe9"
    b'|boundary=""|; boundary*=x'
    b"|=\r\n|=E9|\r\n | (comment)|\xc3\xa9"
).split(b"|")

TARGET: Final = Target("content", content, content_seeds, _WORDS)
