"""Who is it? The mechanisms of SASL (RFC 4422) for both roles, sans-I/O: message in, message out.

What it is for: `server_mechanism` finds out who a client is, `client_mechanism` shows a server who we are. They know
nothing of base64 lines and replies but `encode` and `decode`; those who drive them are `mtad.session.auth` and the client
in `mtad.delivery`.

The server's role is a generator: it yields a challenge (``b""`` when it is the client's turn anyway), is sent the
response, and returns a `Claim`: who the client says it is, and whether it proved that. It raises `SaslFault` for a message
that cannot be read.

The client's role, for those who write the client::

    mechanism = client_mechanism(name, login, secret, bindings, nonce=secrets.token_hex())
    # AUTH name [encode(mechanism.initial)]; initial is None when the server speaks first (LOGIN), and then the command
    # has no initial response; an empty initial response goes out as "="
    # for every 334:  line = encode(mechanism.respond(decode(text)))     a SaslFault: send "*" and give up
    # at 235:         if not mechanism.complete: the server did not prove that it knows the password; close the connection

`choose` picks the strongest mechanism of those that a server offers. ``bindings`` are the channel bindings of the
connection by their names, empty without TLS: ``tls-exporter`` (RFC 9266), ``tls-unique`` (RFC 5929; never with TLS 1.3),
``tls-server-end-point``. ``nonce`` is printable US-ASCII without a comma and never used twice.

Invariants: passwords are never stored, compared or sent by SCRAM; the server holds `Keys`, of which no password can be
made. A password is compared with keys in the same time whether the login is known or not: unknown logins have keys, too,
see `mtad.passwords`. A client that takes part in channel binding is not talked out of it: who says that we offered no
SCRAM-SHA-256-PLUS when we did is refused.

Errors: `SaslFault`, for what came from the other side.

Standards: RFC 4422; RFC 4616 (PLAIN); RFC 5802 and 7677 (SCRAM-SHA-256); RFC 5929 and 9266 (channel bindings); RFC 4013
(SASLprep); RFC 4954 section 4 (base64). LOGIN and XOAUTH2 have no RFC: draft-murchison-sasl-login, Google's XOAUTH2.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Callable, Collection, Generator, Mapping
from hashlib import pbkdf2_hmac, sha256
from typing import Final, Protocol

import msgspec
from scramp import ScramClient, ScramException, ScramMechanism
from scramp.core import CbName
from scramp.utils import saslprep

from mtad.errors import MtadError

#: Channel bindings, the best first: the exporter belongs to the connection, the end point to the certificate only.
BINDINGS: Final = ("tls-exporter", "tls-unique", "tls-server-end-point")

# base64 = base64-terminal / ( 1*(4base64-CHAR) [base64-terminal] ) (RFC 4954 section 8); Python's decoders are lenient
_BASE64: Final = re.compile(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")

SCRAM: Final = "SCRAM-SHA-256"
PLUS: Final = "SCRAM-SHA-256-PLUS"
#: Rounds of a key derivation that a server may ask of us: recommended for SHA-256 today, some tenths of a second.
#: Without a bound a hostile server could hold a thread for minutes.
_MOST_ROUNDS: Final = 600_000


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
    login, secret, other = _text(authcid), _text(password), _text(authzid)
    if not login:
        raise SaslFault("no login")
    entry = credentials.find(login)
    derived = derive(secret, entry.keys.salt, entry.keys.iterations)
    same = hmac.compare_digest(derived.stored_key, entry.keys.stored_key)
    # To act for somebody else (RFC 4616 section 2, authzid) is nothing that anybody may do here.
    return Claim(entry.login, same and entry.known and (not other or credentials.find(other).login == entry.login))


def _text(octets: bytes) -> str:
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
    first = _text((yield b""))
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
    final = _text((yield challenge))
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


# -- the client's role --------------------------------------------------------------------------------------------------


class _Said(msgspec.Struct, frozen=True):
    """What the client says; ``last`` when a success may follow."""

    message: bytes | None
    last: bool = False


_ClientSteps = Generator[_Said, bytes, None]


class ClientMechanism:
    """An exchange as the client; see the module for its use."""

    __slots__ = ("_steps", "complete", "initial", "name")

    def __init__(self, name: str, steps: _ClientSteps) -> None:
        """Begin; `client_mechanism` makes the steps."""
        said = next(steps)
        self._steps = steps
        self.name = name
        self.initial = said.message
        """The first message when it is the client's; None when the server speaks first."""
        self.complete = said.last
        """Whether all was said: a success before that is none."""

    def respond(self, challenge: bytes) -> bytes:
        """The response to a challenge.

        Raises:
            SaslFault: it is one that cannot be trusted, or one too many.
        """
        self.complete = False
        try:
            said = self._steps.send(challenge)
        except StopIteration:
            raise SaslFault("a challenge too many") from None
        except ScramException as fault:
            raise SaslFault(str(fault)) from None
        self.complete = said.last
        return said.message or b""


