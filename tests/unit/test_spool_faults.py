"""Things go wrong on purpose: at each system call of a commit a kill, an error, a full disk, a power cut.

Invariants, after each of them: what was acknowledged is there and whole; nothing half is claimed to be whole; what the
receiver was told had failed is not there, or is swept.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from mtad.errors import QueueFileDamaged, QueueFileUnfinished
from mtad.spool.queue_file import PREAMBLE_SIZE
from mtad.spool.queues import Queue, Spool
from tests.unit.spool_aid import (
    CONTENT,
    EVENTS,
    ID,
    Worker,
    envelope,
    needs_strace,
    read,
    tracing,
    under_strace,
)

#: The large message outgrows memory twice before its commit: three writes, then the first line.
LARGE: Final = CONTENT * 5_000
CONTENTS: Final = {"small": CONTENT, "large": LARGE}

#: The calls of a receiver, as strace names them.
CALLS: Final = "openat,flock,newfstatat,fstat,write,pwrite64,fsync,close,unlinkat,ftruncate"
ERRORS: Final = {"openat": "EMFILE", "flock": "ENOLCK", "write": "ENOSPC", "close": "EIO"}

RECEIVER: Final = """
    from mtad.spool.queues import Spool
    from tests.unit.spool_aid import envelope
    from tests.unit.test_spool_faults import CONTENTS
    spool = Spool(sys.argv[1])
    content = CONTENTS[sys.argv[2]]
    ready()
    file = spool.enter(envelope())
    try:
        for start in range(0, len(content), 8192):
            file.write(content[start:start + 8192])
        file.commit()
    except OSError as fault:
        file.discard()
        say("failed", fault.errno)
    else:
        say("committed")
