"""Fuzzing: what a target is, one input under watch, a campaign of many, and the smallest input that still fails.

A `Target` is a function that takes octets and raises when its invariant does not hold; the first comment in the function is
the invariant. Whatever it raises is a finding, and so is an input that costs more than a second of processor time or more
memory than `MEMORY`. What it returns are the things that happened, as values: an input that made something new happen is
kept, and further inputs are made from it. That stands in for the coverage that a compiler could tell.

Invariants: a campaign with the same target and seed tries the same inputs in the same order, however far it comes.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import re
import resource
import signal
import time
import traceback
import tracemalloc
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType
from typing import Final

import msgspec

from tools.lib.fuzz_mutate import Mutator

#: Seconds of processor time for one input.
TIME: Final = 1.0
#: Octets of memory for one input, at their peak; an input has 64 KiB at most.
MEMORY: Final = 32 * 1024 * 1024
#: Every so many inputs one is tried with its memory measured, which takes several times as long.
MEASURED: Final = 256
#: Octets of address space on top of what is there when a campaign begins: past that an input gets a MemoryError.
ADDRESS_SPACE: Final = 512 * 1024 * 1024
#: Octets that may still be in use when a campaign is over; and what tracemalloc keeps for each time that it was used.
LEAK: Final = 32 * 1024 * 1024
TRACING: Final = 64 * 1024
#: Octets of inputs that are kept for what they made happen; and of one of them, for what is made from long ones takes long.
CORPUS: Final = 4 * 1024 * 1024
LONGEST: Final = 8 * 1024
#: Findings after which a campaign ends.
ENOUGH: Final = 5
#: Seconds for making one finding smaller.
PATIENCE: Final = 20.0

_ROOT: Final = Path(__file__).resolve().parents[2]
_COMMENT: Final = re.compile(r"^ *# ?(.*)$")

Check = Callable[[bytes], Iterable[Hashable]]


class Broken(Exception):
    """An invariant does not hold; the text says how."""


class _TooSlow(BaseException):
    """Not an Exception, so that nobody on the way takes it for a failure that he knows."""


class _TooLarge(Exception):
    """An input needed too much memory."""


class Target(msgspec.Struct, frozen=True):
    """Something to be fuzzed."""

    name: str
    check: Check
    """Raises anything when the invariant does not hold; returns what happened."""
    seeds: Callable[[], Sequence[bytes]]
    """Inputs to begin with."""
    words: Sequence[bytes] = ()
    """Words of the format."""
    share: int = 1
    """How much of the time of a run of all targets is this one's."""

    @property
    def invariant(self) -> str:
        """The first comment of the check."""
        lines: list[str] = []
        for line in inspect.getsource(self.check).splitlines():
            match = _COMMENT.match(line)
            if match is not None:
                lines.append(match[1])
            elif lines:
                break
        return " ".join(lines)


class Failure(msgspec.Struct, frozen=True):
    """How an input failed. Two failures with the same ``kind`` have the same cause, as far as a program can tell."""

    kind: str
    report: str


class Finding(msgspec.Struct, frozen=True):
    """An input that fails: as it was found, and as small as it could be made."""

    target: str
    data: bytes
    smallest: bytes
    failure: Failure


class Result(msgspec.Struct, frozen=True):
    """What a campaign came to. ``kept`` are the inputs that made something new happen."""

    inputs: int
    seconds: float
    kept: int
    findings: tuple[Finding, ...]


def require(holds: bool, text: str) -> None:
    """Raise `Broken` with this text unless it holds."""
    if not holds:
        raise Broken(text)


class _Watch:
    """Ends an input that takes too long. Only for the main thread."""

    def __init__(self) -> None:
        self._armed = False
        self._before: object = None

    def _ring(self, _number: int, _frame: FrameType | None) -> None:
        if self._armed:
            raise _TooSlow

    def __enter__(self) -> _Watch:
        self._before = signal.signal(signal.SIGPROF, self._ring)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self._before)  # type: ignore[arg-type]  # what signal.signal gave

    def run(self, check: Check, data: bytes) -> Iterable[Hashable]:
        # Again and again, for the first one may be lost in a destructor.
        signal.setitimer(signal.ITIMER_PROF, TIME, TIME / 10)
        self._armed = True
        try:
            return check(data)
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_PROF, 0)


def attempt(check: Check, data: bytes, *, measured: bool = False) -> Failure | Iterable[Hashable]:
    """Try one input: how it failed, or what happened. ``measured``: its memory counts, too."""
    with _Watch() as watch:
        return _attempt(watch, check, data, measured)


def _attempt(watch: _Watch, check: Check, data: bytes, measured: bool) -> Failure | Iterable[Hashable]:
    try:
        if not measured:
            return watch.run(check, data)
        with _memory():
            return watch.run(check, data)
    except _TooSlow:
        return Failure("slow", f"more than {TIME} s of processor time, when it was here:\n{traceback.format_exc()}")
    except _TooLarge as fault:
        return Failure("large", str(fault))
    except KeyboardInterrupt:
        raise
    except BaseException as fault:  # a SystemExit is a finding, too
        return Failure(f"{type(fault).__name__} at {_place(fault)}", traceback.format_exc())


@contextmanager
def _memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if peak > MEMORY:
        raise _TooLarge(f"{peak} octets of memory, more than {MEMORY}")


