"""Certificates in files: what is wrong with them, how they change under a running server, and which one a client gets."""

from __future__ import annotations

import os
import ssl
import stat
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from mtad.tls import server as server_module
from mtad.tls.certificates import CertificateFault, Pair, inspect, make_self_signed
from mtad.tls.connection import TlsFailed
from mtad.tls.server import ServerTls
from tests.unit.tls_aid import Greeting, Issued, at_once, authority, bare_ends, issue, new_key, python_client

CA = authority()


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def greet() -> Iterator[Greeting]:
    greeting = Greeting()
    yield greeting
    greeting.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed files are looked for at each handshake."""
    monkeypatch.setattr(server_module, "CHECK_INTERVAL", 0.0)


# -- what is in the files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ec", "rsa", "ed25519"])
def test_every_kind_of_key(tmp_path: Path, kind: str) -> None:
    issued = issue("MX.example.org", "*.example.org", key=new_key(kind))  # type: ignore[arg-type]
    found = inspect(issued.write(tmp_path, chain=[CA]))
    assert found.names == ("mx.example.org", "*.example.org")
    assert found.not_before < time.time() < found.not_after
    assert bool(found.end_point) == (kind != "ed25519")


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_a_certificate_with_a_flipped_bit_is_a_fault_or_none(tmp_path: Path) -> None:
    """Whatever piece of it is damaged: a reload, and a running server, must survive the file."""
    pair = issue("mx.example.org", key=new_key("ec")).write(tmp_path)
    path = Path(pair.certificate)
    der = ssl.PEM_cert_to_DER_cert(path.read_text())
    seen = set()
    for position in range(len(der) * 8):
        flipped = bytearray(der)
        flipped[position // 8] ^= 1 << position % 8
        path.write_text(ssl.DER_cert_to_PEM_cert(bytes(flipped)))
        try:
            inspect(pair)
        except CertificateFault as fault:
            seen.add(str(fault).removeprefix(f"{tmp_path}/").partition(": ")[2].partition(":")[0])
    assert len(seen) >= 2, seen


def test_without_alternative_names_the_common_name_counts(tmp_path: Path) -> None:
    assert inspect(issue(common_name="Old.example.org").write(tmp_path)).names == ("old.example.org",)
    assert inspect(issue("mx.example.org", common_name="old.example.org").write(tmp_path)).names == ("mx.example.org",)


def test_faults_are_named_with_their_file(tmp_path: Path) -> None:
    good, other = issue("a.test").write(tmp_path, "a"), issue("b.test").write(tmp_path, "b")
    garbage, empty, missing = (str(tmp_path / name) for name in ("garbage", "empty", "missing"))
    Path(garbage).write_bytes(b"-----BEGIN CERTIFICATE-----\nnot base64!\n-----END CERTIFICATE-----\n")
    Path(empty).write_bytes(b"")
    locked = str(tmp_path / "locked")
    secret = serialization.BestAvailableEncryption(b"secret")
    Path(locked).write_bytes(new_key().private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret))
    for pair, text, of_key in (
        (Pair(missing, good.key), f"{missing}: No such file or directory", False),
        (Pair(good.certificate, missing), f"{missing}: No such file or directory", True),
        (Pair(str(tmp_path), good.key), f"{tmp_path}: Is a directory", False),
        (Pair(garbage, good.key), f"{garbage}: no certificate in PEM", False),
        (Pair(empty, good.key), f"{empty}: no certificate in PEM", False),
        (Pair(good.key, good.key), f"{good.key}: no certificate in PEM", False),
        (Pair(good.certificate, garbage), f"{garbage}: no private key in PEM", True),
        (Pair(good.certificate, good.certificate), f"{good.certificate}: no private key in PEM", True),
        (Pair(good.certificate, locked), f"{locked}: needs a passphrase, and nobody is there to give it", True),
        (Pair(good.certificate, other.key), f"{other.key}: is not the key of {good.certificate}", True),
    ):
        with pytest.raises(CertificateFault) as caught:
            inspect(pair)
        assert (str(caught.value), caught.value.of_key) == (text, of_key)
        with pytest.raises(CertificateFault):
            ServerTls([pair], print)


def test_a_certificate_of_our_own(tmp_path: Path, greet: Greeting, warnings: list[str]) -> None:
    pair = Pair(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    make_self_signed(pair, "box.example.org", time.time())
    found = inspect(pair)
    assert found.names == ("box.example.org", "localhost")
    assert found.not_before < time.time() - 3600
    assert found.not_after > time.time() + 365 * 86400
    assert [stat.S_IMODE(os.stat(path).st_mode) for path in (pair.certificate, pair.key)] == [0o600, 0o600]
    assert sorted(os.listdir(tmp_path)) == ["cert.pem", "key.pem"]
    assert greet(ServerTls([pair], warnings.append)).ours.tls
    make_self_signed(pair, "localhost", time.time())
    assert inspect(pair).names == ("localhost",)
    make_self_signed(pair, "x" * 60 + "." + "y" * 60, time.time())  # longer than a common name may be


# -- changes ----------------------------------------------------------------------------------------------------------


def served(greet: Greeting, server: ServerTls, name: str | None = None) -> tuple[str, ...]:
    """The names of the certificate that a client gets."""
    certificate = greet(server, partial(python_client, name=name)).certificate
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(names.get_values_for_type(x509.DNSName))


@pytest.mark.usefixtures("impatient")
def test_a_changed_pair_serves_the_next_handshake(tmp_path: Path, greet: Greeting, warnings: list[str]) -> None:
    server = ServerTls([issue("old.test").write(tmp_path)], warnings.append)
    before = greet(server)
    issue("new.test").write(tmp_path)
    assert served(greet, server) == ("new.test",)
    assert warnings == []
    before.ours.send(b"still here", 1.0)
    assert before.theirs.recv(100) == b"still here"


@pytest.mark.usefixtures("impatient")
def test_a_broken_pair_is_told_once_and_the_old_one_stays(tmp_path: Path, greet: Greeting, warnings: list[str]) -> None:
    old, new = issue("old.test"), issue("new.test")
    pair = old.write(tmp_path)
    server = ServerTls([pair], warnings.append)
    Path(pair.certificate).write_bytes(new.pem)  # as in the moment between two files of an unlucky copy
    for _ in range(3):
        assert served(greet, server) == ("old.test",)
    assert warnings == [f"{pair.key}: is not the key of {pair.certificate}; the certificates read before stay in use"]
    os.unlink(pair.key)
    assert served(greet, server) == ("old.test",)
    assert warnings[1:] == [f"{pair.key}: No such file or directory; the certificates read before stay in use"]
    Path(pair.certificate).write_bytes(new.pem[:100])
    assert served(greet, server) == ("old.test",)
    assert len(warnings) == 3
    new.write(tmp_path)
    assert served(greet, server) == ("new.test",)
    assert len(warnings) == 3


@pytest.mark.usefixtures("impatient")
def test_a_pair_that_could_not_be_read_is_tried_again_and_told_once(
    tmp_path: Path, greet: Greeting, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing about the files changes meanwhile: there was no descriptor left."""
    server = ServerTls([issue("old.test").write(tmp_path)], warnings.append)
    issue("new.test").write(tmp_path)

    def refuse(_pair: Pair) -> NoReturn:
        raise CertificateFault("key.pem: Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(server_module, "inspect", refuse)
        for _ in range(3):
            assert served(greet, server) == ("old.test",)
    assert warnings == ["key.pem: Too many open files; the certificates read before stay in use"]
    assert served(greet, server) == ("new.test",)


def test_files_are_looked_at_once_a_second(tmp_path: Path, greet: Greeting, warnings: list[str]) -> None:
    server = ServerTls([issue("old.test").write(tmp_path)], warnings.append)
    issue("new.test").write(tmp_path)
    assert served(greet, server) == ("old.test",)
    server._checked -= server_module.CHECK_INTERVAL
    assert served(greet, server) == ("new.test",)


def test_an_expired_certificate_is_used_and_told(tmp_path: Path, greet: Greeting, warnings: list[str]) -> None:
    pair = issue("late.test", days=(-10, -1)).write(tmp_path)
    assert served(greet, ServerTls([pair], warnings.append)) == ("late.test",)
    assert warnings == [f"{pair.certificate}: has expired; it is used all the same"]


def test_an_expired_certificate_proves_no_name_s_tl6(tmp_path: Path, greet: Greeting, warnings: list[str]) -> None:
    """Whoever asks for its name gets the next that has it, else the first one."""
    certificates = [
        issue("mx.example.org"),
        issue("late.test", "both.test", "host.wild.test", days=(-10, -1)),
        issue("both.test", "*.wild.test"),
    ]
    pairs = [issued.write(tmp_path, str(number)) for number, issued in enumerate(certificates)]
    server = ServerTls(pairs, warnings.append)
    assert warnings == [f"{pairs[1].certificate}: has expired; another is served in its place"]
    assert served(greet, server, "late.test") == ("mx.example.org",)
    assert served(greet, server, "both.test") == served(greet, server, "host.wild.test") == ("both.test", "*.wild.test")


# -- SNI --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path: Path, warnings: list[str]) -> ServerTls:
    certificates: list[Issued] = [
        issue("mx.example.org"),
        issue("mail.example.com", "*.wild.test"),
        issue("mx.example.org", "exact.wild.test"),
    ]
    pairs = [issued.write(tmp_path, str(number)) for number, issued in enumerate(certificates)]
    return ServerTls(pairs, warnings.append)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (None, "mx.example.org"),
        ("mail.example.com", "mail.example.com"),
        ("MAIL.Example.Com", "mail.example.com"),
        ("a.wild.test", "mail.example.com"),
        ("exact.wild.test", "exact.wild.test"),
        ("mx.example.org", "mx.example.org"),
        ("a.b.wild.test", "mx.example.org"),
        ("wild.test", "mx.example.org"),
        ("unknown.test", "mx.example.org"),
        ("*.wild.test", "mail.example.com"),
        ("x" * 63 + ".test", "mx.example.org"),
    ],
)
def test_the_name_decides(several: ServerTls, greet: Greeting, asked: str | None, given: str) -> None:
    session = greet(several, partial(python_client, name=asked))
    names = session.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        x509.DNSName
    )
    assert given in names
    fingerprint = session.certificate.fingerprint(hashes.SHA256())
    assert session.ours.channel_bindings["tls-server-end-point"] == fingerprint, "that of the certificate that was chosen"
    if asked == "mx.example.org":
        assert names == ["mx.example.org"], "the first of two wins"


