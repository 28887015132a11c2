"""Delivering (issue 2): one test for each of its sentences, over real processes and sockets."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.world import MESSAGE, World, await_gone
from tests.peers.dns import SERVFAIL, SILENT
from tests.peers.mx import CLOSE, Mx, Say, Script
from tests.site import Site, await_value
from tests.unit.spool_aid import needs_root

REFUSED_TO_TALK = "refused to talk to me"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One site for all tests that leave its settings alone; each has domains and addresses of its own."""
    with World(tmp_path_factory.mktemp("world"), dns={"timeout": "1s"}) as world:
        yield world


# -- to local users ---------------------------------------------------------------------------------------------------


def test_to_local_users_maildir_with_return_path_and_delivered_to(world: World) -> None:
    """To local users: Maildir, with Return-Path: and Delivered-To:."""
    world.site.send("a@sender.test", "bob@example.org", MESSAGE)
    [stored] = world.site.await_mail("bob")
    assert stored.startswith(b"Return-Path: <a@sender.test>\nDelivered-To: bob@example.org\nReceived: ")
    assert stored.endswith(b"\n\nhello\n")


def test_the_mailbox_is_made_when_missing(tmp_path: Path) -> None:
    """the mailbox is made when missing"""
    with Site(tmp_path) as site:
        assert not site.mail_root.exists()
        site.send("a@sender.test", ["alice@example.org", "bob@example.org"], MESSAGE)
        site.await_mail("alice")
        site.await_mail("bob")
        for user in ("alice", "bob"):
            parts = {path.name: path.stat().st_mode & 0o777 for path in (site.mail_root / user).iterdir()}
            assert parts == {"tmp": 0o700, "new": 0o700, "cur": 0o700}


@needs_root
def test_a_full_disk_defers_with_the_reason(tmp_path: Path) -> None:
    """a full disk [...] defers with the reason"""
    mail_root = tmp_path / "mail"
    mail_root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mail_root)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with Site(tmp_path, retry={"minimum": "1s"}) as site:
            big = b"Subject: big\r\n\r\n" + (b"x" * 70 + b"\r\n") * 2000
            queue_id = site.send("a@sender.test", "alice@example.org", big)
            row = site.await_deferred(queue_id)
            [recipient] = row["recipients"]
            assert recipient["delay_reason"] == "cannot store in the mailbox of alice: No space left on device"
            assert recipient["status"] == "4.3.1"
            assert site.mailbox("alice") == []
            subprocess.run(["mount", "-o", "remount,size=1m", str(mail_root)], check=True)
            site.await_mail("alice")
    finally:
        subprocess.run(["umount", str(mail_root)], check=True)


def test_a_wrong_permission_defers_with_the_reason(tmp_path: Path) -> None:
    """a wrong permission defers with the reason: here another kind of file, which stops root as well"""
    with Site(tmp_path, retry={"minimum": "1s"}) as site:
        site.mail_root.mkdir()
        (site.mail_root / "alice").write_text("not a directory")
        queue_id = site.send("a@sender.test", ["alice@example.org", "bob@example.org"], MESSAGE)
        [recipient] = site.await_deferred(queue_id)["recipients"]
        assert recipient["address"] == "alice@example.org"
        assert recipient["delay_reason"] == "cannot store in the mailbox of alice: Not a directory"
        assert len(site.await_mail("bob")) == 1
        (site.mail_root / "alice").unlink()
        site.await_mail("alice")
        site.await_empty_queue()
        assert len(site.mailbox("bob")) == 1, "who had it does not get it again"


# -- where to ---------------------------------------------------------------------------------------------------------


def test_mx_by_preference(world: World) -> None:
    """MX by preference"""
    best, middle, last = world.mx(), world.mx(), world.mx()
    world.send(f"b@{world.domain(last, best, middle, preferences=(30, 5, 20))}")
    best.await_messages(1)
    assert middle.connections == last.connections == 0


def test_equal_preferences_in_random_order(world: World) -> None:
    """equal ones in random order"""
    one, other = world.mx(), world.mx()
    for _ in range(24):  # each domain is a destination of its own, so that no connection is reused
        world.send(f"b@{world.domain(one, other, preferences=(10, 10))}")
    await_value(lambda: len(one.messages) + len(other.messages) == 24)
    assert one.messages
    assert other.messages


