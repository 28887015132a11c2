"""Attacks on the mail root and on the spool: what somebody else has put there, or puts there meanwhile (L-1 to L-4)."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mtad.address import Address
from mtad.delivery.maildir import MaildirTransport
from mtad.errors import ConfigError
from mtad.outcome import Deferred, Delivered
from mtad.scheduler.scan import Scan
from mtad.spool.queues import Queue, Spool
from mtad.users import Users, parse_users
from tests.unit.scheduler_aid import LATER, OK, World
from tests.unit.spool_aid import needs_root
from tests.unit.test_maildir import KnownUsers, Mail, Pieces

NOBODY = 65534
#: Seconds after which everything is due: the files have the wall's time, the world has one of its own.
LONG = 1e9


@pytest.fixture
def mail(tmp_path: Path) -> Mail:
    return Mail(tmp_path)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)  # what is durable is tested elsewhere
    world = World(tmp_path)
    yield world
    world.spool.close()


# -- L-1 --------------------------------------------------------------------------------------------------------------

LEADING_ELSEWHERE = ["../x", "..", ".", ".hidden", "/abs", "a/b", "a\0b", "u+../../x", "\u2028", "x" * 256]


@pytest.mark.parametrize("name", LEADING_ELSEWHERE)
def test_l1_a_name_that_leads_elsewhere_is_no_mailbox(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be the name of a mailbox|expected"):
        parse_users(f"{name} : alice@example.org\n".encode(), "users", ["example.org"])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Alice@example.org", "aLICE@EXAMPLE.org"),
        ("stra\u00dfe@example.org", "STRASSE@example.org"),
        ("caf\u00e9@example.org", "cafe\u0301@example.org"),
        ("\u03b1\u03c3@example.org", "\u0391\u03a3@example.org"),
        ('"alice"@example.org', "alice@example.org"),
        ("\ufb01ne@example.org", "fine@example.org"),
    ],
)
def test_l1_addresses_that_collide_have_one_owner(first: str, second: str) -> None:
    with pytest.raises(ConfigError, match="belongs to 'one' already"):
        parse_users(f"one : {first}\ntwo : {second}\n".encode(), "users", ["example.org"])


def test_l1_addresses_that_only_look_alike_do_not_collide(tmp_path: Path) -> None:
    """A Cyrillic letter and a full-width one are other letters: nobody gets another's mail."""
    (tmp_path / "users").write_text("alice : alice@example.org\n")
    users = Users.load(str(tmp_path / "users"), ["example.org"], "root")
    for local in ("\u0430lice", "\uff41lice", "alice ", "alice\u200b", "alice\0", "alice@example.org\0"):
        assert users.lookup(Address(local, "example.org")) is None


# -- L-2 --------------------------------------------------------------------------------------------------------------


def outside(tmp_path: Path) -> Path:
    """Another's Maildir, which nothing may get into."""
    path = tmp_path / "outside"
    for part in ("tmp", "new", "cur"):
        (path / part).mkdir(parents=True)
    return path


