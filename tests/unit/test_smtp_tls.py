"""TLS with next hops, against scripted exchangers: what is encrypted, what is verified, and what is done when it fails.

The rows C-TL1 to C-TL3 of the list of attacks, each with a test of its name; C-TL4 is in `test_smtp_auth`.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mtad.config import DeliveryPolicy, Duration
from mtad.outcome import Deferred, Delivered
from tests.peers.mx import CLOSE, HANG, RESET, Action, Close, Mx, Raw, Say, Script
from tests.peers.outbound import Site, only
from tests.unit.tls_aid import Issued, authority, issue

CA = authority()
STRANGER = authority("Nobody's CA")
NAME = "mx1.x.test"
GOOD = issue(NAME, by=CA)
SELF_SIGNED = issue(NAME)

OFFER = ("PIPELINING", "SIZE", "STARTTLS")
TLS = Script(extensions=OFFER, tls_extensions=("PIPELINING", "SIZE"))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        site = Site(stack)
        site.make(ca_file=CA.write(tmp_path, "ca").certificate)
        site.domain("127.0.0.5")
        yield site


def context(issued: Issued, directory: Path) -> ssl.SSLContext:
    pair = issued.write(directory, "server")
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    found.load_cert_chain(pair.certificate, pair.key)
    return found


def tls_script(**changes: object) -> Script:
    return Script(**{**TLS.__dict__, **changes})


# --- opportunistic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("issued", "word"), [(GOOD, "Verified"), (SELF_SIGNED, "Untrusted")])
def test_starttls_is_used_when_it_is_offered_whatever_the_certificate(
    site: Site, tmp_path: Path, issued: Issued, word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    mx = site.mx(script=TLS, tls=context(issued, tmp_path))
    assert isinstance(only(site.send()), Delivered)
    assert mx.verbs() == ["EHLO", "STARTTLS", "EHLO", "MAIL", "RCPT", "DATA"]
    assert mx.secured == ["TLSv1.3"]
    (attempt,) = site.attempts
    assert attempt.tls.startswith("TLSv1.3 with cipher TLS_")
    line = f"{word} TLS connection established to {NAME}[127.0.0.5]:{site.port}: {attempt.tls}"
    assert line in capfd.readouterr().err


def test_a_session_in_tls_is_used_again(site: Site, tmp_path: Path) -> None:
    mx = site.mx(script=TLS, tls=context(SELF_SIGNED, tmp_path))
    for _ in range(3):
        assert isinstance(only(site.send()), Delivered)
        assert site.attempts[0].tls
    assert (mx.connections, len(mx.secured)) == (1, 1)


def test_none_means_clear_text_even_when_tls_is_offered(site: Site, tmp_path: Path) -> None:
    site.make(tls="none")
    mx = site.mx(script=TLS, tls=context(GOOD, tmp_path))
    assert isinstance(only(site.send()), Delivered)
    assert "STARTTLS" not in mx.verbs()
    assert site.attempts[0].tls == ""


# --- C-TL1 --------------------------------------------------------------------------------------------------------------

INJECTED = [
    b"220 ok\r\n250-evil\r\n250 AUTH PLAIN\r\n",
    b"220 ok\r\n250 8BITMIME\r\n",
    b"220 ok\r\n2",
    b"220-a\r\n220 ok\r\n\0",
    b"220 ok\r\n421 go away\r\n",
]


@pytest.mark.parametrize("level", ["opportunistic", "required"])
@pytest.mark.parametrize("octets", INJECTED)
def test_c_tl1_responses_before_the_handshake_are_refused(site: Site, tmp_path: Path, octets: bytes, level: str) -> None:
    site.make(tls=level)
    mx = site.mx(script=tls_script(starttls=Raw(octets)), tls=context(GOOD, tmp_path))
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert outcome.status == "4.5.0"
    assert "octets between the reply to STARTTLS and the TLS handshake" in outcome.text
    mx.await_closed()
    assert mx.verbs() == ["EHLO", "STARTTLS"]  # no QUIT, no second attempt in clear text
    assert mx.secured == []


def test_c_tl1_capabilities_count_from_the_ehlo_inside_tls_only(site: Site, tmp_path: Path) -> None:
    script = tls_script(extensions=("SIZE 5", "DSN", "PIPELINING", "8BITMIME", "STARTTLS"), tls_extensions=())
    mx = site.mx(script=script, tls=context(GOOD, tmp_path))
    assert isinstance(only(site.send()), Delivered)
    assert mx.messages[0].mail == "FROM:<a@me.test>"


def test_c_tl1_starttls_inside_tls_is_not_asked_for(site: Site, tmp_path: Path) -> None:
    mx = site.mx(script=Script(extensions=OFFER), tls=context(GOOD, tmp_path))
    assert isinstance(only(site.send()), Delivered)
    assert mx.verbs().count("STARTTLS") == 1


# --- C-TL2 --------------------------------------------------------------------------------------------------------------

#: The server refuses, in order: the same connection goes on.
REFUSED = [Say("454 4.7.0 TLS not available"), Say("502 5.5.1 what?"), Say(["454-4.7.0 not", "454 4.7.0 now"])]

#: What the server does after EHLO makes the connection useless: another one goes without STARTTLS.
BROKEN: dict[str, Script] = {
    "354": tls_script(starttls=Say("354 go ahead")),
    "not a reply": tls_script(starttls=Raw(b"\x15\x03\x01\0\2\2\n")),
    "hang": tls_script(starttls=HANG),
    "close": tls_script(starttls=CLOSE),
    "reset": tls_script(starttls=RESET),
    "220, then a hang": tls_script(handshake=HANG),
    "220, then a reset": tls_script(handshake=RESET),
    "220, then the end": tls_script(handshake=Close()),
    "220, then plain text": tls_script(handshake=[Raw(b"250 what?\r\n", pause=0.01)]),
    "220, then an alert": tls_script(handshake=Raw(b"\x15\x03\x01\x00\x02\x02\x28", close=True)),
    "silence inside": tls_script(tls_ehlo=HANG),
    "the end inside": tls_script(tls_ehlo=CLOSE),
}


def test_c_tl2_stripped_from_ehlo(site: Site, tmp_path: Path) -> None:
    mx = site.mx(script=Script(extensions=()), tls=context(GOOD, tmp_path))
    assert isinstance(only(site.send()), Delivered)
    assert site.attempts[0].tls == ""
    site.make(tls="required")
    outcome = only(site.send())
    assert outcome == Deferred(
        "4.7.4", f"TLS is required, but was not offered by host {NAME}[127.0.0.5]", NAME, destination=True
    )
    assert len(mx.messages) == 1


def test_c_tl2_ehlo_refused_and_helo(site: Site, tmp_path: Path) -> None:
    mx = site.mx(script=tls_script(ehlo=Say("500 what?")), tls=context(GOOD, tmp_path))
    assert isinstance(only(site.send()), Delivered)
    site.make(tls="required")
    outcome = only(site.send())
    assert (outcome.status, isinstance(outcome, Deferred)) == ("4.7.4", True)
    assert len(mx.messages) == 1


@pytest.mark.parametrize("action", REFUSED)
def test_c_tl2_refused_goes_on_in_clear_text(
    site: Site, tmp_path: Path, action: Action, capfd: pytest.CaptureFixture[str]
) -> None:
    mx = site.mx(script=tls_script(starttls=action), tls=context(GOOD, tmp_path))
    assert isinstance(only(site.send()), Delivered)
    assert mx.connections == 1
    assert "refused to start TLS" in capfd.readouterr().err
    site.make(tls="required")
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert outcome.status == "4.7.4"
    assert f"host {NAME}[127.0.0.5] refused to start TLS" in outcome.text
    assert len(mx.messages) == 1


@pytest.mark.parametrize("row", BROKEN)
def test_c_tl2_broken_goes_on_in_clear_text_within_the_attempt(
    site: Site, tmp_path: Path, row: str, capfd: pytest.CaptureFixture[str]
) -> None:
    site.make(short=True)
    mx = site.mx(script=BROKEN[row], tls=context(GOOD, tmp_path))
    assert isinstance(only(site.send()), Delivered)
    (attempt,) = site.attempts
    assert (attempt.tls, attempt.host) == ("", NAME)
    assert mx.connections == 2
    assert mx.verbs(2) == ["EHLO", "MAIL", "RCPT", "DATA"]
    logged = capfd.readouterr().err
    assert f"TLS with {NAME}[127.0.0.5]:{site.port} failed: " in logged
    assert "; once more in clear text" in logged


@pytest.mark.parametrize("row", BROKEN)
def test_c_tl2_broken_and_required_is_never_clear_text(site: Site, tmp_path: Path, row: str) -> None:
    site.make(short=True, tls="required")
    mx = site.mx(script=BROKEN[row], tls=context(GOOD, tmp_path))
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert outcome.destination
    mx.await_closed()
    assert mx.connections == 1
    assert "MAIL" not in mx.verbs()


def test_c_tl2_a_220_of_several_lines_is_a_220(site: Site, tmp_path: Path) -> None:
    site.mx(script=tls_script(starttls=Say(["220-2.0.0 ready", "220 2.0.0 go"])), tls=context(GOOD, tmp_path))
    assert isinstance(only(site.send()), Delivered)
    assert site.attempts[0].tls


def test_c_tl2_421_instead_of_a_handshake_is_the_end_of_that_host(site: Site, tmp_path: Path) -> None:
    site.domain("127.0.0.5", "127.0.0.6")
    first = site.mx(script=tls_script(starttls=Say("421 4.3.2 down", close=True)), tls=context(GOOD, tmp_path))
    site.mx("127.0.0.6")
    assert isinstance(only(site.send()), Delivered)
    assert first.connections == 1
    assert site.attempts[0].outcomes[0][1].status == "4.3.2"


def test_a_stall_does_not_eat_the_attempt(site: Site, tmp_path: Path) -> None:
    site.make(starttls_timeout=Duration(0.2))
    site.mx(script=tls_script(handshake=HANG), tls=context(GOOD, tmp_path))
    start = time.monotonic()
    assert isinstance(only(site.send()), Delivered)
    assert 0.2 <= time.monotonic() - start < 2


def test_the_address_that_takes_the_clear_text_may_be_down_by_then(site: Site, tmp_path: Path) -> None:
    mx = site.mx(script=tls_script(starttls=CLOSE), tls=context(GOOD, tmp_path))
    mx.script = tls_script(starttls=CLOSE, greeting=[Say("220 mx"), Say("421 4.3.2 down", close=True)])
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert "refused to talk to me: 421 4.3.2 down" in outcome.text


# --- required, C-TL3 ----------------------------------------------------------------------------------------------------

BAD: dict[str, Issued] = {
    "self-signed": SELF_SIGNED,
    "nobody's authority": issue(NAME, by=STRANGER),
    "expired": issue(NAME, by=CA, days=(-30, -1)),
    "not valid yet": issue(NAME, by=CA, days=(1, 30)),
    "another name": issue("mx2.x.test", by=CA),
    "the name of the domain": issue("x.test", by=CA),
    "the name that the server says": issue("mx-127-0-0-5.test", by=CA),
    "common name only": issue(by=CA, common_name=NAME),
    "wildcard of a top level": issue("*.test", by=CA),
    "wildcard of two labels": issue("*.*.test", by=CA),
    "its address as a name": issue("127.0.0.5", by=CA),
}


@pytest.mark.parametrize("row", BAD)
def test_c_tl3_required_defers_when_the_certificate_is_not_good(site: Site, tmp_path: Path, row: str) -> None:
    site.make(tls="required")
    mx = site.mx(script=TLS, tls=context(BAD[row], tmp_path))
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.destination) == ("4.7.5", True)
    assert outcome.text.startswith(f"Server certificate not verified: {NAME}[127.0.0.5]: ")
    mx.await_closed()
    assert mx.verbs() == ["EHLO", "STARTTLS"]


@pytest.mark.parametrize("issued", [GOOD, issue("*.x.test", by=CA)])
def test_c_tl3_required_delivers_when_it_is(site: Site, tmp_path: Path, issued: Issued) -> None:
    site.make(tls="required")
    mx = site.mx(script=TLS, tls=context(issued, tmp_path))
    assert isinstance(only(site.send()), Delivered)
    assert mx.secured == ["TLSv1.3"]


def test_c_tl3_required_tries_the_next_host(site: Site, tmp_path: Path) -> None:
    site.make(tls="required")
    site.domain("127.0.0.5", "127.0.0.6")
    site.mx(script=TLS, tls=context(SELF_SIGNED, tmp_path))
    second = site.mx("127.0.0.6", TLS, tls=context(issue("mx2.x.test", by=CA), tmp_path))
    assert isinstance(only(site.send()), Delivered)
    assert len(second.messages) == 1
    assert [attempt.outcomes[0][1].status for attempt in site.attempts] == ["4.7.5", "2.0.0"]


# --- policies and implicit TLS ------------------------------------------------------------------------------------------


def test_a_policy_decides_for_its_domain_alone(site: Site, tmp_path: Path) -> None:
    site.domain("127.0.0.5", name="y.test")
    site.make(policy=(DeliveryPolicy(domain=("y.test",), tls="required"),))
    mx = site.mx(script=TLS, tls=context(GOOD, tmp_path))
    assert isinstance(only(site.send("b@y.test", domain="y.test")), Deferred)
    assert isinstance(only(site.send("b@x.test")), Delivered)
    assert len(mx.messages) == 1


def test_mail_that_requires_tls_does_not_go_over_a_kept_connection_without(site: Site, tmp_path: Path) -> None:
    site.make(next_hop="[127.0.0.5]", policy=(DeliveryPolicy(domain=("y.test",), tls="required"),))
    mx = site.mx(script=TLS, tls=context(SELF_SIGNED, tmp_path))
    assert isinstance(only(site.send("b@x.test")), Delivered)
    assert isinstance(only(site.send("b@y.test", domain="y.test")), Deferred)
    assert isinstance(only(site.send("b@z.test", domain="z.test")), Delivered)
    assert (mx.connections, len(mx.messages)) == (2, 2)


@pytest.mark.parametrize("extensions", [OFFER, ()])
def test_implicit_tls_comes_before_the_greeting_and_is_verified(
    site: Site, tmp_path: Path, extensions: tuple[str, ...]
) -> None:
    site.make(tls="implicit")
    mx = site.mx(script=Script(extensions=extensions), tls=context(GOOD, tmp_path), implicit=True)
    assert isinstance(only(site.send()), Delivered)
    assert mx.verbs() == ["EHLO", "MAIL", "RCPT", "DATA"]
    assert site.attempts[0].tls.startswith("TLSv1.3")


def test_implicit_tls_with_a_bad_certificate_or_no_tls_defers(site: Site, tmp_path: Path) -> None:
    site.make(tls="implicit", short=True)
    site.domain("127.0.0.5", "127.0.0.6")
    bad = site.mx(script=Script(), tls=context(SELF_SIGNED, tmp_path), implicit=True)
    clear = site.mx("127.0.0.6")
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert [attempt.outcomes[0][1].status for attempt in site.attempts] == ["4.7.5", "4.7.5"]
    assert outcome.text.startswith("Cannot start TLS: mx2.x.test[127.0.0.6]: ")
    assert (bad.messages, clear.messages) == ([], [])


def test_port_465_is_implicit_by_itself(tmp_path: Path) -> None:
    try:
        mx = Mx("127.0.0.5", 465, tls=context(SELF_SIGNED, tmp_path), implicit=True)
    except OSError as error:
        pytest.skip(f"cannot listen on port 465: {error}")
    with mx, ExitStack() as stack:
        site = Site(stack)
        site.make(next_hop="[127.0.0.5]:465")
        assert isinstance(only(site.send()), Delivered)
        assert mx.secured
