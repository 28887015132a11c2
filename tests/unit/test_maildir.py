"""Local delivery into Maildirs: what lands where, and what a hostile or broken mailbox can do about it (nothing)."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.address import Address
from mtad.delivery.maildir import MaildirTransport, to_unix_lines
from mtad.delivery.transport import Task
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Deferred, Delivered, Failed, Outcome
from tests.unit.spool_aid import needs_root, needs_strace

USERS = {"alice@example.org": "alice", "bob@example.org": "bob", "two words@example.org": "alice"}
CONTENT = b"Subject: hello\r\n\r\nFirst line\r\n.dot\r\n"


class KnownUsers:
    """`mtad.delivery.maildir.Users` from a table."""

    def lookup(self, address: Address) -> str | None:
        return USERS.get(address.key)


class Pieces:
    """A `Content` in pieces."""

    def __init__(self, *pieces: bytes, fault: Exception | None = None) -> None:
        self._pieces = pieces
        self._fault = fault
        self.size = sum(map(len, pieces))

    def chunks(self) -> Iterator[bytes]:
        yield from self._pieces
        if self._fault:
            raise self._fault


class Mail:
    """A mail root and a transport for it."""

    def __init__(self, root: Path) -> None:
        self.root = root / "mail"
        self.transport = MaildirTransport(str(self.root), "mx.example.org", KnownUsers())
        self.doubts: list[str] = []

    def deliver(
        self,
        *recipients: str,
        content: Pieces | None = None,
        sender: str = "a@sender.test",
        body: Literal["", "8bitmime", "binarymime"] = "",
    ) -> dict[str, Outcome]:
        """Deliver one message to each of these; the outcomes by recipient."""
        names = recipients or ("alice@example.org",)
        envelope = Envelope("Q1", 0.0, sender, tuple(Recipient(name) for name in names), body=body)
        task = Task(envelope, tuple(range(len(names))), "")
        [attempt] = self.transport.deliver(task, content or Pieces(CONTENT), self.doubts.append)
        assert attempt.host == "local"
        return {names[index]: outcome for index, outcome in attempt.outcomes}

    def outcome(self, content: Pieces | None = None) -> Outcome:
        """Deliver to alice."""
        return self.deliver(content=content)["alice@example.org"]

    def stored(self, user: str = "alice") -> list[bytes]:
        return [path.read_bytes() for path in (self.root / user / "new").iterdir()]

    def nothing_left_behind(self, user: str = "alice") -> bool:
        return not list((self.root / user / "tmp").iterdir()) and not list((self.root / user / "new").iterdir())


@pytest.fixture
def mail(tmp_path: Path) -> Mail:
    return Mail(tmp_path)


def test_a_message_is_stored_with_its_trace_and_unix_line_ends(mail: Mail) -> None:
    assert mail.outcome() == Delivered("2.0.0", "delivered to maildir")
    [stored] = mail.stored()
    assert stored == (
        b"Return-Path: <a@sender.test>\nDelivered-To: alice@example.org\nSubject: hello\n\nFirst line\n.dot\n"
    )
    assert mail.doubts == ["local"]


def test_l4_the_mailbox_is_made_for_its_owner_only(mail: Mail) -> None:
    mail.deliver()
    for path in (mail.root, *(mail.root / "alice" / part for part in (".", "tmp", "new", "cur"))):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    [file] = (mail.root / "alice" / "new").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stat().st_nlink == 1


@pytest.mark.parametrize("existing", [[], ["new"], ["cur"], ["new", "cur"], ["tmp"], ["tmp", "new", "cur"]])
def test_what_a_mailbox_lacks_is_made(mail: Mail, existing: list[str]) -> None:
    for part in existing:
        (mail.root / "alice" / part).mkdir(parents=True)
    (mail.root / "alice").mkdir(parents=True, exist_ok=True)
    assert isinstance(mail.outcome(), Delivered)
    present = set(os.listdir(mail.root / "alice"))
    assert {"tmp", "new"} <= present
    assert "cur" in present or existing == ["tmp"]


def test_the_mail_root_is_made_with_what_is_above_it(tmp_path: Path) -> None:
    mail = Mail(tmp_path / "a" / "b")
    assert isinstance(mail.outcome(), Delivered)


def test_a_null_sender_and_a_quoted_recipient(mail: Mail) -> None:
    name = '"two words"@example.org'
    assert isinstance(mail.deliver(name, sender="")[name], Delivered)
    [stored] = mail.stored()
    assert stored.startswith(b'Return-Path: <>\nDelivered-To: "two words"@example.org\n')


def test_each_recipient_has_an_outcome_of_its_own(mail: Mail) -> None:
    (mail.root / "bob").mkdir(parents=True)
    (mail.root / "bob" / "tmp").write_text("in the way")
    outcomes = mail.deliver("alice@example.org", "bob@example.org", "nobody@example.org")
    assert [type(outcome) for outcome in outcomes.values()] == [Delivered, Deferred, Failed]
    assert outcomes["nobody@example.org"] == Failed("5.1.1", 'unknown user: "nobody@example.org"')


# -- names ------------------------------------------------------------------------------------------------------------


def test_l4_names_are_those_of_the_design_and_unique_over_threads(mail: Mail) -> None:
    names: list[str] = []

    def make() -> None:
        names.extend(mail.transport._unique_name() for _ in range(2000))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 16_000
    assert all(re.fullmatch(rf"\d+\.M\d{{1,6}}P{os.getpid()}Q\d+\.mx\.example\.org", name) for name in names)


def test_l4_a_host_name_cannot_spoil_a_file_name(tmp_path: Path) -> None:
    name = MaildirTransport(str(tmp_path), "a/b:c", KnownUsers())._unique_name()
    assert name.endswith(r".a\057b\072c")


def test_many_threads_deliver_into_one_mailbox_that_nobody_has_made(mail: Mail) -> None:
    outcomes: list[Outcome] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        outcomes.extend(mail.outcome(Pieces(b"Subject: %d\r\n\r\n" % (number * 100 + turn))) for turn in range(5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {type(outcome) for outcome in outcomes} == {Delivered}
    assert len(set(mail.stored())) == 40
    assert list((mail.root / "alice" / "tmp").iterdir()) == []


# -- line ends --------------------------------------------------------------------------------------------------------


def test_line_ends_wherever_the_pieces_are_cut() -> None:
    text = b"a\r\nb\r\r\nc\rd\n\r\n\r"
    whole = text.replace(b"\r\n", b"\n")
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            pieces = (text[:first], text[first:second], text[second:])
            assert b"".join(to_unix_lines(iter(pieces))) == whole


@given(st.lists(st.text(alphabet="\r\na", max_size=4), max_size=8))
def test_line_ends_of_any_pieces(pieces: list[str]) -> None:
    # Invariant: what comes out does not depend on how the content was cut.
    octets = [piece.encode() for piece in pieces]
    assert b"".join(to_unix_lines(iter(octets))) == b"".join(octets).replace(b"\r\n", b"\n")


def test_a_big_message_is_stored_whole(mail: Mail) -> None:
    pieces = [bytes([65 + number % 26]) * 65533 + b"\r\n\r" for number in range(20)]
    assert isinstance(mail.outcome(Pieces(*pieces, b"\n")), Delivered)
    [stored] = mail.stored()
    assert stored.partition(b"example.org\n")[2] == (b"".join(pieces) + b"\n").replace(b"\r\n", b"\n")


# -- what is in the way -----------------------------------------------------------------------------------------------


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def dangle(path: Path, target: Path) -> None:
    path.symlink_to(target / "nowhere")


def fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def file(path: Path, _: Path) -> None:
    path.write_text("in the way")


@pytest.mark.parametrize("obstacle", [link, dangle, fifo, file])
@pytest.mark.parametrize("place", [".", "tmp", "new"])
def test_l2_what_stands_in_the_place_of_a_directory_leads_nowhere(
    mail: Mail, tmp_path: Path, obstacle: Callable[[Path, Path], None], place: str
) -> None:
    outside = tmp_path / "outside"
    for part in ("tmp", "new", "cur"):
        (outside / part).mkdir(parents=True)
    mailbox = mail.root / "alice"
    if place == ".":
        mail.root.mkdir()
        obstacle(mailbox, outside)
    else:
        mailbox.mkdir(parents=True)
        obstacle(mailbox / place, outside)
    outcome = mail.outcome()
    assert isinstance(outcome, Deferred)
    assert outcome.status == "4.2.0"
    assert re.match("cannot store in the mailbox of alice: (Not a directory|Too many levels)", outcome.text)
    assert sorted(path.name for path in outside.rglob("*")) == ["cur", "new", "tmp"]


def test_the_mail_root_itself_may_be_a_link(mail: Mail, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    mail.root.symlink_to(tmp_path / "elsewhere")
    assert isinstance(mail.outcome(), Delivered)


def test_a_wrong_permission_defers_with_the_reason(mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    mail.deliver()
    new = mail.root / "alice" / "new"
    for path in new.iterdir():
        path.unlink()
    if os.geteuid() == 0:
        real = os.open

        def forbid(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if path == "new":
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(path, flags, mode, dir_fd=dir_fd)

        monkeypatch.setattr(os, "open", forbid)
    else:
        new.chmod(0)
    outcome = mail.outcome()
    new.chmod(0o700)
    assert outcome == Deferred("4.2.0", "cannot store in the mailbox of alice: Permission denied")
    assert mail.nothing_left_behind()


@needs_root
def test_a_full_disk_defers_with_the_reason_and_leaves_nothing(mail: Mail) -> None:
    mail.root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mail.root)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        outcome = mail.outcome(Pieces(*[b"x" * 32768] * 8))
        assert outcome == Deferred("4.3.1", "cannot store in the mailbox of alice: No space left on device")
        assert mail.nothing_left_behind()
        assert isinstance(mail.outcome(), Delivered)
    finally:
        subprocess.run(["umount", str(mail.root)], check=True)


@pytest.mark.parametrize(
    ("call", "code", "status"),
    [
        ("fsync", errno.EIO, "4.2.0"),
        ("rename", errno.EDQUOT, "4.2.2"),
        ("rename", errno.ENOSPC, "4.3.1"),
        ("mkdir", errno.EROFS, "4.2.0"),
    ],
)
def test_l4_each_step_that_the_disk_refuses_defers_and_leaves_nothing(
    mail: Mail, monkeypatch: pytest.MonkeyPatch, call: str, code: int, status: str
) -> None:
    if call != "mkdir":
        for part in ("tmp", "new", "cur"):
            (mail.root / "alice" / part).mkdir(parents=True)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        outcome = mail.outcome()
    assert outcome == Deferred(status, f"cannot store in the mailbox of alice: {os.strerror(code)}")
    assert not (mail.root / "alice").exists() or mail.nothing_left_behind()
    assert isinstance(mail.outcome(), Delivered)


def test_a_directory_that_cannot_be_flushed_takes_the_message_back(mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is deferred, and comes again: there must not be two of it then."""
    assert isinstance(mail.outcome(), Delivered)
    before = sorted((mail.root / "alice" / "new").iterdir())
    fsync = os.fsync

    def refuse(fd: int) -> None:
        if os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        assert mail.outcome() == Deferred("4.2.0", "cannot store in the mailbox of alice: Input/output error")
    assert sorted((mail.root / "alice" / "new").iterdir()) == before
    assert list((mail.root / "alice" / "tmp").iterdir()) == []


