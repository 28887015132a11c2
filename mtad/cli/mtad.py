"""``mtad``: start, stop, reload, status, check, passwd."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable

import click
import msgspec

from mtad.check import Findings, check
from mtad.cli.common import EX_CONFIG, Source, config_option, explained, fail, version_option
from mtad.cli.daemon import detach
from mtad.cli.explain import explain
from mtad.cli.passwd import passwd
from mtad.cli.queue_facts import Desk
from mtad.cli.times import age, plural
from mtad.config import Config, Processes
from mtad.config_lines import key_lines
from mtad.control import Status, ask_status
from mtad.desk import Lanes
from mtad.errors import ConfigError, MtadError
from mtad.master import Master
from mtad.net.listening import join_address, probe
from mtad.spool.queues import LIVE, MASTER_LOCK, Queue, Spool


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@version_option
def main() -> None:
    """A mail transfer agent: takes mail in over SMTP, keeps it safe, delivers it.

    See also mtaq (the queue) and mtad-flush (try again now).
    """


@main.command()
@config_option
@click.option("--foreground", is_flag=True, help="Stay attached to the terminal; end with Ctrl-C.")
@explained
def start(config: str | None, foreground: bool) -> None:
    """Start the server; returns once it listens, or says why it does not."""
    source = Source(config)
    settings = source.read()
    findings = check(settings, source.path, key_lines(source.text()))
    if findings.errors:
        raise ConfigError(findings.errors)
    _say(findings.warnings)
    _refuse_second(settings)
    if not source.path:
        _introduce(settings)
    if foreground:
        _serve(Master(settings, source.name, lambda: _checked(source)), lambda: None)
        return
    attached, settings = settings, _logging_to_a_file(settings)
    if settings is not attached:
        click.echo(f"The log goes to {settings.log.to}.")
    master = Master(settings, source.name, lambda: _logging_to_a_file(_checked(source)))
    detach(lambda ready: _serve(master, ready))


def _serve(master: Master, ready: Callable[[], None]) -> None:
    master.prepare()
    master.run(ready)


def _checked(source: Source) -> Config:
    """The configuration as it is now.

    Raises:
        ConfigError: it has faults, or does not fit the machine.
    """
    settings = source.read()
    findings = check(settings, source.path, key_lines(source.text()))
    if findings.errors:
        raise ConfigError(findings.errors)
    return settings


def _refuse_second(settings: Config) -> None:
    if not os.path.isdir(settings.spool):
        return
    pid = _master_of(settings.spool)
    if pid is not None:
        fail(f"already running: process {pid} has the spool {settings.spool} (mtad stop ends it)")


def _master_of(path: str) -> int | None:
    try:
        spool = Spool(path)
    except MtadError:
        return None
    try:
        return spool.holder(MASTER_LOCK)
    finally:
        spool.close()


def _logging_to_a_file(settings: Config) -> Config:
    """A daemon has no terminal to log to."""
    if settings.log.to != "stderr":
        return settings
    os.makedirs(settings.spool, mode=0o700, exist_ok=True)
    path = os.path.join(settings.spool, "mtad.log")
    return msgspec.structs.replace(settings, log=msgspec.structs.replace(settings.log, to=path))


def _introduce(settings: Config) -> None:
    local = settings.local
    click.echo("There is no configuration file: these are the development defaults.")
    click.echo(f"  host name  {settings.hostname}")
    for listener in settings.listener:
        click.echo(f"  {listener.name:<9}  {', '.join(listener.address)}  ({listener.service})")
    click.echo(f"  users      {local.users}" + ("" if os.path.exists(local.users) else f"  (none yet: {local.postmaster})"))
    click.echo(f"  domains    {', '.join(local.domains)}")
    click.echo(f"  spool      {settings.spool}")
    click.echo(f"  mail       {local.mail_root}/<user>/new")


@main.command()
@config_option
@explained
def stop(config: str | None) -> None:
    """Stop the server: sessions and deliveries under way are finished first, then nothing is left running."""
    source = Source(config)
    spool = source.spool()
    pid = _running(spool)
    try:
        patience = source.read().processes.stop_timeout
    except ConfigError:
        patience = Processes().stop_timeout
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience + 15
    while _master_of(spool) == pid:
        if time.monotonic() > deadline:
            fail(f"process {pid} did not stop in time; see the log")
        time.sleep(0.02)
    click.echo("stopped")


@main.command()
@config_option
@explained
def reload(config: str | None) -> None:
    """Use the changed configuration; work under way goes on, a configuration with faults is refused."""
    settings = _checked(Source(config))
    pid = _running(settings.spool)
    before = ask_status(settings.spool)
    os.kill(pid, signal.SIGHUP)
    after = _status_after(settings, before.reloads if before else 0)
    if after.reload_fault:
        fail(f"refused, the old configuration stays:\n{after.reload_fault}", EX_CONFIG)
    click.echo("reloaded")


def _status_after(settings: Config, reloads: int) -> Status:
    deadline = time.monotonic() + 15
    while (status := ask_status(settings.spool)) is None or status.reloads <= reloads:
        if time.monotonic() > deadline:
            fail("the server did not answer in time; see the log")
        time.sleep(0.02)
    return status


def _running(spool: str) -> int:
    pid = _master_of(spool)
    if pid is None:
        fail(f"not running (no server has the spool {spool})")
    return pid


@main.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@explained
def status(config: str | None, as_json: bool) -> None:
    """What runs, since when, with how many sessions, and how many messages are in the queues. Exit 1: it does not run."""
    path = Source(config).spool()
    found = ask_status(path)
    lanes: Lanes | None = None
    silent = False
    try:
        spool = Spool(path)
        queues = {queue.value: spool.count(queue) for queue in Queue}
        desk = Desk(spool)
        lanes = desk.lanes()
        silent = desk.state == "silent"
        spool.close()
    except MtadError:
        queues = {}
    if as_json:
        body = {"running": found is not None, "queues": queues} | (msgspec.to_builtins(found) if found else {})
        click.echo(msgspec.json.encode(body | {"scheduler": _numbers(lanes)}).decode())
    else:
        _show(found, path, queues)
        if silent:
            click.echo("  the scheduler does not answer: nothing is delivered until it does")
        _show_lanes(lanes)
    sys.exit(0 if found else 1)


def _show(found: Status | None, spool: str, queues: dict[str, int]) -> None:
    now = time.time()
    if found is None:
        pid = _master_of(spool)
        click.echo("mtad is not running" if pid is None else f"mtad runs (process {pid}) but does not answer")
    else:
        click.echo(f"mtad {found.version} runs on {found.hostname} since {age(now - found.started)} (process {found.pid})")
        click.echo(f"  configuration  {found.config}")
        if found.reload_fault:
            click.echo(f"                 last reload refused: {found.reload_fault.splitlines()[0]}")
        for listener in found.listeners:
            click.echo(f"  {listener.name:<13}  {', '.join(listener.addresses)}  ({listener.service})")
        for process in found.processes:
            what = f"process {process.pid}, since {age(now - process.started)}" if process.pid else "restarting"
            if process.role == "listener":
                what += f", {plural(process.sessions, 'session')}"
            if process.deaths:
                what += f", died {plural(process.deaths, 'time')}"
            click.echo(f"  {process.role:<13}  {what}")
        if found.draining:
            click.echo(f"  draining       {plural(found.draining, 'process', 'processes')} of the configuration before")
    for queue in (*LIVE, Queue.CORRUPT):
        if queue.value in queues:
            click.echo(f"  {queue.value:<13}  {plural(queues[queue.value], 'message')}")


def _numbers(lanes: Lanes | None) -> dict[str, object] | None:
    """What the scheduler says, for a program, with all that is zero."""
    if lanes is None:
        return None
    return msgspec.structs.asdict(lanes) | {"lanes": [msgspec.structs.asdict(lane) for lane in lanes.lanes]}


def _show_lanes(lanes: Lanes | None) -> None:
    if lanes is None:
        return
    suspended = f", {lanes.suspended} suspended" if lanes.suspended else ""
    click.echo(
        f"  {'lanes':<13}  {lanes.count}{suspended}; {lanes.in_flight} in delivery, {lanes.waiting} waiting (mtaq watch)"
    )
    click.echo(
        f"  {'recipients':<13}  {lanes.delivered} delivered, {lanes.deferrals} put off, {lanes.failed} failed"
        f" in {age(time.time() - lanes.started)}"
    )


@main.command("check")
@config_option
@explained
def check_command(config: str | None) -> None:
    """Say what is wrong with the configuration or with this machine; exit 78 when something is."""
    source = Source(config)
    settings = source.read()
    try:
        running = _master_of(settings.spool) if os.path.isdir(settings.spool) else None
    except OSError:  # the spool is somebody else's
        running = None
    found = ask_status(settings.spool) if running else None
    ours = {address for listener in found.listeners for address in listener.addresses} if found else set()

    def free_or_ours(address: str, port: int) -> str | None:
        place = join_address(address, port)
        return None if place in ours else probe(place)

    findings: Findings = check(settings, source.path, key_lines(source.text()), free_or_ours)
    _say(findings.warnings)
    if findings.errors:
        raise ConfigError(findings.errors)
    click.echo(f"{source.name}: fine" + (f" (the server runs, process {running})" if running else ""))


main.add_command(passwd)
main.add_command(explain)


def _say(warnings: Iterable[object]) -> None:
    for warning in warnings:
        click.echo(f"mtad: warning: {warning}", err=True)
