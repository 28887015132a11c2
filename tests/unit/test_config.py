"""The table of settings: complete, documented, used, and the documents made from it fresh."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from mtad.config import Config
from mtad.config_table import Setting, sections, subsections
from mtad.config_values import decode, duration, duration_text, size, size_text
from mtad.configfile import parse

ROOT = Path(__file__).parent.parent.parent

#: Settings that the rules and the check look at, which is no use yet; those of the table itself do not count either.
NOT_USERS = {"config.py", "config_lines.py", "config_rules.py", "config_values.py", "configfile.py", "check.py"}


def every_setting() -> list[tuple[str, Setting]]:
    return [(f"{section.name}.{row.name}".lstrip("."), row) for section in sections() for row in section.settings]


def test_every_field_of_every_struct_is_in_the_table() -> None:
    names = {name for name, _ in every_setting()}
    assert {name for name in names if "." not in name} < {field.name for field in msgspec.structs.fields(Config)}
    for section in sections():
        fields = {field.name for field in msgspec.structs.fields(section.type)}
        assert fields == {row.name for row in section.settings} | subsections(section).keys()
    assert {"tls", "tls.sni"} <= {section.name for section in sections()}


def test_every_setting_and_section_is_described() -> None:
    assert all(section.description.endswith(".") for section in sections())
    assert [name for name, row in every_setting() if not row.description.endswith(".")] == []


def test_every_default_is_within_its_bounds() -> None:
    for name, row in every_setting():
        if row.kind in {"integer", "duration", "size"}:
            assert row.minimum <= row.default <= row.maximum, name
        elif row.kind == "choice" and not row.required:
            assert row.default in row.choices, name


def test_every_setting_is_used() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "mtad").rglob("*.py") if path.name not in NOT_USERS)
    unused = {name for name, row in every_setting() if not re.search(rf"[.\"]{row.name}\b", code)}
    assert unused == set()


def test_the_documents_are_fresh() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gendocs"), "--check"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_every_setting_is_in_the_reference_and_the_example() -> None:
    reference = (ROOT / "docs" / "configuration.md").read_text()
    example = (ROOT / "init" / "mtad.toml.example").read_text()
    for name, row in every_setting():
        assert f"| `{row.name}` |" in reference, name
        assert re.search(rf"^#? ?{row.name} = ", example, re.M), name


@pytest.mark.parametrize("uncomment", [False, True])
def test_the_example_is_a_configuration(uncomment: bool) -> None:
    example = (ROOT / "init" / "mtad.toml.example").read_text()
    plain = parse(example, "mtad.toml.example")
    if uncomment:
        example = re.sub(r"^#(\w+ = )", r"\1", example, flags=re.M)
    config = parse(example, "mtad.toml.example")
    assert config == plain
    assert [listener.service for listener in config.listener] == ["mx", "relay"]
    assert config.local.domains == ("example.org",)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300s", 300),
        ("0s", 0),
        ("5m", 300),
        ("4h", 14400),
        ("5d", 432000),
        ("1w", 604800),
        ("250ms", 0.25),
        ("1.5 h", 5400),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds
    assert duration(duration_text(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "5 days", "-5s", "5S", "1h30m", "5s ", "1e3s", "infs", "\u0665s", "5.s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        duration(text)


@pytest.mark.parametrize(
    ("text", "octets"),
    [
        ("0", 0),
        ("1000", 1000),
        ("1000B", 1000),
        ("64KiB", 65536),
        ("25MiB", 26214400),
        ("2 GiB", 1 << 31),
        ("5MB", 5000000),
    ],
)
def test_sizes(text: str, octets: int) -> None:
    assert size(text) == octets
    assert size(size_text(octets)) == octets


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.5MiB", "5mib", "5 M", "5MiBs", "1" * 20])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        size(text)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("retry.minimum", 300, 'did you mean "300s"'),
        ("retry.minimum", 1.5, 'did you mean "1.5s"'),
        ("retry.minimum", True, "got a boolean"),
        ("retry.minimum", "0s", "0s is not within 0.001s and 3650d"),
        ("retry.lifetime", "9999d", "9999d is not within 0s and 3650d"),
        ("limits.message_size", "10", "10 is not within 64KiB and 1024GiB"),
        ("limits.message_size", 2.0, "got a number"),
        ("limits.recipients", "100", "expected an integer, got a string"),
        ("limits.recipients", True, "expected an integer, got a boolean"),
        ("limits.recipients", 99, "99 is not within 100 and 1000000"),
        ("limits.recipients", 10**30, "is not within 100 and 1000000"),
        ("delivery.port", 0, "0 is not within 1 and 65535"),
        ("log.format", "jsn", "did you mean 'json'"),
        ("log.format", 5, "expected a string, got an integer"),
        ("local.domains", "example.org", "expected a list of strings"),
        ("local.domains", ["a", 5], "expected a list of strings"),
        ("listener.address", [], "is empty"),
        ("hostname", "", "is empty"),
        ("spool", "", "is empty"),
        ("spool", {}, "expected a string, got a table"),
    ],
)
def test_values_that_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        decode(dict(every_setting())[name], value)
