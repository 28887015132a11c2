"""docs/standards.md: each RFC with yes, partly or no, and where in the code it is cited; and what does not agree.

Two sources: the table `standards.toml`, which says what is there and what is missing, and the citations in comments and
docstrings of the code, which say where. Neither can be wrong alone for long: `problems` finds an RFC that is cited and not
in the table, one that the table has and nobody cites, a section that its document does not have.
"""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from tools.lib.citations import Citation, between, find

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGE: Final = ROOT / "mtad"
TABLE: Final = Path(__file__).with_name("standards.toml")
PAGE: Final = ROOT / "docs" / "standards.md"

_RANGE: Final = re.compile(r"((?:\d+\.)*)(\d+)(?:-(\d+))?")

_INTRO: Final = """\
# Standards

<!-- Made by tools/standards from tools/lib/standards.toml and the citations in mtad/: change those, and run it again. -->

What mtad does of which RFC. "yes" means that everything is there that a server or client of this kind has to do; "partly"
says what is missing. Below the table stands where in the code a document is cited, with the sections.
"""


class Standard(msgspec.Struct, frozen=True):
    """A row of the table; see there."""

    number: int
    title: str
    status: Literal["yes", "partly", "no"]
    note: str = ""
    sections: str = ""

    @property
    def known_sections(self) -> frozenset[str]:
        """All sections of the document; none when nobody has looked them up."""
        return frozenset(expand(self.sections))


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rfc: tuple[Standard, ...]


class BadTable(Exception):
    """The table cannot be used; the text says why."""


def expand(text: str) -> Sequence[str]:
    """The sections that a text such as ``"1-3 2.1 2.3.1-11"`` stands for.

    Raises:
        BadTable: it is none.
    """
    found: list[str] = []
    for word in text.split():
        match = _RANGE.fullmatch(word)
        if match is None:
            raise BadTable(f"not a section: {word}")
        first = match[1] + match[2]
        found.append(first)
        if match[3] is not None:
            last = match[1] + match[3]
            found += [*between(first, last), last]
    return found


def load(path: Path = TABLE) -> Mapping[int, Standard]:
    """Read the table.

    Raises:
        BadTable: it cannot be read, is not in order, has a row twice, or does not say what is missing.
    """
    try:
        rows = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _Table).rfc
    except (ValueError, msgspec.MsgspecError) as fault:
        raise BadTable(f"{path.name}: {fault}") from fault
    numbers = [row.number for row in rows]
    if numbers != sorted(set(numbers)):
        raise BadTable(f"{path.name}: the rows are not in the order of their numbers, or one is there twice")
    for row in rows:
        if row.status == "partly" and not row.note:
            raise BadTable(f"{path.name}: RFC {row.number} does not say what is missing")
        expand(row.sections)
    return {row.number: row for row in rows}


def cited(package: Path, table: Mapping[int, Standard]) -> Sequence[Citation]:
    """All citations in the code, in the order of its files."""
    return [citation for path in sorted(package.rglob("*.py")) for citation in find(path, table)]


def problems(table: Mapping[int, Standard], citations: Iterable[Citation], root: Path) -> Sequence[str]:
    """What does not agree, one line each."""
    found: list[str] = []
    seen: set[int] = set()
    for citation in citations:
        place = f"{citation.path.relative_to(root)}:{citation.line}"
        row = table.get(citation.rfc)
        if row is None:
            found.append(f"{place}: RFC {citation.rfc} is not in {TABLE.name}")
            continue
        seen.add(citation.rfc)
        sections = row.known_sections
        found += [
            f"{place}: RFC {citation.rfc} has no section {section}"
            for section in citation.sections
            if sections and section not in sections
        ]
    found += [
        f"{TABLE.name}: RFC {row.number} is said to be there ({row.status}), and nothing in the code cites it"
        for row in table.values()
        if row.status != "no" and row.number not in seen
    ]
    return found


def render(table: Mapping[int, Standard], citations: Iterable[Citation], package: Path) -> str:
    """The page."""
    places: dict[int, dict[str, set[str]]] = {}
    for citation in citations:
        module = ".".join(citation.path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        places.setdefault(citation.rfc, {}).setdefault(module, set()).update(citation.sections)
    count = {status: sum(row.status == status for row in table.values()) for status in ("yes", "partly", "no")}
    lines = [_INTRO, f"{count['yes']} yes, {count['partly']} partly, {count['no']} no.", ""]
    lines += ["| RFC | what it is | here | |", "|-|-|-|-|"]
    lines += [f"| {row.number} | {row.title} | {row.status} | {row.note} |" for row in table.values()]
    lines += ["", "## Where it is cited", ""]
    for number, modules in sorted(places.items()):
        told = "; ".join(
            f"`{module}` {', '.join(sorted(sections, key=_in_order))}".rstrip()
            for module, sections in sorted(modules.items())
        )
        item = f"- **{number}**: {told}"
        lines += textwrap.wrap(item, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _in_order(section: str) -> list[int]:
    return [int(number) for number in section.split(".")]
