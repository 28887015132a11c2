"""A message made fit for a next hop: what it lacks is converted, or the message is refused by the standard.

- No 8BITMIME, or a line longer than 998 octets, or NUL, or a BINARYMIME body and no BINARYMIME: parts are re-encoded, see
  `mtad.smtp.downgrade` (RFC 6152 section 3, RFC 3030 section 3). What cannot be converted fails, 5.6.3.
- No SMTPUTF8: what needs it fails, 5.6.7 (RFC 6531 section 3.2). A recipient with UTF-8 in its local part needs it; for
  all recipients a sender with that does, or a message that came with SMTPUTF8 and has UTF-8 in its header. A domain does
  not: it goes out as A-labels wherever the local part is US-ASCII.
- A message larger than the hop takes fails, 5.3.4, and is not sent (RFC 1870 section 6.1: the same would be said to MAIL,
  and is a refusal for good).
- Line ends other than CRLF, which our spool does not hold, become CRLF.

A message is looked at once for all hosts, and converted at most once for each kind of host. The converted content is in
memory when it is small, else in a temporary file without a name. Invariants: memory does not grow with the message;
`Fit.size` is exactly what `Fit.chunks` yields.

Errors: `ConversionFailed` when the temporary file cannot be written: temporary, 4.3.0. What reading the content raises goes
through.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import IO, Final, Self

import idna
import msgspec

from mtad.delivery.transport import Content
from mtad.delivery.words import Place
from mtad.envelope import Envelope, Recipient
from mtad.errors import MtadError
from mtad.outcome import Failed
from mtad.smtp.capabilities import Capabilities
from mtad.smtp.client import first_field
from mtad.smtp.commands import Body, Mail
from mtad.smtp.downgrade import convert
from mtad.smtp.mime import TooDeep
from mtad.smtp.outgoing import Survey, normalise, survey

#: Octets of converted content that are kept in memory.
IN_MEMORY: Final = 256 * 1024

_PIECE: Final = 64 * 1024


class ConversionFailed(MtadError):
    """The machine has no room for the converted content."""


class _Form(msgspec.Struct, frozen=True):
    """One form of the content; ``start`` has its first line, or more."""

    size: int
    start: bytes
    body: Body
    chunks: Callable[[], Iterator[bytes]]


class Fit(msgspec.Struct, frozen=True):
    """What a next hop gets: recipients that are not ``refused``, and the content in the form that it takes."""

    refused: Mapping[int, Failed]
    size: int = 0
    start: bytes = b""
    body: Body = ""
    utf8: bool = False
    chunks: Callable[[], Iterator[bytes]] = lambda: iter(())


class Conversion:
    """One message on its way to one or more hosts; a context manager."""

    def __init__(self, envelope: Envelope, content: Content) -> None:
        """Nothing is read yet."""
        self._envelope = envelope
        self._content = content
        self._survey: Survey | None = None
        self._forms: dict[str, _Form] = {}
        self._files: list[IO[bytes]] = []
        self._sender = ascii_domain(envelope.sender)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files:
            with suppress(OSError):  # what did not go into it before does not now, either
                file.close()

    def recipient(self, index: int) -> Recipient:
        """A recipient as it is named to a next hop."""
        recipient = self._envelope.recipients[index]
        if recipient.address.isascii():
            return recipient
        return msgspec.structs.replace(recipient, address=ascii_domain(recipient.address))

    def mail(self, fit: Fit, indexes: Sequence[int]) -> Mail:
        """What is to be said in one transaction."""
        return Mail(
            self._sender,
            tuple(self.recipient(index) for index in indexes),
            fit.size,
            fit.body,
            fit.utf8,
            self._envelope.ret,
            self._envelope.envid,
        )

    def fit(self, capabilities: Capabilities, indexes: Sequence[int], at: Place) -> Fit:
        """What a server ``at`` a place, which offers this, gets for these recipients; at least one.

        Raises:
            ConversionFailed: no room for the converted content.
        """
        look = self._look()
        needing = {index for index in indexes if not self.recipient(index).address.isascii()}
        everybody = not self._sender.isascii() or (self._envelope.smtputf8 and look.eight_bit_header)
        refused: dict[int, Failed] = {}
        if not capabilities.utf8 and (everybody or needing):
            failed = Failed("5.6.7", f"SMTPUTF8 is required, but was not offered by host {at}", at.host)
            refused = dict.fromkeys(indexes if everybody else needing, failed)
            if len(refused) == len(indexes):
                return Fit(refused)
        try:
            form = self._form(look, capabilities)
        except TooDeep as fault:
            failed = Failed("5.6.3", f"host {at} cannot take this message, and it cannot be converted: {fault}", at.host)
            return Fit(dict.fromkeys(indexes, failed))
        if 0 < capabilities.size_limit < form.size:
            text = f"message size {form.size} exceeds size limit {capabilities.size_limit} of server {at}"
            return Fit({**dict.fromkeys(indexes, Failed("5.3.4", text, at.host)), **refused})
        utf8 = capabilities.utf8 and (everybody or bool(needing))
        return Fit(refused, form.size, form.start, form.body, utf8, form.chunks)

    def _look(self) -> Survey:
        if self._survey is None:
            self._survey = survey(self._content.chunks())
            if self._envelope.body != "binarymime" and not self._survey.clean:
                # so that all who ask for it, and the size that is said, are about what is sent
                self._survey = survey(normalise(self._content.chunks()))
                content = self._content
                self._chunks: Callable[[], Iterator[bytes]] = lambda: normalise(content.chunks())
            else:
                self._chunks = self._content.chunks
        return self._survey

    def _form(self, look: Survey, capabilities: Capabilities) -> _Form:
        binary = self._envelope.body == "binarymime"
        eight_bit = look.eight_bit and capabilities.eight_bit
        if binary and capabilities.binary and first_field(look.start):
            return _Form(look.size, look.start, "BINARYMIME", self._chunks)
        if not (binary or look.long_lines or look.nul or (look.eight_bit and not eight_bit)):
            return _Form(look.size, look.start, "8BITMIME" if eight_bit else "", self._chunks)
        name = "8" if eight_bit else "7"
        if name not in self._forms:
            self._forms[name] = self._convert(eight_bit)
        return self._forms[name]

    def _convert(self, eight_bit: bool) -> _Form:
        file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  closed with the delivery
        self._files.append(file)
        size = 0
        for chunk in convert(self._chunks, eight_bit=eight_bit):
            size += len(chunk)
            with _made():
                file.write(chunk)

        def chunks() -> Iterator[bytes]:
            file.seek(0)
            while piece := file.read(_PIECE):
                yield piece

        with _made():  # what is still in its buffer is written by the seek
            file.seek(0)
            start = file.read(_PIECE)
        return _Form(size, start, "8BITMIME" if eight_bit else "", chunks)


@contextmanager
def _made() -> Iterator[None]:
    """The converted content is being made meanwhile."""
    try:
        yield
    except OSError as error:
        raise ConversionFailed(f"no room to convert the message: {error.strerror}") from None


def ascii_domain(address: str) -> str:
    """A Mailbox with its domain as A-labels, when its local part is US-ASCII; unchanged when there are none."""
    local, at, domain = address.rpartition("@")
    if address.isascii() or not local.isascii():
        return address
    try:
        return local + at + idna.encode(domain, uts46=True, std3_rules=True).decode("ascii")
    except (UnicodeError, ValueError):
        return address
