"""The mechanisms of SASL, each role against the other, against scramp, and against what an attacker sends."""

from __future__ import annotations

import base64
import hmac
import secrets
from collections.abc import Mapping
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scramp import ScramClient

from mtad.smtp.sasl import (
    BINDINGS,
    PLUS,
    SCRAM,
    Claim,
    Keys,
    SaslFault,
    decode,
    derive,
    encode,
    prepare,
    server_mechanism,
    server_mechanisms,
    usable,
)
from mtad.smtp.sasl_client import choose, client_mechanism
from tests.dialogue_engine import PASSWORD, MemoryLogins

LOGINS = MemoryLogins()
CHANNEL = {"tls-exporter": b"e" * 32, "tls-server-end-point": b"s" * 32}


def serve(name: str, *responses: bytes, bindings: Mapping[str, bytes] | None = None) -> Claim | bytes:
    """What the server makes of these responses: its claim, or the challenge that is still open."""
    steps = server_mechanism(name, LOGINS, bindings or {}, "nonce")
    assert steps is not None
    said = next(steps)
    try:
        for response in responses:
            said = steps.send(response)
    except StopIteration as end:
        claim: Claim = end.value
        return claim
    return said


def converse(
    name: str,
    login: str,
    password: str,
    ours: Mapping[str, bytes] | None = None,
    theirs: Mapping[str, bytes] | None = None,
) -> tuple[Claim, bool]:
    """Both roles to the end: the server's claim, and whether the client is content."""
    client = client_mechanism(name, login, password, theirs, nonce="clients")
    server = server_mechanism(name, LOGINS, ours or {}, "servers")
    assert server is not None
    challenge = next(server)
    response = client.initial if client.initial is not None else client.respond(challenge)
    try:
        while True:
            response = client.respond(server.send(response))
    except StopIteration as end:
        return end.value, client.complete


@pytest.mark.parametrize("name", ["PLAIN", "LOGIN", SCRAM, PLUS])
def test_each_mechanism(name: str) -> None:
    channel = CHANNEL if name == PLUS else None
    assert converse(name, "alice", PASSWORD, channel, channel) == (Claim("alice", True), True)
    assert converse(name, "alice", "wrong", channel, channel)[0] == Claim("alice", False)
    assert converse(name, "nobody", PASSWORD, channel, channel)[0] == Claim("nobody", False)


@pytest.mark.parametrize("name", ["PLAIN", "LOGIN", SCRAM])
def test_keys_that_were_made_up_fit_no_password(name: str) -> None:
    """Not even the password that they were made of."""
    assert converse(name, "nobody", "nobody's")[0] == Claim("nobody", False)


@pytest.mark.parametrize(
    ("message", "claim"),
    [
        (b"\0alice\0open sesame", Claim("alice", True)),
        (b"alice\0alice\0open sesame", Claim("alice", True)),
        (b"bob\0alice\0open sesame", Claim("alice", False)),
        (b"root\0alice\0open sesame", Claim("alice", False)),
        (b"\0alice\0open sesam", Claim("alice", False)),
        (b"\0alice\0", Claim("alice", False)),
        ("\0alice\0open\u00a0sesame".encode(), Claim("alice", True)),
        (b"\0*)(uid=*\0x", Claim("*)(uid=*", False)),
        (b"\0../alice\0open sesame", Claim("../alice", False)),
        (b"\0alice\n\0open sesame", Claim("alice\n", False)),
    ],
)
def test_plain_s_pa13(message: bytes, claim: Claim) -> None:
    assert serve("PLAIN", message) == claim


@pytest.mark.parametrize(
    "message", [b"", b"alice", b"\0alice", b"\0u\0p\0x", b"\0\0", b"\0\0x", b"\0\xff\0x", b"\0a\0\xff\xfe"]
)
def test_plain_that_is_none_s_pa13(message: bytes) -> None:
    """Nothing is cut off at a NUL: four fields are not three with a longer password."""
    with pytest.raises(SaslFault):
        serve("PLAIN", message)


def test_login_asks_for_one_thing_after_the_other() -> None:
    assert serve("LOGIN") == b"Username:"
    assert serve("LOGIN", b"alice") == b"Password:"
    assert serve("LOGIN", b"alice", b"open sesame") == Claim("alice", True)
    for responses in ((b"", b"open sesame"), (b"\xff", b"x")):
        with pytest.raises(SaslFault):
            serve("LOGIN", *responses)


