"""Who has a mailbox here: the users file.

Lines are ``user : address``, as ``root : root@example.org``. Blank lines do not count, nor does what follows a ``#`` at the
start of a line or after white space. A user may have several addresses, each on its own line; an address has one user.
Addresses are compared without case. Mail for ``postmaster`` in any local domain, and for the bare ``<postmaster>``, goes to
the postmaster user when no line says otherwise (RFC 5321 section 4.5.1).

The file is read again when it has changed (`mtad.followed`). A new file with a fault is reported through ``warn``, and the
old contents stay in force. So they do when no user is left: that is how a file looks that somebody is writing anew, on a
full disk for instance, and mail that was taken would be sent back. A reload believes it.

Invariants: a user name that comes out of `Users.lookup` is a safe directory name (`config_rules.is_user_name`). `Users` may
be asked by several threads: the table is replaced as a whole and never changed.
Errors: ConfigError at the first reading names file and line of every fault.
Standards: RFC 5321 sections 4.1.2 (Mailbox), 4.5.1 (postmaster).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec

from mtad.address import Address
from mtad.config_rules import is_user_name
from mtad.errors import ConfigError, Problem, SyntaxFault
from mtad.followed import FollowedFile
from mtad.smtp.grammar import parse_mailbox

_COMMENT: Final = re.compile(r"(?:\A|\s)#.*")


class Table(msgspec.Struct, frozen=True):
    """The contents of a users file. ``users`` maps `Address.key` to user name."""

    users: Mapping[str, str]
    oddities: tuple[Problem, ...] = ()
    """Lines without a fault that cannot have an effect: their domain is not ours."""


def parse_users(data: bytes, filename: str, domains: Iterable[str]) -> Table:
    """Read the contents of a users file. ``domains`` are the local ones, in lower case.

    Raises:
        ConfigError: a line is no ``user : address``, a user name is unsafe, or an address has two users; all of them.
    """
    local = frozenset(domains)
    problems: list[Problem] = []
    oddities: list[Problem] = []
    seen: dict[str, tuple[str, int]] = {}
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            entry = _parse_line(raw)
            if entry is None:
                continue
            user, address = entry
            other, line = seen.setdefault(address.key, (user, number))
            if other != user:
                raise ValueError(f"{address} belongs to {other!r} already, line {line}")
            if address.domain not in local:
                oddities.append(Problem(filename, number, user, f"{address.domain} is not in local.domains"))
        except ValueError as error:
            problems.append(Problem(filename, number, "", str(error)))
    if problems:
        raise ConfigError(problems)
    return Table({key: user for key, (user, _) in seen.items()}, tuple(oddities))


def _parse_line(raw: bytes) -> tuple[str, Address] | None:
    """User and address of one line; None when the line has none.

    Raises:
        ValueError: the line is wrong; the text says how.
    """
    try:
        line = _COMMENT.sub("", raw.decode("utf-8")).strip()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if not line:
        return None
    user, colon, text = (part.strip() for part in line.partition(":"))
    if not colon or not text:
        raise ValueError(f"expected `user : address`, got {line!r}")
    if not is_user_name(user):
        raise ValueError(
            f"{user!r} cannot be the name of a mailbox: empty, hidden, too long, or with / or control characters"
        )
    try:
        return user, parse_mailbox(text)
    except SyntaxFault as error:
        raise ValueError(f"{text!r} is not an address: {error}") from None


def _silent(_message: str) -> None:
    pass


class Users:
    """The users file at ``path``, kept up to date. Make it with `load`."""

    def __init__(
        self,
        path: str,
        domains: Iterable[str],
        postmaster: str,
        *,
        fallback: bool = False,
        warn: Callable[[str], None] = _silent,
    ) -> None:
        """Nothing is read yet; see `load` for the arguments."""
        self._path = path
        self._domains = frozenset(domain.lower() for domain in domains)
        self._postmaster = postmaster
        self._fallback = fallback
        self.file = FollowedFile(
            path, "local.users", self._take, lambda fault: warn(f"{fault}; the users read before stay in force")
        )
        self.table = Table({})

    @classmethod
    def load(
        cls,
        path: str,
        domains: Iterable[str],
        postmaster: str,
        *,
        fallback: bool = False,
        warn: Callable[[str], None] = _silent,
    ) -> Users:
        """Read the file.

        Args:
            path: of the file.
            domains: the local domains.
            postmaster: the user who gets mail for postmaster.
            fallback: what the development defaults do when there is no file: the postmaster user has the only mailbox, and
                its address is that user's name in every local domain. Pass ``config.development``.
            warn: called with one line for each fault that is found later, when the file has changed.

        Raises:
            ConfigError: the file cannot be read, or has a fault.
        """
        users = cls(path, domains, postmaster, fallback=fallback, warn=warn)
        users.file.read()
        return users

    def lookup(self, address: Address) -> str | None:
        """The user whose mailbox ``address`` is, or None when nobody has it. Looks for a changed file first."""
        self.file.follow()
        user = self.table.users.get(address.key)
        if address.domain:
            if address.domain.lower() not in self._domains:
                return None
            if user is None and address.local.casefold() == "postmaster":
                return self._postmaster
            return user
        return self._postmaster if address.local.casefold() == "postmaster" else None

    def _take(self, data: bytes | None) -> None:
        if data is not None:
            table = parse_users(data, self._path, self._domains)
            if self.table.users and not table.users:
                raise ConfigError(
                    [Problem(self._path, None, "local.users", "no user is left, which only a reload believes")]
                )
            self.table = table
        elif self._fallback:
            self.table = Table({f"{self._postmaster}@{domain}".casefold(): self._postmaster for domain in self._domains})
        else:
            raise ConfigError([Problem(self._path, None, "local.users", os.strerror(errno.ENOENT))])
