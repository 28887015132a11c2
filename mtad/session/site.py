"""The `Site` of a listening service, out of its table in the configuration; for listeners, and for `mtad explain`.

There is one way from settings to rules, so that what is explained is what happens.

Errors: ValueError of `Policy`, for settings that the configuration's own check lets nobody have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mtad.config import Config, Listener
from mtad.policy import Policy, Users
from mtad.session.state import Guard, Logins, Site

#: Whom a relay trusts that names nobody: it may be bound to loopback only.
LOOPBACK: Final = ("127.0.0.0/8", "::1/128")


def site_of(
    config: Config,
    listener: Listener,
    users: Users,
    logins: Logins | None,
    guard: Guard | None,
    stressed: Callable[[], bool] = lambda: False,
) -> Site:
    """What the clients of a listener find there.

    Args:
        config: of the whole host.
        listener: one of its listening services.
        users: who has mail here.
        logins: who may log in, where the service has logins.
        guard: counts wrong passwords.
        stressed: whether the server is nearly full.
    """
    return Site(
        config.hostname,
        config.limits,
        Policy(users, config.local.domains, listener.service, listener.trusted or LOOPBACK, config.local.senders),
        listener.tls,
        logins=logins if listener.service != "relay" else None,
        guard=guard,
        auth_without_tls=listener.auth_without_tls == "loopback",
        bare_line_ends=listener.bare_line_ends,
        stressed=stressed,
    )
