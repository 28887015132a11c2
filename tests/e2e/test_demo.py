"""`tools/demo` as a newcomer runs it: from a checkout of its own, from any directory, to its end or to Ctrl-C.

The virtual environment is that of the tests, so that nothing is installed and no network is needed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.site import BIN, await_value

ROOT: Final = Path(__file__).parents[2]
#: Seconds that the demo may take; the promise is a minute.
LIMIT: Final = 60.0


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all that belongs to the checkout, committed to a repository of its own where there is git."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT, copy, ignore=ignore, dirs_exist_ok=True)
    shutil.rmtree(copy / "spool")
    skeleton = [str(path.relative_to(ROOT / "spool")) for path in ROOT.glob("spool/*/.gitkeep")]
    for file in (".gitignore", "README.md", *skeleton):
        (copy / "spool" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "spool" / file, copy / "spool" / file)
    if shutil.which("git"):
        for command in ("init --quiet", "add --all", "-c user.name=a -c user.email=a@a.test commit --quiet -m all"):
            subprocess.run(["git", "-C", str(copy), *command.split()], check=True, timeout=LIMIT, capture_output=True)
    return copy


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a run; afterwards nothing is left of it, neither files nor processes."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    yield {**os.environ, "MTAD_VENV": sys.prefix, "TMPDIR": str(temporary)}
    # What a test wants to be kept it has looked at and taken away.
    assert list(temporary.iterdir()) == []
    assert processes(temporary) == []


def processes(folder: Path) -> list[str]:
    """The command lines or working directories of processes that have to do with a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = [(entry / "cmdline").read_bytes().decode(errors="replace"), *map(os.readlink, (entry / "fd").iterdir())]
        except OSError:
            continue
        if any(str(folder) in word for word in words):
            found.append(words[0])
    return found


