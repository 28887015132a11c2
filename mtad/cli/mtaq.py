"""``mtaq``: the queue. Without a command it lists what is there; the commands ask why, and give orders.

All of them work on the queue files, whether the server runs or not, and ask the scheduler what only it knows.
A command is a module ``mtad.cli.queue_...`` and has its line at the end of this one.
"""

from __future__ import annotations

import sys
import time
from typing import get_args

import click

from mtad.cli.common import Source, config_option, explained, version_option
from mtad.cli.queue_groups import By, grouped, print_groups, print_objects
from mtad.cli.queue_list import print_json, print_table, rows
from mtad.cli.queue_orders import commands as orders
from mtad.cli.queue_show import show
from mtad.cli.queue_watch import watch
from mtad.cli.queue_why import why
from mtad.spool.queues import Spool


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with the names of `postqueue -j`.")
@click.option(
    "--by",
    type=click.Choice(get_args(By)),
    help="In groups, with counts and ages: the columns are minutes in the queue, as qshape has them.",
)
@version_option
@click.pass_context
@explained
def main(context: click.Context, config: str | None, as_json: bool, by: By | None) -> None:
    """List the mail queue, as mailq does: * is in delivery, ! on hold, the others wait for their next attempt."""
    if context.invoked_subcommand is not None:
        if by:
            raise click.UsageError("--by is for the list, not for its commands")
        if as_json:
            raise click.UsageError(f"write --json after the command: mtaq {context.invoked_subcommand} --json")
        # Every command has --config as well: it may stand before its name or after.
        context.default_map = {name: {"config": config} for name in main.commands} if config else None
        return
    spool = Spool(Source(config).spool())
    if by:
        now = time.time()
        found = grouped(spool, by, now)
        if as_json:
            print_objects(found, by, sys.stdout)
        else:
            print_groups(found, by, now, sys.stdout)
    elif as_json:
        print_json(rows(spool), sys.stdout)
    else:
        print_table(rows(spool), sys.stdout)
    sys.stdout.flush()


# The commands, each with its options in its module; `main` is the bare call.
main.add_command(why)
main.add_command(show)
main.add_command(watch)
for order in orders:
    main.add_command(order)