def content(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


@pytest.mark.parametrize("place", ["tmp", "new"])
@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_l2_cve_2008_2936_a_link_that_waits_under_the_name_of_a_file_is_not_written_through(
    mail: Mail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, kind: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    mail.deliver()
    for stored in (mail.root / "alice" / "new").iterdir():
        stored.unlink()
    monkeypatch.setattr(mail.transport, "_unique_name", lambda: "1.M1P1Q1.mx")
    waiting = mail.root / "alice" / place / "1.M1P1Q1.mx"
    if kind == "symlink":
        waiting.symlink_to(victim)
    else:
        os.link(victim, waiting)
    outcome = mail.outcome()
    assert victim.read_text() == "mine"
    if place == "tmp":
        assert outcome == Deferred("4.2.0", "cannot store in the mailbox of alice: File exists")
        assert mail.stored() == []
    else:  # a name in new is replaced by the rename, not followed
        assert isinstance(outcome, Delivered)
        assert not waiting.is_symlink()
        assert waiting.stat().st_nlink == 1


@needs_root
@pytest.mark.parametrize("place", [".", "tmp", "new"])
def test_l2_a_directory_of_somebody_else_gets_no_mail(mail: Mail, place: str) -> None:
    """A mail root that is open to everybody by mistake: another user has made the mailbox before its first message."""
    mail.root.mkdir(mode=0o777)
    for part in ("tmp", "new", "cur"):
        (mail.root / "alice" / part).mkdir(parents=True)
    os.chown(mail.root / "alice" / place, NOBODY, NOBODY)
    reason = "cannot store in the mailbox of alice: a directory of it belongs to another user"
    assert mail.outcome() == Deferred("4.2.0", reason)
    assert mail.nothing_left_behind()
    os.chown(mail.root / "alice" / place, 0, 0)
    assert isinstance(mail.outcome(), Delivered)


#: Two names change places as fast as they can, each time in one step of the kernel: AT_FDCWD, RENAME_EXCHANGE.
SWAPPER = """
import ctypes, os, sys
swap = ctypes.CDLL(None).renameat2
first, second = map(os.fsencode, sys.argv[1:])
print(swap(-100, first, -100, second, 2), flush=True)
while not swap(-100, first, -100, second, 2):
    pass
"""


@pytest.mark.parametrize("place", [".", "tmp", "new"])
def test_l2_a_directory_that_is_swapped_for_a_link_all_the_time(
    mail: Mail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    elsewhere = outside(tmp_path)
    mail.deliver()
    target = mail.root / "alice" / place
    lure = target.parent / "lure"
    lure.symlink_to(elsewhere / place)
    kinds = dict.fromkeys((Delivered, Deferred), 0)
    with subprocess.Popen([sys.executable, "-c", SWAPPER, str(target), str(lure)], stdout=subprocess.PIPE) as swapper:
        try:
            assert swapper.stdout is not None
            if swapper.stdout.readline() != b"0\n":
                pytest.skip("this file system cannot exchange two names")
            tries, deadline = 0, time.monotonic() + 60
            # On a busy machine the other one may not come to its turn for long.
            while tries < 3000 or (min(kinds.values()) <= 10 and time.monotonic() < deadline):
                tries += 1
                outcome = mail.outcome(Pieces(b"Subject: x\r\n\r\n"))
                assert isinstance(outcome, (Delivered, Deferred))
                kinds[type(outcome)] += 1
            assert swapper.poll() is None
        finally:
            swapper.kill()
    assert content(elsewhere) == ["cur", "new", "tmp"]
    assert min(kinds.values()) > 10, "there was a race"
    stored = [path for path in mail.root.rglob("*") if path.is_file()]
    assert len(stored) == 1 + kinds[Delivered], "and what was delivered is there"


# -- L-3 --------------------------------------------------------------------------------------------------------------


@contextmanager
def as_nobody(world: World) -> Iterator[None]:
    """A world that runs, and owns its queues, as an unprivileged user."""
    for queue in Queue:
        os.chown(world.root / queue.value, NOBODY, NOBODY)
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def look(world: World) -> None:
    """One scan of each queue, as the process makes them."""
    visitors: dict[Queue, Callable[[str, float], object]] = {
        Queue.INCOMING: world.scheduler.found_incoming,
        Queue.ACTIVE: lambda name, _: world.scheduler.restore(name),
        Queue.DEFERRED: world.scheduler.found_deferred,
    }
    for queue, visit in visitors.items():
        scan = Scan(world.spool, queue, visit, world.scheduler.found_stranger, print)  # type: ignore[arg-type]
        while scan.advance():
            pass


@needs_root
@pytest.mark.parametrize("queue", [Queue.INCOMING, Queue.ACTIVE, Queue.DEFERRED])
@pytest.mark.parametrize("harm", ["unreadable", "foreign", "foreign but writable"])
def test_l3_a_file_that_is_not_ours_goes_to_corrupt_and_the_rest_flows(world: World, queue: Queue, harm: str) -> None:
    bad, good = world.place(queue, "b@bad.test"), world.place(queue, "b@good.test")
    path = world.path(queue, bad)
    path.chmod(0 if harm == "unreadable" else 0o666 if harm == "foreign but writable" else 0o644)
    os.chown(path, 1, 1)
    os.chown(world.path(queue, good), NOBODY, NOBODY)
    world.clock.advance(LONG)
    with as_nobody(world):
        look(world)
        jobs = [(job.queue_id, job.destination) for job in world.run()]
        assert jobs == [(good, "good.test")]
    assert world.where(bad) == ["corrupt"]
    [said] = world.events.about("damaged")
    assert said[0] == bad
    assert re.search("Permission denied|belongs to another user", said[2])


@pytest.mark.parametrize("queue", [Queue.INCOMING, Queue.ACTIVE, Queue.DEFERRED])
@pytest.mark.parametrize("whole", [True, False])
def test_l3_ten_gibibytes_of_nothing_cost_no_time_and_no_memory(world: World, queue: Queue, *, whole: bool) -> None:
    """Sparse: zeroes only, or behind a message that is whole."""
    queue_id = world.place(queue)
    if not whole:
        os.truncate(world.path(queue, queue_id), 0)
    os.truncate(world.path(queue, queue_id), 10 << 30)
    good = world.place(queue, "b@good.test")
    world.clock.advance(LONG)
    start = time.process_time()
    look(world)
    assert [job.queue_id for job in world.run()] == [good]
    assert time.process_time() - start < 1.0
    assert world.where(queue_id) == ["corrupt"]


def test_l3_a_file_without_a_single_octet(world: World) -> None:
    """In incoming it is a message that never came to be, and is swept; anywhere else it is damage."""
    names = {}
    for queue in (Queue.INCOMING, Queue.ACTIVE, Queue.DEFERRED):
        names[queue] = world.envelope().id
        world.path(queue, names[queue]).touch()
        os.utime(world.path(queue, names[queue]), (0, 0))
    look(world)
    world.run()
    assert world.where(names[Queue.INCOMING]) == []
    assert world.where(names[Queue.ACTIVE]) == world.where(names[Queue.DEFERRED]) == ["corrupt"]


def test_l3_two_files_with_one_id_are_never_made_one(world: World) -> None:
    """The one that was under way is deferred where the other lies: neither is overwritten."""
    queue_id = world.enter("b@far.test")
    [job] = world.run()
    other = world.path(Queue.DEFERRED, queue_id)
    other.write_bytes(world.path(Queue.ACTIVE, queue_id).read_bytes() + b"\n")
    copy = other.read_bytes()
    told: list[tuple[Queue, str]] = []
    world.spool.displaced = lambda *what: told.append(what)
    world.finish(job, LATER)
    world.run()
    assert world.where(queue_id) == ["deferred", "corrupt"]
    assert world.path(Queue.CORRUPT, queue_id).read_bytes() == copy
    assert not world.load(Queue.DEFERRED, queue_id).states[0].settled
    assert len(world.load(Queue.DEFERRED, queue_id).events) == 1
    assert told == [(Queue.DEFERRED, queue_id)]


@pytest.mark.parametrize("queue", [Queue.INCOMING, Queue.DEFERRED, Queue.HOLD])
def test_l3_an_id_that_is_used_again_does_not_replace_what_is_under_way(tmp_path: Path, queue: Queue) -> None:
    world = World(tmp_path)
    spool: Spool = world.spool
    queue_id = world.place(Queue.ACTIVE)
    first = world.path(Queue.ACTIVE, queue_id).read_bytes()
    for number in range(3):
        world.path(queue, queue_id).write_bytes(b"%d" % number)
        assert spool.claim(queue, queue_id) is False
        assert world.path(Queue.ACTIVE, queue_id).read_bytes() == first
    kept = [path.read_bytes() for path in sorted((world.root / "corrupt").iterdir())]
    assert kept == [b"0", b"1", b"2"], "and each of them is kept"
    assert spool.claim(queue, queue_id) is False, "one that is gone displaces nothing"
    assert world.where(queue_id)[0] == "active"
    spool.close()


def test_l3_a_crowd_of_strangers_delays_nobody(world: World) -> None:
    """So many that a million is a matter of time, not of memory or of a turn: each slice is as long as the first."""
    for number in range(5000):
        world.path(Queue.DEFERRED, f"stranger {number}").touch()
    scan = Scan(world.spool, Queue.DEFERRED, world.scheduler.found_deferred, world.scheduler.found_stranger, print)
    longest = 0.0
    more, slices = True, 0
    while more:
        start = time.process_time()
        more = scan.advance()
        longest = max(longest, time.process_time() - start)
        queue_id = world.enter("b@far.test")
        assert queue_id in [job.queue_id for job in world.run()], "in the very same turn"
        world.deliver(LATER)
        slices += 1
    assert slices >= 25
    assert longest < 0.5
    assert len(os.listdir(world.root / "corrupt")) == 5000


def test_l3_files_that_appear_while_a_queue_is_looked_through(world: World) -> None:
    early = [world.place(Queue.DEFERRED) for _ in range(250)]
    scan = Scan(world.spool, Queue.DEFERRED, world.scheduler.found_deferred, world.scheduler.found_stranger, print)
    assert scan.advance()
    late = [world.place(Queue.DEFERRED) for _ in range(50)]
    (world.root / "deferred" / "stranger").touch()
    while scan.advance():
        pass
    look(world)  # whether a scan sees what came meanwhile is the file system's affair; the next one does
    world.clock.advance(LONG)
    seen: set[str] = set()
    while jobs := world.run():
        seen.update(job.queue_id for job in jobs)
        world.deliver(OK)
    assert seen >= {*early, *late}
    assert os.listdir(world.root / "corrupt") == ["stranger"]


# -- L-4 --------------------------------------------------------------------------------------------------------------


def test_l4_names_are_unique_over_processes_and_a_clock_that_stands_still(
    mail: Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a process id comes again: what is in new/ would be replaced by a second file of its name."""
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    for number in range(3):  # three processes in turn that had the same id
        mail.transport = MaildirTransport(str(mail.root), "mx.example.org", KnownUsers())
        assert isinstance(mail.outcome(Pieces(b"Subject: again %d\r\n\r\n" % number)), Delivered)
    children = []
    for child in range(4):
        if not (pid := os.fork()):
            try:
                fine = [
                    isinstance(mail.outcome(Pieces(b"Subject: %d.%d\r\n\r\n" % (child, n))), Delivered) for n in range(10)
                ]
                os._exit(0 if all(fine) else 1)
            finally:
                os._exit(2)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    stored = mail.stored()
    assert len(stored) == len(set(stored)) == 43
    for path in (mail.root / "alice" / "new").iterdir():
        assert ":" not in path.name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