def _place(fault: BaseException) -> str:
    """Where it was raised: the last line of ours, but for `require`."""
    here = Path(__file__).name
    for frame in reversed(traceback.extract_tb(fault.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(_ROOT) and ".venv" not in path.parts and path.name != here:
            return f"{path.relative_to(_ROOT)}:{frame.lineno}"
    return "?"


def shrink(check: Check, data: bytes, kind: str, *, seconds: float = PATIENCE, measured: bool = False) -> bytes:
    """The smallest input found in so much time that fails in the same way: parts are left out as long as that goes on."""
    end = time.monotonic() + seconds

    def fails(candidate: bytes) -> bool:
        failure = _attempt(watch, check, candidate, measured)
        return isinstance(failure, Failure) and failure.kind == kind

    with _Watch() as watch:
        size = max(1, len(data) // 2)
        while time.monotonic() < end:
            before = len(data)
            at = 0
            while at < len(data) and time.monotonic() < end:
                candidate = data[:at] + data[at + size :]
                if fails(candidate):
                    data = candidate
                else:
                    at += size
            if size > 1:
                size = max(1, size // 2)
            elif len(data) == before:
                break
    return data


class _Campaign:
    """The inputs of one campaign, and what came of them."""

    def __init__(self, target: Target, seed: str, known: Sequence[str], patience: float, enough: int) -> None:
        self.target = target
        self.enough = enough
        self.known = known
        self.patience = patience
        self.rng = Random(f"{target.name} {seed}")
        self.corpus: list[bytes] = list(target.seeds())
        self.seeds = len(self.corpus)
        self.findings: list[Finding] = []
        self.inputs = 0
        self._octets = 0
        self._known: set[Hashable] = set()
        self._kinds: set[str] = set()

    def run(self, watch: _Watch, end: float) -> None:
        """Try the seeds, then what becomes of them."""
        mutator = Mutator(self.rng, self.target.words)
        for data in self.corpus[: self.seeds]:
            self._try(watch, data)
        while time.monotonic() < end and len(self.findings) < self.enough:
            self._try(watch, mutator.mutate(self.rng.choice(self.corpus), self.corpus))

    def _try(self, watch: _Watch, data: bytes) -> None:
        measured = self.inputs % MEASURED == 0
        self.inputs += 1
        check = self.target.check
        outcome = _attempt(watch, check, data, measured)
        if isinstance(outcome, Failure):
            # A pause of the machine's is no fault of the input's.
            if outcome.kind != "slow" or isinstance(_attempt(watch, check, data, False), Failure):
                self._found(data, outcome, measured and outcome.kind == "large")
            return
        before = len(self._known)
        self._known.update(outcome)
        new = len(self._known) > before and self.inputs > self.seeds
        if new and len(data) <= LONGEST and self._octets + len(data) <= CORPUS:
            self._octets += len(data)
            self.corpus.append(data)

    def _found(self, data: bytes, failure: Failure, measured: bool) -> None:
        if failure.kind in self._kinds or any(text in failure.report for text in self.known):
            return
        self._kinds.add(failure.kind)
        smallest = shrink(self.target.check, data, failure.kind, seconds=self.patience, measured=measured)
        again = attempt(self.target.check, smallest, measured=measured)
        self.findings.append(Finding(self.target.name, data, smallest, again if isinstance(again, Failure) else failure))


def campaign(
    target: Target,
    seconds: float,
    seed: str,
    *,
    known: Sequence[str] = (),
    patience: float = PATIENCE,
    enough: int = ENOUGH,
) -> Result:
    """Try inputs for so long, or until there are findings enough. Only in the main thread.

    Args:
        target: what is tried.
        seconds: for the inputs; what is found takes more.
        seed: the same one gives the same inputs.
        known: findings with one of these texts in their report are passed over.
        patience: seconds for making one finding smaller.
        enough: findings after which it ends.
    """
    run = _Campaign(target, seed, known, patience, enough)
    begin = time.monotonic()
    before = _in_use()
    with _Watch() as watch, _bounded():
        run.run(watch, begin + seconds)
    took = time.monotonic() - begin
    kept = len(run.corpus) - run.seeds
    gc.collect()
    leak = _in_use() - before
    if leak > LEAK + CORPUS + run.inputs // MEASURED * TRACING and not run.findings:
        report = f"{leak} octets are in use after {run.inputs} inputs that were not before; no single one is at fault"
        run.findings.append(Finding(target.name, b"", b"", Failure("leak", report)))
    return Result(run.inputs, took, kept, tuple(run.findings))


def _in_use() -> int:
    """Octets of this process in memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


@contextmanager
def _bounded() -> Iterator[None]:
    """Hold the process to an address space, so that a runaway input does not take the machine with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        yield
        return
    limit = pages * resource.getpagesize() + ADDRESS_SPACE
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def save(finding: Finding, folder: Path) -> Path:
    """Write a finding: the smallest input, beside it the one that was found and the report. The path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{finding.target}-{hashlib.sha256(finding.smallest).hexdigest()[:12]}"
    path = folder / name
    path.write_bytes(finding.smallest)
    path.with_name(f"{name}.found").write_bytes(finding.data)
    path.with_name(f"{name}.txt").write_text(f"{finding.failure.kind}\n\n{finding.failure.report}", encoding="utf-8")
    return path
