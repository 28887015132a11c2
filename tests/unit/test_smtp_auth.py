"""AUTH at next hops: whom a credential is shown to, with which mechanism, and what a refusal means. C-TL4, row by row."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mtad.config import DeliveryPolicy
from mtad.outcome import Deferred, Delivered
from mtad.smtp.dialogue import Phase, Step
from mtad.smtp.opening import authenticate
from mtad.smtp.sasl import SaslFault
from mtad.smtp.sasl_client import ClientMechanism, client_mechanism
from tests.peers.mx import Mx, Say, Script
from tests.peers.outbound import Site, only
from tests.unit.test_client_protocol import play, r, sent
from tests.unit.test_smtp_tls import CA, SELF_SIGNED, context
from tests.unit.tls_aid import issue

PASSWORD = "pass : w\u00f6rd #1"
LOGINS = {"alice": PASSWORD, "bob": "t0ken"}
SMART = issue("smart.test", by=CA)
MECHANISMS = ["PLAIN", "LOGIN", "SCRAM-SHA-256"]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        site = Site(stack)
        site.dns.set("smart.test", {"A": "127.0.0.5"})
        write(tmp_path, f"[smart.test] : alice : {PASSWORD}")
        site.make(
            next_hop="[smart.test]", credentials=str(tmp_path / "credentials"), ca_file=CA.write(tmp_path, "ca").certificate
        )
        yield site


def write(directory: Path, text: str, mode: int = 0o600) -> None:
    path = directory / "credentials"
    path.write_text(text + "\n")
    path.chmod(mode)


def smarthost(site: Site, tls: ssl.SSLContext, *mechanisms: str, **script: object) -> Mx:
    offer = (f"AUTH {' '.join(mechanisms)}",) if mechanisms else ()
    settings = {"extensions": ("STARTTLS", *offer), "tls_extensions": ("PIPELINING", *offer), **script}
    return site.mx(script=Script(**settings), tls=tls, logins=LOGINS)  # type: ignore[arg-type]  # a test's own words


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_each_mechanism_gets_us_in(site: Site, tmp_path: Path, mechanism: str) -> None:
    mx = smarthost(site, context(SMART, tmp_path), "GSSAPI", mechanism, "NTLM")
    assert isinstance(only(site.send()), Delivered)
    assert mx.authenticated == [(mechanism, "alice")]
    site.send()
    assert len(mx.authenticated) == 1  # a kept session is authenticated already
    assert len(mx.messages) == 2


@pytest.mark.parametrize(
    ("offered", "used"),
    [
        (["PLAIN", "LOGIN", "SCRAM-SHA-256"], "SCRAM-SHA-256"),
        (["LOGIN", "PLAIN"], "PLAIN"),
        (["plain", "login"], "PLAIN"),
        (["XOAUTH2", "LOGIN"], "LOGIN"),
    ],
)
def test_the_strongest_that_is_offered_comes_first(site: Site, tmp_path: Path, offered: list[str], used: str) -> None:
    mx = smarthost(site, context(SMART, tmp_path), *offered)
    site.send()
    assert mx.authenticated == [(used, "alice")]


def test_a_token_is_for_xoauth2_alone(site: Site, tmp_path: Path) -> None:
    write(tmp_path, "smart.test : bob : token:t0ken")
    mx = smarthost(site, context(SMART, tmp_path), "PLAIN", "LOGIN", "XOAUTH2")
    assert isinstance(only(site.send()), Delivered)
    assert mx.authenticated == [("XOAUTH2", "bob")]
    mx.drop()
    write(tmp_path, "smart.test : bob : token:stale")
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert "535 5.7.8" in outcome.text
    mx.script = Script(extensions=("STARTTLS", "AUTH PLAIN"))
    assert "no mechanism available" in only(site.send()).text


def test_a_refusal_defers_and_the_log_says_so_without_the_secret(
    site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "smart.test : alice : wrong-secret")
    mx = smarthost(site, context(SMART, tmp_path), "PLAIN")
    outcome = only(site.send())
    assert outcome == Deferred(
        "4.7.8",
        "SASL authentication failed; server smart.test[127.0.0.5] said: 535 5.7.8 Error: authentication failed",
        "smart.test",
        "535 5.7.8 Error: authentication failed",
        destination=True,
    )
    assert mx.messages == []
    logged = capfd.readouterr().err
    assert "warning: SASL authentication failed; server smart.test[127.0.0.5] said: 535 5.7.8" in logged
    hidden = ["wrong-secret", base64.b64encode(b"\0alice\0wrong-secret").decode()]
    assert not [text for text in hidden if text in logged + repr(site.attempts)]


@pytest.mark.parametrize("reply", ["454 4.7.0 later", "504 5.5.4 what?", "421 4.3.2 down"])
def test_other_refusals_defer_too(site: Site, tmp_path: Path, reply: str) -> None:
    smarthost(site, context(SMART, tmp_path), "PLAIN", auth=Say(reply))
    assert isinstance(only(site.send()), Deferred)


# --- C-TL4 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["none", "opportunistic", "required"])
def test_c_tl4_no_credential_goes_out_in_clear_text(site: Site, tmp_path: Path, level: str) -> None:
    site.make(next_hop="[smart.test]", tls=level)
    mx = smarthost(site, context(SMART, tmp_path), "PLAIN", extensions=("AUTH PLAIN SCRAM-SHA-256",))
    outcome = only(site.send())
    assert (outcome.status, isinstance(outcome, Deferred)) == ("4.7.4", True)
    mx.await_closed()
    assert mx.verbs() == ["EHLO", "QUIT"]


@pytest.mark.parametrize("level", ["none", "opportunistic", "required"])
@pytest.mark.parametrize("implicit", [False, True])
def test_c_tl4_nor_after_a_verification_that_failed(site: Site, tmp_path: Path, level: str, implicit: bool) -> None:
    site.make(next_hop="[smart.test]", tls="implicit" if implicit else level)
    script = Script(extensions=("STARTTLS", "AUTH PLAIN"))
    mx = site.mx(script=script, tls=context(SELF_SIGNED, tmp_path), implicit=implicit, logins=LOGINS)
    outcome = only(site.send())
    assert (outcome.status, isinstance(outcome, Deferred)) == ("4.7.5", True)
    mx.await_closed()
    assert "AUTH" not in mx.verbs()


def test_c_tl4_implicit_tls_and_a_good_certificate(site: Site, tmp_path: Path) -> None:
    site.make(next_hop="[smart.test]", tls="implicit")
    script = Script(extensions=("AUTH SCRAM-SHA-256 PLAIN",))
    mx = site.mx(script=script, tls=context(SMART, tmp_path), implicit=True, logins=LOGINS)
    assert isinstance(only(site.send()), Delivered)
    assert mx.authenticated == [("SCRAM-SHA-256", "alice")]


@pytest.mark.parametrize("extension", [None, "AUTH=PLAIN LOGIN", "AUTH", "AUTH CRAM-MD5 NTLM EXTERNAL"])
def test_c_tl4_what_is_not_offered_is_not_guessed(site: Site, tmp_path: Path, extension: str | None) -> None:
    offer = ("STARTTLS",) if extension is None else ("STARTTLS", extension)
    mx = site.mx(script=Script(extensions=offer), tls=context(SMART, tmp_path), logins=LOGINS)
    outcome = only(site.send())
    assert isinstance(outcome, Deferred)
    assert (outcome.status, "no mechanism available" in outcome.text) == ("4.7.0", True)
    mx.await_closed()
    assert mx.verbs() == ["EHLO", "STARTTLS", "EHLO", "QUIT"]


@pytest.mark.parametrize("yes", [[Say("235 2.7.0 ok")], [Say("334 "), Say("235 ok")]])
def test_c_tl4_a_server_that_does_not_prove_that_it_knows_the_password(site: Site, tmp_path: Path, yes: list[Say]) -> None:
    mx = smarthost(site, context(SMART, tmp_path), "SCRAM-SHA-256", auth=yes)
    outcome = only(site.send())
    assert (outcome.status, isinstance(outcome, Deferred)) == ("4.7.0", True)
    mx.await_closed()
    assert mx.messages == []


def test_c_tl4_loopback_without_tls_where_a_setting_allows_it(site: Site, tmp_path: Path) -> None:
    site.make(next_hop="[smart.test]", auth_without_tls="loopback")
    mx = smarthost(site, context(SMART, tmp_path), "PLAIN", extensions=("AUTH PLAIN",))
    assert isinstance(only(site.send()), Delivered)
    assert mx.authenticated == [("PLAIN", "alice")]
    assert mx.secured == []


# --- which credential ---------------------------------------------------------------------------------------------------


def test_a_next_hop_without_a_credential_is_used_without(site: Site, tmp_path: Path) -> None:
    write(tmp_path, "other.test : alice : secret")
    mx = smarthost(site, context(SELF_SIGNED, tmp_path), "PLAIN")
    assert isinstance(only(site.send()), Delivered)
    assert mx.authenticated == []


def test_a_policy_may_have_credentials_of_its_own(site: Site, tmp_path: Path) -> None:
    site.make(credentials="", next_hop="[smart.test]", policy=(policy(tmp_path),))
    mx = smarthost(site, context(SMART, tmp_path), "PLAIN")
    site.send("b@x.test")
    site.send("b@y.test", domain="y.test")
    assert len(mx.messages) == 2
    assert mx.connections == 2
    assert len(mx.authenticated) == 1


def policy(directory: Path) -> DeliveryPolicy:
    return DeliveryPolicy(domain=("y.test",), credentials=str(directory / "credentials"))


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_a_file_that_is_too_open_is_not_used_and_mail_waits(
    site: Site, tmp_path: Path, mode: int, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, f"smart.test : alice : {PASSWORD}", mode)
    mx = smarthost(site, context(SMART, tmp_path), "PLAIN")
    outcome = only(site.send())
    assert (outcome.status, isinstance(outcome, Deferred)) == ("4.3.5", True)
    assert mx.connections == 0
    assert "others can read or change it" in capfd.readouterr().err


# --- the exchange alone -------------------------------------------------------------------------------------------------


def mechanism(name: str, secret: str = "pencil") -> ClientMechanism:
    return client_mechanism(name, "user", secret, nonce="rOprNGfwEbeRWgbNEkqO")


def test_plain_has_an_initial_response() -> None:
    result, steps = play(authenticate(mechanism("PLAIN")), "235 2.7.0 ok")
    assert result is None
    assert sent(steps) == [b"AUTH PLAIN AHVzZXIAcGVuY2ls\r\n"]


def test_login_waits_to_be_asked() -> None:
    _, steps = play(authenticate(mechanism("LOGIN")), "334 VXNlcm5hbWU6", "334 UGFzc3dvcmQ6", "235 ok")
    assert sent(steps) == [b"AUTH LOGIN\r\n", b"dXNlcg==\r\n", b"cGVuY2ls\r\n"]


def test_a_long_initial_response_goes_on_its_own_line() -> None:
    _, steps = play(authenticate(mechanism("XOAUTH2", "x" * 600)), "334 ", "235 ok")
    first, second = sent(steps)
    assert first == b"AUTH XOAUTH2\r\n"
    assert base64.b64decode(second).endswith(b"x\x01\x01")


def scram(final: str) -> list[str]:
    """RFC 7677 section 3, with another end."""
    first = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    return [f"334 {base64.b64encode(text.encode()).decode()}" for text in (first, final)]


GOOD_FINAL = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="


def test_scram_checks_the_signature_of_the_server() -> None:
    result, steps = play(authenticate(mechanism("SCRAM-SHA-256")), *scram(GOOD_FINAL), "235 ok")
    assert result is None
    assert sent(steps)[-1] == b"\r\n"


@pytest.mark.parametrize("final", [GOOD_FINAL.replace("6rri", "7rri"), "v=", "e=other-error", "x", ""])
def test_c_tl4_a_forged_signature_ends_the_exchange(final: str) -> None:
    steps = authenticate(mechanism("SCRAM-SHA-256"))
    with pytest.raises(SaslFault):
        play(steps, *scram(final), "501 cancelled")


@pytest.mark.parametrize("reply", ["334 !", "334 ===", "334 cj14", "334 \u00fc"])
def test_a_challenge_that_cannot_be_answered_is_cancelled(reply: str) -> None:
    seen: list[Step] = []
    steps = authenticate(mechanism("SCRAM-SHA-256"))
    seen.append(next(steps))
    seen.append(steps.send(r(reply)))
    assert seen[-1].send == b"*\r\n"
    with pytest.raises(SaslFault):
        steps.send(r("501 ok"))


def test_challenges_do_not_go_on_for_ever() -> None:
    with pytest.raises(SaslFault):
        play(authenticate(mechanism("LOGIN")), *["334 "] * 3, "501 ok")


def test_a_step_does_not_show_its_secret() -> None:
    _, steps = play(authenticate(mechanism("PLAIN")), "235 ok")
    assert "AHVz" not in repr(steps)
    assert "EHLO" in repr(Step(Phase.EHLO, b"EHLO x\r\n"))