def test_the_example_of_rfc_7677() -> None:
    """RFC 7677 section 3: user "user", password "pencil"."""
    keys = derive("pencil", base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="), 4096)
    auth = (
        b"n=user,r=rOprNGfwEbeRWgbNEkqO,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,"
        b"i=4096,c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    )
    assert base64.b64encode(hmac.digest(keys.server_key, auth, "sha256")) == b"6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
    proof = base64.b64decode("dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=")
    signature = hmac.digest(keys.stored_key, auth, "sha256")
    assert sha256(bytes(a ^ b for a, b in zip(proof, signature, strict=True))).digest() == keys.stored_key


def first(flag: str = "n", login: str = "alice", nonce: str = "clients") -> bytes:
    return f"{flag},,n={login},r={nonce}".encode()


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"n",
        b"n,,",
        b"n,,n=alice",
        b"n,,r=x,n=alice",
        b"n,a=bob,n=alice,r=x",
        b"n,,m=x,n=alice,r=x",
        b"q,,n=alice,r=x",
        b"p=tls-exporter,,n=alice,r=x",
        b"n,,n=,r=x",
        b"n,,n=a=b,r=x",
        b"n,,n=alice,r=",
        b"n,,n=al\0ice,r=x",
        b"n,,n=alice,r=x\x01",
        b"\xff",
        b"n,,n=alice,r=x,",
        b"n,,n=alice,n=bob,r=x",
        b"n,," + b"a" * 12000,
    ],
)
def test_scram_that_is_none_s_pa13(message: bytes) -> None:
    with pytest.raises(SaslFault):
        serve(SCRAM, message)


@pytest.mark.parametrize(
    "final",
    [b"", b"x", b"c=biws,r=clientsnonce", b"c=biws,r=clientsnonce,p=AAAA", b"c=biws,r=clients,p=AAAA", b"c====,r=x,p=x"],
)
def test_a_final_message_that_proves_nothing(final: bytes) -> None:
    challenge = serve(SCRAM, first())
    assert isinstance(challenge, bytes)
    assert challenge.startswith(b"r=clientsnonce,s=")
    assert serve(SCRAM, first(), final) == Claim("alice", False)


def test_scram_of_another_maker() -> None:
    client = ScramClient([SCRAM], "bob", PASSWORD)
    server = server_mechanism(SCRAM, LOGINS, {}, "servers")
    assert server is not None
    next(server)
    client.set_server_first(server.send(client.get_client_first().encode()).decode())
    client.set_server_final(server.send(client.get_client_final().encode()).decode())
    with pytest.raises(StopIteration) as end:
        server.send(b"")
    assert end.value.value == Claim("bob", True)


@pytest.mark.parametrize("name", BINDINGS)
def test_the_channel_is_bound_rfc_9266(name: str) -> None:
    good, bad = {name: b"x" * 32}, {name: b"y" * 32}
    assert converse(PLUS, "alice", PASSWORD, good, good) == (Claim("alice", True), True)
    assert converse(PLUS, "alice", PASSWORD, good, bad)[0] == Claim("alice", False)


def test_the_best_binding_is_taken() -> None:
    client = client_mechanism(PLUS, "alice", PASSWORD, CHANNEL, nonce="x")
    assert client.initial == b"p=tls-exporter,,n=alice,r=x"
    assert list(usable(CHANNEL)) == ["tls-exporter", "tls-server-end-point"]
    assert usable({"tls-exporter": b"", "tls-unknown": b"x"}) == {}


def test_a_binding_that_we_do_not_have() -> None:
    with pytest.raises(SaslFault):
        serve(PLUS, first("p=tls-unique"), bindings=CHANNEL)
    with pytest.raises(SaslFault):
        serve(PLUS, first("n"), bindings=CHANNEL)


def test_nobody_is_talked_out_of_binding() -> None:
    """RFC 5802 section 6: a client that says we offered no PLUS, when we did, has been lied to."""
    with pytest.raises(SaslFault):
        serve(SCRAM, first("y"), bindings=CHANNEL)
    assert isinstance(serve(SCRAM, first("y")), bytes)
    assert isinstance(serve(SCRAM, first("n"), bindings=CHANNEL), bytes)
    assert client_mechanism(SCRAM, "alice", PASSWORD, CHANNEL, nonce="x").initial == b"y,,n=alice,r=x"
    assert client_mechanism(SCRAM, "alice", PASSWORD, nonce="x").initial == b"n,,n=alice,r=x"


def test_what_is_offered() -> None:
    assert server_mechanisms({}) == (SCRAM, "PLAIN", "LOGIN")
    assert server_mechanisms(CHANNEL) == (PLUS, SCRAM, "PLAIN", "LOGIN")
    for name in ("EXTERNAL", "NTLM", "CRAM-MD5", "GSSAPI", "ANONYMOUS", "XOAUTH2", "plain", "", PLUS):
        assert server_mechanism(name, LOGINS, {}, "n") is None


# -- the client's role --------------------------------------------------------------------------------------------------


def test_the_server_must_prove_itself_tl4() -> None:
    """C-TL4: a success is none before the server's signature was seen."""
    server = server_mechanism(SCRAM, LOGINS, {}, "servers")
    assert server is not None
    client = client_mechanism(SCRAM, "alice", PASSWORD, nonce="clients")
    next(server)
    assert client.initial is not None
    client.respond(server.send(client.initial))
    assert not client.complete
    with pytest.raises(SaslFault):
        client.respond(b"v=" + base64.b64encode(b"x" * 32))
    assert not client.complete


