"""Who may send what to whom."""

from __future__ import annotations

import pytest

from mtad.address import NULL, Address
from mtad.config_rules import parse_sender
from mtad.policy import Policy, Verdict
from mtad.smtp.grammar import parse_mailbox, parse_rcpt


class Directory:
    """Users of two domains."""

    users = frozenset({"root@example.org", "alice@example.org", "o'neil@example.net"})

    def lookup(self, address: Address) -> str | None:
        return address.local.lower() if address.key in self.users else None


DOMAINS = ("Example.ORG", "example.net")
LOOPBACK = ("127.0.0.0/8", "::1/128")
MX = Policy(Directory(), DOMAINS)
RELAY = Policy(Directory(), DOMAINS, "relay", LOOPBACK)


def judge(policy: Policy, path: str, trusted: bool = False) -> Verdict:
    return policy.judge(parse_rcpt(f"TO:{path}").address, trusted)


@pytest.mark.parametrize(
    ("path", "verdict"),
    [
        ("<alice@example.org>", Verdict.LOCAL),
        ("<ALICE@Example.Org>", Verdict.LOCAL),
        ('<"alice"@example.org>', Verdict.LOCAL),
        ("<o'neil@example.net>", Verdict.LOCAL),
        ("<postmaster>", Verdict.LOCAL),
        ("<PostMaster@example.org>", Verdict.LOCAL),
        ("<postmaster@example.net>", Verdict.LOCAL),
        ("<alice@example.net>", Verdict.UNKNOWN_USER),
        ("<nobody@example.org>", Verdict.UNKNOWN_USER),
        ("<alice%example.com@example.org>", Verdict.UNKNOWN_USER),
        ("<example.com!alice@example.org>", Verdict.UNKNOWN_USER),
        ('<"alice@example.com"@example.org>', Verdict.UNKNOWN_USER),
        ("<alice+tag@example.org>", Verdict.UNKNOWN_USER),
        ('<"alice "@example.org>', Verdict.UNKNOWN_USER),
        ("<alice@example.com>", Verdict.NOT_OURS),
        ("<postmaster@example.com>", Verdict.NOT_OURS),
        ("<alice@mx.example.org>", Verdict.NOT_OURS),
        ("<alice@xample.org>", Verdict.NOT_OURS),
        ("<alice@[127.0.0.1]>", Verdict.NOT_OURS),
        ("<postmaster@[127.0.0.1]>", Verdict.NOT_OURS),
        ("<@example.org:alice@example.com>", Verdict.NOT_OURS),
    ],
)
def test_mx(path: str, verdict: Verdict) -> None:
    assert judge(MX, path) is verdict


def test_mx_trusts_nobody() -> None:
    policy = Policy(Directory(), DOMAINS, "mx", LOOPBACK)
    assert not policy.trusts("127.0.0.1")


@pytest.mark.parametrize(
    ("address", "trusted"),
    [
        ("127.0.0.1", True),
        ("127.255.255.255", True),
        ("128.0.0.1", False),
        ("::1", True),
        ("::2", False),
        ("::ffff:127.0.0.1", True),
        ("::ffff:192.0.2.1", False),
        ("192.0.2.1", False),
        ("", False),
        ("localhost", False),
        ("127.1", False),
    ],
)
def test_relay_trusts_its_networks(address: str, trusted: bool) -> None:
    assert RELAY.trusts(address) is trusted


def test_relay_for_the_trusted() -> None:
    assert judge(RELAY, "<x@example.com>", True) is Verdict.RELAY
    assert judge(RELAY, "<x@[192.0.2.1]>", True) is Verdict.RELAY
    assert judge(RELAY, "<alice@example.org>", True) is Verdict.LOCAL
    assert judge(RELAY, "<postmaster>", True) is Verdict.LOCAL
    assert judge(RELAY, "<nobody@example.org>", True) is Verdict.UNKNOWN_USER


