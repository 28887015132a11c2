"""The floors of the house: a module imports only from a lower floor or from its own package.

The table below is section 2 of the design. A new module gets its floor here before it gets its first import; a module that
is not in the table fails the test. Standard library modules that would let I/O or the clock into the wrong floor are
fenced in the second table.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2] / "mtad"

#: Modules and packages (below ``mtad.``) by floor. A package stands for everything in it.
FLOORS: Final[tuple[frozenset[str], ...]] = (
    frozenset({"errors", "address", "reply", "envelope", "outcome", "progress", "desk"}),
    frozenset({"smtp", "dsn", "retry", "config", "configfile", "config_lines", "config_rules", "config_values"})
    | {"config_table", "reasons", "queue_causes", "queue_deferrals"},
    frozenset({"spool", "net", "tls", "resolver", "users", "log", "log_sinks", "metrics", "occupancy", "signals", "host"})
    | {"followed", "passwords", "stable", "throttle"},
    frozenset({"nexthop", "policy", "routing", "runtime"}),
    frozenset({"session", "delivery"}),
    frozenset({"listener", "scheduler", "check", "explain"}),
    frozenset({"master", "control", "child_place"}),
    frozenset({"cli"}),
)

#: Who may import from the own floor, and why: rooms that are too small for a package, and one value made of another.
NEIGHBOURS: Final = {
    "progress": {"outcome", "desk"},  # an attempt, and an order, are events
    "retry": {"config", "smtp.hints"},  # a retry policy is a section of the configuration; a server may say when
    "reasons": {"smtp.hints"},  # a server that asks for less
    "queue_causes": {"config", "reasons", "retry"},  # one answer, made of what these say
    "queue_deferrals": {"queue_causes", "reasons", "retry"},
    "configfile": {"config", "config_lines", "config_rules", "config_table", "config_values"},
    # An address is written as in a command.
    "config_rules": {"config", "config_lines", "config_table", "config_values", "smtp.grammar"},
    "config_table": {"config"},  # is made of it
    "config_values": {"config", "config_table"},
    "log": {"log_sinks"},
    # What durable means is said once, for whoever writes.
    "spool.message": {"stable"},
    "spool.queues": {"stable"},
    # What a file says is followed in one way, whatever it says.
    "users": {"followed"},
    "passwords": {"followed", "stable"},
    "throttle": {"occupancy"},  # what counts as one client
    "tls.connection": {"net.connection"},  # it is one, and is made of one
    "tls.server": {"net.connection"},
    "tls.client": {"net.connection"},
    "routing": {"nexthop"},  # a route is what a rule says, looked up
    "master": {"control", "child_place"},  # the questions of the commands that the master answers; what it keeps of a child
}

#: Which of ours alone may import a module of the world's.
ONLY: Final = {"socket": "net", "ssl": "tls", "dns": "resolver"}

#: What the values and the pure functions of floors 0 and 1 never import: they get the time and do no I/O.
IMPURE: Final = frozenset({"socket", "ssl", "os", "select", "selectors", "threading", "logging", "time", "subprocess"})

#: The commands that work while the daemon is down, and what they may import of ours besides the values of floor 0.
DAEMON_DOWN: Final = ("cli.mtaq", "cli.mtad_flush")
ENOUGH: Final = (
    FLOORS[0]
    | {"spool", "config", "config_table", "config_values", "configfile", "net", "cli"}
    | {"nexthop", "reasons", "queue_causes", "queue_deferrals"}  # pure: what to say about what was found
)


def modules() -> Iterator[tuple[str, Path]]:
    """The modules of mtad by their names below ``mtad.``; the package itself, which all may import, left out."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            yield name, path


MODULES: Final = dict(modules())


def imported(source: str, package: str = "") -> Iterator[str]:
    """Full names of all that a module imports anywhere in it, also in functions and under ``TYPE_CHECKING``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"__import__", "importlib.import_module"}:
            yield "importlib"


def ours(name: str) -> str | None:
    """What an import means below ``mtad.``; None when it is not of mtad, or is mtad's own root, as for VERSION."""
    if not name.startswith("mtad."):
        return None
    below = name.removeprefix("mtad.")
    while below and below not in MODULES:
        below = below.rpartition(".")[0]
    return below or None


def top(name: str) -> str:
    """The package or module that a floor knows."""
    return name.split(".", maxsplit=1)[0]


def floor(name: str) -> int:
    """The floor of a module."""
    for number, names in enumerate(FLOORS):
        if top(name) in names:
            return number
    raise LookupError(
        f"mtad.{name} has no floor. Decide what it is for, find the floor in DESIGN section 2 where that belongs, and "
        f"enter `{top(name)}` into FLOORS in {Path(__file__).name}."
    )


