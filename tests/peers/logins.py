"""The server's side of AUTH, as a scripted exchanger has it: what a client says is written down by others (scramp)."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping

from mtad.smtp.sasl import Entry, Keys, derive, server_mechanism

#: The least that RFC 7677 section 4 allows.
ITERATIONS = 4096


class _Store:
    def __init__(self, logins: Mapping[str, str]) -> None:
        self._logins = logins

    def find(self, login: str) -> Entry:
        keys: Keys = derive(self._logins.get(login, "nobody has this"), b"salt" * 4, ITERATIONS)
        return Entry(login, keys, login in self._logins)


def converse(mechanism: str, initial: str | None, logins: Mapping[str, str], ask: Callable[[bytes], bytes]) -> str | None:
    """Play one exchange; the login that was proven, or None. ``ask`` sends a challenge and gives the response."""
    first = None if initial is None else base64.b64decode("" if initial == "=" else initial)
    if mechanism == "XOAUTH2":
        return _xoauth2(first if first is not None else ask(b""), logins, ask)
    steps = server_mechanism(mechanism, _Store(logins), {}, "server-nonce")
    assert steps is not None
    challenge = next(steps)
    while True:
        response = first if first is not None else ask(challenge)
        first = None
        try:
            challenge = steps.send(response)
        except StopIteration as end:
            return end.value.login if end.value.proven else None


def _xoauth2(response: bytes, logins: Mapping[str, str], ask: Callable[[bytes], bytes]) -> str | None:
    for login, token in logins.items():
        if response == f"user={login}\x01auth=Bearer {token}\x01\x01".encode():
            return login
    assert ask(b'{"status":"400"}') == b""
    return None
