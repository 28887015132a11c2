"""docs/standards.md agrees with the code and with its table; and what does not agree is noticed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

import pytest

from tools.lib import standards_cli
from tools.lib.citations import Citation, between, find
from tools.lib.standards import PACKAGE, PAGE, ROOT, TABLE, BadTable, Standard, cited, expand, load, problems, render

KNOWN: Final = frozenset({1870, 2920, 3030, 3848, 5321, 6531})


def citations(tmp_path: Path, source: str) -> list[tuple[int, tuple[str, ...], int]]:
    path = tmp_path / "module.py"
    path.write_text(source, encoding="utf-8")
    return sorted((found.rfc, found.sections, found.line) for found in find(path, KNOWN))


def in_comment(tmp_path: Path, text: str) -> list[tuple[int, tuple[str, ...]]]:
    return [(rfc, sections) for rfc, sections, _ in citations(tmp_path, f"# {text}\n")]


# -- this project -------------------------------------------------------------------------------------------------------


def test_the_page_agrees_with_table_and_code() -> None:
    table = load()
    found = cited(PACKAGE, table)
    assert not problems(table, found, ROOT)
    assert render(table, found, PACKAGE) == PAGE.read_text(encoding="utf-8"), (
        "docs/standards.md is stale: run tools/standards"
    )


def test_the_table_knows_what_a_mail_server_is_asked_for() -> None:
    table = load()
    assert {1870, 2033, 3030, 3207, 3461, 4954, 5321, 5322, 6376, 6409, 6531, 7208, 7672, 8461, 9422} <= table.keys()
    assert "2.3.11" in table[5321].known_sections
    assert "4.5.3.1.10" in table[5321].known_sections
    assert "2.3.12" not in table[5321].known_sections


def test_no_rfc_of_the_code_escapes() -> None:
    """Every number behind "RFC" in a comment or docstring is found; texts of other strings are none of them."""
    table = load()
    for path in sorted(PACKAGE.rglob("*.py")):
        found = {citation.rfc for citation in find(path, table)}
        written = {int(number) for number in re.findall(r"RFC (\d{3,5})", path.read_text(encoding="utf-8"))}
        said = {int(number) for number in re.findall(r'"See RFC (\d+)"', path.read_text(encoding="utf-8"))}
        assert written - said <= found, path


# -- citations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see RFC 5321.", [(5321, ())]),
        ("RFC 5321 section 4.1.2 (Domain), RFC 1035 section 2.3.4 (length)", [(1035, ("2.3.4",)), (5321, ("4.1.2",))]),
        ("RFC 5321 sections 4.1.2, 4.1.3 and 4.2", [(5321, ("4.1.2", "4.1.3", "4.2"))]),
        ("RFC 5321 sections 2.3.8 (lines), 4.5.3.1.4 and .6 (lengths)", [(5321, ("2.3.8", "4.5.3.1.4", "4.5.3.1.6"))]),
        ("RFC 5321 sections 4.1.1 to 4.1.4, 6.3", [(5321, ("4.1.1", "4.1.2", "4.1.3", "4.1.4", "6.3"))]),
        ("RFC 3848 and 6531 section 4.3 (names)", [(3848, ()), (6531, ("4.3",))]),
        ("RFC 1870 (SIZE), 2920 (PIPELINING), 3030 (CHUNKING)", [(1870, ()), (2920, ()), (3030, ())]),
        ("RFC 3030 section 3, 1870", [(1870, ()), (3030, ("3",))]),
        ("RFC 5321, 5.1)", [(5321, ("5.1",))]),
        ("RFC 5321 section 4.5.3.1.4 asks for 512 and extensions, 2048", [(5321, ("4.5.3.1.4",))]),
        ("RFC 5321 sections 3.1; RFC 3030 section 2", [(3030, ("2",)), (5321, ("3.1",))]),
        ("in RFC 5321, 300 of 1870 had it", [(5321, ())]),
        ("RFC 5321 in 2920 lines", [(5321, ())]),
        ("no standard at all: section 4.1, 5321", []),
        ("RFC 99999 is far", [(99999, ())]),
    ],
)
def test_the_language_of_citations(tmp_path: Path, text: str, expected: list[tuple[int, tuple[str, ...]]]) -> None:
    assert in_comment(tmp_path, text) == expected


def test_where_citations_stand(tmp_path: Path) -> None:
    source = '''"""A module.

