"""A report that is on its way, and a disk that does not take the record of it: the sender is not told again."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtad.config import Duration, Retry
from mtad.envelope import Envelope, Recipient
from mtad.progress import RecipientState, Reported, attempted
from mtad.scheduler.active import ActiveMessage
from mtad.scheduler.moves import PAUSE
from mtad.spool.queues import Queue
from tests.unit.scheduler_aid import LATER, NEVER, OK, World, refuse

NO_SPACE = OSError(28, "No space left on device")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, retry=Retry(minimum=Duration(300), lifetime=Duration(86400)))


def told(world: World) -> Reported:
    """A bounce job ends whose record could not be written."""
    [job] = world.run()
    assert job.transport == "bounce"
    reported = Reported(world.clock.wall, job.recipients, "report")
    world.finish(job, reports=(reported,), unwritten=True)
    return reported


def test_a_message_that_is_done_with_it_goes(world: World) -> None:
    queue_id = world.enter("a@x.test")
    world.deliver(NEVER)
    told(world)
    assert world.where(queue_id) == []


def test_one_that_lives_on_gets_the_record_before_it_leaves_active(world: World) -> None:
    queue_id = world.enter("a@x.test", "b@y.test")
    first, second = list(world.run())
    world.finish(first, NEVER)
    world.finish(second, LATER)
    undo = refuse(world.spool, "open", NO_SPACE)
    reported = told(world)
    assert world.where(queue_id) == ["active"]
    undo()
    world.clock.advance(PAUSE)
    assert world.run() == []
    assert world.load(Queue.DEFERRED, queue_id).events[-1] == reported
    world.clock.advance(600)
    [job] = world.run()
    assert (job.transport, job.recipients) == ("smtp", (1,)), "nobody is told again"
    world.finish(job, OK)
    assert world.where(queue_id) == []


def test_what_the_file_does_not_have_is_added_when_it_is_read_again() -> None:
    message = ActiveMessage(envelope("a@x.test", "b@y.test"), (), 0, 0.0, urgent=False)
    message.unwritten.append(Reported(1.0, (0,), "report"))
    message.states = [attempted(RecipientState(), NEVER), RecipientState()]
    assert [state.settled for state in message.states] == [False, False]
    message.replay_unwritten()
    assert [state.settled for state in message.states] == [True, False]


def envelope(*recipients: str) -> Envelope:
    return Envelope("4jYcGW3rwtz73X", 1.0, "a@sender.test", tuple(Recipient(address) for address in recipients))
