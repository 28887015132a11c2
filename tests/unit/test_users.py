"""The users file: its grammar, lookups, and changes while the server runs."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad import followed
from mtad.address import Address
from mtad.config_rules import is_user_name
from mtad.errors import ConfigError
from mtad.smtp.grammar import parse_mailbox
from mtad.users import Users, parse_users

DOMAINS = ("example.org", "example.net")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for changes at every lookup."""
    monkeypatch.setattr(followed, "CHECK_INTERVAL", 0.0)
    monkeypatch.setattr(followed, "SETTLES", 0.0)


def load(path: Path, text: str) -> Users:
    path.write_text(text)
    return Users.load(str(path), DOMAINS, "root")


def faults(data: bytes) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_users(data, "users", DOMAINS)
    return [str(problem) for problem in caught.value.problems]


def test_lookup(tmp_path: Path) -> None:
    users = load(
        tmp_path / "users",
        "# comment\n\nroot : root@example.org\n\talice:Alice@EXAMPLE.org # first\nalice : al@example.net\r\n"
        'bob : "b#b \\"x"@example.org\nhash : a#b@example.org\n',
    )
    assert users.lookup(Address("root", "example.org")) == "root"
    assert users.lookup(Address("aLICE", "example.org")) == "alice"
    assert users.lookup(Address("al", "Example.Net")) == "alice"
    assert users.lookup(Address('b#b "x', "example.org")) == "bob"
    assert users.lookup(Address("a#b", "example.org")) == "hash"
    assert users.lookup(Address("al", "example.org")) is None
    assert users.lookup(Address("nobody", "example.org")) is None
    assert users.lookup(Address("alice", "")) is None


def test_local_parts_beyond_ascii(tmp_path: Path) -> None:
    """RFC 6531: in either form of an accented letter, in either case; the domain as people or as the DNS write it."""
    (tmp_path / "users").write_text("jürgen : jürgen@bücher.example\nδ : δοκιμή@xn--bcher-kva.example\n")
    users = Users.load(str(tmp_path / "users"), ["xn--bcher-kva.example"], "root")
    assert users.table.oddities == ()
    for text in ("jürgen@bücher.example", "JÜRGEN@BÜCHER.example", "ju\u0308rgen@xn--bcher-kva.example"):
        assert users.lookup(parse_mailbox(text)) == "jürgen"
    assert users.lookup(parse_mailbox("ΔΟΚΙΜΉ@bücher.example")) == "δ"
    assert users.lookup(parse_mailbox("jurgen@bücher.example")) is None


def test_postmaster_has_a_mailbox_in_every_local_domain_and_without_one(tmp_path: Path) -> None:
    users = load(tmp_path / "users", "alice : PostMaster@example.net\n")
    assert users.lookup(Address("postmaster", "")) == "root"
    assert users.lookup(Address("PostMASTER", "example.org")) == "root"
    assert users.lookup(Address("postmaster", "example.net")) == "alice"
    assert users.lookup(Address("postmaster", "elsewhere.example")) is None


def test_an_address_of_a_foreign_domain_is_odd_and_never_found(tmp_path: Path) -> None:
    users = load(tmp_path / "users", "alice : alice@example.org\nalice : alice@elsewhere.example\n")
    assert users.lookup(Address("alice", "elsewhere.example")) is None
    assert [(problem.line, problem.message) for problem in users.table.oddities] == [
        (2, "elsewhere.example is not in local.domains")
    ]


def test_every_fault_is_named_with_its_line() -> None:
    long = "x" * 256
    data = (
        b"alice alice@example.org\nalice :\n: a@example.org\n../x : b@example.org\n.h : c@example.org\n"
        b"a/b : d@example.org\n"
        b"alice : not an address\nalice : a@b@example.org\nalice : a..b@example.org\nalice : x@-y\n\xff : e@example.org\n"
        b"one : same@example.org\ntwo : SAME@example.org\none : same@example.org\na\x01b : f@example.org\n"
        b"alice : b@example.org, c@example.org\n" + long.encode() + b" : g@example.org"
    )
    found = faults(data)
    assert [int(fault.split(":")[1]) for fault in found] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 16, 17]
    assert found[0] == "users:1: expected `user : address`, got 'alice alice@example.org'"
    assert found[3].startswith("users:4: '../x' cannot be the name of a mailbox")
    assert found[6].startswith("users:7: 'not an address' is not an address")
    assert found[10] == "users:11: not UTF-8"
    assert found[11] == "users:13: SAME@example.org belongs to 'one' already, line 12"


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"users: local\.users: No such file"):
        Users.load(str(tmp_path / "users"), DOMAINS, "root")
    (tmp_path / "dir").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        Users.load(str(tmp_path / "dir"), DOMAINS, "root", fallback=True)


def test_without_a_file_development_gives_the_postmaster_user_a_mailbox(tmp_path: Path, eager: None) -> None:
    path = tmp_path / "users"
    users = Users.load(str(path), DOMAINS, "Me", fallback=True)
    assert users.lookup(Address("me", "example.org")) == "Me"
    assert users.lookup(Address("postmaster", "")) == "Me"
    assert users.lookup(Address("root", "example.org")) is None
    path.write_text("root : root@example.org\n")
    assert users.lookup(Address("root", "example.org")) == "root"
    assert users.lookup(Address("me", "example.org")) is None


def test_a_changed_file_is_read_again(tmp_path: Path, eager: None) -> None:
    path = tmp_path / "users"
    users = load(path, "a : a@example.org\n")
    path.write_text("bb : bb@example.org\n")
    assert users.lookup(Address("bb", "example.org")) == "bb"
    assert users.lookup(Address("a", "example.org")) is None


