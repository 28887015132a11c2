"""The envelope: who sent a message, to whom it goes, and how it came to us (RFC 5321 section 2.3.1).

An envelope is written once, as the head of the queue file, and never changes. What happens to its recipients afterwards is
told by records, see `mtad.spool.records`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["mail", "bounce", "double-bounce"]


class Recipient(msgspec.Struct, frozen=True, omit_defaults=True):
    """One recipient. ``address`` is in Mailbox syntax; local recipients are those whose domain is ours."""

    address: str


class Envelope(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message's envelope.

    ``id`` is the queue id; ``arrival`` seconds since the epoch; ``sender`` a Mailbox, or "" for the null reverse-path.
    ``client`` says where it came from, as ``name[address]``, and ``helo`` how the client called itself.
    ``kind`` tells reports of our own from mail: a "bounce" goes to the sender of a message, a "double-bounce" tells
    postmaster about a bounce that could not be delivered, and is never followed by another.
    """

    id: str
    arrival: float
    sender: str
    recipients: tuple[Recipient, ...]
    client: str = ""
    helo: str = ""
    protocol: str = ""
    kind: Kind = "mail"
