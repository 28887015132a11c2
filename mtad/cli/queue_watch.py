"""``mtaq watch``: a live picture of the lanes, for a terminal."""

from __future__ import annotations

import sys
import time
from typing import Final

import click

from mtad.cli.common import Source, config_option, explained
from mtad.cli.queue_facts import Desk, Look
from mtad.spool.queues import Queue, Spool

#: Seconds between two counts of the queues: with very many messages a count takes a while.
_COUNT_EVERY: Final = 5.0
#: Lanes of a picture that is not on a terminal.
_MOST: Final = 100


class Watcher:
    """Looks again and again at one spool."""

    def __init__(self, spool: Spool) -> None:
        """Nothing is looked at yet."""
        self._spool = spool
        self._queues: dict[str, int] = {}
        self._counted = 0.0
        self._count_took = 0.0

    def look(self, rows: int) -> Look:
        """How it is now, with at most so many lanes."""
        now = time.monotonic()
        if now - self._counted >= max(_COUNT_EVERY if self._queues else 0.0, 10 * self._count_took) or not self._queues:
            self._queues = {queue.value: self._spool.count(queue) for queue in Queue}
            self._counted = time.monotonic()
            self._count_took = self._counted - now
        desk = Desk(self._spool)
        lanes = desk.lanes(most=rows)
        return Look(time.time(), desk.state, desk.pid, lanes, self._queues)


@click.command(short_help="A live picture of the lanes.")
@config_option
@click.option("--once", is_flag=True, help="Print one picture and end, as is done where the output is no terminal.")
@click.option(
    "--interval",
    type=click.FloatRange(0.2, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two pictures.",
)
@explained
def watch(config: str | None, once: bool, interval: float) -> None:
    """Show what the scheduler is doing: its lanes, how far they are open, what waits in them. Ctrl-C ends it.

    In the column `open` stand the deliveries that are under way, that may be, and that may be at most.
    """
    # Drawing is a large thing to load, and the other commands are in a hurry.
    from rich.console import Console  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415

    from mtad.cli.queue_picture import FRAME, picture  # noqa: PLC0415

    watcher = Watcher(Spool(Source(config).spool()))
    console = Console(highlight=False)
    if once or not sys.stdout.isatty():
        console.print(picture(watcher.look(_MOST), None, 2 * _MOST, console.width))
        return
    before: Look | None = None
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                rows = max(1, console.height - FRAME)
                now = watcher.look(rows)
                live.update(picture(now, before, rows, console.width), refresh=True)
                before = now
                time.sleep(interval)
    except KeyboardInterrupt:
        pass
