"""mtad-flush: which messages are due now, whom it tells, and what it says about it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mtad.cli.mtad_flush import flush, main, waiting_for
from mtad.envelope import Envelope, Recipient
from mtad.net.channels import Mailslot
from mtad.outcome import Attempt, Deferred, Delivered
from mtad.spool.queue_id import encode
from mtad.spool.queues import MAILSLOT, Queue, Spool

FUTURE = 2_000_000_000.0


class Stock:
    """A spool, its messages, and a configuration that names it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spool = Spool(str(root / "spool"), create=True)
        self.config = root / "mtad.toml"
        self.config.write_text(f'hostname = "mx.example.org"\nspool = "{root}/spool"\n')
        self._ids = 0

    def put(self, *recipients: str, queue: Queue = Queue.DEFERRED, delivered: int = 0) -> str:
        """A message that is due far in the future, the first ``delivered`` recipients done; its queue id."""
        self._ids += 1
        queue_id = encode(1_700_000_000_000_000 + self._ids, 7)
        names = recipients or ("b@far.test",)
        incoming = self.spool.enter(Envelope(queue_id, 1_700_000_000, "a@x.test", tuple(map(Recipient, names))))
        incoming.write(b"x")
        incoming.commit()
        path = self.root / "spool" / queue.value / queue_id
        os.rename(self.root / "spool" / "incoming" / queue_id, path)
        outcomes = tuple(
            (index, Delivered("2.0.0", "sent") if index < delivered else Deferred("4.2.0", "busy"))
            for index in range(len(names))
        )
        self.spool.append(queue, queue_id, Attempt(1.0, outcomes))
        os.utime(path, (FUTURE, FUTURE))
        return queue_id

    def due(self) -> set[str]:
        """The deferred messages that are due."""
        return {name for name, mtime in self.spool.times(Queue.DEFERRED) if mtime <= time.time()}

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["-c", str(self.config), *arguments])


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stock]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    stock = Stock(tmp_path)
    yield stock
    stock.spool.close()


@pytest.fixture
def slot(stock: Stock) -> Iterator[Mailslot]:
    """A scheduler that listens, as far as a command can tell."""
    lock = stock.spool.lock()
    slot = Mailslot(str(stock.root / "spool" / MAILSLOT))
    yield slot
    slot.close()
    os.close(lock)


def told(slot: Mailslot) -> list[str]:
    """The queue ids of all requests so far."""
    ids: list[str] = []
    while (request := slot.receive()) is not None:
        ids += json.loads(request)["flush"]
    return ids


DOWN = "mtad is not running: tried when it starts"


def test_all_messages_while_the_daemon_is_down(stock: Stock) -> None:
    ids = {stock.put() for _ in range(3)}
    run = stock.run()
    assert (run.exit_code, run.stdout) == (0, f"3 messages: {DOWN}\n")
    assert stock.due() == ids


def test_those_named(stock: Stock) -> None:
    wanted, _ = stock.put(), stock.put()
    run = stock.run(wanted)
    assert (run.exit_code, run.stdout) == (0, f"1 message: {DOWN}\n")
    assert stock.due() == {wanted}


def test_those_for_a_domain(stock: Stock) -> None:
    wanted = {stock.put("b@far.test"), stock.put("c@x.test", "d@FAR.test")}
    stock.put("b@other.test")
    stock.put("b@notfar.test")
    stock.put("b@far.test", "c@x.test", delivered=1)  # what it has for this domain is done
    run = stock.run("--domain", "Far.Test.")
    assert (run.exit_code, run.stdout) == (0, f"2 messages: {DOWN}\n")
    assert stock.due() == wanted


def test_a_domain_is_given_with_an_at_sign_or_without(stock: Stock) -> None:
    stock.put("b@far.test")
    assert stock.run("--domain", "@far.test").output.startswith("1 message: ")


@pytest.mark.parametrize("domain", ["", "@", " "])
def test_an_empty_domain_does_not_flush_everything(stock: Stock, domain: str) -> None:
    stock.put("b@far.test")
    run = stock.run("--domain", domain)
    assert (run.exit_code, "--domain is empty" in run.output) == (2, True)


def test_the_scheduler_is_told(stock: Stock, slot: Mailslot) -> None:
    ids = {stock.put() for _ in range(3)}
    assert stock.run().stdout == "3 messages: tried now\n"
    assert set(told(slot)) == ids


def test_a_scheduler_that_does_not_listen_is_no_reason_to_claim_what_is_not_so(
    stock: Stock, slot: Mailslot, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot.close()
    queue_id = stock.put()
    run = stock.run()
    assert run.stdout == "1 message: the scheduler does not answer: tried within five minutes\n"
    assert stock.due() == {queue_id}


def test_many_messages_go_in_several_requests(stock: Stock, slot: Mailslot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtad.cli.mtad_flush._BATCH", 2)
    ids = [stock.put() for _ in range(5)]
    done = flush(stock.spool, iter(ids))
    assert (done.count, done.missing, done.told) == (5, (), True)
    assert told(slot) == ids


@pytest.mark.parametrize(
    "name",
    ["4SVLCh0001z7", "nonsense", "../active/4SVLCh0001z7", "a\0b", "ü", "x" * 300, ".", ""],
    ids=["unknown", "no id", "another queue", "NUL", "not ASCII", "too long", "dot", "empty"],
)
def test_what_is_not_deferred_is_named_and_fails(stock: Stock, name: str) -> None:
    active = stock.put(queue=Queue.ACTIVE)
    assert active == "4SVLCh0001z7"
    known = stock.put()
    run = stock.run(known, name)
    assert run.exit_code == 1
    assert run.stdout == f"1 message: {DOWN}\n"
    assert run.stderr == f"mtad: {name}: not in the deferred queue\n"
    assert stock.due() == {known}
    path = stock.root / "spool" / "active" / active
    assert path.stat().st_mtime == FUTURE, "a message of another queue is not touched"


def test_nothing_but_an_unknown_id(stock: Stock) -> None:
    run = stock.run("4SVLCh0001z7")
    assert (run.exit_code, run.stdout) == (1, "")
    assert run.stderr == "mtad: 4SVLCh0001z7: not in the deferred queue\n"


def test_an_empty_queue(stock: Stock) -> None:
    assert stock.run().stdout == "no deferred messages\n"
    run = stock.run("--domain", "far.test")
    assert (run.exit_code, run.stdout) == (0, "no deferred messages for far.test\n")


def test_ids_and_a_domain_exclude_each_other(stock: Stock) -> None:
    run = stock.run("--domain", "far.test", "4SVLCh0001z7")
    assert run.exit_code == 2
    assert "not both" in run.stderr


def test_files_that_cannot_be_read_are_passed_over(stock: Stock) -> None:
    good, bad, gone = stock.put(), stock.put(), stock.put()
    (stock.root / "spool" / "deferred" / bad).write_bytes(b"garbage")
    (stock.root / "spool" / "deferred" / gone).write_bytes(b"")
    assert list(waiting_for(stock.spool, "far.test")) == [good]


def test_a_wrong_configuration(tmp_path: Path) -> None:
    path = tmp_path / "mtad.toml"
    path.write_text("nonsense = 1\n")
    run = CliRunner().invoke(main, ["-c", str(path)])
    assert run.exit_code == 78
    assert "nonsense" in run.stderr
