"""What settings mean beyond their type: addresses, networks, names, and how settings go together.

Each rule reports through ``fault(path, message)`` and goes on, so that one run shows everything that is wrong. The small
predicates (`is_domain`, `is_user_name`, `split_address`) are also for the other files that an administrator writes.

Standards: RFC 5321 section 4.1.2 (Domain), RFC 1035 section 2.3.4 (length of names).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Final, Protocol

from mtad.config import Config, DeliveryPolicy, Listener
from mtad.config_lines import Path
from mtad.config_table import sections, tables
from mtad.config_values import rate
from mtad.errors import SyntaxFault
from mtad.smtp.grammar import parse_domain, parse_mailbox


class Fault(Protocol):
    """Where problems go."""

    def __call__(self, path: Path, message: str, also: Path = ()) -> None:
        """Report a problem of ``path``; one that comes of ``also`` as well is dropped when that has a problem itself."""


#: RFC 5321 section 4.1.2: sub-domain = Let-dig [Ldh-str]; RFC 1035: a label has at most 63 octets, a name 253 of text.
_DOMAIN: Final = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
#: The longest name of a directory entry, in octets (NAME_MAX of Linux file systems).
NAME_MAX: Final = 255
#: The longest name of a network device: IFNAMSIZ less the final NUL.
INTERFACE_MAX: Final = 15

_LISTENER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SYSTEM_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\$?")
_NEXT_HOP: Final = re.compile(r"(?:\[(?P<literal>[^\[\]]+)\]|(?P<host>[^\[\]:]+))(?::(?P<port>[0-9]{1,5}))?")

#: What a policy for MX hosts cannot set, and the value that says nothing.
_BY_DOMAIN_ONLY: Final = {"next_hop": "", "port": 0, "tls": "inherit", "credentials": ""}


def is_domain(name: str) -> bool:
    """True for a domain name in ASCII, without a final dot, of 1 to 253 characters."""
    return _DOMAIN.fullmatch(name) is not None


def is_user_name(name: str) -> bool:
    """True when ``name`` is safe as a directory of its own below the mail root: one component, visible, printable."""
    return (
        0 < len(name.encode("utf-8", "surrogatepass")) <= NAME_MAX
        and name.isprintable()
        and "/" not in name
        and name[0] != "."
        and name == name.strip()
    )


def split_address(text: str) -> tuple[str, int]:
    """Take ``ADDRESS:PORT`` apart, an IPv6 address in brackets, into the bare address and the port (0 to 65535).

    Raises:
        ValueError: it is something else; the text says what was expected.
    """
    host, colon, digits = text.rpartition(":")
    if not colon or not digits.isascii() or not digits.isdigit():
        raise ValueError(f"{text!r} is not ADDRESS:PORT, such as 0.0.0.0:25 or [::]:25")
    port = int(digits) if len(digits) <= 5 else 65536
    if port > 65535:
        raise ValueError(f"{text!r}: the port is not within 0 and 65535")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        hint = "; write 0.0.0.0 and [::] for all addresses" if host in {"", "*"} else ""
        raise ValueError(f"{text!r}: {host!r} is not an IP address{hint}") from None
    if bracketed != (address.version == 6):
        raise ValueError(f"{text!r}: an IPv6 address stands in brackets, as [::1]:25, and an IPv4 address does not")
    return str(address), port


def parse_sender(line: str) -> tuple[str, str]:
    """Read a line of ``senders``: the login, and the address that it may use besides its own, both as they are compared.

    Lines are ``login : address``, ``login : @domain`` for all of a domain, ``login : *`` for any address at all.

    Raises:
        ValueError: it is something else; the text says what was expected.
    """
    login, colon, text = (part.strip() for part in line.partition(":"))
    if not login or not colon:
        raise ValueError(f"{line!r} is not `login : address`")
    try:
        if text == "*":
            return login.casefold(), text
        if text.startswith("@"):
            return login.casefold(), f"@{parse_domain(text[1:])}"
        return login.casefold(), parse_mailbox(text).key
    except SyntaxFault:
        raise ValueError(f"{line!r}: {text!r} is none of an address, @domain and *") from None


def check_rules(config: Config, fault: Fault) -> None:
    """Report everything that the types cannot say."""
    _texts(config, fault)
    if not is_domain(config.hostname):
        fault(("hostname",), f"{config.hostname!r} is not a domain name{_a_label(config.hostname)}")
    if config.user and _SYSTEM_USER.fullmatch(config.user) is None:
        fault(("user",), f"{config.user!r} is not a user name")
    for index, domain in enumerate(config.local.domains):
        if not is_domain(domain):
            fault(("local", "domains", index), f"{domain!r} is not a domain name{_a_label(domain)}")
    if not is_user_name(config.local.postmaster):
        fault(("local", "postmaster"), f"{config.local.postmaster!r} cannot be the name of a mailbox")
    if config.retry.minimum > config.retry.maximum:
        fault(("retry", "minimum"), "is longer than retry.maximum", ("retry", "maximum"))
    if config.log.to not in {"stderr", "syslog", "journal"} and not config.log.to.startswith("/"):
        fault(("log", "to"), f"{config.log.to!r} is none of stderr, syslog, journal, nor an absolute path")
    for index, line in enumerate(config.local.senders):
        try:
            parse_sender(line)
        except ValueError as error:
            fault(("local", "senders", index), str(error))
    _delivery(config, fault)
    for index, server in enumerate(config.dns.servers):
        if not _is_server(server):
            fault(("dns", "servers", index), f"{server!r} is not an IP address or ADDRESS:PORT")
    _listeners(config.listener, fault)


def _a_label(name: str) -> str:
    """A hint for a name in another script: what it is called in the DNS (RFC 5890, A-label)."""
    if name.isascii():
        return ""
    try:
        return f"; write {name.encode('idna').decode('ascii')!r}"
    except UnicodeError:
        return ""


def _texts(config: Config, fault: Fault) -> None:
    """What holds for every text: nothing unprintable, and paths are absolute, for the daemon's directory is /."""
    for path, is_path, value in _all_texts(config):
        if not value.isprintable():
            fault(path, "holds a control character")
        elif is_path and value and not value.startswith("/"):
            fault(path, f"{value!r} is not an absolute path")


