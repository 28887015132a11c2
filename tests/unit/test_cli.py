"""What the commands share: where the configuration comes from, how failures are told, how numbers look."""

from __future__ import annotations

import errno
import getpass
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mtad.cli import common
from mtad.cli.common import Source, explained, version_option
from mtad.cli.mtad import main
from mtad.cli.times import age, plural
from mtad.envelope import Envelope, Recipient
from mtad.errors import ConfigError, MtadError, Problem
from mtad.spool.queues import Spool


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTAD_CONFIG", raising=False)
    monkeypatch.setattr(common, "CONFIG_FILE", str(tmp_path / "etc.toml"))
    monkeypatch.chdir(tmp_path)


def test_where_the_configuration_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``-c``, else ``$MTAD_CONFIG``, else /etc/mtad/mtad.toml, else the development defaults."""
    assert Source(None).path == ""
    assert Source(None).name == "development defaults"
    (tmp_path / "etc.toml").write_text("")
    assert Source(None).path == f"{tmp_path}/etc.toml"
    monkeypatch.setenv("MTAD_CONFIG", "environment.toml")
    assert Source(None).name == f"{tmp_path}/environment.toml"
    given = Source("given.toml")
    monkeypatch.chdir("/")
    assert given.path == f"{tmp_path}/given.toml", "a daemon's directory is another one"


def test_development_defaults_lie_where_one_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(None)
    monkeypatch.chdir("/")
    config = source.read()
    assert config.development
    assert config.spool == f"{tmp_path}/spool"
    assert source.text() == ""


def test_a_file_is_read_again_each_time(tmp_path: Path) -> None:
    path = tmp_path / "mtad.toml"
    path.write_text('hostname = "one.example.org"\n')
    source = Source(str(path))
    assert source.read().hostname == "one.example.org"
    path.write_text('hostname = "two.example.org"\n')
    assert source.read().hostname == "two.example.org"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"hostname = '\xff'\n")
    for name, message in (("missing", "cannot be read: No such file"), ("binary", "is not UTF-8"), (".", "Is a directory")):
        with pytest.raises(ConfigError, match=message) as caught:
            Source(str(tmp_path / name)).read()
        assert caught.value.problems[0].file == str((tmp_path / name).resolve())


def _run(fault: BaseException) -> tuple[int, str]:
    @click.command()
    @version_option
    @explained
    def command() -> None:
        click.echo("output")
        raise fault

    result = CliRunner().invoke(command)
    assert result.stdout == "output\n"
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [
        (ConfigError([Problem("f", 1, "a", "x"), Problem("f", 2, "b", "y")]), 78, "mtad: f:1: a: x\nmtad: f:2: b: y\n"),
        (MtadError("no such thing"), 1, "mtad: no such thing\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), 1, "mtad: /x: No such file or directory\n"),
        (OSError(errno.EADDRINUSE, "cannot listen"), 1, "mtad: cannot listen\n"),
        (OSError("words alone"), 1, "mtad: words alone\n"),
    ],
    ids=str,
)
def test_failures_are_lines_and_exit_codes(fault: Exception, code: int, text: str) -> None:
    assert _run(fault) == (code, text)


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        explained(lambda: 1 // 0)()


def test_nobody_reads_any_more() -> None:
    """As in ``mtaq | head``."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.dup2(writing, 1)

        def command() -> None:
            while True:
                os.write(1, b"x" * 1000)

        try:
            explained(command)()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        os._exit(9)
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--version"], 0, "mtad 0."),
        (["--help"], 0, "check"),
        (["start", "--help"], 0, "--foreground"),
        (["nonsense"], 2, "No such command"),
        (["start", "--nonsense"], 2, "No such option"),
        (["status", "-c", "/nowhere/mtad.toml"], 78, "mtad: /nowhere/mtad.toml: cannot be read: No such file"),
        (["stop"], 1, "mtad: not running (no server has the spool "),
        (["reload"], 1, "mtad: not running (no server has the spool "),
        (["status"], 1, "mtad is not running"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_exit_codes(arguments: list[str], code: int, text: str) -> None:
    """Exit 0 fine, 1 failed, 2 usage, 78 bad configuration."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code
    assert text in result.output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (0.9, "0s"), (59, "59s"), (60, "1m"), (302, "5m 2s"), (3600, "1h"), (90_061, "1d 1h"), (86_405, "1d 5s")],
)
def test_age(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_plural() -> None:
    assert [plural(n, "message") for n in (0, 1, 2)] == ["0 messages", "1 message", "2 messages"]
    assert plural(2, "process", "processes") == "2 processes"


def test_who_has_no_name_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container."""

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4242")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert common._user() == str(os.getuid())


def test_the_default_spool_is_known_while_another_setting_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mtad.toml"
    path.write_text("hostnam = 'mx.example.org'\n")
    monkeypatch.setattr(os.path, "isdir", lambda name: name == "/var/spool/mtad")
    assert Source(str(path)).spool() == "/var/spool/mtad"


@pytest.mark.parametrize(("closed", "encoding"), [(True, "utf-8"), (False, "ascii")])
def test_every_output_will_do(tmp_path: Path, closed: bool, encoding: str) -> None:
    """None at all (>&-), and one that lacks characters that a stranger's address may have."""
    spool = Spool(str(tmp_path / "spool"), create=True)
    envelope = Envelope(spool.ids.new(), 0.0, "a@x.test", (Recipient("j\u00f6rg@x.test"),), smtputf8=True)
    incoming = spool.enter(envelope)
    incoming.write(b"\r\n")
    incoming.commit()
    (tmp_path / "mtad.toml").write_text(f"hostname = 'mx.test'\nspool = '{spool.root}'\n")
    redirection = ">&-" if closed else ""
    command = f"exec {Path(sys.executable).parent}/mtaq -c {tmp_path}/mtad.toml {redirection}"
    run = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert closed or "j\\xf6rg@x.test" in run.stdout
    spool.close()
