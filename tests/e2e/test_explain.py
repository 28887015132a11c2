"""`mtad explain`: what would happen to a message, without sending one; and that what it says is what happens."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.client import Client
from tests.e2e.world import MESSAGE, World
from tests.peers.mx import Mx, Script
from tests.site import Site
from tests.unit.tls_aid import issue

CA = issue(common_name="test authority", ca=True)


def explain(site: Site, *arguments: str, code: int = 0) -> dict[str, Any]:
    """The answer as JSON."""
    result = site.run("mtad", "explain", *arguments, "--json")
    assert (result.returncode, result.stderr) == (code, "")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def taken(answer: dict[str, Any], listener: str) -> dict[str, Any]:
    [found] = [taken for taken in answer["taken"] if taken["listener"] == listener]
    return dict(found)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site that does not run: the command needs no server."""
    site = Site(tmp_path)
    site.configure(dns={"timeout": "100ms"})
    return site


# -- who takes it in --------------------------------------------------------------------------------------------------


def test_a_local_user(site: Site) -> None:
    answer = explain(site, "--to", "Alice@Example.ORG", "--from", "a@far.test")
    assert answer["user"] == "alice"
    assert answer["mailbox"] == str(site.root / "mail" / "alice")
    assert "route" not in answer
    found = taken(answer, "inbound")
    assert (found["accepted"], found["service"], found["client"]) == (True, "mx", "192.0.2.1")
    assert found["why"] == "it is the mailbox of user alice"


@pytest.mark.parametrize("address", ["postmaster", "postmaster@example.org", "POSTMASTER@EXAMPLE.ORG", "<postmaster>"])
def test_postmaster(site: Site, address: str) -> None:
    assert explain(site, "--to", address)["user"] == "root"


def test_an_unknown_user_and_a_stranger_who_wants_us_to_relay(site: Site) -> None:
    answer = explain(site, "--to", "nobody@example.org", "--client", "198.51.100.7", code=1)
    found = taken(answer, "inbound")
    assert (found["accepted"], found["client"]) == (False, "198.51.100.7")
    assert found["reply"].startswith("550 5.1.1 ")
    assert found["why"] == "the domain is ours, the user is not"
    assert "user" not in answer
    assert "route" not in answer
    found = taken(explain(site, "--to", "b@far.test"), "inbound")
    assert found["reply"].startswith("550 5.7.1 ")
    assert found["why"] == "the domain is not ours and the client may not relay"


def test_who_may_relay(site: Site) -> None:
    answer = explain(site, "--to", "b@far.test")
    assert taken(answer, "relay") | {"reply": ""} == {
        "listener": "relay",
        "service": "relay",
        "client": "127.0.0.1",
        "accepted": True,
        "reply": "",
        "command": "RCPT TO:<b@far.test>",
        "why": "the client is trusted to send to anywhere",
    }
    assert not taken(explain(site, "--to", "b@far.test", "--client", "192.0.2.1", code=1), "relay")["accepted"]


def test_what_it_says_is_what_a_client_hears(tmp_path: Path) -> None:
    """The same words, for each recipient, as over a real connection from the same address."""
    with World(tmp_path, dns={"timeout": "100ms"}) as world:
        site = world.site
        for recipient in ("alice@example.org", "nobody@example.org", "b@far.test", "b%far.test@example.org", "postmaster"):
            for listener in ("inbound", "relay"):
                said = taken(
                    json.loads(site.run("mtad", "explain", "--to", recipient, "--client", "127.0.0.1", "--json").stdout),
                    listener,
                )
                with Client(site.address(listener)) as client:
                    client.begin()
                    for command in ("EHLO client.test", "MAIL FROM:<>", f"RCPT TO:<{recipient}>"):
                        heard = client.say(command)
                assert heard.strip() == said["reply"]


# -- where it goes ----------------------------------------------------------------------------------------------------


def test_the_hosts_in_the_order_in_which_they_are_tried(tmp_path: Path) -> None:
    with World(tmp_path) as world:
        first, second = world.address(), world.mx()
        domain = world.domain(first, second)
        route = explain(world.site, "--to", f"b@{domain}")["route"]
        assert [(host["host"], host["addresses"]) for host in route["hosts"]] == [
            (f"mx1.{domain}", [first]),
            (f"mx2.{domain}", [second.address]),
        ]
        assert {host["port"] for host in route["hosts"]} == {world.port}
        assert (route["destination"], route["tls"], route["concurrency"]) == (domain, "opportunistic", 20)
        # and so it happens: the first one refuses the connection, the second one gets it
        world.send(f"b@{domain}")
        second.await_messages(1)


def test_a_domain_that_takes_no_mail_and_one_that_there_is_not_and_a_dns_that_is_silent(tmp_path: Path) -> None:
    with World(tmp_path, dns={"timeout": "200ms"}) as world:
        world.dns.set("null.test", {"MX": ["0 ."]})
        route = explain(world.site, "--to", "b@null.test")["route"]
        assert route["fault"] == "5.1.10 Domain null.test does not accept mail (nullMX)"
        assert route["permanent"]
        route = explain(world.site, "--to", "b@nowhere.test")["route"]
        assert route["fault"].startswith("5.1.2 ")
        assert route["permanent"]
    result = world.site.run("mtad", "explain", "--to", "b@far.test")
    assert "; it waits and is tried again\n" in result.stdout
    assert "hosts       none: 4.4.3 " in result.stdout