def _all_texts(config: Config) -> Iterator[tuple[Path, bool, str]]:
    for section in sections():
        for base, table in tables(config, section):
            for setting in section.settings:
                path = (*base, setting.name)
                value = getattr(table, setting.name)
                if isinstance(value, str):
                    yield path, setting.kind == "path", value
                elif isinstance(value, tuple):
                    yield from (((*path, index), False, item) for index, item in enumerate(value))


def _delivery(config: Config, fault: Fault) -> None:
    if config.delivery.next_hop:
        _next_hop(config.delivery.next_hop, ("delivery", "next_hop"), fault)
    for number, policy in enumerate(config.delivery.policy):
        _policy(policy, ("delivery", "policy", number), fault)


def _policy(policy: DeliveryPolicy, base: Path, fault: Fault) -> None:
    if not policy.domain and not policy.mx:
        fault((*base, "domain"), "is missing: a policy is for a `domain`, or for hosts that are the `mx` of domains")
    for key, names in (("domain", policy.domain), ("mx", policy.mx)):
        for index, name in enumerate(names):
            if not is_domain(name.removeprefix(".")) and not (key == "mx" and _is_ip(name)):
                kind = "a domain name" if key == "domain" else "a host name"
                fault((*base, key, index), f"{name!r} is neither {kind} nor one after a dot{_a_label(name)}")
    if policy.rate:
        try:
            rate(policy.rate)
        except ValueError as error:
            fault((*base, "rate"), str(error))
    if policy.next_hop not in {"", "@"}:
        _next_hop(policy.next_hop, (*base, "next_hop"), fault)
    for key, usual in _BY_DOMAIN_ONLY.items():
        if policy.mx and getattr(policy, key) != usual:
            # It decides which host is asked, or how; which host that is would be known too late, and from an unsafe DNS.
            fault((*base, key), "has no meaning with `mx`: set it in a table that has only `domain`")


