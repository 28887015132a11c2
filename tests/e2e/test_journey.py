"""The walking skeleton: one message of each kind all the way through real processes."""

from __future__ import annotations

from pathlib import Path

from tests.peers.dns import DnsServer
from tests.peers.mx import Mx
from tests.site import Site

MESSAGE = b"From: a@sender.test\r\nSubject: journey\r\n\r\nhello\r\n.dot\r\n"


def test_local_message_arrives_in_the_maildir(tmp_path: Path) -> None:
    with Site(tmp_path) as site:
        queue_id = site.send("a@sender.test", "alice@example.org", MESSAGE)
        [stored] = site.await_mail("alice")
        site.await_empty_queue()
    head, _, body = stored.partition(b"\n\n")
    assert head.startswith(b"Return-Path: <a@sender.test>\nDelivered-To: alice@example.org\nReceived: from client.test ")
    assert f"id {queue_id}".encode() in head
    assert b"\r" not in stored
    assert body == b"hello\n.dot\n"


def test_remote_message_leaves_by_mx(tmp_path: Path) -> None:
    zones = {"far.test": {"MX": ["10 mx.far.test."]}, "mx.far.test": {"A": ["127.0.0.5"]}}
    with Mx("127.0.0.5") as mx, DnsServer(zones) as dns, Site(tmp_path, dns=dns.address, port=mx.port) as site:
        queue_id = site.send("alice@example.org", "b@far.test", MESSAGE)
        [taken] = mx.await_messages(1)
        site.await_empty_queue()
        site.await_log(rf"{queue_id}: to=<b@far.test>, relay=mx.far.test\[127.0.0.5\]:{mx.port}, .*status=sent \(250 ")
        site.await_log(rf"{queue_id}: removed")
    assert taken.content.endswith(MESSAGE.partition(b"\r\n\r\n")[2])
