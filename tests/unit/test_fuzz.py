"""Fuzzing: every target for its share of `MTAD_FUZZ_SECONDS`, what was found before, and that something would be found.

`MTAD_FUZZ_SECONDS` (60) is for all targets together, `MTAD_FUZZ_SEED` repeats a run; by default each run tries new inputs,
and a failure names its seed.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Hashable, Iterable
from itertools import count
from pathlib import Path
from typing import Final

import pytest

from mtad.smtp import client as smtp_client
from mtad.smtp import server as smtp_server
from mtad.smtp.replies import ReplyReader
from mtad.smtp.wire import DataDecoder
from tools.lib import fuzz, fuzz_client, fuzz_server, fuzz_wire
from tools.lib.fuzz import Failure, Finding, Target, attempt, campaign, require, save, shrink
from tools.lib.fuzz_cli import main, parse, tell
from tools.lib.fuzz_mutate import LIMIT, Mutator
from tools.lib.fuzz_targets import TARGETS

SECONDS: Final = float(os.environ.get("MTAD_FUZZ_SECONDS", "60"))
SEED: Final = os.environ.get("MTAD_FUZZ_SEED") or str(random.SystemRandom().randrange(1_000_000))
#: Inputs of each target at least, however slow the machine: 20,000 in all.
LEAST: Final = -(-20_000 // len(TARGETS))
SHARES: Final = sum(target.share for target in TARGETS.values())

REGRESSIONS: Final = Path(__file__).parents[1] / "fuzz" / "regressions"
INPUTS: Final = sorted(path for path in REGRESSIONS.glob("*/*"))

#: Findings that are reported and not mended yet: words of the report, and the inputs that show it.
KNOWN: Final[dict[str, dict[str, tuple[str, ...]]]] = {}


def known(path: Path) -> bool:
    return any(path.name in names for names in KNOWN.get(path.parent.name, {}).values())


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_invariants_hold(target: Target, tmp_path: Path) -> None:
    seconds = SECONDS * target.share / SHARES
    inputs = 0
    for part in count():
        seed = f"{SEED}-{part}" if part else SEED
        result = campaign(target, seconds, seed, known=tuple(KNOWN.get(target.name, ())), patience=5.0)
        told = [tell(finding, save(finding, tmp_path)) for finding in result.findings]
        assert not told, "\n".join([f"seed {seed}, after {result.inputs} inputs:", *told])
        assert result.inputs > len(target.seeds())
        inputs += result.inputs
        if inputs >= LEAST:
            break


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=f"{path.parent.name}-{path.name}",
            marks=pytest.mark.xfail(strict=True, reason="reported; take it out of KNOWN when it is mended")
            if known(path)
            else (),
        )
        for path in INPUTS
    ],
)
def test_what_was_found_before_is_not_there_again(path: Path) -> None:
    outcome = attempt(TARGETS[path.parent.name].check, path.read_bytes(), measured=True)
    assert not isinstance(outcome, Failure), outcome.report


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_an_invariant_is_the_first_comment(target: Target) -> None:
    assert len(target.invariant) > 60
    assert target.invariant.endswith(".")
    assert target.seeds()


# -- it would be found --------------------------------------------------------------------------------------------------


class LineFeedDotLineFeed(DataDecoder):
    """Takes LF.LF for the end, as servers did until 2023 (CVE-2023-51764)."""

    def feed(self, chunk: bytes) -> bytes:
        return super().feed(chunk.replace(b"\n.\n", b"\r\n.\r\n"))


class EndAtOnce(DataDecoder):
    """Finds an end only in what comes in one piece."""

    def feed(self, chunk: bytes) -> bytes:
        self._held = self._held if self._held == b"\r\n" else b""
        return super().feed(chunk)


def found(check: Callable[[bytes], Iterable[Hashable]], like: Target, seconds: float = 20.0) -> Finding:
    """What is found in a target that is broken, within seconds."""
    result = campaign(Target(like.name, check, like.seeds, like.words), seconds, "1", patience=2.0, enough=1)
    assert result.findings, f"nothing was found with {result.inputs} inputs"
    return result.findings[0]


@pytest.mark.parametrize("broken", [LineFeedDotLineFeed, EndAtOnce])
def test_a_broken_decoder_is_found(broken: Callable[[], DataDecoder]) -> None:
    finding = found(fuzz_wire.decoder_check(broken), TARGETS["decoder"])
    assert len(finding.smallest) <= 5


def test_a_broken_decoder_is_found_through_the_whole_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp_server, "DataDecoder", LineFeedDotLineFeed)
    assert b"\n.\n" in found(fuzz_server.check, TARGETS["server"]).smallest


def test_a_client_that_does_not_stuff_dots_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtp_client, "dot_stuff", lambda content: [*content, b".\r\n"])
    finding = found(fuzz_client.client, TARGETS["client"])
    assert finding.smallest.startswith((b"dots", b"bare", b"nothing"))


def test_a_reader_that_raises_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(self: ReplyReader, line: bytes, replies: list[object]) -> None:
        replies.append(int(line[:3]))  # and what if there is no number?

    monkeypatch.setattr(ReplyReader, "_take", take)
    finding = found(fuzz_wire.replies, Target("replies", fuzz_wire.replies, lambda: [b"", b"a"]))
    assert "test_fuzz.py" in finding.failure.kind
    assert len(finding.smallest) <= 1


def few() -> list[bytes]:
    return [b"", b"abc"]


def test_an_input_that_takes_too_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "TIME", 0.1)

    def slow(data: bytes) -> Iterable[Hashable]:
        while b"b" in data:
            pass
        return ()

    finding = found(slow, Target("slow", slow, few))
    assert finding.failure.kind == "slow"
    assert b"b" in finding.smallest


def test_an_input_that_takes_too_much_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "MEASURED", 16)

    def large(data: bytes) -> Iterable[Hashable]:
        return (len(bytearray(50_000_000 if b"c" in data else 1)),)

    target = Target("large", large, few)
    finding = found(large, target)
    assert finding.failure.kind == "large"
    assert finding.smallest == b"c"


def test_a_runaway_gets_no_memory_and_others_have_theirs_back() -> None:
    def runaway(data: bytes) -> Iterable[Hashable]:
        return (len(bytearray(1 << 40 if data else 1)),)

    finding = found(runaway, Target("runaway", runaway, few))
    assert finding.failure.kind.startswith("MemoryError")
    assert len(bytearray(700 * 1024 * 1024)) > 0


# -- the machine around them --------------------------------------------------------------------------------------------


def test_a_seed_repeats_a_run() -> None:
    def inputs(seed: str) -> list[bytes]:
        seen: list[bytes] = []

        def check(data: bytes) -> Iterable[Hashable]:
            seen.append(data)
            return (len(data) % 7,)

        campaign(Target("seeded", check, lambda: [b"a 1\r\n", b"b 2\r\n"], (b"word",)), 0.05, seed)
        return seen[:200]

    first, again, other = inputs("1"), inputs("1"), inputs("2")
    shorter = min(len(first), len(again))
    assert shorter > 20
    assert first[:shorter] == again[:shorter]
    assert first != other


def test_what_does_something_new_is_made_into_more() -> None:
    """Three steps, each of which is only found from the one before."""

    def check(data: bytes) -> Iterable[Hashable]:
        depth = next((n for n, part in enumerate((b"one", b"two", b"six")) if part not in data), 3)
        require(depth < 3, "all of them")
        return (depth,)

    target = Target("steps", check, lambda: [b"-" * 50], (b"one", b"two", b"six"))
    result = campaign(target, 20.0, "1", enough=1)
    assert len(result.findings[0].smallest) <= 9
    assert result.kept >= 1


def test_shrinking_keeps_the_kind_of_failure() -> None:
    def check(data: bytes) -> Iterable[Hashable]:
        if len(data) < 3:
            raise ValueError("short")
        require(b"x" not in data, "there is an x")
        return ()

    failure = attempt(check, b"abcdefxghi")
    assert isinstance(failure, Failure)
    smallest = shrink(check, b"abcdefxghi", failure.kind)
    assert len(smallest) == 3
    assert b"x" in smallest


def test_mutants_are_bounded_and_do_not_stay_what_they_are() -> None:
    mutator = Mutator(random.Random(1), (b"word",))
    seeds = [b"", b"MAIL FROM:<a@b> SIZE=1\r\n", b"x" * LIMIT]
    made = [mutator.mutate(seed, seeds) for seed in seeds for _ in range(200)]
    assert max(map(len, made)) <= LIMIT
    assert len(set(made)) > 300


def test_the_command_lists_replays_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert set(re.findall(r"^\w+", capsys.readouterr().out, re.M)) == set(TARGETS)
    path = tmp_path / "input"
    path.write_bytes(b"a\r\n.\r\n")
    assert main(["--target", "decoder", "--replay", str(path)]) == 0
    assert main(["--target", "replies", "--seconds", "0.2", "--seed", "7", "--save", str(tmp_path / "saved")]) == 0
    out = capsys.readouterr().out
    assert "seed 7" in out
    assert "0 findings" in out
    assert not (tmp_path / "saved").exists()
    for wrong in (["--replay", str(path)], ["--target", "x"], ["--guided"]):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_a_finding_is_told_and_saved_so_that_it_can_be_replayed(tmp_path: Path) -> None:
    finding = Finding("decoder", b"found" * 100, b"smallest" * 50, Failure("Broken at x:1", "Traceback\nBroken: not what"))
    path = save(finding, tmp_path / "new")
    assert path.read_bytes() == finding.smallest
    assert (path.parent / f"{path.name}.found").read_bytes() == finding.data
    text = tell(finding, path)
    assert f"--target decoder --replay {path}" in text
    assert "Broken: not what" in text
