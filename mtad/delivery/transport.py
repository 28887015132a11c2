"""What a transport is: the seam between the queue, which knows no protocol, and the ways to hand mail over.

A transport delivers one task (some recipients of one message, all with the same destination) and returns the attempts that
it made. It raises for nothing that the world can do: a host that is down, a full disk, a rude reply are outcomes. Whatever
it does raise is a bug, or the queue file; the worker then records a Deferred for every recipient of the task. When some of
them were decided before, what is raised is an `Interrupted` that knows them: nobody gets a message twice for it.

Before the point of no return (for SMTP: before the final dot, for a Maildir: before the rename) a transport calls
``in_doubt``; after that, and until the attempt is recorded, a crash leaves the recipients in doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec

from mtad.envelope import Envelope
from mtad.errors import MtadError
from mtad.outcome import Attempt


class Content(Protocol):
    """The content of a message: header and body as received, lines ended by CRLF, never dot-stuffed."""

    @property
    def size(self) -> int:
        """Octets."""

    def chunks(self) -> Iterator[bytes]:
        """The content from its start, in pieces of at most 64 KiB, cut anywhere. May be called more than once."""


class Interrupted(MtadError):
    """A delivery broke off: by what, and the attempts that were made before."""

    def __init__(self, fault: Exception, attempts: Sequence[Attempt]) -> None:
        super().__init__(str(fault))
        self.fault = fault
        self.attempts = tuple(attempts)


class Task(msgspec.Struct, frozen=True):
    """What one delivery is to do.

    ``recipients`` are indexes into the envelope's; ``destination`` is their domain; ``ipv4`` is explained with
    `mtad.delivery.jobs.Job`.
    """

    envelope: Envelope
    recipients: tuple[int, ...]
    destination: str
    ipv4: bool = False


class Transport(Protocol):
    """A way to deliver. One instance serves all threads of a delivery process."""

    def deliver(self, task: Task, content: Content, in_doubt: Callable[[str], None]) -> Sequence[Attempt]:
        """Try to deliver; the last outcome of a recipient is the one that counts, and none may be missing.

        Args:
            task: which recipients of which message.
            content: the message.
            in_doubt: to be called with the host's name right before the point of no return.
        """
