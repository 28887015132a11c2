"""Becoming a daemon: the command waits until the server is up, or passes on why it is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import click
import daemon
import msgspec

from mtad import log
from mtad.cli.common import EX_CONFIG
from mtad.errors import ConfigError, MtadError
from mtad.host import words


class _Verdict(msgspec.Struct):
    """What the daemon tells the command that started it."""

    code: int
    text: str = ""


def detach(serve: Callable[[Callable[[], None]], None]) -> None:
    """Run ``serve`` as a daemon. It gets a function to call once the server is ready.

    Ends the command with 0 then, and with the server's own exit code and words when it could not start.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _become_daemon(serve, writing)
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)  # the first of the two forks of a daemon
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.readline()
    try:
        verdict = msgspec.json.decode(answer, type=_Verdict)
    except msgspec.MsgspecError:
        verdict = _Verdict(1, "the server died before it was ready; see the log")
    for line in verdict.text.splitlines():
        click.echo(f"mtad: {line}", err=True)
    sys.exit(verdict.code)


def _become_daemon(serve: Callable[[Callable[[], None]], None], writing: int) -> None:
    told = False

    def tell(verdict: _Verdict) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(writing, msgspec.json.encode(verdict) + b"\n")
            os.close(writing)

    def leave_to_the_master() -> None:
        if not told:
            os.close(writing)

    # Without its default a caller whose standard input is a socket would be taken for inetd, and waited for for ever.
    with daemon.DaemonContext(files_preserve=[writing], umask=0o077, working_directory="/", detach_process=True):
        os.register_at_fork(after_in_child=leave_to_the_master)
        try:
            serve(lambda: tell(_Verdict(0)))
        except ConfigError as fault:
            tell(_Verdict(EX_CONFIG, str(fault)))
        except (MtadError, OSError) as fault:
            tell(_Verdict(1, words(fault)))
        except Exception as bug:
            log.panic("master ends", bug)
            tell(_Verdict(1, f"internal error: {bug!r}; see the log"))
