"""An open relay is what this is not: S-RL of the attacks, against a real mx listener that could deliver to the world.

Everything that is not for our domains would go to one next hop, which hears of nothing: that is the oracle, beside the
replies and the empty queue. What looks like a way through a local address is the local part that it is, which nobody has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from tests.client import Client
from tests.e2e.attack_aid import PATIENT, deliver
from tests.peers.mx import Mx
from tests.site import Site

NOT_OURS: Final = "550 5.7.1"
NOBODY: Final = "550 5.1.1"
NO_ADDRESS: Final = "501 5.1.3"
NO_COMMAND: Final = "500 5.5.2"
UTF8: Final = "553 5.6.7"

#: What stands behind RCPT TO: and what is said to it.
ATTEMPTS: Final = {
    "<u@evil.example>": NOT_OURS,
    "<u+tag@evil.example>": NOT_OURS,
    "<alice@evil.example>": NOT_OURS,
    "<postmaster@evil.example>": NOT_OURS,
    # percent, bang, source routes, several signs
    "<u%evil.example@example.org>": NOBODY,
    "<u%evil.example%example.org@example.org>": NOBODY,
    "<alice%example.org@evil.example>": NOT_OURS,
    "<u%evil.example@[127.0.0.1]>": NOT_OURS,
    "<u%evil.example@[IPv6:::1]>": NOT_OURS,
    "<u%evil.example>": NO_ADDRESS,
    '<"u@evil.example">': NO_ADDRESS,
    '<"u%evil.example">': NO_ADDRESS,
    "<u@evil.example@example.org>": NO_ADDRESS,
    "<u@evil.example@[127.0.0.1]>": NO_ADDRESS,
    "<u@example.org@evil.example>": NO_ADDRESS,
    '<"u@evil.example"@example.org>': NOBODY,
    '<"u@evil.example"@[127.0.0.1]>': NOT_OURS,
    '<"alice@example.org"@evil.example>': NOT_OURS,
    "<@example.org:u@evil.example>": NOT_OURS,
    "<@[127.0.0.1]:u@evil.example>": NOT_OURS,
    "<@example.org,@evil.example:u@evil.example>": NOT_OURS,
    "<@example.org:u%evil.example@example.org>": NOBODY,
    "<@evil.example>": NO_ADDRESS,
    "<evil.example!u>": NO_ADDRESS,
    "<evil.example!u@example.org>": NOBODY,
    "<evil.example!u@[127.0.0.1]>": NOT_OURS,
    "<example.org!evil.example!u@example.org>": NOBODY,
    "<evil.example!u%evil.example@example.org>": NOBODY,
    # dots, and other names of this host
    "<u@evil.example.>": NO_ADDRESS,
    "<alice@example.org.>": NO_ADDRESS,
    "<alice@.example.org>": NO_ADDRESS,
    "<alice@example.org.evil.example>": NOT_OURS,
    "<alice@evil-example.org>": NOT_OURS,
    "<alice@sub.example.org>": NOT_OURS,
    "<alice@org>": NOT_OURS,
    "<alice@mx.example.org>": NOT_OURS,
    "<alice@[127.0.0.1]>": NOT_OURS,
    "<alice@[IPv6:::1]>": NOT_OURS,
    "<alice@[IPv6:::ffff:127.0.0.1]>": NOT_OURS,
    "<alice@[::1]>": NO_ADDRESS,
    "<alice@[127.1]>": NO_ADDRESS,
    "<alice@[mx.example.org]>": NO_ADDRESS,
    "<alice@127.0.0.1>": NOT_OURS,
    "<alice@0x7f.1>": NOT_OURS,
    "<alice@2130706433>": NOT_OURS,
    "<alice@0177.0.0.1>": NOT_OURS,
    "<alice@localhost>": NOT_OURS,
    "<alice@localhost.localdomain>": NOT_OURS,
    # two in one, and other signs
    "<alice@example.org%00.evil.example>": NO_ADDRESS,
    "<alice@example.org\0.evil.example>": NO_COMMAND,
    "<alice@example.org\0@evil.example>": NO_COMMAND,
    "<u@evil.example\0@example.org>": NO_COMMAND,
    "<u@evil.example,alice@example.org>": NO_ADDRESS,
    "<alice@example.org,u@evil.example>": NO_ADDRESS,
    "<u@evil.example;alice@example.org>": NO_ADDRESS,
    "<u@evil.example><alice@example.org>": NO_ADDRESS,
    "<alice@example.org><u@evil.example>": NO_ADDRESS,
    "<alice@example.org> <u@evil.example>": "501 5.5.4",
    "<<u@evil.example>@example.org>": NO_ADDRESS,
    "<u@evil.example <alice@example.org>>": NO_ADDRESS,
    "<alice@example.org\\@evil.example>": NO_ADDRESS,
    "<alice\\@example.org@evil.example>": NO_ADDRESS,
    "<alice@example.org#@evil.example>": NO_ADDRESS,
    "<alice@example.org?@evil.example>": NO_ADDRESS,
    "<alice@example.org/@evil.example>": NO_ADDRESS,
    "<alice@example.org:25@evil.example>": NO_ADDRESS,
    "<alice@evil.example:25>": NO_ADDRESS,
    "<alice@example.org(@evil.example)>": NO_ADDRESS,
    "<u@evil.example(@example.org)>": NO_ADDRESS,
    "<*@example.org>": NOBODY,
    "<@example.org>": NO_ADDRESS,
    "<example.org>": NO_ADDRESS,
    "<>": NO_ADDRESS,
    "<alice>": NO_ADDRESS,
    "": NO_ADDRESS,
    "u@evil.example": NOT_OURS,
    "u@evil.example alice@example.org": "501 5.5.4",
    # encodings
    "<u=40evil.example@example.org>": NOBODY,
    "<u+40evil.example@example.org>": NOBODY,
    "<u&#64;evil.example@example.org>": NO_ADDRESS,
    "<=?utf-8?q?u=40evil.example?=@example.org>": NOBODY,
    "<=?utf-8?q?u?=@evil.example>": NOT_OURS,
    "<+ADw-u+AEA-evil.example@example.org>": NOBODY,
    "<u@xn--evil>": NOT_OURS,
    "<u@xn--a.example>": NOT_OURS,
    "<u@xn--.example>": NO_ADDRESS,
    "<u@-evil.example>": NO_ADDRESS,
    "<u\uff20evil.example>": NO_ADDRESS,
    "<u\uff20evil.example@example.org>": UTF8,
    "<u@evil\uff0eexample>": UTF8,
    "<u@ev\u00efl.example>": UTF8,
    "<al\u0131ce@example.org>": UTF8,
}

#: The same with SMTPUTF8, where the reply is another one then.
ATTEMPTS_IN_UTF8: Final = {
    "<u\uff20evil.example>": NO_ADDRESS,
    "<u\uff20evil.example@example.org>": NOBODY,
    "<u@evil\uff0eexample>": NOT_OURS,
    "<u@ev\u00efl.example>": NOT_OURS,
    "<u@\u0435xample.org>": NOT_OURS,
    "<al\u0131ce@example.org>": NOBODY,
    "<\u0430lice@example.org>": NOBODY,
    "<alice@example\u3002org.evil.example>": NOT_OURS,
    "<alice@example\u2024org>": NO_ADDRESS,
    "<alice@example.org\u2044evil>": NO_ADDRESS,
}

OURS: Final = {
    "<alice@example.org>": "alice",
    "<alice@EXAMPLE.ORG>": "alice",
    "<ALICE@Example.Org>": "alice",
    '<"alice"@example.org>': "alice",
    r'<"\a\l\i\c\e"@example.org>': "alice",
    "<@evil.example:alice@example.org>": "alice",
    "<@evil.example,@[127.0.0.1]:alice@example.org>": "alice",
    "alice@example.org": "alice",
    "<postmaster>": "root",
    "<PostMaster>": "root",
    "postmaster": "root",
    "<postmaster@example.org>": "root",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Mx]]:
    with Mx("127.0.0.1") as mx:
        hop = {"next_hop": f"[127.0.0.1]:{mx.port}"}
        with Site(tmp_path_factory.mktemp("relay"), delivery=hop, limits=PATIENT) as site:
            yield site, mx


@pytest.mark.parametrize("sender", ["a@sender.test", "alice@example.org", "root@example.org", "alice@[127.0.0.1]", ""])
@pytest.mark.parametrize("helo", ["client.test", "example.org", "mx.example.org", "[127.0.0.1]", "localhost"])
@pytest.mark.parametrize("family", ["4", "6"], ids=["IPv4", "IPv6"])
def test_s_rl_nobody_relays_here(world: tuple[Site, Mx], family: str, helo: str, sender: str) -> None:
    """Whoever a client says it is, and in whose name it sends."""
    site, mx = world
    with Client(site.address(family=family)) as client:
        client.begin(f"EHLO {helo}")
        for parameter, attempts in (("", ATTEMPTS), (" SMTPUTF8", ATTEMPTS_IN_UTF8)):
            assert client.say(f"MAIL FROM:<{sender}>{parameter}").startswith("250 ")
            for path, answer in attempts.items():
                assert client.say(f"RCPT TO:{path}")[:9] == answer, path
            assert client.say("DATA").startswith("554 5.5.1 "), "not one of them was taken"
            assert client.say("RSET").startswith("250 ")
    assert mx.connections == 0
    assert not any(site.files(queue) for queue in ("incoming", "active", "deferred", "hold"))


@pytest.mark.parametrize("path", OURS)
def test_s_rl_what_is_ours_is_ours(world: tuple[Site, Mx], path: str) -> None:
    """In the same transaction all attempts are refused; the one message goes into the one mailbox."""
    site, mx = world
    before = {user: len(site.mailbox(user)) for user in ("root", "alice", "bob")}
    with Client(site.address()) as client:
        client.begin("HELO example.org", "MAIL FROM:<alice@example.org>")
        for attempt, answer in ATTEMPTS.items():
            assert client.say(f"RCPT TO:{attempt}")[:9] == answer, attempt
        assert client.say(f"RCPT TO:{path}").startswith("250 2.1.5 ")
        assert deliver(client).startswith("250 2.0.0 ")
    site.await_mail(OURS[path], before[OURS[path]] + 1)
    site.await_empty_queue()
    assert {user: len(site.mailbox(user)) - before[user] for user in before} == {
        user: int(user == OURS[path]) for user in before
    }
    assert sorted(entry.name for entry in site.mail_root.iterdir() if not entry.name.startswith(".")) == sorted(
        user for user in before if site.mailbox(user)
    )
    assert mx.connections == 0


def test_s_rl_the_relay_is_for_those_it_trusts(world: tuple[Site, Mx]) -> None:
    """The oracle of the others can hear: what may be relayed arrives, and it alone."""
    site, mx = world
    site.send("alice@example.org", "friend@far.test", "Subject: x\r\n\r\nx\r\n", "relay")
    [message] = mx.await_messages(1)
    assert message.recipients == ["friend@far.test"]
