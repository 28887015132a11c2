"""The pool of delivery processes, with real forks: who gets a job, who is found dead, who is found hung."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from mtad.delivery.jobs import ALIVE, Job, Result, job_decoder, job_encoder, sign_of_life
from mtad.net.channels import MAX_PACKET, PacketSocket
from mtad.outcome import Delivered
from mtad.scheduler.pool import FIRST_PAUSE, LAST_RESPITE, LONGEST_PAUSE, SILENCE, YOUNG, DeliveryPool, Dying, Slot

OK = Delivered("2.0.0", "sent")


def obey(channel: PacketSocket, _number: int) -> None:
    """A delivery process that does what the destination of each job says."""
    while packet := channel.recv(MAX_PACKET):
        job = job_decoder.decode(packet)
        if job.destination == "die":
            os._exit(3)
        if job.destination == "raise":
            raise RuntimeError("on purpose")
        if job.destination == "starve":
            raise OSError(errno.EMFILE, "Too many open files", "/spool/active")
        if job.destination == "alive":
            channel.send(ALIVE)
        if job.destination == "stuck":
            channel.send(sign_of_life([job.number]))
        if job.destination == "answer":
            channel.send(job_encoder.encode(Result(job.number, ((0, OK),))))


def job(destination: str = "wait", queue_id: str = "Q") -> Job:
    return Job(0, queue_id, "smtp", destination, (0,))


Pools = Callable[..., DeliveryPool]


@pytest.fixture
def make() -> Iterator[Pools]:
    pools: list[DeliveryPool] = []

    def made(processes: int = 1, threads: int = 2) -> DeliveryPool:
        pools.append(DeliveryPool(processes, threads, obey))
        return pools[-1]

    yield made
    for pool in pools:
        for slot in list(pool.channels().values()):
            pool.bury(slot, "test is over", 0.0)
        reap(pool)


def place(pool: DeliveryPool, now: float = 0.0) -> Slot:
    slot = pool.free(now)
    assert slot is not None
    return slot


def await_packet(slot: Slot) -> None:
    assert slot.channel is not None
    assert select.select([slot.channel], [], [], 10)[0], "nothing came"


def reap(pool: DeliveryPool) -> list[tuple[Dying, str]]:
    """Wait until no process is dying any more."""
    gone = []
    deadline = time.monotonic() + 10
    while pool._dying:
        gone += pool.reap()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return gone


def test_no_process_is_started_before_there_is_work(make: Pools) -> None:
    pool = make(3)
    assert pool.pids() == []
    assert pool.channels() == {}
    place(pool)
    assert len(pool.pids()) == 1


def test_a_job_goes_there_and_its_result_comes_back(make: Pools) -> None:
    pool = make()
    slot = place(pool)
    number = pool.send(slot, job("answer"), 0.0)
    await_packet(slot)
    answer = pool.receive(slot, 5.0)
    assert answer is not None
    sent, result = answer
    assert sent.number == result.number == number
    assert result.outcomes == ((0, OK),)
    assert slot.jobs == {}
    assert pool.receive(slot, 5.0) is None


def test_a_job_goes_to_the_process_that_has_the_fewest(make: Pools) -> None:
    pool = make(2, 2)
    taken = []
    while (slot := pool.free(0.0)) is not None:
        pool.send(slot, job(), 0.0)
        taken.append(slot.number)
    assert taken == [0, 1, 0, 1]
    assert len(set(pool.pids())) == 2


def test_numbers_are_never_used_twice(make: Pools) -> None:
    pool = make(2, 50)
    numbers = [pool.send(place(pool), job(), 0.0) for _ in range(20)]
    assert len(set(numbers)) == 20


def test_a_process_that_dies_gives_its_jobs_back(make: Pools) -> None:
    pool = make()
    slot = place(pool)
    pid = slot.pid
    pool.send(slot, job("wait", "Q1"), 0.0)
    pool.send(slot, job("die", "Q2"), 0.0)
    await_packet(slot)
    with pytest.raises(EOFError):
        pool.receive(slot, 0.0)
    pool.bury(slot, "died", 1.0)
    [(dead, how)] = reap(pool)
    assert how in {"exited with 3", "killed by SIGKILL"}  # the kernel closes the channel a moment before the end
    assert dead.pid == pid
    assert [gone.queue_id for gone in dead.jobs] == ["Q1", "Q2"]
    assert (slot.jobs, pool.channels(), pool.pids()) == ({}, {}, [])


def test_a_bug_in_a_delivery_process_ends_it(make: Pools, capfd: pytest.CaptureFixture[str]) -> None:
    pool = make()
    slot = place(pool)
    pool.send(slot, job("raise"), 0.0)
    await_packet(slot)
    pool.bury(slot, "died", 0.0)
    assert len(reap(pool)) == 1
    assert "on purpose" in capfd.readouterr().err


def test_a_process_that_does_not_get_what_it_needs_is_no_bug(make: Pools, capfd: pytest.CaptureFixture[str]) -> None:
    pool = make()
    slot = place(pool)
    pool.send(slot, job("starve"), 0.0)
    await_packet(slot)
    pool.bury(slot, "died", 0.0)
    assert len(reap(pool)) == 1
    said = capfd.readouterr().err
    assert "fatal: delivery process ends: /spool/active: Too many open files" in said
    assert "panic" not in said


def test_a_process_that_was_told_to_end_does_so_and_that_is_no_death(make: Pools) -> None:
    pool = make()
    slot = place(pool)
    pool.send(slot, job("answer"), 0.0)
    await_packet(slot)
    assert pool.receive(slot, 0.0) is not None
    pool.finish()
    await_packet(slot)
    with pytest.raises(EOFError):
        pool.receive(slot, 0.0)
    os.waitid(os.P_PID, slot.pid, os.WEXITED | os.WNOWAIT)
    pool.bury(slot, "died", 0.0)
    assert [how for _, how in reap(pool)] == [""]


def test_the_next_process_waits_and_the_wait_grows_when_they_die_young(make: Pools) -> None:
    pool = make()
    now, pauses = 0.0, []
    for _ in range(12):
        slot = place(pool, now)
        pool.bury(slot, "died", now + 0.1)
        assert pool.free(now + 0.1) is None
        wait = slot.not_before - (now + 0.1)
        pauses.append(wait)
        now = slot.not_before
    assert pauses[0] == pytest.approx(2 * FIRST_PAUSE)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE)
    slot = place(pool, now)
    pool.bury(slot, "died", now + YOUNG)
    assert slot.not_before - (now + YOUNG) == pytest.approx(FIRST_PAUSE)


def test_an_idle_pool_waits_for_nothing_also_after_a_death(make: Pools) -> None:
    pool = make(2)
    assert pool.wait(0.0) is None
    slot = place(pool)
    assert pool.wait(0.0) is None
    pool.bury(slot, "died", 10.0)
    reap(pool)
    assert pool.wait(10.0) == pytest.approx(slot.not_before - 10.0)
    # It may start when there is work; that nothing comes is no reason to look at it again and again.
    assert pool.wait(slot.not_before) is None


def test_a_dying_process_is_looked_for_often_first_and_seldom_later(make: Pools) -> None:
    pool = make()
    pool.bury(place(pool), "died", 0.0)
    first, later = pool.wait(0.5), pool.wait(100.0)
    assert first is not None
    assert later is not None
    assert first < 0.01 < later


def test_a_process_that_cannot_be_killed_keeps_its_jobs_and_nobody_waits_for_it(
    make: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make()
    slot = place(pool)
    pid = slot.pid
    pool.send(slot, job(), 0.0)
    monkeypatch.setattr("mtad.scheduler.pool._kill", lambda _pid: None)  # as in uninterruptible sleep
    os.kill(pid, signal.SIGSTOP)
    pool.bury(slot, "did not show a sign of life", 0.0)
    assert pool.reap() == []
    other = place(pool, 100.0)
    assert other.pid != pid
    os.kill(pid, signal.SIGKILL)
    [(dead, how)] = reap(pool)
    assert (dead.pid, len(dead.jobs), how) == (pid, 1, "killed by SIGKILL")


def test_a_process_with_work_that_is_silent_hangs(make: Pools) -> None:
    pool = make(2)
    slot = place(pool)
    pool.send(slot, job(), 100.0)
    assert pool.hung(100.0 + SILENCE) == []
    assert pool.hung(100.1 + SILENCE) == [slot]
    pool.send(slot, job("alive"), 100.0)
    await_packet(slot)
    assert pool.receive(slot, 150.0) is None
    for now in (100.1 + SILENCE, 120.1 + SILENCE, 140.1 + SILENCE):
        assert pool.hung(now) == []
    assert pool.hung(150.1 + SILENCE) == [slot]


def test_whoever_was_frozen_together_with_the_scheduler_has_not_been_silent(make: Pools) -> None:
    pool = make()
    slot = place(pool)
    pool.send(slot, job(), 100.0)
    assert pool.hung(101.0) == []
    thawed = 101.0 + 2 * SILENCE
    assert pool.hung(thawed) == []
    assert pool.hung(thawed + SILENCE / 2) == []
    assert pool.hung(thawed + SILENCE) == []
    assert pool.hung(thawed + SILENCE + 0.1) == [slot]


def test_an_idle_process_may_be_silent(make: Pools) -> None:
    pool = make()
    slot = place(pool, 0.0)
    assert pool.hung(10 * SILENCE) == []
    pool.send(slot, job(), 10 * SILENCE)
    assert pool.hung(10 * SILENCE + 1) == [], "its silence counts from its first job on"


def test_a_process_that_does_not_listen_takes_no_job(make: Pools) -> None:
    pool = make()
    slot = place(pool)
    os.kill(slot.pid, signal.SIGKILL)
    await_packet(slot)
    assert pool.send(slot, job(), 0.0) is None
    assert slot.jobs == {}


@pytest.mark.parametrize("call", ["os.fork", "mtad.scheduler.pool.packet_pair"])
def test_a_machine_that_gives_no_process_is_asked_again(
    make: Pools, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], call: str
) -> None:
    pool = make()

    def refuse() -> int:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(call, refuse)
        assert pool.free(0.0) is None
        assert pool.free(0.0) is None, "not before the pause is over"
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert capfd.readouterr().err.count("cannot start a delivery process") == 1
    wait = pool.wait(0.0)
    assert wait is not None
    assert pool.free(wait) is not None


def test_the_death_of_one_is_not_hidden_by_another(make: Pools) -> None:
    """Each child closes what it inherited of the others' channels."""
    pool = make(3)
    slots = []
    for _ in range(3):
        slots.append(place(pool))
        pool.send(slots[-1], job(), 0.0)
    os.kill(slots[0].pid, signal.SIGKILL)
    await_packet(slots[0])
    with pytest.raises(EOFError):
        pool.receive(slots[0], 0.0)
    assert pool.receive(slots[1], 0.0) is None


