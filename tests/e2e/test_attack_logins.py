"""AUTH under attack: S-PA13 of the attacks. What is no response, who is nobody, and how often one may guess.

That an unknown login takes as long as a wrong password is in tests/unit/test_attack_time.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from mtad.passwords import change_password, make_keys
from tests.client import Client
from tests.e2e.attack_aid import MIB, PATIENT, RCPT, assert_printable, deliver, harvest, listeners
from tests.e2e.test_auth import PASSWORD, auth_site, plain
from tests.site import Site


@pytest.fixture(scope="module")
def logins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    limits = PATIENT | {"wrong_passwords": 100_000}
    root = tmp_path_factory.mktemp("logins")
    site = auth_site(root, limits=limits, deliver=False)
    for login in ("carol", "dave"):
        change_password(str(root / "passwords"), login, make_keys(PASSWORD))
    with site:
        yield site


def b64(octets: bytes) -> bytes:
    return base64.b64encode(octets)


UNREADABLE: Final = {
    "nothing": b"=",
    "padding": b"===",
    "more padding": b"====",
    "4n+3": b"YWJj" * 5 + b"YWJ",
    "4n+2": b"YWJj" * 5 + b"YW",
    "4n+1": b"YWJj" * 5 + b"Y",
    "padding within": b"YQ==YQ==",
    "no base64": b"AGFsaWNl*G9wZW4gc2VzYW1l",
    "url alphabet": b"AGFs_WNl-G9wZW4gc2VzYW1l",
    "blank within": b"AGFs aWNl",
    "NUL within": b"AGFs\0aWNl",
    "CR within": b"AGFs\raWNl",
    "LF within": b"AGFs\naWNl",
    "8-bit": b"AGFs\xffWNl",
    "one NUL": b64(b"\0"),
    "no password": b64(b"alice"),
    "a NUL too many": b64(b"\0u\0p\0x"),
    "all NULs": b64(b"\0" * 100),
    "not UTF-8": b64(b"\0al\xffice\0open sesame"),
    "surrogate": b64(b"\0al\xed\xa0\x80ice\0open sesame"),
    "no login": b64(b"\0\0open sesame"),
}


@pytest.mark.parametrize("response", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("initial", [True, False], ids=["at once", "when asked"])
def test_s_pa13_what_is_no_response_is_refused_at_once(logins: Site, response: bytes, initial: bool) -> None:
    """It is no guess, and costs the client nothing; the session goes on, and AUTH, too."""
    with Client(logins.address("loopback")) as client:
        client.begin("EHLO laptop")
        if initial:
            client.send(b"AUTH PLAIN " + response + b"\r\n")
        else:
            assert client.say("AUTH PLAIN") == "334 "
            client.send((b"" if response == b"=" else response) + b"\r\n")
        assert client.reply()[:3] in {"500", "501"}
        assert client.say("MAIL FROM:<alice@example.org>").startswith("530 5.7.0 ")
        assert client.say("AUTH PLAIN") == "334 "
        assert client.say("*").startswith("501 5.7.0 ")
        assert client.say(f"AUTH PLAIN {plain('alice')}").startswith("235 ")
        assert client.say(f"AUTH PLAIN {plain('alice')}").startswith("503 5.5.1 "), "once is enough"


@pytest.mark.parametrize("initial", [True, False], ids=["at once", "when asked"])
def test_s_pa13_a_response_of_a_megabyte_is_one_refusal(logins: Site, initial: bool) -> None:
    with Client(logins.address("loopback")) as client, listeners(logins) as memory:
        client.begin("EHLO laptop", *[] if initial else ["AUTH PLAIN"])
        client.send(b"AUTH PLAIN " * initial + b64(b"\0alice\0" + b"x" * MIB) + b"\r\n")
        assert client.reply()[:3] == "500"
        assert client.say("NOOP").startswith("250 ")
    assert memory.growth < 2 * MIB


@pytest.mark.parametrize(
    "name", ["NTLM", "EXTERNAL", "GSSAPI", "CRAM-MD5", "DIGEST-MD5", "ANONYMOUS", "SPA", "XOAUTH2", "X"]
)
def test_s_pa13_mechanisms_that_are_not_here(logins: Site, name: str) -> None:
    with Client(logins.address("loopback")) as client:
        client.begin("EHLO laptop")
        assert client.say(f"AUTH {name}").startswith("504 5.5.4 ")
        assert client.say(f"AUTH {name} TlRMTVNTUAABAAAA").startswith("504 5.5.4 ")
        assert client.say("AUTH").startswith("501 5.5.4 ")
        assert client.say(f"AUTH PLAIN {plain('alice')} x").startswith("501 5.5.4 ")


def test_s_pa13_not_in_a_transaction(logins: Site) -> None:
    with Client(logins.address("loopback")) as client:
        client.begin("EHLO laptop", f"AUTH PLAIN {plain('alice')}", "MAIL FROM:<alice@example.org>", RCPT)
        assert client.say(f"AUTH PLAIN {plain('bob')}").startswith("503 5.5.1 ")
        assert deliver(client).startswith("250 ")
    [message] = harvest(logins, 1)
    assert message.envelope.login == "alice"


NOBODY: Final = [
    "nobody", "alice/", "../alice", "/alice", ".", "..", "a/b", "alice:", "alice : bob", "alice\n", "alice ", "*", "al*",
    "*)(uid=*", "alice)(|(uid=*", "' or ''='", "\u0430lice", "al\u0131ce", "alic\u00e9", "alice@evil.test",
    "alice@example.org%x", "%s%n", "${alice}", "x" * 1000,
]  # fmt: skip
WRONG: Final = [("alice", "wrong"), ("alice", "open sesame "), ("bob", "Open Sesame"), ("bob", ""), ("dave", "x" * 1000)]


def test_s_pa13_whoever_is_not_a_login_is_told_the_same(logins: Site) -> None:
    """Names that mean something to a file, a directory or an LDAP server; names that look like one that there is; a right
    password for somebody else. Each from a place of its own, all at once, for wrong passwords are slow."""
    guesses = [b"\0%s\0%s" % (name.encode(), PASSWORD.encode()) for name in NOBODY]
    guesses += [b"\0%s\0%s" % (name.encode(), password.encode()) for name, password in WRONG]
    guesses += [f"{other}\0carol\0{PASSWORD}".encode() for other in ("root", "alice")]
    clients = [Client(logins.address("loopback"), source=f"127.0.1.{number + 1}") for number in range(len(guesses))]
    for client, guess in zip(clients, guesses, strict=True):
        client.begin("EHLO laptop")
        client.send(b"AUTH PLAIN " + b64(guess) + b"\r\n")
    answers = {client.reply() for client in clients}
    assert len(answers) == 1
    assert answers.pop().startswith("535 5.7.8 ")
    for client in clients:
        assert client.say("MAIL FROM:<alice@example.org>").startswith("530 ")
        client.socket.close()
    assert PASSWORD not in logins.log()
    assert_printable(logins.log())


def test_s_pa13_two_hundred_guesses_at_once_are_two(tmp_path: Path) -> None:
    """The limit holds over all connections and processes, however many guess at the same time."""
    limits = {"wrong_passwords": 2, "connections_per_client": 300}
    with auth_site(tmp_path, limits=limits, processes={"listeners": 2}) as site:
        clients = [Client(site.address("loopback")).begin("EHLO laptop") for _ in range(200)]
        for number, client in enumerate(clients):
            client.send(f"AUTH PLAIN {plain('alice', f'guess{number}')}\r\n".encode())
        answers = [client.reply()[:9] for client in clients]
        assert set(answers) == {"535 5.7.8", "421 4.7.0"}
        assert answers.count("535 5.7.8") <= 4, "two, and who was asked in the same moment"
        for client in clients:
            client.socket.close()
        with Client(site.address("loopback")) as client:
            client.begin("EHLO laptop")
            assert client.say(f"AUTH PLAIN {plain('alice')}").startswith("421 "), "not even the right one is told"
