"""``mtad-flush``: try deferred mail again now.

The next attempt of the messages is set to now in the spool itself, and the scheduler is told. When no scheduler runs, the
messages are tried when one starts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

import click
import msgspec

from mtad.address import domain_of
from mtad.cli.common import Source, config_option, explained, fail, version_option
from mtad.cli.queue_filter import domain_option
from mtad.cli.times import plural
from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.net.channels import Mailslot
from mtad.spool.queue_id import is_queue_id
from mtad.spool.queues import MAILSLOT, SCHEDULER_LOCK, Queue, Spool

#: Queue ids in one request: far below what a datagram holds.
_BATCH: Final = 1000


def waiting_for(spool: Spool, domain: str) -> Iterator[str]:
    """The deferred messages that have a recipient of this domain left."""
    for queue_id, _ in spool.times(Queue.DEFERRED):
        try:
            message = spool.load(Queue.DEFERRED, queue_id)
        except (FileNotFoundError, QueueFileDamaged, QueueFileUnfinished):
            continue
        recipients = zip(message.envelope.recipients, message.states, strict=True)
        if any(domain_of(recipient.address) == domain and not state.settled for recipient, state in recipients):
            yield queue_id


class Flushed(msgspec.Struct, frozen=True):
    """What became of a flush: how many messages, the ids that are not deferred, whether the scheduler has been told."""

    count: int
    missing: tuple[str, ...]
    told: bool


def flush(spool: Spool, queue_ids: Iterable[str]) -> Flushed:
    """Set the next attempt of these messages to now, and tell the scheduler when there is one."""
    count = 0
    told = True
    missing: list[str] = []
    path = os.path.join(spool.root, MAILSLOT)
    remaining = iter(queue_ids)
    while batch := list(islice(remaining, _BATCH)):
        now = time.time()
        touched = []
        for queue_id in batch:
            try:
                if not is_queue_id(queue_id):
                    raise FileNotFoundError(queue_id)
                spool.touch(Queue.DEFERRED, queue_id, now)
            except FileNotFoundError:
                missing.append(queue_id)
            else:
                touched.append(queue_id)
        count += len(touched)
        if touched and spool.holder(SCHEDULER_LOCK) is not None:
            told = Mailslot.send(path, msgspec.json.encode({"flush": touched})) and told
    return Flushed(count, tuple(missing), told)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("queue_ids", nargs=-1, metavar="[QUEUE_ID]...")
@config_option
@click.option("--domain", metavar="DOMAIN", help="Only messages with a recipient of this domain.")
@version_option
@explained
def main(queue_ids: tuple[str, ...], config: str | None, domain: str | None) -> None:
    """Try deferred messages again now: all of them, or those named."""
    wanted_domain = domain_option(domain) if domain is not None else ""
    if queue_ids and wanted_domain:
        raise click.UsageError("give queue ids or --domain, not both")
    spool = Spool(Source(config).spool())
    wanted: Iterable[str] = queue_ids
    if wanted_domain:
        wanted = waiting_for(spool, wanted_domain)
    elif not queue_ids:
        wanted = (queue_id for queue_id, _ in spool.times(Queue.DEFERRED))
    # utime() does not change a directory, so it may be read while its files are touched.
    done = flush(spool, wanted)
    if spool.holder(SCHEDULER_LOCK) is None:
        when = "mtad is not running: tried when it starts"
    else:
        when = "tried now" if done.told else "the scheduler does not answer: tried within five minutes"
    if done.count:
        click.echo(f"{plural(done.count, 'message')}: {when}")
    elif not queue_ids:
        click.echo("no deferred messages" + (f" for {wanted_domain}" if wanted_domain else ""))
    if queue_ids and done.missing:
        fail("\n".join(f"{queue_id}: not in the deferred queue" for queue_id in done.missing))
    sys.exit(0)
