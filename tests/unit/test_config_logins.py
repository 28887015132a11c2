"""Settings about logins: which go together, and what `check` finds of the password file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtad.check import check
from mtad.configfile import parse
from mtad.errors import ConfigError
from mtad.passwords import change_password, make_keys

TOP = 'hostname = "mx.example.org"\nuser = ""\n'
LISTENER = '[[listener]]\nname = "l"\naddress = ["127.0.0.1:0"]\n'


def faults(text: str) -> list[str]:
    try:
        parse(TOP + text, "f")
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('service = "submission"\ntls = "starttls"\n', ""),
        ('service = "submission"\ntls = "implicit"\n', ""),
        ('service = "submission"\nauth_without_tls = "loopback"\n', ""),
        ('service = "submission"\n', "listener[0].tls: nobody could log in"),
        ('service = "mx"\nauth_without_tls = "loopback"\nbare_line_ends = "normalize"\n', ""),
        ('service = "relay"\nauth_without_tls = "loopback"\n', "listener[0].auth_without_tls: has no meaning"),
        ('service = "mx"\nauth_without_tls = true\n', "listener[0].auth_without_tls: expected a string"),
        ('service = "mx"\nbare_line_ends = "accept"\n', "listener[0].bare_line_ends: 'accept' is none of"),
    ],
)
def test_listeners(text: str, fault: str) -> None:
    found = faults(LISTENER + text)
    assert len(found) == bool(fault)
    assert all(fault in line for line in found)


@pytest.mark.parametrize(
    "line", ["alice : a@example.org", "alice : @example.org", "robot:*", "b\u00fcro : b\u00fcro@example.org"]
)
def test_senders(line: str) -> None:
    assert faults(f'[local]\nsenders = ["{line}"]\n') == []


@pytest.mark.parametrize("line", ["", "alice", "alice : x", ": a@b", "alice : @", "alice : a@b, c@d"])
def test_senders_that_are_none(line: str) -> None:
    (fault,) = faults(f'[local]\nsenders = ["a : @b.example", "{line}"]\n')
    assert fault.startswith("f:4: local.senders[1]: ")


def findings(root: Path, service: str = "submission") -> tuple[list[str], list[str]]:
    (root / "users").write_text("root : root@example.org\n")
    config = parse(
        f'{TOP}spool = "{root}/spool"\npid_file = "{root}/pid"\n'
        f'[local]\ndomains = ["example.org"]\nmail_root = "{root}/mail"\n'
        f'users = "{root}/users"\npasswords = "{root}/passwords"\n'
        f'{LISTENER}service = "{service}"\nauth_without_tls = "loopback"\n',
        "f",
    )
    found = check(config, "f")
    return (
        [str(problem) for problem in found.errors],
        [str(problem) for problem in found.warnings if problem.key == "local.passwords"],
    )


def test_a_submission_without_logins_is_odd(tmp_path: Path) -> None:
    errors, warnings = findings(tmp_path)
    assert errors == []
    assert warnings == [
        f"f: local.passwords: {tmp_path}/passwords does not exist: nobody can log in (mtad passwd LOGIN makes it)"
    ]
    assert findings(tmp_path, "mx") == ([], [])
    change_password(str(tmp_path / "passwords"), "alice", make_keys("x"))
    assert findings(tmp_path) == ([], [])


def test_a_password_file_that_others_may_read(tmp_path: Path) -> None:
    change_password(str(tmp_path / "passwords"), "alice", make_keys("x"))
    (tmp_path / "passwords").chmod(0o604)
    assert findings(tmp_path)[1] == [f"f: local.passwords: {tmp_path}/passwords is open to others: chmod 600 it"]
    (tmp_path / "passwords").chmod(0o640)
    assert findings(tmp_path) == ([], [])


def test_a_password_file_with_a_fault(tmp_path: Path) -> None:
    (tmp_path / "passwords").write_text("# fine\nalice : secret\n")
    (tmp_path / "passwords").chmod(0o600)
    (error,) = findings(tmp_path)[0]
    assert error.startswith(f"{tmp_path}/passwords:2: expected a hash")
    assert "secret" not in error