"""


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    """An empty spool."""
    opened = Spool(str(tmp_path / "spool"), create=True)
    yield opened
    opened.close()


def after(spool: Spool, content: bytes, said: list[str]) -> str:
    """What is in incoming after a fault: "whole", "unfinished" or "nothing", and never anything else; swept at the end."""
    names = list(spool.names(Queue.INCOMING))
    assert names in ([], [ID])
    file = Path(spool.root, "incoming", ID)
    if not names:
        state = "nothing"
    else:
        assert not spool.in_work(Queue.INCOMING, ID)
        try:
            assert read(file) == (envelope(), content, ())
            state = "whole"
        except QueueFileUnfinished:
            state = "unfinished"
    if "committed" in said:
        assert state == "whole"
    assert spool.sweep(ID) == (state == "unfinished")
    assert file.exists() == (state == "whole")
    file.unlink(missing_ok=True)
    return state


def calls_of(log: str) -> list[str]:
    """The names of the calls in a log of strace up to the last word of the worker, in order."""
    calls = re.findall(r"^\d+ +(\w+)\(", log, re.MULTILINE)
    return calls[: len(calls) - calls[::-1].index("write") - 1] if "write" in calls else calls


def traced(spool: Spool, name: str, log: Path, *inject: str) -> tuple[list[str], str]:
    """A receiver under strace, with faults injected."""
    options = ["-e", f"trace={CALLS}"]
    for fault in inject:
        options += ["-e", f"inject={fault}"]
    return under_strace(Worker(RECEIVER, spool.root, name), options, log)


def every_call(spool: Spool, name: str, log: Path) -> list[tuple[str, int]]:
    """Each call of a receiver that meets no fault, with its number among those of its name."""
    said, text = traced(spool, name, log)
    assert said == ["committed"]
    assert after(spool, CONTENTS[name], said) == "whole"
    counts: Counter[str] = Counter()
    found = []
    for call in calls_of(text):
        counts[call] += 1
        found.append((call, counts[call]))
    assert {"openat", "flock", "write", "pwrite64", "fsync", "close"} <= set(counts)
    assert counts["fsync"] == 2
    return found


@needs_strace
@pytest.mark.parametrize("name", CONTENTS)
def test_promise_1_the_file_then_its_directory_are_synced_before_it_is_acknowledged(
    spool: Spool, tmp_path: Path, name: str
) -> None:
    worker = Worker(RECEIVER, spool.root, name)
    said, log = under_strace(worker, ["-y", "-e", f"trace={CALLS}"], tmp_path / "log")
    assert said == ["committed"]
    incoming = re.escape(os.path.join(spool.root, "incoming"))
    file = rf"<{incoming}/{ID}>"
    steps = [
        rf"openat\([^\n]*{ID}\", O_WRONLY\|O_CREAT\|O_EXCL[^\n]*0600",
        rf"flock\(\d+{file}, LOCK_EX\)",
        rf"write\(\d+{file}, \"mtad-queue 1 unfinished",
        rf"pwrite64\(\d+{file}, \"mtad-queue 1 0",
        rf"fsync\(\d+{file}\)",
        rf"fsync\(\d+<{incoming}>\)",
        rf"close\(\d+{file}\)",
        r"write\(1<[^\n]*committed",
    ]
    assert re.search(r"[\s\S]*?".join(steps), log), log
    # Promise 3: each octet is written once, and the first line once more.
    written = sum(int(size) for size in re.findall(rf"p?write(?:64)?\(\d+{file}.*= (\d+)$", log, re.MULTILINE))
    assert written == Path(spool.root, "incoming", ID).stat().st_size + PREAMBLE_SIZE
    assert len(re.findall("unlink|truncate", log)) == 0


@needs_strace
@pytest.mark.parametrize("name", CONTENTS)
def test_promise_2_a_kill_before_any_call_leaves_all_or_what_is_swept(spool: Spool, tmp_path: Path, name: str) -> None:
    log = tmp_path / "log"
    states = []
    for call, number in every_call(spool, name, log):
        said, _ = traced(spool, name, log, f"{call}:signal=SIGKILL:when={number}")
        assert said == []
        states.append(after(spool, CONTENTS[name], said))
    # In the order of the calls there is nothing, then something unfinished, then the whole message.
    assert states == sorted(states, key=["nothing", "unfinished", "whole"].index)
    assert set(states) == {"nothing", "unfinished", "whole"}


@needs_strace
@pytest.mark.parametrize("name", CONTENTS)
def test_promise_1_an_error_of_any_call_fails_the_message_and_leaves_nothing(
    spool: Spool, tmp_path: Path, name: str
) -> None:
    log = tmp_path / "log"
    for call, number in every_call(spool, name, log):
        said, _ = traced(spool, name, log, f"{call}:error={ERRORS.get(call, 'EIO')}:when={number}")
        state = after(spool, CONTENTS[name], said)
        if call == "close":  # what counts was synced before
            assert (said, state) == (["committed"], "whole")
        else:
            assert said == [f"failed {getattr(errno, ERRORS.get(call, 'EIO'))}"]
            assert state == "nothing", (call, number)


@needs_strace
@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("number", [1, 2])
def test_a_message_whose_sync_failed_and_that_cannot_be_removed_is_emptied(
    spool: Spool, tmp_path: Path, name: str, number: int
) -> None:
    faults = (f"fsync:error=EIO:when={number}", "unlinkat:error=EIO")
    said, _ = traced(spool, name, tmp_path / "log", *faults)
    assert said == [f"failed {errno.EIO}"]
    assert after(spool, CONTENTS[name], said) == "unfinished"


@needs_strace
def test_a_commit_that_is_lied_to_about_a_write_is_noticed_by_the_reader(spool: Spool, tmp_path: Path) -> None:
    # The kernel says that it wrote and did not: nobody can acknowledge better, but nobody takes it for the message.
    said, _ = traced(spool, "small", tmp_path / "log", "write:retval=1:when=1")
    assert said == ["committed"]
    with pytest.raises((QueueFileDamaged, QueueFileUnfinished)):
        read(Path(spool.root, "incoming", ID))


@needs_strace
def test_a_sweep_between_creation_and_lock_costs_the_receiver_nothing(spool: Spool, tmp_path: Path) -> None:
    worker = Worker(RECEIVER, spool.root, "small")
    log = tmp_path / "log"
    delay = ["-e", "trace=flock", "-e", "inject=flock:delay_enter=400000:when=1"]
    with tracing(worker, delay, log):
        worker.go()
        while not spool.sweep(ID):
            assert worker.process.poll() is None
        assert worker.finish() == ["committed"]
    assert log.read_text().count("flock(") == 2
    assert after(spool, CONTENT, ["committed"]) == "whole"


@needs_strace
def test_promise_4_a_durable_record_is_synced(spool: Spool, tmp_path: Path) -> None:
    program = """
        from mtad.spool.queues import Queue, Spool
        from tests.unit.spool_aid import EVENTS, ID
        with Spool(sys.argv[1]).open(Queue.INCOMING, ID) as message:
            ready()
            message.append(EVENTS[0])
            say("appended")
            message.append(EVENTS[1], durable=True)
            say("durable")
    """
    file = spool.enter(envelope())
    file.commit()
    said, log = under_strace(Worker(program, spool.root), ["-e", "trace=write,fdatasync,fsync"], tmp_path / "log")
    assert said == ["appended", "durable"]
    assert re.findall(r"^\d+ +(\w+)\((?!1,)", log, re.MULTILINE) == ["write", "write", "fdatasync"]
    assert log.index("fdatasync") < log.index("durable")


@needs_strace
def test_an_event_that_comes_between_the_halves_of_another_spoils_neither(spool: Spool, tmp_path: Path) -> None:
    # The disk is full in the middle of an append; another process appends; then there is space again.
    file = spool.enter(envelope())
    file.commit()
    path = Path(spool.root, "incoming", ID)
    size = path.stat().st_size
    program = """
        import resource
        from mtad.spool.queues import Queue, Spool
        from tests.unit.spool_aid import EVENTS, ID
        with Spool(sys.argv[1]).open(Queue.INCOMING, ID) as message:
            ready()
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
            message.append(EVENTS[0])
    """
    worker = Worker(program, spool.root, size + 40)
    delay = ["-e", "trace=write", "-e", "inject=write:delay_exit=500000:when=1"]
    with tracing(worker, delay, tmp_path / "log"):
        worker.go()
        while path.stat().st_size != size + 40:
            assert worker.process.poll() is None
        spool.append(Queue.INCOMING, ID, EVENTS[1])
        resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        worker.finish()
    assert worker.process.returncode == 0
    assert spool.load(Queue.INCOMING, ID).events == (EVENTS[1], EVENTS[0])


@needs_strace
def test_promise_1_a_new_spool_is_durable_itself(tmp_path: Path) -> None:
    program = """
        from mtad.spool.queues import Spool
        ready()
        Spool(sys.argv[1], create=True)
    """
    _, log = under_strace(Worker(program, tmp_path / "spool"), ["-y", "-e", "trace=mkdir,fsync"], tmp_path / "log")
    synced = re.findall(r"fsync\(\d+<([^>]*)>", log)
    assert synced == [str(tmp_path / "spool"), str(tmp_path)]
    assert log.rindex("mkdir(") < log.index("fsync(")


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_size_limit_at_any_octet_fails_the_message_and_leaves_nothing(spool: Spool, name: str) -> None:
    program = """
        import json, resource
        from mtad.spool.queues import Spool
        from tests.unit.spool_aid import envelope
        from tests.unit.test_spool_faults import CONTENTS
        spool = Spool(sys.argv[1])
        content = CONTENTS[sys.argv[2]]
        ready()
        for limit in json.loads(sys.argv[3]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            file = spool.enter(envelope())
            try:
                for start in range(0, len(content), 8192):
                    file.write(content[start:start + 8192])
                file.commit()
                said = "committed"
            except OSError as fault:
                said = str(fault.errno)
            say(limit, said, *os.listdir(sys.argv[1] + "/incoming"))
    """
    file = spool.enter(envelope())
    file.write(CONTENTS[name])
    file.commit()
    path = Path(spool.root, "incoming", ID)
    size = path.stat().st_size
    path.unlink()
    limits = [*range(0, size, max(1, size // 100)), size - 1, size]
    said = Worker(program, spool.root, name, json.dumps(limits)).finish()
    assert said[-1] == f"{size} committed {ID}"
    assert said[:-1] == [f"{limit} {errno.EFBIG}" for limit in limits[:-1]]
    assert after(spool, CONTENTS[name], ["committed"]) == "whole"


def test_without_descriptors_a_message_fails_and_nothing_is_left(spool: Spool) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open("/dev/null", os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 1, hard))
    try:
        for content in CONTENTS.values():
            file = spool.enter(envelope())
            with pytest.raises(OSError, match="Too many open files"):  # noqa: PT012
                file.write(content)
                file.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(held[0])
    assert list(spool.names(Queue.INCOMING)) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only directory")
def test_a_directory_without_permission_fails_the_message(spool: Spool) -> None:
    incoming = Path(spool.root, "incoming")
    incoming.chmod(0o500)
    file = spool.enter(envelope())
    with pytest.raises(PermissionError):
        file.commit()
    incoming.chmod(0o700)
    assert list(spool.names(Queue.INCOMING)) == []
