"""Opening a session with a next hop: connect, greeting, TLS, AUTH; and what to do when the other side is not up to it.

Levels of TLS (the setting ``tls``, see `mtad.nexthop`):

- *none*: clear text.
- *opportunistic*: STARTTLS when the server offers it, and any certificate will do (RFC 7435). When the server refuses, the
  session goes on in clear text; when the handshake fails or stalls, or the session breaks before it says anything inside
  TLS, a new connection to the same address goes without STARTTLS, within the same attempt. Mail that would have gone in
  clear text anyway must not wait for somebody to mend a certificate.
- *required*: chain and name are checked; the name is the host's as routing gave it, never one that the server says. Not
  offered or refused: deferred, 4.7.4. Failed or not verified: deferred, 4.7.5. Never in clear text.

A next hop that has a credential is always *required*, but for one on loopback where a setting allows that: a password goes
to nobody who has not proved who he is (attack C-TL4). When it cannot be shown, or is refused, mail is deferred: the fault
is more often ours, or the server's directory's, than the message's (Postfix: smtp_sasl_auth_soft_bounce).

Octets that come between the reply to STARTTLS and the handshake are an attack or a broken server (C-TL1): the session is
over, and not tried again in clear text.

Errors: none are raised; whatever happens is a `Deferred`. No text and no log line holds a credential.

Standards: RFC 3207, RFC 7435, RFC 8314 section 3.3, RFC 4954.
"""

from __future__ import annotations

import ipaddress
import secrets
import time
from collections.abc import Callable, Mapping
from enum import Enum
from threading import Lock
from typing import Final, Protocol

import msgspec

from mtad import log
from mtad.config import Delivery
from mtad.delivery.connections import Session, Timeouts
from mtad.delivery.credentials import Credential, CredentialsFault, CredentialsFile
from mtad.delivery.words import REPLY_LIMIT, Place, broken, cut, refused, status_of
from mtad.errors import MtadError
from mtad.net.connection import ConnectFailed, Connection, ConnectionLost, TimedOut, connect
from mtad.nexthop import Rule
from mtad.outcome import Deferred
from mtad.routing import Host
from mtad.smtp.dialogue import Verdict
from mtad.smtp.opening import authenticate, ehlo, greet, starttls
from mtad.smtp.replies import ProtocolFault
from mtad.smtp.sasl import SaslFault
from mtad.smtp.sasl_client import choose, client_mechanism
from mtad.tls.client import ClientTls
from mtad.tls.connection import TlsConnection, TlsFailed

#: Octets of randomness in a nonce of SCRAM (RFC 5802 section 5.1).
_NONCE: Final = 18

_BROKEN: Final = (TimedOut, ConnectionLost, ProtocolFault)


class Handshake(Protocol):
    """What opening needs of `mtad.tls.client.ClientTls`."""

    def handshake(
        self, connection: Connection, server_name: str, verify: bool, timeout: float, ca_file: str = ""
    ) -> TlsConnection:
        """Encrypt a connection, or raise `TlsFailed`."""


class _Level(Enum):
    NEVER = "never"
    MAY = "may"
    MUST = "must"


class _Target(msgspec.Struct, frozen=True):
    """Whom we want to talk to, and how."""

    host: Host
    at: Place
    key: str
    implicit: bool
    credential: Credential | None
    whole: bool
    """A failure is one of the whole destination."""


