"""DSN (RFC 3461) from end to end: who asks is told of success and delay, who declines is not, and wishes are passed on."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from mtad.spool.queues import Queue
from tests.e2e.world import MESSAGE, Report, World, await_gone
from tests.peers.mx import Mx, Say, Script
from tests.peers.script import DEFAULT_EXTENSIONS
from tests.site import DOMAIN

BODY: Final = b"the body of it"
TEXT: Final = b"From: a@example.org\r\nSubject: told\r\n\r\n" + BODY + b"\r\n"
USERS: Final = (
    "root",
    "alice",
    "bob",
    "success",
    "relayed",
    "passed",
    "never",
    "full",
    "hdrs",
    "usual",
    "mixed",
    "null",
    "far",
)
TELLS: Final = (*DEFAULT_EXTENSIONS, "DSN")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One site; each test has a mailbox of its own for its reports."""
    with World(tmp_path_factory.mktemp("dsn"), users=USERS) as world:
        yield world


def send(world: World, sender: str, *recipients: tuple[str, Sequence[str]], options: Sequence[str] = ()) -> str:
    """Send a message through the relay, with parameters for each recipient; its queue id."""
    with world.site.client("relay") as client:
        client.ehlo()
        assert client.has_extn("dsn")
        code, text = client.mail(f"{sender}@{DOMAIN}" if sender else "<>", options)
        assert code == 250, text
        for recipient, wishes in recipients:
            code, text = client.rcpt(recipient, wishes)
            assert code == 250, text
        code, text = client.data(TEXT)
        assert code == 250, text
    return text.decode().rpartition(" ")[2]


def reports(world: World, user: str) -> list[Report]:
    """All that a user was told; asked for when the message in question has gone."""
    return [Report(path.read_bytes()) for path in world.site.mailbox(user)]


def settled(world: World, queue_id: str, user: str, count: int) -> list[Report]:
    """Wait until a message has gone, and its reports with it; there are ``count``, each about one recipient or more."""
    await_gone(world, queue_id)
    if count:
        world.site.await_mail(user, count)
    world.site.await_empty_queue()
    found = reports(world, user)
    assert len(found) == count
    return found


def hop(world: World, script: Script | None = None) -> tuple[Mx, str]:
    """An exchanger and the domain that it is for."""
    mx = world.mx(script)
    return mx, world.domain(mx)


def test_a_success_here_is_told(world: World) -> None:
    """NOTIFY=SUCCESS: delivered, with the envelope's id and the recipient as they were given, decoded; no content."""
    wishes = ["NOTIFY=SUCCESS", "ORCPT=rfc822;Bob+2Bold@elsewhere.test"]
    queue_id = send(world, "success", (f"bob@{DOMAIN}", wishes), options=["ENVID=QQ+2B31+3D4", "RET=FULL"])
    [report] = settled(world, queue_id, "success", 1)
    assert report.about_message["Original-Envelope-Id"] == "QQ+31=4"
    assert report.about_message["Reporting-MTA"] == "dns; mx.example.org"
    [recipient] = report.recipients
    assert recipient["Final-Recipient"] == f"rfc822; bob@{DOMAIN}"
    assert recipient["Original-Recipient"] == "rfc822; Bob+old@elsewhere.test"
    assert (recipient["Action"], recipient["Status"]) == ("delivered", "2.0.0")
    assert report.message["Return-Path"] == "<>"
    assert report.message["Auto-Submitted"] == "auto-replied"
    # RFC 3461 section 4.3: RET is about failures; section 6.2 has other reports return the header at most.
    assert report.original.get_content_type() == "text/rfc822-headers"
    assert BODY.decode() not in report.message.as_string()
    assert f"{queue_id}: sender delivery status notification: " in world.site.log()


def test_a_success_at_a_hop_without_dsn_is_relayed(world: World) -> None:
    """RFC 3461 section 5.2.2: nobody further on would tell, so we do, and say that it is out of our hands."""
    mx, domain = hop(world)
    wishes = ["NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;b@first.test"]
    queue_id = send(world, "relayed", (f"b@{domain}", wishes), options=["ENVID=R1", "RET=HDRS"])
    [report] = settled(world, queue_id, "relayed", 1)
    [recipient] = report.recipients
    assert (recipient["Action"], recipient["Status"]) == ("relayed", "2.0.0")
    assert recipient["Remote-MTA"] == f"dns; mx1.{domain}"
    assert recipient["Original-Recipient"] == "rfc822; b@first.test"
    assert report.about_message["Original-Envelope-Id"] == "R1"
    [taken] = mx.messages
    assert not any(word in line for word in ("NOTIFY", "ORCPT", "ENVID", "RET=") for _, line in mx.commands), taken


