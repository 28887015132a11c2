"""Every file of tests/dialogues against the running daemon, over real sockets: as written, and octet by octet.

The scheduler is kept from its spool, so what was taken can be looked at where it lies.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Sequence

import pytest

from tests.client import Client
from tests.dialogue_script import DIALOGUES, Script, Stored, load, play
from tests.site import Site, await_value

#: Those for a listener in clear text; the daemon offers no TLS yet.
SCRIPTS = [script for path in sorted(DIALOGUES.glob("*.txt")) if (script := load(path)).tls == "none" and not script.logins]

every_dialogue = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("dialogues"), deliver=False) as site:
        yield site


class Live(Client):
    """A connection to the daemon as the target of a dialogue."""

    def __init__(self, site: Site, service: str, *, bytewise: bool) -> None:
        super().__init__(site.address("relay" if service == "relay" else "inbound"))
        self._site = site
        self._before = {message.envelope.id for message in site.taken()}
        self._bytewise = bytewise

    def send(self, data: bytes) -> None:
        for first in range(0, len(data), 1) if self._bytewise else ():
            super().send(data[first : first + 1])
        if not self._bytewise:
            super().send(data)

    def secure(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self.socket = context.wrap_socket(self.socket)

    def stored(self, count: int) -> Sequence[Stored]:
        await_value(lambda: len(self._new()) >= count, what=f"{count} messages are stored")
        return self._new()

    def _new(self) -> list[Stored]:
        return [
            Stored(envelope.sender, tuple(recipient.address for recipient in envelope.recipients), content)
            for envelope, content in self._site.taken()
            if envelope.id not in self._before
        ]


@every_dialogue
def test_as_written(site: Site, script: Script) -> None:
    with Live(site, script.service, bytewise=False) as live:
        play(script, live)
        assert live.quiet(0.01), "the dialogue leaves replies unread"


@every_dialogue
def test_octet_by_octet(site: Site, script: Script) -> None:
    with Live(site, script.service, bytewise=True) as live:
        play(script, live)


def test_nothing_is_left_of_the_dialogues(site: Site) -> None:
    """After all of them: no session is counted, no file is half written, nothing went wrong inside."""
    await_value(lambda: site.status().sessions == 0, what="all sessions have ended")
    assert len(site.files("incoming")) == len(site.taken())
    assert "panic" not in site.log()
