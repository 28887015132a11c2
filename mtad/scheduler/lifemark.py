"""Whether the machine went down under a scheduler: then what it and its deliveries wrote last may be lost.

Records and removals are not flushed one by one, so a power cut takes those of the last seconds: a message that was
delivered and removed may be there again, and nothing in its file says so. A file in the spool tells it: it has the boot id
of the machine, the time of the last sign of life, and whether there was an end in good order. What has not changed since
before a cut may have been delivered then, and the log says so when it is taken in hand (`mtad.scheduler.files`).

It costs one flush at the start of a scheduler and one at its end, and none for a message. Where doubts are flushed before
the final dot (``retry.on_doubt = "hold"``) the queue files themselves say who is in doubt, and a cut says nothing more.

Errors: a file that cannot be read, or a machine without boot ids, is no cut; OSErrors of writing go to the caller.
See also: proc_sys_kernel(5), ``/proc/sys/kernel/random/boot_id``.
"""

from __future__ import annotations

import os
from typing import Final

import msgspec

from mtad.stable import flush

#: Name of the file in the spool.
LIFE_MARK: Final = "scheduler.boot"
#: Seconds that a scheduler may have lived after the last sign of life that reached the disk: the next sign (10 s), and what
#: a journal and the page cache keep back (5 s and 30 s on Linux).
LATEST: Final = 60.0

_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"


class _Mark(msgspec.Struct, frozen=True):
    boot: str
    cut: float
    """Until when, in seconds since the epoch, something may have been lost; 0: nothing ever."""
    flushed: bool
    """Doubts were flushed before each final dot."""
    ended: bool


def boot_id(path: str = _BOOT_ID) -> str:
    """What names this run of the machine; "" when that is not known."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""


class LifeMark:
    """The file of one spool, in the hands of whoever has the scheduler's lock."""

    def __init__(self, root: str, boot: str, *, flushed: bool) -> None:
        """``root`` is the spool; ``boot`` a `boot_id`; ``flushed``: doubts are on stable storage before each final dot."""
        self._path = os.path.join(root, LIFE_MARK)
        self._mark = _Mark(boot, 0.0, flushed, ended=False)
        self._written = False

    @property
    def cut(self) -> float:
        """See `begin`."""
        return self._mark.cut

    def begin(self, now: float) -> float:
        """A scheduler begins: up to when messages may have been delivered without a trace; 0 when none may.

        ``now`` in seconds since the epoch.

        Raises:
            OSError: the mark cannot be written; `cut` says the same, and each `alive` tries again.
        """
        before = self._read()
        if before is not None:
            mark, seen = before
            lost = not mark.ended and not mark.flushed and "" not in (mark.boot, self._mark.boot)
            # A clock that is behind what the disk says cannot tell that it was sooner.
            latest = seen + LATEST if now < seen else min(seen + LATEST, now)
            cut = latest if lost and mark.boot != self._mark.boot else mark.cut
            self._mark = msgspec.structs.replace(self._mark, cut=cut)
        self._write()
        return self._mark.cut

    def alive(self) -> None:
        """A sign of life, to be given every ten seconds or so; a disk that refuses makes no difference."""
        try:
            if self._written:
                os.utime(self._path)
            else:  # what stands there is of the one before, and must not look younger than it is
                self._write()
        except OSError:
            pass  # the last sign is a little older then

    def end(self) -> None:
        """It ends in good order: all that was done is on stable storage.

        Raises:
            OSError: the mark cannot be written.
        """
        self._mark = msgspec.structs.replace(self._mark, ended=True)
        self._write()

    def _read(self) -> tuple[_Mark, float] | None:
        try:
            with open(self._path, "rb") as file:
                return msgspec.json.decode(file.read(4096), type=_Mark), os.fstat(file.fileno()).st_mtime
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def _write(self) -> None:
        temporary = f"{self._path}.new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, msgspec.json.encode(self._mark))
            flush(fd)
        finally:
            os.close(fd)
        os.rename(temporary, self._path)
        directory = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flush(directory)
        finally:
            os.close(directory)
        self._written = True
