"""What `check` says about certificates, keys and authorities."""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from mtad.check import Findings, check
from mtad.config import Config, Delivery, Listener, Local, Sni, Tls
from mtad.configfile import development
from tests.unit.tls_aid import authority, issue

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="looks at the rights of another user, which only root can take on"
)


def configured(root: Path, *names: Sequence[str], tls: str = "starttls", ca_file: str = "") -> Config:
    """A configuration that fits, with these certificates and keys."""
    for name in ("spool", "mail", "run"):
        (root / name).mkdir(exist_ok=True)
    (root / "users").write_text("root : root@example.org\n")
    first, *others = ([str(root / name) for name in pair] for pair in names)
    return Config(
        hostname="mx.example.org",
        spool=str(root / "spool"),
        user="",
        pid_file=str(root / "run" / "mtad.pid"),
        local=Local(domains=("example.org",), mail_root=str(root / "mail"), users=str(root / "users")),
        listener=(Listener("inbound", "mx", ("127.0.0.1:0",), tls=tls),),  # type: ignore[arg-type]
        tls=Tls(first[0], first[1], tuple(Sni(*other) for other in others)),
        delivery=Delivery(ca_file=ca_file),
    )


def said(config: Config) -> list[str]:
    """Errors and then warnings; not that root runs it."""
    found: Findings = check(config, "f")
    return [str(problem) for problem in (*found.errors, *found.warnings) if problem.key != "user"]


def test_a_good_pair_is_not_talked_about(tmp_path: Path) -> None:
    issue("mx.example.org").write(tmp_path)
    os.chmod(tmp_path / "cert.key", 0o640)
    assert said(configured(tmp_path, ("cert.pem", "cert.key"))) == []


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_files_that_are_missing(tmp_path: Path, tls: str) -> None:
    assert said(configured(tmp_path, ("c", "k"), ("c2", "k2"), tls=tls)) == [
        f"f: tls.certificate: {tmp_path}/c does not exist",
        f"f: tls.key: {tmp_path}/k does not exist",
        f"f: tls.sni[0].certificate: {tmp_path}/c2 does not exist",
        f"f: tls.sni[0].key: {tmp_path}/k2 does not exist",
    ]


def test_without_tls_nobody_looks(tmp_path: Path) -> None:
    assert said(configured(tmp_path, ("c", "k"), tls="none")) == []


def test_a_key_that_does_not_fit_is_the_key_s_fault(tmp_path: Path) -> None:
    issue("a.test").write(tmp_path, "a")
    issue("b.test").write(tmp_path, "b")
    (tmp_path / "garbage").write_text("garbage")
    for name in ("a.key", "b.key"):
        os.chmod(tmp_path / name, 0o600)
    pairs = (("a.pem", "a.key"), ("a.pem", "b.key"), ("garbage", "a.key"), ("a.pem", "garbage"))
    assert said(configured(tmp_path, *pairs)) == [
        f"f: tls.sni[0].key: {tmp_path}/b.key: is not the key of {tmp_path}/a.pem",
        f"f: tls.sni[1].certificate: {tmp_path}/garbage: no certificate in PEM",
        f"f: tls.sni[2].key: {tmp_path}/garbage: no private key in PEM",
    ]


@pytest.mark.parametrize(
    ("days", "words"),
    [((-5, 20), None), ((-5, 10), "expires on"), ((-5, -1), "has expired on"), ((1, 30), "is not valid before")],
)
def test_the_end_is_told_in_time(tmp_path: Path, days: tuple[int, int], words: str | None) -> None:
    issue("mx.example.org", days=days).write(tmp_path)
    os.chmod(tmp_path / "cert.key", 0o600)
    config = configured(tmp_path, ("cert.pem", "cert.key"))
    assert check(config, "f").errors == ()
    found = said(config)
    if words is None:
        assert found == []
    else:
        assert len(found) == 1
        assert found[0].startswith(f"f: tls.certificate: {tmp_path}/cert.pem {words} 20")


def test_a_key_for_everybody_is_odd(tmp_path: Path) -> None:
    pair = issue("mx.example.org").write(tmp_path)
    os.chmod(pair.key, 0o644)
    assert said(configured(tmp_path, ("cert.pem", "cert.key"))) == [f"f: tls.key: {pair.key} is readable for everybody"]


@needs_root
def test_the_key_must_be_readable_for_the_server_s_user(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:3]):
        os.chmod(parent, 0o755)
    pair = issue("mx.example.org").write(tmp_path)
    os.chmod(pair.key, 0o640)
    config = replace(configured(tmp_path, ("cert.pem", "cert.key")), user="nobody")
    nobody = pwd.getpwnam("nobody")
    for name in ("spool", "mail", "run"):
        os.chown(tmp_path / name, nobody.pw_uid, -1)
    assert said(config) == [f"f: tls.key: {pair.key} is not readable for user 'nobody'"]
    os.chown(pair.key, -1, nobody.pw_gid)
    assert said(config) == []


def test_the_development_defaults_make_their_own(tmp_path: Path) -> None:
    config = development("box", str(tmp_path / "spool"), "me")
    assert said(config) == []
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "cert.pem").write_text("half of it was lost")
    assert said(config) == [f"f: tls.key: {tmp_path}/spool/key.pem does not exist"]


def test_authorities(tmp_path: Path) -> None:
    authority().write(tmp_path, "ca")
    (tmp_path / "empty").write_text("# nobody\n")
    none = ("c", "k")
    assert said(configured(tmp_path, none, tls="none", ca_file=str(tmp_path / "ca.pem"))) == []
    for name, why in (("empty", "empty: no certificate in PEM"), ("missing", "missing does not exist")):
        config = configured(tmp_path, none, tls="none", ca_file=str(tmp_path / name))
        assert said(config) == [f"f: delivery.ca_file: {tmp_path}/{why}"]
