"""How a client opens a session: greeting, EHLO, STARTTLS, EHLO again, AUTH; sans-I/O.

    greet(name)          greeting, EHLO, HELO    -> Greeting
    starttls()           STARTTLS                -> None, or what the server said against it
    ehlo(name)           EHLO inside TLS         -> Greeting
    authenticate(mech)   AUTH                    -> None, or what the server said against it

Between `starttls` and `ehlo` the driver shakes hands; what it knew of the server before is forgotten (RFC 3207 section
4.2), for `ehlo` has the only capabilities that count from then on (attack C-TL1). There is no HELO inside TLS: a server
that offered STARTTLS in its reply to EHLO knows EHLO.

Invariants: a secret leaves in a `Phase.AUTH` step only. 235 is a success only when the mechanism says that its own side of
the exchange has come to its end, which for SCRAM means that the server has proved that it knows the password, too (attack
C-TL4).

Errors: a reply that has no place in its phase is a `ProtocolFault`; a challenge that cannot be answered a `SaslFault`.

Standards: RFC 5321 sections 3.2 and 4.1.4, RFC 3207, RFC 4954.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Final

import msgspec

from mtad.reply import Reply
from mtad.smtp.capabilities import NO_EXTENSIONS, Capabilities, parse_capabilities
from mtad.smtp.dialogue import Phase, Step, Verdict, command, expect, refusal
from mtad.smtp.sasl import SaslFault, decode, encode
from mtad.smtp.sasl_client import ClientMechanism

#: Octets of a command line with its CRLF; a longer initial response waits for its own line (RFC 4954 section 4).
_COMMAND: Final = 512

#: Challenges of one exchange. SCRAM has two; nothing that we speak has more than three.
_CHALLENGES: Final = 5


class Greeting(msgspec.Struct, frozen=True):
    """How a session began: either ``capabilities``, or the ``refusal`` of a server that does not want to talk."""

    capabilities: Capabilities = NO_EXTENSIONS
    refusal: Verdict | None = None


def greet(name: str) -> Generator[Step, Reply | None, Greeting]:
    """Open a session as ``name``: greeting, EHLO, and HELO when EHLO is refused with 5yz (RFC 5321 section 3.2)."""
    reply = expect((yield Step(Phase.GREETING)))
    if not 200 <= reply.code < 300:
        return Greeting(refusal=refusal(Phase.GREETING, reply))
    greeting = yield from ehlo(name)
    if greeting.refusal is None or not greeting.refusal.reply.permanent:
        return greeting
    reply = expect((yield Step(Phase.HELO, command("HELO ", name))))
    if 200 <= reply.code < 300:
        return Greeting()
    return Greeting(refusal=refusal(Phase.HELO, reply))


def ehlo(name: str) -> Generator[Step, Reply | None, Greeting]:
    """EHLO alone."""
    reply = expect((yield Step(Phase.EHLO, command("EHLO ", name))))
    if 200 <= reply.code < 300:
        return Greeting(parse_capabilities(reply))
    return Greeting(refusal=refusal(Phase.EHLO, reply))


def starttls() -> Generator[Step, Reply | None, Verdict | None]:
    """Ask for TLS (RFC 3207 section 4); None: go ahead, and the next octet from the server is TLS."""
    reply = expect((yield Step(Phase.STARTTLS, b"STARTTLS\r\n")))
    return None if 200 <= reply.code < 300 else refusal(Phase.STARTTLS, reply)


def authenticate(mechanism: ClientMechanism) -> Generator[Step, Reply | None, Verdict | None]:
    """Show the server who we are (RFC 4954 section 4); None: it believes it, and we believe the server.

    Raises:
        SaslFault: the server's side of the exchange is not what it should be; the exchange was cancelled.
    """
    initial = None if mechanism.initial is None else encode(mechanism.initial) or "="
    line = f"AUTH {mechanism.name}"
    if initial is not None and len(line) + len(initial) + 3 <= _COMMAND:
        line, initial = f"{line} {initial}", None
    reply = expect((yield Step(Phase.AUTH, command(line))))
    challenges = 0
    while reply.code == 334:
        challenges += 1
        try:
            if challenges > _CHALLENGES:
                raise SaslFault(f"more than {_CHALLENGES} challenges")
            answer = initial or encode(mechanism.respond(decode("".join(reply.lines).strip())))
        except SaslFault:
            yield Step(Phase.AUTH, b"*\r\n")
            raise
        initial = None
        reply = expect((yield Step(Phase.AUTH, command(answer))))
    if not 200 <= reply.code < 300:
        return refusal(Phase.AUTH, reply)
    if not mechanism.complete:
        raise SaslFault("the server says yes, and has not proved that it knows the password")
    return None