def test_what_a_hop_with_dsn_can_tell_is_passed_on(world: World) -> None:
    """RFC 3461 section 5.2.1: all four parameters as they came, xtext again; and we tell nothing of a success."""
    mx, domain = hop(world, Script(extensions=TELLS))
    wishes = [
        (f"a@{domain}", ["NOTIFY=SUCCESS,DELAY", "ORCPT=rfc822;A+2Bx@first.test"]),
        (f"b@{domain}", ["NOTIFY=NEVER"]),
        (f"c@{domain}", []),
        (f"d@{domain}", [r"ORCPT=utf-8;\x{FC}@first.test"]),
    ]
    queue_id = send(world, "passed", *wishes, options=["RET=HDRS", "ENVID=Q+2B1"])
    assert settled(world, queue_id, "passed", 0) == []
    [taken] = mx.messages
    assert {"RET=HDRS", "ENVID=Q+2B1"} <= set(taken.mail.split())
    lines = {line.partition("<")[2].partition("@")[0]: set(line.split()[2:]) for _, line in mx.commands if "RCPT" in line}
    assert lines["a"] == {"NOTIFY=SUCCESS,DELAY", "ORCPT=rfc822;A+2Bx@first.test"}
    assert lines["b"] == {"NOTIFY=NEVER", f"ORCPT=rfc822;b@{domain}"} or lines["b"] == {"NOTIFY=NEVER"}
    assert not any(word.startswith("NOTIFY") for word in lines["c"])
    assert r"ORCPT=utf-8;\x{FC}@first.test" in lines["d"]


@pytest.mark.parametrize("user", ["full", "hdrs", "usual"])
def test_a_failure_returns_as_much_as_was_asked_for(world: World, user: str) -> None:
    """RET=FULL brings the whole message back, RET=HDRS its header; without a wish the header is enough for us."""
    _, domain = hop(world, Script(rcpt=Say("550 5.1.1 No such user here")))
    options = [] if user == "usual" else [f"RET={user.upper()}"]
    queue_id = send(world, user, (f"b@{domain}", ["NOTIFY=FAILURE"]), options=options)
    [report] = settled(world, queue_id, user, 1)
    assert report.failed == {f"b@{domain}": "5.1.1"}
    assert report.about_message["Original-Envelope-Id"] is None
    assert (BODY.decode() in report.message.as_string()) is (user == "full")
    wanted = "message/rfc822" if user == "full" else "text/rfc822-headers"
    assert report.original.get_content_type() == wanted


def test_never_is_never(world: World) -> None:
    """NOTIFY=NEVER: neither of success nor of failure, and the message is not kept for that."""
    _, domain = hop(world)
    _, refusing = hop(world, Script(rcpt=Say("550 5.1.1 No such user here")))
    names = [f"good@{domain}", f"bad@{refusing}", f"bob@{DOMAIN}"]
    queue_id = send(world, "never", *((name, ["NOTIFY=NEVER"]) for name in names))
    assert settled(world, queue_id, "never", 0) == []
    assert f"to=<bad@{refusing}>" in world.site.log()


def test_each_recipient_has_its_own_wish(world: World) -> None:
    """In one message: each success that was asked for, each failure that was not declined, and nothing else."""
    _, domain = hop(world)
    _, refusing = hop(world, Script(rcpt=Say("550 5.1.1 No such user here")))
    wishes = {
        f"yes@{domain}": ["NOTIFY=SUCCESS"],
        f"no@{domain}": ["NOTIFY=FAILURE"],
        f"usual@{domain}": [],
        f"yes@{refusing}": ["NOTIFY=SUCCESS,FAILURE"],
        f"usual@{refusing}": [],
        f"success@{refusing}": ["NOTIFY=SUCCESS"],
        f"never@{refusing}": ["NOTIFY=NEVER"],
    }
    queue_id = send(world, "mixed", *wishes.items())
    await_gone(world, queue_id)
    world.site.await_empty_queue()
    told = [(block["Final-Recipient"], block["Action"]) for one in reports(world, "mixed") for block in one.recipients]
    assert sorted(told) == sorted(
        [
            (f"rfc822; yes@{domain}", "relayed"),
            (f"rfc822; yes@{refusing}", "failed"),
            (f"rfc822; usual@{refusing}", "failed"),
        ]
    )


