"""The spool's small print: locks and who holds them, copies in the way, links, what is made durable, what is swept."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtad.errors import MtadError, SpoolBusy
from mtad.spool.queue_file import UNFINISHED
from mtad.spool.queue_id import encode
from mtad.spool.queues import LIVE, MASTER_LOCK, SCHEDULER_LOCK, Queue, Spool
from tests.unit.spool_aid import CONTENT, EVENTS, ID
from tests.unit.test_queues import places, put

OTHER = encode(1_700_000_000_000_001, 4711)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    """An empty spool; at the end no descriptor may be left over."""
    before = sorted(os.listdir("/proc/self/fd"))
    opened = Spool(str(tmp_path / "spool"), create=True)
    yield opened
    opened.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is made durable, in order: the name of the file or directory, or "all"."""
    done: list[str] = []
    fsync, fdatasync = os.fsync, os.fdatasync

    def name(fd: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def one(fd: int) -> None:
        done.append(name(fd))
        fsync(fd)

    def data(fd: int) -> None:
        done.append(name(fd))
        fdatasync(fd)

    monkeypatch.setattr(os, "fsync", one)
    monkeypatch.setattr(os, "fdatasync", data)
    monkeypatch.setattr(os, "sync", lambda: done.append("all"))
    return done


def copy(source: Path, queue: Queue, spool: Spool) -> Path:
    """Somebody puts a copy of a file into a queue."""
    target = Path(spool.root, queue.value, source.name)
    shutil.copy2(source, target)
    return target


def test_a_new_spool_and_its_name_are_durable(tmp_path: Path, flushed: list[str]) -> None:
    Spool(str(tmp_path / "here" / "spool"), create=True).close()
    assert flushed == ["spool", "here"]
    flushed.clear()
    Spool(str(tmp_path / "here" / "spool")).close()
    assert flushed == []


def test_missing_queues_of_a_spool_are_made_only_when_asked(spool: Spool) -> None:
    Path(spool.root, "hold").rmdir()
    with pytest.raises(MtadError, match=r"^.*spool is not a spool: No such file or directory: .*/hold$"):
        Spool(spool.root)
    Spool(spool.root, create=True).close()
    assert Path(spool.root, "hold").is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_spool_below_a_directory_that_we_may_not_read() -> None:
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # which all may pass, whatever TMPDIR says
    try:
        place.chmod(0o733)
        os.seteuid(65534)
        try:
            spool = Spool(str(place / "spool"), create=True)
        finally:
            os.seteuid(0)
        spool.close()
        assert sorted(path.name for path in (place / "spool").iterdir()) == sorted(queue.value for queue in Queue)
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("name", [MASTER_LOCK, SCHEDULER_LOCK])
def test_a_lock_names_its_holder(spool: Spool, name: str) -> None:
    path = Path(spool.root, name)
    assert spool.holder(name) is None
    path.write_text("1234567 and some more\n")
    assert spool.holder(name) is None
    fd = spool.lock(name)
    assert path.read_text() == f"{os.getpid()}\n"
    assert spool.holder(name) == os.getpid()
    with pytest.raises(SpoolBusy, match=rf"^{spool.root} is in use by process {os.getpid()}$"):
        spool.lock(name)
    assert path.read_text() == f"{os.getpid()}\n"
    os.close(fd)
    assert spool.holder(name) is None
    os.close(spool.lock(name))


def test_locks_are_two_and_by_default_the_schedulers_is_taken(spool: Spool) -> None:
    first = spool.lock()
    assert spool.holder(SCHEDULER_LOCK) == os.getpid()
    assert spool.holder() is None
    second = spool.lock(MASTER_LOCK)
    assert spool.holder() == os.getpid()
    os.close(first)
    os.close(second)


@pytest.mark.parametrize(("text", "named"), [(b"", "?"), (b"\xff\n", "\N{REPLACEMENT CHARACTER}"), (b"  \n", "?")])
def test_a_lock_whose_holder_has_not_signed_yet(spool: Spool, text: bytes, named: str) -> None:
    path = Path(spool.root, SCHEDULER_LOCK)
    path.write_bytes(text)
    with path.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert spool.holder(SCHEDULER_LOCK) == 0
        with pytest.raises(SpoolBusy) as caught:
            spool.lock()
    assert str(caught.value) == f"{spool.root} is in use by process {named}"


def test_those_who_ask_for_the_holder_do_not_disturb_each_other(spool: Spool) -> None:
    os.close(spool.lock(MASTER_LOCK))
    with Path(spool.root, MASTER_LOCK).open("rb") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert spool.holder() is None


def test_a_lock_is_for_its_owner_and_follows_no_link(spool: Spool, tmp_path: Path) -> None:
    os.close(spool.lock())
    assert stat.S_IMODE(Path(spool.root, SCHEDULER_LOCK).stat().st_mode) == 0o600
    victim = tmp_path / "victim"
    victim.write_text("precious")
    Path(spool.root, MASTER_LOCK).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        spool.lock(MASTER_LOCK)
    assert victim.read_text() == "precious"


def test_a_held_lock_does_not_keep_the_disk_from_going_read_only(spool: Spool) -> None:
    fd = spool.lock()
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    os.close(fd)


def test_a_lock_that_cannot_be_signed_is_let_go(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_ACCMODE == os.O_WRONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, mode, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(OSError, match="Read-only"):
            spool.lock()
    os.close(spool.lock())


def test_a_lock_is_taken_on_a_full_disk(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliveries would empty it; who holds the lock is only for people to read."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", _full)
        fd = spool.lock()
    with pytest.raises(SpoolBusy, match="in use by process"):
        spool.lock()
    os.close(fd)


def _full(_fd: int, _data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_nobody_is_told_of_a_file_that_could_not_be_put_aside(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one name, and the disk refuses to move one away: the move is not made, and nothing else happens."""
    told: list[str] = []
    spool.displaced = lambda _queue, name: told.append(name)
    for queue in ("active", "incoming"):
        (Path(spool.root) / queue / "4cXyZ11111z1").write_bytes(queue.encode())
    monkeypatch.setattr(spool, "condemn", lambda _queue, _name: False)
    assert not spool._move(Queue.INCOMING, Queue.ACTIVE, "4cXyZ11111z1")
    assert told == []
    assert (Path(spool.root) / "active" / "4cXyZ11111z1").read_bytes() == b"active"


def test_a_lock_on_a_broken_disk_is_let_go(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_fd: int, _data: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", broken)
        with pytest.raises(OSError, match="Input/output error"):
            spool.lock()
    os.close(spool.lock())


@pytest.mark.parametrize(
    ("error", "expected"), [(errno.ENFILE, True), (errno.EIO, True), (errno.ENOENT, False), (errno.ELOOP, False)]
)
def test_a_message_is_in_work_as_long_as_nobody_can_tell(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, error: int, expected: bool
) -> None:
    """Or a delivery of the scheduler before would be done twice."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "open", refuse)
    assert spool.in_work(Queue.ACTIVE, "4cXyZ11111z1") is expected


def test_a_message_is_in_work_when_no_lock_is_to_be_had(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(spool.root) / "active" / "x").touch()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert spool.in_work(Queue.ACTIVE, "x")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_a_lock_that_root_makes_belongs_to_the_owner_of_the_spool(spool: Spool) -> None:
    os.close(spool.lock(MASTER_LOCK))
    assert Path(spool.root, MASTER_LOCK).stat().st_uid == 0
    os.chown(spool.root, 65534, 65533)
    os.close(spool.lock())
    status = Path(spool.root, SCHEDULER_LOCK).stat()
    assert (status.st_uid, status.st_gid) == (65534, 65533)


def test_release_sets_the_time_and_moves(spool: Spool) -> None:
    put(spool, Queue.HOLD)
    assert spool.release(ID, 1_900_000_000.5)
    assert places(spool) == {"deferred": [ID]}
    assert spool.due(ID) == 1_900_000_000.5
    assert not spool.release(ID, 1_900_000_000.0)
    assert not spool.defer(ID, 1_900_000_000.0)
    assert spool.due(ID) == 1_900_000_000.5


def test_the_times_of_a_link_are_its_own(spool: Spool, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("")
    os.utime(victim, (5, 5))
    Path(spool.root, "deferred", ID).symlink_to(victim)
    spool.touch(Queue.DEFERRED, ID, 7)
    assert spool.due(ID) == 7
    assert victim.stat().st_mtime == 5
    assert dict(spool.entries(Queue.DEFERRED)) == {ID: None}


@pytest.mark.parametrize("queue", [Queue.INCOMING, Queue.DEFERRED])
def test_of_two_copies_the_active_one_stays(spool: Spool, queue: Queue) -> None:
    told: list[tuple[Queue, str]] = []
    spool.displaced = lambda queue, name: told.append((queue, name))
    active = put(spool)
    inode = active.stat().st_ino
    copy(active, queue, spool)
    assert not spool.claim(queue, ID)
    assert told == [(queue, ID)]
    assert places(spool) == {"active": [ID], "corrupt": [ID]}
    assert active.stat().st_ino == inode


@pytest.mark.parametrize("target", [Queue.DEFERRED, Queue.HOLD])
def test_a_copy_in_the_way_goes_to_corrupt(spool: Spool, target: Queue) -> None:
    told: list[tuple[Queue, str]] = []
    spool.displaced = lambda queue, name: told.append((queue, name))
    active = put(spool)
    inode = active.stat().st_ino
    copy(active, target, spool)
    assert spool.defer(ID, 2e9) if target is Queue.DEFERRED else spool.hold(Queue.ACTIVE, ID)
    assert told == [(target, ID)]
    assert places(spool) == {target.value: [ID], "corrupt": [ID]}
    assert Path(spool.root, target.value, ID).stat().st_ino == inode


def test_a_move_to_where_the_message_is_displaces_nothing(spool: Spool) -> None:
    put(spool)
    assert spool.claim(Queue.ACTIVE, ID)
    assert not spool.claim(Queue.INCOMING, ID)
    assert not spool.claim(Queue.DEFERRED, OTHER)
    assert places(spool) == {"active": [ID]}


def test_only_a_file_that_is_gone_is_no_error(spool: Spool) -> None:
    with pytest.raises(OSError, match="too long") as caught:
        spool.claim(Queue.INCOMING, "x" * 300)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_condemned_files_are_numbered(spool: Spool) -> None:
    for _ in range(3):
        Path(spool.root, "hold", "x" * 70).write_text("")
        assert spool.condemn(Queue.HOLD, "x" * 70)
    assert places(spool) == {"corrupt": ["x" * 60 + ".1", "x" * 60 + ".2", "x" * 70]}
    assert not spool.condemn(Queue.HOLD, "gone")


def test_find_and_remove(spool: Spool) -> None:
    for queue in LIVE:
        assert spool.find(ID) is None
        put(spool, queue)
        assert spool.find(ID) is queue
        for other in Queue:
            assert spool.remove(ID, other) is (other is queue)
    put(spool)
    assert spool.remove(ID)
    put(spool)
    assert spool.condemn(Queue.ACTIVE, ID)
    assert spool.find(ID) is None


def test_a_reader_is_not_at_work_and_a_delivery_is(spool: Spool) -> None:
    put(spool)
    with spool.peek(Queue.ACTIVE, ID) as opened:
        assert b"".join(opened.chunks()) == CONTENT
        assert not spool.in_work(Queue.ACTIVE, ID)
    with spool.open(Queue.ACTIVE, ID):
        assert spool.in_work(Queue.ACTIVE, ID)
        assert not spool.in_work(Queue.HOLD, ID)
    assert not spool.in_work(Queue.ACTIVE, ID)


def test_what_is_appended_is_loaded(spool: Spool) -> None:
    put(spool, Queue.HOLD)
    for event in EVENTS:
        spool.append(Queue.HOLD, ID, event)
    assert spool.load(Queue.HOLD, ID).events == EVENTS
    with pytest.raises(FileNotFoundError):
        spool.load(Queue.ACTIVE, ID)


def test_what_is_no_file_is_not_in_work_and_keeps_nobody_waiting(spool: Spool, tmp_path: Path) -> None:
    os.mkfifo(Path(spool.root, "hold", ID))
    assert not spool.in_work(Queue.HOLD, ID)
    locked = tmp_path / "locked"
    Path(spool.root, "hold", OTHER).symlink_to(locked)
    with locked.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not spool.in_work(Queue.HOLD, OTHER)


def test_a_sweep_takes_what_was_never_finished_and_nothing_else(spool: Spool) -> None:
    incoming = Path(spool.root, "incoming")
    put(spool, Queue.INCOMING, OTHER)
    assert not spool.sweep(OTHER)
    assert not spool.sweep(ID)
    os.mkfifo(incoming / ID)
    assert not spool.sweep(ID)
    (incoming / ID).unlink()
    (incoming / ID).write_bytes(b"no queue file")
    assert not spool.sweep(ID)
    (incoming / ID).write_bytes(UNFINISHED)
    with (incoming / ID).open("rb") as receiver:
        fcntl.flock(receiver, fcntl.LOCK_EX)
        assert not spool.sweep(ID)
    assert places(spool) == {"incoming": sorted([ID, OTHER])}
    assert spool.sweep(ID)
    assert places(spool) == {"incoming": [OTHER]}


def test_a_sweep_is_no_way_out_of_the_spool(spool: Spool, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(UNFINISHED)
    link = Path(spool.root, "incoming", ID)
    link.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        spool.sweep(ID)
    assert link.is_symlink()


def test_sync_flushes_files_and_all_queues(spool: Spool, flushed: list[str]) -> None:
    put(spool, Queue.HOLD)
    flushed.clear()
    spool.sync([ID, OTHER])
    assert flushed == [ID, *(queue.value for queue in Queue)]
    flushed.clear()
    spool.sync()
    assert flushed == [queue.value for queue in Queue]


def test_sync_passes_over_what_is_no_file_of_ours(spool: Spool, flushed: list[str], tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("")
    Path(spool.root, "hold", ID).symlink_to(tmp_path / "victim")
    os.mkfifo(Path(spool.root, "hold", OTHER))
    spool.sync([ID, OTHER])
    assert "victim" not in flushed
    assert flushed[-5:] == [queue.value for queue in Queue]


def test_sync_of_many_is_one_call(spool: Spool, flushed: list[str]) -> None:
    spool.sync([OTHER] * 200)
    assert flushed == [queue.value for queue in Queue]
    flushed.clear()
    spool.sync([OTHER] * 201)
    assert flushed == ["all", *(queue.value for queue in Queue)]


def test_scans_leave_out_and_mark(spool: Spool) -> None:
    put(spool, Queue.DEFERRED)
    deferred = Path(spool.root, "deferred")
    (deferred / ".gitkeep").write_text("")
    (deferred / ".directory").mkdir()
    (deferred / "README").write_text("")
    (deferred / OTHER).mkdir()
    assert dict(spool.entries(Queue.DEFERRED)) == {ID: 2e9, ".directory": None, "README": None, OTHER: None}
    assert list(spool.times(Queue.DEFERRED)) == [(ID, 2e9)]
    assert spool.count(Queue.DEFERRED) == 3
    assert list(spool.entries(Queue.HOLD)) == []


def test_a_scan_goes_on_behind_what_it_leaves_out(spool: Spool) -> None:
    deferred = Path(spool.root, "deferred")
    ids = [encode(1_700_000_000_000_000 + number, 4711) for number in range(40)]
    # Whatever order a file system gives: some of these come before some of the messages.
    for number in (0, 1):
        (deferred / f".first{number}").write_text("")
    for queue_id in ids:
        (deferred / queue_id).write_text("")
    for number in (0, 1):
        (deferred / f".last{number}").write_text("")
    assert sorted(name for name, _ in spool.times(Queue.DEFERRED)) == ids
    scan = spool.times(Queue.DEFERRED)
    first, _ = next(scan)
    gone = [queue_id for queue_id in ids if queue_id != first][::2]
    for queue_id in gone:
        (deferred / queue_id).unlink()
    assert sorted([first, *(name for name, _ in scan)]) == sorted(set(ids) - set(gone))
