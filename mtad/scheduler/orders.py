"""An administrator's orders to a scheduler at work: what it does with them, and when.

The scheduler has one thread, so a message is in one of these states, and stays in it while an order is looked at:

=====================================  ===============================================================================
nobody has it in hand                  done at once, on its file (`mtad.spool.orders`)
in hand, and nothing is under way      done at once; its jobs that wait in lanes are dropped as they come up
in hand, and a delivery is under way   *later*: written into its file, and done when that has ended
a delivery of an earlier scheduler     later, by `Scheduler.restore`, which finds the order in the file
a move that the disk refuses           later, when that has been made good
=====================================  ===============================================================================

Of two orders that wait the last one holds. An order for a message whose deliveries have settled all of its recipients is
void: it is done. An order that was answered with *done* stands in the spool, one with *later* does so, too, unless the disk
is full; then a scheduler that dies forgets it.

Errors: what the disk refuses at once is refused, and nothing has changed; what was promised for later is tried until the
disk lets it, see `mtad.scheduler.moves`.
"""

from __future__ import annotations

from collections.abc import Callable

from mtad.desk import Order, Ordered, OrderName
from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.progress import Instructed
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.files import Files
from mtad.scheduler.hand import Hand
from mtad.spool import orders
from mtad.spool.orders import Unfit
from mtad.spool.queues import Queue


class Orders:
    """The orders of one scheduler."""

    def __init__(self, hand: Hand, files: Files, resume: Callable[[str], None], take: Callable[[Queue, str], None]) -> None:
        """Everything is the scheduler's own.

        Args:
            hand: what it has in hand.
            files: reads and writes queue files.
            resume: reads a message of active that is not in hand, and goes on with it.
            take: claims one that is in another queue, and goes on with it.
        """
        self._spool = hand.spool
        self._events = hand.events
        self._moves = hand.moves
        self._files = files
        self._messages = hand.messages
        self._agenda = hand.agenda
        self._urgent = hand.urgent
        self._resume = resume
        self._take = take
        self._clock = hand.clock
        self._remembered: dict[str, OrderName] = {}

    def give(self, order: Order) -> Ordered:
        """Do what is ordered with these messages, or see to it that it is done."""
        return orders.collect(order.ids, lambda queue_id: self._one(order.what, queue_id))

    def remembered(self, queue_id: str) -> OrderName | None:
        """The order for a message that could not be taken in hand until now; it is told once."""
        return self._remembered.pop(queue_id, None)

    def carry_out(self, message: ActiveMessage) -> None:
        """Do what was ordered for a message in hand, of which nothing is under way any more."""
        what = message.order
        where: Queue | None = None
        unfit = ""
        assert what is not None

        def move() -> bool:
            nonlocal where, unfit
            try:
                where = self._execute(what, message)
            except FileNotFoundError:
                return False
            except Unfit as why:  # it was promised when nobody could read the message
                unfit = str(why)
                return False
            except (QueueFileDamaged, QueueFileUnfinished) as fault:
                self._let_go(message)
                self._files.misread(Queue.ACTIVE, message.id, fault)
                return False
            return True

        def moved(done: bool) -> None:
            self._let_go(message)
            if unfit:
                self._void(what, message.id, unfit)
            elif done:
                self._follow(what, where, message.id)

        self._moves.do(message.id, move, moved)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _one(self, what: OrderName, queue_id: str) -> orders.Answer:
        """What becomes of an order about one message; raises as `mtad.spool.orders`."""
        message = self._messages.get(queue_id)
        if message is not None:
            return self._in_hand(what, message)
        if queue_id in self._moves:
            self._remembered[queue_id] = what
            return "later"
        return orders.give(self._spool, what, queue_id, self._clock(), lambda where: self._follow(what, where, queue_id))

    def _in_hand(self, what: OrderName, message: ActiveMessage) -> orders.Answer:
        if not message.flying and message.id not in self._moves:
            where = self._execute(what, message)
            self._let_go(message)
            self._follow(what, where, message.id)
            return "done"
        if what == "release":
            if message.order != "hold" and not any(state.held for state in message.states):
                raise Unfit(orders.NOT_HELD)
            if message.unwritten:  # who is held must stand in the file before the order that ends it
                self._files.write_down(message)
        if what == "requeue" and message.order == "hold":
            raise Unfit(orders.HELD)
        try:
            orders.remember(self._spool, what, Queue.ACTIVE, message.id, self._clock())
        except OSError as fault:
            self._events.warning(f"{message.id}: cannot note the order to {what} it: {fault.strerror or fault}")
        message.order = "requeue" if what == "release" else what
        return "later"

    def _execute(self, what: OrderName, message: ActiveMessage) -> Queue | None:
        if message.unwritten:
            self._files.write_down(message)
        return orders.carry_out(self._spool, what, Queue.ACTIVE, message.id, self._clock())

    def _void(self, what: OrderName, queue_id: str, why: str) -> None:
        """Forget an order that cannot be carried out, and go on with the message."""
        self._events.warning(f"{queue_id}: cannot {what} it: {why}")
        try:
            self._spool.append(Queue.ACTIVE, queue_id, Instructed(self._clock(), what, done=True))
        except (OSError, QueueFileDamaged, QueueFileUnfinished):
            pass  # if it stands in the file the same is found, and said, once more
        self._moves.later(queue_id, lambda: self._resume(queue_id), why)

    def _let_go(self, message: ActiveMessage) -> None:
        if self._messages.get(message.id) is message:
            del self._messages[message.id]

    def _follow(self, what: OrderName, where: Queue | None, queue_id: str) -> None:
        """An order has been carried out on the file, which is there now, and in nobody's hands."""
        self._events.ordered(queue_id, what)
        if what in ("release", "requeue"):
            self._urgent.add(queue_id)
        match where:
            case Queue.INCOMING:
                self._take(where, queue_id)
            case Queue.ACTIVE:
                self._resume(queue_id)
            case Queue.DEFERRED:
                self._agenda.set(queue_id, self._clock())
            case _:
                self._agenda.drop(queue_id)
                if where is None:
                    self._events.removed(queue_id)
