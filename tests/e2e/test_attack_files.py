"""What a stranger names, and what lies in the spool: L-1 and L-3 of the list of attacks, over real processes."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest

from mtad.spool.queues import Queue
from tests.e2e.test_keeping_files import HARMS, transactions_of
from tests.e2e.world import MESSAGE, World
from tests.site import Site, await_value
from tests.unit.spool_aid import needs_root


def tree(root: Path, leave_out: tuple[str, ...]) -> dict[str, int]:
    """Every path below ``root`` with its time of change, but for what is below one of these names."""
    found = {}
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in leave_out]
        for name in {*names, *files} - {*leave_out}:
            path = os.path.join(directory, name)
            found[path] = os.lstat(path).st_ctime_ns
    return found


def test_l1_no_recipient_leads_out_of_the_mail_root(tmp_path: Path) -> None:
    """Refused, each of them; those that a quoted string lets through are unknown users, and nothing is made anywhere."""
    mark = f"attack-{uuid.uuid4().hex}"
    names = [
        f"../../{mark}@example.org",
        f'"../../{mark}"@example.org',
        f'"../../../../../../../../tmp/{mark}"@example.org',
        f'"/tmp/{mark}"@example.org',
        f"/tmp/{mark}@example.org",
        f"alice/{mark}@example.org",
        f'"alice/../{mark}"@example.org',
        '"."@example.org',
        '".."@example.org',
        f'".{mark}"@example.org',
        f'"a\\\0{mark}"@example.org',
        f"%2e%2e%2f{mark}@example.org",
        f"alice+../../{mark}@example.org",
        f'"alice+../../{mark}"@example.org',
        "alice/@example.org",
        '"alice\\/"@example.org',
        f"alice@../{mark}",
        f"alice@[../{mark}]",
        f"alice@example.org/../{mark}",
        f"{'x' * 300}@example.org",
        f'"{"../" * 90}"@example.org',
        "\u0430lice@example.org",
    ]
    with Site(tmp_path) as site:
        site.send("a@sender.test", "alice@example.org", MESSAGE)
        site.await_mail("alice")
        site.await_empty_queue()
        before = tree(tmp_path, ("spool", "mtad.log"))
        for name in names:  # a connection for each: twenty errors in one are the end of it
            with site.client() as client:
                client.ehlo()
                client.mail("a@sender.test")
                client.send(f"RCPT TO:<{name}>\r\n".encode())
                code, text = client.getreply()
                assert 500 <= code < 560, (name, code, text)
        after = tree(tmp_path, ("spool", "mtad.log"))
        assert after == before
        assert os.listdir(site.mail_root) == ["alice"]
        for place in ("/tmp", "/etc", "/", os.getcwd()):
            assert not [name for name in os.listdir(place) if mark in name]
        assert site.queue() == []


def test_l1_a_quoted_name_that_is_a_users_gets_to_his_own_mailbox(tmp_path: Path) -> None:
    """The address is free text; where its mail is stored is the user's name alone."""
    site = Site(tmp_path)
    site.users_path.write_text('alice : "../../bob"@example.org\nbob : "/etc/passwd"@example.org\n')
    with site:
        site.send("a@sender.test", ['"../../bob"@example.org', '"/etc/passwd"@example.org'], MESSAGE)
        [stored] = site.await_mail("alice")
        assert b'\nDelivered-To: "../../bob"@example.org\n' in stored
        site.await_mail("bob")
        assert sorted(os.listdir(site.mail_root)) == ["alice", "bob"]


def zero_length(path: Path) -> None:
    os.truncate(path, 0)
    os.utime(path, (0, 0))


def sparse(path: Path) -> None:
    os.truncate(path, 10 << 30)


def sparse_zeroes(path: Path) -> None:
    os.truncate(path, 0)
    os.truncate(path, 10 << 30)


def foreign(path: Path) -> None:
    os.chown(path, 65534, 65534)


def device(path: Path) -> None:
    """A device, which a backup that was put back may have made."""
    path.unlink()
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))


MORE_HARMS = (*HARMS, zero_length, sparse, sparse_zeroes, foreign, device)


@needs_root
@pytest.mark.parametrize("queue", [Queue.INCOMING, Queue.ACTIVE, Queue.DEFERRED], ids=lambda queue: queue.value)
def test_l3_whatever_lies_in_a_queue(tmp_path: Path, queue: Queue) -> None:
    """It goes to corrupt/, and everything else is delivered, once."""
    with World(tmp_path, start=False) as world:
        mx = world.mx()
        domain = world.domain(mx)
        for harm in MORE_HARMS:
            queue_id = world.place(queue, f"bad@{domain}", due=time.time() - 5)
            harm(world.site.spool_path / queue.value / queue_id)
            world.place(queue, f"good@{domain}", due=time.time() - 5)
        shown = world.site.run("mtaq", "--json")  # which reads it all, as whoever asks
        assert (shown.returncode, shown.stdout.count(f'"good@{domain}"')) == (0, len(MORE_HARMS)), shown.stderr
        world.site.start()
        # an empty file in incoming is a message that never came to be: it is swept, and nobody was promised anything
        lost = 1 if queue is Queue.INCOMING else 0
        corrupt = world.site.spool_path / "corrupt"
        mx.await_messages(len(MORE_HARMS))
        await_value(lambda: len(os.listdir(corrupt)) == len(MORE_HARMS) - lost)
        world.site.await_empty_queue()
        assert transactions_of(mx) == ["good"] * len(MORE_HARMS)
        assert world.site.mailbox("alice") == [], "nobody is told of what nobody sent"
        assert "panic" not in world.site.log()


def test_l3_two_files_with_one_id(tmp_path: Path) -> None:
    """A copy that somebody has put back: neither file is lost, and the log says where the other one is."""
    with World(tmp_path) as world:
        domain = world.domain(world.address())
        queue_id = world.send(f"b@{domain}")
        world.site.await_deferred(queue_id)
        deferred = world.site.spool_path / "deferred" / queue_id
        first = deferred.read_bytes()
        world.site.stop()
        (world.site.spool_path / "active" / queue_id).write_bytes(first)
        world.site.start()
        world.site.await_log(rf"{queue_id}: warning: damaged: moved from deferred to corrupt: another file has the same")
        assert (world.site.spool_path / "corrupt" / queue_id).read_bytes() == first
        world.site.await_deferred(queue_id)
        assert deferred.read_bytes().startswith(first)
        assert len(deferred.read_bytes()) > len(first), "tried once more"