def test_addresses_of_the_domain_when_it_has_no_mx(world: World) -> None:
    """AAAA and A of the domain only when it has no MX at all: it has none"""
    four, six = world.mx(), world.mx(address="::1")
    world.host("four.test", four)
    world.host("six.test", six)
    world.send("b@four.test", "b@six.test")
    assert [message.recipients for message in four.await_messages(1)] == [["b@four.test"]]
    assert [message.recipients for message in six.await_messages(1)] == [["b@six.test"]]
    six.close()


def test_addresses_of_the_domain_are_not_for_one_that_has_an_mx(world: World) -> None:
    """AAAA and A of the domain only when it has no MX at all: it has one, which is dead"""
    alive = world.mx()
    domain = world.domain(world.address())
    world.dns.set(domain, {"MX": [f"10 mx1.{domain}."], "A": [alive.address]})
    assert world.reason(world.send(f"b@{domain}")).startswith(f"4.4.1 connect to mx1.{domain}[")
    assert alive.connections == 0


@pytest.mark.parametrize("alive", ["::1", ""], ids=["IPv6", "IPv4"])
def test_d8_both_address_families_are_tried_within_one_attempt(world: World, alive: str) -> None:
    """both address families tried within one attempt"""
    mx = world.mx(address=alive)
    domain = world.domain(f"{mx.address} {world.address() if alive else '::1'}")
    queue_id = world.send(f"b@{domain}")
    mx.await_messages(1)
    await_gone(world, queue_id)
    assert f"{queue_id}: to=<b@{domain}>, relay=mx1.{domain}[{mx.address}]" in world.site.log()
    mx.close()


def test_the_first_server_that_takes_the_message_ends_the_search(world: World) -> None:
    """the first server that takes the message ends the search"""
    first, second = world.mx(), world.mx()
    queue_id = world.send(f"b@{world.domain(first, second)}")
    first.await_messages(1)
    await_gone(world, queue_id)
    assert second.connections == 0


UNHELPFUL = {
    "connection refused": None,
    "connection closed at once": Script(greeting=CLOSE),
    "4xx greeting": Script(greeting=Say("421 4.3.2 not now")),
    "5xx greeting": Script(greeting=Say("554 5.3.2 never")),
    "4xx to EHLO": Script(ehlo=Say("421 4.3.2 not now", close=True)),
    "4xx to MAIL": Script(mail=Say("451 4.3.0 later")),
    "4xx to RCPT": Script(rcpt=Say("450 4.2.1 later")),
    "4xx to DATA": Script(data=Say("451 4.3.0 later")),
    "4xx to the content": Script(dot=Say("452 4.3.1 full")),
}


@pytest.mark.parametrize("kind", UNHELPFUL)
def test_a_failure_or_a_4xx_tries_the_next(world: World, kind: str) -> None:
    """a connection failure, a 4xx greeting or a 4xx reply tries the next"""
    script = UNHELPFUL[kind]
    bad: Mx | str = world.address() if script is None else world.mx(script)
    good = world.mx()
    queue_id = world.send(f"b@{world.domain(bad, good)}")
    good.await_messages(1)
    await_gone(world, queue_id)
    assert isinstance(bad, str) or bad.connections == 1


def test_a_5xx_to_a_recipient_fails_that_recipient(world: World) -> None:
    """a 5xx reply to a recipient fails that recipient"""
    domain = world.domain(mx := world.mx(Script(rcpt={})), other := world.mx())
    mx.script = Script(rcpt={f"bad@{domain}": Say("550 5.1.1 No such user here")})
    already = len(world.site.mailbox("alice"))
    world.send(f"good@{domain}", f"bad@{domain}", f"fine@{domain}")
    [taken] = mx.await_messages(1)
    assert taken.recipients == [f"good@{domain}", f"fine@{domain}"]
    report = world.report(count=already + 1)
    assert report.failed == {f"bad@{domain}": "5.1.1"}
    assert other.connections == 0, "what is refused for good is nobody else's"


# -- ourselves --------------------------------------------------------------------------------------------------------


def test_our_own_name_in_the_list_cuts_off_itself_and_what_is_worse(world: World) -> None:
    """Our own host in the MX list cuts off itself and everything less preferred"""
    worse, dead = world.mx(), world.address()
    domain = world.domain(dead, worse)
    world.dns.set(domain, {"MX": [f"10 mx1.{domain}.", "20 MX.example.org.", f"20 mx2.{domain}.", f"30 mx2.{domain}."]})
    assert world.reason(world.send(f"b@{domain}")).startswith("4.4.1 connect to mx1.")
    assert worse.connections == 0


