"""Bouncing (issue 2): reports of RFC 3464, to whom they go, and what becomes of those that cannot be delivered."""

from __future__ import annotations

import email
import email.policy
import email.utils
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtad.spool.queues import Queue
from tests.e2e.world import Report, World, await_gone
from tests.peers.mx import Say, Script
from tests.site import await_value


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One site for the tests that leave its settings alone; each has a mailbox of its own."""
    users = ("root", "alice", "one", "several", "expired", "mixed", "text", "quiet")
    with World(tmp_path_factory.mktemp("world"), users=users) as world:
        yield world


def refusing(world: World, text: str = "550 5.1.1 No such user here") -> tuple[str, str]:
    """A domain whose server knows nobody, and the server's address."""
    mx = world.mx(Script(rcpt=Say(text)))
    return world.domain(mx), mx.address


def test_a_failed_recipient_gives_its_sender_one_rfc_3464_report(world: World) -> None:
    """A failed [...] recipient gives its sender one RFC 3464 report (multipart/report; text a human understands;
    delivery-status with Reporting-MTA, Arrival-Date, Final-Recipient, Action, Status, Remote-MTA, Diagnostic-Code; the
    original's headers)"""
    domain, _ = refusing(world)
    before = time.time()
    queue_id = world.send(f"b@{domain}", sender="one@example.org")
    report = world.report("one")
    assert report.about_message["Reporting-MTA"] == "dns; mx.example.org"
    arrival = email.utils.parsedate_to_datetime(report.about_message["Arrival-Date"]).timestamp()
    assert before - 1 <= arrival <= time.time()
    [recipient] = report.recipients
    assert recipient["Final-Recipient"] == f"rfc822; b@{domain}"
    assert recipient["Action"] == "failed"
    assert recipient["Status"] == "5.1.1"
    assert recipient["Remote-MTA"] == f"dns; mx1.{domain}"
    assert recipient["Diagnostic-Code"] == "smtp; 550 5.1.1 No such user here"
    assert "could not be delivered" in report.text
    assert f"<b@{domain}>" in report.text
    assert "No such user here" in report.text
    assert report.original.get_content_type() == "text/rfc822-headers"
    original = email.message_from_string(report.original.get_content(), policy=email.policy.default)
    assert original["Subject"] == "a test"
    assert f"id {queue_id}" in original["Received"]
    assert "hello" not in report.message.as_string()
    assert report.message["To"] == "one@example.org"
    await_gone(world, queue_id)
    assert len(world.site.mailbox("one")) == 1


def test_q1_a_report_comes_from_nobody_and_says_that_a_machine_wrote_it(world: World) -> None:
    """from `<>` with Auto-Submitted:"""
    domain, _ = refusing(world)
    home = world.mx()
    sender = f"a@{world.domain(home)}"
    world.send(f"b@{domain}", sender=sender)
    [taken] = home.await_messages(1)
    assert taken.sender == ""
    assert taken.recipients == [sender]
    message = email.message_from_bytes(taken.content, policy=email.policy.default)
    assert message["Auto-Submitted"] == "auto-replied"
    assert message["From"].addresses[0].addr_spec == "MAILER-DAEMON@mx.example.org"
    assert all(message[name] for name in ("Date", "Message-ID", "Subject", "MIME-Version"))
    assert all(len(line) <= 998 for line in taken.content.split(b"\r\n"))
    assert not home.bare


def test_several_failed_recipients_are_one_report(world: World) -> None:
    """A failed or expired recipient gives its sender one [...] report: those that fail together share it"""
    first, _ = refusing(world)
    second, _ = refusing(world, "551 5.7.1 Not for you")
    good = world.mx()
    names = [f"a@{first}", f"b@{first}", f"c@{second}", "d@nowhere.invalid", f"e@{world.domain(good)}"]
    queue_id = world.send(*names, sender="several@example.org")
    report = world.report("several")
    wanted = ("5.1.1", "5.1.1", "5.7.1", "5.1.2")
    assert report.failed == dict(zip(names, wanted, strict=False))
    assert [block["Remote-MTA"] for block in report.recipients][3] is None, "no server was asked about it"
    await_gone(world, queue_id)
    assert len(world.site.mailbox("several")) == 1
    assert len(good.messages) == 1
    assert f"{queue_id}: sender non-delivery notification: " in world.site.log()


