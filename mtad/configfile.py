"""The configuration file: TOML text in, `mtad.config.Config` out, or everything that is wrong with it.

`parse` reads a file's text, `dump` writes one that means the same, `development` is the configuration of a run without any.
What the settings are is in `mtad.config`, what they may be beyond their type in `mtad.config_rules`. No I/O: the caller
reads the file.

Errors: ConfigError holds every fault, each with file, line and key; only a fault of TOML itself hides the others.
Standards: TOML 1.0.0. See also docs/configuration.md.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from mtad.config import Config, Listener, Local, Tls
from mtad.config_lines import Path, key_lines, show
from mtad.config_rules import check_rules, is_domain, is_user_name
from mtad.config_table import Section, Setting, sections, subsections, tables
from mtad.config_values import decode, value_text
from mtad.errors import ConfigError, Problem

_TOML_LINE: Final = re.compile(r"\(at line ([0-9]+),")

# The value of a setting that had none or a bad one; its problem is on the list, so that no rule looks at it.
_STAND_IN: Final[dict[str, Any]] = {"text": "", "path": "", "list": (), "integer": 0, "choice": ""}


def parse(text: str, filename: str) -> Config:
    """Read a configuration. ``filename`` is for the messages only.

    Raises:
        ConfigError: the text is not TOML, or settings are unknown, missing, of a wrong type, out of range, or do not go
            together; ``problems`` has all of them in the order of the lines.
    """
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Beside TOMLDecodeError: a number of thousands of digits, brackets thousands deep.
        match = _TOML_LINE.search(str(error))
        line = int(match[1]) if match else text.count("\n") + 1
        raise ConfigError([Problem(filename, line, "", f"not TOML: {error}")]) from None
    reader = _Reader(filename, key_lines(text))
    config = reader.config(table)
    check_rules(config, reader.fault)
    if reader.problems:
        raise ConfigError(sorted(reader.problems, key=lambda problem: (problem.line or 0, problem.key)))
    domains = tuple(dict.fromkeys(domain.lower() for domain in config.local.domains))
    return replace(config, local=replace(config.local, domains=domains))


def line_of(lines: Mapping[Path, int], path: Path) -> int | None:
    """The line of a key, else of the nearest table around it, else None. ``lines`` is from `config_lines.key_lines`."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)


class _Reader:
    """Turns tables into structs and collects what is wrong on the way."""

    def __init__(self, filename: str, lines: Mapping[Path, int]) -> None:
        self.problems: list[Problem] = []
        self._filename = filename
        self._lines = lines
        self._bad: set[Path] = set()

    def fault(self, path: Path, message: str, also: Path = ()) -> None:
        """Note a problem, unless the same key, a table around it, or ``also`` has one already."""
        if also in self._bad or any(path[:length] in self._bad for length in range(1, len(path) + 1)):
            return
        self._bad.add(path)
        self.problems.append(Problem(self._filename, line_of(self._lines, path), show(path), message))

    def config(self, table: dict[str, Any]) -> Config:
        found = self._table(sections()[0], (), table)
        assert isinstance(found, Config)
        return found

    def _table(self, section: Section, base: Path, table: dict[str, Any]) -> msgspec.Struct:
        within = subsections(section)
        values = self._settings(section, base, table, within)
        for key, other in within.items():
            value = table.get(key)
            if value is None:
                continue
            if other.many:
                values[key] = self._many(other, (*base, key), value)
            elif isinstance(value, dict):
                values[key] = self._table(other, (*base, key), value)
            else:
                self.fault((*base, key), f"is a table: write [{other.name}] and its settings below")
        return section.type(**values)

    def _many(self, section: Section, path: Path, value: object) -> tuple[Any, ...]:
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.fault(path, f"is a list of tables: write [[{section.name}]] with double brackets")
            return ()
        return tuple(self._table(section, (*path, number), item) for number, item in enumerate(value))

    def _settings(
        self, section: Section, base: Path, table: dict[str, Any], nested: Mapping[str, Section]
    ) -> dict[str, Any]:
        known = {setting.name: setting for setting in section.settings}
        for key in table:
            if key not in known and key not in nested:
                self.fault((*base, key), f"unknown setting{_proposal(key, [*known, *nested], section)}")
        values: dict[str, Any] = {}
        for name, setting in known.items():
            if name in table:
                values[name] = self._value(setting, (*base, name), table[name])
            elif setting.required:
                self.fault((*base, name), "is missing, and has no default")
                values[name] = _STAND_IN[setting.kind]
        return values

    def _value(self, setting: Setting, path: Path, value: object) -> Any:
        try:
            return decode(setting, value)
        except ValueError as error:
            self.fault(path, str(error))
            return _STAND_IN[setting.kind] if setting.required else setting.default


def _proposal(key: str, known: list[str], section: Section) -> str:
    """A hint for an unknown key: the setting that was meant, here or in another table."""
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    for other in sections():
        if other is not section and any(setting.name == key for setting in other.settings):
            place = "before the first table" if not other.name else f"in [{other.name}]"
            return f"; it belongs {place}"
    return ""


def dump(config: Config) -> str:
    """The whole configuration as a TOML text that `parse` reads into an equal one."""
    parts = []
    for section in sections():
        for _, table in tables(config, section):
            head = f"[[{section.name}]]\n" if section.many else f"[{section.name}]\n" if section.name else ""
            rows = [f"{row.name} = {value_text(getattr(table, row.name))}\n" for row in section.settings]
            parts.append(head + "".join(rows))
    return "\n".join(parts)


def development(hostname: str, spool_base: str, user: str = "root") -> Config:
    """The configuration of a run without a file: everything below the spool, nothing that needs a privilege.

    Mail for the machine's name and for ``localhost`` is local, so that a first ``RCPT TO:<me@localhost>`` works. The users
    file may be missing as long as these defaults hold; ``user`` then has the only mailbox, see `mtad.users`.

    Args:
        hostname: the machine's name; what is no domain name becomes ``localhost``.
        spool_base: absolute path of the spool directory.
        user: the name of who runs it: gets postmaster's mail.
    """
    name = hostname.lower() if is_domain(hostname) else "localhost"
    spool = spool_base.rstrip("/")
    return Config(
        hostname=name,
        spool=spool,
        user="",
        pid_file=f"{spool}/mtad.pid",
        local=Local(
            domains=tuple(dict.fromkeys((name, "localhost"))),
            mail_root=f"{spool}/mail",
            users=f"{spool}/users",
            passwords=f"{spool}/passwords",
            postmaster=user if is_user_name(user) else "root",
        ),
        listener=(
            Listener(name="inbound", service="mx", address=("127.0.0.1:2525", "[::1]:2525"), tls="starttls"),
            Listener(name="relay", service="relay", address=("127.0.0.1:2526", "[::1]:2526"), tls="starttls"),
        ),
        tls=Tls(certificate=f"{spool}/cert.pem", key=f"{spool}/key.pem"),
    )