def test_a_content_that_turns_out_to_be_damaged_leaves_nothing(mail: Mail) -> None:
    with pytest.raises(ValueError, match="damaged"):
        mail.outcome(Pieces(b"x" * 100_000, fault=ValueError("damaged")))
    assert mail.nothing_left_behind()


def test_descriptors_are_closed_however_it_ends(mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    mail.deliver()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        mail.deliver("alice@example.org", "nobody@example.org")
    (mail.root / "bob").mkdir()
    (mail.root / "bob" / "tmp").mkdir()
    (mail.root / "bob" / "new").write_text("in the way")
    mail.deliver("bob@example.org")
    with pytest.raises(ValueError, match="x"):
        mail.outcome(Pieces(fault=ValueError("x")))
    assert len(os.listdir("/proc/self/fd")) == before


# -- durability -------------------------------------------------------------------------------------------------------


def calls(names: Sequence[str], trace: str) -> list[str]:
    """The names of these system calls in the order of a trace, those that succeeded."""
    found = re.findall(r"^(?:\d+ +)?(\w+)\((.*)\) += \d+", trace, re.M)
    return [name for name, _ in found if name in names]


@needs_strace
def test_promise_5_file_and_directory_are_flushed_before_it_is_delivered(mail: Mail, tmp_path: Path) -> None:
    """Maildir file fsynced, moved by a rename, directory fsynced; then only the outcome."""
    mail.deliver()
    program = f"""
from tests.unit.test_maildir import Mail
from pathlib import Path
import os
mail = Mail(Path({str(tmp_path)!r}))
os.write(1, b"begin")
os.write(1, type(mail.outcome()).__name__.encode())
"""
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-o", str(trace), "-e", "trace=fsync,rename,renameat,renameat2,write"]
    run = subprocess.run(
        [*command, sys.executable, "-c", program],
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    if run.returncode:
        pytest.skip(f"strace may not run here: {run.stderr.decode()[:200]}")
    text = trace.read_text()
    order = calls(["fsync", "renameat", "renameat2", "write"], text[text.index("begin") :])
    assert order[:5] == ["write", "fsync", "renameat", "fsync", "write"]


def test_a_binary_body_keeps_every_octet(mail: Mail) -> None:
    """RFC 3030 section 3: a CRLF in it is not the end of a line."""
    binary = b"Subject: x\r\nContent-Transfer-Encoding: binary\r\n\r\n\x00\r\n\n\r\xff"
    mail.deliver(content=Pieces(binary[:40], binary[40:]), body="binarymime")
    [stored] = mail.stored()
    assert stored == b"Return-Path: <a@sender.test>\r\nDelivered-To: alice@example.org\r\n" + binary
