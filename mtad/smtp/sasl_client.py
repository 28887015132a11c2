"""Showing a server who we are: the mechanisms of SASL (RFC 4422) as the client, sans-I/O: message in, message out.

For those who write the client, `mtad.smtp.opening` and `mtad.delivery.opening`::

    mechanism = client_mechanism(name, login, secret, bindings, nonce=secrets.token_hex())
    # AUTH name [encode(mechanism.initial)]; initial is None when the server speaks first (LOGIN), and then the command
    # has no initial response; an empty initial response goes out as "="
    # for every 334:  line = encode(mechanism.respond(decode(text)))     a SaslFault: send "*" and give up
    # at 235:         if not mechanism.complete: the server did not prove that it knows the password; close the connection

`choose` picks the strongest mechanism of those that a server offers. Bindings and nonces are as in `mtad.smtp.sasl`.

Invariants: a secret is shown only by mechanisms that `choose` allows. A server that wants more rounds than an honest one is
refused before we begin to count them.

Errors: `SaslFault`, for what came from the other side.

Standards: RFC 4422; RFC 4616 (PLAIN); RFC 5802 and 7677 (SCRAM-SHA-256); RFC 5929 and 9266 (channel bindings). LOGIN and
XOAUTH2 have no RFC: draft-murchison-sasl-login, Google's XOAUTH2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from typing import Final

import msgspec
from scramp import ScramClient, ScramException

from mtad.smtp.sasl import PLUS, SCRAM, SaslFault, text_of, usable

#: Rounds of a key derivation that a server may ask of us: recommended for SHA-256 today, some tenths of a second.
#: Without a bound a hostile server could hold a thread for minutes.
_MOST_ROUNDS: Final = 600_000


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
    challenge = text_of(first)
    _bear_rounds(challenge)
    client.set_server_first(challenge)
    final = yield _Said(client.get_client_final().encode())
    client.set_server_final(text_of(final))
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
