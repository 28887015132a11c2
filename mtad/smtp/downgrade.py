"""Content for a next hop that cannot take it as it is: to 7 bit, without binary octets, with lines of bearable length.

`convert` rewrites a MIME message part by part (RFC 6152 section 3: a relay converts, or returns the mail): a part that the
hop cannot take gets another Content-Transfer-Encoding, and its containers a label that is true again. All other parts stay
as they are, octet for octet, so that what was signed and is good for the hop keeps its signature.

- Text becomes quoted-printable, all else base64. What has one of these encodings already is mended: octets above 127 do not
  belong there.
- A message, or a part, without a Content-Type gets one: text/plain in UTF-8 if it is UTF-8, else in ``unknown-8bit`` (RFC
  1428 section 3).
- Octets above 127 in a header have no meaning without SMTPUTF8 (RFC 5322), but are seen: words that hold them become
  encoded-words (RFC 2047); where no encoded-word may stand, each becomes ``?``, and so in the text around parts.
- A part with a line of more than 998 octets, or with NUL, is re-encoded like one with 8 bit; nothing of it is lost, whereas
  Postfix breaks the line. A header line is folded, before a blank if it has one; NUL becomes a blank there.

The content is read twice: first to find the parts that need it. Invariants: what comes out has CRLF lines of at most 998
octets, and with ``eight_bit`` False only US-ASCII; memory is bounded but for one octet for each part; time is linear.

Errors: `mtad.smtp.mime.TooDeep`: it cannot be converted. Standards: RFC 2045, 2046, 2047, 6152, 3030 section 3, 1428.
"""

from __future__ import annotations

import binascii
import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

from mtad.smtp.mime import Event, Part, What, lines, parse
from mtad.smtp.outgoing import LINE_LIMIT

#: Octets that are gathered before they are passed on.
_BATCH: Final = 32 * 1024

#: Octets in a line of base64: 76 characters (RFC 2045 section 6.8).
_BASE64_LINE: Final = 57

#: Octets of text in one encoded-word, which has 75 characters at most (RFC 2047 section 2).
_WORD: Final = 36

_IDENTITY: Final = frozenset({b"", b"7bit", b"8bit", b"binary"})
_NOT_BASE64: Final = bytes(
    octet for octet in range(256) if not (chr(octet).isalnum() and octet < 128) and octet not in b"+/="
)
_QUESTION: Final = bytes(octet if octet < 128 else 0x3F for octet in range(256))
_SEPARATORS: Final = re.compile(rb"([\s<>@\",;:()\[\]\\]+)")
_BINARY: Final = re.compile(rb"[\r\n\0]")
_NOT_QUOTED: Final = re.compile(rb"[\x80-\xff\r\n\0]")
_BARE: Final = re.compile(rb"[\r\n\0]")
_QP_PIECES: Final = re.compile(rb"(?:=[0-9A-Fa-f]{2}|[^=]|=){1,70}", re.DOTALL)


def convert(content: Callable[[], Iterator[bytes]], *, eight_bit: bool) -> Iterator[bytes]:
    """Rewrite a content.

    Args:
        content: gives the content from its start, each time it is called; what is labelled ``binary`` may hold any octets.
        eight_bit: the hop offers 8BITMIME.

    Raises:
        TooDeep: it cannot be converted.
    """
    needs = _Needs(eight_bit)
    for event in parse(content()):
        needs.look(event)
    return _broken(_Writer(needs, eight_bit).run(parse(content())))


class _Needs:
    """The first reading: which parts have to be encoded."""

    def __init__(self, eight_bit: bool) -> None:
        self._eight_bit = eight_bit
        self._encode = bytearray()
        self._decoder: codecs.IncrementalDecoder | None = None
        self._decoding = -1

    def look(self, event: Event) -> None:
        part = event.part
        if part.number >= len(self._encode):
            self._encode.extend(bytes(part.number + 1 - len(self._encode)))
        if event.what is not What.BODY:
            return
        data = event.data
        length = len(data) - 2 * data.endswith(b"\r\n")
        ascii_ = data.isascii()
        if not ascii_ and not part.type:
            self._try_utf8(part, data)
        if (
            (not ascii_ and not self._eight_bit)
            or length > LINE_LIMIT
            or part.encoding == b"binary"
            or _BINARY.search(data, 0, length)
        ):
            above: Part | None = part
            while above is not None and not self._encode[above.number] & 1:
                self._encode[above.number] |= 1
                above = above.parent

    def _try_utf8(self, part: Part, data: bytes) -> None:
        if self._decoding != part.number:
            self._decoder, self._decoding = codecs.getincrementaldecoder("utf-8")(), part.number
        try:
            if self._decoder is not None:
                self._decoder.decode(data)
        except UnicodeDecodeError:
            self._encode[part.number] |= 2
            self._decoder = None

    def concerns(self, part: Part) -> bool:
        """The part, or one within it, has to be encoded."""
        return bool(self._encode[part.number] & 1)

    def charset(self, part: Part) -> bytes:
        return b"unknown-8bit" if self._encode[part.number] & 2 else b"utf-8"


