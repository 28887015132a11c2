"""The packets between the scheduler and a delivery process: a job there, its result back.

A job names the message by its queue id only; the delivery process reads the envelope from the queue file and writes what it
did into it before it answers. So an answer that gets lost, with whoever was to read it, loses nothing.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from mtad.outcome import Outcome
from mtad.progress import Reported

#: The packet by which a delivery process shows that it lives, and how often it does (seconds).
ALIVE: Final = b"."
HEARTBEAT: Final = 5.0

TransportName = Literal["local", "smtp", "bounce"]


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """One delivery to be done. ``active`` is when the scheduler took the message in hand, in seconds since the epoch."""

    number: int
    queue_id: str
    transport: TransportName
    destination: str
    recipients: tuple[int, ...]
    active: float = 0.0


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a job: the last outcome of each recipient. It stands in the queue file already, or says so."""

    number: int
    outcomes: tuple[tuple[int, Outcome], ...] = ()
    damaged: str = ""
    """The queue file is damaged, and how; nothing was delivered."""
    unwritten: bool = False
    """The outcomes do not stand in the queue file: the disk refused."""
    reports: tuple[Reported, ...] = ()
    """For the transport "bounce": what the sender has been told, as it is marked in the queue file."""


job_encoder: Final = msgspec.json.Encoder()
job_decoder: Final = msgspec.json.Decoder(Job)
result_decoder: Final = msgspec.json.Decoder(Result)
