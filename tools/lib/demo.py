"""What `tools/demo` plays: four messages through two mail servers, each to its end; or, with --serve, the stage alone.

Exit codes: 0 all went as told, 1 something did not (the step is named), 2 usage, 130 interrupted. Whatever happens, the
servers are stopped; the folder is removed, but for a failure or with --keep.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NoReturn

from tools.lib.demo_world import BIN, DemoFailed, NameServer, Server, await_value, free_port

ANN: Final = "ann@here.example"
BOB: Final = "bob@there.example"
NOBODY: Final = "nobody@there.example"
#: Lines of the log that are shown when something went wrong.
_LAST_LINES: Final = 30


def say(text: str = "") -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def quote(lines: Sequence[str]) -> None:
    """Print what a file or a command has, set off from what we say."""
    for line in lines:
        say(f"   | {line}".rstrip())


class Demo:
    """The servers of one run and the story played with them."""

    def __init__(self, folder: Path) -> None:
        """Nothing runs yet."""
        port = free_port("127.0.0.1", "127.0.0.2")
        self.names = NameServer(
            {
                "here.example": {"MX": "10 mx.here.example."},
                "mx.here.example": {"A": "127.0.0.1"},
                "there.example": {"MX": "10 mx.there.example."},
                "mx.there.example": {"A": "127.0.0.2"},
            }
        )
        self.here = Server("here", folder, "127.0.0.1", port, self.names.address, ("ann",))
        self.there = Server("there", folder, "127.0.0.2", port, self.names.address, ("bob",))
        self.servers = (self.here, self.there)
        self.folder = folder
        self.step = "start two mail servers and a name server"

    def open(self, stack: ExitStack) -> None:
        """Start everything; ``stack`` ends it."""
        stack.enter_context(self.names)
        say(f"Two mail servers and a name server, all of their own, in {self.folder}\n")
        for server in self.servers:
            stack.callback(server.stop)
            server.start()
            say(f"   mx.{server.domain:<14} {server.host}:{server.port:<7} takes mail for {server.domain} from everybody")
            say(f"   {'':<17} {server.host}:{server.relay_port:<7} takes mail for the world from this machine")
        say(f"   {'name server':<17} {self.names.address:<17} says that the mail of there.example goes to mx.there.example")

    def scene(self, number: int, title: str) -> None:
        """A new step, by which a failure is named."""
        self.step = f"{number}. {title}"
        say(f"\n{self.step}")

    def play(self) -> None:
        """All four messages."""
        self.local()
        self.by_mx()
        self.deferred()
        self.bounced()

    def local(self) -> None:
        """One for a mailbox of the server that it is given to."""
        self.scene(1, "A message for a mailbox here")
        queue_id = self.here.send("carl@elsewhere.example", ANN, "Lunch", "Are you free at noon?")
        taken(ANN, queue_id)
        self.arrived(self.here, "ann", 1)

    def by_mx(self) -> None:
        """One for another domain, by its mail exchanger."""
        self.scene(2, "A message that leaves by MX")
        queue_id = self.here.send(ANN, BOB, "Hello over there", "The name server says where you live.", relay=True)
        taken(BOB, queue_id)
        self.outcome(queue_id)
        self.arrived(self.there, "bob", 1)

    def deferred(self) -> None:
        """One that finds nobody, waits, and is flushed."""
        self.scene(3, "A message that has to wait, and is flushed")
        self.there.stop()
        say("   mx.there.example is stopped")
        queue_id = self.here.send(ANN, BOB, "Patience", "This one waited for you.", relay=True)
        taken(BOB, queue_id)
        deferred = self.here.folder / "spool/deferred" / queue_id
        await_value(deferred.exists, f"{queue_id} is deferred")
        self.command("mtaq")
        self.there.start()
        say("   mx.there.example is up again; the next attempt would be in some minutes, but for:")
        self.command("mtad-flush", queue_id)
        self.outcome(queue_id)
        self.arrived(self.there, "bob", 2)
        self.command("mtaq")

    def bounced(self) -> None:
        """One that the other side refuses for good."""
        self.scene(4, "A message that comes back")
        queue_id = self.here.send(ANN, NOBODY, "Is anybody there?", "Probably not.", relay=True)
        taken(NOBODY, queue_id)
        self.outcome(queue_id)
        path = self.here.await_mail("ann", 2)
        say(f"   the report to {ANN}: {path}")
        report = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
        parts = list(report.iter_parts())
        if report.get_content_type() != "multipart/report" or len(parts) != 3:
            raise DemoFailed(f"{path} is no report")
        quote([f"{name}: {report[name]}" for name in ("Return-Path", "From", "To", "Subject")])
        quote(["", *parts[0].get_content().splitlines(), "", *str(parts[1]).strip().splitlines()])

    def command(self, program: str, *arguments: str) -> None:
        """Run a command of the server here, and show it."""
        say(f"   $ {' '.join((program, *arguments))}")
        quote(self.here.run(program, *arguments).splitlines())

    def outcome(self, queue_id: str) -> None:
        """What the log has about the last attempt, once the message has left the queue."""

        def found() -> list[str]:
            lines = self.here.log()
            ours = [line for line in lines if f" {queue_id}: " in line]
            return [line for line in ours if ": to=<" in line] if any(line.endswith(": removed") for line in ours) else []

        line = await_value(found, f"{queue_id} leaves the queue")[-1]
        say("   the log says")
        quote([line])

    def arrived(self, server: Server, user: str, count: int) -> None:
        """Where a message ended, and its beginning."""
        path = server.await_mail(user, count)
        say(f"   arrived    {path}")
        quote(path.read_text().splitlines())


def taken(recipient: str, queue_id: str) -> None:
    """A message was acknowledged."""
    say(f"   sent to    {recipient}; the server said: 250 2.0.0 Ok: queued as {queue_id}")


def serve(demo: Demo) -> None:
    """Keep the site up until SIGINT or SIGTERM, and say what to do with it."""
    here, there = demo.here, demo.there
    say(
        f"""
