"""The world around a server in a crash test: a name server, and the two exchangers of `tools.lib.crash_load`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.peers.dns import DnsServer
from tests.peers.mx import Mx, Script, free_port
from tests.site import Site
from tools.lib.crash_finds import at_exchanger
from tools.lib.crash_load import DOMAIN, MOODY, SENDERS, STEADY, USERS, Moods
from tools.lib.crash_verdict import Copy

_STEADY_ADDRESS: Final = "127.0.0.21"
_MOODY_ADDRESS: Final = "127.0.0.22"


class Peers:
    """The exchangers and the name server while they run; `peers` makes one."""

    def __init__(self, dns: str, port: int, exchangers: tuple[Mx, ...]) -> None:
        """``dns`` is ``address:port``; ``port`` is that of all exchangers."""
        self._dns = dns
        self._port = port
        self.exchangers = exchangers

    def site(self, root: Path, **sections: dict[str, Any]) -> Site:
        """A site that delivers to them, not started, in the directory ``root``; ``sections`` are more of its settings."""
        site = Site(
            root,
            dns=self._dns,
            port=self._port,
            users=(*USERS, *SENDERS),
            retry={"minimum": "1s", "destination_pause": "1s"},
            local={"domains": [DOMAIN]},
        )
        site.configure(**sections)
        return site

    def copies(self) -> list[Copy]:
        """What the exchangers have taken so far."""
        return [copy for exchanger in self.exchangers for copy in at_exchanger(exchanger.messages)]


@contextmanager
def peers(exchanger: Callable[..., Mx] = Mx) -> Iterator[Peers]:
    """Start them; they end with the context. ``exchanger`` makes an exchanger, from what `Mx` is made from."""
    port = free_port([_STEADY_ADDRESS, _MOODY_ADDRESS])
    zones = {
        STEADY: {"MX": ["10 mx.steady.test."]},
        "mx.steady.test": {"A": [_STEADY_ADDRESS]},
        MOODY: {"MX": ["10 mx.moody.test."]},
        "mx.moody.test": {"A": [_MOODY_ADDRESS]},
    }
    with (
        DnsServer(zones) as dns,
        exchanger(_STEADY_ADDRESS, port) as steady,
        exchanger(_MOODY_ADDRESS, port, Script(rcpt=Moods())) as moody,
    ):
        yield Peers(dns.address, port, (steady, moody))