def test_q2_d4_our_own_address_in_the_list_cuts_off_itself_and_what_is_worse(tmp_path: Path) -> None:
    """Our own host in the MX list [...]: by an address that it listens on, whatever its name there"""
    with World(tmp_path, start=False) as world:
        ours = world.address()
        world.site.listeners[0]["address"] = [f"{ours}:{world.port}"]
        world.site.configure()
        world.site.start()
        worse, dead = world.mx(), world.address()
        cut = world.domain(dead, ours, worse)
        assert world.reason(world.send(f"b@{cut}")).startswith("4.4.1 connect to mx1.")
        best = world.domain(ours, worse)
        world.send(f"b@{best}")
        assert world.report().failed == {f"b@{best}": "5.4.6"}
        assert worse.connections == 0


def test_q2_when_we_are_the_best_the_mail_loops(world: World) -> None:
    """Our own host in the MX list cuts off itself and everything less preferred: nothing is left"""
    domain = world.domain(world.mx())
    world.dns.set(domain, {"MX": ["10 mx.example.org.", f"20 mx1.{domain}."]})
    already = len(world.site.mailbox("alice"))
    world.send(f"b@{domain}")
    assert world.report(count=already + 1).failed == {f"b@{domain}": "5.4.6"}


# -- what the DNS says ------------------------------------------------------------------------------------------------


def test_d1_null_mx_fails(world: World) -> None:
    """`MX 0 .` fails with 5.1.10"""
    mx = world.mx()
    world.dns.set("nomail.test", {"MX": ["0 ."], "A": [mx.address]})
    already = len(world.site.mailbox("alice"))
    world.send("b@nomail.test")
    assert world.report(count=already + 1).failed == {"b@nomail.test": "5.1.10"}
    assert mx.connections == 0


def test_d3_nxdomain_fails(world: World) -> None:
    """NXDOMAIN fails with 5.1.2"""
    already = len(world.site.mailbox("alice"))
    world.send("b@nowhere.invalid")
    assert world.report(count=already + 1).failed == {"b@nowhere.invalid": "5.1.2"}


@pytest.mark.parametrize("fault", [SERVFAIL, SILENT], ids=["SERVFAIL", "time-out"])
def test_d3_a_dns_that_does_not_answer_defers(world: World, fault: object) -> None:
    """SERVFAIL or a DNS time-out defers (4.4.3), never falls back to A, never bounces"""
    mx = world.mx()
    name = f"{str(fault).lower()[-7:].strip('.')}.test"
    world.dns.set(name, {"MX": fault, "A": [mx.address]})  # type: ignore[dict-item]
    already = len(world.site.mailbox("alice"))
    queue_id = world.send(f"b@{name}")
    assert world.reason(queue_id).startswith("4.4.3 ")
    assert mx.connections == 0
    assert len(world.site.mailbox("alice")) == already
    world.dns.set(name, {"MX": [f"10 mx.{name}."]})
    world.host(f"mx.{name}", mx)
    assert world.site.run("mtad-flush", queue_id).returncode == 0
    mx.await_messages(1)


# -- a smarthost ------------------------------------------------------------------------------------------------------


def test_a_smarthost_instead_of_mx_lookup(tmp_path: Path) -> None:
    """[delivery] next_hop: a smarthost "host" or "host:port" instead of MX lookup; "[host]" = no MX lookup"""
    with World(tmp_path, start=False) as world:
        mx = world.mx()
        world.site.configure(delivery={"next_hop": f"[{mx.address}]:{mx.port}"})
        world.site.start()
        world.send("b@one.invalid", "c@other.invalid")
        [taken] = mx.await_messages(1)
        assert taken.recipients == ["b@one.invalid", "c@other.invalid"]
        assert world.dns.questions() == []
        named = world.domain(world.mx(), name="smart.test")
        world.site.configure(delivery={"next_hop": named})
        world.site.stop()
        world.site.start()
        world.send("d@one.invalid")
        await_value(lambda: world.dns.count("smart.test", "MX"))
        assert world.dns.count("one.invalid") == 0
