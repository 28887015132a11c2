"""Fuzz targets: octets to lines, to content, and to the replies of servers."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from random import Random
from typing import Final, Protocol

from mtad.reply import Reply
from mtad.smtp.capabilities import Capabilities, parse_capabilities
from mtad.smtp.outgoing import normalise
from mtad.smtp.replies import MAX_LINES, MAX_REPLY, ProtocolFault, ReplyReader
from mtad.smtp.wire import DataDecoder, HeaderScanner, LineBuffer, LineEnds, LineFault, dot_stuff
from tools.lib.fuzz import Target, require

_BARE: Final = re.compile(rb"\r(?!\n)|(?<!\r)\n")
_STUFFED: Final = re.compile(rb"(\A|\r\n)\.")
_ANY_END: Final = re.compile(rb"\r\n|\r|\n")


def cuts(data: bytes, salt: str = "") -> Iterator[bytes]:
    """The data in pieces, always the same ones for the same data."""
    rng = Random(f"{zlib.crc32(data)} {salt}")
    at = 0
    while at < len(data):
        size = rng.choice((1, 1, 2, 3, 4, 5, 7, 100, 5000))
        yield data[at : at + size]
        at += size


# -- the decoder of content ---------------------------------------------------------------------------------------------


class _Decoder(Protocol):
    bare: bool
    ended: bool
    rest: bytes

    def feed(self, chunk: bytes, /) -> bytes:
        """See `mtad.smtp.wire.DataDecoder`."""


def _decode(decoder: _Decoder, pieces: Iterable[bytes]) -> tuple[bytes, bytes, bool, bool]:
    """Content, what follows it, whether it ended, and whether a line end stood alone."""
    content, rest = [], []
    for piece in pieces:
        if decoder.ended:
            rest.append(piece)
        else:
            content.append(decoder.feed(piece))
            if decoder.ended:
                rest.append(decoder.rest)
    return b"".join(content), b"".join(rest), decoder.ended, decoder.bare


def _reference(data: bytes) -> tuple[bytes, bytes, bool, bool]:
    """The same for data with an end, in the words of RFC 5321 sections 4.1.1.4 and 4.5.2, slowly."""
    if data.startswith(b".\r\n"):
        return b"", data[3:], True, False
    end = data.index(b"\r\n.\r\n")
    body = data[: end + 2]
    return _STUFFED.sub(rb"\1", body), data[end + 5 :], True, _BARE.search(body) is not None


def decoder_check(make: Callable[[], _Decoder]) -> Callable[[bytes], Iterable[Hashable]]:
    """The check of a decoder; another one than ours shows whether the check is worth anything."""

    def check(data: bytes) -> Iterable[Hashable]:
        # Only CRLF.CRLF ends content, and .CRLF at its start; content, rest and the verdict about bare line ends are those
        # of a reference that is too simple to be wrong, however the octets are cut; and what `dot_stuff` makes of any
        # content comes out of the decoder again, with CRLF for every line end, and nothing behind it.
        whole = data + b"\r\n.\r\nQUIT\r\n"
        expected = _reference(whole)
        require(_decode(make(), (whole,)) == expected, "not what the reference says")
        require(_decode(make(), cuts(whole)) == expected, "depends on how the octets were cut")
        ended = _decode(make(), cuts(data, "open"))
        require(
            ended[2] is (data.startswith(b".\r\n") or b"\r\n.\r\n" in data), "an end where none is, or none where one is"
        )
        wire = b"".join(dot_stuff(cuts(data, "stuff")))
        mended = b"".join(normalise((data,))) or b""
        content, rest, over, bare = _decode(make(), (wire,))
        require(over and not rest and not bare and content == mended, "not what was stuffed")
        return {(expected[3], len(expected[1]) > 6, data[:2] == b"..", ended[2], b".\n" in data, b"\r." in data)}

    return check


decoder = decoder_check(DataDecoder)


def decoder_seeds() -> Sequence[bytes]:
    """Line ends and dots in the ways in which they were mistaken for the end (the attacks S-SM1 ff)."""
    ends = (b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\n", b"\r.\r\n", b"\n.\r", b"\r\n\0.\r\n", b"\r\n.\0\r\n")
    more = (b"\r\n.\r\r\n", b"\r\r\n.\r\r\n", b"\r\r\n.\r\n", b"\r\n .\r\n", b"\r\n.\t\r\n", b"\r\n..\r\n", b"\r\n.\r\n")
    found = [b"Subject: x\r\n\r\nbody" + end + b"MAIL FROM:<smuggled@a>\r\nDATA\r\n" for end in ends + more]
    return [*found, b"", b".", b".\r\n", b"..\r\n.\r\n", b"a\r\n", b"\r\n", b"\r", b"x" * 70000]


# -- lines --------------------------------------------------------------------------------------------------------------


def lines(data: bytes) -> Iterable[Hashable]:
    # What `LineBuffer`, `LineEnds` and `HeaderScanner` give does not depend on how the octets were cut, and what they hold
    # back is bounded. A line has no CR and no LF in it, and is no longer than the limit. What `LineEnds` mends has no bare
    # CR or LF, and says the same as before but for its line ends; a scanner finds what is in the header and nothing else.
    first, second = list(_lines((data,))), list(_lines(cuts(data)))
    require(first == second, "lines depend on how octets were cut")
    good = [line for line in first if isinstance(line, bytes)]
    require(all(b"\r" not in line and b"\n" not in line and len(line) <= 2048 for line in good), "not a line")
    for mend in (False, True):
        ends, other = LineEnds(mend=mend), LineEnds(mend=mend)
        one = ends.feed(data) + ends.finish()
        two = b"".join(other.feed(piece) for piece in cuts(data, "ends")) + other.finish()
        require(one == two and ends.bare == other.bare, "line ends depend on how octets were cut")
        require(ends.bare is (_BARE.search(data) is not None), "a bare line end was not seen, or one that is none")
        require(not data or one.endswith(b"\r\n"), "no line end at the end")
        if mend:
            require(one == b"".join(normalise((data,))), "mended in another way")
    return {type(line).__name__ if isinstance(line, bytes) else line for line in first} | _scan(data)


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes | LineFault]:
    buffer = LineBuffer()
    for piece in pieces:
        buffer.feed(piece)
        while (line := buffer.next_line()) is not None:
            yield line
        require(len(buffer._buffer) - buffer._position <= buffer.limit + 1, "more than a line is kept")


def _scan(data: bytes) -> set[Hashable]:
    whole, cut = HeaderScanner(), HeaderScanner()
    whole.feed(data)
    for piece in cuts(data, "scan"):
        cut.feed(piece)
        require(len(cut._held) <= 4096 + len(piece), "a scanner keeps more than it may")
    facts = (whole.received, whole.message_id, whole.done)
    require(facts == (cut.received, cut.message_id, cut.done), "what is found depends on how octets were cut")
    header = (b"\r\n" + data).partition(b"\r\n\r\n")[0].lower()
    require(whole.received == header.count(b"\r\nreceived:"), "Received: fields are miscounted")
    return {("scan", min(whole.received, 3), bool(whole.message_id), whole.done)}


def lines_seeds() -> Sequence[bytes]:
    """Command lines and headers."""
    header = b"Received: from a\r\n\tby b\r\nReceived: x\r\nMessage-ID:\r\n <a@b>\r\nSubject: x\r\n\r\nReceived: body\r\n"
    long = b"A" * 2047 + b"\r\nB" + b"b" * 2049 + b"\r\nC\r\n"
    return [
        b"EHLO a\r\nNOOP\r\nQUIT\r\n",
        b"NOOP\nQUIT\r\n",
        b"a\rb\r\n",
        header,
        long,
        b"Message-ID: " + b"<" * 1100,
        b"a\r",
    ]


# -- replies ------------------------------------------------------------------------------------------------------------


def replies(data: bytes) -> Iterable[Hashable]:
    # From any octets come replies of codes 200 to 599 in printable US-ASCII and of bounded length, or one `ProtocolFault`;
    # which of these does not depend on how the octets were cut. What a server claims to offer can be read whatever it is,
    # and its numbers are bounded.
    whole, fault = _read((data,))
    cut, other = _read(cuts(data))
    require(whole == cut and fault == other, "depends on how the octets were cut")
    for reply in whole:
        require(200 <= reply.code <= 599, "a code that is none")
        require(0 < len(reply.lines) <= MAX_LINES and sum(map(len, reply.lines)) <= MAX_REPLY, "too long a reply")
        require(all(line.isascii() and line.isprintable() for line in reply.lines), "a reply that does not print")
        require(not reply.enhanced or reply.enhanced[0] == str(reply.code)[0], "status and code differ")
        _capabilities(parse_capabilities(reply))
        require(len(reply.encode()) <= 514 * len(reply.lines), "a reply that does not fit its lines")
    return {(reply.code // 100, bool(reply.enhanced), len(reply.lines) > 1) for reply in whole} | {fault[:12]}


def _read(pieces: Iterable[bytes]) -> tuple[Sequence[Reply], str]:
    reader = ReplyReader()
    found: list[Reply] = []
    try:
        for piece in pieces:
            found += reader.feed(piece)
            require(len(reader._rest) < 2048 and reader._octets <= MAX_REPLY, "a reader keeps more than it may")
        reader.feed(b"")
    except ProtocolFault as fault:
        require(str(fault).isprintable(), "a fault that does not print")
        return found, str(fault)
    return found, ""


def _capabilities(found: Capabilities) -> None:
    numbers = (found.recipient_limit, found.domain_limit, found.message_limit)
    require(all(0 <= number <= 999999 for number in numbers) and 0 <= found.size_limit < 10**20, "a number out of bounds")
    require(not found.binary or found.chunking, "BINARYMIME without CHUNKING")


def replies_seeds() -> Sequence[bytes]:
    """Replies as servers send them, and as they should not."""
    ehlo = (
        b"250-mx.example.net\r\n250-PIPELINING\r\n250-SIZE 10240000\r\n250-8BITMIME\r\n250-BINARYMIME\r\n250-CHUNKING\r\n"
        b"250-STARTTLS\r\n250-AUTH PLAIN LOGIN SCRAM-SHA-256\r\n250-AUTH=LOGIN\r\n250-DSN\r\n250-SMTPUTF8\r\n"
        b"250 LIMITS RCPTMAX=20 MAILMAX=5 RCPTDOMAINMAX=1\r\n"
    )
    plain = (
        b"220 mx ESMTP\r\n",
        b"250 2.1.0 Ok\r\n",
        b"354 go ahead\r\n",
        b"421 4.3.2 bye\r\n",
        b"452 4.2.2 full\r\n",
        b"250\r\n",
    )
    odd = (
        b"550-5.1.1 one\r\n550 5.1.1 two\r\n",
        b"550-5.7.1 a\n550 5.1.1\n",
        b"250-a\r\n251 b\r\n",
        b"550 \x1b[2J\xff\r\n",
    )
    return [ehlo, *plain, b"".join(plain), *odd, b"HTTP/1.1 400 Bad Request\r\n", b"250-x\r\n" * 101, b"250 " + b"x" * 2045]


TARGETS: Final = (
    Target("decoder", decoder, decoder_seeds, (b"\r\n.\r\n", b"\n.\n", b"\r\n..", b".\r\n", b"\r.\r")),
    Target("lines", lines, lines_seeds, (b"Received: ", b"Message-ID: ", b"\r\n\r\n", b"\r\n ", b"\r\n", b"<a@b>")),
    Target("replies", replies, replies_seeds, b"250-|250 |550 5.1.1 |354|421 |SIZE |LIMITS RCPTMAX=|AUTH ".split(b"|")),
)
