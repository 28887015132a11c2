"""``mtad explain``: what would happen to a message, without sending one."""

from __future__ import annotations

import ipaddress
import os
import sys
import time
from typing import Final

import click
import msgspec

from mtad import log
from mtad.cli.common import Source, config_option, explained
from mtad.cli.queue_facts import Desk
from mtad.cli.times import moment, plural
from mtad.desk import LaneView
from mtad.errors import MtadError, SyntaxFault
from mtad.explain import Exchanger, Explainer, Explanation, Probe, Route, Taken
from mtad.spool.queues import Spool
from mtad.users import Users

_TLS: Final = {
    "none": "never: clear text",
    "opportunistic": "when the host offers it, with any certificate",
    "required": "always, with a certificate that is good for the host's name; else the mail waits",
    "implicit": "from the first octet, with a certificate that is good for the host's name; else the mail waits",
}


@click.command()
@config_option
@click.option("--to", "recipient", required=True, metavar="ADDRESS", help="The recipient.")
@click.option("--from", "sender", default="", metavar="ADDRESS", help="The sender; by default the null sender, <>.")
@click.option(
    "--client",
    default="",
    metavar="IP",
    help="Where it comes from; by default this machine for a relay, and somebody out in the world for the other services.",
)
@click.option("--probe", is_flag=True, help="Connect to the hosts and see what they really offer; no mail is sent.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@explained
def explain(config: str | None, recipient: str, sender: str, client: str, probe: bool, as_json: bool) -> None:
    """Say what would happen to a message: who takes it in, and by which rule; where it goes, and how.

    The server need not run. Exit 1: no listener would take it.
    """
    settings = Source(config).read()
    local = settings.local
    users = Users.load(local.users, local.domains, local.postmaster, fallback=settings.development)
    log.setup(os.devnull, "postfix", "smtp")  # what a probe finds is in the answer
    try:
        found = Explainer(settings, users).explain(_bare(recipient), _bare(sender), _address(client), probe=probe)
    except SyntaxFault as fault:
        raise click.UsageError(f"--to or --from: {fault}") from None
    lane = _lane(settings.spool, found.route) if found.route is not None else None
    if as_json:
        click.echo(msgspec.json.encode(msgspec.to_builtins(found) | {"lane": lane}).decode())
    else:
        _print(found)
        if lane is not None:
            _print_lane(lane)
    sys.exit(0 if any(taken.accepted for taken in found.taken) else 1)


def _lane(path: str, route: Route) -> LaneView | None:
    """How the lane stands at this moment; None when no scheduler runs, or none has anything for this lane."""
    try:
        spool = Spool(path)
    except (MtadError, OSError):
        return None
    try:
        answer = Desk(spool).lanes((route.lane,))
    finally:
        spool.close()
    views = answer.lanes if answer is not None else ()
    return next((view for view in views if (view.transport, view.destination) == ("smtp", route.lane)), None)


def _print_lane(lane: LaneView) -> None:
    if lane.suspended_since:
        click.echo(f"now         suspended since {moment(lane.suspended_since, time.time())}: {lane.reason}")
    else:
        click.echo(f"now         {lane.in_flight} of {lane.window} deliveries under way, {lane.waiting} waiting")


def _bare(address: str) -> str:
    return address.removeprefix("<").removesuffix(">")


def _address(client: str) -> str:
    if not client:
        return ""
    try:
        return str(ipaddress.ip_address(client))
    except ValueError:
        raise click.UsageError(f"--client: {client} is not an IP address") from None


def _print(found: Explanation) -> None:
    click.echo(f"from <{found.sender}> to <{found.recipient}>")
    for taken in found.taken:
        _print_taken(taken)
    if found.route is not None:
        _print_route(found.route)
    elif found.user:
        there = "" if os.path.isdir(found.mailbox) else ", which is made with the first message"
        click.echo(f"stored      for user {found.user}, in {found.mailbox}/new{there}")
    else:
        click.echo("nowhere     the domain is local, and has no such user")


def _print_taken(taken: Taken) -> None:
    what = "takes it" if taken.accepted else "refuses it"
    click.echo(f"{taken.listener:<10}  {what} from {taken.client} ({taken.service}): {taken.why}")
    if not taken.accepted:
        click.echo(f"{'':<10}  {taken.command} -> {taken.reply}")


def _print_route(route: Route) -> None:
    by = f"by the smarthost {route.next_hop}" if route.next_hop else f"by the MX of {route.destination}"
    whom = f"all domains whose mail goes to {route.group}" if route.group else route.lane
    click.echo(f"sent on     {by}")
    click.echo(f"limits      {route.concurrency} deliveries at a time to {whom}")
    click.echo(f"            {route.recipients} recipients in each" + (f", {route.rate} at most" if route.rate else ""))
    if route.messages:
        click.echo(f"            {plural(route.messages, 'message')} over a connection")
    click.echo(f"TLS         {_TLS[route.tls]}")
    if route.credentials:
        click.echo(f"login       for the hosts in {route.credentials}")
    if route.fault:
        end = "it goes back to its sender" if route.permanent else "it waits and is tried again"
        click.echo(f"hosts       none: {route.fault}; {end}")
        return
    title = "hosts"
    for host in route.hosts:
        addresses = ", ".join(host.addresses)
        click.echo(f"{title:<10}  {host.host} port {host.port}: {addresses}")
        title = ""
        for probe in host.probes:
            _print_probe(host, probe)


def _print_probe(host: Exchanger, probe: Probe) -> None:
    at = f"[{probe.address}]:{host.port}"
    if probe.fault:
        click.echo(f"{'':<14}{at} would not do: {probe.fault}")
        return
    click.echo(f"{'':<14}{at} answers; TLS: {probe.tls or 'none'}")
    if probe.certificate:
        click.echo(f"{'':<14}  certificate: {probe.certificate}")
    click.echo(f"{'':<14}  offers {', '.join(probe.extensions) or 'no extensions'}")
