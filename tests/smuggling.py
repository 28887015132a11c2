"""The octets of SMTP smuggling: what some server somewhere takes for the end of a message, and what is hidden behind it.

The numbers are those of the rows S-SM1 to S-SM24 and C-SM1 to C-SM24 of the list of attacks.
"""

from __future__ import annotations

import re
from typing import Final

import pytest

SEQUENCES: Final[dict[int, bytes]] = {
    1: b"\n.\n",
    2: b"\n.\r\n",
    3: b"\r\n.\n",
    4: b"\r.\r",
    5: b"\r.\n",
    6: b"\r.\r\n",
    7: b"\n.\r",
    8: b"\r\n.\r",
    9: b"\r\n\0.\r\n",
    10: b"\r\n.\0\r\n",
    11: b"\r\n.\r\r\n",
    12: b"\r\r\n.\r\r\n",
    13: b"\r\r\n.\r\n",
    14: b"\r\n .\r\n",
    15: b"\r\n.\t\r\n",
    16: b"\r\n. \r\n",
    17: b"\n\n.\n\n",
    18: b"\x85.\x85",
    19: b"\xe2\x80\xa8.\xe2\x80\xa8",
    20: b"\x0b.\x0b",
    21: b"\x0c.\x0c",
    22: b"\x1a",
    23: b"\r\n..\r\n",
    24: b"\0\r\n.\r\n",
}

#: Those that hold the true end of data: what follows them is no part of the message by anybody's reading.
TRUE_ENDS: Final = frozenset({13, 24})

SMUGGLER: Final = "smuggled@a"

#: The whole second message that is hidden in the first one, with its end.
HIDDEN: Final = b"MAIL FROM:<smuggled@a>\r\nRCPT TO:<bob@example.org>\r\nDATA\r\nS: x\r\n\r\nsmug\r\n.\r\n"

#: A CR or LF on its own.
BARE: Final = re.compile(rb"\r(?!\n)|(?<!\r)\n")

#: What a lenient server may take for the end of data: any line ends around a dot, NULs and blanks overlooked.
LENIENT: Final = re.compile(rb"(?:\r\n|\r|\n)\0*\.[\0 \t]*(?:\r\n|\r|\n)")

_ANY_LINE_END: Final = re.compile(rb"\r\n|\r|\n")

every_server_row: Final = pytest.mark.parametrize("row", SEQUENCES, ids=lambda row: f"S-SM{row}")
every_client_row: Final = pytest.mark.parametrize("row", SEQUENCES, ids=lambda row: f"C-SM{row}")


def is_bare(content: bytes) -> bool:
    """Whether a CR or LF on its own is in it."""
    return BARE.search(content) is not None


def with_crlf(content: bytes) -> bytes:
    """The same lines, each of them ended by CRLF."""
    lines = _ANY_LINE_END.sub(b"\r\n", content)
    return lines if lines.endswith(b"\r\n") or not lines else lines + b"\r\n"


def stuffed(content: bytes) -> bytes:
    """Content as an honest client sends it, that knows no line end but CRLF; with the end of data."""
    lines = (b"\r\n" + content).replace(b"\r\n.", b"\r\n..")[2:]
    return lines + (b".\r\n" if lines.endswith(b"\r\n") else b"\r\n.\r\n")


def unstuffed(sent: bytes) -> bytes:
    """The content in what was sent up to and including its true end (RFC 5321 section 4.5.2)."""
    assert sent.endswith(b"\r\n.\r\n") or sent == b".\r\n"
    return (b"\r\n" + sent[:-3]).replace(b"\r\n.", b"\r\n")[2:]
