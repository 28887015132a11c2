"""A frozen table of what is an address and what is none: S-EN4 of the attacks, and its lengths.

Whoever changes the grammar sees here whose mail that is. The verdicts are those of RFC 5321 section 4.1.2 and RFC 6531
section 3.3: what RFC 5322 lets a header have besides (comments, folding, names, lists) is no address in a command.
"""

from __future__ import annotations

from typing import Final

import pytest

from mtad.config import Limits
from mtad.errors import SyntaxFault
from mtad.smtp.grammar import BadAddress, parse_mail, parse_mailbox, parse_rcpt
from tests.dialogue_engine import Engine

#: Addresses that are what they look like.
SAME: Final = [
    "a@b", "ann@example.net", "ann.lee@example.net", "a.b.c.d@e.f.g.h", "ann+tag@example.net", "ann-lee@example.net",
    "_@example.net", "-ann@example.net", "ann-@example.net", "0@example.net", "0123@example.net",
    "!#$%&'*+-/=?^_`{|}~@example.net", "ann!b%c@example.net", '""@example.net', '"ann lee"@example.net',
    '".ann"@example.net', '"ann."@example.net', '"ann..lee"@example.net', '"ann@lee"@example.net', '"<ann>"@example.net',
    '"ann,lee;x:y[z]"@example.net', '"(ann)"@example.net', '"ann\\"lee"@example.net', '"ann\\\\lee"@example.net',
    '" "@example.net', "ann@a", "ann@1", "ann@1a", "ann@a1", "ann@a-b", "ann@a--b", "ann@a-b-c.d",
    "ann@xn--bcher-kva.example", "ann@123.example", "ann@example.123", "ann@1.2.3.4", "ann@1.2.3.4.5", "ann@256.1.1.1",
    "ann@0x7f.0.0.1", "ann@[192.0.2.1]", "ann@[255.255.255.255]", "ann@[0.0.0.0]", "ann@[IPv6:::1]", "ann@[IPv6:::]",
    "ann@[IPv6:2001:db8::1]", "ann@[IPv6:1:2:3:4:5:6:7:8]", "ann@[IPv6:fe80::1]", "\xe4nn@example.net",
    "e\u0301@example.net", '"\xe4 b"@example.net',
]  # fmt: skip

#: Addresses that have a simpler form: case, quotes that nobody needs, address literals, A-labels, routes.
OTHER: Final = {
    "ANN@Example.NET": "ANN@example.net", '"ann"@example.net': "ann@example.net",
    '"ann.lee"@example.net': "ann.lee@example.net", '"\\a\\n\\n"@example.net': "ann@example.net",
    '"\\ "@example.net': '" "@example.net', "ann@[IPv6:2001:DB8::1]": "ann@[IPv6:2001:db8::1]",
    "ann@[IPv6:2001:db8:0:0:0:0:0:1]": "ann@[IPv6:2001:db8::1]",
    "ann@[IPv6:::ffff:192.0.2.1]": "ann@[IPv6:::ffff:c000:201]",
    "ann@[IPv6:1:2:3:4:5:6:192.0.2.1]": "ann@[IPv6:1:2:3:4:5:6:c000:201]", "ann@[ipv6:::1]": "ann@[IPv6:::1]",
    "@a:ann@example.net": "ann@example.net", "@a,@b:ann@example.net": "ann@example.net",
    "ann@ex\xe4mple.net": "ann@xn--exmple-cua.net", "ann@EX\xc4MPLE.net": "ann@xn--exmple-cua.net",
    "\u5b89@\u4f8b\u3048.\u30c6\u30b9\u30c8": "\u5b89@xn--r8jz45g.xn--zckzah", "ann@example\u3002net": "ann@example.net",
    "ann@example\uff0enet": "ann@example.net",
}  # fmt: skip