def demo(checkout: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, from a directory that has nothing to do with it."""
    return subprocess.run(
        [str(checkout / "tools/demo"), *arguments],
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def test_four_messages_come_to_their_ends_and_the_checkout_stays_clean(checkout: Path, stage: dict[str, str]) -> None:
    result = demo(checkout, stage, "--keep")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    folder = next(Path(stage["TMPDIR"]).iterdir())
    try:
        # What it shows is there: each path that it names, and mail for both in their Maildirs.
        shown = [Path(path) for path in re.findall(rf"{re.escape(str(folder))}/\S*/new/\S+", result.stdout)]
        assert len(shown) == len(set(shown)) == 4
        assert set(shown) == {*(folder / "here/mail/ann/new").iterdir(), *(folder / "there/mail/bob/new").iterdir()}
        reasons = re.findall(r"^ +\| +\((.*)\)$", result.stdout, re.M)
        assert len(reasons) == 1
        assert reasons[0].startswith("connect to mx.there.example[127.0.0.2]:")
        assert re.search(r"^   \$ mtad-flush \w+\n   \| 1 message: tried now$", result.stdout, re.M)
        assert re.search(r"status=bounced \(host mx\.there\.example.* said: 550 5\.1\.1 ", result.stdout)
        assert "Action: failed" in result.stdout
        assert "Subject: Undelivered Mail Returned to Sender" in result.stdout
        assert "Mail queue is empty" in result.stdout
        for queue in ("incoming", "active", "deferred", "hold", "corrupt"):
            assert list((folder / "here/spool" / queue).iterdir()) == []
    finally:
        shutil.rmtree(folder)
    if shutil.which("git"):
        status = ["git", "-C", str(checkout), "status", "--porcelain"]
        assert subprocess.run(status, capture_output=True, text=True, check=True, timeout=LIMIT).stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_stays_until_it_is_told_and_what_it_says_works(
    checkout: Path, stage: dict[str, str], number: signal.Signals, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [str(checkout / "tools/demo"), "--serve"],
            cwd="/",
            env=stage,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        text = await_value(lambda: read if "  nc " in (read := output.read_text()) else "", LIMIT, "it says what to type")
        sends = re.findall(r"^  python -c \".*\"$", text, re.M)
        setting = re.search(r"^  export .*$", text, re.M)
        assert setting is not None
        assert len(sends) == 2
        script = "\n".join(["set -e", setting[0], *sends, "mtad status", "mtad-flush", "mtaq >/dev/null"])
        typed = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=LIMIT, check=False)
        assert typed.returncode == 0, typed.stderr
        assert "mtad 0." in typed.stdout
        folder = next(Path(stage["TMPDIR"]).iterdir())
        for mailbox in ("here/mail/ann/new", "there/mail/bob/new"):
            await_value(lambda: any((folder / mailbox).iterdir()), what=mailbox)  # noqa: B023  it is called here
        # A server that somebody has stopped by hand is no reason to fail at the end.
        stop = re.search(r"^  mtad stop .*$", text, re.M)
        assert stop is not None
        subprocess.run(["sh", "-c", f"{setting[0]}; {stop[0]}"], timeout=LIMIT, check=True, capture_output=True)
        assert process.poll() is None
    finally:
        process.send_signal(number)
        process.wait(LIMIT)
    assert process.returncode == 0, output.read_text()
    assert output.read_text().endswith("Everything is stopped again.\n")


def test_a_failure_names_its_step_shows_the_log_and_stops_everything(
    checkout: Path, stage: dict[str, str], tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    for name in ("python", "mtad", "mtaq"):
        (venv / "bin" / name).symlink_to(BIN / name)
    for name in ("lib", "pyvenv.cfg"):
        (venv / name).symlink_to(Path(sys.prefix) / name)
    broken = venv / "bin/mtad-flush"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    result = demo(checkout, {**stage, "MTAD_VENV": str(venv)})
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAILED in: 3. A message that has to wait, and is flushed\n" in result.stdout
    assert "`mtad-flush 4" in result.stdout
    assert "ended with 1: no such luck" in result.stdout
    assert "(deferred)" not in result.stdout
    assert "status=deferred (connect to mx.there.example" in result.stdout
    folder = next(Path(stage["TMPDIR"]).iterdir())
    assert f"the folder is kept: {folder}" in result.stdout
    assert "stopped" in (folder / "here/mtad.log").read_text().splitlines()[-1]
    shutil.rmtree(folder)


def test_interrupted_in_the_middle_it_stops_everything(checkout: Path, stage: dict[str, str]) -> None:
    process = subprocess.Popen(
        [str(checkout / "tools/demo")],
        cwd="/",
        env=stage,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as output:
        for line in output:
            if line.startswith("2. "):
                process.send_signal(signal.SIGINT)
                break
        rest = output.read()
    assert process.wait(LIMIT) == 130, rest
    assert rest.endswith("Everything is stopped again.\n")


def test_the_commands_for_a_server_from_the_checkout_do_what_the_readme_says(checkout: Path) -> None:
    for port in (2525, 2526):
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    trial.bind((host, port))
                except OSError as fault:
                    pytest.skip(f"port {port} of {host} cannot be used: {fault}")
    if Path("/etc/mtad/mtad.toml").exists():
        pytest.skip("mtad is set up on this machine: its configuration would be used")
    readme = (checkout / "README.md").read_text()
    block = re.search(r"^## A server from the checkout\n\n.*\n\n((?:    .*\n)+)", readme, re.M)
    assert block is not None
    start, status, send, mtaq, look, stop = [line.strip() for line in block[1].splitlines()]
    # The virtual environment of the tests stands for the one that tools/demo makes.
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    environment.pop("MTAD_CONFIG", None)

    def typed(line: str) -> str:
        line = line.replace(".venv/bin/", f"{shlex.quote(str(BIN))}/")
        result = subprocess.run(
            ["sh", "-c", line], cwd=checkout, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
        return result.stdout

    try:
        assert "127.0.0.1:2525, [::1]:2525" in typed(start)
        assert "mtad " in typed(status)
        typed(send)
        await_value(lambda: list((checkout / "spool/mail").glob("*/new/*")), what="mail for postmaster")
        assert typed(mtaq) == "Mail queue is empty\n"
        assert len(typed(look).splitlines()) == 1
    finally:
        assert typed(stop) == "stopped\n"
    if shutil.which("git"):
        changed = ["git", "-C", str(checkout), "status", "--porcelain"]
        assert subprocess.run(changed, capture_output=True, text=True, check=True, timeout=LIMIT).stdout == ""


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """A directory for PATH whose python3 can be told what it lacks."""
    directory = tmp_path / "bin"
    directory.mkdir()
    stub = directory / "python3"
    stub.write_text(f'#!/bin/sh\ncase "$*" in *"$LACKS"*) exit 1 ;; esac\nexec {sys.executable} "$@"\n')
    stub.chmod(0o755)
    return directory


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("ensurepip", "Python's venv module is missing. On Debian or Ubuntu: apt install python3-venv\n"),
        ("version_info", "mtad needs Python 3.11 or later, and here is Python 3."),
    ],
)
def test_a_machine_that_lacks_something_is_told_what_to_install(
    checkout: Path, tmp_path: Path, fake_python: Path, lacks: str, said: str
) -> None:
    environment = {"PATH": f"{fake_python}:/usr/bin:/bin", "LACKS": lacks, "HOME": str(tmp_path), "PYTHON": "python3"}
    result = demo(checkout, environment)
    assert result.returncode == 1
    assert result.stdout == ""
    assert said in result.stderr
    assert "apt install" in result.stderr
    assert not (checkout / ".venv").exists()


def test_usage(checkout: Path, stage: dict[str, str]) -> None:
    assert demo(checkout, stage, "--help").returncode == 0
    wrong = demo(checkout, stage, "--nonsense")
    assert wrong.returncode == 2
    assert "--nonsense" in wrong.stderr