def test_nobody_is_told_nothing(world: World) -> None:
    """A report asks for none, and one that does is told to nobody: no loop of reports."""
    before = len(world.site.mailbox("root"))
    queue_id = send(world, "", (f"null@{DOMAIN}", ["NOTIFY=SUCCESS,FAILURE,DELAY"]))
    await_gone(world, queue_id)
    world.site.await_mail("null")
    world.site.await_empty_queue()
    assert len(world.site.mailbox("root")) == before


def test_a_report_itself_asks_for_nothing(world: World) -> None:
    """To a sender elsewhere, by a hop with DSN: from nobody, and without the wishes of the message that it is about."""
    home, domain = hop(world, Script(extensions=TELLS))
    with world.site.client("relay") as client:
        client.ehlo()
        client.mail(f"a@{domain}", ["ENVID=E1", "RET=FULL"])
        client.rcpt(f"bob@{DOMAIN}", ["NOTIFY=SUCCESS"])
        assert client.data(MESSAGE)[0] == 250
    [taken] = home.await_messages(1)
    assert taken.sender == ""
    assert "ENVID" not in taken.mail
    [line] = [line for _, line in home.commands if line.startswith("RCPT")]
    assert "SUCCESS" not in line


# -- delays -----------------------------------------------------------------------------------------------------------


def test_a_delay_is_told_once_to_those_who_want_it(tmp_path: Path) -> None:
    """NOTIFY=DELAY and no NOTIFY: a report of the delay; the end is told to those who asked for FAILURE or for nothing."""
    wishes = {"delay": ["NOTIFY=DELAY"], "usual": [], "failure": ["NOTIFY=FAILURE"], "never": ["NOTIFY=NEVER"]}
    retry = {"minimum": "300ms", "maximum": "400ms", "warn_after": "500ms", "lifetime": "2500ms"}
    with World(tmp_path, users=("root", *wishes), retry=retry, delivery={"connect_timeout": "1s"}) as world:
        domain = world.domain(world.address())
        begin = time.time()
        ids = [send(world, user, (f"b@{domain}", list(wish)), options=["ENVID=D1"]) for user, wish in wishes.items()]
        for queue_id in ids:
            await_gone(world, queue_id)
        world.site.await_empty_queue()
        told = {user: [block["Action"] for one in reports(world, user) for block in one.recipients] for user in wishes}
        assert told == {"delay": ["delayed"], "usual": ["delayed", "failed"], "failure": ["failed"], "never": []}
        [report] = reports(world, "delay")
        [recipient] = report.recipients
        assert recipient["Status"].startswith("4.4.")
        assert "Connection refused" in recipient["Diagnostic-Code"]
        until = email.utils.parsedate_to_datetime(recipient["Will-Retry-Until"]).timestamp()
        assert begin <= until <= begin + 5
        assert report.about_message["Original-Envelope-Id"] == "D1"
        assert report.original.get_content_type() == "text/rfc822-headers"
        assert "WARNING ONLY" in report.text


def test_wishes_are_kept_over_a_restart(tmp_path: Path) -> None:
    """They are in the queue file: what was deferred and is delivered by another process still passes them on."""
    with World(tmp_path, retry={"minimum": "1h"}) as world:
        busy = Script(extensions=TELLS, rcpt=Say("451 4.3.0 Later"))
        mx, domain = hop(world, busy)
        wishes = ["NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;old+2Bx@first.test"]
        queue_id = send(world, "alice", (f"b@{domain}", wishes), options=["RET=FULL", "ENVID=K1"])
        world.site.await_deferred(queue_id)
        world.site.stop()
        with closing(world.site.spool()) as spool:
            [recipient] = spool.load(Queue.DEFERRED, queue_id).envelope.recipients
        assert (recipient.notify, recipient.orcpt) == (("success", "failure"), "rfc822;old+x@first.test")
        mx.script = Script(extensions=TELLS)
        seen = len(mx.commands)
        world.site.start()
        world.site.run("mtad-flush", queue_id)
        [taken] = mx.await_messages(1)
        assert {"RET=FULL", "ENVID=K1"} <= set(taken.mail.split())
        [line] = [line for _, line in mx.commands[seen:] if line.startswith("RCPT")]
        assert set(line.split()[2:]) == set(wishes)
        await_gone(world, queue_id)
        world.site.await_empty_queue()
        assert not world.site.mailbox("alice")
