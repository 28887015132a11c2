"""ATTACKS section 1 against the running daemon: no octets of a client are read as two messages, S-SM1 to S-SM40.

What counts is what is in the spool when the session has ended: how many messages, and their envelopes. The scheduler is
kept from its spool, so all of it can be looked at where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from mtad.spool.queues import Queue
from tests.client import Client
from tests.e2e.tls_site import TlsClient, tls_site
from tests.site import DOMAIN, Site, Taken
from tests.smuggling import HIDDEN, SEQUENCES, SMUGGLER, TRUE_ENDS, every_server_row, is_bare, unstuffed, with_crlf

SENDER = "attacker@sender.test"
RCPT = f"alice@{DOMAIN}"
LIMIT = 64 * 1024

#: Near-endings as the first octets of a message: the ten that mox tests, and those that are none but look like it.
STARTS = [
    b".\r", b".\n", b"\n.\r", b"\r.\r", b"\n.\n", b"\r.\n", b"\r.\r\n", b"\n.\r\n", b"\r\n.\r", b"\r\n.\n",
    b".\0\r\n", b". \r\n", b".\r\r\n", b"\0.\r\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = tls_site(tmp_path_factory.mktemp("smuggling"), deliver=False, limits={"message_size": LIMIT})
    both = ["127.0.0.1:0", "[::1]:0"]
    site.listeners.append({"name": "mending", "service": "relay", "address": both, "bare_line_ends": "normalize"})
    site.configure()
    with site:
        yield site


class Attack:
    """One session: a transaction, the attack as its content, and what became of all that."""

    def __init__(self, site: Site, listener: str = "inbound", *, tls: bool = False) -> None:
        self._site = site
        self._before = set(site.files("incoming"))
        self.client = TlsClient(site.address(listener)).starttls() if tls else Client(site.address(listener)).begin()
        self.say("EHLO client.test", f"MAIL FROM:<{SENDER}>", f"RCPT TO:<{RCPT}>")

    def say(self, *lines: str) -> None:
        for line in lines:
            answer = self.client.say(line)
            assert answer[:1] in {"2", "3"}, f"{line}: {answer}"

    def data(self, *pieces: bytes) -> list[str]:
        """Send a content in these pieces, each in a write (and record) of its own; see `codes`."""
        self.say("DATA")
        for piece in pieces:
            self.client.send(piece)
        return self.codes()

    def codes(self) -> list[str]:
        """Wait for one reply, then leave; the codes of all replies until the server closed, but for that to QUIT."""
        replies = [self.client.reply()]
        self.client.send(b"QUIT\r\n")
        while reply := self.client.reply():
            replies.append(reply)
        self.client.socket.close()
        return [reply[:9].rstrip() for reply in replies if not reply.startswith("221 ")]

    def stored(self) -> Sequence[Taken]:
        """What this session has put into the spool. Whatever it is, it is from the sender who gave his name."""
        found = []
        spool = self._site.spool()
        for queue_id in sorted(set(spool.names(Queue.INCOMING)) - self._before):
            with spool.open(Queue.INCOMING, queue_id) as message:
                found.append(Taken(message.message.envelope, b"".join(message.chunks())))
        spool.close()
        for envelope, _ in found:
            assert envelope.sender == SENDER
            assert [recipient.address for recipient in envelope.recipients] == [RCPT]
        return found

    def check(self, codes: list[str], row: int, sent: bytes, *, normalized: bool = False) -> None:
        """No more than one message; one that has a bare CR or LF is refused, any other is kept as it is."""
        content = unstuffed(sent[: sent.index(b"\r\n.\r\n") + 5])
        refused = is_bare(content) and not normalized
        # what is behind a true end is a transaction of its own, which does not wait for its replies
        assert codes[0] == ("550 5.5.2" if refused else "250 2.0.0")
        assert codes[1:] == (["250 2.1.0", "250 2.1.5", "554 5.5.0"] if row in TRUE_ENDS and not normalized else [])
        stored = self.stored()
        assert len(stored) == (not refused)
        for message in stored:
            assert message.content.endswith(b"\r\n" + with_crlf(content))


@every_server_row
def test_s_sm1_to_24_in_one_write(site: Site, row: int) -> None:
    attack, sent = Attack(site), b"X" + SEQUENCES[row] + HIDDEN
    attack.check(attack.data(sent), row, sent)


@every_server_row
def test_s_sm1_to_24_one_octet_per_write(site: Site, row: int) -> None:
    """Behind a true end the rest comes at once: else it would be a second transaction like any other."""
    attack, sent = Attack(site), b"X" + SEQUENCES[row] + HIDDEN
    last = len(SEQUENCES[row]) if row in TRUE_ENDS else len(sent) - 1
    attack.check(attack.data(*octets(sent[:last]), sent[last:]), row, sent)


@every_server_row
def test_s_sm1_to_24_split_over_tls_records(site: Site, row: int) -> None:
    """Between every two octets of the sequence, before and behind it, and each octet in a record of its own."""
    sequence = SEQUENCES[row]
    sent = b"X" + sequence + HIDDEN
    end = len(sequence) if row in TRUE_ENDS else len(sequence) + 1
    for place in range(1, end + 1):
        attack = Attack(site, tls=True)
        attack.check(attack.data(sent[:place], sent[place:]), row, sent)
    attack = Attack(site, tls=True)
    attack.check(attack.data(*octets(sent[:end]), sent[end:]), row, sent)


@every_server_row
def test_s_sm1_to_24_where_line_ends_are_mended(site: Site, row: int) -> None:
    """A client that is trusted may have them normalised: one message each, and no line end in it but CRLF."""
    sent = b"X" + SEQUENCES[row] + (b"" if row in TRUE_ENDS else HIDDEN)
    for pieces in ([sent], octets(sent)):
        attack = Attack(site, "mending")
        attack.check(attack.data(*pieces), row, sent, normalized=True)
        assert not is_bare(attack.stored()[0].content)


@pytest.mark.parametrize("start", STARTS, ids=repr)
def test_s_sm25_near_endings_at_the_start(site: Site, start: bytes) -> None:
    sent = start + b"is rejected\r\n" + HIDDEN
    for pieces in ([sent], octets(sent), [start[:1], start[1:] + sent[len(start) :]]):
        attack = Attack(site)
        attack.check(attack.data(*pieces), 0, sent)
    for place in range(1, len(start) + 1):
        attack = Attack(site, tls=True)
        attack.check(attack.data(sent[:place], sent[place:]), 0, sent)


FILLER = b"Subject: too big\r\n\r\n" + (b"0123456789" * 7 + b"\r\n") * (LIMIT // 72 + 1)


@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
@pytest.mark.parametrize("sequence", [*SEQUENCES.values(), *STARTS], ids=repr)
def test_s_sm26_when_the_message_is_too_big_already(site: Site, sequence: bytes, tls: bool) -> None:
    """Reading goes on to the true end, whatever looks like one; and what is read is no command."""
    assert len(FILLER) > LIMIT
    rest = sequence + HIDDEN
    last = sequence.endswith(b"\r\n.\r\n")
    for pieces in ([rest], [*octets(sequence[:-1]), sequence[-1:] + HIDDEN]):
        attack = Attack(site, tls=tls)
        codes = attack.data(FILLER, b"X", *pieces)
        assert codes == ["552 5.3.4", *(["250 2.1.0", "250 2.1.5", "554 5.5.0"] if last else [])]
        assert attack.stored() == []


def test_s_sm40_a_dot_means_nothing_in_a_chunk(site: Site) -> None:
    """Ten octets are ten octets; what stands behind them is a command, and no good one."""
    attack = Attack(site)
    attack.client.send(b"BDAT 10\r\n" + b".\r\n" + HIDDEN[: HIDDEN.index(b"\r\n") + 2])
    assert attack.client.reply().startswith("250 2.0.0 Ok: 10 octets")
    assert attack.client.reply().startswith("502 5.5.1")
    assert attack.client.say("DATA").startswith("503 5.5.1")
    assert attack.client.say(f"MAIL FROM:<{SMUGGLER}>").startswith("503 5.5.1")
    attack.client.send(b"BDAT 5 LAST\r\n\r\n.\r\n")
    assert attack.codes() == ["250 2.0.0"]
    (message,) = attack.stored()
    assert message.content.endswith(b"\r\n.\r\nMAIL FR\r\n.\r\n")


def test_s_sm40_bdat_in_a_content_is_content(site: Site) -> None:
    attack = Attack(site)
    attack.say("DATA")
    attack.client.send(b"BDAT 24 LAST\r\nMAIL FROM:<smuggled@a>\r\n.\r\nBDAT 6 LAST\r\nQUIT\r\n")
    assert attack.client.reply().startswith("250 2.0.0 Ok: queued as")
    assert attack.codes() == ["503 5.5.1"]
    (message,) = attack.stored()
    assert message.content.endswith(b"\r\nBDAT 24 LAST\r\nMAIL FROM:<smuggled@a>\r\n")


@every_server_row
def test_s_sm40_each_sequence_in_chunks(site: Site, row: int) -> None:
    """Whole, and cut in two within the sequence: the length alone says where a message ends."""
    content = b"X" + SEQUENCES[row] + HIDDEN
    for place in (len(content), *range(1, len(SEQUENCES[row]) + 1)):
        attack = Attack(site)
        if place < len(content):
            attack.client.send(b"BDAT %d\r\n%s" % (place, content[:place]))
            assert attack.client.reply().startswith("250 2.0.0")
        rest = content[place:] or content
        attack.client.send(b"BDAT %d LAST\r\n%s" % (len(rest), rest))
        assert attack.codes() == ["550 5.5.2" if is_bare(content) else "250 2.0.0"]
        stored = attack.stored()
        assert len(stored) == (not is_bare(content))
        for message in stored:
            assert message.content.endswith(b"\r\n" + content)


def test_nothing_is_left_of_the_attacks(site: Site) -> None:
    """After all of them no envelope has the smuggler's name, and nothing went wrong inside."""
    assert SMUGGLER not in {message.envelope.sender for message in site.taken()}
    assert len(site.files("incoming")) == len(site.taken())
    assert "panic" not in site.log()


def octets(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]
