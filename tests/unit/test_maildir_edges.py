"""Local delivery: what is told about an attempt, whose mailbox is used, and a disk that refuses more than once."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtad.address import Address
from mtad.delivery.maildir import MaildirTransport
from mtad.delivery.transport import Interrupted, Task
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Deferred, Delivered, Failed
from tests.unit.spool_aid import needs_root
from tests.unit.test_maildir import CONTENT, KnownUsers, Mail, Pieces


@pytest.fixture
def mail(tmp_path: Path) -> Mail:
    return Mail(tmp_path)


def test_an_attempt_says_when_it_began_and_how_long_it_took(tmp_path: Path) -> None:
    transport = MaildirTransport(str(tmp_path / "mail"), "mx.example.org", KnownUsers())
    task = Task(Envelope("Q1", 0.0, "a@b.test", (Recipient("alice@example.org"),)), (0,), "")
    doubts: list[str] = []
    before = time.time()
    [attempt] = transport.deliver(task, Pieces(CONTENT), doubts.append)
    assert before <= attempt.started <= time.time()
    assert 0 < attempt.transmission < 60
    assert doubts == ["local"]


@needs_root
@pytest.mark.parametrize("part", ["", "tmp", "new"])
@pytest.mark.parametrize("owner", [1, 65534])
def test_l2_a_directory_of_somebody_else_gets_no_mail(mail: Mail, part: str, owner: int) -> None:
    assert isinstance(mail.outcome(), Delivered)
    [stored] = (mail.root / "alice" / "new").iterdir()
    stored.unlink()
    os.chown(mail.root / "alice" / part, owner, 0)
    reason = "cannot store in the mailbox of alice: a directory of it belongs to another user"
    assert mail.outcome() == Deferred("4.2.0", reason)
    assert mail.nothing_left_behind()


def test_a_disk_that_refuses_twice_tells_the_first_reason(mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(mail.outcome(), Delivered)
    fsync = os.fsync

    def refuse(fd: int) -> None:
        if os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    def keep(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        patch.setattr(os, "unlink", keep)
        assert mail.outcome() == Deferred("4.2.0", "cannot store in the mailbox of alice: Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_, **__: refuse(os.open(mail.root / "alice" / "new", os.O_RDONLY)))
        patch.setattr(os, "unlink", keep)
        assert mail.outcome() == Deferred("4.2.0", "cannot store in the mailbox of alice: Input/output error")


def test_the_three_directories_of_a_mailbox_and_no_other(mail: Mail) -> None:
    mail.deliver()
    mail.deliver()
    assert sorted(path.name for path in (mail.root / "alice").iterdir()) == ["cur", "new", "tmp"]
    assert sorted(path.name for path in mail.root.iterdir()) == ["alice"]
    assert len(mail.stored()) == 2


def test_a_mailbox_that_is_there_is_not_flushed_again(mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    mail.deliver()
    flushed: list[str] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[0].rpartition("/")[2])
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    mail.deliver()
    assert flushed == ["tmp", "alice"]


@pytest.mark.parametrize("sizes", [(32768,), (32769,), (10, 32768, 10), (10, 32769, 10), (40000, 40000, 1)])
def test_pieces_are_stored_in_order(mail: Mail, sizes: tuple[int, ...]) -> None:
    pieces = [bytes([97 + number]) * size for number, size in enumerate(sizes)]
    mail.deliver(content=Pieces(*pieces))
    [stored] = mail.stored()
    assert stored.endswith(b"Delivered-To: alice@example.org\n" + b"".join(pieces))


def test_another_delivery_that_is_faster_is_no_fault(mail: Mail, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mail root and the mailbox appear between the look and the mkdir."""
    mkdir = os.mkdir

    def late(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        mkdir(path, mode, dir_fd=dir_fd)
        mkdir(path, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", late)
    assert isinstance(mail.outcome(), Delivered)
    assert mail.stored()


def test_users_are_asked_for_the_address_without_its_quotes(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    class Asked:
        def lookup(self, address: Address) -> str | None:
            asked.append((address.local, address.domain))
            return None

    transport = MaildirTransport(str(tmp_path / "mail"), "mx.example.org", Asked())
    names = ('"a@b"@example.org', '"a\\"b\\\\"@example.org', "plain@example.org")
    task = Task(Envelope("Q1", 0.0, "a@b.test", tuple(map(Recipient, names))), (0, 1, 2), "")
    [attempt] = transport.deliver(task, Pieces(CONTENT), lambda _: None)
    assert asked == [("a@b", "example.org"), ('a"b\\', "example.org"), ("plain", "example.org")]
    assert [outcome for _, outcome in attempt.outcomes] == [Failed("5.1.1", f'unknown user: "{name}"') for name in names]


def test_who_was_served_before_it_broke_off_is_told(tmp_path: Path) -> None:
    """Nobody gets a message twice for it."""
    transport = MaildirTransport(str(tmp_path / "mail"), "mx.example.org", KnownUsers())

    class Content(Pieces):
        reads = 0

        def chunks(self) -> Iterator[bytes]:
            self.reads += 1
            if self.reads == 2:
                raise MemoryError
            return super().chunks()

    people = (Recipient("alice@example.org"), Recipient("bob@example.org"))
    task = Task(Envelope("Q1", 0.0, "a@b.test", people), (0, 1), "")
    with pytest.raises(Interrupted) as broken:
        transport.deliver(task, Content(CONTENT), lambda _: None)
    assert isinstance(broken.value.fault, MemoryError)
    [attempt] = broken.value.attempts
    assert attempt.outcomes == ((0, Delivered("2.0.0", "delivered to maildir")),)
