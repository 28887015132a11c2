"""What a hostile DNS can make us do: the rows D-1 to D-7 of the list of attacks, over real sockets.

The resolver is asked directly where only it is concerned; where somebody could be talked to, a real server runs and real
exchangers count who comes. What other servers of the DNS answer is in ``tests/unit/test_resolver.py``.
"""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import dns.flags
import dns.message
import dns.rrset
import pytest

from mtad.config import Delivery
from mtad.errors import ResolverFailure
from mtad.nexthop import Rules
from mtad.resolver import Addresses, Mx, NoMx, NoSuchDomain, NullMx, Resolver
from mtad.routing import ADDRESS_LIMIT, HOST_LIMIT, Host, Router
from tests.e2e.world import MESSAGE, Report, World, await_gone
from tests.peers.dns import SERVFAIL, SILENT, DnsServer, Entry, reverse
from tests.peers.mx import Mx as Exchanger
from tests.site import DOMAIN, Site
from tests.unit.spool_aid import needs_root

VALUES = (Mx, NullMx, NoMx, NoSuchDomain, Addresses)


class Hostile:
    """A name server that is a function: what it is asked, and whether over TCP, to the packets that it sends."""

    def __init__(self, answer: Callable[[dns.message.Message, bool], list[bytes]]) -> None:
        self.answer = answer
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(self.tcp.getsockname())
        self.other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.other.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.tcp.getsockname()[1]}"
        self.closed = False

    def serve_udp(self) -> None:
        while True:
            data, peer = self.udp.recvfrom(4096)
            if not data:
                return
            for packet in self.answer(dns.message.from_wire(data), False):
                # one that begins so is sent from another port
                sender = self.other if packet.startswith(b"other") else self.udp
                sender.sendto(packet.removeprefix(b"other"), peer)

    def serve_tcp(self) -> None:
        while True:
            connection, _ = self.tcp.accept()
            with connection:
                if self.closed:
                    return
                try:
                    size = struct.unpack("!H", connection.recv(2))[0]
                    for packet in self.answer(dns.message.from_wire(connection.recv(size)), True):
                        connection.sendall(packet)
                except (OSError, struct.error):
                    pass  # the client has had enough


@contextmanager
def hostile(answer: Callable[[dns.message.Message, bool], list[bytes]], timeout: float = 0.5) -> Iterator[Resolver]:
    """A resolver that asks such a server."""
    server = Hostile(answer)
    threads = [threading.Thread(target=target) for target in (server.serve_udp, server.serve_tcp)]
    for thread in threads:
        thread.start()
    try:
        yield Resolver([server.address], timeout)
    finally:
        server.closed = True
        server.other.sendto(b"", server.udp.getsockname())
        socket.create_connection(server.tcp.getsockname()).close()
        for thread in threads:
            thread.join()
        for used in (server.udp, server.tcp, server.other):
            used.close()


def reply(query: dns.message.Message, *records: str, kind: str = "MX", name: str = "") -> dns.message.Message:
    """A fine answer."""
    response = dns.message.make_response(query, recursion_available=True)
    response.answer = [dns.rrset.from_text_list(name or query.question[0].name, 60, "IN", kind, list(records))]
    return response


GOOD = Mx(((10, "mx.good.test"),))


@pytest.mark.parametrize("what", ["id", "source", "question", "name", "no reply", "all"])
def test_d7_forged_answers_before_the_true_one_are_passed_over(what: str) -> None:
    """An attacker beside the line is faster than the name server, and has to guess."""

    def answer(query: dns.message.Message, _tcp: bool) -> list[bytes]:
        true = reply(query, "10 mx.good.test.").to_wire()
        other_id, question, name, unasked = (reply(query, "10 mx.evil.test.") for _ in range(4))
        other_id.id ^= 1
        question.question = [dns.rrset.from_text("other.test.", 0, "IN", "MX")]
        name.question = [dns.rrset.from_text("good.test.evil.test.", 0, "IN", "MX")]
        unasked.flags &= ~dns.flags.QR
        forged = {
            "id": other_id.to_wire(),
            "source": b"other" + reply(query, "10 mx.evil.test.").to_wire(),
            "question": question.to_wire(),
            "name": name.to_wire(),
            "no reply": unasked.to_wire(),
        }
        return [*(forged.values() if what == "all" else [forged[what]]), true]

    with hostile(answer) as resolver:
        assert resolver.mx("good.test") == GOOD