def _next_hop(hop: str, path: Path, fault: Fault) -> None:
    match = _NEXT_HOP.fullmatch(hop)
    if match is None:
        fault(path, f"{hop!r} is none of host, host:port, [host], [host]:port")
        return
    host, literal, port = match["host"], match["literal"], match["port"]
    if port is not None and not 1 <= int(port) <= 65535:
        fault(path, f"{hop!r}: the port is not within 1 and 65535")
    if host is not None and _is_ip(host):
        fault(path, f"an IP address has no MX: write [{host}]")
    elif not is_domain(host or literal) and not (literal is not None and _is_ip(literal)):
        fault(path, f"{hop!r}: {host or literal!r} is not a host name")


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_server(text: str) -> bool:
    if _is_ip(text):
        return True
    try:
        return split_address(text)[1] > 0
    except ValueError:
        return False


def _listeners(listeners: tuple[Listener, ...], fault: Fault) -> None:
    names: set[str] = set()
    bound: list[tuple[str, str, int, str]] = []
    for number, listener in enumerate(listeners):
        base: Path = ("listener", number)
        if _LISTENER_NAME.fullmatch(listener.name) is None:
            fault((*base, "name"), f"{listener.name!r}: a name has letters, digits, '.', '_' and '-', at most 64")
        elif listener.name in names:
            fault((*base, "name"), f"another listener is called {listener.name!r} already")
        names.add(listener.name)
        if len(listener.interface) > INTERFACE_MAX or re.search(r"[/\s]", listener.interface):
            fault((*base, "interface"), f"{listener.interface!r} cannot be the name of a network device")
        _trusted(listener, base, fault)
        _logins(listener, base, fault)
        _addresses(listener, base, bound, fault)


def _logins(listener: Listener, base: Path, fault: Fault) -> None:
    if listener.service == "relay" and listener.auth_without_tls != "never":
        fault((*base, "auth_without_tls"), 'has no meaning with service = "relay", which has no logins')
    if listener.service == "submission" and listener.tls == "none" and listener.auth_without_tls == "never":
        fault((*base, "tls"), "nobody could log in: use starttls or implicit, or auth_without_tls for this machine")


def _trusted(listener: Listener, base: Path, fault: Fault) -> None:
    if listener.trusted and listener.service in {"mx", "submission"}:
        fault((*base, "trusted"), f'has no meaning with service = "{listener.service}", only with "relay"')
    for index, network in enumerate(listener.trusted):
        try:
            ipaddress.ip_network(network)
        except ValueError:
            hint = ""
            try:
                hint = f"; did you mean {str(ipaddress.ip_network(network, strict=False))!r}?"
            except ValueError:
                pass  # not even with host bits: there is nothing to propose
            fault((*base, "trusted", index), f"{network!r} is not a network such as 192.0.2.0/24{hint}")


def _addresses(listener: Listener, base: Path, bound: list[tuple[str, str, int, str]], fault: Fault) -> None:
    """Check the addresses of one listener, and against those of all before it, which are in ``bound``."""
    for index, text in enumerate(listener.address):
        path: Path = (*base, "address", index)
        try:
            address, port = split_address(text)
        except ValueError as error:
            fault(path, str(error))
            continue
        if listener.service == "relay" and not listener.trusted and not ipaddress.ip_address(address).is_loopback:
            fault(path, f"{text!r}: a relay without `trusted` may listen on loopback addresses only")
        for interface, other, other_port, name in bound:
            if port and port == other_port and interface == listener.interface and _overlap(address, other):
                fault(path, f"{text!r} is taken already by listener {name!r}")
                break
        bound.append((listener.interface, address, port, listener.name))


def _overlap(one: str, other: str) -> bool:
    """Two sockets cannot have the same address, nor can one have a single address and the other all of its family."""
    first, second = ipaddress.ip_address(one), ipaddress.ip_address(other)
    return first == second or (first.version == second.version and (first.is_unspecified or second.is_unspecified))
