"""mtaq's orders: which messages filters choose, whom the command asks, what it says, and its exit codes."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mtad.cli import queue_orders
from mtad.cli.mtaq import main
from mtad.cli.queue_orders import Giver, execute
from mtad.desk import DESK_SOCKET, Answer, Order, Ordered, OrderName, Refused, encoder, question_decoder
from mtad.errors import MtadError
from mtad.net.desk import Desk
from mtad.progress import Doubt, Named
from mtad.spool import orders
from mtad.spool.queues import SCHEDULER_LOCK as LOCK
from mtad.spool.queues import Queue, Spool
from tests.unit.orders_aid import BUSY, GONE, NOW, Stock


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stock]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    stock = Stock(tmp_path)
    yield stock
    stock.spool.close()


class Scheduler:
    """Somebody who has the spool and answers at the desk, after some questions that he does not answer."""

    def __init__(self, stock: Stock, answer: Callable[[Order], Answer]) -> None:
        self.asked: list[Order] = []
        self._answer = answer
        self._lock = stock.spool.lock()
        self._desk = Desk(str(stock.root / "spool" / DESK_SOCKET))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(0.002):
            self._desk.serve(self._reply)

    def _reply(self, data: bytes) -> bytes:
        question = question_decoder.decode(data)
        assert isinstance(question, Order)
        self.asked.append(question)
        return encoder.encode(self._answer(question))

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self._desk.close()
        os.close(self._lock)


@pytest.fixture
def willing(stock: Stock) -> Iterator[Scheduler]:
    """Says done to everything and does nothing."""
    scheduler = Scheduler(stock, lambda order: Ordered(done=order.ids))
    yield scheduler
    scheduler.close()


# -- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["hold", "release", "delete", "requeue", "expire", "bounce"])
def test_all_must_be_asked_for(stock: Stock, what: str) -> None:
    queue_id = stock.put(queue=Queue.HOLD if what == "release" else Queue.DEFERRED)
    before = stock.where(queue_id)
    run = stock.run(what)
    assert run.exit_code == 2
    assert "which messages?" in run.stderr
    assert stock.run(what, queue_id, "--all").exit_code == 2
    assert stock.where(queue_id) == before
    assert stock.json(what, "--all")["done"] == [queue_id]


@pytest.mark.parametrize("arguments", [("--older-than", "soon"), ("--older-than", "5"), ("--sender", ""), ("--nonsense",)])
def test_usage(stock: Stock, arguments: tuple[str, ...]) -> None:
    queue_id = stock.put()
    assert stock.run("delete", *arguments).exit_code == 2
    assert stock.where(queue_id) == ["deferred"]


def test_the_configuration_may_be_named_before_or_after(stock: Stock) -> None:
    for place in (0, 1):
        queue_id = stock.put()
        words = ["delete", queue_id]
        words[place:place] = ["-c", str(stock.config)]
        assert CliRunner().invoke(main, words).stdout == "deleted 1 message\n"
    assert CliRunner().invoke(main, ["-c", str(stock.root / "nothing"), "delete", "x"]).exit_code == 78
    assert "after the command" in CliRunner().invoke(main, ["--json", "delete", "x"]).stderr


# -- without a scheduler ----------------------------------------------------------------------------------------------


def test_it_is_done_under_the_lock_of_the_scheduler(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    holders: list[int | None] = []

    def give(spool: Spool, *arguments: Any) -> Any:
        holders.append(spool.holder(LOCK))
        return orders.give(spool, *arguments)

    monkeypatch.setattr(queue_orders, "give", give)
    queue_id = stock.put()
    assert stock.run("requeue", queue_id).stdout == "requeued 1 message; mtad is not running: tried when it starts\n"
    assert holders == [os.getpid()]
    assert stock.spool.holder(LOCK) is None
    assert stock.path(Queue.DEFERRED, queue_id).stat().st_mtime == pytest.approx(time.time(), abs=60)


def test_what_is_missing_or_refused_is_said_and_fails(stock: Stock) -> None:
    good, held = stock.put(), stock.put(queue=Queue.HOLD)
    run = stock.run("requeue", good, held, "4jYZxd5Snjz5fB", "../../etc/passwd", good)
    assert run.exit_code == 1
    assert run.stdout == "requeued 1 message; mtad is not running: tried when it starts\n"
    assert run.stderr.splitlines() == [
        f"mtad: {held}: it is on hold; mtaq release tries it now",
        "mtad: ../../etc/passwd: no such message",
        "mtad: 4jYZxd5Snjz5fB: no such message",
    ]
    answer = stock.json("requeue", good, held, "nothing", code=1)
    assert answer == {
        "order": "requeue",
        "running": False,
        "done": [good],
        "later": [],
        "missing": ["nothing"],
        "refused": {held: "it is on hold; mtaq release tries it now"},
    }


def test_filters_choose_only_what_an_order_is_for(stock: Stock) -> None:
    held, deferred = stock.put(queue=Queue.HOLD), stock.put()
    notice = stock.put(queue=Queue.HOLD, kind="double-bounce", sender="")
    assert stock.json("requeue", "--all")["done"] == [deferred]
    assert stock.json("hold", "--domain", "y.test")["done"] == [deferred]
    assert set(stock.json("expire", "--all")["done"]) == {held, deferred}
    assert stock.json("bounce", notice, code=1)["missing"] == []
    assert stock.json("release", "--all")["done"] == [notice]
    assert set(stock.json("delete", "--all")["done"]) == {held, deferred, notice}
    assert stock.run("delete", "--all").stdout == "no messages\n"


def test_a_release_of_all_finds_those_that_are_held_in_doubt(stock: Stock) -> None:
    held, partly, other = stock.put(queue=Queue.HOLD), stock.put(), stock.put()
    for event in (Doubt(1.0, (0,), "mx"), Named(2.0, (0,), hold=True)):
        stock.spool.append(Queue.DEFERRED, partly, event)
    assert stock.json("release", partly, other, code=1)["refused"] == {other: "it is not on hold"}
    assert not stock.spool.load(Queue.DEFERRED, partly).states[0].held
    stock.spool.append(Queue.DEFERRED, partly, Doubt(3.0, (0,), "mx"))
    stock.spool.append(Queue.DEFERRED, partly, Named(4.0, (0,), hold=True))
    assert set(stock.json("release", "--all")["done"]) == {held, partly}
    assert stock.json("release", "--all")["done"] == []


def test_ids_with_filters_are_those_that_fit(stock: Stock) -> None:
    one, other, third = stock.put("b@y.test"), stock.put("b@z.test"), stock.put("b@y.test")
    assert stock.json("delete", one, other, "../x", "--domain", "y.test")["done"] == [one]
    assert stock.where(third) == ["deferred"]


def test_ids_from_standard_input(stock: Stock) -> None:
    ids = [stock.put() for _ in range(3)]
    run = stock.run("delete", "-", input=f"{ids[0]}\n{ids[1]}\n\n")
    assert (run.exit_code, run.stdout) == (0, "deleted 2 messages\n")
    assert stock.where(ids[2]) == ["deferred"]
    assert stock.run("delete", "-", input="").stdout == "no messages\n"
    run = stock.run("delete", "-", "--json", input=b"\0\x1b[2J \xc3\xa9")
    assert json.loads(run.stdout)["missing"] == ["\\x00\\x1b[2J", "é"]
    assert "\x1b" not in run.output


def test_octets_that_are_no_text_are_no_queue_id(stock: Stock) -> None:
    run = stock.run("delete", "\udcff\udcfe")
    assert (run.exit_code, run.stderr) == (1, "mtad: \\udcff\\udcfe: no such message\n")


def test_more_messages_than_one_order_has(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_orders, "_BATCH", 2)
    ids = [stock.put() for _ in range(5)]
    assert stock.json("hold", *ids)["done"] == ids


# -- with a scheduler -------------------------------------------------------------------------------------------------


def test_a_scheduler_is_asked_and_nothing_is_touched(stock: Stock, willing: Scheduler) -> None:
    queue_id = stock.put()
    assert stock.run("delete", queue_id).stdout == "deleted 1 message\n"
    assert willing.asked == [Order("delete", (queue_id,))]
    assert stock.where(queue_id) == ["deferred"]


def test_what_is_done_later_is_said(stock: Stock) -> None:
    queue_id = stock.put()
    scheduler = Scheduler(stock, lambda order: Ordered(later=order.ids))
    run = stock.run("bounce", queue_id)
    scheduler.close()
    said = "1 message in delivery: returned when that has ended, if anything is left\n"
    assert (run.exit_code, run.stdout) == (0, said)


def test_a_message_that_moves_on_meanwhile_is_asked_about_again(stock: Stock) -> None:
    queue_id = stock.put()
    answers = iter([Ordered(missing=(queue_id, GONE)), Ordered(missing=(queue_id,)), Ordered(done=(queue_id,))])
    scheduler = Scheduler(stock, lambda _order: next(answers))
    answer = stock.json("hold", queue_id, GONE, code=1)
    scheduler.close()
    assert (answer["done"], answer["missing"]) == ([queue_id], [GONE])
    assert [order.ids for order in scheduler.asked] == [(queue_id, GONE), (queue_id,), (queue_id,)]


def test_a_scheduler_that_does_not_answer(stock: Stock) -> None:
    queue_id = stock.put()
    lock = stock.spool.lock()
    with pytest.raises(MtadError, match=f"does not answer, and .* is in use by process {os.getpid()}"):
        execute(Giver(stock.spool, patience=0.1), "delete", [queue_id])
    os.close(lock)
    assert stock.where(queue_id) == ["deferred"]


def test_an_order_is_given_once_and_waited_for(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow scheduler would carry out each that it finds, and say of the second that there is no such message."""
    given: list[float] = []

    def ask(_path: str, _order: object, timeout: float) -> None:
        given.append(timeout)
        time.sleep(timeout)

    monkeypatch.setattr(queue_orders, "ask", ask)
    lock = stock.spool.lock()
    with pytest.raises(MtadError, match="does not answer"):
        execute(Giver(stock.spool, patience=0.5), "delete", [stock.put()])
    os.close(lock)
    assert 0.4 < given[0] <= 0.5
    assert len(given) == 1


