"""Lines, the end of data, dot-stuffing, headers in passing: fed whole, octet by octet, and cut everywhere."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.smtp.wire import LINE_LIMIT, DataDecoder, HeaderScanner, LineBuffer, LineEnds, LineFault, dot_stuff

BARE = LineFault.BARE_NEWLINE
LONG = LineFault.TOO_LONG

#: Octets in which every confusion of line ends is likely.
soup = st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b".", b"\r\n.", b"a", b"\0", b"\r\n.\r\n"]), max_size=30).map(
    b"".join
)


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """The data whole, in single octets, and in two pieces for every place."""
    yield [data]
    yield [data[i : i + 1] for i in range(len(data))]
    for place in range(1, len(data)):
        yield [data[:place], data[place:]]


def lines_of(chunks: Iterable[bytes]) -> list[bytes | LineFault]:
    buffer = LineBuffer()
    found: list[bytes | LineFault] = []
    for chunk in chunks:
        buffer.feed(chunk)
        while (line := buffer.next_line()) is not None:
            found.append(line)
    return found


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"NOOP\r\n", [b"NOOP"]),
        (b"\r\n\r\n", [b"", b""]),
        (b"A\r\nB\r\nC", [b"A", b"B"]),
        (b"NOOP\nMAIL FROM:<a@b>\r\nRSET\r\n", [BARE, b"RSET"]),
        (b"NOOP\rRSET\r\nX\r\n", [BARE, b"X"]),
        (b"NOOP\r\r\nX\r\n", [BARE, b"X"]),
        (b"\n\r\nX\r\n", [BARE, b"X"]),
        (b"\nX\r\nY\r\n", [BARE, b"Y"]),
        (b"DATA\n", [BARE]),
        (b"A\n\n\nB\r\nC\r\n", [BARE, b"C"]),
        (b"A\n\rB\r\nC\r\n", [BARE, b"C"]),
        (b"A\r", []),
        (b"A\r\n\nB\r\nC\r\n", [b"A", BARE, b"C"]),
    ],
)
def test_lines_sm27_sm28_sm29(data: bytes, expected: list[bytes | LineFault]) -> None:
    for chunks in cuts(data):
        assert lines_of(chunks) == expected, chunks


@pytest.mark.parametrize("length", [512, 513, 1000, LINE_LIMIT - 1, LINE_LIMIT, LINE_LIMIT + 1, LINE_LIMIT + 2, 64 * 1024])
def test_length_of_line_s_pa1(length: int) -> None:
    line = b"x" * length
    expected = [line if length <= LINE_LIMIT else LONG, b"NOOP"]
    data = line + b"\r\nNOOP\r\n"
    assert lines_of([data]) == expected
    assert lines_of([data[i : i + 1] for i in range(len(data))]) == expected
    for place in [*range(LINE_LIMIT - 3, LINE_LIMIT + 5), length - 1, length, length + 1, length + 2]:
        assert lines_of([data[:place], data[place:]]) == expected, place


@pytest.mark.parametrize("place", range(LINE_LIMIT - 2, LINE_LIMIT + 4))
@pytest.mark.parametrize("ending", [b"\n", b"\r", b"\r\r", b"\r\n"])
@pytest.mark.parametrize("more", [b"", b"yyyy"])
def test_one_fault_at_the_limit_however_it_is_cut(place: int, ending: bytes, more: bytes) -> None:
    data = b"x" * place + ending + more + b"\r\nNOOP\r\n"
    reference = lines_of([data])
    assert reference[-1] == b"NOOP"
    assert len([line for line in reference if isinstance(line, LineFault)]) <= 1
    assert lines_of([data[i : i + 1] for i in range(len(data))]) == reference
    for cut in range(LINE_LIMIT - 4, LINE_LIMIT + 8):
        assert lines_of([data[:cut], data[cut:]]) == reference, cut


def test_endless_line_is_told_at_once_and_costs_no_memory_s_pa1() -> None:
    buffer = LineBuffer()
    buffer.feed(b"x" * (LINE_LIMIT + 1))
    assert buffer.next_line() is LONG
    chunk = b"y" * 65536
    tracemalloc.start()
    for _ in range(160):
        buffer.feed(chunk)
        assert buffer.next_line() is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(chunk)
    buffer.feed(b"\r\nNOOP\r\n")
    assert buffer.next_line() == b"NOOP"


@given(soup)
def test_lines_do_not_depend_on_cuts(data: bytes) -> None:
    """Invariant: the same lines and faults for every cut, and never an octet 10 or 13 in a line."""
    reference = lines_of([data])
    for chunks in cuts(data):
        assert lines_of(chunks) == reference
    for line in reference:
        assert isinstance(line, LineFault) or not set(line) & {10, 13}


def test_take_gives_what_is_left() -> None:
    buffer = LineBuffer()
    buffer.feed(b"DATA\r\nSubject: x\r\n")
    assert buffer.next_line() == b"DATA"
    assert buffer.take() == b"Subject: x\r\n"
    assert buffer.take() == b""
    buffer.feed(b"NOOP\r\n")
    assert buffer.next_line() == b"NOOP"


def decode(chunks: Iterable[bytes]) -> tuple[bytes, bool, bool, bytes]:
    """Content, whether it ended, whether it had a bare CR or LF, and what came after."""
    decoder = DataDecoder()
    content = rest = b""
    for chunk in chunks:
        if decoder.ended:
            rest += chunk
        elif chunk:
            content += decoder.feed(chunk)
            rest = decoder.rest
    return content, decoder.ended, decoder.bare, rest


@pytest.mark.parametrize(
    ("data", "content", "rest"),
    [
        (b".\r\n", b"", b""),
        (b"\r\n.\r\n", b"\r\n", b""),
        (b"a\r\n.\r\nNOOP\r\n", b"a\r\n", b"NOOP\r\n"),
        (b"..\r\n.\r\n", b".\r\n", b""),
        (b"a\r\n..\r\n.\r\n", b"a\r\n.\r\n", b""),
        (b"a\r\n...b\r\n.c\r\n.\r\n.\r\n", b"a\r\n..b\r\nc\r\n", b".\r\n"),
        (b"a.\r\n.\r\n", b"a.\r\n", b""),
        (b" .\r\n.\r\n", b" .\r\n", b""),
        (b"a\r\n\r\n\r\n.\r\n", b"a\r\n\r\n\r\n", b""),
        (b"\0\r\n\0.\r\n.\0\r\n.\r\n", b"\0\r\n\0.\r\n\0\r\n", b""),
        (b"\xff\x80\r\n.\r\n", b"\xff\x80\r\n", b""),
    ],
)
def test_end_of_data(data: bytes, content: bytes, rest: bytes) -> None:
    for chunks in cuts(data):
        assert decode(chunks) == (content, True, False, rest), chunks


#: S-SM1 to S-SM24, each with whether it ends the data, and S-SM25 (near-endings at the very start).
SEQUENCES = {
    b"\n.\n": False,
    b"\n.\r\n": False,
    b"\r\n.\n": False,
    b"\r.\r": False,
    b"\r.\n": False,
    b"\r.\r\n": False,
    b"\n.\r": False,
    b"\r\n.\r": False,
    b"\r\n\0.\r\n": False,
    b"\r\n.\0\r\n": False,
    b"\r\n.\r\r\n": False,
    b"\r\r\n.\r\r\n": False,
    b"\r\r\n.\r\n": True,
    b"\r\n .\r\n": False,
    b"\r\n.\t\r\n": False,
    b"\r\n. \r\n": False,
    b"\n\n.\n\n": False,
    b"\x85.\x85": False,
    b"\xe2\x80\xa8.\xe2\x80\xa8": False,
    b"\x0b.\x0b": False,
    b"\x0c.\x0c": False,
    b"\x1a": False,
    b"\r\n..\r\n": False,
    b"\0\r\n.\r\n": True,
}
LINE_BREAKING = (b"\r", b"\n")


@pytest.mark.parametrize(("sequence", "ends"), SEQUENCES.items(), ids=repr)
@pytest.mark.parametrize("before", [b"", b"X", b"X\r\n"], ids=repr)
def test_what_ends_data_sm1_to_sm25(sequence: bytes, ends: bool, before: bytes) -> None:
    smuggled = b"MAIL FROM:<smuggled@a>\r\n"
    data = before + sequence + smuggled
    left = data.replace(b"\r\n", b"")
    for chunks in cuts(data):
        _, ended, bare, rest = decode(chunks)
        assert ended == ends, chunks
        assert rest == (smuggled if ends else b"")
        if not ends:
            assert bare == any(octet in left for octet in LINE_BREAKING), chunks
    if not ends:
        for chunks in ([data, b"\r\n.\r\n"], [data + b"\r\n.\r\nNOOP\r\n"]):
            assert decode(chunks)[1:3] == (True, any(octet in left for octet in LINE_BREAKING))


def test_near_endings_at_the_start_sm25() -> None:
    for start in (b".\n", b".\r", b"\n.\r\n", b"\r.\r\n", b".\0\r\n", b"..\r\n", b". \r\n", b".\r\r\n"):
        for chunks in cuts(start + b"X\r\n"):
            assert not decode(chunks)[1], chunks


def reference_decode(data: bytes) -> tuple[bytes, bool, bool, bytes]:
    """RFC 5321 section 4.5.2 word for word, line by line; slow and plain."""
    content, rest, bare = b"", data, False
    while b"\r\n" in rest:
        line, _, rest = rest.partition(b"\r\n")
        if line == b".":
            return content, True, bare, rest
        bare = bare or b"\r" in line or b"\n" in line
        content += line.removeprefix(b".") + b"\r\n"
    return content, False, bare, b""


@given(soup)
def test_decoder_against_the_standard(data: bytes) -> None:
    """Invariant: content, end, fault and rest are those of the standard's text, for every cut."""
    data += b"x\r\n.\r\n"
    reference = reference_decode(data)
    assert reference[1], "this data ends"
    for chunks in cuts(data):
        assert decode(chunks) == reference


