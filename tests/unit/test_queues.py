"""The spool: moves, locks, scans. Directory = state, rename = move."""

from __future__ import annotations

import os
import stat
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtad.errors import MtadError, QueueFileUnfinished, SpoolBusy
from mtad.outcome import Attempt, Delivered
from mtad.spool.queue_id import encode
from mtad.spool.queues import LIVE, MASTER_LOCK, SCHEDULER_LOCK, Queue, Spool
from tests.unit.spool_aid import CONTENT, EVENTS, ID, Worker, envelope, read


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    """An empty spool."""
    opened = Spool(str(tmp_path / "spool"), create=True)
    yield opened
    opened.close()


def put(spool: Spool, queue: Queue = Queue.ACTIVE, queue_id: str = ID) -> Path:
    """A message in a queue."""
    file = spool.enter(envelope(queue_id))
    file.write(CONTENT)
    file.commit()
    if queue is not Queue.INCOMING:
        assert spool.claim(Queue.INCOMING, queue_id)
    if queue is Queue.DEFERRED:
        assert spool.defer(queue_id, 2e9)
    elif queue is Queue.HOLD:
        assert spool.hold(Queue.ACTIVE, queue_id)
    return Path(spool.root, queue.value, queue_id)


def places(spool: Spool) -> dict[str, list[str]]:
    """Which names are where, empty queues left out."""
    found = {queue.value: sorted(spool.names(queue)) for queue in Queue}
    return {name: names for name, names in found.items() if names}