def _client_plain(login: str, secret: str, _bindings: Mapping[str, bytes], _nonce: str) -> _ClientSteps:
    if "\0" in login + secret:
        raise SaslFault("NUL in login or password")
    yield _Said(f"\0{login}\0{secret}".encode(), last=True)


def _client_login(login: str, secret: str, _bindings: Mapping[str, bytes], _nonce: str) -> _ClientSteps:
    yield _Said(None)
    yield _Said(login.encode())
    yield _Said(secret.encode(), last=True)


def _bear_rounds(challenge: str) -> None:
    """Refuse a server that asks for more rounds (RFC 5802 section 5.1, iteration-count) than an honest one would."""
    for attribute in challenge.split(","):
        digits = attribute[2:]
        if attribute.startswith("i=") and (len(digits) > len(str(_MOST_ROUNDS)) or not digits.isdecimal()):
            raise SaslFault("the server's iteration count is no number, or too large")
        if attribute.startswith("i=") and int(digits) > _MOST_ROUNDS:
            raise SaslFault(f"the server asks for {digits} rounds")


def _client_scram(
    login: str, secret: str, bindings: Mapping[str, bytes], nonce: str, mechanism: str = SCRAM
) -> _ClientSteps:
    binding = next(iter(usable(bindings).items()), None)
    if mechanism == PLUS and binding is None:
        raise SaslFault("no channel to bind to")
    client = ScramClient([mechanism], login, secret, channel_binding=binding, c_nonce=nonce)
    first = yield _Said(client.get_client_first().encode())
    challenge = _text(first)
    _bear_rounds(challenge)
    client.set_server_first(challenge)
    final = yield _Said(client.get_client_final().encode())
    client.set_server_final(_text(final))
    yield _Said(b"", last=True)


def _client_scram_plus(login: str, secret: str, bindings: Mapping[str, bytes], nonce: str) -> _ClientSteps:
    return _client_scram(login, secret, bindings, nonce, PLUS)


def _client_xoauth2(login: str, secret: str, _bindings: Mapping[str, bytes], _nonce: str) -> _ClientSteps:
    if "\x01" in login + secret:
        raise SaslFault("control character in login or token")
    yield _Said(f"user={login}\x01auth=Bearer {secret}\x01\x01".encode(), last=True)
    yield _Said(b"")  # to the reason for a refusal, which comes as a challenge; the refusal follows


_CLIENT: Final[dict[str, Callable[[str, str, Mapping[str, bytes], str], _ClientSteps]]] = {
    PLUS: _client_scram_plus,
    SCRAM: _client_scram,
    "XOAUTH2": _client_xoauth2,
    "PLAIN": _client_plain,
    "LOGIN": _client_login,
}


def client_mechanism(
    name: str, login: str, secret: str, bindings: Mapping[str, bytes] | None = None, *, nonce: str
) -> ClientMechanism:
    """Begin an exchange as the client.

    Args:
        name: one of `choose`'s.
        login: who we are there.
        secret: the password; for XOAUTH2 the access token.
        bindings: the channel bindings of the connection.
        nonce: for SCRAM; new each time.

    Raises:
        SaslFault: no such mechanism, nothing to bind to, or login and password have characters that they must not have.
    """
    if name not in _CLIENT:
        raise SaslFault(f"no mechanism {name}")
    try:
        return ClientMechanism(name, _CLIENT[name](login, secret, bindings or {}, nonce))
    except ScramException as fault:
        raise SaslFault(str(fault)) from None


def choose(offered: Collection[str], bindings: Mapping[str, bytes], *, tls: bool, token: bool = False) -> str | None:
    """The strongest mechanism of those offered, or None when there is none that we would use.

    Args:
        offered: names as the server writes them after AUTH.
        bindings: the channel bindings of the connection.
        tls: whether the connection is encrypted; without it nothing that shows the secret is used.
        token: the secret is an access token and no password.
    """
    names = {name.upper() for name in offered}
    for name in _CLIENT:
        if name not in names or (name == PLUS and not usable(bindings)) or (name == "XOAUTH2") is not token:
            continue
        if tls or name in {PLUS, SCRAM}:
            return name
    return None
