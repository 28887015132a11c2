"""Issue 2, Processes: how the server starts, and what it says when it cannot. Each test names what it shows."""

from __future__ import annotations

import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtad.control import ask_status
from mtad.net.listening import probe
from tests.client import Client
from tests.procs import OWN_NETWORK, Orphanage, alive, children, descriptors, identity, needs_networks, needs_root, title
from tests.site import BIN, PACKAGES, PATIENCE, Site, await_value

MESSAGE = b"Subject: start\r\n\r\nhello\r\n"


@pytest.fixture
def orphanage() -> Orphanage:
    return Orphanage()


def _titles(site: Site) -> list[str]:
    return sorted(title(pid) for pid in site.processes())


def test_binds_the_sockets_and_forks_listeners_and_scheduler(tmp_path: Path) -> None:
    """`mtad start` binds the sockets, forks the listeners and the scheduler. (Design: `ps` reads like the picture.)"""
    with Site(tmp_path, processes={"listeners": 3}) as site:
        names = ["mtad: listener"] * 3 + ["mtad: master", "mtad: scheduler"]
        await_value(lambda: _titles(site) == names, what=f"ps shows {names}")
        for listener in ("inbound", "relay"):
            for family in ("4", "6"):
                with Client(site.address(listener, family)) as client:
                    assert client.reply() == "220 mx.example.org ESMTP mtad"
        master, scheduler = site.processes()[0], site.pids("scheduler")[0]
        assert set(children(master)) == {scheduler, *site.pids("listener")}
        assert children(scheduler) == [], "deliveries are spawned as there is work"


def test_the_scheduler_spawns_delivery_processes(tmp_path: Path) -> None:
    """The scheduler spawns delivery processes."""
    with Site(tmp_path) as site:
        site.send("a@sender.test", "alice@example.org", MESSAGE)
        site.await_mail("alice")
        assert {title(pid) for pid in site.deliveries()} == {"mtad: delivery"}


@pytest.mark.parametrize("processors", ["one", "any"])
def test_listeners_and_deliveries_stay_on_a_processor_each(tmp_path: Path, processors: str) -> None:
    """``processes.processors``: one for each, another one for the next; the others go anywhere."""
    machine = os.sched_getaffinity(0)
    site = Site(tmp_path)
    site.configure(processes={"processors": processors})
    with site:
        site.send("a@sender.test", "alice@example.org", MESSAGE)
        site.await_mail("alice")
        listeners, deliveries = [
            [os.sched_getaffinity(pid) for pid in pids] for pids in (site.pids("listener"), site.deliveries())
        ]
        assert os.sched_getaffinity(site.pids("scheduler")[0]) == machine
        assert [len(where) for where in listeners + deliveries] == [1 if processors == "one" else len(machine)] * (
            2 + len(deliveries)
        )
        if processors == "one" and len(machine) > 1:
            assert listeners[0] != listeners[1]


def test_as_many_descriptors_as_the_machine_allows(tmp_path: Path) -> None:
    """Connections are limited by the configuration, not by the soft limit that a shell gives."""

    def lower() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    site = Site(tmp_path)
    site.start(preexec_fn=lower)
    with site:
        for pid in site.processes():
            limits = re.search(r"Max open files\s+(\d+)\s+(\d+)", Path(f"/proc/{pid}/limits").read_text())
            assert limits is not None
            assert limits[1] == limits[2]


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A directory that other users can get at; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="mtad-test-") as root:
        os.chmod(root, 0o755)
        yield Path(root)


def _python_for(user: str) -> str:
    """A Python that this user can run, and that can run ours: "" for our own."""

    def works(python: str) -> bool:
        def become() -> None:
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)

        command = [python, "-c", "import mtad.master, mtad.cli.mtad"]
        environment = {"PYTHONPATH": PACKAGES}
        return not subprocess.run(command, preexec_fn=become, env=environment, capture_output=True, check=False).returncode

    account = pwd.getpwnam(user)
    version = ".".join(str(number) for number in sys.version_info[:2])
    for python in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        try:
            if works(python):
                return "" if python == sys.executable else python
        except OSError:
            pass  # it is not there, or not for this user
    pytest.skip(f"user {user} can read no Python {version} on this machine")


