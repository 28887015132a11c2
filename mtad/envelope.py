"""The envelope: who sent a message, to whom it goes, and how it came to us (RFC 5321 section 2.3.1).

An envelope is written once, as the head of the queue file, and never changes. What happens to its recipients afterwards is
told by records, see `mtad.spool.records`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["mail", "bounce", "double-bounce"]
Notify = Literal["never", "success", "failure", "delay"]


class Recipient(msgspec.Struct, frozen=True, omit_defaults=True):
    """One recipient. ``address`` is in Mailbox syntax; local recipients are those whose domain is ours.

    ``notify`` and ``orcpt`` are what RFC 3461 sections 4.1 and 4.2 let the sender ask for; empty when it did not.
    ``orcpt`` is ``type;address``, decoded from xtext.
    """

    address: str
    notify: tuple[Notify, ...] = ()
    orcpt: str = ""


class Envelope(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message's envelope.

    ``id`` is the queue id; ``arrival`` seconds since the epoch; ``sender`` a Mailbox, or "" for the null reverse-path.
    ``client`` says where it came from, as ``name[address]``, and ``helo`` how the client called itself, ``login`` who it
    showed itself to be. ``kind`` tells reports of our own from mail: a "bounce" goes to the sender of a message, a
    "double-bounce" tells postmaster about a bounce that could not be delivered, and is never followed by another.
    ``body`` and ``smtputf8`` are the parameters of MAIL (RFC 6152, 3030, 6531), ``ret`` and ``envid`` those of RFC 3461.
    """

    id: str
    arrival: float
    sender: str
    recipients: tuple[Recipient, ...]
    client: str = ""
    helo: str = ""
    protocol: str = ""
    kind: Kind = "mail"
    login: str = ""
    body: Literal["", "8bitmime", "binarymime"] = ""
    smtputf8: bool = False
    ret: Literal["", "full", "hdrs"] = ""
    envid: str = ""
