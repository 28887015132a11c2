"""The table of settings as data: rows of `Setting` in a `Section` for each TOML table, made of `mtad.config`.

What it is for: `mtad.configfile` reads a file with the help of the rows, `mtad.config_values` their values, and
`tools/gendocs` makes pages of them; so a setting is written down in one place only.

Invariants: the rows are as true as the structs, since they are made of their annotations, once. Nothing here does I/O.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec

from mtad.config import Config, Duration, Size

Kind = Literal["text", "path", "list", "integer", "choice", "duration", "size"]

#: The largest number, where the table names none: far above any sense, far below any overflow.
MOST: Final = 1_000_000

_KINDS: Final[dict[Any, Kind]] = {str: "text", int: "integer", Duration: "duration", Size: "size", tuple: "list"}


class Setting(msgspec.Struct, frozen=True):
    """One row of the table. Bounds are inclusive: seconds, octets or plain numbers; for texts and lists the length."""

    name: str
    kind: Kind
    description: str
    default: Any
    """The value when the file has none; `msgspec.NODEFAULT` when the file must have one."""
    choices: tuple[str, ...] = ()
    minimum: float = 0
    maximum: float = MOST

    @property
    def required(self) -> bool:
        """The file must have it."""
        return self.default is msgspec.NODEFAULT


class Section(msgspec.Struct, frozen=True):
    """One TOML table. ``name`` is "" for the top level, else as ``tls.sni``; ``many``: it is an array of tables."""

    name: str
    many: bool
    description: str
    type: type[msgspec.Struct]
    settings: tuple[Setting, ...]


@functools.cache
def sections() -> tuple[Section, ...]:
    """The table as data, the top level first, in the order in which the structs have it."""
    return tuple(_with_subsections("", False, Config))


def subsections(section: Section) -> dict[str, Section]:
    """The tables within a table, by the last part of their names."""
    prefix = f"{section.name}." if section.name else ""
    return {
        other.name.removeprefix(prefix): other
        for other in sections()
        if other.name and other.name.rpartition(".")[0] == section.name
    }


def tables(config: Config, section: Section) -> list[tuple[tuple[str | int, ...], msgspec.Struct]]:
    """The tables that a configuration has of one kind, each with its place, such as ``("listener", 0)``."""
    found: list[tuple[tuple[str | int, ...], msgspec.Struct]] = [((), config)]
    for part in section.name.split(".") if section.name else ():
        inner: list[tuple[tuple[str | int, ...], msgspec.Struct]] = []
        for path, table in found:
            value = getattr(table, part)
            if isinstance(value, tuple):
                inner += [((*path, part, number), item) for number, item in enumerate(value)]
            else:
                inner.append(((*path, part), value))
        found = inner
    return found


def _with_subsections(name: str, many: bool, struct: type[msgspec.Struct]) -> list[Section]:
    found = [_section(name, many, struct)]
    for key, hint in get_type_hints(struct, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            array = get_origin(hint) is tuple
            found += _with_subsections(f"{name}.{key}".lstrip("."), array, get_args(hint)[0] if array else hint)
    return found


def _section(name: str, many: bool, struct: type[msgspec.Struct]) -> Section:
    hints = get_type_hints(struct, include_extras=True)
    defaults = {item.name: item.default for item in msgspec.structs.fields(struct)}
    settings = [_setting(key, hint, defaults[key]) for key, hint in hints.items() if get_origin(hint) is Annotated]
    return Section(name, many, (struct.__doc__ or "").strip(), struct, tuple(settings))


def _setting(name: str, hint: Any, default: Any) -> Setting:
    kind_of, meta = get_args(hint)
    extra = meta.extra or {}
    description = meta.description or ""
    if get_origin(kind_of) is Literal:
        return Setting(name, "choice", description, default, choices=get_args(kind_of))
    kind: Kind = "path" if "path" in extra else _KINDS[get_origin(kind_of) or kind_of]
    least = next((bound for bound in (extra.get("minimum"), meta.ge, meta.min_length) if bound is not None), 0)
    most = next((bound for bound in (extra.get("maximum"), meta.le, meta.max_length) if bound is not None), MOST)
    return Setting(name, kind, description, default, minimum=least, maximum=most)
