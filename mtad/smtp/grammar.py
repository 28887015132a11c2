"""The grammar of SMTP commands: octets of a line in, values out.

What it is for: the one place that knows how a command line, a path, a mailbox and a parameter are written. It knows nothing
of sessions or of policy: a well-formed address may still be refused.

Invariants: nothing that leaves this module holds a control character, a line end or anything else that does not print;
what is beyond US-ASCII is well-formed UTF-8, and stands in paths and parameters only. Each expression matches in time
linear in the line. An `Address` that was parsed here is parsed to an equal one from its text form.

A domain in another script (U-labels, RFC 5890) leaves this module as A-labels: they name the same domain, and so nothing
behind it has to compare the two. A local part stays as it is. Characters without a shape of their own, such as joiners and
marks of direction, are refused in addresses: a log or a reply that shows them lies.

Errors: `SyntaxFault` for every breach of the grammar; its subclass `BadAddress` when it is the address that is wrong and
not the command around it, because the standards want another status there. The text says what was expected and quotes
nothing that the client sent.

Leniencies, each because people and programs depend on it, none of them a way to write one thing and mean another:
spaces after ``FROM:`` and ``TO:``, and paths without angle brackets (typed by hand); white space at the end of a line (RFC
5321 section 4.1.1 asks for it); underscores in the name after HELO (names of Windows machines; the name is only recorded);
address literals in a source route, which is dropped whatever it says.

Standards: RFC 5321 sections 2.4, 4.1.1 to 4.1.3, 4.5.3.1; RFC 5322 section 3.2.3 (atext); RFC 6531 section 3.3 (SMTPUTF8);
RFC 5891 (IDNA).
"""

# ruff: noqa: ERA001 - ABNF reads like commented-out code

from __future__ import annotations

import ipaddress
import re
from typing import Final

import idna
import msgspec

from mtad.address import NULL, Address
from mtad.errors import SyntaxFault

#: Octets, RFC 5321 section 4.5.3.1.1, as written (quotes included).
MAX_LOCAL: Final = 64
#: Octets, RFC 5321 section 4.5.3.1.2.
MAX_DOMAIN: Final = 255
#: Octets of a path with its angle brackets, RFC 5321 section 4.5.3.1.3; a source route is not counted, it is dropped.
MAX_PATH: Final = 256
#: Octets of one label of a domain, RFC 1035 section 2.3.4.
MAX_LABEL: Final = 63


def _and_utf8(characters: str) -> str:
    """A class of these characters of US-ASCII, and of UTF8-non-ascii (RFC 6532) less C1 controls and the no-break space.

    What does not print is sorted out afterwards. The class is written as what is not in it: a range up to the last
    character of Unicode takes milliseconds to compile, and every command of ours would spend half of its start on that.
    """
    known = re.compile(f"[{characters}]")
    return "[^" + "".join(rf"\x{code:02x}" for code in range(0xA1) if not known.match(chr(code))) + "]"


# Dot-string     = Atom *("." Atom)
# Atom           = 1*atext                                atext =/ UTF8-non-ascii (RFC 6531 section 3.3)
_ATOM = _and_utf8(r"A-Za-z0-9!#$%&'*+\-/=?^_`{|}~") + "+"
_DOT_STRING = rf"{_ATOM}(?:\.{_ATOM})*"

# Quoted-string  = DQUOTE *QcontentSMTP DQUOTE
# QcontentSMTP   = qtextSMTP / quoted-pairSMTP
# quoted-pairSMTP = %d92 %d32-126
# qtextSMTP      = %d32-33 / %d35-91 / %d93-126           qtextSMTP =/ UTF8-non-ascii
_QTEXT = _and_utf8(r" !#-\[\]-~")
_QUOTED_STRING = rf'"(?:{_QTEXT}|\\[ -~])*"'

# Local-part     = Dot-string / Quoted-string
_LOCAL_PART = rf"{_DOT_STRING}|{_QUOTED_STRING}"

# Domain         = sub-domain *("." sub-domain)
# sub-domain     = Let-dig [Ldh-str]
# Ldh-str        = *( ALPHA / DIGIT / "-" ) Let-dig
_SUB_DOMAIN = r"[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*"
_DOMAIN = rf"{_SUB_DOMAIN}(?:\.{_SUB_DOMAIN})*"
# sub-domain     =/ U-label
_U_DOMAIN = _DOMAIN.replace("[A-Za-z0-9]", _and_utf8("A-Za-z0-9"))

# address-literal = "[" ( IPv4-address-literal / IPv6-address-literal / General-address-literal ) "]"
# The general form has no registered tag; what stands between the brackets is judged by the ipaddress module.
_LITERAL = r"\[[A-Za-z0-9:.]+\]"

