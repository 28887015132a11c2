"""The password file: its grammar, lookups, changes while the server runs, and ``mtad passwd``."""

from __future__ import annotations

import os
import pty
import stat
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad import followed
from mtad.errors import ConfigError
from mtad.passwords import (
    Passwords,
    change_password,
    format_hash,
    machine_secret,
    make_keys,
    parse_hash,
    parse_passwords,
)
from mtad.smtp.sasl import Claim, Entry, SaslFault, derive, server_mechanism

KEYS = derive("open sesame", b"s" * 16, 4096)
HASH = format_hash(KEYS)
SECRET = b"x" * 32


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for changes at every lookup."""
    monkeypatch.setattr(followed, "CHECK_INTERVAL", 0.0)
    monkeypatch.setattr(followed, "SETTLES", 0.0)


def load(path: Path, text: str) -> Passwords:
    path.write_text(text)
    return Passwords.load(str(path), secret=SECRET)


def plain(passwords: Passwords, login: str, password: str) -> Claim:
    steps = server_mechanism("PLAIN", passwords, {}, "n")
    assert steps is not None
    next(steps)
    with pytest.raises(StopIteration) as end:
        steps.send(f"\0{login}\0{password}".encode())
    claim: Claim = end.value.value
    return claim


def test_lookup(tmp_path: Path) -> None:
    passwords = load(tmp_path / "p", f"# comment\n\nalice : {HASH}\n  Bob@Example.org:{HASH}  \r\n\u00fc : {HASH}\n")
    assert passwords.any()
    assert passwords.find("alice") == Entry("alice", KEYS)
    assert passwords.find("ALICE").login == "alice"
    assert passwords.find("bob@example.ORG") == Entry("Bob@Example.org", KEYS)
    assert passwords.find("u\u0308").login == "\u00fc"
    for nobody in ("", "bob", "alice ", "alice\0", "#", "*", "\x07", "\ud800", "x" * 10000):
        assert not passwords.find(nobody).known
    assert plain(passwords, "Alice", "open sesame") == Claim("alice", True)
    assert plain(passwords, "Alice", "open") == Claim("alice", False)


def test_the_format_is_that_of_rfc_5803() -> None:
    """As PostgreSQL writes it: hashes can be taken over from there."""
    text = (
        "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:"
        "wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )
    keys = parse_hash(text)
    assert format_hash(keys) == text
    assert derive("pencil", keys.salt, keys.iterations) == keys


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        ": " + HASH,
        "alice : secret",
        "alice : {PLAIN}secret",
        "alice : " + HASH[:-4],
        "alice : " + HASH.replace("4096", "4095"),
        "alice : " + HASH.replace("4096", "999999999"),
        "alice : " + HASH.replace("$4096", "$04096"),
        "alice : " + HASH.replace("SHA-256", "SHA-1"),
        "alice : SCRAM-SHA-256$4096:AAAA$AAAA:AAAA",
        "alice : " + HASH + " x",
        "al\x07ice : " + HASH,
        f"bob : {HASH}\nBOB : {HASH}",
        "alice : $2b$12$secretsecretsecret",
    ],
)
def test_faults_are_named_and_secrets_are_not(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_passwords(f"root : {HASH}\n{line}\n".encode(), "p")
    (problem,) = caught.value.problems
    assert str(problem).startswith(f"p:{2 + line.count(chr(10))}: ")
    assert "secret" not in str(problem)
    assert HASH not in str(problem)


def test_not_utf8() -> None:
    with pytest.raises(ConfigError, match="p:1: not UTF-8"):
        parse_passwords(b"\xff : x", "p")


@given(st.binary(max_size=200))
def test_any_file_is_read_or_refused(data: bytes) -> None:
    """Invariant: entries, or a ConfigError."""
    try:
        parse_passwords(data, "p")
    except ConfigError:
        pass


def test_a_missing_file_has_no_logins(tmp_path: Path, eager: None) -> None:
    passwords = Passwords.load(str(tmp_path / "p"), secret=SECRET)
    assert not passwords.any()
    assert not passwords.find("alice").known
    change_password(str(tmp_path / "p"), "alice", KEYS)
    assert passwords.find("alice").known
    assert passwords.any()


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    with pytest.raises(ConfigError, match=r"local\.passwords"):
        Passwords.load(str(tmp_path / "p"))


def test_a_fault_that_comes_later_leaves_the_old_in_force(tmp_path: Path, eager: None) -> None:
    warnings: list[str] = []
    path = tmp_path / "p"
    path.write_text(f"alice : {HASH}\n")
    passwords = Passwords.load(str(path), warn=warnings.append, secret=SECRET)
    path.write_text("alice : gone\nbob\n")
    for _ in range(3):
        assert passwords.find("alice").known
    assert len(warnings) == 2
    assert warnings[0].startswith(f"{path}:1: expected a hash")
    assert "the passwords read before stay in force" in warnings[1]
    path.write_text(f"bob : {HASH}\n")
    assert passwords.find("bob").known
    assert not passwords.find("alice").known


def test_what_is_made_up_stays_the_same_s_pa13(tmp_path: Path) -> None:
    """Over restarts and processes, in any spelling of the login, and looks like the real."""
    one, other = load(tmp_path / "p", ""), Passwords.load(str(tmp_path / "q"), secret=SECRET)
    assert one.find("nobody").keys == other.find("NOBODY").keys
    assert one.find("nobody").keys != one.find("nobody2").keys
    assert Passwords.load(str(tmp_path / "q"), secret=b"y" * 32).find("nobody").keys != one.find("nobody").keys
    real, made_up = make_keys("x"), one.find("nobody").keys
    assert (len(real.salt), real.iterations) == (len(made_up.salt), made_up.iterations)
    assert len(format_hash(real)) == len(format_hash(made_up))


def test_the_secret_of_the_machine() -> None:
    assert len(machine_secret()) == 32
    if len(Path("/etc/machine-id").read_text().strip() if Path("/etc/machine-id").exists() else "") == 32:
        assert machine_secret() == machine_secret()


def test_unknown_and_wrong_take_the_same_time_s_pa13(tmp_path: Path) -> None:
    """S-PA13: less than 10 ms between the medians."""
    change_password(str(tmp_path / "p"), "alice", make_keys("open sesame"))
    passwords = Passwords.load(str(tmp_path / "p"), secret=SECRET)
    times: dict[str, list[float]] = {"alice": [], "nobody": []}
    for _ in range(15):
        for login, taken in times.items():
            start = time.perf_counter()
            assert not plain(passwords, login, "wrong").proven
            taken.append(time.perf_counter() - start)
    known, unknown = (statistics.median(taken) for taken in times.values())
    assert min(known, unknown) > 0.001, "guesses are not free"
    assert abs(known - unknown) < 0.01


def test_change(tmp_path: Path) -> None:
    path = tmp_path / "p"
    assert change_password(str(path), "alice", KEYS) is False
    path.write_text(f"# ours\n{path.read_text()}\nbob : {HASH}\n")
    path.chmod(0o640)
    assert change_password(str(path), "ALICE", make_keys("new")) is True
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = path.read_text().splitlines()
    assert lines[:3] == ["# ours", "", f"bob : {HASH}"]
    assert lines[3].startswith("ALICE : SCRAM-SHA-256$32768:")
    assert change_password(str(path), "bob", None) is True
    assert change_password(str(path), "bob", None) is False
    assert "bob" not in path.read_text()
    assert os.listdir(tmp_path) == ["p"]


@pytest.mark.parametrize("login", ["", "a:b", "a\nb", "#a", " a", "a ", "\x07", "\u00ad"])
def test_a_login_that_cannot_be(tmp_path: Path, login: str) -> None:
    with pytest.raises(SaslFault):
        change_password(str(tmp_path / "p"), login, KEYS)
    assert os.listdir(tmp_path) == []


def test_a_file_with_a_fault_is_not_made_worse(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("broken\n")
    with pytest.raises(ConfigError, match="p:1"):
        change_password(str(tmp_path / "p"), "alice", KEYS)
    assert (tmp_path / "p").read_text() == "broken\n"


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_password(str(tmp_path / "p"), "alice", KEYS)

    def fail(_fd: int) -> None:
        raise OSError(5, "fault")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="fault"):
        change_password(str(tmp_path / "p"), "bob", KEYS)
    assert os.listdir(tmp_path) == ["p"]
    assert (tmp_path / "p").read_text() == f"alice : {HASH}\n"


def test_two_at_a_time_wait_for_each_other(tmp_path: Path) -> None:
    names = [f"user{n}" for n in range(8)]
    threads = [threading.Thread(target=change_password, args=(str(tmp_path / "p"), name, KEYS)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(parse_passwords((tmp_path / "p").read_bytes(), "p")) == names


# -- mtad passwd --------------------------------------------------------------------------------------------------------

MTAD = [sys.executable, "-c", "from mtad.cli.mtad import main; main()", "passwd"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mtad.toml"
    path.write_text(
        f'hostname = "mx.example.org"\nspool = "{tmp_path}/spool"\nuser = ""\n'
        f'[local]\ndomains = ["example.org"]\npasswords = "{tmp_path}/p"\n'
    )
    return path


def passwd(config: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [*MTAD, "-c", str(config), *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)


def test_from_a_pipe(config: Path, tmp_path: Path) -> None:
    done = passwd(config, "alice", text="open sesame\nmore\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "alice may log in now\n", "")
    assert stat.S_IMODE((tmp_path / "p").stat().st_mode) == 0o600
    assert plain(Passwords.load(str(tmp_path / "p")), "alice", "open sesame").proven
    assert "sesame" not in (tmp_path / "p").read_text()
    assert passwd(config, "alice", text="other").stdout == "alice has a new password\n"
    assert passwd(config, "--delete", "alice").stdout == "alice may no longer log in\n"
    gone = passwd(config, "--delete", "alice")
    assert (gone.returncode, gone.stderr) == (1, f"mtad: nobody logs in as 'alice' ({tmp_path}/p)\n")


@pytest.mark.parametrize(
    ("arguments", "text", "code"), [(("a:b",), "x\n", 1), (("alice",), "\n", 1), (("alice",), "", 1), ((), "", 2)]
)
def test_what_is_refused(config: Path, tmp_path: Path, arguments: tuple[str, ...], text: str, code: int) -> None:
    done = passwd(config, *arguments, text=text)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "p").exists()


def test_on_a_terminal_it_is_asked_for_twice(config: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    with subprocess.Popen(
        [*MTAD, "-c", str(config), "bob"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    ) as child:
        os.close(slave)
        seen = b""
        for prompt, line in (
            (b"Password: ", b"one\n"),
            (b"Once more: ", b"two\n"),
            (b"Password: ", b"two\n"),
            (b"Once more: ", b"two\n"),
        ):
            while not seen.endswith(prompt):
                seen += os.read(master, 1000)
            os.write(master, line)
            seen += b"\n"
        assert child.wait(30) == 0
    os.close(master)
    assert b"one" not in seen
    assert plain(Passwords.load(str(tmp_path / "p")), "bob", "two").proven
