"""What the master hands to its children: made before the fork, the same for all of them."""

from __future__ import annotations

import os
import time

import msgspec

from mtad import log
from mtad.config import Config
from mtad.net.channels import Lifeline, Mailslot, WakePipe
from mtad.net.listening import ListeningSocket
from mtad.occupancy import Occupancy
from mtad.passwords import Passwords
from mtad.throttle import Throttle
from mtad.tls.certificates import Pair, make_self_signed
from mtad.tls.server import ServerTls
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
    tls: ServerTls | None = None
    """None when no listener has TLS."""
    passwords: Passwords | None = None
    throttle: Throttle | None = None


def load_tls(config: Config) -> ServerTls | None:
    """The certificates, when a listener needs them; the development defaults make their own.

    Raises:
        CertificateFault: one cannot be used.
        OSError: the one to be made cannot be written.
    """
    if all(listener.tls == "none" for listener in config.listener):
        return None
    pairs = [Pair(*paths) for paths in config.tls.pairs]
    if config.development and not any(map(os.path.lexists, config.tls.pairs[0])):
        make_self_signed(pairs[0], config.hostname, time.time())
        log.info(f"made a certificate for development: {pairs[0].certificate}")
    return ServerTls(pairs, log.warning)


def reloaded(old: Runtime, config: Config, users: Users, sockets: tuple[tuple[int, ListeningSocket], ...]) -> Runtime:
    """What the next generation gets; wrong passwords stay counted. Errors as those of the functions beside this one."""
    return msgspec.structs.replace(
        old,
        config=config,
        users=users,
        tls=load_tls(config),
        passwords=load_passwords(config),
        throttle=old.throttle.limited(config.limits.wrong_passwords) if old.throttle is not None else None,
        sockets=sockets,
    )


def load_passwords(config: Config) -> Passwords:
    """Who may log in.

    Raises:
        ConfigError: the file cannot be read, or has a fault.
    """
    return Passwords.load(config.local.passwords, warn=log.warning)