def imports_of(name: str) -> set[str]:
    """Full names of all imports of one of our modules."""
    path = MODULES[name]
    package = f"mtad.{name}" if path.name == "__init__.py" else f"mtad.{name}".rpartition(".")[0]
    return set(imported(path.read_text(), package))


def trespasses(name: str, imports: set[str]) -> list[str]:
    """What is wrong with a module's imports, for a human."""
    mine, wrong = floor(name), []
    for target in sorted({target for full in imports if (target := ours(full))}):
        if top(target) == top(name) or target in NEIGHBOURS.get(name, ()):
            continue
        theirs = floor(target)
        if theirs >= mine:
            wrong.append(f"floor {mine} imports mtad.{target}, which is on floor {theirs}")
    for full in sorted(imports):
        owner = ONLY.get(top(full))
        if owner is not None and top(name) != owner:
            wrong.append(f"imports {top(full)}, which only mtad.{owner} may")
        if mine <= 1 and top(full) in IMPURE:
            wrong.append(f"floor {mine} imports {top(full)}: I/O and time are for the floors above")
        if top(full) == "importlib" and full != "importlib.metadata.version":
            wrong.append("imports by name, which no test can follow")
    return wrong


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_a_floor_and_keeps_to_it(name: str) -> None:
    assert trespasses(name, imports_of(name)) == []


@pytest.mark.parametrize("command", DAEMON_DOWN)
def test_a_command_for_a_daemon_that_is_down_needs_only_spool_and_config(command: str) -> None:
    if command not in MODULES:
        pytest.skip(f"mtad.{command} is not written yet")
    seen: set[str] = set()
    todo = [command]
    while todo:
        name = todo.pop()
        seen.add(name)
        targets = {target for full in imports_of(name) if (target := ours(full))}
        assert {target for target in targets if top(target) not in ENOUGH} == set(), (
            f"mtad.{name}, imported by mtad.{command}"
        )
        todo += [target for target in targets if top(target) == "cli" and target not in seen]


def test_the_root_imports_nothing_of_ours() -> None:
    assert [name for name in imported((ROOT / "__init__.py").read_text(), "mtad") if name.startswith("mtad.")] == []


def test_no_name_has_two_floors_and_no_neighbours_form_a_cycle() -> None:
    names = [name for names in FLOORS for name in names]
    assert len(names) == len(set(names))
    for name, others in NEIGHBOURS.items():
        assert all(floor(other) == floor(name) and name not in NEIGHBOURS.get(other, ()) for other in others)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_neighbour_that_may_be_imported_is(name: str) -> None:
    assert NEIGHBOURS[name] <= {target for full in imports_of(name) if (target := ours(full))}


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("outcome", "from mtad.smtp import grammar", "floor 0 imports mtad.smtp"),
        ("outcome", "import mtad.config", "floor 0 imports mtad.config, which is on floor 1"),
        ("session", "from mtad.delivery.transport import Task", "which is on floor 4"),
        ("delivery", "from mtad import session", "floor 4 imports mtad.session"),
        ("delivery.transport", "from ..session import state", "floor 4 imports mtad.session"),
        ("retry", "def f():\n    import time", "floor 1 imports time"),
        ("errors", "from os.path import join", "floor 0 imports os"),
        ("spool.queues", "import socket", "which only mtad.net may"),
        ("net", "import ssl", "which only mtad.tls may"),
        ("routing", "import dns.resolver", "which only mtad.resolver may"),
        ("spool.queues", "from mtad.net import connection", "floor 2 imports mtad.net"),
        ("spool.queues", "__import__('socket')", "imports by name"),
        ("spool.queues", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mtad import policy", "floor 3"),
    ],
)
def test_a_trespass_is_seen(name: str, source: str, complaint: str) -> None:
    imports = set(imported(source, f"mtad.{name}".rpartition(".")[0]))
    assert any(complaint in wrong for wrong in trespasses(name, imports)), trespasses(name, imports)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("spool.queues", "from mtad.spool.message import OpenMessage\nfrom mtad import VERSION\nimport os, mtad.errors"),
        ("spool.queues", "from . import message\nfrom .message import OpenMessage\nfrom ..errors import MtadError"),
        ("tls", "import ssl"),
        ("net.connection", "import socket"),
        ("resolver", "import dns.resolver\nfrom dns import rdatatype"),
    ],
)
def test_what_is_allowed_is_not_complained_about(name: str, source: str) -> None:
    assert trespasses(name, set(imported(source, f"mtad.{name}".rpartition(".")[0]))) == []


def test_a_module_without_a_floor_is_told_what_to_do() -> None:
    with pytest.raises(LookupError, match="enter `milter` into FLOORS"):
        floor("milter.protocol")
