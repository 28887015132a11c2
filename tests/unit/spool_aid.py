"""What the tests of the spool share: messages to store, a reader, and a worker process that can be hurt."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from mtad.envelope import Envelope, Recipient
from mtad.outcome import Attempt, Deferred, Delivered, Failed
from mtad.progress import Doubt, Event, Reported
from mtad.spool.message import IncomingFile, OpenMessage
from mtad.spool.queue_id import encode

ID: Final = encode(1_700_000_000_000_000, 4711)
CONTENT: Final = b"Subject: hello\r\n\r\nFirst line\r\n.dot\r\n"
EVENTS: Final[tuple[Event, ...]] = (
    Attempt(
        started=1_700_000_001.25,
        outcomes=((0, Delivered("2.0.0", "sent", "mx.example.net", "250 2.0.0 ok")), (1, Deferred("4.4.1", "timed out"))),
        host="mx.example.net",
        address="192.0.2.1:25",
        tls="TLSv1.3 TLS_AES_256_GCM_SHA384",
        connection=0.25,
        transmission=0.5,
    ),
    Doubt(1_700_000_300.0, (1,), "mx2.example.net"),
    Attempt(1_700_000_301.0, ((1, Failed("5.1.1", "no such user", "mx2.example.net", "550 5.1.1 No such user")),)),
    Reported(1_700_000_302.0, (1,), encode(1_700_000_302_000_000, 4711)),
)

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")


def envelope(queue_id: str = ID, recipients: int = 2, sender: str = "alice@example.org") -> Envelope:
    """An envelope with as many recipients as asked for."""
    return Envelope(
        id=queue_id,
        arrival=1_700_000_000.0,
        sender=sender,
        recipients=tuple(Recipient(f"user{number}@example.net") for number in range(recipients)),
        client="client.example.org[192.0.2.7]",
        helo="client.example.org",
        protocol="ESMTP",
    )


def unheard(_queue_id: str, _line: bytes) -> None:
    """For a message of which nobody is to be told."""


def directory(path: Path) -> int:
    """A descriptor of a directory, made when missing; pytest's process is short enough to keep it."""
    path.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def store(path: Path, message: Envelope, content: bytes = CONTENT, events: Iterable[Event] = ()) -> Path:
    """Put a committed message into the directory ``path``; its file."""
    fd = directory(path)
    try:
        incoming = IncomingFile(fd, message, unheard)
        for start in range(0, len(content), 16_000):
            incoming.write(content[start : start + 16_000])
        incoming.commit()
        with OpenMessage.open(message.id, fd) as opened:
            for event in events:
                opened.append(event)
    finally:
        os.close(fd)
    return path / message.id


def read(file: Path) -> tuple[Envelope, bytes, tuple[Event, ...]]:
    """All that a queue file holds, read as a delivery would read it."""
    fd = directory(file.parent)
    try:
        with OpenMessage.open(file.name, fd) as opened:
            return opened.message.envelope, b"".join(opened.chunks()), opened.message.events
    finally:
        os.close(fd)


class Worker:
    """A Python process of its own that says a line, waits for one, and does its work: time enough to attach strace.

    ``program`` sees `arguments` in ``sys.argv`` and the function ``say``; it calls ``ready()`` where the harm may begin.
    """

    _PRELUDE = """
        import os, sys
        def say(*words):
            os.write(1, (" ".join(map(str, words)) + "\\n").encode())
        def ready():
            say("ready")
            sys.stdin.readline()
    """

    def __init__(self, program: str, *arguments: object) -> None:
        code = textwrap.dedent(self._PRELUDE) + textwrap.dedent(program)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert self.hear() == "ready"

    def hear(self) -> str:
        """The next line that it says, "" when it is gone."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def go(self) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def finish(self) -> list[str]:
        """Let it go on to its end; what it said."""
        said, _ = self.process.communicate(b"\n", timeout=60)
        return said.decode().splitlines()

    def kill(self) -> None:
        """End it without a chance to clean up."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def tracing(worker: Worker, options: Sequence[str], log: Path) -> Iterator[None]:
    """Have strace with these options at a worker that waits, until the worker has finished; skip where it may not."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-o", str(log), *options, "-p", str(worker.process.pid)],
        stderr=subprocess.PIPE,
    )
    assert tracer.stderr is not None
    first = tracer.stderr.readline()
    if b"attached" not in first:
        worker.kill()
        tracer.communicate()
        pytest.skip(f"strace may not attach here: {first.decode().strip()}")
    try:
        yield
    finally:
        if worker.process.poll() is None:
            worker.kill()
        tracer.communicate(timeout=60)


def under_strace(worker: Worker, options: Sequence[str], log: Path) -> tuple[list[str], str]:
    """Let a worker finish under strace with these options: what it said, and the system calls."""
    with tracing(worker, options, log):
        said = worker.finish()
    return said, log.read_text()
