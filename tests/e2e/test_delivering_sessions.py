"""Delivering (issue 2): what is said to the next hop, one test for each sentence, over real processes and sockets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtad.outcome import Delivered
from mtad.spool.queues import Queue
from tests.e2e.world import World, await_gone
from tests.peers.mx import HANG, OK, Raw, Say, Script
from tests.site import await_value


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One site for all tests that leave its settings alone; each has domains and addresses of its own."""
    with World(tmp_path_factory.mktemp("world")) as world:
        yield world


def test_multi_line_replies(world: World) -> None:
    """Multi-line replies"""
    script = Script(
        greeting=Say(["220-mx.far.test", "220-is pleased", "220 to meet you"]),
        mail=Say(["250-2.1.0 one", "250 2.1.0 two"]),
        rcpt=Say(["250-2.1.5 one", "250 2.1.5 two"]),
        data=Say(["354-go", "354 ahead"]),
        dot=Say(["250-2.0.0 taken", "250 2.0.0 and kept"]),
    )
    mx = world.mx(script)
    domain = world.domain(mx)
    queue_id = world.send(f"b@{domain}")
    mx.await_messages(1)
    world.site.await_log(rf"{queue_id}: to=<b@{domain}>, .*status=sent \(250 2\.0\.0 taken (2\.0\.0 )?and kept\)")


def test_ehlo_then_helo(world: World) -> None:
    """EHLO then HELO"""
    mx = world.mx(Script(ehlo=Say("502 5.5.2 Error: command not recognized")))
    world.send(f"b@{world.domain(mx)}")
    [taken] = mx.await_messages(1)
    assert mx.verbs()[:5] == ["EHLO", "HELO", "MAIL", "RCPT", "DATA"]
    assert taken.helo == "mx.example.org"
    assert "SIZE" not in taken.mail


def test_pipelining_when_offered(world: World) -> None:
    """PIPELINING when offered"""
    mx = world.mx()
    domain = world.domain(mx)
    world.send(f"a@{domain}", f"b@{domain}")
    mx.await_messages(1)
    [group] = [data for _, data in mx.reads if data.startswith(b"MAIL")]
    assert group.count(b"RCPT TO:") == 2
    assert group.endswith(b"DATA\r\n")


def test_no_pipelining_when_not_offered(world: World) -> None:
    """PIPELINING when offered, and only then"""
    mx = world.mx(Script(extensions=("8BITMIME",)))
    domain = world.domain(mx)
    world.send(f"a@{domain}", f"b@{domain}")
    mx.await_messages(1)
    verbs = [data for _, data in mx.reads if data[:4] in {b"MAIL", b"RCPT", b"DATA"}]
    assert [data.count(b"\r\n") for data in verbs] == [1, 1, 1, 1]


PHASES = {
    "greeting": (Script(greeting=HANG), "timed out while receiving the initial server greeting"),
    "ehlo": (Script(ehlo=HANG), "timed out while performing the EHLO handshake"),
    "mail": (Script(mail=HANG), "timed out while sending MAIL FROM"),
    "rcpt": (Script(rcpt=HANG), "timed out while sending RCPT TO"),
    "data": (Script(data=HANG), "timed out while sending DATA command"),
    "dot": (Script(dot=HANG), "timed out while sending end of data -- message may be sent more than once"),
}


def test_per_state_time_outs(tmp_path: Path) -> None:
    """per-state time-outs"""
    names = ("helo", "mail", "rcpt", "data_init", "data_done")
    short = {f"{name}_timeout": "1s" for name in names}
    with World(tmp_path, delivery={**short, "data_xfer_timeout": "1s"}) as world:
        ids = {}
        for name, (script, _) in PHASES.items():
            alone = dataclasses.replace(script, extensions=())  # one command, one reply
            ids[name] = world.send(f"b@{world.domain(world.mx(alone))}")
        for name, (_, text) in PHASES.items():
            reason = world.reason(ids[name])
            assert reason.startswith("4.4.2 conversation with mx1.")
            assert text in reason


def test_a_reply_that_trickles_does_not_stretch_a_time_out(tmp_path: Path) -> None:
    """per-state time-outs: for the whole reply, not for each octet of it"""
    with World(tmp_path, delivery={"helo_timeout": "400ms"}) as world:
        slow = world.mx(Script(greeting=Raw(b"220-wait\r\n", endless=True, pause=0.05)))
        assert "4.4.2 conversation with" in world.reason(world.send(f"b@{world.domain(slow)}"))