def test_a_new_spool_is_for_its_owner_only(tmp_path: Path) -> None:
    Spool(str(tmp_path / "a" / "spool"), create=True).close()
    for queue in Queue:
        assert stat.S_IMODE((tmp_path / "a" / "spool" / queue.value).stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a" / "spool").stat().st_mode) == 0o700
    Spool(str(tmp_path / "a" / "spool")).close()


def test_what_is_no_spool_is_named(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(MtadError, match="nowhere"):
        Spool(str(tmp_path / "nowhere"))
    spoils: list[Callable[[Path], object]] = [
        lambda path: path.write_text(""),
        lambda path: path.symlink_to(tmp_path),
        lambda path: path.exists(),
    ]
    for spoil in spoils:
        root = tmp_path / str(time.monotonic_ns())
        Spool(str(root), create=True).close()
        (root / "deferred").rmdir()
        spoil(root / "deferred")
        with pytest.raises(MtadError, match="deferred"):
            Spool(str(root))
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("start", "move", "end"),
    [
        (Queue.INCOMING, lambda spool: spool.claim(Queue.INCOMING, ID), Queue.ACTIVE),
        (Queue.DEFERRED, lambda spool: spool.claim(Queue.DEFERRED, ID), Queue.ACTIVE),
        (Queue.HOLD, lambda spool: spool.claim(Queue.HOLD, ID), Queue.ACTIVE),
        (Queue.ACTIVE, lambda spool: spool.defer(ID, 2e9), Queue.DEFERRED),
        *((queue, lambda spool, queue=queue: spool.hold(queue, ID), Queue.HOLD) for queue in LIVE),
        *((queue, lambda spool, queue=queue: spool.condemn(queue, ID), Queue.CORRUPT) for queue in LIVE),
        (Queue.ACTIVE, lambda spool: spool.remove(ID), None),
    ],
)
def test_a_move_takes_the_whole_message(
    spool: Spool, start: Queue, move: Callable[[Spool], bool], end: Queue | None
) -> None:
    put(spool, start)
    spool.append(start, ID, EVENTS[0])
    assert move(spool)
    assert places(spool) == ({end.value: [ID]} if end else {})
    if end:
        assert read(Path(spool.root, end.value, ID)) == (envelope(), CONTENT, EVENTS[:1])


@pytest.mark.parametrize(
    "move",
    [
        lambda spool: spool.claim(Queue.INCOMING, ID),
        lambda spool: spool.defer(ID, 2e9),
        lambda spool: spool.hold(Queue.DEFERRED, ID),
        lambda spool: spool.condemn(Queue.ACTIVE, ID),
        lambda spool: spool.remove(ID),
        lambda spool: spool.sweep(ID),
        lambda spool: spool.in_work(Queue.ACTIVE, ID),
    ],
)
def test_a_move_of_what_is_gone_says_so(spool: Spool, move: Callable[[Spool], bool]) -> None:
    assert not move(spool)
    assert places(spool) == {}


def test_a_message_in_another_queue_is_not_removed(spool: Spool) -> None:
    for queue in (Queue.INCOMING, Queue.DEFERRED, Queue.HOLD):
        file = put(spool, queue)
        assert not spool.remove(ID)
        file.unlink()


def test_promise_8_the_time_of_the_next_attempt_is_the_mtime(spool: Spool) -> None:
    put(spool)
    assert spool.defer(ID, 1_900_000_000.25)
    assert list(spool.times(Queue.DEFERRED)) == [(ID, 1_900_000_000.25)]
    spool.touch(Queue.DEFERRED, ID, 0.0)
    assert list(spool.times(Queue.DEFERRED)) == [(ID, 0.0)]
    spool.load(Queue.DEFERRED, ID)
    assert list(spool.times(Queue.DEFERRED)) == [(ID, 0.0)]
    with pytest.raises(FileNotFoundError):
        spool.touch(Queue.DEFERRED, encode(1, 1), 0.0)


def test_promise_4_a_restart_finds_in_active_who_was_delivered(spool: Spool) -> None:
    put(spool)
    spool.append(Queue.ACTIVE, ID, Attempt(1.0, ((0, Delivered("2.0.0", "sent")),)))
    again = Spool(spool.root)
    assert [name for name, _ in again.times(Queue.ACTIVE)] == [ID]
    assert [state.settled for state in again.load(Queue.ACTIVE, ID).states] == [True, False]
    again.close()


def test_promise_5_a_bounce_is_durable_before_its_message_goes(spool: Spool) -> None:
    put(spool)
    bounce = spool.enter(envelope(spool.ids.new(), sender=""))
    bounce.write(CONTENT)
    bounce.commit()
    assert places(spool) == {"active": [ID], "incoming": [bounce.envelope.id]}
    assert spool.remove(ID)
    assert read(Path(spool.root, "incoming", bounce.envelope.id))[1] == CONTENT


def test_promise_6_whatever_lies_in_a_queue_can_be_condemned(spool: Spool, tmp_path: Path) -> None:
    place = Path(spool.root, "active")
    names = [encode(number, 7) for number in range(5)]
    (place / names[0]).write_bytes(b"damaged")
    os.mkfifo(place / names[1])
    (place / names[2]).mkdir()
    (place / names[2] / "inside").write_text("kept")
    (place / names[3]).symlink_to(tmp_path / "elsewhere")
    (place / "stranger").write_text("")
    for name in [*names[:4], "stranger"]:
        assert spool.condemn(Queue.ACTIVE, name)
    assert places(spool) == {"corrupt": sorted([*names[:4], "stranger"])}
    corrupt = Path(spool.root, "corrupt")
    assert (corrupt / names[0]).read_bytes() == b"damaged"
    assert (corrupt / names[2] / "inside").read_text() == "kept"
    assert (corrupt / names[3]).is_symlink()


def test_promise_6_a_condemned_file_never_replaces_another(spool: Spool) -> None:
    for number in range(5):
        Path(spool.root, "active", ID).write_text(f"damaged {number}")
        assert spool.condemn(Queue.ACTIVE, ID)
    Path(spool.root, "corrupt", f"{ID}.5").symlink_to("nowhere")
    put(spool)
    assert spool.condemn(Queue.ACTIVE, ID)
    corrupt = Path(spool.root, "corrupt")
    kept = [(corrupt / name).read_text() for name in (ID, *(f"{ID}.{number}" for number in range(1, 5)))]
    assert kept == [f"damaged {number}" for number in range(5)]
    assert CONTENT in (corrupt / f"{ID}.6").read_bytes()


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "\udcff" * 255], ids=["ascii", "utf8", "octets"])
def test_promise_6_names_of_any_length_are_condemned(spool: Spool, name: str) -> None:
    for number in range(3):
        Path(spool.root, "incoming", name).write_text(str(number))
        assert spool.condemn(Queue.INCOMING, name)
    corrupt = Path(spool.root, "corrupt")
    assert sorted((corrupt / kept).read_text() for kept in spool.names(Queue.CORRUPT)) == ["0", "1", "2"]


