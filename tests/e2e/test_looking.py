"""Looking (issue 2): `mtaq`, `mtaq --json`, `mtad-flush`, with the daemon up and down, and with very many messages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mtad.envelope import Envelope, Recipient
from mtad.outcome import Attempt, Deferred
from mtad.spool.queue_file import encode_envelope, encode_event, encode_preamble
from mtad.spool.queue_id import encode
from mtad.spool.queues import Queue, Spool
from tests.e2e.world import MESSAGE, World
from tests.peers.mx import HANG, Say, Script
from tests.site import Site, await_value

#: How many messages are "very many" here; the real thing with MTAD_TEST_MESSAGES=100000.
MANY = int(os.environ.get("MTAD_TEST_MESSAGES", "20000"))
MIB = 1024 * 1024


# -- what is in the queue ---------------------------------------------------------------------------------------------


def test_mtaq_shows_what_is_where(tmp_path: Path) -> None:
    """`mtaq` prints the queue as Postfix's `mailq` does (same columns and marks)"""
    with World(tmp_path, processes={"stop_timeout": "100ms"}) as world:
        active = world.send(f"a@{world.domain(world.mx(Script(mail=HANG)))}")
        busy = world.mx(Script(rcpt=Say("450 4.2.1 Mailbox busy")))
        domain = world.domain(busy)
        deferred = world.send(f"b@{domain}", f"c@{domain}")
        world.site.await_deferred(deferred)
        held = world.place(Queue.HOLD, "d@held.test", sender="")
        text = world.site.run("mtaq").stdout
        world.site.stop()
        down = world.site.run("mtaq").stdout
    date = r"\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d"
    reason = re.escape(f"(host mx1.{domain}[{busy.address}] said: 450 4.2.1 Mailbox busy (in reply to RCPT TO command))")
    assert re.fullmatch(
        rf"----Queue ID----- --Size-- ---Arrival Time---- --Sender/Recipient------\n"
        rf"{active}\*  +\d+ {date} alice@example.org\n {{47}}a@d\d+\.test\n\n"
        rf"{deferred}   +\d+ {date} alice@example.org\n *{reason}\n {{47}}b@{domain}\n {{47}}c@{domain}\n\n"
        rf"{held}!  +\d+ {date} MAILER-DAEMON\n {{47}}d@held\.test\n\n"
        rf"-- 0 Kbytes in 3 Requests\.\n",
        text,
    )
    assert down == text, "it works with the daemon down"


def test_mtaq_json_has_postqueues_names(tmp_path: Path) -> None:
    """`mtaq --json` one JSON object a line with the names of `postqueue -j`"""
    with World(tmp_path) as world:
        domain = world.domain(world.address())
        before = int(time.time())
        queue_id = world.send(f"b@{domain}")
        row = world.site.await_deferred(queue_id)
    assert list(row)[:7] == [
        "queue_name", "queue_id", "arrival_time", "message_size", "forced_expire", "sender", "recipients"
    ]  # fmt: skip
    assert (row["queue_name"], row["queue_id"], row["sender"]) == ("deferred", queue_id, "alice@example.org")
    assert before <= row["arrival_time"] <= time.time()
    assert row["message_size"] > len(MESSAGE)
    [recipient] = row["recipients"]
    assert recipient["address"] == f"b@{domain}"
    assert "Connection refused" in recipient["delay_reason"]
    assert before + 299 <= row["next_attempt"] <= before + 340


def test_an_empty_queue(tmp_path: Path) -> None:
    """The output of mailq, for an empty queue as well"""
    with Site(tmp_path) as site:
        assert site.run("mtaq").stdout == "Mail queue is empty\n"
        run = site.run("mtaq", "--json")
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


# -- flushing ---------------------------------------------------------------------------------------------------------


class Waiting(NamedTuple):
    """A world with three deferred messages for two domains whose servers listen again."""

    world: World
    ids: dict[str, str]
    taken: Any


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Waiting]:
    with World(tmp_path) as world:
        mx = world.mx(Script(mail=Say("451 4.3.0 later")))
        one, other = world.domain(mx, name="one.test"), world.domain(mx, name="other.test")
        ids = {name: world.send(name) for name in (f"a@{one}", f"b@{one}", f"c@{other}")}
        await_value(lambda: len(world.site.files("deferred")) == 3)
        mx.script = Script()

        def taken() -> set[str]:
            return {name for message in mx.messages for name in message.recipients}

        yield Waiting(world, ids, taken)


def test_a_flush_of_all(waiting: Waiting) -> None:
    """`mtad-flush` (all [...])"""
    run = waiting.world.site.run("mtad-flush")
    assert (run.returncode, run.stdout) == (0, "3 messages: tried now\n")
    await_value(lambda: waiting.taken() == set(waiting.ids))
    waiting.world.site.await_empty_queue()


def test_a_flush_of_some(waiting: Waiting) -> None:
    """`mtad-flush` ([...] queue ids [...])"""
    site = waiting.world.site
    run = site.run("mtad-flush", waiting.ids["b@one.test"], waiting.ids["c@other.test"])
    assert (run.returncode, run.stdout) == (0, "2 messages: tried now\n")
    await_value(lambda: waiting.taken() == {"b@one.test", "c@other.test"})
    assert site.files("deferred") == [waiting.ids["a@one.test"]]


def test_a_flush_of_a_domain(waiting: Waiting) -> None:
    """`mtad-flush` ([...] `--domain`)"""
    run = waiting.world.site.run("mtad-flush", "--domain", "one.test")
    assert (run.returncode, run.stdout) == (0, "2 messages: tried now\n")
    await_value(lambda: waiting.taken() == {"a@one.test", "b@one.test"})


