"""Outbound smuggling, C-SM1 ff: whatever a content holds, no server can read two messages in what we send.

Invariant: between DATA and the end there is no line end but CRLF, and no end of data that anybody, however lenient, might
see but the last five octets. By BDAT there are exactly as many octets as were announced, and no bare CR or LF among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.delivery.conversion import Conversion, Fit
from mtad.delivery.words import Place
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Delivered
from mtad.smtp.capabilities import Capabilities
from mtad.smtp.dialogue import Phase
from tests.peers.mx import Script
from tests.peers.outbound import Bytes, Site, only
from tests.smuggling import HIDDEN, LENIENT, SEQUENCES, every_client_row
from tests.unit.test_client_protocol import Transaction, play

FIRST = b"Received: from a by b; now\r\n"

#: Each of them, and what truly ends a message.
ALL = [*SEQUENCES.values(), b"\r\n.\r\n"]

EIGHT = Capabilities({}, eight_bit=True)
NAMES = {"data": EIGHT, "data-7bit": Capabilities({}), "bdat": Capabilities({}, eight_bit=True, chunking=True)}


def fit(content: bytes, capabilities: Capabilities, chunks: Sequence[bytes] | None = None) -> Fit:
    """The content as a server with these capabilities gets it."""
    message = Bytes(content)
    if chunks is not None:
        message.chunks = lambda: iter(chunks)  # type: ignore[method-assign]
    with Conversion(Envelope("Q", 0.0, "a@b", (Recipient("c@d"),)), message) as conversion:
        found = conversion.fit(capabilities, [0], Place("mx", "127.0.0.1", 25))
        pieces = list(found.chunks())
    assert sum(map(len, pieces)) == found.size
    return Fit({}, found.size, found.start, found.body, found.utf8, lambda: iter(pieces))


def wire(found: Fit, capabilities: Capabilities) -> tuple[bytes, list[int]]:
    """The octets of the content as they go out, and the sizes that BDAT announced."""
    transaction = Transaction("a@b", ["c@d"], found.size, capabilities, first=found.start)
    first = "250 ok" if capabilities.chunking and found.start.startswith(FIRST) else "354 go"
    _, steps = play(transaction.steps(found.chunks()), "250 ok", "250 ok", first, "250 ok")
    sent = [step.send for step in steps if step.phase in {Phase.BDAT, Phase.CONTENT, Phase.DOT}]
    assert [step.final for step in steps].count(True) == 1
    assert steps[-1].final
    octets = b"".join(sent)
    sizes: list[int] = []
    if not capabilities.chunking:
        return octets, sizes
    content = b""
    while octets:
        head, _, octets = octets.partition(b"\r\n")
        match = re.fullmatch(rb"BDAT (\d+)( LAST)?", head)
        assert match is not None
        sizes.append(int(match[1]))
        content, octets = content + octets[: sizes[-1]], octets[sizes[-1] :]
        assert bool(match[2]) is not bool(octets)
    return content, sizes


def check(content: bytes, name: str, chunks: Sequence[bytes] | None = None) -> None:
    capabilities = NAMES[name]
    found = fit(content, capabilities, chunks)
    octets, sizes = wire(found, capabilities)
    lines = octets.split(b"\r\n")
    assert not [line for line in lines if b"\r" in line or b"\n" in line or b"\0" in line]
    assert max(map(len, lines)) <= 999  # with a dot that was put in front
    assert octets.isascii() or capabilities.eight_bit
    if sizes:
        assert sum(sizes) == len(octets)
        return
    ends = [match.start() for match in LENIENT.finditer(b"\r\n" + octets)]
    assert ends == [len(octets) - 3]
    assert not [line for line in lines[:-2] if line.startswith(b".") and not line.startswith(b"..")]


@pytest.mark.parametrize("name", NAMES)
@every_client_row
def test_c_sm1_to_24_no_sequence_ends_a_message(row: int, name: str) -> None:
    sequence = SEQUENCES[row]
    for head in (b"", FIRST + b"\r\n", FIRST):
        for tail in (HIDDEN, b"", HIDDEN[:-2]):
            content = head + b"X" + sequence + tail
            check(content, "data" if name == "bdat" and not head else name)


@pytest.mark.parametrize("boundary", [4096, 8192, 65536])
@pytest.mark.parametrize("name", NAMES)
def test_c_sm1_to_24_over_each_buffer_boundary(boundary: int, name: str) -> None:
    filler = b"x" * 76 + b"\r\n"
    for sequence in ALL:
        for shift in range(-3, 4):
            start = FIRST + b"\r\n" + filler * (boundary // len(filler) + 1)
            content = start[: boundary + shift] + sequence + HIDDEN
            chunks = [content[at : at + boundary] for at in range(0, len(content), boundary)]
            check(content, name, chunks)


@given(
    st.lists(st.sampled_from([*ALL, b"X", b"\r", b"\n", b".", b"\0", b"\r\n", b"a: b", b"y" * 1000]), max_size=20),
    st.lists(st.integers(0, 100), max_size=6),
    st.sampled_from(list(NAMES)),
)
def test_c_sm1_to_24_any_content_cut_anywhere(parts: list[bytes], cuts: list[int], name: str) -> None:
    # Invariant: see the module; and the octets on the wire do not depend on how the content was cut.
    content = FIRST + b"\r\n" + b"".join(parts)
    places = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    chunks = [content[begin:end] for begin, end in pairwise(places)]
    check(content, name, chunks)
    assert wire(fit(content, NAMES[name], chunks), NAMES[name]) == wire(fit(content, NAMES[name]), NAMES[name])


@pytest.fixture
def site() -> Iterator[Site]:
    with ExitStack() as stack:
        site = Site(stack)
        site.domain("127.0.0.5")
        yield site


@pytest.mark.parametrize("extensions", [("8BITMIME", "PIPELINING"), (), ("CHUNKING", "8BITMIME", "PIPELINING")])
def test_c_sm1_to_24_a_strict_sink_sees_one_message_for_each(site: Site, extensions: tuple[str, ...]) -> None:
    mx = site.mx(script=Script(extensions=extensions))
    for sequence in ALL:
        assert isinstance(only(site.send(body=FIRST + b"\r\nX" + sequence + HIDDEN)), Delivered)
    assert len(mx.messages) == len(mx.transactions) == len(ALL)
    assert {message.sender for message in mx.messages} == {"a@me.test"}
    assert mx.bare == []


def test_a_content_without_its_last_line_end_gets_one() -> None:
    for name, capabilities in NAMES.items():
        octets, _ = wire(fit(FIRST + b"\r\nlast", capabilities), capabilities)
        assert octets.endswith(b"last\r\n" if name == "bdat" else b"last\r\n.\r\n")


def test_what_is_clean_already_is_sent_as_it_is() -> None:
    content = FIRST + b"Subject: x\r\n\r\n" + "\u00fc.\r\n".encode() * 50_000
    found = fit(content, EIGHT)
    assert b"".join(found.chunks()) == content
    assert (found.size, found.body) == (len(content), "8BITMIME")