@pytest.mark.parametrize("name", [SCHEDULER_LOCK, MASTER_LOCK])
def test_one_process_at_a_time_holds_a_lock(spool: Spool, name: str) -> None:
    program = """
        from mtad.spool.queues import Spool
        held = Spool(sys.argv[1]).lock(sys.argv[2])
        ready()
    """
    assert spool.holder(name) is None
    worker = Worker(program, spool.root, name)
    with pytest.raises(SpoolBusy, match=str(worker.process.pid)):
        spool.lock(name)
    assert spool.holder(name) == worker.process.pid
    assert spool.holder(SCHEDULER_LOCK if name == MASTER_LOCK else MASTER_LOCK) is None
    worker.kill()
    assert spool.holder(name) is None
    fd = spool.lock(name)
    assert spool.holder(name) == os.getpid()
    with pytest.raises(SpoolBusy, match=str(os.getpid())):
        Spool(spool.root).lock(name)
    os.close(fd)
    assert spool.holder(name) is None


def test_a_lock_lives_on_in_children_that_do_not_close_it(spool: Spool) -> None:
    # flock belongs to the open file, not to the process: who forks and means to leave the child behind must know.
    program = """
        from mtad.spool.queues import Spool
        fd = Spool(sys.argv[1]).lock()
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            if sys.argv[2] == "close":
                os.close(fd)
            os.write(writer, b"x")
            os.close(writer)
            sys.stdin.read()
            os._exit(0)
        os.read(reader, 1)
        say("ready")
        os._exit(0)
    """
    closing = Worker(program, spool.root, "close")
    closing.process.wait()
    fd = spool.lock()
    os.close(fd)
    closing.finish()
    keeping = Worker(program, spool.root, "keep")
    keeping.process.wait()
    with pytest.raises(SpoolBusy):
        spool.lock()
    keeping.finish()


@pytest.mark.parametrize("act", ["open", "enter"])
def test_a_file_is_in_work_until_its_holder_is_gone_or_killed(spool: Spool, act: str) -> None:
    program = """
        from mtad.spool.queues import Queue, Spool
        from tests.unit.spool_aid import envelope
        spool = Spool(sys.argv[1])
        if sys.argv[2] == "open":
            held = spool.open(Queue.ACTIVE, sys.argv[3])
        else:
            held = spool.enter(envelope(sys.argv[3]))
            held.write(b"x" * 100_000)
        ready()
        held.close() if sys.argv[2] == "open" else held.commit()
        say("done")
        sys.stdin.readline()
    """
    queue = Queue.ACTIVE if act == "open" else Queue.INCOMING
    for kill in (False, True):
        if act == "open":
            put(spool)
        worker = Worker(program, spool.root, act, ID)
        assert spool.in_work(queue, ID)
        assert spool.in_work(queue, ID)
        if not kill:
            worker.go()
            assert worker.hear() == "done"
            assert not spool.in_work(queue, ID)
        worker.kill()
        assert not spool.in_work(queue, ID)
        if act == "enter" and kill:
            with pytest.raises(QueueFileUnfinished):
                spool.load(queue, ID)
        else:
            assert spool.load(queue, ID).envelope == envelope()
        Path(spool.root, queue.value, ID).unlink()


def test_deliveries_of_one_message_share_it(spool: Spool) -> None:
    put(spool)
    with spool.open(Queue.ACTIVE, ID), spool.open(Queue.ACTIVE, ID):
        assert spool.in_work(Queue.ACTIVE, ID)
    assert not spool.in_work(Queue.ACTIVE, ID)


