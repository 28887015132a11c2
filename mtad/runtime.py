"""What the master hands to its children: made before the fork, the same for all of them."""

from __future__ import annotations

import msgspec

from mtad.config import Config
from mtad.net.channels import Lifeline, Mailslot, WakePipe
from mtad.net.listening import ListeningSocket
from mtad.occupancy import Occupancy
from mtad.users import Users


class Runtime(msgspec.Struct, frozen=True):
    """Configuration and shared descriptors of one generation of processes; a reload makes a new one."""

    config: Config
    users: Users
    sockets: tuple[tuple[int, ListeningSocket], ...]
    """Each with the index of its table in ``config.listener``."""
    occupancy: Occupancy
    lifeline: Lifeline
    wake: WakePipe
    mailslot: Mailslot
