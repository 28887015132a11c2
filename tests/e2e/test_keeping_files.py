"""Keeping (issue 2), promises 6 and 7: damaged files, and files of every version, in each queue of real processes."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

from mtad.spool.queues import Queue
from tests.e2e.world import World
from tests.peers.mx import Mx, Say, Script
from tests.site import await_value

GOLDEN = Path(__file__).parents[1] / "golden"


# -- promise 6 --------------------------------------------------------------------------------------------------------


def flip_in_head(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)


def flip_in_content(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"hello")] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 20)


def garbage(path: Path) -> None:
    path.write_bytes(b"\0" * 4096)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").touch()


def another(path: Path) -> None:
    """A good queue file under another's name."""
    shutil.copy(path, path.with_name(path.name[:-1] + ("9" if path.name[-1] != "9" else "8")))
    path.unlink()


HARMS = (flip_in_head, flip_in_content, truncate, garbage, link, fifo, directory, another)


def test_6_l3_a_damaged_file_moves_to_corrupt_and_never_stops_the_queue(tmp_path: Path) -> None:
    """A damaged file moves to `corrupt/`, is logged, and is never deleted and never stops the queue."""
    with World(tmp_path, start=False) as world:
        mx = world.mx()
        domain = world.domain(mx)
        queues = (Queue.INCOMING, Queue.ACTIVE, Queue.DEFERRED)
        hostile = os.fsdecode(b"\xff\x1b[2J\n")
        for queue in queues:
            for harm in HARMS:
                queue_id = world.place(queue, f"{harm.__name__}@{domain}", due=time.time())
                harm(world.site.spool_path / queue.value / queue_id)
                world.place(queue, f"good@{domain}", due=time.time())
            for name in ("not a queue id", hostile):
                (world.site.spool_path / queue.value / name).write_text(queue.value)
        world.site.start()
        mx.await_messages(3 * len(HARMS))
        world.site.await_empty_queue()
        corrupt = sorted(os.listdir(world.site.spool_path / "corrupt"))
        assert len(corrupt) == 3 * (len(HARMS) + 2)
        log = world.site.log()
        assert len(re.findall(r"warning: damaged: moved from \w+ to corrupt: ", log)) == len(corrupt)
        assert "\x1b" not in log
        assert all(re.match(r"\w{3} [ \d]\d \d\d:", line) for line in log.splitlines()), "no line break is forged"
        assert transactions_of(mx) == ["good"] * 3 * len(HARMS)
        kept = {path.read_text() for path in (world.site.spool_path / "corrupt").glob("not a queue id*")}
        assert kept == {queue.value for queue in queues}
        world.site.stop()
        world.site.start()
        assert sorted(os.listdir(world.site.spool_path / "corrupt")) == corrupt


def transactions_of(mx: Mx) -> list[str]:
    """The local parts of all recipients that an exchanger took."""
    return [name.partition("@")[0] for message in mx.messages for name in message.recipients]


def test_6_a_file_that_is_damaged_while_it_waits(tmp_path: Path) -> None:
    """A damaged file moves to `corrupt/` [...]: the bits rot while the server runs"""
    with World(tmp_path) as world:
        mx = world.mx(Script(mail=Say("451 4.3.0 later")))
        queue_id = world.send(f"b@{world.domain(mx)}")
        world.site.await_deferred(queue_id)
        flip_in_content(world.site.spool_path / "deferred" / queue_id)
        world.site.run("mtad-flush", queue_id)
        await_value(lambda: os.listdir(world.site.spool_path / "corrupt") == [queue_id])
        world.site.await_log(rf"{queue_id}: warning: damaged: moved from active to corrupt: ")


# -- promise 7 --------------------------------------------------------------------------------------------------------


def test_7_a_file_starts_with_a_magic_and_a_version(tmp_path: Path) -> None:
    """The file starts with a magic and a version"""
    with World(tmp_path) as world:
        queue_id = world.send(f"b@{world.domain(world.address())}")
        world.site.await_deferred(queue_id)
        assert re.match(rb"mtad-queue \d+ ", (world.site.spool_path / "deferred" / queue_id).read_bytes())


def test_7_a_newer_mtad_works_with_what_an_older_one_kept(tmp_path: Path) -> None:
    """a newer `mtad` reads every older version"""
    forever = {"lifetime": "3650d", "bounce_lifetime": "3650d"}
    with World(tmp_path, retry=forever, delivery={"connect_timeout": "100ms"}) as world:
        site, done = world.site, 0
        for file in sorted(GOLDEN.glob("v*/*.queue")):
            named = re.search(rb'"id":"(\w+)"', file.read_bytes())
            if named is None or b"unfinished" in file.read_bytes()[:80]:
                continue
            queue_id = named[1].decode()  # the same for many of them, so one after the other
            shutil.copy(file, site.spool_path / "deferred" / queue_id)
            site.run("mtad-flush", queue_id)  # unless the first scan was faster
            done += 1
            await_value(lambda done=done, name=queue_id: site.log().count(f"{name}: from=<") >= done)  # type: ignore[misc]
            await_value(lambda: not site.files("active"), what="it has been tried")
            (site.spool_path / "deferred" / queue_id).unlink(missing_ok=True)
        assert done
        assert os.listdir(site.spool_path / "corrupt") == []