def test_decoder_keeps_nothing_of_a_long_line_s_pa2() -> None:
    decoder = DataDecoder()
    chunk = b"x" * 65536
    tracemalloc.start()
    size = sum(len(decoder.feed(chunk)) for _ in range(160))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 160 * 65536
    assert peak < 4 * len(chunk)
    assert decoder.feed(b"\r\n.\r\n") == b"\r\n"
    assert decoder.ended
    assert not decoder.bare


def stuffed(chunks: Iterable[bytes]) -> bytes:
    return b"".join(dot_stuff(chunks))


@pytest.mark.parametrize(
    ("content", "wire"),
    [
        (b"", b".\r\n"),
        (b"a\r\n", b"a\r\n.\r\n"),
        (b"a", b"a\r\n.\r\n"),
        (b".", b"..\r\n.\r\n"),
        (b".\r\n", b"..\r\n.\r\n"),
        (b"a\r\n.\r\n..b\r\n", b"a\r\n..\r\n...b\r\n.\r\n"),
        (b"\r\n", b"\r\n.\r\n"),
        (b"a.b\r\n", b"a.b\r\n.\r\n"),
        (b"a\n.\nb", b"a\r\n..\r\nb\r\n.\r\n"),
        (b"a\r.\rb\r", b"a\r\n..\r\nb\r\n.\r\n"),
        (b"a\r\n\r", b"a\r\n\r\n.\r\n"),
    ],
)
def test_dot_stuffing(content: bytes, wire: bytes) -> None:
    for chunks in cuts(content):
        assert stuffed(chunks) == wire, chunks


