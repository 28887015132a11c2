"""The documents say what is there: links lead somewhere, commands and files exist, tables agree with the code."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
import pytest

from mtad import VERSION
from mtad.address import Address
from mtad.cli import mtad, mtad_flush, mtaq
from mtad.config import Limits
from mtad.policy import Policy
from mtad.session.commands import COMMANDS, dispatch
from mtad.session.state import Client, Site, State, open_session
from mtad.smtp.grammar import Command
from mtad.spool.queues import Queue
from tests.unit.test_floors import MODULES, floor

ROOT: Final = Path(__file__).parents[2]
NAMES: Final = (
    "README.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/configuration.md",
    "docs/operating.md",
    "docs/reliability.md",
    "docs/speed.md",
    "docs/standards.md",
    "docs/tests.md",
    "init/README.md",
    "spool/README.md",
)
#: What the README calls missing as long as it is, and the keyword with which a server offers it (RFC 5321 section 4.1.1.1).
NOT_YET: Final = {"DSN": "DSN", "SMTPUTF8": "SMTPUTF8", "CHUNKING": "CHUNKING"}
#: What depends on the listener's settings, and is offered where they are right.
ON_CONDITION: Final = {"STARTTLS", "AUTH"}
PROGRAMS: Final[dict[str, click.Command]] = {"mtad": mtad.main, "mtaq": mtaq.main, "mtad-flush": mtad_flush.main}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(name: str) -> set[str]:
    """The headings of a page as a link names them."""
    titles = re.findall(r"^#+ (.+)$", text(name), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def section(name: str, title: str) -> str:
    """What stands below a heading, up to the next of its level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text(name), re.M | re.S)
    assert found is not None, title
    return found[2]


def table(page: str) -> list[list[str]]:
    """The cells of all rows of tables, their headings left out."""
    rows = re.findall(r"^\|(.+)\|$", page, re.M)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    heads = {number - 1 for number, row in enumerate(cells) if all(set(cell) <= {"-"} for cell in row)}
    return [row for number, row in enumerate(cells) if number not in heads and not all(set(cell) <= {"-"} for cell in row)]


def commands(name: str) -> Iterator[list[str]]:
    """Every command that a page tells to type, in blocks, or between backticks, as words."""
    page = text(name)
    lines = re.findall(r"^ {4,}(\S.*)$", page, re.M) + re.findall(r"`([^`\n]+)`", page)
    for line in lines:
        try:
            words = shlex.split(line)
        except ValueError:
            continue  # a picture
        if words and words[0].rpartition("/")[2] in PROGRAMS:
            yield [words[0].rpartition("/")[2], *words[1:]]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text(name)):
        path, _, anchor = target.partition("#")
        assert "://" not in target, f"{target}: pages of others move; name them"
        there = (ROOT / name).parent / path if path else ROOT / name
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(str(there.resolve().relative_to(ROOT))), target


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name: str) -> None:
    places = r"(?<![\w/.])((?:tools|init|docs|tests|spool|mtad|\.ci)/[\w./-]*\w)"
    # The log names programs in this way.
    programs = set(re.findall(r"mtad/\w+(?=\[)", text(name)))
    for found in set(re.findall(places, text(name))) - programs:
        if re.fullmatch(r"spool/\w+(\.(pid|pem))?", found):
            continue  # what a running server makes there
        # A module may be named by its place in the package.
        assert any((base / found).exists() for base in (ROOT, ROOT / "mtad")), found


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist_with_their_options(name: str) -> None:
    for program, *words in commands(name):
        command = PROGRAMS[program]
        if isinstance(command, click.Group) and words and re.fullmatch("[a-z]+", words[0]):
            assert words[0] in command.commands, words
            command = command.commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "--version"}
        for word in words:
            assert not word.startswith("-") or word in known, (program, words)


def test_the_readme_shows_both_commands_and_every_command_of_mtad_is_told_somewhere() -> None:
    assert "\n    tools/demo\n" in text("README.md")
    assert "\n    tools/test\n" in text("README.md")
    told = {(program, words[0]) for name in NAMES for program, *words in commands(name) if words}
    assert {("mtad", name) for name in mtad.main.commands} <= told