def test_an_expired_recipient_gives_its_sender_a_report(world: World) -> None:
    """A [...] expired recipient gives its sender one RFC 3464 report"""
    domain = world.domain(world.address())
    arrival = time.time() - 5.5 * 86400
    queue_id = world.place(Queue.DEFERRED, f"b@{domain}", arrival=arrival, sender="expired@example.org")
    world.site.run("mtad-flush", queue_id)
    report = world.report("expired")
    [recipient] = report.recipients
    assert (recipient["Action"], recipient["Status"]) == ("failed", "4.4.7")
    assert "Connection refused" in recipient["Diagnostic-Code"]
    assert "long time" in report.text
    await_gone(world, queue_id)


def test_who_failed_is_reported_at_once_and_who_waits_later(tmp_path: Path) -> None:
    """one report: about a recipient once, however often the message is tried afterwards"""
    with World(tmp_path, retry={"minimum": "300ms", "lifetime": "1500ms"}) as world:
        domain, _ = refusing(world)
        dead = world.domain(world.address())
        queue_id = world.send(f"bad@{domain}", f"late@{dead}")
        assert world.report().failed == {f"bad@{domain}": "5.1.1"}
        assert world.report(count=2).failed == {f"late@{dead}": "4.4.7"}
        await_gone(world, queue_id)
        assert len(world.site.mailbox("alice")) == 2


def test_q4_hostile_replies_are_data_in_a_report(world: World) -> None:
    """delivery-status with [...] Diagnostic-Code: whatever a server says cannot forge a field or a part"""
    domain, _ = refusing(world, "550 5.1.1 \x1b[2J --=_0_x Status: 2.0.0 " + "\u00e9" * 20)
    world.send(f"b@{domain}", sender="text@example.org")
    report = world.report("text")
    assert report.failed == {f"b@{domain}": "5.1.1"}
    assert "\x1b" not in report.message.as_string()
    assert "\x1b" not in world.site.log()


# -- bounces of bounces -----------------------------------------------------------------------------------------------


def notice(world: World, count: int = 1) -> Report:
    """The last of ``count`` notices to postmaster."""
    return world.report("root", count)


def test_q1_a_bounce_that_cannot_be_delivered_goes_to_postmaster(tmp_path: Path) -> None:
    """A bounce that cannot be delivered goes to postmaster"""
    with World(tmp_path) as world:
        domain, _ = refusing(world)
        queue_id = world.send(f"b@{domain}", sender="a@nowhere.invalid")
        report = notice(world)
        assert report.failed == {"a@nowhere.invalid": "5.1.2"}
        assert report.message["To"].startswith("postmaster@")
        assert "Return-Path: <>" in report.message.as_string().splitlines()[0]
        await_gone(world, queue_id)
        world.site.await_empty_queue()
        assert len(world.site.mailbox("root")) == 1
        assert world.site.files("hold") == []
        assert "postmaster non-delivery notification: " in world.site.log()


def test_a_bounce_that_expires_goes_to_postmaster(tmp_path: Path) -> None:
    """A bounce that cannot be delivered goes to postmaster: its lifetime is a setting of its own"""
    with World(tmp_path, retry={"minimum": "300ms", "bounce_lifetime": "1s"}) as world:
        domain, _ = refusing(world)
        dead = world.domain(world.address())
        world.send(f"b@{domain}", sender=f"a@{dead}")
        assert notice(world).failed == {f"a@{dead}": "4.4.7"}
        world.site.await_empty_queue()


def test_q1_what_nobody_sent_goes_to_postmaster(tmp_path: Path) -> None:
    """nothing bounces a bounce: mail from `<>` is never answered to anybody but postmaster"""
    with World(tmp_path) as world:
        domain, _ = refusing(world)
        world.send(f"b@{domain}", sender="")
        assert notice(world).failed == {f"b@{domain}": "5.1.1"}
        world.site.await_empty_queue()
        assert len(world.site.mailbox("root")) == 1


def test_q1_nothing_bounces_a_bounce_twice(tmp_path: Path) -> None:
    """nothing bounces a bounce twice: without a postmaster who can be reached it is kept for a human"""
    relay = [{"name": "relay", "service": "relay", "address": ["127.0.0.1:0"]}]
    with World(tmp_path, local={"domains": []}, listeners=relay) as world:
        domain, _ = refusing(world)
        world.send(f"b@{domain}", sender="a@nowhere.invalid")
        [held] = await_value(lambda: world.site.files("hold"))
        world.site.await_empty_queue()
        world.site.await_log(rf"{held}: warning: placed on hold: ")
        [row] = world.site.queue()
        assert (row["queue_name"], row["kind"], row["sender"]) == ("hold", "double-bounce", "MAILER-DAEMON")
        assert f"{held}!" in world.site.run("mtaq").stdout
        world.site.stop()
        world.site.start()
        world.site.run("mtad-flush")
        assert world.site.files("hold") == [held]