def hello(name: bytes) -> bytes:
    """A ClientHello of TLS 1.2 that asks for a name that Python's client would not send."""
    placeholder = ("a" * len(name))[:63]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=placeholder).do_handshake()
    return outgoing.read().replace(placeholder.encode(), name, 1)


@pytest.mark.parametrize(
    "name", [b"../../etc/passwd", b"mail.example.com.", b"..\\..\\key.pem", b"%00.example.com", b".", b"a b", b"*"]
)
def test_a_name_that_is_none_is_nobody_s(several: ServerTls, tmp_path: Path, name: bytes) -> None:
    """S-TL6. In TLS 1.2 the certificate comes in clear text."""
    first = ssl.PEM_cert_to_DER_cert((tmp_path / "0.pem").read_text())
    far, near = bare_ends()

    def speak() -> bytes:
        with near:
            near.sendall(hello(name))
            return near.recv(65536)

    ours, answer = at_once(partial(several.handshake, far, 5.0), speak, far.close)
    assert isinstance(ours, TlsFailed)
    assert isinstance(answer, bytes)
    assert first in answer


def test_a_name_with_a_nul_is_refused_by_openssl(several: ServerTls) -> None:
    """S-TL6: RFC 6066 knows no such name, and no certificate has it (CVE-2009-4565)."""
    far, near = bare_ends()
    with near:
        near.sendall(hello(b"mail.example.com\0.evil.test"))
        with pytest.raises(TlsFailed, match="bad extension"):
            several.handshake(far, 5.0)
    far.close()
