"""Fuzz target: the grammar of commands, with their addresses and parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final

from mtad.envelope import Recipient
from mtad.errors import SyntaxFault
from mtad.smtp import parameters
from mtad.smtp.capabilities import Capabilities
from mtad.smtp.commands import Mail, mail_command, rcpt_command
from mtad.smtp.grammar import (
    PathArgument,
    parse_command,
    parse_domain,
    parse_helo,
    parse_mail,
    parse_mailbox,
    parse_rcpt,
)
from tools.lib.fuzz import Target, require

_ALL: Final = Capabilities({}, size=True, eight_bit=True, utf8=True, dsn=True)


def grammar(data: bytes) -> Iterable[Hashable]:
    # A line is a command or a `SyntaxFault`, and so is every part of it; what comes out prints. An address that was parsed
    # is the same after it was written and parsed again; it can stand in a command of ours, which is parsed to the same
    # address and the same parameters; its key has no second form, and its lengths are those of the standard.
    happened: set[Hashable] = set()
    for line in data.split(b"\n"):
        try:
            command = parse_command(line)
        except SyntaxFault as fault:
            happened.add(str(fault))
            continue
        require(command.verb.isascii() and (command.verb + command.argument).isprintable(), "a command that does not print")
        for name, parse in _PARSERS.items():
            try:
                found = parse(command.argument)
            except SyntaxFault as fault:
                require(str(fault).isprintable(), "a fault that does not print")
                happened.add((name, str(fault)[:40]))
                continue
            happened.add(name)
            if isinstance(found, PathArgument):
                happened |= _path(found)
            elif isinstance(found, str):
                require(found.isprintable(), "what was parsed does not print")
    return happened


_PARSERS: Final[dict[str, Callable[[str], object]]] = {
    "mail": parse_mail,
    "rcpt": parse_rcpt,
    "helo": parse_helo,
    "domain": parse_domain,
    "size": parameters.parse_size,
    "body": parameters.parse_body,
    "ret": parameters.parse_ret,
    "envid": parameters.parse_envid,
    "notify": parameters.parse_notify,
    "orcpt": parameters.parse_orcpt,
    "auth": parameters.parse_auth,
    "chunk": parameters.parse_chunk,
}


def _path(found: PathArgument) -> set[Hashable]:
    address = found.address
    text = str(address)
    require(text.isprintable(), "an address that does not print")
    require(len(address.local.encode()) <= 64 and len(address.domain) <= 255, "an address longer than the standard has it")
    require(address.domain.isascii(), "a domain that is not US-ASCII")
    require(address.domain[:1] == "[" or address.domain == address.domain.lower(), "a domain in two forms")
    require(address.key == address.key.casefold(), "a key in two forms")
    happened: set[Hashable] = {("literal", address.domain[:1] == "["), ("utf8", found.utf8), ("quoted", text[:1] == '"')}
    if address.domain:
        require(parse_mailbox(text) == address, "another address after it was written and read")
        orcpt, notify = found.parameters.get("ORCPT", ""), found.parameters.get("NOTIFY", "")
        try:
            orcpt = parameters.parse_orcpt(orcpt) if orcpt else ""
            words = parameters.parse_notify(notify) if notify else ()
            envid = parameters.parse_envid(found.parameters["ENVID"]) if "ENVID" in found.parameters else ""
        except SyntaxFault:
            orcpt, words, envid = "", (), ""
        utf8 = not text.isascii()
        mail = Mail(text, (Recipient(text, words, orcpt),), 7, "8BITMIME", utf8, "full", envid)
        said = parse_mail(parse_command(mail_command(mail, _ALL).rstrip(b"\r\n")).argument)
        require(said.address == address, "MAIL says another address")
        require(not envid or parameters.parse_envid(said.parameters["ENVID"]) == envid, "MAIL says another ENVID")
        heard = parse_rcpt(parse_command(rcpt_command(mail.recipients[0], mail, _ALL).rstrip(b"\r\n")).argument)
        require(heard.address == address, "RCPT says another address")
        require(not orcpt or parameters.parse_orcpt(heard.parameters["ORCPT"]) == orcpt, "RCPT says another ORCPT")
        happened |= {("words", words), ("orcpt", orcpt[:5])}
    return happened


def grammar_seeds() -> Sequence[bytes]:
    """Commands with addresses, those of open relays and of old holes among them."""
    paths = (
        *(
            "<a@b.example>",
            "<>",
            "<postmaster>",
            "<Postmaster@B.example>",
            '<"a b"@c>',
            '<"a\\"b\\\\c"@d>',
            "<a@[192.0.2.1]>",
        ),
        *("<a@[IPv6:2001:db8::1]>", "<@x,@y:a@b>", "a@b", "<u%evil@b>", '<"u@evil"@b>', "<a!b@c>", "<a@b.>", "<a..b@c>"),
        *(
            "<é@b>",
            "<a@bücher.example>",
            "<a@例え.テスト>",
            "<a@xn--bcher-kva.example>",
            "<${run{x}}@b>",
            "<;id;@b>",
            "<a@b@c>",
        ),
    )
    rest = " SIZE=100 BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=a+2Bb AUTH=<>"
    more = " NOTIFY=SUCCESS,DELAY ORCPT=rfc822;a+2Bb@c"
    found = [f"MAIL FROM:{path}{rest}".encode() for path in paths] + [f"RCPT TO:{path}{more}".encode() for path in paths]
    single = (
        "BDAT 10 LAST",
        "EHLO mx_1.example",
        "EHLO [192.0.2.1]",
        "X rfc822;a+0Ab",
        "X utf-8;é@a",
        "X a+2B",
        "X BINARYMIME",
    )
    long = f"MAIL FROM:<{'a' * 64}@{'b' * 63}.{'c' * 63}.{'d' * 55}>"
    return [*found, *(text.encode() for text in single), long.encode(), b"RCPT TO:<a@b> ORCPT=utf-8;\\x{E9}@a"]


_WORDS: Final = (
    'MAIL FROM:<|RCPT TO:<|a@b|@|<@a,@b:|[IPv6:|::1|[127.0.0.1]|"|\\| SIZE=| ENVID=|+2B| ORCPT=utf-8;'
    "| ORCPT=rfc822;|\\x{10FFFF}"
    "|\\x{202E}| NOTIFY=NEVER|SUCCESS,FAILURE|xn--|é|ß|İ|\u200d|\u202e|\u2028|\u3002|\ufeff|\uff45"
    "|\u0301|a.b|..|-|_|\n|>| "
)

TARGET: Final = Target("grammar", grammar, grammar_seeds, [word.encode() for word in _WORDS.split("|")])