def test_a_smarthost_and_a_policy(tmp_path: Path) -> None:
    policy = [{"domain": ["bank.test"], "next_hop": "@", "tls": "required"}]
    with World(tmp_path, delivery={"next_hop": "[127.0.0.1]:2500", "policy": policy}) as world:
        route = explain(world.site, "--to", "b@far.test")["route"]
        assert route["next_hop"] == "[127.0.0.1]:2500"
        assert [(host["host"], host["port"]) for host in route["hosts"]] == [("127.0.0.1", 2500)]
        world.domain(world.mx(), name="bank.test")
        route = explain(world.site, "--to", "b@bank.test")["route"]
        assert (route["next_hop"], route["tls"]) == ("", "required")
        assert [host["host"] for host in route["hosts"]] == ["mx1.bank.test"]


def test_a_lane_that_is_suspended_now(tmp_path: Path) -> None:
    """While the server runs, how the lane stands at this moment is part of the answer."""
    with World(tmp_path) as world:
        domain = world.domain(world.address())
        assert explain(world.site, "--to", f"b@{domain}")["lane"] is None
        for _ in range(5):
            world.site.await_deferred(world.send(f"b@{domain}"))
        lane = explain(world.site, "--to", f"c@{domain}")["lane"]
        assert lane["window"] == 0
        assert lane["suspended_since"] > 0
        shown = world.site.run("mtad", "explain", "--to", f"c@{domain}").stdout
        assert shown.splitlines()[-1].startswith("now         suspended since ")
        assert shown.rstrip().endswith("Connection refused")


def test_the_limits_of_a_policy_and_of_the_hosts_that_take_the_mail(tmp_path: Path) -> None:
    """Those that the lanes are given: of a policy by domain, of one by MX for each domain whose mail goes there."""
    policy = [
        {"domain": ["few.test"], "concurrency": 2, "rate": "100/1m", "recipients": 7, "messages": 3},
        {"mx": [".big.test"], "concurrency": 4, "rate": "9/1s"},
    ]
    with World(tmp_path, delivery={"policy": policy}) as world:
        world.domain(world.mx(), name="few.test")
        world.dns.set("hosted.test", {"MX": ["10 mx1.big.test."]})
        world.host("mx1.big.test", world.mx())
        few = explain(world.site, "--to", "b@few.test")["route"]
        hosted = explain(world.site, "--to", "b@hosted.test")["route"]
        other = explain(world.site, "--to", f"b@{world.domain(world.mx())}")["route"]
        shown = world.site.run("mtad", "explain", "--to", "b@few.test").stdout
    names = ("concurrency", "rate", "recipients", "messages", "group")
    assert [few.get(name) for name in names] == [2, "100/1m", 7, 3, None]
    assert [hosted.get(name) for name in names] == [4, "9/1s", 50, None, ".big.test"]
    assert [other.get(name) for name in names] == [20, None, 50, None, None]
    assert "limits      2 deliveries at a time to few.test\n" in shown
    assert "            7 recipients in each, 100/1m at most\n            3 messages over a connection\n" in shown


# -- --probe ----------------------------------------------------------------------------------------------------------


def server(world: World, tmp_path: Path, *names: str) -> Mx:
    """An exchanger with TLS, its certificate for these names by an authority that nobody knows."""
    pair = issue(*names, by=CA).write(tmp_path, names[0])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    address = world.address()
    script = Script(extensions=("STARTTLS", "PIPELINING"), tls_extensions=("SIZE 1000000", "PIPELINING"))
    mx = Mx(address, world.port, script, tls=context)
    world._stack.enter_context(mx)
    return mx


def test_a_probe_says_what_the_servers_really_offer_and_sends_nothing(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(CA.pem)
    with World(tmp_path, delivery={"ca_file": str(tmp_path / "ca.pem")}) as world:
        good = server(world, tmp_path, "mx1.tls.test")
        other = server(world, tmp_path, "other.test")
        world.domain(good, other, world.mx(), world.address(), name="tls.test")
        hosts = explain(world.site, "--to", "b@tls.test", "--probe")["route"]["hosts"]
        first, second, third, fourth = [probe for host in hosts for probe in host["probes"]]
        assert first["tls"].startswith("TLSv1.3 ")
        assert first["certificate"] == "good"
        assert {"SIZE 1000000", "PIPELINING"} <= set(first["extensions"])
        assert "Hostname mismatch" in second["certificate"]
        assert "tls" not in third
        assert third["extensions"]
        assert fourth["fault"].endswith("Connection refused")
        for mx in (good, other):
            assert not mx.transactions
            assert {line.partition(" ")[0] for _, line in mx.commands} == {"EHLO", "STARTTLS", "QUIT"}
        shown = world.site.run("mtad", "explain", "--to", "b@tls.test", "--probe").stdout
        assert "certificate: good" in shown
        assert max(map(len, shown.splitlines())) < 200


# -- what people type -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Missing option '--to'"),
        (("--to", "a b@c"), "--to or --from: expected <user@domain>"),
        (("--to", "b@far.test", "--from", "nonsense"), "--to or --from: "),
        (("--to", "b@far.test", "--client", "localhost"), "--client: localhost is not an IP address"),
    ],
)
def test_mistakes_are_named(site: Site, arguments: tuple[str, ...], words: str) -> None:
    result = site.run("mtad", "explain", *arguments)
    assert result.returncode == 2
    assert words in result.stderr


def test_the_words_for_people(site: Site) -> None:
    shown = site.run("mtad", "explain", "--to", "alice@example.org").stdout.splitlines()
    assert shown[0] == "from <> to <alice@example.org>"
    assert "inbound     takes it from 192.0.2.1 (mx): it is the mailbox of user alice" in shown
    assert shown[-1].startswith("stored      for user alice, in ")
    assert MESSAGE  # nothing was sent: there is no spool yet
    assert not (site.root / "spool" / "incoming").exists()
