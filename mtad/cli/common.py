"""What the commands share: finding the configuration, saying what is wrong, exit codes.

Exit codes: 0 fine, 1 failed, 2 usage, 78 bad configuration (EX_CONFIG of sysexits.h).
"""

from __future__ import annotations

import getpass
import io
import os
import sys
import tomllib
from collections.abc import Callable
from functools import wraps
from typing import Final, NoReturn, ParamSpec, TypeVar

import click

from mtad import VERSION
from mtad.config import Config
from mtad.configfile import development, parse
from mtad.errors import ConfigError, MtadError, Problem
from mtad.net.listening import host_name

EX_CONFIG: Final = 78
CONFIG_FILE: Final = "/etc/mtad/mtad.toml"
#: What stands for the file's name when there is none.
DEVELOPMENT: Final = "development defaults"

P = ParamSpec("P")
R = TypeVar("R")


class Source:
    """Where the configuration comes from; reads it as often as asked."""

    def __init__(self, given: str | None) -> None:
        """``given`` is the argument of ``--config``, or None."""
        path = given or os.environ.get("MTAD_CONFIG") or (CONFIG_FILE if os.path.exists(CONFIG_FILE) else "")
        self.path = os.path.abspath(path) if path else ""
        self._base = os.path.abspath("spool")

    @property
    def name(self) -> str:
        """For messages."""
        return self.path or DEVELOPMENT

    def text(self) -> str:
        """The file's text; "" for the development defaults.

        Raises:
            ConfigError: it cannot be read.
        """
        if not self.path:
            return ""
        try:
            with open(self.path, encoding="utf-8") as file:
                return file.read()
        except OSError as fault:
            raise ConfigError([Problem(self.path, None, "", f"cannot be read: {fault.strerror}")]) from None
        except UnicodeDecodeError as fault:
            raise ConfigError([Problem(self.path, None, "", f"is not UTF-8: {fault.reason}")]) from None

    def read(self) -> Config:
        """The configuration.

        Raises:
            ConfigError: it is not fit for use; each fault with file, line and key.
        """
        if not self.path:
            return development(host_name(), self._base, _user())
        return parse(self.text(), self.path)

    def spool(self) -> str:
        """Where the spool is, also while other settings have faults: a running server must be seen and ended even then.

        Raises:
            ConfigError: not even that can be told.
        """
        try:
            return self.read().spool
        except ConfigError as faults:
            try:
                spool = tomllib.loads(self.text()).get("spool", Config(hostname="").spool)
            except tomllib.TOMLDecodeError:
                raise faults from None
            if not isinstance(spool, str) or not os.path.isdir(spool):
                raise
            return spool


def config_option(command: Callable[P, R]) -> Callable[P, R]:
    """Give a command ``-c/--config``; it is called with ``config: str | None``."""
    return click.option(
        "-c",
        "--config",
        metavar="FILE",
        help=f"The configuration; else $MTAD_CONFIG, else {CONFIG_FILE}, else development defaults in ./spool.",
    )(command)


def version_option(command: Callable[P, R]) -> Callable[P, R]:
    """Give a command ``--version``."""
    return click.version_option(VERSION, message="mtad %(version)s")(command)


def fail(message: str, code: int = 1) -> NoReturn:
    """Say what is wrong, one fault a line, and end the command."""
    for line in message.splitlines():
        click.echo(f"mtad: {line}", err=True)
    sys.exit(code)


def _user() -> str:
    """Who runs this; in a container there may be no name for the number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _prepare_output() -> None:
    """Print whatever there is to be printed: without an output (``>&-``), and in one that lacks some characters."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # to the end
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def explained(command: Callable[P, R]) -> Callable[P, R]:
    """Turn the failures of a command into one line each and an exit code, instead of a traceback."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        _prepare_output()
        try:
            return command(*args, **kwargs)
        except ConfigError as fault:
            fail(str(fault), EX_CONFIG)
        except MtadError as fault:
            fail(str(fault))
        except BrokenPipeError:
            # The reader of our output has seen enough (mtaq | head); nothing must be flushed into it any more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as fault:
            fail(f"{fault.filename}: {fault.strerror}" if fault.filename else fault.strerror or str(fault))

    return wrapper
