"""Whether this machine can run a configuration: files, directories, users, ports.

`mtad.configfile.parse` has judged the configuration by itself; `check` looks at the world around it, changes nothing, and
says which key of which file each fault belongs to. Errors keep the server from working; warnings are things that work and
are probably not meant.

Permissions are asked of the kernel when the server will run as whoever runs the check, else computed from the mode bits of
the file and of every directory above it, for ``user`` and its groups; access control lists are not looked at then.

Errors: none; what cannot be found out is a problem too. See also `mtad.config_rules`.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import stat
import time
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from mtad.config import Config
from mtad.config_lines import Path, show
from mtad.config_rules import split_address
from mtad.configfile import line_of
from mtad.errors import ConfigError, Problem
from mtad.net.listening import has_device
from mtad.passwords import Passwords
from mtad.tls.certificates import CertificateFault, Pair, inspect, read_authorities
from mtad.users import Users

#: Asked whether an address and port can be listened on: None when it is free or ours already, else why not.
Probe = Callable[[str, int], str | None]

#: Seconds before the end of a certificate from which on it is worth a warning. Those who renew by machine do so earlier.
_SOON: Final = 14 * 86400


class Findings(msgspec.Struct, frozen=True):
    """What `check` found."""

    errors: tuple[Problem, ...]
    warnings: tuple[Problem, ...]


class _Who(msgspec.Struct, frozen=True):
    """As whom the server will run."""

    name: str
    uid: int
    groups: frozenset[int]


def check(config: Config, filename: str, lines: Mapping[Path, int] | None = None, probe: Probe | None = None) -> Findings:
    """Look whether the machine fits the configuration.

    Args:
        config: the configuration.
        filename: the file it came from, for the messages; "" for the built-in defaults.
        lines: of the keys in that file, from `config_lines.key_lines`.
        probe: asked for every address; None leaves the ports alone.
    """
    checker = _Checker(config, filename, lines or {})
    checker.who()
    checker.directories()
    checker.log()
    checker.users()
    checker.logins()
    checker.credentials()
    checker.certificates()
    checker.listeners(probe)
    return Findings(tuple(checker.errors), tuple(checker.warnings))


class _Checker:
    def __init__(self, config: Config, filename: str, lines: Mapping[Path, int]) -> None:
        self.errors: list[Problem] = []
        self.warnings: list[Problem] = []
        self._config = config
        self._filename = filename
        self._lines = lines
        self._starter = _Who("", os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))
        self._runner = self._starter

    def _problem(self, path: Path, message: str) -> Problem:
        return Problem(self._filename, line_of(self._lines, path), show(path), message)

    def _error(self, path: Path, message: str) -> None:
        self.errors.append(self._problem(path, message))

    def _warning(self, path: Path, message: str) -> None:
        self.warnings.append(self._problem(path, message))

    def who(self) -> None:
        name = self._config.user
        if not name:
            if self._starter.uid == 0:
                self._warning(("user",), "is empty: everything runs as root")
            return
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            if self._starter.uid == 0:
                self._error(("user",), f"there is no user {name!r}")
            return
        if self._starter.uid == 0:
            groups = frozenset(os.getgrouplist(name, entry.pw_gid))
            self._runner = _Who(name, entry.pw_uid, groups)

    def directories(self) -> None:
        config = self._config
        for path, place in (
            (("spool",), config.spool),
            (("local", "mail_root"), config.local.mail_root),
            (("pid_file",), os.path.dirname(config.pid_file)),
        ):
            self._directory(path, place, self._runner)
        if _open_to_all(config.spool):
            self._error(("spool",), f"{config.spool} is writable for everybody")
        if _open_to_all(config.local.mail_root):
            message = f"{config.local.mail_root} is writable for everybody: mail waits where another user made the mailbox"
            self._warning(("local", "mail_root"), message)

    def _directory(self, path: Path, place: str, who: _Who) -> None:
        existing = place
        while not os.path.lexists(existing):
            existing = os.path.dirname(existing)
        if not os.path.isdir(existing):
            self._error(path, f"{existing} is not a directory")
        elif existing != place:
            # What is missing is made at the start, by whoever starts.
            if not _may(self._starter, existing, os.W_OK | os.X_OK):
                self._error(path, f"{place} does not exist and cannot be made")
        elif not _may(who, place, os.R_OK | os.W_OK | os.X_OK):
            self._error(path, f"{place} is not writable{_for(who)}")

    def log(self) -> None:
        to = self._config.log.to
        if to == "syslog" and not os.path.exists("/dev/log"):
            self._error(("log", "to"), "/dev/log does not exist: no syslog runs here")
        if not to.startswith("/"):
            return
        if os.path.isdir(to):
            self._error(("log", "to"), f"{to} is a directory")
        elif os.path.lexists(to):
            if not _may(self._runner, to, os.W_OK):
                self._error(("log", "to"), f"{to} is not writable{_for(self._runner)}")
        elif not os.path.isdir(os.path.dirname(to)):
            self._error(("log", "to"), f"there is no directory {os.path.dirname(to)}")
        else:
            self._directory(("log", "to"), os.path.dirname(to), self._runner)

    def users(self) -> None:
        local = self._config.local
        if os.path.exists(local.users) and not _may(self._runner, local.users, os.R_OK):
            self._error(("local", "users"), f"{local.users} is not readable{_for(self._runner)}")
            return
        try:
            users = Users.load(local.users, local.domains, local.postmaster, fallback=self._config.development)
        except ConfigError as error:
            for problem in error.problems:
                if problem.line is None:
                    self._error(("local", "users"), f"{problem.file}: {problem.message}")
                else:
                    self.errors.append(problem)
            return
        self.warnings += users.table.oddities
        if not users.table.users and local.domains:
            self._warning(("local", "users"), f"{local.users} has no address: only postmaster gets mail")

    def logins(self) -> None:
        place, path = self._config.local.passwords, ("local", "passwords")
        try:
            mode = os.stat(place).st_mode
        except OSError:
            if any(listener.service == "submission" for listener in self._config.listener):
                self._warning(path, f"{place} does not exist: nobody can log in (mtad passwd LOGIN makes it)")
            return
        if mode & (stat.S_IRWXO | stat.S_IWGRP):
            self._warning(path, f"{place} is open to others: chmod 600 it")
        if not _may(self._runner, place, os.R_OK):
            self._error(path, f"{place} is not readable{_for(self._runner)}")
            return
        try:
            Passwords.load(place)
        except ConfigError as fault:
            self.errors += fault.problems

    def credentials(self) -> None:
        place, path = self._config.delivery.credentials, ("delivery", "credentials")
        if place and self._readable(path, place) and os.stat(place).st_mode & (stat.S_IRWXO | stat.S_IWGRP):
            self._error(path, f"{place} is open to others: chmod 640 or 600 it, or it will not be used")

    def certificates(self) -> None:
        config = self._config
        if config.delivery.ca_file:
            path: Path = ("delivery", "ca_file")
            if self._readable(path, config.delivery.ca_file):
                try:
                    read_authorities(config.delivery.ca_file)
                except CertificateFault as fault:
                    self._error(path, str(fault))
        if all(listener.tls == "none" for listener in config.listener):
            return
        for number, names in enumerate(config.tls.pairs):
            base: Path = ("tls", "sni", number - 1) if number else ("tls",)
            if not (config.development and not any(map(os.path.lexists, names))):  # else they are made at the start
                self._certificate(base, Pair(*names))

    def _certificate(self, base: Path, pair: Pair) -> None:
        of_certificate, of_key = (*base, "certificate"), (*base, "key")
        # Both are looked at, so that both faults are told.
        readable = [self._readable(of_certificate, pair.certificate), self._readable(of_key, pair.key)]
        if not all(readable):
            return
        try:
            found = inspect(pair)
        except CertificateFault as fault:
            self._error(of_key if fault.of_key else of_certificate, str(fault))
            return
        now = time.time()
        if found.not_before > now:
            self._warning(of_certificate, f"{pair.certificate} is not valid before {_day(found.not_before)}")
        if found.not_after < now:
            self._warning(of_certificate, f"{pair.certificate} has expired on {_day(found.not_after)}")
        elif found.not_after < now + _SOON:
            self._warning(of_certificate, f"{pair.certificate} expires on {_day(found.not_after)}")
        if os.stat(pair.key).st_mode & stat.S_IROTH:
            self._warning(of_key, f"{pair.key} is readable for everybody")

    def _readable(self, path: Path, place: str) -> bool:
        """Whether the server can read a file, after the start and as its own user; reported when it cannot."""
        if not os.path.exists(place):
            self._error(path, f"{place} does not exist")
        elif not _may(self._runner, place, os.R_OK):
            self._error(path, f"{place} is not readable{_for(self._runner)}")
        else:
            return True
        return False

    def listeners(self, probe: Probe | None) -> None:
        if not self._config.listener:
            self._warning(("listener",), "there is none: no mail will be received")
        for number, listener in enumerate(self._config.listener):
            base: Path = ("listener", number)
            if listener.service == "mx" and not self._config.local.domains:
                self._error(("local", "domains"), f"is empty, and listener {listener.name!r} takes mail for local users")
            if listener.interface:
                if not has_device(listener.interface):
                    self._error((*base, "interface"), f"there is no network device {listener.interface!r}")
                elif self._starter.uid != 0:
                    self._warning((*base, "interface"), "binding to a device may need to be started as root")
            for index, network in enumerate(listener.trusted):
                if ipaddress.ip_network(network).prefixlen == 0:
                    self._warning((*base, "trusted", index), f"{network} is everybody: this is an open relay")
            for index, text in enumerate(listener.address if probe else ()):
                address, port = split_address(text)
                reason = probe(address, port) if probe and port else None
                if reason is not None:
                    self._error((*base, "address", index), f"cannot listen on {text}: {reason}")


def _open_to_all(directory: str) -> bool:
    """Whether everybody may put files there; not one that is not there yet, or was told already."""
    try:
        return bool(os.stat(directory).st_mode & stat.S_IWOTH)
    except OSError:
        return False


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _for(who: _Who) -> str:
    return f" for user {who.name!r}" if who.name else ""


def _may(who: _Who, path: str, wanted: int) -> bool:
    """Whether ``who`` may do ``wanted`` (R_OK, W_OK, X_OK) with ``path``, every directory above it included."""
    if who.uid == os.geteuid():
        return os.access(path, wanted, effective_ids=os.access in os.supports_effective_ids)
    place = os.path.realpath(path)
    if not _allowed(who, place, wanted):
        return False
    while (parent := os.path.dirname(place)) != place:
        if not _allowed(who, parent, os.X_OK):
            return False
        place = parent
    return True


def _allowed(who: _Who, path: str, wanted: int) -> bool:
    """The mode bits of one file or directory; the first of owner, group and others that fits decides."""
    if who.uid == 0:
        return True
    try:
        found = os.stat(path)
    except OSError:
        return False
    if found.st_uid == who.uid:
        bits = found.st_mode >> 6
    elif found.st_gid in who.groups:
        bits = found.st_mode >> 3
    else:
        bits = found.st_mode
    return bits & wanted == wanted