class _Encoder(Protocol):
    def feed(self, piece: bytes) -> bytes:
        """The next line, or piece of one."""

    def end(self, *, last: bool) -> bytes:
        """What is left; a CRLF follows by itself, unless this is the ``last`` of the message."""


class _AsItIs:
    def feed(self, piece: bytes) -> bytes:
        return piece

    def end(self, *, last: bool) -> bytes:  # noqa: ARG002  nothing is held back
        return b""


class _QuotedPrintable:
    """RFC 2045 section 6.7; a line that comes in pieces gets soft line breaks between them."""

    def __init__(self, *, mend: bool = False) -> None:
        self._encode = _mended if mend else _quoted
        self._within = False
        self._newline = True

    def feed(self, piece: bytes) -> bytes:
        ends = piece.endswith(b"\r\n")
        text = piece[:-2] if ends else piece
        out = self._encode(text)
        if self._within and text:
            out = b"=\r\n" + out
        self._within = not ends
        self._newline = ends
        return out + b"\r\n" if ends else out

    def end(self, *, last: bool) -> bytes:
        return b"\r\n" if last and not self._newline else b""


def _quoted(text: bytes) -> bytes:
    return binascii.b2a_qp(text, istext=False).replace(b"\n", b"\r\n")


def _mended(text: bytes) -> bytes:
    """What claims to be quoted-printable already."""
    text = _NOT_QUOTED.sub(lambda match: b"=%02X" % match[0][0], text)
    return text if len(text) <= LINE_LIMIT else b"=\r\n".join(_QP_PIECES.findall(text))


class _Base64:
    """RFC 2045 section 6.8. With ``mend`` the octets are base64 already, and only what is none is taken out."""

    def __init__(self, *, mend: bool = False) -> None:
        self._mend = mend
        self._size = 76 if mend else _BASE64_LINE
        self._rest = b""
        self._begun = False

    def feed(self, piece: bytes) -> bytes:
        self._rest += piece.translate(None, _NOT_BASE64) if self._mend else piece
        if len(self._rest) < 100 * self._size:
            return b""
        whole = len(self._rest) - len(self._rest) % self._size
        out = self._lines(self._rest[:whole])
        self._rest = self._rest[whole:]
        return out

    def end(self, *, last: bool) -> bytes:
        out = self._lines(self._rest)
        return out + b"\r\n" if last and self._begun else out

    def _lines(self, data: bytes) -> bytes:
        rows = [data[at : at + self._size] for at in range(0, len(data), self._size)]
        if not self._mend:
            rows = [binascii.b2a_base64(row, newline=False) for row in rows]
        out = (b"\r\n" if self._begun and rows else b"") + b"\r\n".join(rows)
        self._begun = self._begun or bool(rows)
        return out