def test_a_flush_of_what_is_not_there(waiting: Waiting) -> None:
    """exit 0 fine, 1 failed"""
    run = waiting.world.site.run("mtad-flush", "4SVLCh0001z7", waiting.ids["a@one.test"])
    assert run.returncode == 1
    assert run.stdout == "1 message: tried now\n"
    assert run.stderr == "mtad: 4SVLCh0001z7: not in the deferred queue\n"
    await_value(lambda: waiting.taken() == {"a@one.test"})


def test_a_flush_while_the_daemon_is_down(waiting: Waiting) -> None:
    """they work with the daemon down, and say so when a flush will take effect at its start"""
    site = waiting.world.site
    site.stop()
    run = site.run("mtad-flush", "--domain", "one.test")
    assert (run.returncode, run.stdout) == (0, "2 messages: mtad is not running: tried when it starts\n")
    site.start()
    await_value(lambda: waiting.taken() == {"a@one.test", "b@one.test"})
    assert site.files("deferred") == [waiting.ids["c@other.test"]]


# -- very many messages -----------------------------------------------------------------------------------------------


def fill(directory: Path, count: int, due: float) -> None:
    """Put as many deferred messages into a queue, with a reason each, as fast as files can be made."""
    content = b"Subject: x\r\n\r\nhello\r\n"
    crc = zlib.crc32(content)
    outcome = Deferred("4.4.1", "connect to mx.far.test[192.0.2.1]:25: Connection timed out", "mx.far.test")
    now = time.time()
    event = encode_event(Attempt(now, ((0, outcome),)))
    for number in range(count):
        queue_id = encode(int(now) * 1_000_000 + number, 7)
        to = (Recipient(f"user{number}@{'far' if number % 10 else 'near'}.test"),)
        head = encode_envelope(Envelope(queue_id, now, "a@sender.test", to))
        path = directory / queue_id
        path.write_bytes(encode_preamble(head, len(content), crc) + head + b"\n" + content + event)
        os.utime(path, (due, due))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site that does not run, with very many deferred messages."""
    site = Site(tmp_path_factory.mktemp("many"), processes={"stop_timeout": "1s"})
    Spool(str(site.spool_path), create=True).close()
    fill(site.spool_path / "deferred", MANY, time.time() + 86400)
    return site


class Run(NamedTuple):
    """How a command went: lines, seconds to the first one and to the end, the most memory in octets."""

    lines: int
    last: str
    first: float
    total: float
    memory: int


def measure(site: Site, *command: str) -> Run:
    begin = time.monotonic()
    path = Path(site._command(command[0])[0])
    with open(site.root / "stderr", "wb") as errors:
        process = subprocess.Popen(
            [path, *command[1:]], stdout=subprocess.PIPE, stderr=errors, env=site.environment(), text=True
        )
    assert process.stdout is not None
    last, lines, first = "", 0, 0.0
    for line in process.stdout:
        first = first or time.monotonic() - begin
        last, lines = line, lines + 1
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (site.root / "stderr").read_text()
    return Run(lines, last, first, time.monotonic() - begin, usage.ru_maxrss * 1024)


def test_the_table_streams(many: Site, tmp_path: Path) -> None:
    """All output of all commands is right with a hundred thousand messages and streams instead of collecting."""
    few = Site(tmp_path)
    Spool(str(few.spool_path), create=True).close()
    fill(few.spool_path / "deferred", 10, time.time())
    small, big = measure(few, "mtaq"), measure(many, "mtaq")
    assert big.lines == 1 + 4 * MANY + 1
    assert big.last == f"-- {MANY * 21 // 1024} Kbytes in {MANY} Requests.\n"
    assert big.first < big.total / 2, "the first lines come at once"
    assert big.memory - small.memory < 4 * MIB, "and memory stays as it is"


def test_the_objects_stream(many: Site) -> None:
    """All output of all commands is right with a hundred thousand messages and streams instead of collecting."""
    run = measure(many, "mtaq", "--json")
    assert run.lines == MANY
    assert json.loads(run.last)["queue_name"] == "deferred"
    assert run.first < run.total / 2


@pytest.mark.parametrize("options", ["", "--json"])
def test_a_reader_may_stop_at_the_first_line(many: Site, options: str) -> None:
    """`mtaq | head -1` ends quietly, and soon"""
    begin = time.monotonic()
    program = many._command("mtaq")[0]
    run = subprocess.run(
        ["bash", "-c", f"{program} {options} | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
        env=many.environment(),
        timeout=60,
    )
    first, status = run.stdout.splitlines()
    assert first.startswith(("----Queue ID", '{"queue_name":"deferred"'))
    assert (status, run.stderr) == ("0", "")
    assert time.monotonic() - begin < 10


def test_a_server_with_very_many_messages(many: Site) -> None:
    """Cost stays flat with 100,000 deferred messages: it starts, delivers, flushes and stops as ever"""
    begin = time.monotonic()
    many.start()
    try:
        started = time.monotonic() - begin
        many.send("a@sender.test", "alice@example.org", MESSAGE)
        many.await_mail("alice")
        assert time.monotonic() - begin - started < 10
        run = measure(many, "mtad-flush", "--domain", "near.test")
        assert run.last == f"{MANY // 10} messages: tried now\n"
        # There is no DNS: they are tried, and wait again.
        await_value(lambda: "status=deferred" in many.log())
        many.send("a@sender.test", "bob@example.org", MESSAGE)
        many.await_mail("bob")
    finally:
        many.stop()
    spool = many.spool()
    total = sum(spool.count(queue) for queue in (Queue.ACTIVE, Queue.DEFERRED))
    assert total == MANY
    assert spool.count(Queue.CORRUPT) == 0
    spool.close()
