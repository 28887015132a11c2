"""The values of the parameters of MAIL and RCPT, and the argument of BDAT.

What it is for: the second half of `mtad.smtp.grammar`: one function for each parameter, from its text to what it means.
`encode_xtext` is for those who pass parameters on.

Invariants: what leaves this module is printable US-ASCII, whatever was hidden in xtext: no ``+0A`` becomes a line end in a
queue file, a header or a report (CVE-2020-28021, CVE-2020-28026 in Exim). Numbers are digits and nothing else.

Errors: `SyntaxFault`, answered with 501 5.5.4; the text says what was expected.

Standards: RFC 1870 (SIZE); RFC 3030 (BDAT, BODY=BINARYMIME); RFC 3461 section 4 (RET, ENVID, NOTIFY, ORCPT, xtext); RFC
4954 section 5 (AUTH=); RFC 6152 (BODY); RFC 6533 section 3 (ORCPT=utf-8).
"""

# ruff: noqa: ERA001 - ABNF reads like commented-out code

from __future__ import annotations

import re
from typing import Final, Literal, cast

import msgspec

from mtad.envelope import Notify
from mtad.errors import SyntaxFault

#: Characters of an envelope id, RFC 3461 section 4.4.
MAX_ENVID: Final = 100
#: Characters of an original recipient, RFC 3461 section 4.2.
MAX_ORCPT: Final = 500

# size-value     = 1*20DIGIT (RFC 1870 section 4)
_SIZE: Final = re.compile(r"[0-9]{1,20}")

# chunk-size     = 1*DIGIT; end-marker = "LAST" (RFC 3030 section 2). Twenty digits are more than anybody can send.
_CHUNK: Final = re.compile(r"([0-9]{1,20})(?: +([Ll][Aa][Ss][Tt]))?")

# xtext          = *( xchar / hexchar )
# xchar          = any ASCII CHAR between "!" (33) and "~" (126) inclusive, except for "+" and "="
# hexchar        = ASCII "+" immediately followed by two upper case hexadecimal digits
_XTEXT: Final = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*")
_HEXCHAR: Final = re.compile(rb"\+([0-9A-F]{2})")
_NOT_XCHAR: Final = re.compile(r"[^!-*,-<>-~]")

# original-recipient-address = addr-type ";" xtext
_ADDRESS_TYPE: Final = re.compile(r"[A-Za-z0-9-]{1,40}")

# EmbeddedUnicodeChar = %x5C.78 "{" HEXPOINT "}" (RFC 6533 section 3)
_EMBEDDED: Final = re.compile(r"\\x\{([0-9A-F]{2,6})\}")

Body = Literal["", "8bitmime", "binarymime"]
Ret = Literal["full", "hdrs"]

_BODIES: Final[dict[str, Body]] = {"7BIT": "", "8BITMIME": "8bitmime", "BINARYMIME": "binarymime"}
_NOTIFY: Final = frozenset({"never", "success", "failure", "delay"})


class Chunk(msgspec.Struct, frozen=True):
    """What BDAT announces: so many octets follow its line, and whether they are the last of the message."""

    octets: int
    last: bool


def parse_chunk(argument: str) -> Chunk:
    """The argument of BDAT. After a fault nobody knows how many octets follow."""
    match = _CHUNK.fullmatch(argument)
    if match is None:
        raise SyntaxFault("expected BDAT octets [LAST]")
    return Chunk(int(match[1]), match[2] is not None)


def parse_size(value: str) -> int:
    """SIZE=: the octets that the client means to send."""
    if _SIZE.fullmatch(value) is None:
        raise SyntaxFault("expected SIZE=number")
    return int(value)


def parse_body(value: str) -> Body:
    """BODY=: how the content is encoded; "" for 7BIT."""
    body = _BODIES.get(value.upper()) if value.isascii() else None
    if body is None:
        raise SyntaxFault("expected BODY=7BIT, BODY=8BITMIME or BODY=BINARYMIME")
    return body


def parse_ret(value: str) -> Ret:
    """RET=: how much of the message comes back with a report."""
    word = value.lower()
    if word not in {"full", "hdrs"}:
        raise SyntaxFault("expected RET=FULL or RET=HDRS")
    return cast(Ret, word)


