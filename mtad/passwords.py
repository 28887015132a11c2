"""Who may log in: the password file.

Lines are ``login : hash``, as ``alice : SCRAM-SHA-256$32768:<salt>$<stored key>:<server key>`` (RFC 5803, as PostgreSQL
writes it; the three are base64). Blank lines do not count, nor do lines that start with ``#``. ``mtad passwd`` writes it.
What is kept of a password checks it and does not log in with it; still the file is for the server's eyes only (0600).

Logins are compared in the form of SASLprep and without case, so that nobody can own a look-alike of another's login.

The file is read again when it has changed (`mtad.followed`). A new file with a fault is reported through ``warn``, and the
old contents stay in force. A file that is missing has no logins.

Invariants: `Passwords.find` gives keys for every login, and takes the same time for it. Those of a login that nobody has
are made of it and of a secret of this machine, so that they stay the same over restarts, and in all processes, and show
nobody who exists. `Passwords` may be asked by several threads: the table is replaced as a whole and never changed.

Errors: ConfigError at the first reading names file and line of every fault, and never what stands behind the colon.
Standards: RFC 5803 (storing SCRAM), RFC 7677 section 4 (iterations), RFC 4013 (SASLprep).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import hmac
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from mtad.errors import ConfigError, Problem
from mtad.followed import FollowedFile
from mtad.smtp.sasl import Entry, Keys, SaslFault, derive, prepare
from mtad.stable import flush

#: Rounds of PBKDF2 for a new password: some 10 ms. RFC 7677 section 4 asks for 4096 at least; each login costs the server
#: so much (PLAIN) or the client (SCRAM), and each guess the one who stole the file.
ITERATIONS: Final = 32768

#: Octets of a new salt.
SALT: Final = 16

_HASH: Final = re.compile(r"SCRAM-SHA-256\$([1-9][0-9]{3,7}):([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]+):([A-Za-z0-9+/=]+)")
_LEAST: Final = 4096
_DIGEST: Final = 32


def normal(login: str) -> str:
    """The form in which logins are compared.

    Raises:
        SaslFault: no login can be written so.
    """
    return prepare(login).casefold()


def parse_passwords(data: bytes, filename: str) -> Mapping[str, Entry]:
    """Read the contents of a password file; the keys are logins in their `normal` form.

    Raises:
        ConfigError: lines are no ``login : hash``, or a login stands twice; all of them.
    """
    problems: list[Problem] = []
    entries: dict[str, Entry] = {}
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            entry = _parse_line(raw)
            if entry is None:
                continue
            key = normal(entry.login)
            if key in entries:
                raise ValueError(f"{entry.login!r} stands in the file twice")
            entries[key] = entry
        except (ValueError, SaslFault) as error:
            problems.append(Problem(filename, number, "", str(error)))
    if problems:
        raise ConfigError(problems)
    return entries


def _parse_line(raw: bytes) -> Entry | None:
    try:
        line = raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if not line or line.startswith("#"):
        return None
    login, colon, text = (part.strip() for part in line.partition(":"))
    if not login or not colon:
        raise ValueError("expected `login : hash`, as `mtad passwd` writes it")
    return Entry(login, parse_hash(text))


def parse_hash(text: str) -> Keys:
    """Read a hash.

    Raises:
        ValueError: it is none that we know.
    """
    match = _HASH.fullmatch(text)
    if match is None or int(match[1]) < _LEAST:
        raise ValueError("expected a hash SCRAM-SHA-256$iterations:salt$key:key, as `mtad passwd` writes it")
    try:
        salt, stored, server = (base64.b64decode(part, validate=True) for part in match.groups()[1:])
    except binascii.Error:
        raise ValueError("the hash is damaged") from None
    if len(stored) != _DIGEST or len(server) != _DIGEST or len(salt) < SALT:
        raise ValueError("the hash is damaged")
    return Keys(salt, int(match[1]), stored, server)


def format_hash(keys: Keys) -> str:
    """A hash as it stands in the file."""
    salt, stored, server = (
        base64.b64encode(part).decode("ascii") for part in (keys.salt, keys.stored_key, keys.server_key)
    )
    return f"SCRAM-SHA-256${keys.iterations}:{salt}${stored}:{server}"


def make_keys(password: str) -> Keys:
    """The keys for a new password, with a salt of their own.

    Raises:
        SaslFault: empty, or with characters that a password must not have.
    """
    return derive(prepare(password), secrets.token_bytes(SALT), ITERATIONS)


def machine_secret() -> bytes:
    """32 octets that belong to this machine and that nobody outside of it knows; else random ones."""
    try:
        with open("/etc/machine-id", "rb") as file:
            text = file.read(64).strip()
    except OSError:
        text = b""
    if len(text) < 32:
        return secrets.token_bytes(32)
    return hmac.digest(text, b"mtad: keys of logins that nobody has", "sha256")


def _silent(_message: str) -> None:
    pass


class Passwords:
    """The password file at ``path``, kept up to date. Make it with `load`, before processes part."""

    def __init__(self, path: str, warn: Callable[[str], None] = _silent, secret: bytes = b"") -> None:
        """Nothing is read yet; see `load` for the arguments."""
        self._path = path
        self.file = FollowedFile(
            path, "local.passwords", self._take, lambda fault: warn(f"{fault}; the passwords read before stay in force")
        )
        self._secret = secret or machine_secret()
        self._entries: Mapping[str, Entry] = {}

    @classmethod
    def load(cls, path: str, *, warn: Callable[[str], None] = _silent, secret: bytes = b"") -> Passwords:
        """Read the file.

        Args:
            path: of the file, which may be missing.
            warn: called with one line for each fault that is found later, when the file has changed.
            secret: what keys of unknown logins are made of; `machine_secret` when empty.

        Raises:
            ConfigError: the file cannot be read, or has a fault.
        """
        passwords = cls(path, warn, secret)
        passwords.file.read()
        return passwords

    def find(self, login: str) -> Entry:
        """The entry for a login, as it stands in the file, or one that is made up. Looks for a changed file first."""
        self.file.follow()
        try:
            key = normal(login)
        except SaslFault:
            key = login
        made_up = self._made_up(login, key)
        return self._entries.get(key, made_up)

    def any(self) -> bool:
        """Whether anybody may log in at all."""
        self.file.follow()
        return bool(self._entries)

    def _made_up(self, login: str, key: str) -> Entry:
        seed = key.encode("utf-8", "surrogatepass")
        salt, stored, server = (
            hmac.digest(self._secret, word + seed, "sha256") for word in (b"salt ", b"stored ", b"server ")
        )
        return Entry(login, Keys(salt[:SALT], ITERATIONS, stored, server), known=False)

    def _take(self, data: bytes | None) -> None:
        self._entries = parse_passwords(data or b"", self._path)


def change_password(path: str, login: str, keys: Keys | None, owner: tuple[int, int] | None = None) -> bool:
    """Write a login and its keys into the file, or take it out; the rest of the file stays as it is.

    The file is replaced as a whole, for its owner only (0600), and never seen half written. Two who change it at a time
    wait for each other.

    Args:
        path: of the file; it is made when it is missing.
        login: whose password it is.
        keys: of the new password; None takes the login out.
        owner: user and group id of a new file; that of an old one stays.

    Returns:
        Whether the login was there before.

    Raises:
        SaslFault: no login can be written so.
        ConfigError: the file has a fault, which would be hard to find afterwards.
        OSError: the world's.
    """
    key = normal(login)
    if ":" in login or "\n" in login or login.startswith("#") or login != login.strip() or not login.isprintable():
        raise SaslFault("a login has no colon, no # at its start, and nothing that does not print")
    with _locked(os.path.dirname(path) or "."):
        try:
            with open(path, "rb") as file:
                data = file.read()
                status = os.fstat(file.fileno())
                owner = status.st_uid, status.st_gid
        except FileNotFoundError:
            data = b""
        there = key in parse_passwords(data, path)
        lines = [line for line in data.decode("utf-8").splitlines() if _login_of(line) != key]
        if keys is not None:
            lines.append(f"{login} : {format_hash(keys)}")
        if keys is not None or there:
            _replace(path, "".join(f"{line}\n" for line in lines).encode(), owner)
    return there


def _login_of(line: str) -> str | None:
    entry = _parse_line(line.encode())
    return normal(entry.login) if entry is not None else None


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _replace(path: str, data: bytes, owner: tuple[int, int] | None) -> None:
    temporary = f"{path}.new.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            if owner is not None and owner != (os.geteuid(), os.getegid()):
                os.fchown(fd, *owner)
            file.write(data)
            file.flush()
            flush(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flush(directory)
    finally:
        os.close(directory)