#: What is no address.
NONE: Final = [
    ".ann@example.net", "ann.@example.net", "ann..lee@example.net", ".@example.net", "..@example.net",
    "ann lee@example.net", " ann@example.net", "ann@example.net ", "ann @example.net", "ann@ example.net",
    "ann(lee)@example.net", "(lee)ann@example.net", "ann@(lee)example.net", "ann@example.net(lee)", "ann,lee@example.net",
    "ann;lee@example.net", "ann:lee@example.net", "ann<lee@example.net", "ann>lee@example.net", "ann[lee@example.net",
    "ann]lee@example.net", "ann\\lee@example.net", 'ann"lee@example.net', "ann@lee@example.net", "ann", "@example.net",
    "ann@", "@", "@@", '"ann@example.net', 'ann"@example.net', '"ann"lee@example.net', 'ann"lee"@example.net',
    '"ann"."lee"@example.net', 'ann."lee"@example.net', '"ann".lee@example.net', '"ann""lee"@example.net',
    '"ann"lee"@example.net', '"\\"@example.net', '"ann\\"@example.net', '"ann\r\n lee"@example.net',
    '"ann\tlee"@example.net', '"ann\x00lee"@example.net', '"ann\x7flee"@example.net', "'ann lee'@example.net", "ann@-a",
    "ann@a-", "ann@a-.example", "ann@-a.example", "ann@a.-b", "ann@example.net.", "ann@.example.net", "ann@example..net",
    "ann@.", "ann@..", "ann@a_b.example", "ann@_dmarc.example.net", "ann@a b", "ann@a\tb", "ann@a,b", "ann@a/b",
    "ann@a:25", "ann@a%b", "ann@a!b", "ann@a#b", "ann@*.example.net", "ann@a\\.b", 'ann@"example.net"', "ann@(x)",
    "ann@<example.net>", "ann@example.net\r\n", "ann@example.net\n", "ann@exam\rple.net", "ann@exam\x00ple.net",
    "ann@[256.0.0.1]", "ann@[1.2.3]", "ann@[1.2.3.4.5]", "ann@[01.2.3.4]", "ann@[1.2.3.04]", "ann@[1.2.3.4",
    "ann@1.2.3.4]", "ann@[]", "ann@[ 1.2.3.4]", "ann@[1.2.3.4 ]", "ann@[1.2.3.4]x", "ann@[1.2.3.4].example",
    "ann@[[1.2.3.4]]", "ann@[example.net]", "ann@[x:y]", "ann@[tag:value]", "ann@[IPv6:1:2:3:4:5:6:7]",
    "ann@[IPv6:1:2:3:4:5:6:7:8:9]", "ann@[IPv6:1::2::3]", "ann@[IPv6:::ffff:192.0.2.999]",
    "ann@[IPv6:1:2:3:4:5:6:7:192.0.2.1]", "ann@[IPv6:12345::]", "ann@[IPv6:g::]", "ann@[IPv6:::1%eth0]", "ann@[IPv6:]",
    "ann@[IPv6:1.2.3.4]", "ann@[IPv6::1]", "ann@[IPv6:1:]", "ann@[::1]", "ann@[2001:db8::1]", "ann@[IPv6 :::1]",
    "ann@[IPv4:192.0.2.1]", "@a,b:ann@example.net", "@a:", "@:ann@example.net", "@a ann@example.net",
    "@a:@b:ann@example.net", "Ann <ann@example.net>", "<ann@example.net>", "ann@example.net,lee@example.net",
    "group: ann@example.net;", "mailto:ann@example.net", "ann@example.net?subject=x", "ann\uff20example.net",
    "ann\xa0lee@example.net", "ann\u200blee@example.net", "ann\u202elee@example.net", "ann\ufefflee@example.net",
    "ann\u2028lee@example.net", "ann\ud800@example.net", "ann@\u2603.example", "ann@xn--.example", "ann@xn--\xe4.example",
    "ann@-\xe4.example", "ann@[\uff11.2.3.4]",
]  # fmt: skip

ADDRESSES: Final = {**{text: text for text in SAME}, **OTHER}


@pytest.mark.parametrize("text", ADDRESSES, ids=ascii)
def test_s_en4_what_is_an_address(text: str) -> None:
    for parse, word in ((parse_mail, "FROM:"), (parse_rcpt, "TO:")):
        parsed = parse(f"{word}<{text}>")
        assert (str(parsed.address), parsed.parameters) == (ADDRESSES[text], {})
    if not text.startswith("@"):  # a route is part of a path, not of a mailbox
        assert str(parse_mailbox(text)) == ADDRESSES[text]
    assert str(parse_mailbox(ADDRESSES[text])) == ADDRESSES[text], "and stays what it is"