# Mailbox        = Local-part "@" ( Domain / address-literal )
_MAILBOX = rf"({_LOCAL_PART})@({_U_DOMAIN}|{_LITERAL})"

# A-d-l          = At-domain *( "," At-domain )
# At-domain      = "@" Domain
_ROUTE = rf"(?:@(?:{_U_DOMAIN}|{_LITERAL})(?:,@(?:{_U_DOMAIN}|{_LITERAL}))*:)?"

# Path           = "<" [ A-d-l ":" ] Mailbox ">"           and the path that people type, without brackets
# mail           = "MAIL FROM:" Reverse-path [SP Mail-parameters]
# rcpt           = "RCPT TO:" Forward-path [SP Rcpt-parameters]
_PATH = rf"(?:<{_ROUTE}{_MAILBOX}>|{_MAILBOX})"
_PARAMETERS = r"(?: +(?P<parameters>.*))?"

# Reverse-path   = Path / "<>"
_REVERSE_PATH: Final = re.compile(rf"(?:{_PATH}|<>){_PARAMETERS}")
# Forward-path   = "<Postmaster>" / Path
_FORWARD_PATH: Final = re.compile(rf"(?:{_PATH}|<(?ai:postmaster)>|(?ai:postmaster)){_PARAMETERS}")

_MAILBOX_ALONE: Final = re.compile(_MAILBOX)
_DOMAIN_ALONE: Final = re.compile(_DOMAIN)

# ehlo           = "EHLO" SP ( Domain / address-literal )   with "_" counted among the letters
_HELO: Final = re.compile(rf"{_DOMAIN.replace('A-Za-z', 'A-Za-z_')}|{_LITERAL}")

# esmtp-keyword  = (ALPHA / DIGIT) *(ALPHA / DIGIT / "-")
# esmtp-value    = 1*(%d33-60 / %d62-126)                 esmtp-value =/ UTF8-non-ascii
_VALUE = _and_utf8("!-<>-~")
_PARAMETER: Final = re.compile(rf"([A-Za-z0-9][A-Za-z0-9-]*)(?:=({_VALUE}+))?")

# A command is a verb and what follows it; whether that may be more than US-ASCII depends on the verb.
_COMMAND: Final = re.compile(rb"([!-~]+)(?: +([ -~\x80-\xff]*))?")

_QUOTED_PAIR: Final = re.compile(r"\\(.)")


class BadAddress(SyntaxFault):
    """The address in a command is not one; the command around it is well-formed."""


class Command(msgspec.Struct, frozen=True):
    """One command line: ``verb`` in upper case and the rest without surrounding white space."""

    verb: str
    argument: str


class PathArgument(msgspec.Struct, frozen=True):
    """The argument of MAIL or RCPT: an address and the parameters, keywords in upper case, "" for those without a value.

    ``utf8`` is True when it was written with more than US-ASCII, which takes SMTPUTF8 (RFC 6531 section 3.4).
    """

    address: Address
    parameters: dict[str, str]
    utf8: bool = False


def parse_command(line: bytes) -> Command:
    """Take one command line apart.

    Args:
        line: the line without its CRLF.

    Raises:
        SyntaxFault: there is no verb at its start, or it holds something else than what prints, in UTF-8.
    """
    match = _COMMAND.fullmatch(line.rstrip(b" \t"))
    if match is None:
        raise SyntaxFault(_why_no_command(line))
    verb, argument = match.groups(b"")
    return Command(verb.decode("ascii").upper(), argument.decode("ascii") if argument.isascii() else _utf8(argument))


def _utf8(octets: bytes) -> str:
    """Text of more than US-ASCII; the strict decoder refuses overlong forms and surrogates (RFC 3629 section 3)."""
    try:
        text = octets.decode("utf-8")
    except UnicodeDecodeError:
        raise SyntaxFault("8-bit character in command that is not UTF-8") from None
    if not text.isprintable():
        raise SyntaxFault("character in command that does not print")
    return text


def _why_no_command(line: bytes) -> str:
    if any(octet < 32 or octet == 127 for octet in line):
        return "control character in command"
    return "expected a command" if line.isascii() else "8-bit character in command"


def parse_mail(argument: str) -> PathArgument:
    """Parse what follows MAIL: ``FROM:<address>`` or ``FROM:<>``, and parameters.

    Raises:
        BadAddress: the reverse-path is not well-formed (501 5.1.7).
        SyntaxFault: ``FROM:`` is missing, or a parameter is not well-formed or given twice (501 5.5.4).
    """
    return _parse_path(argument, "FROM:", _REVERSE_PATH, NULL)