It stays up until you press Ctrl-C. In another terminal:

  export PATH={shlex.quote(str(BIN))}:"$PATH" MTAD_CONFIG={shlex.quote(str(here.config))}

  mtad status                            what runs
  mtaq                                   what waits, and why
  tail -f {here.folder}/mtad.log
  ls {here.folder}/mail/ann/new {there.folder}/mail/bob/new

A message for a mailbox here, and one that leaves for mx.there.example:

  python -c "import smtplib; smtplib.SMTP('{here.host}', {here.port}).sendmail('{BOB}', '{ANN}', 'Subject: one')"
  python -c "import smtplib; smtplib.SMTP('{here.host}', {here.relay_port}).sendmail('{ANN}', '{BOB}', 'Subject: two')"

Make it wait: stop the other server, send the second one again, look at the queue, start the server, flush.

  mtad stop -c {there.config}
  mtad start -c {there.config}
  mtad-flush

Make it bounce: write to {NOBODY}. Talk to it by hand (HELP says what it understands):

  nc {here.host} {here.port}
"""
    )
    signal.pause()


@contextmanager
def stage(keep: bool) -> Iterator[Path]:
    """A temporary folder; it stays when something fails, and when it is to be kept."""
    folder = Path(tempfile.mkdtemp(prefix="mtad-demo-"))
    try:
        yield folder
    except DemoFailed:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if keep:
        say(f"All of it is in {folder}")
    else:
        shutil.rmtree(folder)


def run(folder: Path, act: Callable[[Demo], None]) -> None:
    """Set the stage, act, and clear it; a failure is told with its step and the logs."""
    demo = Demo(folder)
    try:
        with ExitStack() as stack:
            try:
                demo.open(stack)
                act(demo)
                demo.step = "stop everything"
            finally:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
    except DemoFailed as fault:
        say(f"\nFAILED in: {demo.step}\n   {fault}")
        for server in demo.servers:
            if lines := server.log():
                say(f"\nThe end of {server.folder}/mtad.log:")
                quote(lines[-_LAST_LINES:])
        say(f"\nEverything is stopped; the folder is kept: {folder}")
        raise


def interrupt(_number: int, _frame: object) -> NoReturn:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="tools/demo", description="Watch mail move through two mail servers of its own.")
    parser.add_argument("--serve", action="store_true", help="keep the servers up, and say what to type to play with them")
    parser.add_argument("--keep", action="store_true", help="leave the folder with mail, logs and configuration at the end")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    began = time.monotonic()
    try:
        with stage(options.keep) as folder:
            run(folder, serve if options.serve else Demo.play)
            say(f"\nAll four went as they should, in {time.monotonic() - began:.1f} seconds. Everything is stopped again.")
    except DemoFailed:
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more: tools/demo | head
        return 1
    except KeyboardInterrupt:
        say("\nEverything is stopped again.")
        return 0 if options.serve else 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
