"""`mtad check` names file, line and key of each fault: every file of tests/configs, with what it must say at its end.

In the files @ROOT@ is a directory of the test's own and @TAKEN@ an address where somebody else listens. A line after ``#!``
is what is said of the file, without its name; of a fault of TOML itself only the beginning.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from mtad.cli.mtad import main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_is_said_of_a_configuration(tmp_path: Path, path: Path) -> None:
    (tmp_path / "users").write_text("root : root@example.org\n")
    config = tmp_path / "mtad.toml"
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"

        def fill(text: str) -> str:
            return text.replace("@ROOT@", str(tmp_path)).replace("@TAKEN@", taken)

        config.write_text(fill(path.read_text()))
        result = CliRunner().invoke(main, ["check", "-c", str(config)])
    said = [line for line in result.stderr.splitlines() if not line.startswith("mtad: warning: ")]
    expected = [fill(line[3:]) for line in path.read_text().splitlines() if line.startswith("#! ")]
    assert len(said) == len(expected), said
    for line, beginning in zip(said, expected, strict=True):
        colon = ":" if beginning[0].isdigit() else ": "
        whole = f"mtad: {config}{colon}{beginning.replace(': ', ': ', 1)}"
        assert line == whole or (line.startswith(whole) and "not TOML" in whole)
    assert result.exit_code == (78 if expected else 0)
    assert (result.stdout == f"{config}: fine\n") is not bool(expected)
    assert sorted(os.listdir(tmp_path)) == ["mtad.toml", "users"], "a check changes nothing"


def test_there_are_good_and_bad_ones() -> None:
    texts = [path.read_text() for path in CONFIGS]
    assert len(texts) > 12
    assert sum("#! " not in text for text in texts) == 1


def test_warnings_do_not_fail(tmp_path: Path) -> None:
    (tmp_path / "users").write_text("root : root@elsewhere.example\n")
    config = tmp_path / "mtad.toml"
    good = next(path for path in CONFIGS if path.stem == "good").read_text()
    config.write_text(good.replace("@ROOT@", str(tmp_path)))
    result = CliRunner().invoke(main, ["check", "-c", str(config)])
    assert result.exit_code == 0
    assert f"mtad: warning: {tmp_path}/users:1: root: elsewhere.example is not in local.domains" in result.stderr


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTAD_CONFIG", str(tmp_path / "missing.toml"))
    result = CliRunner().invoke(main, ["check"])
    assert (result.exit_code, result.stderr) == (
        78,
        f"mtad: {tmp_path}/missing.toml: cannot be read: No such file or directory\n",
    )
