"""Every file of tests/dialogues on the bare protocol engine: as written, octet by octet, and cut in two everywhere."""

from __future__ import annotations

import pytest

from tests.dialogue_engine import Engine, octets
from tests.dialogue_script import DIALOGUES, DialogueFailure, Script, load, parse, play, unescape

SCRIPTS = [load(path) for path in sorted(DIALOGUES.rglob("*.txt"))]
assert SCRIPTS, "no dialogue was found"

#: Octets fed for one dialogue; a long one is cut at fewer places, evenly spread.
BUDGET = 600_000

every_dialogue = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
in_clear = pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if script.tls == "none"], ids=lambda script: script.name
)
in_any_pieces = pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if not script.segments], ids=lambda script: script.name
)

OUT_OF_STEP = b"554 5.5.0 Error: SMTP protocol synchronization: wait for the reply\r\n"


@every_dialogue
def test_as_written(script: Script) -> None:
    engine = Engine.for_script(script)
    play(script, engine)
    assert engine._unread == b"", "the dialogue leaves replies unread"


@in_any_pieces
def test_octet_by_octet(script: Script) -> None:
    play(script, Engine.for_script(script, cut=octets))


@in_clear
def test_cut_in_two_everywhere(script: Script) -> None:
    """However the octets are cut, what is said and what is stored stays the same, where sending ahead is forgiven."""
    sent = script.octets
    reference = Engine.for_script(script, strict_order=False)
    reference.send(sent)
    for place in range(1, len(sent), 1 + len(sent) ** 2 // BUDGET):
        engine = Engine.for_script(
            script,
            lambda data, place=place: (data[:place], data[place:]),  # type: ignore[misc]
            strict_order=False,
        )
        engine.send(sent)
        assert engine.transcript == reference.transcript, place
        assert engine.stored() == reference.stored(), place


@in_clear
def test_sent_ahead_everywhere_s_pa10(script: Script) -> None:
    """Whoever sends the rest ahead is answered as before, to the end or until it is cut off; nothing else is stored."""
    sent = script.octets
    reference = Engine.for_script(script, strict_order=False)
    reference.send(sent)
    for place in range(0, len(sent), 1 + len(sent) ** 2 // BUDGET):
        engine = Engine.for_script(script, lambda data, place=place: (data[:place], data[place:]))  # type: ignore[misc]
        engine.send(sent)
        if engine.transcript != reference.transcript:
            said, cut_off = engine.transcript[: -len(OUT_OF_STEP)], engine.transcript[-len(OUT_OF_STEP) :]
            assert cut_off == OUT_OF_STEP, place
            assert reference.transcript.startswith(said), place
            assert engine.dialogue.closing
        assert engine.stored() == reference.stored()[: len(engine.stored())], place


@every_dialogue
def test_nothing_is_left_open(script: Script) -> None:
    engine = Engine.for_script(script, strict_order=False)
    engine.send(script.octets)
    engine.dialogue.lost()
    assert engine.spool.open_entries == []


def test_the_player_notices() -> None:
    """A player that nods at everything would make all of the above worthless."""
    for text in (
        "<- 554",
        "<~ 220 mx",
        "<* 221",
        "<!",
        "== stored 1",
        "<- 220\n-> NOOP\n<- 250 2.0.0 Ok but no",
        "<- 220\n<- 220",
        "<- 220\n-> EHLO x\n<* 220",
    ):
        with pytest.raises(DialogueFailure, match="t:"):
            play(parse("t", text), Engine())


def test_the_player_compares_what_is_stored() -> None:
    taken = "-> EHLO a\n-> MAIL FROM:<a@b>\n-> RCPT TO:<bob@example.org>\n-> DATA\n-> A: b\n-> .\n"
    play(parse("t", taken + "== stored 1 sender=a@b rcpt=bob@example.org has=A:.b ends='\\r\\nA: b\\r\\n'"), Engine())
    for wrong in ("sender=a@c", "rcpt=alice@example.org", "has=C", "ends='b'"):
        with pytest.raises(DialogueFailure, match="does not agree"):
            play(parse("t", f"{taken}== stored 1 {wrong}"), Engine())


def test_a_line_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"t\.txt:2"):
        parse("t.txt", "# fine\n>- EHLO")


def test_repetition_and_escapes() -> None:
    script = parse("t", r"3x => a{n}\r\n\x00\\")
    assert script.octets == b"a1\r\n\0\\a2\r\n\0\\a3\r\n\0\\"
    assert unescape("é") == b"\xc3\xa9"