def test_a_scheduler_that_does_not_take_the_order(stock: Stock) -> None:
    queue_id = stock.put()
    scheduler = Scheduler(stock, lambda _order: Refused("too many"))
    run = stock.run("delete", queue_id)
    scheduler.close()
    assert (run.exit_code, run.stderr) == (1, "mtad: the scheduler does not take the order: too many\n")
    assert stock.where(queue_id) == ["deferred"]


def test_when_the_scheduler_ends_meanwhile_the_command_does_it_itself(stock: Stock) -> None:
    queue_id = stock.put()
    lock = stock.spool.lock()
    threading.Timer(0.1, os.close, (lock,)).start()
    report = execute(Giver(stock.spool), "hold", [queue_id])
    assert (report.done, report.running) == ([queue_id], False)
    assert stock.where(queue_id) == ["hold"]


# -- the question -----------------------------------------------------------------------------------------------------


def asked(stock: Stock, monkeypatch: pytest.MonkeyPatch, answer: str, what: OrderName, *words: str) -> Result:
    monkeypatch.setattr(queue_orders, "on_terminal", lambda: True)
    return stock.run(what, *words, input=answer)


def test_the_question_shows_the_first_few(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)
    ids = [stock.put("b@y.test", "c@y.test", outcomes=(BUSY,)), stock.put(queue=Queue.HOLD, sender="")]
    ids += [stock.put() for _ in range(5)]
    run = asked(stock, monkeypatch, "n\n", "delete", "--all")
    assert run.exit_code == 1
    assert "delete 7 messages? [y/N]" in run.stderr
    assert "... and 2 more\n" in run.stderr
    assert run.stderr.endswith("mtad: nothing was done\n")
    assert all(stock.where(queue_id) for queue_id in ids)
    run = asked(stock, monkeypatch, "n\n", "delete", *ids[:2], "--older-than", "1s")
    assert f"{ids[0]}  1m  <a@x.test> to <b@y.test> and 1 more ({BUSY.text})\n" in run.stderr
    assert f"{ids[1]}  1m, on hold  <> to <b@y.test>\n" in run.stderr
    assert "delete 2 messages?" in run.stderr


def test_yes_and_no_and_nothing(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    queue_id = stock.put()
    for answer in ("n\n", "\n", ""):
        assert asked(stock, monkeypatch, answer, "delete", "--all").exit_code == 1
        assert stock.where(queue_id) == ["deferred"]
    assert asked(stock, monkeypatch, "", "hold", "--all", "--yes").exit_code == 0
    assert stock.where(queue_id) == ["hold"]
    run = asked(stock, monkeypatch, "y\n", "delete", "--all", "--json")
    assert json.loads(run.stdout)["done"] == [queue_id]
    assert asked(stock, monkeypatch, "", "delete", "--domain", "y.test").stdout == "no messages fit\n"


def test_named_messages_are_not_asked_about(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    queue_id = stock.put()
    assert asked(stock, monkeypatch, "", "delete", queue_id).stdout == "deleted 1 message\n"
