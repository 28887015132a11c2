"""The grammar of SMTP commands."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtad.address import NULL, Address
from mtad.errors import SyntaxFault
from mtad.smtp.grammar import (
    MAX_PATH,
    BadAddress,
    Command,
    parse_command,
    parse_domain,
    parse_helo,
    parse_mail,
    parse_mailbox,
    parse_rcpt,
)


@pytest.mark.parametrize(
    ("line", "verb", "argument"),
    [
        (b"NOOP", "NOOP", ""),
        (b"noop", "NOOP", ""),
        (b"NOOP \t ", "NOOP", ""),
        (b"EHLO  client", "EHLO", "client"),
        (b"MAIL FROM:<a@b> SIZE=1 ", "MAIL", "FROM:<a@b> SIZE=1"),
        (b"GET / HTTP/1.1", "GET", "/ HTTP/1.1"),
        (b"MAILFROM:<a@b>", "MAILFROM:<A@B>", ""),
    ],
)
def test_command(line: bytes, verb: str, argument: str) -> None:
    assert parse_command(line) == Command(verb, argument)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"", "expected a command"),
        (b"   ", "expected a command"),
        (b" NOOP", "expected a command"),
        (b"NOOP\0", "control"),
        (b"NO\0OP", "control"),
        (b"EHLO a\tb", "control"),
        (b"EHLO a\nb", "control"),
        (b"EHLO a\rb", "control"),
        (b"EHLO \x1b[2J", "control"),
        (b"EHLO \x7f", "control"),
        (b"EHLO \xc3", "8-bit"),
        (b"\xc3\xbc", "8-bit"),
        (b"MAIL FROM:<a\xc0\xaf@b>", "not UTF-8"),
        (b"MAIL FROM:<a\xed\xa0\x80@b>", "not UTF-8"),
        (b"MAIL FROM:<a\xc2\x85@b>", "does not print"),
        (b"MAIL FROM:<a\xe2\x80\xa8@b>", "does not print"),
        (b"MAIL FROM:<a\xe2\x80\xae@b>", "does not print"),
        (b"MAIL FROM:<a\xff@b>", "8-bit"),
        (b"\x80", "8-bit"),
    ],
)
def test_no_command(line: bytes, why: str) -> None:
    with pytest.raises(SyntaxFault, match=why):
        parse_command(line)


@given(st.binary(max_size=60))
def test_a_command_is_printable_or_refused(line: bytes) -> None:
    """Invariant: whatever comes in, what comes out is printable US-ASCII and holds no line end."""
    try:
        command = parse_command(line)
    except SyntaxFault:
        return
    text = command.verb + command.argument
    assert text.isascii()
    assert text.isprintable()
    assert " " not in command.verb


@pytest.mark.parametrize(
    ("argument", "address"),
    [
        ("FROM:<a@b>", Address("a", "b")),
        ("from:<a@b>", Address("a", "b")),
        ("FROM:  <a@b>", Address("a", "b")),
        ("FROM: a@b", Address("a", "b")),
        ("FROM:a@b", Address("a", "b")),
        ("FROM:<>", NULL),
        ("FROM: <>", NULL),
        ("FROM:<A.b@C.Example>", Address("A.b", "c.example")),
        ("FROM:<!#$%&'*+-/=?^_`{|}~@b>", Address("!#$%&'*+-/=?^_`{|}~", "b")),
        ('FROM:<"a b"@c>', Address("a b", "c")),
        ('FROM:<"a@b"@c>', Address("a@b", "c")),
        ('FROM:<"a>b"@c>', Address("a>b", "c")),
        (r'FROM:<"a\"b\\c\d"@c>', Address(r'a"b\cd', "c")),
        ('FROM:<""@c>', Address("", "c")),
        ('FROM:<"plain"@c>', Address("plain", "c")),
        ("FROM:<a@[192.0.2.1]>", Address("a", "[192.0.2.1]")),
        ("FROM:<a@[IPv6:2001:DB8:0:0::1]>", Address("a", "[IPv6:2001:db8::1]")),
        ("FROM:<a@[ipv6:::1]>", Address("a", "[IPv6:::1]")),
        ("FROM:<@x:a@b>", Address("a", "b")),
        ("FROM:<@x.y,@z,@[192.0.2.1]:a@b>", Address("a", "b")),
        ("FROM:<a@1.2.3.4>", Address("a", "1.2.3.4")),
        ("FROM:<a@b--c.d-e>", Address("a", "b--c.d-e")),
    ],
)
def test_reverse_path(argument: str, address: Address) -> None:
    parsed = parse_mail(argument)
    assert parsed.address == address
    assert parsed.parameters == {}


@pytest.mark.parametrize(
    "path",
    [
        "",
        "<",
        ">",
        "< >",
        "<a>",
        "<a@>",
        "<@b>",
        "<a@b",
        "a@b>",
        "<<a@b>>",
        "<a@b>>",
        "<a@b@c>",
        "<a b@c>",
        "< a@b >",
        "<a..b@c>",
        "<.a@b>",
        "<a.@b>",
        "<a@b.>",
        "<a@.b>",
        "<a@b..c>",
        "<a@-b>",
        "<a@b->",
        "<a@b_c>",
        "<a(comment)@b>",
        '<"a@b>',
        '<"a"b@c>',
        '<"a\\"@b>',
        "<a,b@c>",
        "<a@b,c@d>",
        "<a@b><c@d>",
        "<a@[]>",
        "<a@[1.2.3]>",
        "<a@[1.2.3.256]>",
        "<a@[01.2.3.4]>",
        "<a@[IPv6:1.2.3.4]>",
        "<a@[IPv6::::1]>",
        "<a@[IPv6:fe80::1%eth0]>",
        "<a@[::1]>",
        "<a@[x400:c=de]>",
        "<a@[192.0.2.1].b>",
        "<@x,a@b>",
        "<@x:>",
        "<@x;a@b>",
        "<x:a@b>",
        "<postmaster>",
        "<a@b>SIZE=1",
        "a",
    ],
)
def test_no_reverse_path(path: str) -> None:
    with pytest.raises(BadAddress):
        parse_mail("FROM:" + path)


@pytest.mark.parametrize("argument", ["", "FROM", "FROM <a@b>", "TO:<a@b>", "<a@b>", "FROM :<a@b>"])
def test_mail_without_its_word(argument: str) -> None:
    with pytest.raises(SyntaxFault, match="expected FROM:") as caught:
        parse_mail(argument)
    assert not isinstance(caught.value, BadAddress)


@pytest.mark.parametrize("argument", ["TO:<postmaster>", "TO:<Postmaster>", "to: <POSTMASTER>", "TO:postmaster"])
def test_bare_postmaster(argument: str) -> None:
    """RFC 5321 section 4.5.1."""
    assert parse_rcpt(argument).address == Address("postmaster", "")


@pytest.mark.parametrize("path", ["<>", "<root>", "", "<postmaster@>", "<postmasters>", "<@x:postmaster>"])
def test_no_forward_path(path: str) -> None:
    with pytest.raises(BadAddress):
        parse_rcpt("TO:" + path)


def test_parameters() -> None:
    parsed = parse_mail("FROM:<a@b>  size=10 BODY=8BITMIME x-y AUTH=<>")
    assert parsed.parameters == {"SIZE": "10", "BODY": "8BITMIME", "X-Y": "", "AUTH": "<>"}
    assert parse_rcpt("TO:a@b ORCPT=rfc822;a+2Bb@c").parameters == {"ORCPT": "rfc822;a+2Bb@c"}


@pytest.mark.parametrize("text", ["A=", "=A", "-A=1", "A=b=c", "A B A", "a A", "A_B", "<c@d>"])
def test_bad_parameters(text: str) -> None:
    with pytest.raises(SyntaxFault) as caught:
        parse_mail(f"FROM:<a@b> {text}")
    assert not isinstance(caught.value, BadAddress)


def test_lengths_of_address_s_en4() -> None:
    """S-EN4; RFC 5321 section 4.5.3.1."""
    assert parse_mailbox("l" * 64 + "@d").local == "l" * 64
    assert parse_mailbox("a@" + "d" * 63 + ".e").domain == "d" * 63 + ".e"
    longest = ".".join(["d" * 49] * 5)
    path = "l" * (MAX_PATH - 3 - len(longest)) + "@" + longest
    assert str(parse_mailbox(path)) == path
    for wrong in ("l" * 65 + "@d", "a@" + "d" * 64, "a@" + "d" * 64 + ".e", "l" + path, '"' + "l" * 63 + '"@d'):
        with pytest.raises(BadAddress, match="longer than"):
            parse_mailbox(wrong)


def test_lengths_of_domain_s_en4() -> None:
    domain = ".".join(["d" * 63] * 4)
    assert len(domain) == 255
    assert parse_domain(domain) == domain
    assert parse_helo(domain) == domain
    for wrong in (domain + "d", domain[:-1] + ".d", "d" * 64):
        with pytest.raises(SyntaxFault, match="longer than"):
            parse_domain(wrong)
        with pytest.raises(SyntaxFault, match="longer than"):
            parse_helo(wrong)


@pytest.mark.parametrize("name", ["a", "A.example", "WORK_STATION", "1", "[192.0.2.1]", "[IPv6:::1]"])
def test_helo(name: str) -> None:
    assert parse_helo(name) == name


@pytest.mark.parametrize(
    "name", ["", "a b", "a..b", "-a", "a.", ".", "[]", "[::1]", "[a]", "a(b)", "a;b", "a@b", "[1.2.3.4"]
)
def test_bad_helo(name: str) -> None:
    with pytest.raises(SyntaxFault):
        parse_helo(name)


def test_domain() -> None:
    assert parse_domain("Example.ORG") == "example.org"
    assert parse_domain("[IPv6:0:0::1]") == "[IPv6:::1]"
    for wrong in ("", "a b", "a_b", "a.", "[", "[x]"):
        with pytest.raises(BadAddress):
            parse_domain(wrong)


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("<ü@example.org>", Address("ü", "example.org")),
        ("<jürgen.müller@Bücher.Example>", Address("jürgen.müller", "xn--bcher-kva.example")),
        ("<a@BÜCHER.example>", Address("a", "xn--bcher-kva.example")),
        ("<a@faß.example>", Address("a", "xn--fa-hia.example")),
        ("<a@παράδειγμα.δοκιμή>", Address("a", "xn--hxajbheg2az3al.xn--jxalpdlp")),
        ('<"ü \\" b"@example.org>', Address('ü " b', "example.org")),
        ("<\U0001f600@example.org>", Address("\U0001f600", "example.org")),
        ("<@ü.example,@b.example:a@example.org>", Address("a", "example.org")),
        ("ü@example.org", Address("ü", "example.org")),
    ],
)
def test_addresses_beyond_ascii_rfc_6531(path: str, address: Address) -> None:
    parsed = parse_mail("FROM:" + path)
    assert parsed.utf8
    assert parsed.address == address
    assert parse_rcpt("TO:" + path).address == address
    assert parse_mailbox(str(address)) == address


@pytest.mark.parametrize(
    "path",
    [
        "<u\uff20evil.example>",
        "<a\u0085@b>",
        "<a\u00a0@b>",
        "<a\u2028@b>",
        "<a\u200d@b>",
        "<a\u202e@b>",
        "<a\ufeff@b>",
        "<a\ue000@b>",
        "<a\ud800@b>",
        '<"\\ü"@b>',
        "<a@-ü.example>",
        "<a@ü-.example>",
        "<a@ü..example>",
        "<a@ü_b.example>",
        "<a@\u2028.example>",
        "<a@\u200d.example>",
        "<a@☃.example>",
        "<a@xn--ü.example>",
        "<po\u017ftmaster>",
        "<a@[127.0.0.\u0661]>",
        "<" + "ü" * 33 + "@b>",
        "<a@" + "ü" * 60 + ".example>",
        "<a@" + "ü." * 127 + "example>",
    ],
)
def test_what_is_no_address_beyond_ascii_s_pa4(path: str) -> None:
    for parse, word in ((parse_mail, "FROM:"), (parse_rcpt, "TO:")):
        with pytest.raises(BadAddress):
            parse(word + path)


def test_lengths_are_octets() -> None:
    assert parse_mailbox("ü" * 32 + "@b").local == "ü" * 32
    with pytest.raises(BadAddress, match="64 octets"):
        parse_mailbox("ü" * 32 + "a@b")


def test_a_fullwidth_dot_separates_labels_like_any_other() -> None:
    """What is judged is what is stored: nobody behind this sees the other dot."""
    assert parse_mailbox("u@example\uff0eorg").domain == "example.org"
    assert parse_mailbox("u@\uff45\uff58\uff41\uff4d\uff50\uff4c\uff45.org").domain == "example.org"


def test_what_needs_smtputf8() -> None:
    assert not parse_mail("FROM:<a@b> SIZE=1").utf8
    assert parse_mail("FROM:<a@b> X=ü").utf8
    assert parse_rcpt("TO:<a@b> ORCPT=utf-8;ü@b").parameters == {"ORCPT": "utf-8;ü@b"}
    assert parse_command("MAIL FROM:<ü@b>".encode()) == Command("MAIL", "FROM:<ü@b>")
    for name in ("ü", "bücher.example"):
        with pytest.raises(SyntaxFault):
            parse_helo(name)
        with pytest.raises(BadAddress):
            parse_domain(name)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    """Invariant: what comes out prints, has an ASCII domain, fits, and is parsed to itself."""
    for path in (f"<{text}@example.org>", f"<a@{text}>", f"<{text}>", text):
        try:
            address = parse_rcpt("TO:" + path).address
        except SyntaxFault:
            continue
        assert str(address).isprintable()
        assert address.domain.isascii()
        assert len(str(address).encode()) <= MAX_PATH
        assert not address.domain or parse_mailbox(str(address)) == address


@given(st.binary(max_size=40))
def test_any_octets_are_a_command_or_refused_s_pa3_s_pa5(octets: bytes) -> None:
    """Invariant: the verb is printable US-ASCII, the argument prints; nothing is repaired or cut off."""
    for line in (octets, b"MAIL FROM:<" + octets + b"@b>"):
        try:
            command = parse_command(line)
        except SyntaxFault:
            continue
        assert command.verb.isascii()
        assert f"{command.verb}{command.argument}".isprintable()
        assert line.rstrip(b" \t").endswith(command.argument.encode())


printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)


@given(printable, st.sampled_from(["a", "example.org", "[192.0.2.1]", "[IPv6:::1]"]))
def test_text_form_is_parsed_to_an_equal_address(local: str, domain: str) -> None:
    """Invariant: ``parse(str(address)) == address`` for every address within the limits."""
    address = Address(local, domain)
    if len(str(address).rpartition("@")[0]) <= 64:
        assert parse_mailbox(str(address)) == address


@given(printable)
def test_any_argument_is_parsed_or_refused(text: str) -> None:
    """Invariant: a fault or an address whose text form is printable; nothing else happens."""
    for parse, word in ((parse_mail, "FROM:"), (parse_rcpt, "TO:")):
        try:
            address = parse(word + text).address
        except SyntaxFault:
            continue
        assert str(address).isprintable()
        assert not address.domain or parse_mailbox(str(address)) == address


@pytest.mark.parametrize(
    "path",
    [
        "<" + "a." * 1000,
        "<" + "a" * 2000,
        "<a@" + "b-" * 1000,
        "<a@" + "b." * 1000 + "->",
        "<" + "@a," * 660,
        '<"' + "\\" * 2000,
        '<"' + "a" * 2000,
        "a" * 1000 + "@" + "b" * 1000 + "_",
    ],
)
def test_time_is_linear_s_pa7(path: str) -> None:
    """S-PA7: the worst line that fits the limit is refused in no time; quadratic behaviour would take far longer."""
    started = time.process_time()
    for _ in range(20):
        with pytest.raises(BadAddress):
            parse_mail("FROM:" + path)
    assert time.process_time() - started < 0.5
