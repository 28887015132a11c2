"""What the sweep ``disk`` looks at: what is delivered, what is stuck, which processes live, how a message is answered."""

from __future__ import annotations

import smtplib
from collections.abc import Sequence

from mtad.spool.queue_file import UNFINISHED
from tests.peers.mx import Mx
from tests.site import Site
from tools.lib.crash_finds import at_exchanger
from tools.lib.crash_verdict import Sent


def arrived(exchanger: Mx, ids: Sequence[str]) -> int:
    """How many of these messages an exchanger has."""
    found = {copy.id for copy in at_exchanger(exchanger.messages)}
    return sum(1 for one in ids if one in found)


def older(site: Site, queue: str, than: float) -> list[str]:
    """The messages in a queue that were last moved before a time; what never became one is swept by and by."""
    found = []
    for name in site.files(queue):
        path = site.spool_path / queue / name
        try:
            if path.stat().st_ctime < than and not UNFINISHED.startswith(path.read_bytes()[: len(UNFINISHED)]):
                found.append(name)
        except FileNotFoundError:
            pass  # on its way
    return found


def lasting(site: Site) -> list[int]:
    """Process ids that must not change."""
    return [site.status().pid, *site.pids("scheduler"), *site.pids("listener")]


def transact(site: Site, message: Sent, content: bytes) -> tuple[int, str]:
    """One session: the first refusal, or the reply to the dot."""
    host, port = site.address("relay")
    # A client waits ten minutes for the reply to its dot (RFC 5321 section 4.5.3.2.6).
    with smtplib.SMTP(host, port, local_hostname="client.test", timeout=600) as client:
        client.ehlo()
        replies = [client.mail(message.sender)]
        replies += [client.rcpt(recipient) for recipient in message.recipients]
        refused = [reply for reply in replies if reply[0] != 250]
        code, text = refused[0] if refused else client.data(content)
    return code, text.decode()
