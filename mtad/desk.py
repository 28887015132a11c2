"""What is asked of the scheduler at its desk, and what it answers: one question, one answer, a packet each.

The queue files say what happened; why something does *not* happen now only the scheduler knows: who is in delivery, which
lane is full, suspended or slowed down, which moves the disk refuses. `mtaq why`, `mtaq watch` and `mtad status` ask that.
Orders (`mtaq hold` and its kin) go the same way, because a message that is in work belongs to the scheduler.

All times are seconds since the epoch, whatever clock the scheduler measures with. Errors: `ask` answers None when there is
no scheduler, or none that answers in time.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

#: Name of the desk's socket in the spool.
DESK_SOCKET: Final = "desk.sock"

#: Queue ids in one order, and in one question about messages, whose answer is longer.
MOST_ORDERED: Final = 500
MOST_ASKED: Final = 50

OrderName = Literal["hold", "release", "delete", "requeue", "expire", "bounce"]


class AskMessages(msgspec.Struct, frozen=True, tag="messages"):
    """Where are these messages? Answered by `Messages`."""

    ids: tuple[str, ...]


class AskLanes(msgspec.Struct, frozen=True, tag="lanes"):
    """How are the lanes? Answered by `Lanes`: the busiest ``most``, and sums over all.

    With ``destinations`` only the lanes to these are told, as far as there are any.
    """

    most: int = 100
    destinations: tuple[str, ...] = ()


class Order(msgspec.Struct, frozen=True, tag="order"):
    """Do this with these messages. Answered by `Ordered`."""

    what: OrderName
    ids: tuple[str, ...]


Question = AskMessages | AskLanes | Order


class LaneView(msgspec.Struct, frozen=True, omit_defaults=True):
    """One lane: a destination, and how far it is open."""

    transport: str
    destination: str
    waiting: int
    """Jobs (a message, or some recipients of one) that wait for their turn."""
    in_flight: int
    window: int
    """How many jobs may be in flight now; 0 when it is suspended."""
    limit: int
    """How many may at most, by setting."""
    group: str = ""
    """The policy whose limits this lane shares with others, by the ``mx`` it has; "" when there is none.

    In the view of a job that waits: it waits for what is shared, and ``in_flight``, ``window`` and ``limit`` are of all."""
    suspended_since: float = 0.0
    """0: it is not."""
    suspended_until: float = 0.0
    """When the next attempt is a probe."""
    reason: str = ""
    """What suspended it, or made its window smaller, last."""
    reply: str = ""
    """What the server said then, word for word; "" when it said nothing."""
    rate: str = ""
    """The limit of its rate, as the configuration has it (``100/1m``); "" for none."""
    next_start: float = 0.0
    """When the rate lets the next job start; 0: now."""
    ipv4_until: float = 0.0
    """Until when only IPv4 is used, because the other side does not like our IPv6 address; 0: both."""
    done: int = 0
    """Jobs ended since the lane is known."""
    oldest: float = 0.0
    """When the job that has waited the longest began to; 0: none waits."""


class JobView(msgspec.Struct, frozen=True, omit_defaults=True):
    """Some recipients of a message, on their way to one destination."""

    recipients: tuple[int, ...]
    lane: LaneView
    state: Literal["delivering", "waiting"]
    since: float
    """When the delivery, or the wait, began."""
    pid: int = 0
    """Of the delivery process."""
    ahead: int = 0
    """Jobs of the lane that come before this one, for one that waits."""
    blocked: Literal["", "concurrency", "rate", "processes"] = ""
    """What a job that waits waits for: the lane's window, its rate, or a free delivery process."""


class MessageView(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message as the scheduler knows it."""

    id: str
    known: bool
    """False: it is in no table here; the queue files tell the rest."""
    jobs: tuple[JobView, ...] = ()
    due: float = 0.0
    """When a deferred message is taken up again; 0: not on the agenda."""
    stuck: str = ""
    """What the disk refuses to do with it, in words; "" when nothing is refused."""
    ordered: str = ""
    """The order that is carried out when its deliveries have ended; "" for none."""


class Messages(msgspec.Struct, frozen=True, tag="messages"):
    """The answer to `AskMessages`, in the order of the question."""

    messages: tuple[MessageView, ...]


class Lanes(msgspec.Struct, frozen=True, omit_defaults=True, tag="lanes"):
    """The answer to `AskLanes`."""

    lanes: tuple[LaneView, ...]
    count: int
    """Lanes in all."""
    suspended: int
    active: int
    """Messages in hand."""
    waiting: int
    """Jobs that wait in lanes."""
    in_flight: int
    deferred: int
    """Messages on the agenda."""
    processes: tuple[int, ...] = ()
    """Process ids of the delivery processes."""
    delivered: int = 0
    """Recipients delivered, deferred and failed since the scheduler started, at ``started``."""
    deferrals: int = 0
    failed: int = 0
    started: float = 0.0


class Ordered(msgspec.Struct, frozen=True, omit_defaults=True, tag="ordered"):
    """The answer to `Order`: ids by what became of them."""

    done: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    """In delivery at this moment: it is done when that has ended, if the message is still there then."""
    missing: tuple[str, ...] = ()
    """No such message (any more)."""
    refused: tuple[tuple[str, str], ...] = ()
    """Messages with which this cannot be done, each with the reason in words."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The question was none."""

    why: str


Answer = Messages | Lanes | Ordered | Refused

question_decoder: Final = msgspec.json.Decoder(Question)
answer_decoder: Final = msgspec.json.Decoder(Answer)
encoder: Final = msgspec.json.Encoder()
