"""The packets between the scheduler and a delivery process: a job there, its result back.

A job names the message by its queue id only; the delivery process reads the envelope from the queue file and writes what it
did into it before it answers. So an answer that gets lost, with whoever was to read it, loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from mtad.outcome import Outcome
from mtad.progress import Reported

#: How the packet begins by which a delivery process shows that it lives, and how often it does (seconds). The numbers of
#: the jobs that make no progress follow, see `sign_of_life`.
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
    ipv4: bool = False
    """The destination does not like our IPv6 address: only its IPv4 addresses are tried, as long as it has any."""
    arrival: float = 0.0
    """For the transport "bounce": from when on the message's age counts; not its arrival, after a leap of the clock."""


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a job: the last outcome of each recipient. It stands in the queue file already, or says so."""

    number: int
    outcomes: tuple[tuple[int, Outcome], ...] = ()
    damaged: str = ""
    """The queue file is damaged, and how; nothing was delivered."""
    unwritten: bool = False
    """The outcomes, or the reports, do not stand in the queue file: the disk refused."""
    reports: tuple[Reported, ...] = ()
    """For the transport "bounce": what the sender has been told; it is marked in the queue file, or ``unwritten``."""
    host: str = ""
    """The name of the first host that was tried; "" when it did not come to one, and for transports without."""
    ipv4: bool = False
    """The destination has refused our IPv6 address and then taken the message over IPv4."""


def sign_of_life(stuck: Sequence[int] = ()) -> bytes:
    """The packet of a process that lives; ``stuck`` are the numbers of the jobs that its watchdog could not end."""
    return ALIVE + b" ".join(b"%d" % number for number in stuck)


def stuck_jobs(packet: bytes) -> frozenset[int]:
    """What `sign_of_life` was told."""
    return frozenset(int(number) for number in packet[len(ALIVE) :].split())


job_encoder: Final = msgspec.json.Encoder()
job_decoder: Final = msgspec.json.Decoder(Job)
result_decoder: Final = msgspec.json.Decoder(Result)
