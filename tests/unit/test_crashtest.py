"""The pure parts of `tools/crashtest`: the verdict must see each way in which a server can break its promise."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from mtad import dsn
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Failed
from mtad.progress import CUT, REPORT
from mtad.scheduler.report import LogEvents
from mtad.spool.queues import Queue, Spool
from tests.peers.mx import OK, Say, Transaction
from tools.lib.crash_finds import at_exchanger, in_maildirs, in_report, in_spool
from tools.lib.crash_load import DOMAIN, Ledger, Moods, compose
from tools.lib.crash_run import schedule
from tools.lib.crash_verdict import Copy, Sent, Verdict, digest, doubts, identify, judge, table, totals

SENT = Sent("0-1", "s@x", ("a@x", "b@x"), "d", "Q1")
A = Copy("0-1", "a@x", "maildir", "d", "Q1")
B = Copy("0-1", "b@x", "exchanger", "d", "Q1")


def test_a_message_that_is_where_it_belongs() -> None:
    verdict = judge([SENT], [A, B], {})
    assert verdict.good
    assert (verdict.messages, verdict.recipients) == (1, 2)
    assert verdict.found == {"maildir": 1, "exchanger": 1, "queue": 0, "report": 0, "corrupt": 0}


@pytest.mark.parametrize("place", ["maildir", "exchanger", "queue"])
def test_each_place_is_good(place: str) -> None:
    assert judge(
        [SENT], [A, msgspec.convert({"id": "0-1", "recipient": "b@x", "place": place, "digest": "d"}, Copy)], {}
    ).good


def test_a_report_is_good_without_a_body() -> None:
    assert judge([SENT], [A, Copy("0-1", "b@x", "report")], {}).good


def test_what_is_broken_is_told_and_what_is_in_doubt_only_where_nothing_may_be() -> None:
    bad = Verdict(1, 1, {}, ("a",), ("b",), ("c",), ("d",), ("e",))
    broken = ["lost: a", "torn: b", "twice without a word: d", "stuck: e"]
    assert bad.broken() == broken
    assert bad.broken(doubtful=False) == [*broken, "twice: c"]
    assert not bad.good
    counts = {"acknowledged": 2, "lost": 2, "torn": 2, "twice, in doubt": 2, "twice without a word": 2, "stuck": 2}
    assert totals([bad, bad]) == counts


def test_lost_is_a_recipient_that_is_nowhere() -> None:
    verdict = judge([SENT], [A], {})
    assert not verdict.good
    assert verdict.lost == ("0-1 Q1 for b@x",)
    assert "1 lost" in table(verdict)


def test_nothing_is_expected_of_a_message_without_a_250() -> None:
    unknown = msgspec.structs.replace(SENT, queue_id="")
    assert judge([unknown], [], {}).good
    assert judge([unknown], [A, B], {}).messages == 0
    assert not judge([unknown], [A, A], {}).good


@pytest.mark.parametrize(
    "copy",
    [
        msgspec.structs.replace(B, digest="other"),
        msgspec.structs.replace(B, place="corrupt"),
        msgspec.structs.replace(B, recipient="c@x"),
        msgspec.structs.replace(B, id="9-9"),
    ],
)
def test_torn(copy: Copy) -> None:
    assert len(judge([SENT], [A, B, copy], {}).torn) == 1
    assert not judge([SENT], [A, copy], {}).good


def test_twice_is_forgiven_once_for_each_doubt() -> None:
    copies = [A, A, A, B]
    assert judge([SENT], copies, {("Q1", "a@x"): 2}).good
    one_word = judge([SENT], copies, {("Q1", "a@x"): 1})
    assert (len(one_word.explained), len(one_word.unexplained)) == (1, 1)
    assert not one_word.good
    assert len(judge([SENT], copies, {("Q1", "b@x"): 2, ("Q2", "a@x"): 2}).unexplained) == 2


def test_a_report_may_be_delivered_twice_when_its_own_delivery_was_in_doubt() -> None:
    report = Copy("0-1", "b@x", "report", "", "Q1", "R1")
    assert judge([SENT], [A, report, report], {("R1", "s@x"): 1}).good
    assert not judge([SENT], [A, report, report], {("R1", "b@x"): 1, ("R2", "s@x"): 1}).good


def test_delivered_and_still_in_the_queue_is_twice() -> None:
    assert len(judge([SENT], [A, B, msgspec.structs.replace(A, place="queue")], {}).unexplained) == 1


def test_stuck_is_a_failure() -> None:
    verdict = judge([SENT], [A, B], {}, ["active/Q1"])
    assert not verdict.good
    assert "active/Q1" in table(verdict)


def test_doubts_are_read_from_the_log() -> None:
    line = "Nov 24 03:26:11 vm mtad/qmgr[1]: Q1: warning: in doubt: mx.x may have taken this message for <a@x> before; x\n"
    assert doubts(line + "mtad/smtp[1]: Q1: to=<a@x>, status=sent (in doubt)\n" + line) == Counter({("Q1", "a@x"): 2})


def test_the_log_says_doubts_in_these_words(capfd: pytest.CaptureFixture[str]) -> None:
    LogEvents().in_doubt("Q1", "a@x", "mx.x", held=False)
    LogEvents().in_doubt("Q1", "b@x", REPORT, held=False)
    LogEvents().in_doubt("Q1", "c@x", "mx.x", held=True)
    LogEvents().in_doubt("Q1", "d@x", CUT, held=False)
    assert doubts(capfd.readouterr().err) == Counter({("Q1", f"{name}@x"): 1 for name in "abcd"})


def test_the_same_seed_brings_the_same_kills_and_messages() -> None:
    assert schedule(7, 50) == schedule(7, 50)
    assert schedule(7, 50) != schedule(8, 50)
    assert {kill.role for kill in schedule(7, 50)} == {"master", "scheduler", "listener", "delivery"}
    first, second = (compose(random.Random("7 0"), "0-1") for _ in range(2))
    assert first == second


def test_a_composed_message_is_known_again_with_either_line_end() -> None:
    for number in range(50):
        message, content = compose(random.Random(number), f"0-{number}")
        received = (
            b"Received: from client.test (x [127.0.0.1])\r\n\tby mx.example.org with ESMTP id Q77\r\n\tfor x; date\r\n"
        )
        assert identify(received + content) == (message.id, message.digest, "Q77")
        assert identify((b"Return-Path: <x>\r\n" + received + content).replace(b"\r\n", b"\n")) == (
            message.id, message.digest, "Q77",
        )  # fmt: skip
        cut = identify((received + content)[:-1])
        assert cut is None or cut[1] != message.digest


def test_the_moods_of_the_exchanger() -> None:
    moods = Moods()
    assert moods.get("fine@moody.test") == OK
    later = moods.get("later-1@moody.test")
    assert isinstance(later, tuple)
    assert [str(say.lines)[:3] for say in later if isinstance(say, Say)] == ["450", "250"]
    never = moods.get("never-1@moody.test")
    assert isinstance(never, Say)
    assert str(never.lines).startswith("550")


def test_the_ledger_is_on_the_disk_before_the_message_is_sent(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    unknown = msgspec.structs.replace(SENT, queue_id="")
    ledger.note(unknown)
    assert (tmp_path / "ledger").read_bytes() == msgspec.json.encode(unknown) + b"\n"
    assert ledger.acknowledged() == 0
    ledger.note(SENT)
    assert ledger.messages() == [SENT]
    assert ledger.acknowledged() == 1
    ledger.close()


CONTENT = b"Received: from c by x with ESMTP id Q1\r\n\tfor <a@x>\r\nX-Crash-Id: 0-1\r\n\r\nbody\r\n"


def test_copies_in_maildirs_and_at_exchangers(tmp_path: Path) -> None:
    new = tmp_path / "a/new"
    new.mkdir(parents=True)
    (tmp_path / "a/tmp").mkdir()
    stored = (b"Return-Path: <s@x>\r\nDelivered-To: a@x\r\n" + CONTENT).replace(b"\r\n", b"\n")
    (new / "1").write_bytes(stored)
    (new / "2").write_bytes(b"Subject: what is this\n\nx\n")
    (tmp_path / "a/tmp/3").write_bytes(stored)
    first, stranger = in_maildirs(tmp_path)
    assert first == Copy("0-1", "a@x", "maildir", digest(b"body\n"), "Q1")
    assert len(judge([SENT], [stranger], {}).torn) == 1
    taken = Transaction(1, "127.0.0.1", "h", "FROM:<s@x>", [("a@x", "250 ok"), ("b@x", "450 no")], CONTENT, reply="250 ok")
    assert list(at_exchanger([taken])) == [Copy("0-1", "a@x", "exchanger", digest(b"body\n"), "Q1")]


def test_a_report_names_the_recipients_that_failed() -> None:
    envelope = Envelope("Q1", 1.0, f"s@{DOMAIN}", (Recipient("a@x"), Recipient("b@x")))
    failures = [(recipient, Failed("5.1.1", "no")) for recipient in envelope.recipients]
    content = dsn.report(envelope, failures, CONTENT, hostname="x.test", now=2.0, report_id="R1")
    expected = [Copy("0-1", address, "report", "", "Q1", "R1") for address in ("a@x", "b@x")]
    assert in_report(content, "here") == expected
    assert in_report(content.replace(b"\r\n", b"\n"), "here") == expected


def test_copies_in_the_spool(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "spool"), create=True)
    entry = spool.enter(Envelope(spool.ids.new(), 1.0, "s@x", (Recipient("a@x"), Recipient("b@x"))))
    entry.write(CONTENT)
    entry.commit()
    queue_id = entry.envelope.id
    expected = [Copy("0-1", address, "queue", digest(b"body\n"), "Q1") for address in ("a@x", "b@x")]
    assert list(in_spool(tmp_path / "spool")) == expected
    place = tmp_path / "spool/incoming" / queue_id
    place.write_bytes(place.read_bytes().replace(b"body", b"bode"))
    assert [copy.place for copy in in_spool(tmp_path / "spool")] == ["corrupt"]
    spool.condemn(Queue.INCOMING, queue_id)
    assert [copy.id for copy in in_spool(tmp_path / "spool")] == ["0-1"]
    spool.close()