def row_for(module: str) -> str:
    """A row for a module that has none yet, to be put into words that say what it is, not what it does."""
    summary = (ast.get_docstring(ast.parse(MODULES[module].read_text())) or "").partition("\n")[0]
    return f"| {floor(module)} | `{module}` | {summary} |"


def test_every_module_stands_in_the_architecture_on_its_floor() -> None:
    written: dict[str, int] = {}
    for row in table(section("docs/architecture.md", "The floors")):
        for name in re.findall(r"`([\w.]+)`", row[1]):
            assert name not in written, f"{name} stands there twice"
            assert row[2], name
            written[name] = int(row[0])
    packages = {name.rpartition(".")[0] for name in MODULES if "." in name}
    expected = {name: floor(name) for name in MODULES if name not in packages}
    lacking = expected.keys() - written.keys()
    assert not lacking, "no row for\n" + "\n".join(map(row_for, sorted(lacking)))
    gone = sorted(written.keys() - expected.keys())
    assert not gone, f"rows of modules that are gone: {gone}"
    assert written == expected


def test_the_table_of_session_states_is_that_of_the_code() -> None:
    head = f"| command | {' | '.join(state.name for state in State)} |"
    rows = [
        f"| {verb} |" + "".join(" yes |" if state in row.states else " |" for state in State)
        for verb, row in COMMANDS.items()
    ]
    expected = "\n".join([head, "|-" * (len(State) + 1) + "|", *rows])
    assert expected in section("docs/architecture.md", "The states of a session"), f"the table is now\n{expected}"


class NoUsers:
    """Nobody has a mailbox."""

    def lookup(self, _address: Address) -> str | None:
        return None


def offers() -> set[str]:
    """What the server offers in its reply to EHLO."""
    site = Site("mx.example.org", Limits(), Policy(NoUsers(), ("example.org",)))
    answer = dispatch(open_session(site, Client("192.0.2.1")), Command("EHLO", "client.test"))
    return {line.split()[0] for line in answer.lines[1:]}


def test_what_is_not_there_yet_is_said_and_what_is_there_is_not() -> None:
    missing = " ".join(re.findall(r"\*\*(.+?)\*\*", section("README.md", "What this version does not do yet")))
    offered = offers()
    for word, keyword in NOT_YET.items():
        said = re.search(rf"\b{word}\b", missing) is not None
        assert said is (keyword not in offered), f"README says that {word} is missing: {said}; offered: {sorted(offered)}"
    told = re.search(r"IPv6\. ([A-Z0-9, ]+)\.", " ".join(text("CHANGELOG.md").split()))
    assert told is not None
    assert set(told[1].split(", ")) == offered | ON_CONDITION, "the extensions in CHANGELOG.md, under Receiving"


def test_the_changelog_knows_this_version() -> None:
    first = re.search(r"^## (\S+)", text("CHANGELOG.md"), re.M)
    assert first is not None
    assert first[1] == VERSION


def test_warnings_that_are_explained_are_those_of_the_code() -> None:
    source = "\n".join(path.read_text() for path in MODULES.values())
    source = re.sub(r'"\s*\n?\s*f?"', "", source)  # texts that are written in several pieces
    explained = [row[0].strip("`") for row in table(section("docs/operating.md", "What the log says"))]
    pieces = [
        piece.strip() for line in explained if "warning: " in line for piece in line.split("warning: ")[1].split("...")
    ]
    assert len(pieces) > 6
    for piece in pieces:
        # A number may be a setting of the code.
        assert re.search(re.sub(r"\d+\\ s", lambda _: r"\{.*?\} s", re.escape(piece)), source), piece


def test_the_skeleton_of_the_spool_is_complete_and_explained() -> None:
    page = text("spool/README.md")
    for queue in Queue:
        assert (ROOT / "spool" / queue.value / ".gitkeep").read_bytes() == b""
        assert f"| `{queue.value}/` |" in page