def test_a_scan_tells_messages_from_what_does_not_belong_there(spool: Spool) -> None:
    file = put(spool, Queue.DEFERRED)
    place = file.parent
    odd = [encode(number, 7) for number in range(3)]
    os.mkfifo(place / odd[0])
    (place / odd[1]).mkdir()
    (place / odd[2]).symlink_to(file)
    (place / "notes").write_text("")
    (place / ".gitkeep").write_text("")
    (place / ".hidden").mkdir()
    assert list(spool.times(Queue.DEFERRED)) == [(ID, 2e9)]
    strange = [name for name, mtime in spool.entries(Queue.DEFERRED) if mtime is None]
    assert sorted(strange) == sorted([*odd, "notes", ".hidden"])
    assert (ID, 2e9) in spool.entries(Queue.DEFERRED)


def test_a_file_that_goes_during_a_scan_is_left_out(spool: Spool) -> None:
    files = [put(spool, Queue.ACTIVE, encode(number, 1)) for number in range(10)]
    scan = spool.times(Queue.ACTIVE)
    first = next(scan)[0]
    for file in files:
        file.unlink()
    assert [first, *scan] == [first]


def test_scans_do_not_disturb_each_other(spool: Spool) -> None:
    names = sorted(put(spool, Queue.ACTIVE, encode(number, 1)).name for number in range(500))
    one, two = spool.names(Queue.ACTIVE), spool.names(Queue.ACTIVE)
    seen: tuple[list[str], list[str]] = ([], [])
    for first in one:
        seen[0].append(first)
        seen[1].append(next(two))
    assert sorted(seen[0]) == sorted(seen[1]) == names
    scan = spool.names(Queue.ACTIVE)
    mine = [next(scan) for _ in range(250)]
    child = os.fork()
    if child == 0:
        theirs = sorted(spool.names(Queue.ACTIVE))
        os._exit(0 if theirs == names else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sorted([*mine, *scan]) == names


def test_a_scan_that_is_given_up_leaves_no_descriptor(spool: Spool) -> None:
    put(spool)
    put(spool, queue_id=encode(1, 1))
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        next(spool.times(Queue.ACTIVE))
        next(spool.names(Queue.ACTIVE))
    assert os.listdir("/proc/self/fd") == before


def test_promise_8_a_scan_opens_no_file(spool: Spool) -> None:
    for number in range(100):
        put(spool, Queue.DEFERRED, encode(number, 1))
    worker = Worker(
        """
        from mtad.spool.queues import Queue, Spool
        spool = Spool(sys.argv[1])
        opened = []
        sys.addaudithook(lambda name, arguments: opened.append(arguments[0]) if name == "open" else None)
        ready()
        seen = sum(1 for _ in spool.times(Queue.DEFERRED))
        say(seen, *opened)
        """,
        spool.root,
    )
    assert worker.finish() == ["100 ."]


def test_promise_8_twenty_thousand_messages_are_streamed_in_linear_time(spool: Spool) -> None:
    def fill(first: int, last: int) -> None:
        for number in range(first, last):
            Path(spool.root, "deferred", encode(number, 1)).touch()

    def cost() -> float:
        def once() -> float:
            start = time.process_time()
            assert sum(1 for _ in spool.times(Queue.DEFERRED)) == spool.count(Queue.DEFERRED)
            return time.process_time() - start

        return min(once() for _ in range(3))

    fill(0, 4_000)
    few = cost()
    fill(4_000, 20_000)
    many = cost()
    assert many < 3 * 5 * few
    tracemalloc.start()
    try:
        for _ in spool.times(Queue.DEFERRED):
            pass
        assert tracemalloc.get_traced_memory()[1] < 256 * 1024
    finally:
        tracemalloc.stop()


def test_count_leaves_out_what_a_checkout_needs(spool: Spool) -> None:
    put(spool)
    Path(spool.root, "active", ".gitkeep").touch()
    assert [spool.count(queue) for queue in LIVE] == [0, 1, 0, 0]