class _Writer:
    """The second reading."""

    def __init__(self, needs: _Needs, eight_bit: bool) -> None:
        self._needs = needs
        self._eight_bit = eight_bit
        self._encoder: _Encoder = _AsItIs()
        self._encodings: list[bytes] = []

    def run(self, events: Iterable[Event]) -> Iterator[bytes]:
        batch: list[bytes] = []
        octets = 0
        for event in events:
            out = self._write(event)
            batch.append(out)
            octets += len(out)
            if octets >= _BATCH:
                yield b"".join(batch)
                batch, octets = [], 0
        yield b"".join(batch)

    def _write(self, event: Event) -> bytes:
        match event.what:
            case What.FIELD:
                return event.data if self._eight_bit else _header_words(event.data)
            case What.ENCODING:
                field = event.data if self._eight_bit else _header_words(event.data)
                if not self._needs.concerns(event.part):
                    return field
                self._encodings.append(field)
                return b""
            case What.BLANK:
                return self._end_header(event.part, event.data)
            case What.BODY:
                return self._encoder.feed(event.data)
            case What.FRAME:
                encoder, self._encoder = self._encoder, _AsItIs()
                frame = event.data if self._eight_bit else event.data.translate(_QUESTION)
                return encoder.end(last=False) + frame
            case What.END:
                return self._encoder.end(last=True)

    def _end_header(self, part: Part, blank: bytes) -> bytes:
        """A new field goes to the end of its header."""
        stated, self._encodings = b"".join(self._encodings), []
        if not self._needs.concerns(part):
            return blank
        if part.container:
            label = b"8bit" if self._eight_bit else b"7bit"
            return (b"Content-Transfer-Encoding: " + label + b"\r\n" if stated else b"") + (blank or b"\r\n")
        if part.encoding not in _IDENTITY:
            self._encoder = _Base64(mend=True) if part.encoding == b"base64" else _QuotedPrintable(mend=True)
            return stated + (blank or b"\r\n")
        text = not part.type or part.type.startswith(b"text/")
        self._encoder = _QuotedPrintable() if text else _Base64()
        fields = [] if part.versioned or not _is_message(part) else [b"MIME-Version: 1.0\r\n"]
        if not part.type:
            fields.append(b"Content-Type: text/plain; charset=" + self._needs.charset(part) + b"\r\n")
        encoding = b"quoted-printable" if text else b"base64"
        return b"".join([*fields, b"Content-Transfer-Encoding: ", encoding, b"\r\n", blank or b"\r\n"])


def _is_message(part: Part) -> bool:
    """A whole message, as against a part of a multipart."""
    return part.parent is None or part.parent.type == b"message/rfc822"


def _header_words(line: bytes) -> bytes:
    """A line of a header in US-ASCII."""
    if line.isascii():
        return line
    parts = _SEPARATORS.split(line)
    out: list[bytes] = []
    run = b""  # words with 8 bit and the blanks between them: those would be lost between two encoded-words
    for word, separator in zip(parts[::2], [*parts[1::2], b""], strict=True):
        if word.isascii():
            if run:
                stripped = run.rstrip(b" \t")
                out += [_encoded_words(stripped), run[len(stripped) :]]
                run = b""
            out += [word, separator]
        elif separator.strip(b" \t"):
            out += [_encoded_words(run + word), separator]
            run = b""
        else:
            run += word + separator
    stripped = run.rstrip(b" \t")
    out += [_encoded_words(stripped), run[len(stripped) :]] if run else []
    return b"".join(out).translate(_QUESTION)


def _encoded_words(text: bytes) -> bytes:
    try:
        pieces, charset = text.decode("utf-8"), b"utf-8"
        # at most 4 octets to a character, so that none is cut
        rows = [pieces[at : at + _WORD // 4].encode("utf-8") for at in range(0, len(pieces), _WORD // 4)]
    except UnicodeDecodeError:
        charset = b"unknown-8bit"
        rows = [text[at : at + _WORD] for at in range(0, len(text), _WORD)]
    return b" ".join(b"=?%b?B?%b?=" % (charset, binascii.b2a_base64(row, newline=False)) for row in rows)


def _broken(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines that are still too long, those of headers and frames, get CRLF and a blank (RFC 5322 section 2.2.3)."""
    column = 0  # of a line that comes in pieces
    batch: list[bytes] = []
    octets = 0
    for piece in lines(chunks):
        ends = piece.endswith(b"\r\n")
        rest = piece[:-2] if ends else piece
        rest = _BARE.sub(b" ", rest)  # in a header or a frame: in a part it is encoded by now
        while column + len(rest) > LINE_LIMIT:
            room = LINE_LIMIT - column
            blank = max(rest.rfind(b" ", 1, room), rest.rfind(b"\t", 1, room))
            if blank > 0 and rest[:blank].strip():
                batch += [rest[:blank], b"\r\n"]
                rest = rest[blank:]
            else:
                batch += [rest[:room], b"\r\n "]
                rest = rest[room:]
                column = 1
                octets += room
                continue
            octets += blank
            column = 0
        batch += [rest, b"\r\n"] if ends else [rest]
        octets += len(piece)
        column = 0 if ends else column + len(rest)
        if octets >= _BATCH:
            yield b"".join(batch)
            batch, octets = [], 0
    if column:
        batch.append(b"\r\n")
    if batch:
        yield b"".join(batch)