@needs_root
@pytest.mark.parametrize("foreground", [True, False], ids=["foreground", "daemon"])
def test_l4_drops_to_user_when_started_as_root(open_root: Path, *, foreground: bool) -> None:
    """It drops to `user` when started as root, after it has bound a port below 1024."""
    privileged = next((f"127.0.113.{n}:25" for n in range(1, 20) if probe(f"127.0.113.{n}:25") is None), None)
    if privileged is None:
        pytest.skip("something listens on port 25 of every address")
    nobody = pwd.getpwnam("nobody")
    top = {"user": "nobody", "spool": str(open_root / "var" / "spool"), "pid_file": str(open_root / "run" / "mtad.pid")}
    site = Site(
        open_root / "etc",
        listeners=[{"name": "inbound", "service": "mx", "address": [privileged]}],
        top=top,
        local={"mail_root": str(open_root / "var" / "mail")},
        log={"to": str(open_root / "log" / "mtad.log")},
    )
    site.spool_path, site.mail_root, site.log_path = (
        open_root / "var/spool",
        open_root / "var/mail",
        open_root / "log/mtad.log",
    )
    site.python = _python_for("nobody")
    site.log_path.parent.mkdir()
    os.chown(site.log_path.parent, nobody.pw_uid, nobody.pw_gid)
    for start in (1, 2):  # the second finds what the first has left
        if foreground:
            site.start()
        else:
            result = site.start_daemon()
            assert result.returncode == 0, result.stderr
        with site:
            site.send("a@sender.test", "alice@example.org", MESSAGE)
            site.await_mail("alice", start)
            pids = site.processes()
            assert len(pids) >= 5
            for pid in pids:
                ids = identity(pid)
                assert ids["Uid"] == {nobody.pw_uid}, title(pid)
                assert ids["Gid"] == {nobody.pw_gid}, title(pid)
                assert 0 not in ids["Groups"], title(pid)
            for path in (site.spool_path, site.mail_root / "alice" / "new", site.log_path, open_root / "run/mtad.pid"):
                assert path.stat().st_uid == nobody.pw_uid, path
            site.configure(limits={"recipients": 200})
            assert site.reload().stdout == "reloaded\n", "a reload works without the privileges that are gone"
        assert not (open_root / "run" / "mtad.pid").exists()
        assert not re.search("panic|denied", site.log())


@needs_root
def test_a_directory_that_the_user_cannot_write_in_is_found_before_the_start(open_root: Path) -> None:
    """A configuration that cannot start says why: the pid file is written without root's privileges."""
    site = Site(open_root, top={"user": "nobody"}, log={"to": "stderr"})
    result = site.start_daemon()
    assert result.returncode == 78
    assert f"{site.config_path}:4: pid_file: {open_root} is not writable for user 'nobody'" in result.stderr


@needs_root
def test_a_user_who_cannot_read_our_code(open_root: Path) -> None:
    """A configuration that cannot start says why, instead of failing at the first module that is loaded late."""
    if not _python_for("nobody"):
        pytest.skip("everybody can read this Python")
    os.chmod(open_root, 0o777)
    result = Site(open_root, top={"user": "nobody"}).start_daemon()
    assert result.returncode == 78
    assert "mtad: user: 'nobody' cannot read " in result.stderr


BROKEN = {
    "not TOML": ("hostname = \n", ":1: not TOML"),
    "unknown key": ('hostname = "mx.example.org"\nuser = ""\nhostnaem = "x"\n', ":3: hostnaem: unknown setting"),
    "no such users file": (
        'hostname = "mx.example.org"\nuser = ""\nspool = "{root}/spool"\npid_file = "{root}/pid"\n'
        '[local]\nmail_root = "{root}/mail"\nusers = "{root}/nobody"\ndomains = ["example.org"]\n',
        ":7: local.users: {root}/nobody",
    ),
}