def parse_rcpt(argument: str) -> PathArgument:
    """Parse what follows RCPT: ``TO:<address>`` or ``TO:<postmaster>``, and parameters.

    The bare postmaster comes back as ``Address("postmaster", "")``.

    Raises:
        BadAddress: the forward-path is not well-formed (501 5.1.3).
        SyntaxFault: ``TO:`` is missing, or a parameter is not well-formed or given twice (501 5.5.4).
    """
    return _parse_path(argument, "TO:", _FORWARD_PATH, Address("postmaster", ""))


def _parse_path(argument: str, word: str, pattern: re.Pattern[str], bare: Address) -> PathArgument:
    if argument[: len(word)].upper() != word:
        raise SyntaxFault(f"expected {word}<address>")
    match = pattern.fullmatch(argument[len(word) :].lstrip(" "))
    if match is None:
        raise BadAddress("expected <user@domain>")
    local = match[1] or match[3]
    address = bare if local is None else _address(local, match[2] or match[4])
    parameters = match["parameters"]
    return PathArgument(address, _parse_parameters(parameters) if parameters else {}, not argument.isascii())


def _parse_parameters(text: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for word in text.split(" "):
        if not word:
            continue
        match = _PARAMETER.fullmatch(word)
        if match is None:
            raise SyntaxFault("expected keyword or keyword=value after the address")
        keyword = match[1].upper()
        if keyword in parameters:
            raise SyntaxFault("parameter given twice")
        parameters[keyword] = match[2] or ""
    return parameters


def parse_mailbox(text: str) -> Address:
    """Parse ``user@domain`` alone, as it stands in envelopes and in files.

    Raises:
        BadAddress: it is not a mailbox of RFC 5321 section 4.1.2 and RFC 6531 section 3.3, or too long.
    """
    match = _MAILBOX_ALONE.fullmatch(text)
    if match is None:
        raise BadAddress("expected user@domain")
    return _address(match[1], match[2])


def _address(local: str, domain: str) -> Address:
    if not domain.isascii():
        domain = _a_labels(domain)
    if local.isascii():
        octets = len(local)
    elif local.isprintable():
        octets = len(local.encode("utf-8"))
    else:
        raise BadAddress("character in local part that does not print")
    if octets > MAX_LOCAL:
        raise BadAddress(f"local part longer than {MAX_LOCAL} octets")
    if octets + len(domain) + 3 > MAX_PATH:
        raise BadAddress(f"path longer than {MAX_PATH} octets")
    domain = _literal(domain) if domain[0] == "[" else _bounded(domain).lower()
    if local[0] == '"':
        local = _QUOTED_PAIR.sub(r"\1", local[1:-1])
    return Address(local, domain)


def _bounded(domain: str) -> str:
    """Hold a domain to the lengths of RFC 5321 section 4.5.3.1.2 and RFC 1035 section 2.3.4."""
    if len(domain) > MAX_DOMAIN:
        raise BadAddress(f"domain longer than {MAX_DOMAIN} octets")
    if len(domain) > MAX_LABEL and max(map(len, domain.split("."))) > MAX_LABEL:
        raise BadAddress(f"label of domain longer than {MAX_LABEL} octets")
    return domain


def _a_labels(domain: str) -> str:
    """A domain in another script as the DNS has it. Case and width are mapped as people expect it (UTS 46)."""
    if len(domain) > MAX_DOMAIN:
        raise BadAddress(f"domain longer than {MAX_DOMAIN} octets")
    try:
        ascii_form = idna.encode(domain, uts46=True, std3_rules=True).decode("ascii")
    except (UnicodeError, ValueError):
        raise BadAddress("expected a domain") from None
    if _DOMAIN_ALONE.fullmatch(ascii_form) is None:
        raise BadAddress("expected a domain")
    return ascii_form


def _literal(text: str) -> str:
    """The canonical form of an address literal (RFC 5321 section 4.1.3)."""
    inner = text[1:-1]
    try:
        if inner[:5].lower() == "ipv6:":
            return f"[IPv6:{ipaddress.IPv6Address(inner[5:])}]"
        return f"[{ipaddress.IPv4Address(inner)}]"
    except ValueError:
        raise BadAddress("expected [IPv4 address] or [IPv6:address]") from None


def parse_domain(text: str) -> str:
    """A domain in lower case, or an address literal in its canonical form.

    Raises:
        BadAddress: it is neither, or too long.
    """
    if text.startswith("["):
        return _literal(text)
    if _DOMAIN_ALONE.fullmatch(text) is None:
        raise BadAddress("expected a domain")
    return _bounded(text).lower()


def parse_helo(argument: str) -> str:
    """The name that a client gives itself after EHLO or HELO, as it wrote it.

    Raises:
        SyntaxFault: it is neither a domain nor an address literal, or too long (501 5.5.4).
    """
    if _HELO.fullmatch(argument) is None:
        raise SyntaxFault("expected a domain or an address literal")
    if argument[0] == "[":
        _literal(argument)
    else:
        _bounded(argument)
    return argument
