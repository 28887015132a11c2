"""What we show to next hops: the file of ``delivery.credentials``, with lines ``next-hop : login : password``.

The next hop is written as in the setting ``next_hop``: with a port it is for that port only, brackets make no difference.
The parts are separated by a colon with white space on both sides, so that a password may hold colons; white space around it
does not belong to it. A line that begins with ``#`` is a comment. A password ``token:...`` is an OAuth 2.0 access token
(XOAUTH2), which another program keeps fresh: the file is read again when it has changed.

Invariants: the file must not be open to others, nor written by its group: it is not used then. What is in it is in no log,
no outcome, no ``repr`` and no exception.

Errors: `CredentialsFault`: not readable, too open, or a line that cannot be read; mail waits until that is mended, for
without AUTH the next hop would refuse it for good.
"""

from __future__ import annotations

import os
import re
import stat
from threading import Lock
from typing import Final

import msgspec

from mtad.errors import MtadError
from mtad.nexthop import BadNextHop, parse_next_hop

#: A password that is an access token.
TOKEN: Final = "token:"

#: Octets of the file; more is a mistake.
_LIMIT: Final = 1024 * 1024

_SEPARATOR: Final = re.compile(r"[ \t]+:[ \t]+")

#: Stands for "any port".
_ANY: Final = 0


class CredentialsFault(MtadError):
    """The file cannot be used; the text says why, and holds nothing of what is in it."""


class Credential(msgspec.Struct, frozen=True):
    """Who we are at a next hop. ``token``: the secret is an access token."""

    login: str
    secret: str
    token: bool = False

    def __repr__(self) -> str:
        return "Credential(...)"


class CredentialsFile:
    """One file, read when it is needed and again when it has changed. Thread-safe."""

    def __init__(self, path: str) -> None:
        """Nothing is read yet."""
        self._path = path
        self._lock = Lock()
        self._stamp: tuple[int, ...] | None = None
        self._entries: dict[tuple[str, int], Credential] = {}

    def find(self, name: str, port: int) -> Credential | None:
        """The credential for a next hop: name in lower case or address, and port; None: there is none.

        Raises:
            CredentialsFault: the file cannot be used.
        """
        with self._lock:
            self._refresh()
            return self._entries.get((name, port)) or self._entries.get((name, _ANY))

    def _refresh(self) -> None:
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                stamp = (status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode, status.st_uid)
                if stamp == self._stamp:
                    return
                if status.st_mode & (stat.S_IRWXO | stat.S_IWGRP) or status.st_uid not in {0, os.geteuid()}:
                    raise CredentialsFault(
                        f"{self._path}: others can read or change it; chmod 640 or 600, owner root or us"
                    )
                data = file.read(_LIMIT + 1)
        except OSError as error:
            raise CredentialsFault(f"{self._path}: {error.strerror or error}") from None
        self._entries = _parse(self._path, data)
        self._stamp = stamp


def _parse(path: str, data: bytes) -> dict[tuple[str, int], Credential]:
    if len(data) > _LIMIT:
        raise CredentialsFault(f"{path}: larger than {_LIMIT} octets")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise CredentialsFault(f"{path}: not UTF-8") from None
    entries: dict[tuple[str, int], Credential] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        parts = _SEPARATOR.split(stripped, maxsplit=2)
        if len(parts) != 3 or not parts[1] or not stripped.isprintable():
            raise CredentialsFault(f"{path}:{number}: expected next-hop : login : password")
        try:
            hop = parse_next_hop(parts[0] if _has_port(parts[0]) else f"{parts[0]}:1", 1)
        except BadNextHop:
            raise CredentialsFault(
                f"{path}:{number}: the next hop is none of host, host:port, [host], [host]:port"
            ) from None
        token = parts[2].startswith(TOKEN)
        secret = parts[2].removeprefix(TOKEN) if token else parts[2]
        key = (hop.name, hop.port if _has_port(parts[0]) else _ANY)
        entries.setdefault(key, Credential(parts[1], secret, token))
    return entries


def _has_port(text: str) -> bool:
    return ":" in text.rpartition("]")[2]
