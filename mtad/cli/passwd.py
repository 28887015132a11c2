"""``mtad passwd``: who may log in, and with which password.

On a terminal the password is asked for twice and not shown; from a pipe it is the first line. Nothing of it is left on a
command line, in a history, or in the file, which holds keys only (`mtad.passwords`).
"""

from __future__ import annotations

import sys

import click

from mtad import host
from mtad.cli.common import Source, config_option, explained, fail
from mtad.passwords import change_password, make_keys
from mtad.smtp.sasl import SaslFault


@click.command()
@config_option
@click.option("--delete", is_flag=True, help="Take the login away.")
@click.argument("login")
@explained
def passwd(config: str | None, login: str, delete: bool) -> None:
    """Set the password of LOGIN, or take LOGIN away. A running server notices by itself.

    LOGIN may send as the user of the same name, or as the owner of the address when it is one. The password is asked for
    twice on a terminal; else it is the first line of the standard input.
    """
    settings = Source(config).read()
    path = settings.local.passwords
    try:
        if delete:
            if not change_password(path, login, None):
                fail(f"nobody logs in as {login!r} ({path})")
            click.echo(f"{login} may no longer log in")
            return
        account = host.account(settings)
        owner = (account.pw_uid, account.pw_gid) if account is not None else None
        there = change_password(path, login, make_keys(_ask()), owner)
    except SaslFault as fault:
        fail(f"not fit for use: {fault}")
    click.echo(f"{login} has a new password" if there else f"{login} may log in now")


def _ask() -> str:
    if sys.stdin.isatty():
        password: str = click.prompt("Password", hide_input=True, confirmation_prompt="Once more")
        return password
    line = sys.stdin.buffer.readline()
    if not line:
        fail("no password: the standard input is empty")
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        fail("the password is not UTF-8")
