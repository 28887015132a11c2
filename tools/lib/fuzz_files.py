"""Fuzz targets: what is read from files. Queue files, the users and password files, the configuration, SASL messages."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Final

from mtad.config_rules import is_user_name
from mtad.configfile import dump, parse
from mtad.envelope import Envelope, Recipient
from mtad.errors import ConfigError, QueueFileDamaged, QueueFileUnfinished
from mtad.outcome import Attempt, Deferred, Delivered, Failed
from mtad.passwords import format_hash, normal, parse_hash, parse_passwords
from mtad.progress import Doubt, Event, Reported
from mtad.smtp.sasl import Keys, derive
from mtad.spool.message import OpenMessage, read_message
from mtad.spool.queue_file import StoredMessage, encode_envelope, encode_event, encode_preamble
from mtad.users import parse_users
from tools.lib.fuzz import Target, require

_TESTS: Final = Path(__file__).resolve().parents[2] / "tests"
_ROOT: Final = _TESTS.parent

# -- queue files --------------------------------------------------------------------------------------------------------

#: Before an input whose checksums are to be made right: envelope, content and events, with 0x1E between them.
SEALED: Final = b"sealed\n"
_PARTS: Final = b"\x1e"


def _seal(data: bytes) -> bytes:
    """A queue file with these parts, of which every checksum is right; so that what is behind them is reached, too."""
    envelope, content, *events = (*data.split(_PARTS), b"", b"")[: max(2, data.count(_PARTS) + 1)]
    records = (b"\n%08x %08x %s\n" % (len(event), zlib.crc32(event), event) for event in events)
    return encode_preamble(envelope, len(content), zlib.crc32(content)) + envelope + b"\n" + content + b"".join(records)


def queue(data: bytes) -> Iterable[Hashable]:
    # Any octets are a queue file that can be read, or one that is damaged or unfinished, and nothing else is raised. What
    # was read says the same after it was written and read again, its content has the checksum that it says, and an event
    # that is appended is read as the last one, and takes nothing back.
    file = _seal(data.removeprefix(SEALED)) if data.startswith(SEALED) else data
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, file)
        try:
            message, first = read_message(fd)
            opened = OpenMessage(fd, message, first)
            content = b"".join(opened.chunks())
        except (QueueFileDamaged, QueueFileUnfinished) as fault:
            require(len(str(fault)) < 2000, "a fault as long as a file")
            return {(type(fault).__name__, re.sub(r"[0-9`'].*", "", str(fault), flags=re.DOTALL)[:60])}
        head = message.head
        require(len(content) == head.content_size and zlib.crc32(content) == head.content_crc, "another content")
        envelope = encode_envelope(message.envelope)
        whole = encode_preamble(envelope, len(content), zlib.crc32(content)) + envelope + b"\n" + content
        again = _read(whole + b"".join(map(encode_event, message.events)))
        require(again.envelope == message.envelope and again.events == message.events, "another one when written again")
        require(again.states == message.states, "other states when written again")
        more = Doubt(1.0, (), "x")
        os.lseek(fd, 0, os.SEEK_END)  # as O_APPEND does for a file of the spool
        opened.append(more)
        longer = read_message(fd)[0]
        require(longer.events == (*message.events, more), "an event that was appended is not the last one")
        done = [state.settled for state in message.states]
        require([state.settled for state in longer.states] == done, "settled is not for ever")
        return {("read", len(message.events), any(done), *sorted({type(event).__name__ for event in message.events}))}
    finally:
        os.close(fd)


def _read(file: bytes) -> StoredMessage:
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, file)
        return read_message(fd)[0]
    finally:
        os.close(fd)


def queue_seeds() -> Sequence[bytes]:
    """The golden files that are not large, and parts to be sealed."""
    golden = [path.read_bytes() for path in sorted((_TESTS / "golden").rglob("*.queue"))]
    envelope = Envelope("ID1", 1.5, "a@b", (Recipient("c@d", ("success",), "rfc822;c@d"), Recipient("e@f")), "x[::1]", "x")
    refused, taken = Failed("5.1.1", "no", "mx", "550 no"), Delivered("2.0.0", "ok", "mx", "250 ok", dsn=True)
    events: tuple[Event, ...] = (
        Attempt(2.0, ((0, Deferred("4.4.1", "later", destination=True)),), "mx", "192.0.2.1:25", "TLSv1.3", 0.1, 0.2),
        Doubt(3.0, (0, 1), "mx"),
        Attempt(4.0, ((0, refused), (1, taken))),
        Reported(5.0, (0,), "ID2"),
        Reported(6.0, (1,), "ID3", "success"),
    )
    parts = [encode_envelope(envelope), b"Received: x\r\n\r\nhello\r\n", *(encode_event(event)[19:-1] for event in events)]
    sealed = SEALED + _PARTS.join(parts)
    return [file for file in golden if len(file) <= 4096] + [sealed, _seal(sealed.removeprefix(SEALED)), SEALED + parts[0]]


_QUEUE_WORDS: Final = (
    b'mtad-queue 1 |unfinished|"recipients":[|"address":"|"sender":""|"kind":"bounce"|\\u0000|\\ud800'
    b'|"type":"attempt"|"type":"doubt"'
    b'|"type":"reported"|"outcomes":[[0,|"recipients":[0]|"type":"failed"|"kind":"success"|null|true'
    b"|1e400|NaN|[[[[[[[[|00000000"
    b"|ffffffff|\x1e|\n|sealed\n"
).split(b"|")

# -- users and passwords ------------------------------------------------------------------------------------------------


def users(data: bytes) -> Iterable[Hashable]:
    # Any octets are a table of users, or a `ConfigError` whose lines exist. Every name in the table is a safe name of a
    # directory, and every key is in the form in which addresses are compared.
    try:
        table = parse_users(data, "users", ("example.org", "b\u00fccher.example"))
    except ConfigError as error:
        return _problems(error, data)
    for key, user in table.users.items():
        require(
            is_user_name(user) and "/" not in user and "\0" not in user and user not in {"", ".", ".."}, "not a safe name"
        )
        require(key == key.casefold() and "@" in key and key.isprintable(), "not a key")
    return {min(len(table.users), 5), ("odd", bool(table.oddities))}


def _problems(error: ConfigError, data: bytes) -> set[Hashable]:
    require(len(error.problems) > 0, "an error without a problem")
    last = data.count(b"\n") + 1
    for problem in error.problems:
        require(problem.line is None or 0 < problem.line <= last, "a line that does not exist")
    return {re.sub(r"['\"`0-9].*", "", problem.message)[:30] for problem in error.problems}


def users_seeds() -> Sequence[bytes]:
    """Lines of users files."""
    good = b"\xef\xbb\xbf# all\nroot : root@example.org\nroot : postmaster@example.org # me\n\nalice:alice@example.org\n"
    return [
        good,
        'bücher : "a b"@bücher.example\r\n'.encode(),
        b"../x : a@b\n",
        b"a : b@c\nd : B@C\n",
        b"a :\n: b@c\n",
        b"\xff : a@b\n",
    ]


_KEYS: Final = derive("open sesame", b"0123456789abcdef", 4096)


def passwords(data: bytes) -> Iterable[Hashable]:
    # Any octets are a table of logins, or a `ConfigError` that shows nothing of what stands behind a colon. What was read
    # is written in the same way, and every login is in the one form in which logins are compared.
    try:
        entries = parse_passwords(data, "passwords")
    except ConfigError as error:
        for word in _HASHES.findall(data):
            require(data.count(word) > 1 or word.decode("utf-8", "replace") not in str(error), "a hash is shown")
        return _problems(error, data)
    for key, entry in entries.items():
        require(parse_hash(format_hash(entry.keys)) == entry.keys, "another hash after it was written and read")
        require(key == normal(entry.login) == normal(key), "a login has two forms")
        require(_sound(entry.keys), "keys that are none")
    return {min(len(entries), 4)}


#: What stands behind a colon alone on its line, and is long enough not to be there by chance.
_HASHES: Final = re.compile(rb"^[a-z ]{0,20}:([!-9;-~]{20,200})$", re.MULTILINE)


def _sound(keys: Keys) -> bool:
    return keys.iterations >= 4096 and len(keys.salt) >= 16 and len(keys.stored_key) == len(keys.server_key) == 32


def passwords_seeds() -> Sequence[bytes]:
    """Lines of password files."""
    line = format_hash(_KEYS).encode()
    return [
        b"# all\nalice : " + line + b"\nbob@example.org : " + line + b"\n",
        b"Alice:" + line + b"\nalice : " + line,
        b"a : x\n",
    ]


# -- the configuration --------------------------------------------------------------------------------------------------


def config(data: bytes) -> Iterable[Hashable]:
    # Any text is a configuration, or a `ConfigError` whose lines exist; what was read means the same after it was dumped
    # and read again.
    text = data.decode("utf-8", "replace")
    try:
        found = parse(text, "mtad.toml")
    except ConfigError as error:
        return _problems(error, data)
    require(parse(dump(found), "dumped") == found, "another configuration after it was dumped and read")
    return {("listeners", len(found.listener)), ("policies", len(found.delivery.policy))}


def config_seeds() -> Sequence[bytes]:
    """The example, and the files of the tests, good and bad."""
    example = (_ROOT / "init" / "mtad.toml.example").read_bytes()
    open_example = re.sub(rb"(?m)^#(?=[a-z_]+ = |\[)", b"", example)
    return [open_example, *(path.read_bytes() for path in sorted((_TESTS / "configs").glob("*.toml")))]


_CONFIG_WORDS: Final = (
    b'hostname = |[[listener]]\n|[delivery]\n|[[delivery.policy]]\n|[local]\n|[limits]\n|"300s"|"25MiB"'
    b'|service = |"mx"|"relay"'
    b'|"submission"|address = [|"127.0.0.1:25"|"[::]:25"|tls = |"required"|true|1.5|inf|1979-05-27|"""'
    b"|\\u0000|{|}|[|]|#|\n|domain = "
).split(b"|")

TARGETS: Final = (
    Target("queue", queue, queue_seeds, _QUEUE_WORDS, share=2),
    Target("users", users, users_seeds, (b" : ", b"root", b"@example.org", b"\n", b"#", b"..", b"/", b'"')),
    Target("passwords", passwords, passwords_seeds, (b" : ", b"SCRAM-SHA-256$", b"4096:", b"$", b"==", b"\n", b"\xc2\xaa")),
    Target("config", config, config_seeds, _CONFIG_WORDS),
)
