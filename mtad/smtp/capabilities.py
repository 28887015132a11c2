"""What a server offers, from its reply to EHLO (RFC 5321 section 4.1.1.1), for the sending half.

`Capabilities` has a field for each extension that we make use of. What a server writes there is not believed further than
it can be checked: a number that is none, or that no message can have, is taken for "not said" (attack D-10).

``AUTH=LOGIN``, the form of servers of old, is a keyword of its own and means nothing to us: what it would announce is
announced by ``AUTH`` as well in every server that can be trusted with a password (attack C-TL4).

Standards: RFC 1870 (SIZE), 2920 (PIPELINING), 3030 (CHUNKING, BINARYMIME), 3207 (STARTTLS), 3461 (DSN), 4954 (AUTH), 6152
(8BITMIME), 6531 (SMTPUTF8), 9422 (LIMITS).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from mtad.reply import Reply

# RFC 1870 section 4: size-param = [1*DIGIT], at most 20 digits; ours are those of a number that can be meant
_NUMBER: Final = re.compile(r"[0-9]{1,20}")

# RFC 9422 section 3: limit-name-value = limit-name "=" limit-value; the values of those we know are 1 to 999999
_LIMIT: Final = re.compile(r"([A-Za-z0-9-]+)=([0-9]{1,6})")


class Capabilities(msgspec.Struct, frozen=True):
    """The keywords of EHLO in upper case with their parameters, and what follows from them.

    Numbers are 0 where the server names no limit: ``size_limit`` in octets of a message, ``recipient_limit`` and
    ``domain_limit`` (of recipients) in one transaction, ``message_limit`` in one session.
    """

    extensions: Mapping[str, str]
    pipelining: bool = False
    size: bool = False
    size_limit: int = 0
    eight_bit: bool = False
    utf8: bool = False
    chunking: bool = False
    binary: bool = False
    dsn: bool = False
    starttls: bool = False
    mechanisms: tuple[str, ...] = ()
    recipient_limit: int = 0
    domain_limit: int = 0
    message_limit: int = 0

    def without_chunking(self) -> Capabilities:
        """The same, for a server that offers BDAT and does not know it."""
        return msgspec.structs.replace(self, chunking=False, binary=False)


NO_EXTENSIONS: Final = Capabilities({})


def parse_capabilities(reply: Reply) -> Capabilities:
    """Read a positive reply to EHLO; its first line is a name, keywords come in any case, the first of each counts."""
    extensions: dict[str, str] = {}
    for line in reply.lines[1:]:
        keyword, _, parameters = line.strip().partition(" ")
        if keyword:
            extensions.setdefault(keyword.upper(), parameters.strip())
    limits = {name.upper(): int(value) for name, value in _LIMIT.findall(extensions.get("LIMITS", ""))}
    size = extensions.get("SIZE", "")
    return Capabilities(
        extensions,
        pipelining="PIPELINING" in extensions,
        size="SIZE" in extensions,
        size_limit=int(size) if _NUMBER.fullmatch(size) else 0,
        eight_bit="8BITMIME" in extensions,
        utf8="SMTPUTF8" in extensions,
        chunking="CHUNKING" in extensions,
        # RFC 3030 section 3: BINARYMIME is of no use without CHUNKING
        binary="BINARYMIME" in extensions and "CHUNKING" in extensions,
        dsn="DSN" in extensions,
        starttls="STARTTLS" in extensions,
        mechanisms=tuple(extensions.get("AUTH", "").upper().split()),
        recipient_limit=limits.get("RCPTMAX", 0),
        domain_limit=limits.get("RCPTDOMAINMAX", 0),
        message_limit=limits.get("MAILMAX", 0),
    )
