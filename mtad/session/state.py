"""What is remembered while a client is connected: the `Session`, and inside it the `Transaction`.

What it is for: two objects with two lifetimes. A session lasts as long as the connection (after STARTTLS a new one begins);
a transaction from MAIL to the end of its content. Giving up a transaction is ``session.transaction = None`` and nothing
else, so there is no list of fields to reset and none to forget.

The states follow from what is remembered and are never stored:

    START      --EHLO/HELO-->  READY  --MAIL-->  SENDER  --RCPT (first one taken)-->  RECIPIENT  --DATA, content--> READY
       ^ nobody has greeted       ^ RSET, EHLO, HELO and the end of the content lead back here

Standards: RFC 5321 sections 3.1 to 3.3, 4.1.4 (order of commands).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import msgspec

from mtad.address import Address
from mtad.config import Limits
from mtad.policy import Policy


class State(Enum):
    """Where a session stands; see the picture above."""

    START = "no EHLO or HELO yet"
    READY = "no transaction"
    SENDER = "MAIL was taken, no recipient was"
    RECIPIENT = "at least one recipient was taken"


class Client(msgspec.Struct, frozen=True):
    """Who is connected: the address in text form, and the name that the DNS gives for it."""

    address: str
    name: str = "unknown"

    def __str__(self) -> str:
        return f"{self.name}[{self.address}]"


class Site(msgspec.Struct, frozen=True):
    """What the listening service is; the same for all its sessions."""

    hostname: str
    limits: Limits
    policy: Policy


@dataclass(slots=True)
class Transaction:
    """One message in the making, from MAIL on."""

    sender: Address
    recipients: dict[str, str] = field(default_factory=dict)
    """In the order of RCPT: the form in which recipients are compared, and the mailbox as given."""
    attempted: bool = False
    """Whether there was any RCPT, taken or not."""
    put_off: int = 0
    """Recipients refused with 4yz, such as those above the limit."""


@dataclass(slots=True)
class Session:
    """One connection."""

    site: Site
    client: Client
    trusted: bool
    """Whether the client may relay."""
    helo: str = ""
    """How the client called itself; "" before EHLO or HELO."""
    esmtp: bool = False
    """Whether it said EHLO."""
    transaction: Transaction | None = None
    last_verb: str = "CONNECT"
    """The last command, for the log."""
    bad: int = 0
    """Refused commands, see `mtad.session.commands`."""
    bad_in_a_row: int = 0
    junk: int = 0
    """Commands that lead nowhere since the last message."""
    refused_recipients: int = 0
    """Recipients refused with 5yz."""
    closing: bool = False
    """Whether the last reply ends the connection."""

    @property
    def state(self) -> State:
        """Where the session stands."""
        if not self.helo:
            return State.START
        if self.transaction is None:
            return State.READY
        return State.RECIPIENT if self.transaction.recipients else State.SENDER

    @property
    def protocol(self) -> str:
        """The protocol as Received: and logs name it (RFC 3848)."""
        return "ESMTP" if self.esmtp else "SMTP"


def open_session(site: Site, client: Client) -> Session:
    """A session of a client that has just connected."""
    return Session(site, client, site.policy.trusts(client.address))