@pytest.mark.parametrize("path", ["<x@example.com>", "<alice@example.org>", "<postmaster>", "<nobody@example.org>"])
def test_relay_for_others(path: str) -> None:
    assert judge(RELAY, path, False) is Verdict.NOT_TRUSTED


SUBMISSION = Policy(
    Directory(),
    DOMAINS,
    "submission",
    LOOPBACK,
    ("alice : Sales@Example.ORG", "alice: @lists.example.net", "Robot:*", "bob : büro@bücher.example"),
)


@pytest.mark.parametrize("path", ["<x@example.com>", "<alice@example.org>", "<postmaster>"])
def test_submission_is_closed(path: str) -> None:
    assert judge(SUBMISSION, path) is Verdict.NOT_AUTHENTICATED


def test_submission_trusts_no_network() -> None:
    assert not SUBMISSION.trusts("127.0.0.1")


@pytest.mark.parametrize("policy", [MX, SUBMISSION])
def test_for_those_who_have_logged_in(policy: Policy) -> None:
    assert judge(policy, "<x@example.com>", True) is Verdict.RELAY
    assert judge(policy, "<alice@example.org>", True) is Verdict.LOCAL
    assert judge(policy, "<nobody@example.org>", True) is Verdict.UNKNOWN_USER


@pytest.mark.parametrize(
    ("login", "sender", "owns"),
    [
        ("alice", "alice@example.org", True),
        ("ALICE", "Alice@Example.ORG", True),
        ("alice@example.org", "alice@example.org", True),
        ("alice", "root@example.org", False),
        ("root", "alice@example.org", False),
        ("alice", "alice@example.com", False),
        ("alice", "nobody@example.org", False),
        ("alice", "sales@example.org", True),
        ("root", "sales@example.org", False),
        ("alice", "x@lists.example.net", True),
        ("alice", "x@sub.lists.example.net", False),
        ("alice", "*@example.org", False),
        ("robot", "anybody@example.com", True),
        ("bob", "büro@bücher.example", True),
        ("bob", "BÜRO@xn--bcher-kva.example", True),
        ("bob", "o'neil@example.net", False),
        ("o'neil", "o'neil@example.net", True),
        ("nobody@example.org", "alice@example.org", False),
        ("a@b@c", "alice@example.org", False),
        ("../alice", "alice@example.org", False),
        ("alice/x", "alice@example.org", False),
        ("*", "alice@example.org", False),
        ("*)(uid=*", "alice@example.org", False),
        ("", "alice@example.org", False),
    ],
)
def test_who_may_send_as_whom_s_en5(login: str, sender: str, owns: bool) -> None:
    assert SUBMISSION.owns(login, parse_mailbox(sender)) is owns


def test_anybody_may_send_as_nobody() -> None:
    """Reports and receipts have no sender (RFC 3464 section 2)."""
    assert SUBMISSION.owns("alice", NULL)


@pytest.mark.parametrize(
    "line", ["", "alice", "alice :", ": a@b", "alice : a@", "alice : @", "alice : @-x", "alice : a b@c"]
)
def test_a_line_of_senders_that_is_none(line: str) -> None:
    with pytest.raises(ValueError, match=r"alice|login"):
        parse_sender(line)


def test_a_literal_is_local_when_it_is_listed() -> None:
    policy = Policy(Directory(), ("[127.0.0.1]",))
    assert judge(policy, "<postmaster@[127.0.0.1]>") is Verdict.LOCAL
    assert judge(policy, "<postmaster@[127.0.0.2]>") is Verdict.NOT_OURS


def test_first_domain() -> None:
    assert MX.first_domain == "example.org"
    assert Policy(Directory(), ()).first_domain == ""


def test_a_network_that_is_none() -> None:
    with pytest.raises(ValueError, match="300"):
        Policy(Directory(), (), "relay", ("300.0.0.0/8",))
