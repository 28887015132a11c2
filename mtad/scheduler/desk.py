"""The scheduler's side of its desk: what commands ask and order (`mtad.desk`), answered out of the scheduler's tables.

To answer a question, the messages that are asked about and the lanes are looked at, and never a queue file. The scheduler's
pauses are measured by a clock of its own and are told in seconds since the epoch.

Errors: a question that is none is answered by `Refused`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from mtad.desk import (
    MOST_ASKED,
    MOST_ORDERED,
    Answer,
    AskLanes,
    AskMessages,
    JobView,
    Lanes,
    Messages,
    MessageView,
    Order,
    Refused,
    encoder,
    question_decoder,
)
from mtad.outcome import Deferred, Delivered, Failed, Outcome
from mtad.scheduler import lanes as lanes_of
from mtad.scheduler.hand import Hand
from mtad.scheduler.lane import Lane, LaneKey
from mtad.scheduler.line import LaneJob
from mtad.scheduler.orders import Orders
from mtad.scheduler.views import view_delivering, view_lanes, view_waiting


class Processes(Protocol):
    """What is asked about the delivery processes."""

    def pids(self) -> list[int]:
        """Their process ids."""

    def pid_of(self, number: int) -> int:
        """That of the one that has the job with this number; 0 when none has it."""


class Clerk:
    """Answers for one scheduler."""

    def __init__(
        self,
        orders: Orders,
        hand: Hand,
        jobs: Mapping[int, tuple[Lane, LaneJob]],
        lanes: lanes_of.Lanes,
        lane_key: Callable[[str], LaneKey],
    ) -> None:
        """The scheduler's own tables and clocks; ``jobs`` are those under way, ``lane_key`` says where an address goes."""
        self._orders = orders
        self._messages = hand.messages
        self._jobs = jobs
        self._lanes = lanes
        self._agenda = hand.agenda
        self._moves = hand.moves
        self._lane_key = lane_key
        self._clock = hand.clock
        self._monotonic = hand.monotonic
        self._started = hand.clock()
        self._counts: dict[type[Outcome], int] = {Delivered: 0, Deferred: 0, Failed: 0}

    def count(self, outcomes: Sequence[tuple[int, Outcome]]) -> None:
        """Recipients have been tried, or deferred without."""
        for _, outcome in outcomes:
            self._counts[type(outcome)] += 1

    def answer(self, question: bytes, processes: Processes) -> bytes:
        """The answer to one question, both as packets."""
        return encoder.encode(self._answer(question, processes))

    def _answer(self, data: bytes, processes: Processes) -> Answer:
        try:
            question = question_decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
            return Refused(f"not a question: {str(fault)[:200]}")
        match question:
            case AskMessages(ids=ids) if len(ids) <= MOST_ASKED:
                return self._views(ids, processes)
            case AskLanes():
                return self._overview(question, processes)
            case Order(ids=ids) if len(ids) <= MOST_ORDERED:
                return self._orders.give(question)
            case _:
                return Refused("about too many messages at a time")

    def _views(self, ids: Sequence[str], processes: Processes) -> Messages:
        now, wall = self._monotonic(), self._clock()
        wanted = {message for queue_id in ids if (message := self._messages.get(queue_id)) is not None}
        found: dict[str, list[JobView]] = {message.id: [] for message in wanted}
        for number, (lane, job) in self._jobs.items():
            if job.message in wanted:
                pid = processes.pid_of(number)
                found[job.message.id].append(view_delivering(self._lanes, lane, job, pid, now, wall))
        for message in wanted:
            keys = {self._lane_key(message.envelope.recipients[index].address) for index in message.due()}
            keys.add(LaneKey("bounce", ""))
            found[message.id] += view_waiting(self._lanes, keys, message, now, wall)
        return Messages(tuple(self._view(queue_id, found.get(queue_id)) for queue_id in ids))

    def _view(self, queue_id: str, jobs: Sequence[JobView] | None) -> MessageView:
        message = self._messages.get(queue_id)
        return MessageView(
            queue_id,
            known=message is not None or queue_id in self._moves,
            jobs=tuple(jobs or ()),
            due=self._agenda.time_of(queue_id),
            stuck=self._moves.why(queue_id),
            ordered=(message.order or "") if message is not None else "",
        )

    def _overview(self, asked: AskLanes, processes: Processes) -> Lanes:
        told, suspended, waiting, in_flight = view_lanes(
            self._lanes, self._monotonic(), self._clock(), max(0, asked.most), asked.destinations
        )
        return Lanes(
            told,
            count=len(self._lanes),
            suspended=suspended,
            active=len(self._messages),
            waiting=waiting,
            in_flight=in_flight,
            deferred=len(self._agenda),
            processes=tuple(processes.pids()),
            delivered=self._counts[Delivered],
            deferrals=self._counts[Deferred],
            failed=self._counts[Failed],
            started=self._started,
        )
