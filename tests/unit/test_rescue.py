"""The IPv6 rescue: what is refused for our IPv6 address goes on over IPv4, in the same attempt, before anything bounces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import pytest

from mtad.delivery.rescue import Rescue, rescued, revised
from mtad.delivery.transport import Task
from mtad.envelope import Envelope, Recipient
from mtad.outcome import Attempt, Deferred, Delivered, Failed, Outcome
from tests.peers.mx import CLOSE, Say, Script
from tests.peers.outbound import BODY, Bytes, Site, only

BLAME = "550 5.7.25 [2001:db8::1] The IP address sending this message does not have a PTR record setup"
BLAMING = (
    Script(greeting=Say("554 5.7.1 no service for 2001:db8::1")),
    Script(mail=Say("550 5.7.1 Client host rejected: cannot find your reverse hostname")),
    Script(rcpt=Say(BLAME)),
    Script(data=Say("550 5.7.26 SPF does not cover the address")),
    Script(dot=Say(BLAME)),
    Script(rcpt=Say("450 4.7.25 Client host rejected: cannot find your reverse hostname")),
)


@pytest.fixture
def site() -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack)


def deliver(site: Site, *recipients: str, ipv4: bool = False) -> tuple[Sequence[Attempt], Mapping[int, Outcome]]:
    """Deliver one message to x.test, as a job with or without ``ipv4``."""
    envelope = Envelope("Q1", 0.0, "a@me.test", tuple(Recipient(one) for one in recipients or ("b@x.test",)))
    task = Task(envelope, tuple(range(len(envelope.recipients))), "x.test", ipv4)
    attempts = site.transport.deliver(task, Bytes(BODY), site.doubt)
    return attempts, {index: outcome for attempt in attempts for index, outcome in attempt.outcomes}


@pytest.mark.parametrize("script", BLAMING)
def test_a_refusal_of_the_address_goes_on_over_ipv4(site: Site, script: Script) -> None:
    first, second = site.mx("::1", script), site.mx("127.0.0.5")
    site.domain("::1 127.0.0.5")
    attempts, outcomes = deliver(site)
    assert isinstance(outcomes[0], Delivered)
    assert [len(first.messages), len(second.messages)] == [0, 1]
    assert [attempt.address.rpartition(":")[0] for attempt in attempts] == ["[::1]", "127.0.0.5"]
    assert isinstance(attempts[0].outcomes[0][1], Deferred), "nothing that bounces, and nothing that is logged as bounced"
    assert rescued(attempts)


def test_the_refusal_is_kept_in_the_history(site: Site) -> None:
    site.mx("::1", Script(rcpt=Say(BLAME)))
    site.mx("127.0.0.5")
    site.domain("::1 127.0.0.5")
    attempts, _ = deliver(site)
    text = f"host mx1.x.test[::1] said: {BLAME} (in reply to RCPT TO command); going on over IPv4"
    assert attempts[0].outcomes == ((0, Deferred("4.7.25", text, "mx1.x.test", BLAME)),)


def test_other_ipv6_addresses_are_passed_over(site: Site) -> None:
    site.mx("::1", Script(rcpt=Say(BLAME)))
    last = site.mx("127.0.0.6")
    site.domain("::1", "2001:db8::1 127.0.0.6")
    attempts, outcomes = deliver(site)
    assert isinstance(outcomes[0], Delivered)
    assert [attempt.host for attempt in attempts] == ["mx1.x.test", "mx2.x.test"]
    assert len(last.messages) == 1


def test_one_more_server_may_talk_for_it(site: Site) -> None:
    site.mx("127.0.0.5", Script(mail=Say("451 4.3.0 later")))
    site.mx("::1", Script(mail=Say(BLAME)))
    site.mx("127.0.0.7")
    site.domain("127.0.0.5", "::1", "127.0.0.7")
    _, outcomes = deliver(site)
    assert isinstance(outcomes[0], Delivered)


@pytest.mark.parametrize("hosts", [["::1"], ["::1", "::1"]])
def test_without_an_ipv4_address_the_refusal_holds(site: Site, hosts: list[str]) -> None:
    mx = site.mx("::1", Script(rcpt=Say(BLAME)))
    site.domain(*hosts)
    attempts, outcomes = deliver(site)
    said = f"host mx1.x.test[::1] said: {BLAME} (in reply to RCPT TO command)"
    assert outcomes == {0: Failed("5.7.25", said, "mx1.x.test", BLAME)}
    assert len(attempts) == 1
    assert not rescued(attempts)
    assert mx.connections == 1


def test_refusals_for_now_try_all_ipv6_addresses_when_there_is_no_other(site: Site) -> None:
    mx = site.mx("::1", Script(mail=[Say("450 4.7.25 no reverse name"), Say("250 ok")]))
    site.domain("::1", "2001:db8::dead")
    site.make(short=True)
    _, outcomes = deliver(site)
    assert isinstance(outcomes[0], Deferred)
    assert mx.connections == 1
    assert outcomes[0].text.startswith("connect to mx2.x.test[2001:db8::dead]"), "left out first, and then tried"


def test_an_ipv4_that_is_out_of_reach_is_waited_for(site: Site) -> None:
    site.mx("::1", Script(rcpt=Say(BLAME)))
    site.domain("::1 127.0.0.5")
    attempts, outcomes = deliver(site)
    assert isinstance(outcomes[0], Deferred)
    assert not outcomes[0].destination, "a server has talked to us"
    assert not rescued(attempts)


def test_what_ipv4_refuses_as_well_fails(site: Site) -> None:
    site.mx("::1", Script(rcpt=Say(BLAME)))
    site.mx("127.0.0.5", Script(rcpt=Say("550 5.7.25 no PTR either")))
    site.domain("::1 127.0.0.5")
    attempts, outcomes = deliver(site)
    assert isinstance(outcomes[0], Failed)
    assert outcomes[0].reply == "550 5.7.25 no PTR either"
    assert not rescued(attempts), "nothing to be remembered"


@pytest.mark.parametrize("reply", ["550 5.1.1 no such user", "550 5.7.1 relaying denied", "554 5.7.1 spam"])
def test_other_refusals_are_the_end(site: Site, reply: str) -> None:
    site.mx("::1", Script(rcpt=Say(reply)))
    second = site.mx("127.0.0.5")
    site.domain("::1 127.0.0.5")
    _, outcomes = deliver(site)
    assert isinstance(outcomes[0], Failed)
    assert second.connections == 0


def test_over_ipv4_the_same_words_are_the_end(site: Site) -> None:
    site.mx("127.0.0.5", Script(rcpt=Say(BLAME)))
    second = site.mx("127.0.0.6")
    site.domain("127.0.0.5", "127.0.0.6")
    assert isinstance(only(site.send()), Failed)
    assert second.connections == 0


def test_each_recipient_gets_the_message_once(site: Site) -> None:
    first = site.mx("::1", Script(rcpt={"b@x.test": Say(BLAME), "c@x.test": Say("550 5.1.1 no")}))
    second = site.mx("127.0.0.5")
    site.domain("::1 127.0.0.5")
    attempts, outcomes = deliver(site, "a@x.test", "b@x.test", "c@x.test")
    assert [type(outcomes[index]) for index in range(3)] == [Delivered, Delivered, Failed]
    assert [one.recipients for one in (*first.messages, *second.messages)] == [["a@x.test"], ["b@x.test"]]
    assert rescued(attempts)


def test_those_who_were_not_named_yet_go_on_as_well(site: Site) -> None:
    first = site.mx("::1", Script(mail=Say(BLAME), extensions=["PIPELINING", "LIMITS RCPTMAX=1"]))
    second = site.mx("127.0.0.5")
    site.domain("::1 127.0.0.5")
    _, outcomes = deliver(site, "a@x.test", "b@x.test")
    assert all(isinstance(outcome, Delivered) for outcome in outcomes.values())
    assert first.verbs().count("MAIL") == 1
    assert [one.recipients for one in second.messages] == [["a@x.test", "b@x.test"]]


def test_a_kept_connection_over_ipv6_is_rescued_and_not_kept(site: Site) -> None:
    first = site.mx("::1", Script(rcpt=[Say("250 ok"), Say(BLAME)]))
    second = site.mx("127.0.0.5")
    site.domain("::1 127.0.0.5")
    assert isinstance(deliver(site)[1][0], Delivered)
    assert len(site.transport.cache) == 1
    assert isinstance(deliver(site)[1][0], Delivered)
    assert (first.connections, len(first.messages), len(second.messages)) == (1, 1, 1)
    first.await_closed()
    assert len(site.transport.cache) == 1, "the one over IPv4"


def test_a_lost_connection_blames_nobody(site: Site) -> None:
    site.mx("::1", Script(dot=CLOSE))
    second = site.mx("127.0.0.5")
    site.domain("::1 127.0.0.5")
    _, outcomes = deliver(site)
    assert isinstance(outcomes[0], Deferred), "in doubt"
    assert second.connections == 0


# -- what is remembered ----------------------------------------------------------------------------------------------


def test_a_job_for_ipv4_leaves_ipv6_alone(site: Site) -> None:
    first, second = site.mx("::1"), site.mx("127.0.0.5")
    site.domain("::1 127.0.0.5")
    assert isinstance(deliver(site)[1][0], Delivered)
    assert len(first.messages) == 1
    _, outcomes = deliver(site, ipv4=True)
    assert isinstance(outcomes[0], Delivered)
    assert (len(first.messages), len(second.messages)) == (1, 1), "not over the kept connection either"


def test_a_job_for_ipv4_uses_ipv6_where_there_is_nothing_else(site: Site) -> None:
    mx = site.mx("::1")
    site.domain("::1")
    _, outcomes = deliver(site, ipv4=True)
    assert isinstance(outcomes[0], Delivered)
    mx.script = Script(rcpt=Say(BLAME))
    _, outcomes = deliver(site, ipv4=True)
    assert isinstance(outcomes[0], Failed)


# -- the parts -------------------------------------------------------------------------------------------------------


def test_a_rescue_changes_nothing_before_it_is_needed() -> None:
    rescue = Rescue(ipv4=False)
    outcomes = {0: Delivered("2.0.0", "ok", "mx", "250 ok")}
    assert rescue.look_at(outcomes, "::1") is outcomes
    assert not rescue.skips("::1")
    assert not rescue.over()


def test_revised_attempts_differ_in_the_last_outcome_only() -> None:
    later, never = Deferred("4.7.25", "x"), Failed("5.7.25", "x")
    attempts = [Attempt(1.0, ((0, later), (1, later))), Attempt(2.0, ((1, later), (2, later)))]
    assert revised(attempts, {}) == attempts
    assert revised(attempts, {1: never}) == [attempts[0], Attempt(2.0, ((1, never), (2, later)))]
    assert revised(attempts, {0: never}) == [Attempt(1.0, ((0, never), (1, later))), attempts[1]]
