"""Mail addresses as values (RFC 5321 section 4.1.2, Mailbox).

An `Address` is what the grammar of `mtad.smtp.grammar` made of a path: local part without quoting, domain in lower case.
Envelopes and queue files carry its text form (`str`), which is again a valid Mailbox; `domain_of` takes that apart
without parsing. The null reverse-path ``<>`` is `NULL`, the bare ``<postmaster>`` has no domain.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

import msgspec

# RFC 5321 section 4.1.2: Dot-string = Atom *("." Atom); atext from RFC 5322 section 3.2.3, and UTF8-non-ascii (RFC 6531).
# Written as what is no part of it: a range up to the last character of Unicode takes milliseconds to compile.
_ATOM: Final = r'[^\x00- "(),.:;<>@\[\\\]\x7f]+'
_DOT_STRING: Final = re.compile(rf"{_ATOM}(?:\.{_ATOM})*")


class Address(msgspec.Struct, frozen=True):
    """A mailbox: ``local`` unquoted, ``domain`` in lower case or an address literal such as ``[192.0.2.1]``."""

    local: str
    domain: str

    def __str__(self) -> str:
        """The address in Mailbox syntax, quoted where it must be; "" for the null reverse-path."""
        if not self.domain:
            return self.local
        local = self.local
        if _DOT_STRING.fullmatch(local) is None:
            local = '"' + local.replace("\\", "\\\\").replace('"', '\\"') + '"'
        return f"{local}@{self.domain}"

    @property
    def key(self) -> str:
        """The form in which addresses are compared: without case, both sides of the @, and one for each way to write an
        accented letter (RFC 6532 section 3.1)."""
        key = f"{self.local}@{self.domain}".casefold()
        return key if key.isascii() else unicodedata.normalize("NFC", key)


NULL: Final = Address("", "")


def domain_of(mailbox: str) -> str:
    """The domain of an address in text form, in lower case; "" when it has none."""
    return mailbox.rpartition("@")[2].lower() if "@" in mailbox else ""
