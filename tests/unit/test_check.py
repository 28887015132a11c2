"""What `check` finds on the machine."""

from __future__ import annotations

import os
import pwd
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from msgspec.structs import replace

from mtad.check import Findings, check
from mtad.config import Config, Listener, Local, Log
from mtad.config_lines import key_lines
from mtad.configfile import development, parse

AS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not AS_ROOT, reason="looks at the rights of another user, which only root can take on")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A configuration that fits."""
    os.chmod(tmp_path, 0o755)
    for name in ("spool", "mail", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "users").write_text("root : root@example.org\n")
    return Config(
        hostname="mx.example.org",
        spool=str(tmp_path / "spool"),
        user="",
        pid_file=str(tmp_path / "run" / "mtad.pid"),
        local=Local(domains=("example.org",), mail_root=str(tmp_path / "mail"), users=str(tmp_path / "users")),
        listener=(Listener("inbound", "mx", ("127.0.0.1:25", "[::1]:0")),),
    )


def _free(_address: str, _port: int) -> str | None:
    return None


def _taken(_address: str, _port: int) -> str | None:
    return "in use"


def open_up(path: Path) -> None:
    """Let others through to ``path``: pytest shuts its own directories to everybody else."""
    for parent in path.parents:
        if parent.name.startswith(("pytest-", "popen-")):
            os.chmod(parent, 0o711)


def errors(config: Config) -> list[str]:
    return [str(problem) for problem in check(config, "f").errors]


def warnings(config: Config) -> list[str]:
    return [str(problem) for problem in check(config, "f").warnings if problem.key != "user"]


def with_listener(config: Config, listener: Listener) -> Config:
    return replace(config, listener=(listener,))


def test_a_machine_that_fits(config: Config) -> None:
    findings = check(config, "f", probe=_free)
    assert findings.errors == ()
    assert [problem.key for problem in findings.warnings] == (["user"] if AS_ROOT else [])


def test_development_defaults_fit_without_a_users_file(tmp_path: Path) -> None:
    assert errors(development("box", str(tmp_path / "spool"), "me")) == []
    assert not (tmp_path / "spool").exists(), "the check changes nothing"


def test_each_problem_has_the_line_of_its_key(config: Config, tmp_path: Path) -> None:
    text = (
        f'hostname = "mx"\nspool = "{tmp_path}/users"\nuser = ""\npid_file = "{tmp_path}/mtad.pid"\n[local]\n'
        f'mail_root = "{tmp_path}/mail"\nusers = "{tmp_path}/nothing"\n'
        "[[listener]]\nname = 'in'\nservice = 'mx'\naddress = ['127.0.0.1:0',\n'[::1]:2525']\n"
    )
    findings = check(parse(text, "f"), "f", key_lines(text), _taken)
    assert [str(problem) for problem in findings.errors] == [
        f"f:2: spool: {tmp_path}/users is not a directory",
        f"f:7: local.users: {tmp_path}/nothing: No such file or directory",
        "f:5: local.domains: is empty, and listener 'in' takes mail for local users",
        "f:12: listener[0].address[1]: cannot listen on [::1]:2525: in use",
    ]


def test_the_probe_is_asked_for_every_port_that_is_not_0(config: Config) -> None:
    asked: list[tuple[str, int]] = []
    listener = Listener("a", "mx", ("127.0.0.1:25", "[::1]:0", "[0::1]:26"))
    check(with_listener(config, listener), "f", probe=lambda address, port: asked.append((address, port)))
    assert asked == [("127.0.0.1", 25), ("::1", 26)]


def test_faults_of_the_users_file_are_told_with_its_lines(config: Config) -> None:
    Path(config.local.users).write_text("root : root@example.org\nbroken\nx : x@elsewhere.example\n")
    assert errors(config) == [f"{config.local.users}:2: expected `user : address`, got 'broken'"]
    Path(config.local.users).write_text("x : x@elsewhere.example\n")
    assert warnings(config) == [f"{config.local.users}:1: x: elsewhere.example is not in local.domains"]
    Path(config.local.users).write_text("# nobody\n")
    assert warnings(config) == [f"f: local.users: {config.local.users} has no address: only postmaster gets mail"]


def test_l3_a_spool_for_everybody(config: Config) -> None:
    os.chmod(config.spool, 0o777)
    assert errors(config) == [f"f: spool: {config.spool} is writable for everybody"]


def test_l2_a_mail_root_for_everybody(config: Config) -> None:
    os.makedirs(config.local.mail_root, exist_ok=True)
    os.chmod(config.local.mail_root, 0o1777)
    [warning] = warnings(config)
    assert warning.startswith(f"f: local.mail_root: {config.local.mail_root} is writable for everybody")
    assert errors(config) == []


def test_places_of_the_log(config: Config, tmp_path: Path) -> None:
    def place(to: str) -> list[str]:
        return errors(replace(config, log=Log(to=to)))

    (tmp_path / "there").write_text("")
    assert place(str(tmp_path / "new")) == []
    assert place(str(tmp_path / "there")) == []
    assert place(str(tmp_path)) == [f"f: log.to: {tmp_path} is a directory"]
    assert place(f"{tmp_path}/no/log") == [f"f: log.to: there is no directory {tmp_path}/no"]
    assert place("syslog") == (
        [] if os.path.exists("/dev/log") else ["f: log.to: /dev/log does not exist: no syslog runs here"]
    )


def test_listeners(config: Config) -> None:
    assert warnings(replace(config, listener=())) == ["f: listener: there is none: no mail will be received"]
    open_relay = Listener("a", "relay", ("127.0.0.1:25",), trusted=("10.0.0.0/8", "0.0.0.0/0"))
    assert warnings(with_listener(config, open_relay)) == [
        "f: listener[0].trusted[1]: 0.0.0.0/0 is everybody: this is an open relay"
    ]
    nowhere = Listener("a", "mx", ("127.0.0.1:25",), interface="nodevice0")
    assert errors(with_listener(config, nowhere)) == ["f: listener[0].interface: there is no network device 'nodevice0'"]
    assert errors(with_listener(config, Listener("a", "mx", ("127.0.0.1:25",), interface="lo"))) == []


def test_a_relay_alone_needs_no_domain(config: Config) -> None:
    relay = with_listener(config, Listener("a", "relay", ("127.0.0.1:25",)))
    assert errors(replace(relay, local=replace(config.local, domains=()))) == []


@needs_root
class TestAsRoot:
    def test_empty_user_is_warned_about(self, config: Config) -> None:
        assert "f: user: is empty: everything runs as root" in map(str, check(config, "f").warnings)

    def test_a_user_that_is_not_there(self, config: Config) -> None:
        assert "f: user: there is no user 'no-such-user'" in errors(replace(config, user="no-such-user"))

    def test_directories_and_files_must_be_the_users(self, config: Config, tmp_path: Path) -> None:
        nobody = pwd.getpwnam("nobody")
        mine = replace(config, user="nobody")
        os.chmod(config.local.users, 0o600)
        open_up(tmp_path)
        assert errors(mine) == [
            f"f: spool: {config.spool} is not writable for user 'nobody'",
            f"f: local.mail_root: {config.local.mail_root} is not writable for user 'nobody'",
            f"f: pid_file: {os.path.dirname(config.pid_file)} is not writable for user 'nobody'",
            f"f: local.users: {config.local.users} is not readable for user 'nobody'",
        ]
        for path in (config.spool, config.local.mail_root, os.path.dirname(config.pid_file)):
            os.chown(path, nobody.pw_uid, -1)
        os.chown(config.local.users, -1, nobody.pw_gid)
        os.chmod(config.local.users, 0o640)
        assert errors(mine) == []
        os.chmod(tmp_path, 0o700)
        assert len(errors(mine)) == 4, "a directory above that cannot be entered"
        os.chmod(tmp_path, 0o755)


def _errors_of_nobody(config: Config, answer: Connection) -> None:
    if AS_ROOT:
        nobody = pwd.getpwnam("nobody")
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)
    answer.send(errors(config))


def test_what_cannot_be_written_or_made(config: Config, tmp_path: Path) -> None:
    open_up(tmp_path)
    for name in ("spool", "run", "mail"):
        os.chmod(tmp_path / name, 0o555)
    missing = replace(config, local=replace(config.local, mail_root=f"{config.spool}/a/b"))
    answer, remote = Pipe(duplex=False)
    child = get_context("fork").Process(target=_errors_of_nobody, args=(missing, remote))
    child.start()
    assert answer.poll(30)
    assert answer.recv() == [
        f"f: spool: {config.spool} is not writable",
        f"f: local.mail_root: {config.spool}/a/b does not exist and cannot be made",
        f"f: pid_file: {tmp_path}/run is not writable",
    ]
    child.join(30)
    assert child.exitcode == 0


def test_findings_are_values(config: Config) -> None:
    assert check(config, "f") == check(config, "f")
    assert isinstance(check(config, ""), Findings)


def test_the_credentials_file_must_be_there_and_closed_to_others(config: Config, tmp_path: Path) -> None:
    place = tmp_path / "credentials"
    config = replace(config, delivery=replace(config.delivery, credentials=str(place)))
    assert [problem.message for problem in check(config, "").errors] == [f"{place} does not exist"]
    place.write_text("relay.test : me : secret\n")
    place.chmod(0o604)
    [problem] = check(config, "").errors
    assert problem.key == "delivery.credentials"
    assert "chmod" in problem.message
    place.chmod(0o600)
    assert check(config, "").errors == ()
