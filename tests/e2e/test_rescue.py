"""The IPv6 rescue (issue 4), end to end: a destination that does not like our IPv6 address gets its mail over IPv4.

``When the policy reply over IPv6 is about addresses or PTR (5.7.1, 5.7.25, 5.7.26), the same attempt goes on over IPv4
before anything bounces, and the lane remembers for a day.``
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.world import World
from tests.peers.mx import Say, Script

REFUSALS = (
    "550 5.7.25 [::1] The IP address sending this message does not have a PTR record setup",
    "550 5.7.1 [::1] This message does not meet IPv6 sending guidelines regarding PTR records and authentication",
    "550 5.7.26 This mail is unauthenticated: SPF does not pass with ip: [::1]",
)


@pytest.mark.parametrize("reply", REFUSALS)
def test_the_same_attempt_goes_on_over_ipv4_and_the_lane_remembers(tmp_path: Path, reply: str) -> None:
    with World(tmp_path) as world:
        six, four = world.mx(Script(dot=Say(reply)), address="::1"), world.mx()
        domain = world.domain(f"::1 {four.address}")
        first = world.send(f"b@{domain}")
        four.await_messages(1)
        world.site.await_empty_queue()
        assert six.connections == 1
        lines = re.findall(rf"{first}: to=<b@{domain}>, relay=([^,]*), .*status=(\w+)", world.site.log())
        port = world.port
        assert lines == [
            (f"mx1.{domain}[::1]:{port}", "deferred"),
            (f"mx1.{domain}[{four.address}]:{port}", "sent"),
        ]
        for _ in range(3):
            world.send(f"b@{domain}")
        four.await_messages(4)
        world.site.await_empty_queue()
        assert six.connections == 1, "remembered"
        assert "status=bounced" not in world.site.log()
        assert world.site.mailbox("alice") == [], "nobody was told of a failure"


def test_without_ipv4_the_refusal_bounces(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        six = world.mx(Script(rcpt=Say(REFUSALS[0])), address="::1")
        queue_id = world.send(f"b@{world.domain('::1')}")
        [report] = world.site.await_mail("alice")
        assert b"5.7.25" in report
        world.site.await_empty_queue()
        assert six.connections == 1
        assert len(re.findall(rf"{queue_id}: to=.*status=", world.site.log())) == 1


def test_other_domains_are_still_delivered_over_ipv6(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        script = Script(rcpt={"b@picky.test": Say(REFUSALS[0])})
        six, four = world.mx(script, address="::1"), world.mx()
        world.domain(f"::1 {four.address}", name="picky.test")
        world.domain(f"::1 {four.address}", name="other.test")
        world.send("b@picky.test")
        four.await_messages(1)
        world.send("b@other.test")
        six.await_messages(1)
        assert len(four.messages) == 1