def test_d7_records_of_another_name_are_not_taken_for_an_answer() -> None:
    with hostile(lambda query, _: [reply(query, "10 mx.evil.test.", name="other.test.").to_wire()]) as resolver:
        assert resolver.mx("good.test") == NoMx()
    # and what is added for the sake of a cache is not kept

    def poison(query: dns.message.Message, _tcp: bool) -> list[bytes]:
        if query.question[0].name.to_text() == "bank.test.":
            return [reply(query, "10 mx.good.test.").to_wire()]
        response = reply(query, "10 mx.evil.test.")
        response.additional = [dns.rrset.from_text("bank.test.", 60, "IN", "MX", "10 mx.evil.test.")]
        response.answer += response.additional
        return [response.to_wire()]

    with hostile(poison) as resolver:
        assert resolver.mx("evil.test") == Mx(((10, "mx.evil.test"),))
        assert resolver.mx("bank.test") == GOOD


def question_of(query: dns.message.Message) -> bytes:
    name = query.question[0].name.to_wire()
    assert name is not None
    return name + struct.pack("!HH", query.question[0].rdtype, 1)


RDATA = {
    "compression loop": b"\x00\x0a\xc0\x2e",
    "two that point at each other": b"\x00\x0a\xc0\x30\xc0\x2e",
    "pointer to the future": b"\x00\x0a\xff\xff",
    "pointer into the header": b"\x00\x0a\xc0\x02",
    "pointer beyond a label": b"\x00\x0a\x3fabc",
    "reserved label type": b"\x00\x0a\x80abc\x00",
    "nothing": b"",
    "half a preference": b"\x00",
    "preference alone": b"\x00\x0a",
    "a name of 300 octets": b"\x00\x0a" + b"\x3f" + b"a" * 63 + (b"\x3f" + b"b" * 63) * 4 + b"\x00",
    "more than its length": b"\x00\x0a\x02mx\x00trailing",
}


@pytest.mark.parametrize("rdata", RDATA.values(), ids=RDATA.keys())
def test_d7_rdata_that_is_none(rdata: bytes) -> None:
    def answer(query: dns.message.Message, _tcp: bool) -> list[bytes]:
        head = struct.pack("!HHHHHH", query.id, 0x8180, 1, 1, 0, 0)
        record = b"\xc0\x0c" + struct.pack("!HHIH", query.question[0].rdtype, 1, 60, len(rdata))
        return [head + question_of(query) + record + rdata]

    start = time.monotonic()
    with hostile(answer) as resolver, pytest.raises(ResolverFailure):
        resolver.mx("good.test")
    assert time.monotonic() - start < 3


def test_d7_cve_2023_42119_and_2026_40684_answers_with_any_octet_changed() -> None:
    """Whatever comes, it is a value or a failure that waits: never another exception, never for long."""
    dice = random.Random(7)

    def answer(query: dns.message.Message, _tcp: bool) -> list[bytes]:
        kind = query.question[0].rdtype.name
        records = {"MX": ["10 mx.good.test.", "20 mx2.good.test."], "A": ["192.0.2.1"], "PTR": ["a\\255\\000b.good.test."]}
        wire = bytearray(reply(query, *records.get(kind, ["2001:db8::1"]), kind=kind).to_wire())
        for _ in range(dice.randrange(1, 4)):
            wire[dice.randrange(2, len(wire))] = dice.randrange(256)
        return [bytes(wire[: dice.randrange(12, len(wire) + 1)] if dice.random() < 0.2 else wire)]

    said: set[type[object]] = set()
    start = time.monotonic()
    with hostile(answer, timeout=0.02) as resolver:
        for number in range(20):
            try:
                found: object = resolver.mx(f"d{number}.test")
                assert isinstance(found, VALUES)
                said.add(type(found))
                found = resolver.addresses(f"mx{number}.test")
                assert isinstance(found, VALUES)
            except ResolverFailure:
                said.add(ResolverFailure)
            name = resolver.ptr(f"192.0.2.{number}", timeout=0.02)
            assert name is None or name.isprintable()
    assert said >= {Mx, ResolverFailure}
    assert time.monotonic() - start < 15