class Opener:
    """Opens sessions; one instance serves all threads of a process."""

    def __init__(
        self,
        hostname: str,
        settings: Delivery,
        *,
        dial: Callable[[str, int, float], Connection] = connect,
        tls: Handshake | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        follow: Callable[[Session | None], None] = lambda _session: None,
    ) -> None:
        """Prepare.

        Args:
            hostname: our name in EHLO.
            settings: time-outs, authorities, whether credentials may go over loopback in clear text.
            dial: opens a connection to (address, port) within so many seconds; raises `ConnectFailed`.
            tls: encrypts it.
            monotonic: seconds, for the age of sessions.
            follow: is told over which session this thread goes on; None before it connects.
        """
        self._hostname = hostname
        self._settings = settings
        self._dial = dial
        self._tls = tls or ClientTls()
        self._monotonic = monotonic
        self._follow = follow
        self._timeouts = Timeouts(settings)
        self._lock = Lock()
        self._files: dict[str, CredentialsFile] = {}

    def open(self, key: str, host: Host, address: str, rule: Rule, *, whole: bool) -> Session | Deferred:
        """A session that is ready for MAIL, or why there is none.

        Args:
            key: what the session may be shared by.
            host: the host as routing gave it.
            address: one of its addresses.
            rule: how to speak to it.
            whole: no other host of the destination has talked to us in this attempt.
        """
        at = Place(host.name, address, host.port)
        try:
            credential = self._credential(rule, host)
        except CredentialsFault as fault:
            log.warning(f"{fault}; mail for this next hop waits")
            return Deferred("4.3.5", f"credentials for {at} cannot be read", destination=True)
        target = _Target(host, at, key, rule.implicit, credential, whole)
        trusting = self._settings.auth_without_tls == "loopback" and ipaddress.ip_address(address).is_loopback
        if rule.tls == "required" or (credential is not None and not trusting):
            level = _Level.MUST
        else:
            level = _Level.MAY if rule.tls == "opportunistic" else _Level.NEVER
        opened = self._attempt(target, level)
        if isinstance(opened, str):
            log.info(f"TLS with {at}:{host.port} failed: {opened}; once more in clear text")
            opened = self._attempt(target, _Level.NEVER)
        assert not isinstance(opened, str)
        return opened

    def _credential(self, rule: Rule, host: Host) -> Credential | None:
        if not rule.credentials:
            return None
        with self._lock:
            file = self._files.setdefault(rule.credentials, CredentialsFile(rule.credentials))
        if rule.hop is not None:
            return file.find(rule.hop.name, rule.hop.port) or file.find(host.name, host.port)
        return file.find(host.name, host.port)

    def _attempt(self, target: _Target, level: _Level) -> Session | Deferred | str:
        """One connection. A text is the reason why the next one goes without TLS: never when the level is MUST."""
        at = target.at
        self._follow(None)
        try:
            connection = self._dial(at.address, at.port, float(self._settings.connect_timeout))
        except ConnectFailed as error:
            return Deferred("4.4.1", f"connect to {at}:{at.port}: {error}", destination=target.whole)
        session = Session(connection, target.key, at.host, at.port, self._timeouts, now=self._monotonic())
        self._follow(session)
        result: Deferred | str | None
        try:
            result = self._talk(session, connection, target, level)
        except _BROKEN as error:
            session.close(quit_first=False)
            return broken(error, at, session.phase, target.whole)
        except BaseException:
            session.close(quit_first=False)
            raise
        if result is None:
            return session
        session.close(quit_first=isinstance(result, Deferred) and not result.reply.startswith("421"))
        return result

    def _talk(self, session: Session, connection: Connection, target: _Target, level: _Level) -> Deferred | str | None:
        if target.implicit:
            verify = level is _Level.MUST
            try:
                self._secure(session, connection, target, verify)
            except TlsFailed as error:
                return _unsafe(error, target)
        greeting = session.play(greet(self._hostname))
        if greeting.refusal is not None:
            return refused(greeting.refusal, target.at, target.whole)
        session.capabilities = greeting.capabilities
        if not target.implicit and level is not _Level.NEVER:
            problem = self._start_tls(session, connection, target, level)
            if problem is not None:
                return problem
        return self._authenticate(session, target) if target.credential is not None else None

    def _start_tls(self, session: Session, connection: Connection, target: _Target, level: _Level) -> Deferred | str | None:
        """None: go on, in TLS or, if that is allowed, in clear text."""
        must = level is _Level.MUST
        if not session.capabilities.starttls:
            return _missing(f"TLS is required, but was not offered by host {target.at}", target) if must else None
        try:
            refusal = session.play(starttls())
            if refusal is not None:
                return self._no_tls(refusal, target, must)
        except _BROKEN as error:
            if must:
                raise
            return str(error)
        try:
            self._secure(session, connection, target, must)
            greeting = session.play(ehlo(self._hostname))
        except TlsFailed as error:
            return _unsafe(error, target) if must else str(error)
        except (TimedOut, ConnectionLost) as error:
            if must:
                raise
            return str(error)
        if greeting.refusal is not None:
            return refused(greeting.refusal, target.at, target.whole)
        session.capabilities = greeting.capabilities
        return None

    def _no_tls(self, refusal: Verdict, target: _Target, must: bool) -> Deferred | None:
        """The server offers STARTTLS and then refuses it."""
        if refusal.reply.code == 421:
            return refused(refusal, target.at, target.whole)
        said = cut(refusal.reply)
        if must:
            return _missing(f"TLS is required, but host {target.at} refused to start TLS: {said}", target)
        log.info(f"host {target.at} refused to start TLS: {said}; going on in clear text")
        return None

    def _secure(self, session: Session, connection: Connection, target: _Target, verify: bool) -> None:
        settings, at = self._settings, target.at

        def shake_hands() -> TlsConnection:
            return self._tls.handshake(connection, at.host, verify, float(settings.starttls_timeout), settings.ca_file)

        secured = session.secure(shake_hands)
        trust = "Verified" if secured.verified else "Untrusted"
        log.info(f"{trust} TLS connection established to {at}:{at.port}: {secured.tls}")

    def _authenticate(self, session: Session, target: _Target) -> Deferred | None:
        """Show who we are: the strongest mechanism that the server offers and we would use."""
        credential = target.credential
        assert credential is not None
        bindings: Mapping[str, bytes] = session.bindings
        name = choose(session.capabilities.mechanisms, bindings, tls=True, token=credential.token)
        if name is None:
            text = f"SASL authentication failed; cannot authenticate to server {target.at}: no mechanism available"
            return _missing(text, target, "4.7.0")
        try:
            nonce = secrets.token_urlsafe(_NONCE)
            mechanism = client_mechanism(name, credential.login, credential.secret, bindings, nonce=nonce)
            refusal = session.play(authenticate(mechanism))
        except SaslFault as fault:
            text = f"SASL authentication failed; cannot authenticate to server {target.at}: {name}: {_printable(fault)}"
            return _missing(text, target, "4.7.0")
        if refusal is None:
            return None
        said = cut(refusal.reply)
        text = f"SASL authentication failed; server {target.at} said: {said}"
        log.warning(f"{text} ({name})")
        return Deferred(status_of(refusal.reply, "4"), text, target.at.host, said, destination=target.whole)


def _missing(text: str, target: _Target, status: str = "4.7.4") -> Deferred:
    return Deferred(status, text, target.at.host, destination=target.whole)


def _unsafe(error: MtadError, target: _Target) -> Deferred:
    unverified = isinstance(error, TlsFailed) and error.unverified
    what = "Server certificate not verified" if unverified else "Cannot start TLS"
    return Deferred("4.7.5", f"{what}: {target.at}: {error}", target.at.host, destination=target.whole)


def _printable(fault: SaslFault) -> str:
    """The text of a fault in which the server's words may be."""
    return "".join(char if char.isprintable() else "?" for char in str(fault))[:REPLY_LIMIT]
