"""Who is it? The mechanisms of SASL (RFC 4422), sans-I/O: message in, message out. The client's role is `sasl_client`.

What it is for: `server_mechanism` finds out who a client is. It knows nothing of base64 lines and replies but `encode` and
`decode`; who drives it is `mtad.session.auth`.

The server's role is a generator: it yields a challenge (``b""`` when it is the client's turn anyway), is sent the
response, and returns a `Claim`: who the client says it is, and whether it proved that. It raises `SaslFault` for a message
that cannot be read.

``bindings`` are the channel bindings of the connection by their names, empty without TLS: ``tls-exporter`` (RFC 9266),
``tls-unique`` (RFC 5929; never with TLS 1.3), ``tls-server-end-point``. ``nonce`` is printable US-ASCII without a comma and
never used twice.

Invariants: passwords are never stored, compared or sent by SCRAM; the server holds `Keys`, of which no password can be
made. A password is compared with keys in the same time whether the login is known or not: unknown logins have keys, too,
see `mtad.passwords`. A client that takes part in channel binding is not talked out of it: who says that we offered no
SCRAM-SHA-256-PLUS when we did is refused.

Errors: `SaslFault`, for what came from the other side.

Standards: RFC 4422; RFC 4616 (PLAIN); RFC 5802 and 7677 (SCRAM-SHA-256); RFC 5929 and 9266 (channel bindings); RFC 4013
(SASLprep); RFC 4954 section 4 (base64). LOGIN has no RFC: draft-murchison-sasl-login.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Callable, Generator, Mapping
from hashlib import pbkdf2_hmac, sha256
from typing import Final, Protocol

import msgspec
from scramp import ScramException, ScramMechanism
from scramp.core import CbName
from scramp.utils import saslprep

from mtad.errors import MtadError

#: Channel bindings, the best first: the exporter belongs to the connection, the end point to the certificate only.
BINDINGS: Final = ("tls-exporter", "tls-unique", "tls-server-end-point")

# base64 = base64-terminal / ( 1*(4base64-CHAR) [base64-terminal] ) (RFC 4954 section 8); Python's decoders are lenient
_BASE64: Final = re.compile(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")

SCRAM: Final = "SCRAM-SHA-256"
PLUS: Final = "SCRAM-SHA-256-PLUS"


class SaslFault(MtadError):
    """The other side sent what this mechanism cannot go on with."""


class Keys(msgspec.Struct, frozen=True):
    """What a server keeps of a password (RFC 5802 section 3): enough to check it, not enough to log in with it."""

    salt: bytes
    iterations: int
    stored_key: bytes
    server_key: bytes


class Entry(msgspec.Struct, frozen=True):
    """A login and its keys; ``known`` is False for keys that were made up, which no password fits."""

    login: str
    keys: Keys
    known: bool = True


class Credentials(Protocol):
    """Who may log in."""

    def find(self, login: str, /) -> Entry:
        """The entry for a login; one that is made up for a login that nobody has, the same each time."""


class Claim(msgspec.Struct, frozen=True):
    """Who a client says it is, and whether that is so."""

    login: str
    proven: bool


Steps = Generator[bytes, bytes, Claim]


def _scramp_names_exporter() -> None:
    """Let scramp write ``tls-exporter`` into its messages.

    scramp 1.5 knows the name and refuses it, because Python's ssl module gives no such value. A connection that has one
    has the best there is for TLS 1.3. Where scramp is built otherwise the name stays unknown to it, and `usable` leaves
    it out.
    """
    if "tls-exporter" in getattr(CbName, "UNSUPPORTED_TYPES", ()):
        CbName.UNSUPPORTED_TYPES = frozenset()
        CbName.SUPPORTED_TYPES |= {"tls-exporter"}


_scramp_names_exporter()


def usable(bindings: Mapping[str, bytes]) -> dict[str, bytes]:
    """The channel bindings that SCRAM can be done with, the best first."""
    return {name: bindings[name] for name in BINDINGS if bindings.get(name) and _is_known(name)}


def _is_known(name: str) -> bool:
    try:
        CbName(name)
    except ScramException:
        return False
    return True


def encode(message: bytes) -> str:
    """A message as it stands in a line, without line end."""
    return base64.b64encode(message).decode("ascii")


def decode(text: str | bytes) -> bytes:
    """A message from a line.

    Raises:
        SaslFault: it is not base64 of RFC 4648 section 4, with its padding.
    """
    octets = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if _BASE64.fullmatch(octets) is None:
        raise SaslFault("not base64")
    return base64.b64decode(octets)


def prepare(text: str) -> str:
    """A login or password in the one form in which it is compared (SASLprep, RFC 4013).

    Raises:
        SaslFault: empty, or with characters that it must not have.
    """
    try:
        prepared: str = saslprep(text)
    except ScramException:
        raise SaslFault("characters that are not allowed") from None
    if not prepared:
        raise SaslFault("empty")
    return prepared


def derive(password: str, salt: bytes, iterations: int) -> Keys:
    """The keys for a password. Takes time in proportion to ``iterations``, on purpose."""
    try:
        password = prepare(password)
    except SaslFault:
        pass  # no password has such keys; it takes as long as any other
    salted = pbkdf2_hmac("sha256", password.encode("utf-8", "surrogatepass"), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    return Keys(salt, iterations, sha256(client_key).digest(), hmac.digest(salted, b"Server Key", "sha256"))


def _check(credentials: Credentials, authcid: bytes, password: bytes, authzid: bytes = b"") -> Claim:
    """Compare a password that came in clear."""
    login, secret, other = text_of(authcid), text_of(password), text_of(authzid)
    if not login:
        raise SaslFault("no login")
    entry = credentials.find(login)
    derived = derive(secret, entry.keys.salt, entry.keys.iterations)
    same = hmac.compare_digest(derived.stored_key, entry.keys.stored_key)
    # To act for somebody else (RFC 4616 section 2, authzid) is nothing that anybody may do here.
    return Claim(entry.login, same and entry.known and (not other or credentials.find(other).login == entry.login))


def text_of(octets: bytes) -> str:
    """Octets of a message as text.

    Raises:
        SaslFault: they are not UTF-8.
    """
    try:
        return octets.decode("utf-8")
    except UnicodeDecodeError:
        raise SaslFault("not UTF-8") from None


def _plain(credentials: Credentials, _bindings: Mapping[str, bytes], _nonce: str) -> Steps:
    """RFC 4616: message = [authzid] UTF8NUL authcid UTF8NUL passwd."""
    fields = (yield b"").split(b"\0")
    if len(fields) != 3:
        raise SaslFault("expected authorization identity, login and password")
    return _check(credentials, fields[1], fields[2], fields[0])


def _login(credentials: Credentials, _bindings: Mapping[str, bytes], _nonce: str) -> Steps:
    name = yield b"Username:"
    password = yield b"Password:"
    return _check(credentials, name, password)


def _scram(credentials: Credentials, bindings: Mapping[str, bytes], nonce: str, plus: bool = False) -> Steps:
    """RFC 5802 section 5, by scramp. The server's last word needs an answer, RFC 4954 section 4."""
    offered = usable(bindings)
    first = text_of((yield b""))
    flag = first.partition(",")[0]
    if flag.startswith("p=") is not plus:
        raise SaslFault("the mechanism and its channel binding do not agree")
    if plus and flag[2:] not in offered:
        raise SaslFault("no such channel binding")
    binding = flag[2:] if plus else next(iter(offered), "")
    found: list[Entry] = []

    def find(login: str) -> tuple[bytes, bytes, bytes, int]:
        found.append(credentials.find(login))
        keys = found[0].keys
        return keys.salt, keys.stored_key, keys.server_key, keys.iterations

    server = ScramMechanism(PLUS if plus else SCRAM).make_server(
        find, channel_binding=(binding, offered[binding]) if binding else None, s_nonce=nonce
    )
    try:
        server.set_client_first(first)
        challenge = server.get_server_first().encode()
    except ScramException as fault:
        raise SaslFault(str(fault)) from None
    final = text_of((yield challenge))
    try:
        server.set_client_final(final)
    except ScramException:
        return Claim(found[0].login, False)
    yield server.get_server_final().encode()
    return Claim(found[0].login, found[0].known)


def _scram_plus(credentials: Credentials, bindings: Mapping[str, bytes], nonce: str) -> Steps:
    return _scram(credentials, bindings, nonce, plus=True)


_SERVER: Final[dict[str, Callable[[Credentials, Mapping[str, bytes], str], Steps]]] = {
    PLUS: _scram_plus,
    SCRAM: _scram,
    "PLAIN": _plain,
    "LOGIN": _login,
}


def server_mechanisms(bindings: Mapping[str, bytes]) -> tuple[str, ...]:
    """The mechanisms that we offer, the best first; SCRAM-SHA-256-PLUS only where there is a channel to bind to."""
    return tuple(name for name in _SERVER if name != PLUS or usable(bindings))


def server_mechanism(name: str, credentials: Credentials, bindings: Mapping[str, bytes], nonce: str) -> Steps | None:
    """Begin an exchange as the server; None when there is no such mechanism.

    Args:
        name: in upper case.
        credentials: who may log in.
        bindings: the channel bindings of this connection.
        nonce: for SCRAM; new each time.
    """
    if name not in server_mechanisms(bindings):
        return None
    return _SERVER[name](credentials, bindings, nonce)
