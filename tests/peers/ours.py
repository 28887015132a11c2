"""A site of ours for the programs of others: a listener for each way in, a certificate that they can check, logins.

with ours(tmp_path) as site:
    host, port = site.address("submissions")
    ...                                      # trusts site.root / "ca.pem", knows NAME, logs in as alice with PASSWORD
    assert trace(site.await_mail("bob")[-1]).cipher
"""

from __future__ import annotations

import email
import ipaddress
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

from cryptography import x509

from mtad.passwords import change_password, make_keys
from tests.site import DOMAIN, Site
from tests.unit.tls_aid import Issued, authority, issue

CA: Final = authority()
#: What the certificate is for, besides localhost and 127.0.0.1.
NAME: Final = f"mx.{DOMAIN}"
#: Of alice and bob. Not ASCII, with a blank and a comma: clients quote, encode and prepare it each in its way.
PASSWORD: Final = "Sesam, \u00f6ffne dich"

_BOTH: Final = ["127.0.0.1:0", "[::1]:0"]
LISTENERS: Final[list[dict[str, Any]]] = [
    {"name": "inbound", "service": "mx", "address": _BOTH, "tls": "starttls"},
    {"name": "smtps", "service": "mx", "address": _BOTH, "tls": "implicit"},
    {"name": "plain", "service": "mx", "address": _BOTH},
    {"name": "submission", "service": "submission", "address": _BOTH, "tls": "starttls"},
    {"name": "submissions", "service": "submission", "address": _BOTH, "tls": "implicit"},
    {"name": "loopback", "service": "submission", "address": _BOTH, "tls": "none", "auth_without_tls": "loopback"},
    {"name": "relay", "service": "relay", "address": _BOTH, "tls": "starttls"},
]


def certificate(*names: str) -> Issued:
    """One that `CA` vouches for, for these names and for this machine's own: localhost and 127.0.0.1."""
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    return issue(*names, "localhost", address, by=CA)


def ours(root: Path, **options: Any) -> Site:
    """The site. ``options`` are those of `Site`."""
    root.mkdir(parents=True, exist_ok=True)
    pair = certificate(NAME).write(root, chain=[CA])
    (root / "ca.pem").write_bytes(CA.pem)
    tls = {"certificate": pair.certificate, "key": pair.key}
    limits = {"wrong_passwords": 1000, "connections_per_client": 500} | options.pop("limits", {})
    site = Site(root, listeners=[dict(row) for row in LISTENERS], **{"tls": tls, "limits": limits} | options)
    for login in ("alice", "bob"):
        change_password(str(root / "passwords"), login, make_keys(PASSWORD))
    return site


class Trace(NamedTuple):
    """What the topmost Received: says."""

    field: str
    protocol: str
    """As ``ESMTPSA``, see RFC 3848."""
    cipher: str
    """As ``TLSv1.3 with cipher TLS_AES_256_GCM_SHA384``; "" in clear text."""


def trace(content: bytes) -> Trace:
    """Of a message that we took last."""
    field = re.sub(r"\s+", " ", str(email.message_from_bytes(content)["Received"]))
    protocol = re.search(r" with (\S+) id ", field)
    cipher = re.search(r"\b(TLSv1\.\d with cipher [A-Z0-9_-]+)", field)
    assert protocol, field
    return Trace(field, protocol[1], cipher[1] if cipher else "")


def other(network: int) -> str:
    """A client's address that no other test guesses passwords from: each wrong one makes the next wait longer."""
    return f"127.99.{network // 250}.{network % 250 + 1}"
