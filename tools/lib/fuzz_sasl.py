"""Fuzz target: the mechanisms of SASL in both roles, against a hostile other side.

An input is the name of a mechanism, a line feed, and the messages of the other side with 0x1E between them. Both roles get
the same messages. The nonces are always the same, so that there are messages with which SCRAM comes to a good end.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Final

from scramp import ScramClient, ScramMechanism

from mtad.smtp.sasl import Claim, Entry, SaslFault, decode, derive, encode, prepare, server_mechanism
from mtad.smtp.sasl_client import client_mechanism
from tools.lib.fuzz import Target, require

_BREAK: Final = b"\x1e"
_PASSWORD: Final = "open sesame"
_KEYS: Final = derive(_PASSWORD, b"salt of alice...", 4096)
_NOBODY: Final = derive("nobody's", b"salt of nobody..", 4096)
_BINDINGS: Final = {"tls-exporter": b"e" * 32, "tls-server-end-point": b"s" * 32}
#: What a nonce is made of; the other side's begins with ours, or the other way round.
_CLIENT, _SERVER = "clientsnonce", "serversnonce"
#: Rounds that take so long, and cannot be interrupted, that nothing else would be tried; a tenth of them is slow enough.
_ENDLESS: Final = re.compile(rb"i=0*[1-9][0-9]{7}")
_NAMES: Final = ("SCRAM-SHA-256-PLUS", "SCRAM-SHA-256", "XOAUTH2", "PLAIN", "LOGIN")


class _Logins:
    """alice, and what is made up for all others."""

    def find(self, login: str) -> Entry:
        known = login == "alice"
        return Entry(login, _KEYS if known else _NOBODY, known)


def sasl(data: bytes) -> Iterable[Hashable]:
    # Whatever the other side sends: nothing but `SaslFault` is raised. A server believes a client only that says the
    # password, or the proof of an exchange that was made with it; and nobody but alice has logged in. A client takes a
    # SCRAM exchange for complete only if it got the signature of a server that knows the password.
    line, _, rest = data.partition(b"\n")
    name = line.decode("ascii", "replace")
    messages = rest.split(_BREAK)
    happened: set[Hashable] = set()
    for bindings in ({}, _BINDINGS):
        both = (_serve(name, messages, bindings), _ask(name, messages, bindings))
        happened |= {(name if name in _NAMES else "", bool(bindings), number, text) for number, text in enumerate(both)}
    for message in messages:
        require(decode(encode(message)) == message, "another message after it was encoded and decoded")
    try:
        prepared = prepare(rest.decode("utf-8", "surrogateescape")[:500])
        require(prepare(prepared) == prepared, "a name is another one when prepared twice")
    except SaslFault:
        happened.add("not prepared")
    return happened


def _serve(name: str, messages: Sequence[bytes], bindings: dict[str, bytes]) -> str:
    steps = server_mechanism(name, _Logins(), bindings, _SERVER)
    if steps is None:
        return "unknown"
    next(steps)
    try:
        for message in messages:
            steps.send(message)
    except StopIteration as end:
        claim = end.value
        require(isinstance(claim, Claim), "an end without a claim")
        if claim.proven:
            require(claim.login == "alice", "somebody else has logged in")
            said = b"".join(messages)
            proven = any(map(_is_password, messages)) or any(proof in said for proof in _proofs())
            require(proven, "believed without a proof")
        return f"claim {claim.proven}"
    except SaslFault as fault:
        return re.sub(r"[^a-zA-Z ].*", "", str(fault))[:12]
    steps.close()
    return "not finished"


def _is_password(message: bytes) -> bool:
    """Whether a message is the password, or ends with it behind a NUL, in any way to write it."""
    try:
        return prepare(message.rpartition(b"\0")[2].decode("utf-8")) == _PASSWORD
    except (SaslFault, UnicodeDecodeError):
        return False


def _ask(name: str, messages: Sequence[bytes], bindings: dict[str, bytes]) -> str:
    if _ENDLESS.search(b"".join(messages)):
        return "not tried"
    try:
        mechanism = client_mechanism(name, "alice", _PASSWORD, bindings, nonce=_CLIENT)
        for message in messages:
            mechanism.respond(message)
            if mechanism.complete and name.startswith("SCRAM"):
                said = b"".join(messages)
                require(any(proof in said for proof in _proofs()), "a server was believed without a signature")
    except SaslFault as fault:
        return re.sub(r"[^a-zA-Z ].*", "", str(fault))[:12]
    return f"complete {mechanism.complete}"


@functools.cache
def _exchanges() -> Sequence[tuple[str, Sequence[str], Sequence[str]]]:
    """Good exchanges of SCRAM: mechanism, what the client says, what the server says; each with our nonces."""
    found = []
    for name, binding in (
        ("SCRAM-SHA-256", None),
        ("SCRAM-SHA-256-PLUS", "tls-exporter"),
        ("SCRAM-SHA-256-PLUS", "tls-server-end-point"),
    ):
        bound = (binding, _BINDINGS[binding]) if binding else None
        client = ScramClient([name], "alice", _PASSWORD, channel_binding=bound, c_nonce=_CLIENT)
        keys = (_KEYS.salt, _KEYS.stored_key, _KEYS.server_key, _KEYS.iterations)
        server = ScramMechanism(name).make_server(lambda _, keys=keys: keys, channel_binding=bound, s_nonce=_SERVER)
        asked = [client.get_client_first()]
        server.set_client_first(asked[0])
        told = [server.get_server_first()]
        client.set_server_first(told[0])
        asked.append(client.get_client_final())
        server.set_client_final(asked[1])
        told.append(server.get_server_final())
        found.append((name, [*asked, ""], [*told, ""]))
    return found


@functools.cache
def _proofs() -> Sequence[bytes]:
    """What only those who know the password can have made: ``p=`` of a client, ``v=`` of a server."""
    last = [word for _, client, server in _exchanges() for word in (client[1].rpartition(",p=")[2], server[1][2:])]
    return [word.encode()[:40] for word in last]


def sasl_seeds() -> Sequence[bytes]:
    """Good exchanges, and what is almost one."""
    found = [f"{name}\n".encode() + _BREAK.join(s.encode() for s in said) for name, *both in _exchanges() for said in both]
    plain = (
        b"PLAIN\n\0alice\0open sesame",
        b"PLAIN\nalice\0alice\0open sesame",
        b"PLAIN\nbob\0alice\0open sesame",
        b"PLAIN\n\0a\0b",
    )
    login = (
        b"LOGIN\nalice\x1eopen sesame",
        b"LOGIN\n\xc2\xaa\x1eopen\xc2\xadsesame",
        b"XOAUTH2\n{}\x1e",
        b"LOGIN\nUsername:\x1ePassword:",
    )
    return [*found, *plain, *login]


_WORDS: Final = (
    b"n,,n=alice,r=clientsnonce|y,,|p=tls-exporter,,|p=tls-unique,,|,r=clientsnonceserversnonce|,s=AAAA"
    b"|,i=4096|i=0|i=-1|i=99999999"
    b"|c=biws|,p=AAAA|v=AAAA|e=other-error|m=x,|=2C|=3D|\0|alice|\x1e|open sesame|\xc2\xaa|\xc2\xad"
    b"|\xe2\x80\x8f|\xcc\x81|\xef\xbc\xa1"
).split(b"|")

TARGET: Final = Target("sasl", sasl, sasl_seeds, (*_WORDS, *(name.encode() + b"\n" for name in _NAMES)))
