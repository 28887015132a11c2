"""Postfix's own view of a queue: its files, written by hand, and its programs to show them. No daemon runs.

queue = PostfixQueue(tmp_path)
queue.add("deferred", "4jYT3m1NV6z4pL", 1234, arrival, "a@x.test", {"b@y.test": "connection refused"})
assert queue.show("-p").startswith("----Queue ID-----")
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

_QUEUES: Final = ("maildrop", "incoming", "active", "deferred", "hold", "defer", "bounce", "public", "private", "flush")
_DAEMONS: Final = Path("/usr/lib/postfix/sbin")
_MAIN: Final = """compatibility_level = 3.6
queue_directory = {queue}
data_directory = {data}
daemon_directory = {daemons}
enable_long_queue_ids = yes
hash_queue_names = bounce
mail_owner = postfix
setgid_group = postdrop
myhostname = mx.example.org
inet_interfaces = 127.0.0.1
"""

needs_postfix = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("postqueue") or not (_DAEMONS / "showq").exists(),
    reason="needs root, and Postfix's postqueue and showq",
)


class PostfixQueue:
    """A queue directory for Postfix's programs to read."""

    def __init__(self, root: Path) -> None:
        """Make it below ``root``."""
        self._spool = root / "postfix" / "spool"
        self._etc = root / "postfix" / "etc"
        data = root / "postfix" / "data"
        owner = pwd.getpwnam("postfix")
        for path in (self._etc, data, self._spool / "pid", *(self._spool / name for name in _QUEUES)):
            path.mkdir(parents=True)
        for name in _QUEUES:
            os.chown(self._spool / name, owner.pw_uid, owner.pw_gid)
        for above in (root, *root.parents):
            if above.stat().st_uid == os.geteuid() and above != Path("/"):
                above.chmod(above.stat().st_mode | 0o011)  # showq gives up root before it reads
        (self._etc / "main.cf").write_text(_MAIN.format(queue=self._spool, data=data, daemons=_DAEMONS))
        (self._etc / "master.cf").touch()
        self._owner = owner

    def add(self, queue: str, queue_id: str, size: int, arrival: int, sender: str, reasons: Mapping[str, str]) -> None:
        """A message of ``size`` octets; ``reasons`` maps each recipient to why it is deferred, or "" ."""
        records = _record(b"C", b"%15d %15d %15d %15d %15d" % (size, 0, len(reasons), 0, size))
        records += _record(b"T", b"%d 0" % arrival) + _record(b"S", sender.encode())
        records += b"".join(_record(b"R", recipient.encode()) for recipient in reasons) + _record(b"M", b"")
        self._write(self._spool / queue / queue_id, records, 0o700)
        log = "".join(
            f"recipient={recipient}\nstatus=4.4.1\naction=delayed\nreason={reason}\n\n"
            for recipient, reason in reasons.items()
            if reason
        )
        if log:
            self._write(self._spool / "defer" / queue_id, log.encode(), 0o600)

    def show(self, option: str) -> str:
        """What ``postqueue`` prints with ``-p`` or ``-j``."""
        command = ["postqueue", "-c", str(self._etc), option]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    def _write(self, path: Path, data: bytes, mode: int) -> None:
        path.write_bytes(data)
        path.chmod(mode)
        os.chown(path, self._owner.pw_uid, self._owner.pw_gid)


def _record(kind: bytes, data: bytes) -> bytes:
    """A record of a Postfix queue file: type, length in groups of seven bits, data."""
    size, length = len(data), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    length.append(size)
    return kind + bytes(length) + data