Standards: RFC 5321 sections 3.1 and
3.2; RFC 3030 section 2.
"""

LIMIT = 1
"""RFC 1870 section 4."""
# a comment (RFC 2920
# section 3.1) on two lines
TEXT = "RFC 6531 is no citation here"  # RFC 3848
'''
    assert citations(tmp_path, source) == [
        (1870, ("4",), 8),
        (2920, ("3.1",), 9),
        (3030, ("2",), 4),
        (3848, (), 11),
        (5321, ("3.1", "3.2"), 3),
    ]


def test_ranges() -> None:
    assert between("4.1.1", "4.1.4") == ["4.1.2", "4.1.3"]
    assert between("9", "11") == ["10"]
    assert not between("4.1", "5.3")
    assert expand("1-3 2.1 2.3.9-11") == ["1", "2", "3", "2.1", "2.3.9", "2.3.10", "2.3.11"]
    assert not expand("")
    with pytest.raises(BadTable, match=r"2\.x"):
        expand("1 2.x")


# -- what does not agree ------------------------------------------------------------------------------------------------


def table(*rows: Standard) -> dict[int, Standard]:
    return {row.number: row for row in rows}


def citation(rfc: int, *sections: str) -> Citation:
    return Citation(rfc, sections, ROOT / "mtad" / "x.py", 7)


def test_an_rfc_that_the_table_does_not_know() -> None:
    assert problems(table(), [citation(5321)], ROOT) == ["mtad/x.py:7: RFC 5321 is not in standards.toml"]


@pytest.mark.parametrize("status", ["yes", "partly"])
def test_an_rfc_that_nobody_cites(status: str) -> None:
    row = Standard(5321, "SMTP", status, "a note")  # type: ignore[arg-type]  # one of the three
    assert problems(table(row), [], ROOT) == [
        f"standards.toml: RFC 5321 is said to be there ({status}), and nothing in the code cites it"
    ]
    assert not problems(table(row), [citation(5321)], ROOT)


def test_an_rfc_that_is_not_there_may_be_cited_or_not() -> None:
    row = Standard(2033, "LMTP", "no")
    assert not problems(table(row), [], ROOT)
    assert not problems(table(row), [citation(2033)], ROOT)


def test_a_section_that_does_not_exist() -> None:
    looked_up, not_looked_up = Standard(5321, "SMTP", "yes", sections="1-4 4.1-5"), Standard(3030, "BDAT", "yes")
    found = [citation(5321, "4.1", "4.6"), citation(3030, "99")]
    assert problems(table(looked_up, not_looked_up), found, ROOT) == ["mtad/x.py:7: RFC 5321 has no section 4.6"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[rfc]\n", "standards.toml"),
        ('[[rfc]]\nnumber = 1\ntitle = "a"\nstatus = "perhaps"\n', "perhaps"),
        ('[[rfc]]\nnumber = 1\ntitle = "a"\nstatus = "partly"\n', "what is missing"),
        ('[[rfc]]\nnumber = 1\ntitle = "a"\nstatus = "no"\nsections = "a-b"\n', "not a section"),
        ('[[rfc]]\nnumber = 2\ntitle = "a"\nstatus = "no"\n[[rfc]]\nnumber = 1\ntitle = "a"\nstatus = "no"\n', "order"),
        ('[[rfc]]\nnumber = 2\ntitle = "a"\nstatus = "no"\n[[rfc]]\nnumber = 2\ntitle = "a"\nstatus = "no"\n', "twice"),
    ],
)
def test_a_table_that_cannot_be_used(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / TABLE.name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadTable, match=re.escape(why)):
        load(path)


def test_the_page_says_what_is_missing_and_where_the_rest_is() -> None:
    rows = table(Standard(5321, "SMTP", "partly", "EXPN."), Standard(2033, "LMTP", "no"))
    found = [
        Citation(5321, ("4.10", "4.2"), PACKAGE / "smtp" / "wire.py", 1),
        Citation(5321, (), PACKAGE / "tls" / "__init__.py", 1),
    ]
    page = render(rows, found, PACKAGE)
    assert "| 5321 | SMTP | partly | EXPN. |\n" in page
    assert "| 2033 | LMTP | no |  |\n" in page
    assert "0 yes, 1 partly, 1 no." in page
    assert "- **5321**: `smtp.wire` 4.2, 4.10; `tls`\n" in page


def test_the_command_writes_the_page_and_notices_a_stale_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package, page = tmp_path / "mtad", tmp_path / "standards.md"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(standards_cli, "ROOT", tmp_path)
    monkeypatch.setattr(standards_cli, "PACKAGE", package)
    monkeypatch.setattr(standards_cli, "PAGE", page)
    assert standards_cli.main(["--check"]) == 1
    assert "standards.md is stale" in capsys.readouterr().err
    assert standards_cli.main([]) == 0
    assert standards_cli.main(["--check"]) == 0
    (package / "new.py").write_text('"""RFC 5321 section 4.9."""\n')
    assert standards_cli.main(["--check"]) == 1
    err = capsys.readouterr().err
    assert "mtad/new.py:1: RFC 5321 has no section 4.9" in err
    assert "standards.md is stale" in err