@pytest.mark.parametrize("foreground", [True, False], ids=["foreground", "daemon"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_configuration_that_cannot_start(tmp_path: Path, orphanage: Orphanage, what: str, *, foreground: bool) -> None:
    """A configuration that cannot start says why and exits 78 without leaving a process."""
    text, complaint = (part.replace("{root}", str(tmp_path)) for part in BROKEN[what])
    config = tmp_path / "mtad.toml"
    config.write_text(text)
    command = [str(BIN / "mtad"), "start", "-c", str(config), *(["--foreground"] if foreground else [])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 78
    assert f"mtad: {config}{complaint}" in result.stderr
    assert "Traceback" not in result.stderr
    assert orphanage.left() == []
    assert os.listdir(tmp_path) == ["mtad.toml"], "nothing was made"


@pytest.mark.parametrize("foreground", [True, False], ids=["foreground", "daemon"])
def test_an_address_in_use(tmp_path: Path, orphanage: Orphanage, *, foreground: bool) -> None:
    """`mtad start` returns with the error: which address is in use; no process and no pid file stay."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        site = Site(tmp_path, listeners=[{"name": "inbound", "service": "mx", "address": ["[::1]:0", address]}])
        result = site.run("mtad", "start", *(["--foreground"] if foreground else []), stdin=subprocess.DEVNULL)
    assert result.returncode == 1
    assert f"mtad: cannot listen on {address}: Address already in use\n" in result.stderr
    assert orphanage.left() == []
    assert not (tmp_path / "mtad.pid").exists()


def test_a_daemon_has_let_go_of_its_caller(tmp_path: Path) -> None:
    """Without `--foreground` it daemonises, writes a pid file, and returns only once the sockets listen."""
    site = Site(tmp_path)
    ours, theirs = os.pipe()
    standard_input, peer = socket.socketpair()
    with standard_input, peer:  # what inetd's children have, and python-daemon looks at
        result = site.start_daemon(stdin=standard_input, pass_fds=[ours, theirs])
    with site:
        assert result.returncode == 0, result.stderr
        assert not result.stdout
        status = ask_status(str(site.spool_path))
        assert status is not None, "it answers as soon as the command returns"
        for listener in status.listeners:
            for address in listener.addresses:
                host, _, port = address.rpartition(":")
                Client((host.strip("[]"), int(port))).socket.close()
        assert (tmp_path / "mtad.pid").read_text() == f"{status.pid}\n"
        assert (tmp_path / "mtad.pid").stat().st_mode & 0o777 == 0o644
        pipe = f"pipe:[{os.fstat(ours).st_ino}]"
        for pid in site.processes():
            assert os.getsid(pid) == os.getsid(status.pid) != os.getsid(0)
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            held = descriptors(pid)
            assert {held[fd] for fd in (0, 1, 2)} == {"/dev/null"}
            assert pipe not in held.values()
    os.close(ours)
    os.close(theirs)
    assert not (tmp_path / "mtad.pid").exists()


def test_children_keep_no_pipe_of_the_start(tmp_path: Path) -> None:
    """The pipe on which the command waits is gone once it has returned, in all processes."""
    site = Site(tmp_path)
    site.start_daemon()
    with site:
        pipes = {pid: {name for name in descriptors(pid).values() if name.startswith("pipe:")} for pid in site.processes()}
        master, *others = pipes.values()
        # Wake-up pipe and lifeline are shared; each process has one more, for its signals.
        assert len(master) == 3
        for own in others:
            assert len(own) == 3
            assert len(own & master) == 2


def test_a_daemon_logs_to_a_file_also_after_a_reload(tmp_path: Path) -> None:
    """`log.to = "stderr"` cannot be honoured by a daemon: it says where the log goes instead, and keeps to it."""
    site = Site(tmp_path, log={"to": "stderr"})
    site.log_path = site.spool_path / "mtad.log"
    result = site.start_daemon()
    with site:
        assert result.stdout == f"The log goes to {site.log_path}.\n"
        site.reload()
        site.await_log("mtad/master.*: reloaded")


def _names_the_first(result: subprocess.CompletedProcess[str], pid: int, site: Site) -> bool:
    return f"already running: process {pid} has the spool {site.spool_path}" in result.stderr


def test_two_starts_on_one_spool(tmp_path: Path, orphanage: Orphanage) -> None:
    """Two `mtad start` on one spool: the second refuses, and names the first."""
    with Site(tmp_path) as site:
        pid = site.status().pid
        before = set(orphanage.left())
        for arguments in ((), ("--foreground",)):
            result = site.run("mtad", "start", *arguments)
            assert result.returncode == 1
            assert _names_the_first(result, pid, site)
        assert set(orphanage.left()) == before
        assert site.status().pid == pid
        assert (tmp_path / "mtad.pid").read_text() == f"{pid}\n", "the pid file is still the first one's"


def test_two_starts_at_the_same_time(tmp_path: Path) -> None:
    """Two `mtad start` on one spool: exactly one of them runs, however close they are."""
    site = Site(tmp_path)
    command = [str(BIN / "mtad"), "start", "-c", str(site.config_path)]
    starts = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [(start.communicate(timeout=PATIENCE)[1], start.returncode) for start in starts]
    with site:
        assert sorted(code for _, code in results) == [0, 1, 1]
        pid = site.status().pid
        for text, code in results:
            if code:
                assert f"process {pid}" in text or "is in use by process" in text
        assert len(site.processes()) == 4


@needs_networks
def test_without_a_configuration_file(tmp_path: Path) -> None:
    """Without a configuration file `mtad start` says that it uses the development defaults and where they put things."""
    if os.path.exists("/etc/mtad/mtad.toml"):
        pytest.skip("this machine has a configuration")
    environment = {key: value for key, value in os.environ.items() if key != "MTAD_CONFIG"}
    spool = tmp_path / "spool"

    def mtad(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*OWN_NETWORK, str(BIN / "mtad"), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path, env=environment, check=False
        )

    result = mtad("start")
    try:
        assert result.returncode == 0, result.stderr
        lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
        assert lines[0] == "There is no configuration file: these are the development defaults."
        assert "inbound 127.0.0.1:2525, [::1]:2525 (mx)" in lines
        assert "relay 127.0.0.1:2526, [::1]:2526 (relay)" in lines
        assert f"spool {spool}" in lines
        assert f"mail {spool}/mail/<user>/new" in lines
        assert f"The log goes to {spool}/mtad.log." in lines
        status = mtad("status")
        assert status.returncode == 0
        assert "configuration development defaults" in " ".join(status.stdout.split())
        assert mtad("reload").stdout == "reloaded\n"
    finally:
        stopped = mtad("stop")
    assert stopped.returncode == 0, stopped.stderr


def test_a_master_that_is_killed_takes_its_children_with_it(tmp_path: Path, orphanage: Orphanage) -> None:
    """Nothing is left running without its master, and a restart goes on where it was."""
    port = 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    site = Site(tmp_path, listeners=[{"name": "inbound", "service": "mx", "address": [f"127.0.0.1:{port}"]}])
    with site:
        site.send("a@sender.test", "alice@example.org", MESSAGE)
        site.await_mail("alice")
        pids = site.processes()
        assert len(pids) >= 5
        site.kill()
        site.start()  # at once: the address may still be held by the children
        await_value(lambda: not any(alive(pid) for pid in pids), what="the children of the killed master have ended")
        site.send("a@sender.test", "alice@example.org", MESSAGE)
        site.await_mail("alice", 2)
    assert orphanage.left() == []


def test_what_a_dead_server_left_does_not_matter(tmp_path: Path) -> None:
    """A stale pid file, stale sockets and stale locks do not keep a server from starting."""
    site = Site(tmp_path)
    site.spool_path.mkdir()
    (tmp_path / "mtad.pid").write_text(f"{os.getpid()}\n")
    (site.spool_path / "master.lock").write_text(f"{os.getpid()}\n")
    for name in ("control.sock", "scheduler.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
            stale.bind(str(site.spool_path / name))
    with site:
        pid = site.status().pid
        assert (tmp_path / "mtad.pid").read_text() == f"{pid}\n"


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    """sd_notify(3): READY=1 once it listens, RELOADING=1 around a reload, STOPPING=1 at the end."""
    path = tmp_path / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(PATIENCE)
        site = Site(tmp_path / "site")
        site.start(env=site.environment(NOTIFY_SOCKET=str(path)))
        with site:
            assert manager.recv(100) == b"READY=1"
            os.kill(site.status().pid, signal.SIGHUP)
            assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", manager.recv(100))
            assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"STOPPING=1"