@pytest.mark.parametrize("text", NONE, ids=ascii)
def test_s_en4_what_is_none(text: str) -> None:
    for parse, word in ((parse_mail, "FROM:"), (parse_rcpt, "TO:")):
        with pytest.raises(SyntaxFault):
            parse(f"{word}<{text}>")
    with pytest.raises(BadAddress):
        parse_mailbox(text)


def test_s_en4_the_session_says_the_same() -> None:
    """The whole table in one session: nothing is stored, nothing is forgotten, no line is taken for two."""
    limits = Limits(bad_commands=1000, bad_commands_in_a_row=1000)
    engine = Engine(limits=limits)
    engine.say("EHLO client.test")
    for text in [*ADDRESSES, *NONE]:
        engine._unread = b""
        octets = text.encode("utf-8", "surrogatepass").replace(b"\r\n", b"\n")
        engine.send(b"MAIL FROM:<" + octets + b"> SMTPUTF8\r\n")
        answers = engine._unread.decode().splitlines()
        assert [answer[:3] in {"250"} for answer in answers] == [text in ADDRESSES], (text, answers)
        transaction = engine.dialogue.session.transaction
        assert (str(transaction.sender) if transaction else None) == ADDRESSES.get(text)
        engine.say("RSET")
    assert len(ADDRESSES) + len(NONE) >= 190
    assert engine.spool.entries == []


LENGTHS: Final = {
    "local part 64": ("l" * 64 + "@example.net", True),
    "local part 65": ("l" * 65 + "@example.net", False),
    "local part 64 with its quotes": ('"' + "l" * 62 + '"@example.net', True),
    "local part 65 with its quotes": ('"' + "l" * 63 + '"@example.net', False),
    "local part 64 with a backslash": ('"' + "l" * 60 + '\\""@example.net', True),
    "local part 65 with a backslash": ('"' + "l" * 61 + '\\""@example.net', False),
    "local part 64 in UTF-8": ("\u00fc" * 32 + "@example.net", True),
    "local part 65 in UTF-8": ("\u00fc" * 32 + "l@example.net", False),
    "local part of 1 MiB": ("l" * (1 << 20) + "@example.net", False),
    "label 63": ("l@" + "d" * 63, True),
    "label 64": ("l@" + "d" * 64, False),
    "last label 63": ("l@a." + "d" * 63, True),
    "last label 64": ("l@a." + "d" * 64, False),
    "label 64 within": ("l@a." + "d" * 64 + ".b", False),
    "127 labels": ("l@" + ".".join("d" * 126), True),
    "path 256": ("l@" + ".".join(["d" * 63] * 3) + "." + "d" * 60, True),
    "path 257": ("ll@" + ".".join(["d" * 63] * 3) + "." + "d" * 60, False),
    "path 256, long local part": ("l" * 64 + "@" + ".".join(["d" * 62] * 3), True),
    "path 257, long local part": ("l" * 64 + "@" + ".".join(["d" * 62] * 2) + "." + "d" * 63 + ".d", False),
    "domain 255": ("l@" + ".".join(["d" * 63] * 4), False),
    "domain 256": ("l@" + ".".join(["d" * 63] * 4) + "d", False),
    "a route is dropped and not counted": ("@" + ".".join(["d" * 63] * 3) + ":" + "l" * 64 + "@example.net", True),
}


@pytest.mark.parametrize(("path", "fits"), LENGTHS.values(), ids=LENGTHS)
def test_s_en4_lengths(path: str, fits: bool) -> None:
    """RFC 5321 section 4.5.3.1, RFC 1035 section 2.3.4; a domain of 255 octets is in no path of 256."""
    for parse, word in ((parse_mail, "FROM:"), (parse_rcpt, "TO:")):
        if fits:
            assert parse(f"{word}<{path}>").address == parse_mailbox(path.rpartition(":")[2])
        else:
            with pytest.raises(BadAddress):
                parse(f"{word}<{path}>")