@pytest.mark.parametrize("sequence", [*SEQUENCES, b"\r\n.\r\n"], ids=repr)
@pytest.mark.parametrize("boundary", [4096, 8192, 65536])
def test_stuffed_content_is_one_message_c_sm1(sequence: bytes, boundary: int) -> None:
    """C-SM1: at every boundary of a buffer; the strict receiver finds one message and no bare line end."""
    for shift in range(-3, 4):
        content = b"x" * (boundary - len(sequence) // 2 + shift) + sequence + b"MAIL FROM:<smuggled@a>\r\n"
        wire = stuffed([content[:boundary], content[boundary:]])
        _, ended, bare, rest = decode([wire])
        assert (ended, bare, rest) == (True, False, b"")


@given(soup)
def test_stuffing_and_decoding_are_inverse(content: bytes) -> None:
    """Invariant: one message arrives, with the same lines; clean content comes back octet for octet."""
    wire = stuffed([content])
    for chunks in cuts(content):
        assert stuffed(chunks) == wire
    back, ended, bare, rest = decode([wire])
    assert (ended, bare, rest) == (True, False, b"")
    canonical = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    assert back == (canonical if canonical.endswith(b"\r\n") or not canonical else canonical + b"\r\n")


def scan(chunks: Iterable[bytes]) -> tuple[int, bytes, bool]:
    scanner = HeaderScanner()
    for chunk in chunks:
        scanner.feed(chunk)
    return scanner.received, scanner.message_id, scanner.done


@pytest.mark.parametrize(
    ("content", "received", "message_id", "done"),
    [
        (b"", 0, b"", False),
        (b"\r\nReceived: x\r\n", 0, b"", True),
        (b"Received: a\r\nRECEIVED:\r\n b\r\nreceived: c\r\n\r\nReceived: d\r\n", 3, b"", True),
        (b"Received-SPF: x\r\nX-Received: y\r\n Received: z\r\n\r\n", 0, b"", True),
        (b"Message-ID: <a@b>\r\nReceived: x\r\n\r\n", 1, b"<a@b>", True),
        (b"message-id:<a@b> \r\n\r\n", 0, b"<a@b>", True),
        (b"MESSAGE-ID:\r\n\t<a@b>\r\nReceived: x\r\n\r\n", 1, b"<a@b>", True),
        (b"Message-ID:\r\nReceived: x\r\nReceived: y\r\n\r\n", 2, b"", True),
        (b"Message-ID: <a@b>\r\nMessage-ID: <c@d>\r\n\r\n", 0, b"<a@b>", True),
        (b"A: b\r\n\r\nMessage-ID: <a@b>\r\n", 0, b"", True),
        (b"Received: x\r\nMessage-ID: <a@b>", 1, b"", False),
        (b"Received: x", 1, b"", False),
    ],
)
def test_header_in_passing(content: bytes, received: int, message_id: bytes, done: bool) -> None:
    for chunks in cuts(content):
        assert scan(chunks) == (received, message_id, done), chunks


def test_ten_thousand_received_s_pa7() -> None:
    content = b"Message-ID: <a@b>\r\n" + b"Received: from hop\r\n" * 10000 + b"\r\n"
    assert scan([content]) == (10000, b"<a@b>", True)
    assert scan(content[i : i + 7] for i in range(0, len(content), 7)) == (10000, b"<a@b>", True)


def test_endless_message_id_is_given_up_s_pa7() -> None:
    scanner = HeaderScanner()
    scanner.feed(b"Message-ID: <")
    chunk = b"x" * 65536
    tracemalloc.start()
    for _ in range(32):
        scanner.feed(chunk)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(chunk)
    scanner.feed(b">\r\nReceived: x\r\n\r\n")
    assert (scanner.received, scanner.message_id, scanner.done) == (1, b"", True)


# -- LineEnds ---------------------------------------------------------------------------------------------------------


def line_ends(chunks: Iterable[bytes], *, mend: bool) -> tuple[bytes, bool]:
    ends = LineEnds(mend=mend)
    kept = b"".join(ends.feed(chunk) for chunk in chunks)
    return kept + ends.finish(), ends.bare


@pytest.mark.parametrize(
    ("content", "mended", "bare"),
    [
        (b"", b"", False),
        (b"a\r\nb\r\n", b"a\r\nb\r\n", False),
        (b"a", b"a\r\n", False),
        (b"a\nb", b"a\r\nb\r\n", True),
        (b"a\rb\r\n", b"a\r\nb\r\n", True),
        (b"a\r", b"a\r\n", True),
        (b"\r", b"\r\n", True),
        (b"\n", b"\r\n", True),
        (b"a\r\r\n", b"a\r\n\r\n", True),
        (b"\n\r\n\r", b"\r\n\r\n\r\n", True),
    ],
)
def test_line_ends(content: bytes, mended: bytes, bare: bool) -> None:
    for chunks in ([content], [content[i : i + 1] for i in range(len(content))]):
        assert line_ends(chunks, mend=True) == (mended, bare)
        kept, seen = line_ends(chunks, mend=False)
        assert seen is bare
        assert bare or kept == mended


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b".", b"ab"]), max_size=20), st.booleans())
def test_line_ends_do_not_depend_on_cuts(parts: list[bytes], mend: bool) -> None:
    """Invariant: the same for the whole as for the parts; what is mended has no bare end; nothing else is changed."""
    content = b"".join(parts)
    kept, bare = line_ends([content], mend=mend)
    assert line_ends(parts, mend=mend) == (kept, bare)
    rest = content.replace(b"\r\n", b"")
    assert bare is (b"\r" in rest or b"\n" in rest)
    if mend:
        assert re.sub(rb"\r\n|\r|\n", b"\r\n", kept) == kept
        assert kept.replace(b"\r\n", b"") == rest.replace(b"\r", b"").replace(b"\n", b"")