def parse_envid(value: str) -> str:
    """ENVID=: the sender's own name for this transaction, decoded."""
    envid = decode_xtext(value)
    if not 0 < len(envid) <= MAX_ENVID:
        raise SyntaxFault(f"expected ENVID= of 1 to {MAX_ENVID} characters")
    return envid


def parse_notify(value: str) -> tuple[Notify, ...]:
    """NOTIFY=: what the sender wants to hear of; NEVER stands alone."""
    words = tuple(dict.fromkeys(value.lower().split(",")))
    if not _NOTIFY.issuperset(words) or ("never" in words and len(words) > 1):
        raise SyntaxFault("expected NOTIFY=NEVER, or a list of SUCCESS, FAILURE and DELAY")
    return cast(tuple[Notify, ...], words)


def parse_orcpt(value: str) -> str:
    """ORCPT=: the recipient as the sender first wrote it: ``type;address``, decoded from xtext, the type in lower case.

    An address of the type utf-8 that holds more than US-ASCII comes back with ``\\x{..}`` for it (utf-8-addr-xtext of RFC
    6533), the form in which every report and every next hop can have it. So does one of the type rfc822 whose xtext stands
    for UTF-8, as ``rfc822;m+C3+BCller@example.org``: RFC 3461 has no such thing, but Postfix 3.7 says it of every recipient
    that needs SMTPUTF8.
    """
    kind, semicolon, text = value.partition(";")
    if not semicolon or _ADDRESS_TYPE.fullmatch(kind) is None or len(value) > MAX_ORCPT:
        raise SyntaxFault(f"expected ORCPT=type;address of at most {MAX_ORCPT} characters")
    kind = kind.lower()
    address = _decode(_embed(text) if kind == "utf-8" else text)
    if kind in {"rfc822", "utf-8"} and not address.isascii():
        # A backslash that was one stays one: it must not seem to begin an embedded character.
        address = _embed(address if kind == "utf-8" else address.replace("\\", r"\x{5C}"))
        kind = "utf-8"
    if not address.isascii():
        raise SyntaxFault("character in xtext that does not print")
    if not address:
        raise SyntaxFault("expected an address in ORCPT=")
    if kind == "utf-8" and not all(_prints(match[1]) for match in _EMBEDDED.finditer(address)):
        raise SyntaxFault("character in ORCPT= that does not print")
    return f"{kind};{address}"


def _embed(text: str) -> str:
    return text if text.isascii() else "".join(c if c.isascii() else rf"\x{{{ord(c):X}}}" for c in text)


def _prints(digits: str) -> bool:
    point = int(digits, 16)
    return point <= 0x10FFFF and chr(point).isprintable()


def parse_auth(value: str) -> str:
    """AUTH=: who gave the message to the client, as far as it knows; "" for ``<>``."""
    return "" if value == "<>" else decode_xtext(value)


def decode_xtext(text: str) -> str:
    """What xtext stands for.

    Raises:
        SyntaxFault: it is not xtext, or stands for something else than printable US-ASCII.
    """
    decoded = _decode(text)
    if not decoded.isascii():
        raise SyntaxFault("character in xtext that does not print")
    return decoded


def _decode(text: str) -> str:
    """What xtext stands for, read as UTF-8."""
    if _XTEXT.fullmatch(text) is None:
        raise SyntaxFault("expected xtext")
    if "+" not in text:
        return text
    octets = _HEXCHAR.sub(lambda match: bytes((int(match[1], 16),)), text.encode("ascii"))
    try:
        decoded = octets.decode("utf-8")
    except UnicodeDecodeError:
        raise SyntaxFault("character in xtext that does not print") from None
    if not decoded.isprintable():
        raise SyntaxFault("character in xtext that does not print")
    return decoded


def encode_xtext(text: str) -> str:
    """Text as xtext, for a parameter that is passed on.

    Raises:
        ValueError: the caller's fault: more than US-ASCII.
    """
    return _NOT_XCHAR.sub(lambda match: f"+{match[0].encode('ascii')[0]:02X}", text)