def test_a_process_with_a_job_that_makes_no_progress_is_ended_when_the_others_are_done(make: Pools) -> None:
    pool = make(threads=3)
    slot = place(pool)
    stuck = pool.send(slot, job("wait"), 0.0)
    other = pool.send(slot, job("wait"), 0.0)
    assert stuck is not None
    assert other is not None
    slot.names_stuck(frozenset({stuck, 99}), 10.0)
    assert slot.stuck == {stuck}, "99 has ended meanwhile"
    assert pool.free(10.0) is None, "no new jobs"
    assert pool.hung(10.0) == []
    del slot.jobs[other]
    assert pool.hung(10.0) == [slot]
    assert slot.complaint(10.0) == "has deliveries that make no progress"
    slot.names_stuck(frozenset(), 11.0)
    assert pool.hung(11.0) == []
    assert pool.free(11.0) is slot


def test_the_others_of_such_a_process_get_a_respite_only(make: Pools) -> None:
    pool = make(threads=3)
    slot = place(pool)
    stuck = pool.send(slot, job("wait"), 0.0)
    assert stuck is not None
    pool.send(slot, job("wait"), 0.0)
    for now in range(10, 10 + int(LAST_RESPITE) + 1, 5):
        slot.heard = now
        slot.names_stuck(frozenset({stuck}), now)
        assert pool.hung(now) == []
    slot.heard = 11 + LAST_RESPITE
    assert pool.hung(11 + LAST_RESPITE) == [slot]


def test_a_sign_of_life_tells_which_jobs_are_stuck(make: Pools) -> None:
    pool = make(threads=3)
    slot = place(pool)
    number = pool.send(slot, job("stuck"), 0.0)
    assert number is not None
    await_packet(slot)
    assert pool.receive(slot, 5.0) is None
    assert (slot.heard, slot.stuck, slot.stuck_since) == (5.0, frozenset({number}), 5.0)
    pool.bury(slot, "makes no progress", 6.0)
    assert slot.stuck == frozenset()
