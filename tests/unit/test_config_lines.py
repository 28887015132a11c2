"""The locator of keys in TOML texts."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.config_lines import Path, key_lines, show
from mtad.config_values import value_text

SAMPLE = """\
# hostname = "not this one"
hostname = "mx"   # [local]

"quoted key" = '[x] = 1'
[local] # comment
domains = [
  "a", "b # no comment",

  "c", # [tls]
]
text = \"\"\"
[dns]
spool = "x"
\\\"\"\" still
\"\"\"\"\"
raw = '''
key = 1
'''
[[listener]]
name = "one"
[listener.deep.er]
x.y = 1
[[listener]]
name = "two"; tls = 5
"""


def test_sample() -> None:
    text = SAMPLE.replace("; ", "\n")
    tomllib.loads(text)
    lines = key_lines(text)
    assert lines == {
        ("hostname",): 2,
        ("quoted key",): 4,
        ("local",): 5,
        ("local", "domains"): 6,
        ("local", "domains", 0): 7,
        ("local", "domains", 1): 7,
        ("local", "domains", 2): 9,
        ("local", "text"): 11,
        ("local", "raw"): 16,
        ("listener",): 19,
        ("listener", 0): 19,
        ("listener", 0, "name"): 20,
        ("listener", 0, "deep"): 21,
        ("listener", 0, "deep", "er"): 21,
        ("listener", 0, "deep", "er", "x"): 22,
        ("listener", 0, "deep", "er", "x", "y"): 22,
        ("listener", 1): 23,
        ("listener", 1, "name"): 24,
        ("listener", 1, "tls"): 25,
    }


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("a = 1\r\nb = 2\r\n", ("b",), 2),
        ("a = 1979-05-27 07:32:00\nb = 2", ("b",), 2),
        ("t = { x = 1, y = [1, 2], z = { q = '}' } }\nb = 1", ("t", "z", "q"), 1),
        ("t = { x = 1, y = [1, 2], z = { q = '}' } }\nb = 1", ("b",), 2),
        ("l = [\n[1,\n2],\n[3]]", ("l", 1, 0), 4),
        ('a = "\\"]\\\\"\nb = 1', ("b",), 2),
        ('"\\u0061" . b = 1', ("a", "b"), 1),
        ("listener = [{ name = 'x' },\n { name = 'y' }]", ("listener", 1, "name"), 2),
        ("a = ''\nb = ''''''\nc = \"\"\nd = 1", ("d",), 4),
    ],
)
def test_places(text: str, path: Path, line: int) -> None:
    tomllib.loads(text)
    assert key_lines(text)[path] == line


def test_show() -> None:
    assert show(("listener", 1, "address", 0)) == "listener[1].address[0]"
    assert show(("hostname",)) == "hostname"
    assert show(()) == ""


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
values = st.one_of(texts, st.integers(), st.lists(texts, max_size=3).map(tuple))


@given(st.lists(st.tuples(texts, st.lists(st.tuples(texts, values), max_size=4)), max_size=4), st.data())
def test_every_key_that_tomllib_finds_has_its_line(
    tables: list[tuple[str, list[tuple[str, object]]]], data: st.DataObject
) -> None:
    # Invariant: one key stands on each line here, so the locator must name exactly the line it was written on.
    rows: list[str] = []
    expected: dict[Path, int] = {}
    for number, (_, pairs) in enumerate(tables):
        rows.append("[[t]]")
        expected["t", number] = len(rows)
        for key in dict(pairs):
            rows += [""] * data.draw(st.integers(0, 2))
            rows.append(f"{value_text(key)} = {value_text(dict(pairs)[key])} # {value_text(key)}")
            expected["t", number, key] = len(rows)
    text = "\n".join(rows)
    tomllib.loads(text)
    lines = key_lines(text)
    assert {path: line for path, line in lines.items() if path in expected} == expected


@given(st.text(st.sampled_from("[]{}=\"'#.,\n\\ab1 "), max_size=40))
def test_any_text_ends(text: str) -> None:
    # Invariant: a mapping or ValueError, and never a mapping refused for a text that tomllib takes.
    try:
        tomllib.loads(text)
        good = True
    except tomllib.TOMLDecodeError:
        good = False
    try:
        key_lines(text)
    except ValueError:
        assert not good
