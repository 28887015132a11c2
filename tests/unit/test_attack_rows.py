"""Every known attack on mail servers has a test that is named for it.

The rows are a checklist gathered from advisories, papers and the test suites of other servers: S is our server, C our
client, L local delivery, Q the queue, D the DNS. A test that shows one has the row in its name, ``test_s_tl3_..``; several
rows are ``test_s_sm1_to_24_..``; a dialogue file of the server is ``attack_TL3_..txt``. What is in a checklist and in no
test's name has no test.

`CVES` is the index of the faults that the rows were gathered from: which row or test shows that we do not have it, or why
there is nothing here that could.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).parents[1]


def _rows(prefix: str, first: int, last: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(first, last + 1)]


ROWS: Final = [
    *_rows("s_sm", 1, 29),
    "s_sm40",
    *_rows("c_sm", 1, 24),
    *_rows("s_tl", 1, 8),
    *_rows("c_tl", 1, 4),
    *_rows("s_pa", 1, 18),
    *_rows("s_en", 1, 5),
    "s_rl",
    *_rows("l", 1, 4),
    *_rows("q", 1, 4),
    *_rows("d", 1, 11),
]

#: What local users do to a program with the rights of root.
_NO_SETUID: Final = (
    "none: no program of ours is setuid, and none takes a message, a path or a configuration from a local user"
)

#: By CVE or GHSA: ``row``, rows whose tests show it; ``test``, words of the name of one that does; ``none``, why not.
CVES: Final = {
    # Exim
    "2010_4344": "row s_pa7",  # long header lines, logged when a message is refused
    "2011_1764": "row s_en3",  # a sign of percent in what is logged
    "2016_9963": "none: nothing signs with DKIM yet, there is no key to give away",
    "2017_16943": "row s_pa12",
    "2017_16944": "row s_pa12",
    "2017_1000369": _NO_SETUID,
    "2018_6789": "row s_pa13",
    "2019_10149": "row s_en3",
    "2019_13917": "row s_en3",
    "2019_15846": "test cve_2019_15846",
    "2019_16928": "row s_pa1",
    "2020_28007": "row l4",  # the log is opened without privileges
    "2020_28008": "test test_what_is_no_spool_is_named",  # a link in the place of a queue
    "2020_28009": _NO_SETUID,
    "2020_28010": _NO_SETUID,
    "2020_28011": _NO_SETUID,
    "2020_28012": "none: no program is run for a message, and every descriptor is opened close-on-exec",
    "2020_28013": _NO_SETUID,
    "2020_28014": "row l4",  # and so is the pid file
    "2020_28015": "row s_en1",
    "2020_28016": _NO_SETUID,
    "2020_28017": "row s_pa6",
    "2020_28018": "row s_tl7",
    "2020_28019": "row s_pa12",
    "2020_28020": "row s_pa7",
    "2020_28021": "row s_en1",
    "2020_28022": "row s_pa9",
    "2020_28023": "row s_pa1 s_pa3",
    "2020_28024": "row s_pa10 s_pa12",
    "2020_28025": "none: nothing verifies DKIM signatures yet",
    "2020_28026": "row s_en1",
    "2021_27216": "row l4",  # the pid file is removed without privileges
    "2021_38371": "row c_tl1",
    "2023_42114": "row s_pa13",
    "2023_42115": "row s_pa13",
    "2023_42116": "row s_pa13",
    "2023_42117": "row s_pa17",
    "2023_42118": "none: nothing looks at SPF records yet",
    "2023_42119": "test cve_2023_42119",
    "2023_51766": "row s_sm1 s_sm2 s_sm3",
    "2024_39929": "none: no rule depends on the file name of an attachment",
    "2025_26794": "test cve_2025_26794",
    "2025_30232": _NO_SETUID,
    "2025_67896": "none: limits are counted in memory by the address of the client, in no database",
    "2026_40684": "test 2026_40684",
    "2026_40685": "none: nothing of a message is read as JSON; and a queue file is checked as it is read",
    "2026_40686": "row s_pa4",
    "2026_40687": "row c_tl4",  # a client's mechanism that we do not have
    "2026_45185": "row s_tl7",
    # Postfix
    "2008_2936": "test cve_2008_2936",
    "2011_0411": "row s_tl1",
    "2011_1720": "row s_pa13",
    "2020_12063": "test cve_2020_12063",
    "2023_51764": "row s_sm1 s_sm2 s_sm3",
    "ssh_over_smtp": "row s_pa10",
    # OpenSMTPD
    "opensmtpd_audit_of_2015": "row l2",
    "2020_7247": "row s_en2",
    "2020_8793": "row l3",  # a queue that everybody may put files in
    "2020_8794": "row s_en2",
    "2020_35679": "none: there are no tables of regular expressions and no filters",
    "2020_35680": "none: there are no tables of regular expressions and no filters",
    "2023_29323": "test cve_2023_29323",
    "2025_62875": "test cve_2025_62875",
    # qmail
    "2005_1513": "row s_pa1 s_pa2",
    "2005_1514": "row s_pa1 s_pa2",
    "2005_1515": "row s_pa6 s_pa8",
    "2020_3811": "row q1",  # who has no mailbox is refused at RCPT
    # Sendmail
    "2006_0058": "test cve_2006_0058",
    "2009_4565": "row c_tl3",
    "2023_51765": "row s_sm1 s_sm2 s_sm3",
    # aiosmtpd, nodemailer, chasquid, and a paper on STARTTLS (USENIX Security 2021)
    "2024_27305": "row s_sm1 s_sm2 s_sm3",
    "2024_34083": "row s_tl1",
    "ghsa_c7w3_x93f_qmm8": "test test_s_en1_no_control_character_can_be_written",
    "ghsa_vvjj_xcjg_gr5g": "test test_s_en1_no_control_character_can_be_written",
    "chasquid_1_long_lines": "row s_pa1 s_pa2",
    "why_tls_is_better_without_starttls": "row s_tl1 s_tl2 s_tl4 c_tl1 c_tl2",
}

_NAME: Final = re.compile(r"^\s*def (test_\w+)", re.M)
_ROW: Final = re.compile(r"_((?:[sc]_[a-z]{2}|[lqd]))(\d*)(?:_to_(\d+))?(?=_|$)")


@cache
def _names() -> tuple[str, ...]:
    """The names of all tests that are functions."""
    return tuple(name for path in sorted(TESTS.rglob("test_*.py")) for name in _NAME.findall(path.read_text()))


@cache
def _covered() -> frozenset[str]:
    """The rows that names of tests speak of."""
    names = [*_names()]
    dialogues = (TESTS / "dialogues").rglob("attack_*.txt")
    names += [f"test_s_{path.stem.removeprefix('attack_').lower()}" for path in dialogues]
    found: set[str] = set()
    for name in names:
        for prefix, first, last in _ROW.findall(name):
            found |= set(_rows(prefix, int(first), int(last or first))) if first else {prefix}
    return frozenset(found)


@pytest.mark.parametrize("row", ROWS)
def test_the_row_has_a_test(row: str) -> None:
    assert row in _covered()


def test_no_test_is_named_for_a_row_that_there_is_not() -> None:
    assert _covered() <= set(ROWS)


@pytest.mark.parametrize("cve", CVES)
def test_the_cve_has_a_row_or_a_test_or_nothing_to_attack(cve: str) -> None:
    kind, _, words = CVES[cve].partition(" ")
    if kind == "row":
        assert _covered() >= {*words.split()}
    elif kind == "test":
        assert any(words in name for name in _names())
    else:
        assert kind == "none:"
        assert len(words.split()) >= 5, "that is no reason"


def test_no_test_is_named_for_a_cve_that_the_index_has_not() -> None:
    named = [name for name in _names() if "_cve_" in name]
    found = {cve for name in named for cve in re.findall(r"(?<=_)((?:19|20)[0-9]{2}_[0-9]{4,7})(?=_|$)", name)}
    assert found <= CVES.keys()
    assert found, "the pattern finds them"