@pytest.mark.parametrize(
    "challenge",
    [
        b"",
        b"\xff",
        b"e=other-error",
        b"r=other,s=QSXCR+Q6sek8bf92,i=4096",
        b"r=clients,s=QSXCR+Q6sek8bf92,i=4096",
        b"r=clientsx,s=QSXCR+Q6sek8bf92,i=1",
        b"r=clientsx,s=QSXCR+Q6sek8bf92,i=99999999999",
        b"r=clientsx,s=,i=4096",
    ],
)
def test_a_server_that_cannot_be_trusted_tl4(challenge: bytes) -> None:
    client = client_mechanism(SCRAM, "alice", PASSWORD, nonce="clients")
    with pytest.raises(SaslFault):
        client.respond(challenge)


def test_a_challenge_too_many() -> None:
    client = client_mechanism("PLAIN", "alice", "x", nonce="")
    assert client.complete
    with pytest.raises(SaslFault):
        client.respond(b"more?")
    assert not client.complete


def test_login_of_the_client() -> None:
    client = client_mechanism("LOGIN", "alice", "x", nonce="")
    assert client.initial is None
    assert (client.respond(b"Username:"), client.complete) == (b"alice", False)
    assert (client.respond(b"Password:"), client.complete) == (b"x", True)


def test_xoauth2() -> None:
    client = client_mechanism("XOAUTH2", "a@b", "token", nonce="")
    assert client.initial == b"user=a@b\x01auth=Bearer token\x01\x01"
    assert client.complete
    assert client.respond(b'{"status":"401"}') == b""
    assert not client.complete


@pytest.mark.parametrize(
    ("name", "login", "secret"),
    [
        ("PLAIN", "a\0b", "x"),
        ("PLAIN", "a", "x\0y"),
        ("XOAUTH2", "a\x01", "x"),
        (SCRAM, "", "x"),
        (SCRAM, "a\x07", "x"),
        ("NTLM", "a", "x"),
        (PLUS, "a", "x"),
    ],
)
def test_what_no_client_may_say(name: str, login: str, secret: str) -> None:
    with pytest.raises(SaslFault):
        client_mechanism(name, login, secret, nonce="n")


def test_choose_tl4() -> None:
    """C-TL4: nothing that shows the password goes out in clear, whatever a server offers."""
    everything = ["LOGIN", "PLAIN", "XOAUTH2", "scram-sha-256", PLUS, "NTLM"]
    assert choose(everything, CHANNEL, tls=True) == PLUS
    assert choose(everything, {}, tls=True) == SCRAM
    assert choose(everything, {}, tls=False) == SCRAM
    assert choose(["PLAIN", "LOGIN"], {}, tls=True) == "PLAIN"
    assert choose(["PLAIN", "LOGIN"], {}, tls=False) is None
    assert choose(["LOGIN"], {}, tls=True) == "LOGIN"
    assert choose(everything, CHANNEL, tls=True, token=True) == "XOAUTH2"
    assert choose(everything, CHANNEL, tls=False, token=True) is None
    assert choose([PLUS], {}, tls=True) is None
    assert choose([], CHANNEL, tls=True) is None


# -- base64 and SASLprep ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "===",
        "a",
        "ab",
        "abc",
        "abcd=",
        "ab==cd==",
        "abcde===",
        "ab\rcd",
        "ab cd",
        "YQ==\n",
        "YQ",
        "Y",
        "ü",
        "*",
        "=",
        "YWJj" * 4 + "Y",
    ],
)
def test_what_is_no_base64_s_pa13(text: str) -> None:
    """CVE-2018-6789 in Exim was a length of 4n+3."""
    with pytest.raises(SaslFault):
        decode(text.encode())


@given(st.binary(max_size=60))
def test_base64_there_and_back(message: bytes) -> None:
    assert decode(encode(message)) == message


def test_look_alikes_are_one_s_pa13() -> None:
    assert prepare("\uff42ob") == "bob"
    assert prepare("bo\u00adb") == "bob"
    assert derive("I\u00adX", b"s" * 16, 4096) == derive("IX", b"s" * 16, 4096)
    assert derive("e\u0301", b"s" * 16, 4096) == derive("\u00e9", b"s" * 16, 4096)
    for text in ("", "\u00ad", "a\x07", "\u0627\u0031", "\ue000", "\ufffe", "\ud800"):
        with pytest.raises(SaslFault):
            prepare(text)
    assert isinstance(derive("\x07", b"s" * 16, 4096), Keys), "a password that cannot be takes as long as any"


@given(st.lists(st.binary(max_size=40), max_size=4), st.sampled_from(["PLAIN", "LOGIN", SCRAM, PLUS]))
def test_whatever_comes_nobody_gets_in(responses: list[bytes], name: str) -> None:
    """Invariant: random messages prove nothing, and raise nothing but SaslFault."""
    try:
        end = serve(name, *responses, bindings=CHANNEL)
    except SaslFault:
        return
    assert isinstance(end, bytes) or not end.proven


def test_nonces_are_taken_as_given() -> None:
    nonce = secrets.token_hex(18)
    steps = server_mechanism(SCRAM, LOGINS, {}, nonce)
    assert steps is not None
    next(steps)
    assert steps.send(first()).startswith(f"r=clients{nonce},".encode())