LIES = {
    "a length of 65535 and nothing else": lambda wire: [b"\xff\xff", wire],
    "a length of 0": lambda _: [b"\0\0"],
    "half a length": lambda _: [b"\0"],
    "less than it says": lambda wire: [struct.pack("!H", len(wire) + 1), wire],
    "more than it says": lambda wire: [struct.pack("!H", len(wire) // 2), wire],
    "64 KiB of nothing": lambda _: [b"\xff\xff", bytes(65535)],
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_d7_answers_over_tcp_that_lie_about_their_length(lie: Callable[[bytes], list[bytes]]) -> None:
    def answer(query: dns.message.Message, tcp: bool) -> list[bytes]:
        response = reply(query, "10 mx.good.test.")
        if tcp:
            return lie(response.to_wire())
        response.flags |= dns.flags.TC
        return [response.to_wire()]

    start = time.monotonic()
    with hostile(answer) as resolver, pytest.raises(ResolverFailure):
        resolver.mx("good.test")
    assert time.monotonic() - start < 3


def test_d7_more_than_64_kib_over_tcp_is_the_first_answer_and_no_memory() -> None:
    def answer(query: dns.message.Message, tcp: bool) -> list[bytes]:
        response = reply(query, "10 mx.good.test.")
        if not tcp:
            response.flags |= dns.flags.TC
            return [response.to_wire()]
        wire = response.to_wire()
        return [struct.pack("!H", len(wire)) + wire, *[bytes(65536)] * 32]

    with hostile(answer) as resolver:
        assert resolver.mx("good.test") == GOOD


def test_d6_a_thousand_addresses_and_a_thousand_hosts_are_few() -> None:
    many = [f"10.{number // 250}.{number % 250}.1" for number in range(1000)]
    zones: dict[str, Entry] = {f"mx{number}.test": {"A": many[number : number + 5]} for number in range(1000)}
    zones["hosts.test"] = {"MX": [f"10 mx{number}.test." for number in range(1000)]}
    zones["addresses.test"] = {"MX": ["10 many.test."]}
    zones["many.test"] = {"A": many}
    with DnsServer(zones) as server:
        for domain, hosts in (("hosts.test", HOST_LIMIT), ("addresses.test", 1)):
            server.forget()
            orders = set()
            for seed in range(3):
                router = Router(Resolver([server.address], 2.0), "me.test", Rules(Delivery()), rng=random.Random(seed))
                found = [hop for hop in router.hops(domain) if isinstance(hop, Host)]
                assert 1 <= sum(len(hop.addresses) for hop in found) <= ADDRESS_LIMIT
                orders.add(str(found))
            # For each: the MX, and A and AAAA of so many hosts; each once more over TCP if it does not fit a datagram.
            assert len(server.questions()) <= 3 * 2 * (1 + 2 * hosts)
            assert len(orders) == 3, "equal ones in random order"


# -- over a running server --------------------------------------------------------------------------------------------

OFF_LIMITS: Final[dict[str, Entry]] = {
    "literal": {"MX": ["10 127.0.88.1."]},
    "literal6": {"MX": ["10 \\091IPv6\\058\\058\\058\\0491\\093."]},
    "localhost": {"MX": ["10 localhost."]},
    "loop4": {"MX": ["10 loop4.hosts.test."]},
    "loop6": {"MX": ["10 loop6.hosts.test."]},
    "mapped": {"MX": ["10 mapped.hosts.test."]},
    "mapped0": {"MX": ["10 mapped0.hosts.test."]},
    "zero": {"MX": ["10 zero.hosts.test."]},
    "local": {"MX": ["10 local.hosts.test."]},
    "alias": {"MX": ["10 alias.hosts.test."]},
    "gone": {"MX": ["10 gone.hosts.test."]},
    "odd": {"MX": ["10 a\\032b.hosts.test.", "20 -x.hosts.test.", "30 *.hosts.test.", "40 x\\000y.hosts.test."]},
    "port": {"MX": ["10 loop4.hosts.test\\05825.", "20 loop4.hosts.test\\0472525."]},
    "long": {"MX": ["10 " + ".".join(["a" * 61] * 4) + "."]},
    "itself": {"MX": ["10 itself.test."], "A": "127.0.88.1"},
    "implicit": {"A": "127.0.88.1", "AAAA": "::1"},
}
HOSTS: Final[dict[str, Entry]] = {
    "localhost": {"A": "127.0.88.1", "AAAA": "::1"},
    "loop4.hosts.test": {"A": ["127.0.88.1", "127.0.0.1"]},
    "loop4.hosts.test:25": {"A": "127.0.88.1"},
    "loop6.hosts.test": {"AAAA": "::1"},
    "mapped.hosts.test": {"AAAA": "::ffff:127.0.88.1"},
    "mapped0.hosts.test": {"AAAA": "::ffff:0.0.0.0"},
    "zero.hosts.test": {"A": ["0.0.0.0", "0.0.88.1"], "AAAA": "::"},
    "local.hosts.test": {"A": ["169.254.169.254", "224.0.0.1", "255.255.255.255"], "AAAA": ["fe80::1", "ff02::1"]},
    "alias.hosts.test": {"CNAME": "loop4.hosts.test."},
}


@needs_root
def test_d4_no_zone_makes_us_talk_to_our_own_machine(tmp_path: Path) -> None:
    """On port 25, where whoever listens trusts us. On another port, which is a setting of ours, loopback is allowed."""
    try:
        listening = Exchanger("127.0.88.1", 25)
    except OSError:
        pytest.skip("port 25 cannot be had here")
    zones = {f"{name}.test": zone for name, zone in OFF_LIMITS.items()}
    with listening as mx, DnsServer({**zones, **HOSTS}) as server, Site(tmp_path, dns=server.address) as site:
        to = [*(f"b@{name}.test" for name in OFF_LIMITS), "b@[127.0.88.1]", "b@[IPv6:::1]", "b@[IPv6:::ffff:7f00:5801]"]
        site.send("alice@example.org", to, MESSAGE)
        report = Report(site.await_mail("alice")[0])
        site.await_empty_queue()
        assert sorted(report.failed) == sorted(to)
        assert set(report.failed.values()) == {"5.4.4"}
        assert mx.connections == 0
        assert len(site.mailbox("alice")) == 1


def test_d4_our_own_address_in_whatever_clothes_is_ours(tmp_path: Path) -> None:
    """As an IPv4 address in an IPv6 one, behind an alias, as the second of two, as a literal."""
    with World(tmp_path, start=False) as world:
        ours, other = world.address(), world.mx()
        world.site.listeners[0]["address"] = [f"{ours}:{world.port}"]
        world.site.configure()
        world.site.start()
        mapped, alias = world.domain(f"::ffff:{ours}", other), world.domain(ours, other)
        world.dns.set(f"mx1.{alias}", {"CNAME": f"real.{alias}."})
        world.host(f"real.{alias}", ours)
        both = world.domain(f"{other.address} ::ffff:{ours}", other)
        as_v6 = ipaddress.ip_address(f"::ffff:{ours}")
        to = [*(f"b@{domain}" for domain in (mapped, alias, both)), f"b@[{ours}]", f"b@[IPv6:{as_v6}]"]
        queue_id = world.send(*to)
        assert world.report().failed == dict.fromkeys(to, "5.4.6")
        await_gone(world, queue_id)
        assert other.connections == 0


def test_d1_d2_d3_d5_verdicts_of_a_running_server(tmp_path: Path) -> None:
    """What bounces does at once, what waits never bounces, and neither is taken for "no MX"."""
    with World(tmp_path, dns={"timeout": "1s"}) as world:
        mx = world.mx()
        where = {"A": [mx.address]}
        world.dns.set("null.test", {"MX": ["0 ."], **where})
        world.dns.set("mixed.test", {"MX": ["0 .", "10 mx.mixed.test."], "A": ["127.77.9.9"]})
        world.dns.set("mx.mixed.test", where)
        world.dns.set("plain.test", where)
        world.dns.set("broken.test", {"MX": SERVFAIL, **where})
        world.dns.set("silent.test", {"MX": SILENT, **where})
        world.dns.set("circle.test", {"CNAME": "circle.test."})
        for number in range(20):
            world.dns.set(f"c{number}.test", {"CNAME": f"c{number + 1}.test."})
        world.dns.set("c20.test", where)
        queue_id = world.send(
            *(f"b@{name}.test" for name in ("null", "mixed", "plain", "broken", "silent", "circle", "c0", "gone"))
        )
        assert world.report().failed == {"b@null.test": "5.1.10", "b@gone.test": "5.1.2"}
        row = world.site.await_deferred(queue_id)
        waiting = {one["address"]: one["status"] for one in row["recipients"] if one.get("status", "").startswith("4")}
        assert waiting == dict.fromkeys((f"b@{name}.test" for name in ("broken", "silent", "circle", "c0")), "4.4.3")
        assert sorted(one.recipients[0] for one in mx.messages) == ["b@mixed.test", "b@plain.test"]
        assert len(world.site.mailbox("alice")) == 1


def test_d7_the_name_of_a_client_is_a_hostile_text(tmp_path: Path) -> None:
    """CVE-2026-40684: octets in a PTR record that are no name reach neither the log nor a header, and nothing dies."""
    with DnsServer() as server:
        server.set(reverse("127.0.0.1"), {"PTR": ["a\\255\\000\\010X-Evil\\058 1.evil.test."]})
        server.set("a\\255\\000\\010X-Evil: 1.evil.test", {"A": "127.0.0.1"})
        with Site(tmp_path, dns=server.address) as site:
            site.send("a@sender.test", f"alice@{DOMAIN}", MESSAGE)
            [stored] = site.await_mail("alice")
            assert b"\nX-Evil" not in stored
            assert stored.isascii()
            assert b"\0" not in stored
            assert "panic" not in site.log()
            assert os.listdir(site.mail_root) == ["alice"]