def test_a_replaced_file_of_the_same_size_and_time_is_read_again(tmp_path: Path, eager: None) -> None:
    path = tmp_path / "users"
    users = load(path, "a : a@example.org\n")
    before = path.stat()
    fresh = tmp_path / "fresh"
    fresh.write_text("b : b@example.org\n")
    os.utime(fresh, ns=(before.st_atime_ns, before.st_mtime_ns))
    fresh.rename(path)
    assert users.lookup(Address("b", "example.org")) == "b"


def test_the_file_is_looked_at_once_in_a_while_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "SETTLES", 0.0)
    path = tmp_path / "users"
    users = load(path, "a : a@example.org\n")
    path.write_text("b : b@example.org\n")
    assert users.lookup(Address("b", "example.org")) is None
    users.file.refresh()
    assert users.lookup(Address("b", "example.org")) == "b"


def test_a_file_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    """Whoever writes it in place makes it short for a moment: who has a mailbox must not be told that there is none."""
    path = tmp_path / "users"
    users = load(path, "a : a@example.org\nb : b@example.org\n")
    path.write_text("b : b@example.org\n")
    users.file.refresh()
    assert users.table.users.keys() == {"a@example.org", "b@example.org"}
    now = time.time()
    os.utime(path, (now - 2 * followed.SETTLES,) * 2)
    users.file.refresh()
    assert users.table.users.keys() == {"b@example.org"}


def test_a_file_of_the_future_is_read(tmp_path: Path) -> None:
    """The clock was set back, and nobody knows when the file was written."""
    path = tmp_path / "users"
    users = load(path, "a : a@example.org\n")
    path.write_text("b : b@example.org\n")
    os.utime(path, (time.time() + 3600,) * 2)
    users.file.refresh()
    assert users.table.users.keys() == {"b@example.org"}


def test_a_file_without_a_user_is_not_believed(tmp_path: Path, eager: None) -> None:
    """What is left of it on a full disk; mail that was taken would be sent back."""
    path = tmp_path / "users"
    path.write_text("a : a@example.org\n")
    told: list[str] = []
    users = Users.load(str(path), DOMAINS, "root", warn=told.append)
    path.write_text("")
    for _ in range(3):
        assert users.lookup(Address("a", "example.org")) == "a"
    fault = "local.users: no user is left, which only a reload believes"
    assert told == [f"{path}: {fault}; the users read before stay in force"]
    assert Users.load(str(path), DOMAINS, "root").lookup(Address("a", "example.org")) is None


def test_a_broken_or_missing_new_file_is_told_once_and_the_old_users_stay(tmp_path: Path, eager: None) -> None:
    path = tmp_path / "users"
    path.write_text("a : a@example.org\n")
    told: list[str] = []
    users = Users.load(str(path), DOMAINS, "root", warn=told.append)
    path.write_text("broken\n")
    for _ in range(3):
        assert users.lookup(Address("a", "example.org")) == "a"
    assert told == [f"{path}:1: expected `user : address`, got 'broken'; the users read before stay in force"]
    path.unlink()
    for _ in range(3):
        assert users.lookup(Address("a", "example.org")) == "a"
    assert len(told) == 2
    path.write_text("b : b@example.org\n")
    assert users.lookup(Address("b", "example.org")) == "b"
    assert len(told) == 2


def test_threads_see_one_table_or_the_other(tmp_path: Path, eager: None) -> None:
    path = tmp_path / "users"
    users = load(path, "a : x@example.org\n")
    found: set[str | None] = set()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            found.add(users.lookup(Address("x", "example.org")))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(60):
        fresh = tmp_path / "fresh"
        fresh.write_text(f"{'ab'[number % 2]} : x@example.org\n" + "c : c@example.org\n" * (number % 5))
        fresh.rename(path)
    stop.set()
    for thread in threads:
        thread.join()
    assert found <= {"a", "b"}
    assert users.lookup(Address("x", "example.org")) == "b"


@given(st.binary(max_size=60) | st.text(st.sampled_from('a:@.#/ \n"\\x'), max_size=60).map(str.encode))
def test_any_file_gives_safe_names_or_faults(data: bytes) -> None:
    # Invariant: whatever the file holds, a name that comes out is safe as a directory.
    try:
        table = parse_users(data, "users", DOMAINS)
    except ConfigError:
        return
    assert all(is_user_name(name) for name in table.users.values())


def test_a_file_that_cannot_be_read_is_told_once_and_read_when_it_can_be(
    tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing about the file changes meanwhile."""
    path = tmp_path / "users"
    told: list[str] = []
    path.write_text("a : a@example.org\n")
    users = Users.load(str(path), DOMAINS, "root", warn=told.append)
    path.write_text("b : b@example.org\n")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refusing(errno.EMFILE))
        for _ in range(3):
            assert users.lookup(Address("a", "example.org")) == "a"
    assert told == [f"{path}: local.users: Too many open files; the users read before stay in force"]
    assert users.lookup(Address("b", "example.org")) == "b"
    assert users.lookup(Address("a", "example.org")) is None


def test_other_permissions_are_a_change(tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "users"
    users = load(path, "a : a@example.org\n")
    looks: list[int] = []
    monkeypatch.setattr(users.file, "read", lambda: looks.append(1))
    users.lookup(Address("a", "example.org"))
    path.chmod(0o600)
    users.lookup(Address("a", "example.org"))
    assert looks == [1]


def refusing(error: int) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(error, os.strerror(error))

    return refuse