@pytest.mark.parametrize(("count", "transactions"), [(50, [50]), (51, [1, 50])])
def test_recipients_of_one_destination_share_a_transaction(world: World, count: int, transactions: list[int]) -> None:
    """recipients of one destination share a transaction (at most 50)"""
    mx = world.mx()
    domain = world.domain(mx)
    world.send(*(f"u{number}@{domain}" for number in range(count)))
    taken = mx.await_messages(len(transactions))
    assert sorted(len(message.recipients) for message in taken) == transactions
    assert len({address for message in taken for address in message.recipients}) == count


def test_recipients_of_several_destinations_do_not(world: World) -> None:
    """recipients of one destination share a transaction: those of two do not"""
    mx = world.mx()
    one, other = world.domain(mx), world.domain(mx)
    world.send(f"a@{one}", f"b@{other}", f"c@{one}")
    assert sorted(message.recipients for message in mx.await_messages(2)) == [[f"a@{one}", f"c@{one}"], [f"b@{other}"]]


def test_connections_are_kept_for_the_next_message(tmp_path: Path) -> None:
    """connections are kept for the next message to the same destination"""
    with World(tmp_path, delivery={"processes": 1, "connection_idle": "4s"}) as world:
        mx = world.mx()
        domain = world.domain(mx)
        for number in range(1, 6):
            queue_id = world.send(f"b@{domain}")
            mx.await_messages(number)
            await_gone(world, queue_id)
        assert mx.connections == 1
        mx.await_closed(20.0)  # and not for long: connection_idle
        assert mx.verbs()[-1] == "QUIT"


def test_a_kept_connection_that_died_costs_nothing(world: World) -> None:
    """connections are kept [...]: one that the server has closed meanwhile is replaced in the same attempt"""
    mx = world.mx()
    domain = world.domain(mx)
    first = world.send(f"b@{domain}")
    mx.await_messages(1)
    await_gone(world, first)
    mx.drop()
    second = world.send(f"b@{domain}")
    mx.await_messages(2)
    await_gone(world, second)
    assert "status=deferred" not in "".join(line for line in world.site.log().splitlines() if second in line)


def test_per_recipient_what_the_server_said_is_what_we_record(world: World) -> None:
    """Per recipient what the server said is what we record."""
    domain = world.domain(mx := world.mx())
    said = {
        f"a@{domain}": "450 4.2.1 Mailbox a is busy",
        f"b@{domain}": "452 4.2.2 Mailbox b is full",
        f"c@{domain}": "250 2.1.5 Fine",
    }
    mx.script = Script(rcpt={address: Say(text) for address, text in said.items()}, dot=Say("250 2.6.0 thanks a lot"))
    queue_id = world.send(*said)
    row = world.site.await_deferred(queue_id)
    reasons = {recipient["address"]: recipient for recipient in row["recipients"]}
    assert set(reasons) == {f"a@{domain}", f"b@{domain}"}
    for address, recipient in reasons.items():
        text = f"host mx1.{domain}[{mx.address}] said: {said[address]} (in reply to RCPT TO command)"
        assert recipient["delay_reason"] == text
        assert recipient["status"] == said[address].split()[1]
        assert recipient["remote"] == f"mx1.{domain}"
    outcomes = dict(world.attempts(Queue.DEFERRED, queue_id)[0].outcomes)
    assert isinstance(outcomes[2], Delivered)
    assert [outcomes[index].reply for index in range(3)] == [*list(said.values())[:2], "250 2.6.0 thanks a lot"]


def test_one_reply_after_another_is_recorded(world: World) -> None:
    """Per recipient what the server said is what we record: the last word counts"""
    mx = world.mx(Script(dot=[Say("451 4.3.0 one"), Say("451 4.3.0 two"), OK]))
    queue_id = world.send(f"b@{world.domain(mx)}")
    assert "451 4.3.0 one" in world.reason(queue_id)
    world.site.run("mtad-flush", queue_id)
    await_value(lambda: len(world.site.files("deferred")) and "two" in world.reason(queue_id))
    world.site.run("mtad-flush", queue_id)
    mx.await_messages(1)
    await_gone(world, queue_id)
