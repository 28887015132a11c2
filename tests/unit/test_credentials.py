"""The file of credentials: what is found in it, when it is read again, and what makes it unusable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mtad.delivery.credentials import Credential, CredentialsFault, CredentialsFile

TEXT = """\
# comment : with : colons

smart.example : alice : secret one : two  # three
[smart.example]:587 : bob : b\u00f6b
[192.0.2.1] : carol : x
[2001:db8::1]:25 : dave : token:ya29.abc
smart.example : second : line
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "credentials"
    path.write_text(TEXT)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("name", "port", "expected"),
    [
        ("smart.example", 25, Credential("alice", "secret one : two  # three")),
        ("smart.example", 587, Credential("bob", "b\u00f6b")),
        ("192.0.2.1", 25, Credential("carol", "x")),
        ("2001:db8::1", 25, Credential("dave", "ya29.abc", token=True)),
        ("2001:db8::1", 26, None),
        ("other.example", 25, None),
    ],
)
def test_who_gets_what(path: Path, name: str, port: int, expected: Credential | None) -> None:
    assert CredentialsFile(str(path)).find(name, port) == expected


def test_a_changed_file_is_read_again(path: Path) -> None:
    file = CredentialsFile(str(path))
    assert file.find("smart.example", 25)
    path.write_text("other.example : a : b\n")
    assert file.find("smart.example", 25) is None
    assert file.find("other.example", 25) == Credential("a", "b")
    path.write_text("nonsense\n")
    for _ in range(2):
        with pytest.raises(CredentialsFault):
            file.find("other.example", 25)
    path.unlink()
    with pytest.raises(CredentialsFault, match="No such file"):
        file.find("other.example", 25)


@pytest.mark.parametrize(
    "line", ["a.example:b:c", "a.example : b", "a.example : b :", "a b : c : d", ": b : c", "a.example : \x1b : c"]
)
def test_a_line_that_cannot_be_read_is_named_without_its_content(path: Path, line: str) -> None:
    path.write_text("# first\n" + line.replace("c", "s3cret") + "\n")
    with pytest.raises(CredentialsFault) as caught:
        CredentialsFile(str(path)).find("a.example", 25)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff : a : b\n", b"x" * (1024 * 1024 + 1)])
def test_what_is_no_such_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CredentialsFault):
        CredentialsFile(str(path)).find("a.example", 25)


@pytest.mark.parametrize("mode", [0o644, 0o620, 0o601])
def test_a_file_that_others_can_read_or_change_is_not_used(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(CredentialsFault, match="others can read or change it"):
        CredentialsFile(str(path)).find("smart.example", 25)


def test_a_group_may_read_it(path: Path) -> None:
    path.chmod(0o640)
    assert CredentialsFile(str(path)).find("smart.example", 25)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_file_of_somebody_else_is_not_used(path: Path) -> None:
    os.chown(path, 12345, -1)
    with pytest.raises(CredentialsFault):
        CredentialsFile(str(path)).find("smart.example", 25)


def test_a_credential_does_not_show_itself() -> None:
    assert "secret" not in repr(Credential("alice", "secret")) + str(Credential("alice", "secret"))
