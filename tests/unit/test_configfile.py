"""Reading, refusing and writing configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtad.config import Config, Delivery, DeliveryPolicy, Dns, Duration, Limits, Listener, Local, Log, Retry, Size
from mtad.config_rules import is_domain, is_user_name, split_address
from mtad.configfile import development, dump, parse
from mtad.errors import ConfigError

MINIMAL = 'hostname = "mx.example.org"\n'


def faults(text: str) -> list[str]:
    """Each problem as ``line: key: message``."""
    with pytest.raises(ConfigError) as caught:
        parse(text, "f")
    return [str(problem).removeprefix("f:").strip() for problem in caught.value.problems]


def only_fault(text: str) -> str:
    found = faults(text)
    assert len(found) == 1, found
    return found[0]


def listener(rows: str) -> str:
    return MINIMAL + "[[listener]]\n" + rows


@pytest.mark.parametrize("text", ["a = " + "[" * 50_000 + "]" * 50_000, "a = " + "1" * 9_000])
def test_what_python_cannot_read(text: str) -> None:
    with pytest.raises(ConfigError, match="f:1: not TOML"):
        parse(text, "f")


def test_minimal() -> None:
    assert parse(MINIMAL, "f") == Config(hostname="mx.example.org")


def test_the_file_of_the_contract() -> None:
    config = parse(
        """
        hostname = "mx.example.org"
        spool = "/var/spool/mtad"
        [local]
        domains = ["Example.ORG", "example.org"]
        [[listener]]
        name = "inbound"
        service = "mx"
        address = ["0.0.0.0:25", "[::]:25"]
        tls = "starttls"
        [[listener]]
        name = "outbound"
        service = "relay"
        address = ["127.0.0.1:1025", "[::1]:1025"]
        trusted = ["127.0.0.0/8", "::1/128"]
        [retry]
        minimum = "5m"
        [limits]
        message_size = "1MiB"
        """,
        "f",
    )
    assert config.local.domains == ("example.org",)
    assert config.listener[0].tls == "starttls"
    assert config.listener[1].trusted == ("127.0.0.0/8", "::1/128")
    assert config.retry.minimum == 300.0
    assert config.limits.message_size == 1 << 20


def test_all_faults_come_at_once_in_the_order_of_the_lines() -> None:
    found = faults(
        """hostnam = "x"
spool = "here"
[local]
domains = ["a b",
  "mün.de"]
[[listener]]
name = "a"
service = "mxx"
address = ["*:25", "1.2.3.4:99999"]
[[listener]]
name = "a"
service = "relay"
address = ["0.0.0.0:26"]
tls = "implicit"
[retry]
minimum = "2h"
maximum = 30
"""
    )
    assert found == [
        "hostname: is missing, and has no default",
        "1: hostnam: unknown setting; did you mean 'hostname'?",
        "2: spool: 'here' is not an absolute path",
        "4: local.domains[0]: 'a b' is not a domain name",
        "5: local.domains[1]: 'mün.de' is not a domain name; write 'xn--mn-xka.de'",
        "8: listener[0].service: 'mxx' is none of mx, relay, submission; did you mean 'mx'?",
        "9: listener[0].address[0]: '*:25': '*' is not an IP address; write 0.0.0.0 and [::] for all addresses",
        "9: listener[0].address[1]: '1.2.3.4:99999': the port is not within 0 and 65535",
        "11: listener[1].name: another listener is called 'a' already",
        "13: listener[1].address[0]: '0.0.0.0:26': a relay without `trusted` may listen on loopback addresses only",
        '17: retry.maximum: a duration needs a unit; did you mean "30s"?',
    ]


@pytest.mark.parametrize(
    ("text", "place"), [("a = 1\nb = \n", "f:2: not TOML"), ("a = 1\na = 2\n", "f:2: not TOML"), ("[x\n", "f:1: not TOML")]
)
def test_what_is_not_toml(text: str, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "f")
    assert str(caught.value).startswith(place)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("[smtp]\nx = 1", "2: smtp: unknown setting"),
        ("[delivry]", "2: delivry: unknown setting; did you mean 'delivery'?"),
        ("[delivery]\nmessage_size = 1", "3: delivery.message_size: unknown setting; it belongs in [limits]"),
        ("[log]\nspool = '/x'", "3: log.spool: unknown setting; it belongs before the first table"),
        ("delivery = 5", "2: delivery: is a table: write [delivery] and its settings below"),
        ("listener = 5", "2: listener: is a list of tables: write [[listener]] with double brackets"),
        ("[listener]\nname = 'x'", "2: listener: is a list of tables: write [[listener]] with double brackets"),
        ("user = 'a b'", "2: user: 'a b' is not a user name"),
        ("user = 'a\tb'", "2: user: holds a control character"),
        ('spool = "/x\\u0000"', "2: spool: holds a control character"),
        ("[local]\npostmaster = '../x'", "3: local.postmaster: '../x' cannot be the name of a mailbox"),
        ("[local]\ndomains = ['x.y.']", "3: local.domains[0]: 'x.y.' is not a domain name"),
        ("[log]\nto = 'file'", "3: log.to: 'file' is none of stderr, syslog, journal, nor an absolute path"),
        ("[retry]\nminimum = '2h'", "3: retry.minimum: is longer than retry.maximum"),
        ("[retry]\nmaximum = '1s'", "2: retry.minimum: is longer than retry.maximum"),
        ("[dns]\nservers = ['::1', 'x']", "3: dns.servers[1]: 'x' is not an IP address or ADDRESS:PORT"),
        ("[dns]\nservers = ['1.1.1.1:0']", "3: dns.servers[0]: '1.1.1.1:0' is not an IP address or ADDRESS:PORT"),
        ("[delivery]\nca_file = 'x'", "3: delivery.ca_file: 'x' is not an absolute path"),
        ("[[tls.sni]]\ncertificate = '/x'", "2: tls.sni[0].key: is missing, and has no default"),
        ("[[tls.sni]]\nkey = 'x'\ncertificate = '/x'", "3: tls.sni[0].key: 'x' is not an absolute path"),
        ("[[tls.sni]]\nkey = '/x'\ncertificate = ''", "4: tls.sni[0].certificate: is empty"),
        ("[[tls.sni]]\nkey = '/x'\ncertificate = '/x'\nport = 1", "5: tls.sni[0].port: unknown setting; it belongs in"),
        ("[tls.sni]\nkey = '/x'", "2: tls.sni: is a list of tables: write [[tls.sni]] with double brackets"),
        ("[[sni]]\nkey = '/x'", "2: sni: unknown setting"),
        ("[delivery]\nnext_hop = 'a b'", "3: delivery.next_hop: 'a b': 'a b' is not a host name"),
        ("[delivery]\nnext_hop = '1.2.3.4'", "3: delivery.next_hop: an IP address has no MX: write [1.2.3.4]"),
        ("[delivery]\nnext_hop = 'a:b'", "3: delivery.next_hop: 'a:b' is none of host, host:port, [host], [host]:port"),
        ("[delivery]\nnext_hop = 'a:0'", "3: delivery.next_hop: 'a:0': the port is not within 1 and 65535"),
    ],
)
def test_faults(rows: str, expected: str) -> None:
    assert only_fault(MINIMAL + rows).startswith(expected)


@pytest.mark.parametrize("level", ["none", "opportunistic", "required"])
def test_delivery_has_three_levels_of_tls(level: str) -> None:
    assert parse(MINIMAL + f"[delivery]\ntls = '{level}'", "f").delivery.tls == level


def test_policies_of_delivery() -> None:
    rows = "[[delivery.policy]]\ndomain = ['a.example', '.b.example']\ntls = 'required'\nport = 26\n"
    rows += "[[delivery.policy]]\ndomain = ['c.example']\nnext_hop = '@'\ncredentials = '/c'\n"
    rows += "[[delivery.policy]]\nmx = ['.mail.example', '192.0.2.1']\ndomain = ['d.example']\n"
    rows += "concurrency = 3\nrate = '100/1m'\nrecipients = 4\nmessages = 5\n"
    first, second, third = parse(MINIMAL + rows, "f").delivery.policy
    assert first == DeliveryPolicy(domain=("a.example", ".b.example"), tls="required", port=26)
    assert second == DeliveryPolicy(domain=("c.example",), next_hop="@", credentials="/c")
    assert third == DeliveryPolicy(
        domain=("d.example",), mx=(".mail.example", "192.0.2.1"), concurrency=3, rate="100/1m", recipients=4, messages=5
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("tls = 'none'", "2: delivery.policy[0].domain: is missing"),
        ("domain = []", "3: delivery.policy[0].domain: is missing"),
        ("mx = ['*.a']", "3: delivery.policy[0].mx[0]: '*.a' is neither a host name nor one after a dot"),
        ("mx = ['.a']\ntls = 'required'", "4: delivery.policy[0].tls: has no meaning with `mx`"),
        ("mx = ['.a']\nnext_hop = '@'", "4: delivery.policy[0].next_hop: has no meaning with `mx`"),
        ("mx = ['.a']\nport = 26", "4: delivery.policy[0].port: has no meaning with `mx`"),
        ("mx = ['.a']\ncredentials = '/c'", "4: delivery.policy[0].credentials: has no meaning with `mx`"),
        ("domain = ['a']\nrate = '100'", "4: delivery.policy[0].rate: '100' is not a rate; write"),
        ("domain = ['a']\nrate = '0/1m'", "4: delivery.policy[0].rate: '0/1m': the number is not within 1 and 1000000"),
        ("domain = ['a']\nrate = '9999999/1m'", "the number is not within 1 and 1000000"),
        ("domain = ['a']\nrate = '1/0s'", "4: delivery.policy[0].rate: '1/0s': the time is not within 0.001s and 1d"),
        ("domain = ['a']\nrate = '1/2d'", "the time is not within 0.001s and 1d"),
        ("domain = ['a']\nrate = '1/min'", "4: delivery.policy[0].rate: 'min' is not a duration"),
        ("domain = ['a']\nrate = 5", "4: delivery.policy[0].rate: expected a string, got an integer"),
        ("domain = ['a']\nconcurrency = -1", "4: delivery.policy[0].concurrency: -1 is not within 0 and 1000000"),
        ("domain = ['*.a']", "3: delivery.policy[0].domain[0]: '*.a' is neither a domain name nor one after a dot"),
        ("domain = ['a', '..b']", "3: delivery.policy[0].domain[1]: '..b' is neither"),
        ("domain = ['b\u00fccher.de']", "write 'xn--bcher-kva.de'"),
        ("domain = ['a']\nnext_hop = '1.2.3.4'", "4: delivery.policy[0].next_hop: an IP address has no MX"),
        ("domain = ['a']\nport = 65536", "4: delivery.policy[0].port: 65536 is not within 0 and 65535"),
        ("domain = ['a']\ncredentials = 'c'", "4: delivery.policy[0].credentials: 'c' is not an absolute path"),
        ("domain = ['a']\ntls = 'require'", "did you mean 'required'"),
    ],
)
def test_faults_of_policies(rows: str, expected: str) -> None:
    assert expected in only_fault(MINIMAL + "[[delivery.policy]]\n" + rows)


def test_a_table_in_a_table() -> None:
    rows = "[tls]\ncertificate = '/c'\nkey = '/k'\n[[tls.sni]]\ncertificate = '/c1'\nkey = '/k1'\n"
    config = parse(MINIMAL + rows + "[[tls.sni]]\nkey = '/k2'\ncertificate = '/c2'", "f")
    assert config.tls.pairs == (("/c", "/k"), ("/c1", "/k1"), ("/c2", "/k2"))
    assert parse(dump(config), "f") == config
    assert parse(MINIMAL, "f").tls.pairs == (("/etc/mtad/cert.pem", "/etc/mtad/key.pem"),)


@pytest.mark.parametrize("hop", ["mx.example.org", "mx:2525", "[mx]", "[mx]:25", "[192.0.2.1]", "[2001:db8::1]:587"])
def test_next_hops(hop: str) -> None:
    assert parse(MINIMAL + f"[delivery]\nnext_hop = '{hop}'", "f").delivery.next_hop == hop


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("name='a'\nservice='mx'", "2: listener[0].address: is missing, and has no default"),
        ("name='a b'\nservice='mx'\naddress=['[::]:25']", "3: listener[0].name: 'a b': a name has letters"),
        ("name='a'\nservice='mx'\naddress=['25']", "5: listener[0].address[0]: '25' is not ADDRESS:PORT"),
        ("name='a'\nservice='mx'\naddress=[':25']", "5: listener[0].address[0]: ':25': '' is not an IP address; write"),
        ("name='a'\nservice='mx'\naddress=['::1:25']", "5: listener[0].address[0]: '::1:25': an IPv6 address stands in"),
        ("name='a'\nservice='mx'\naddress=['[1.2.3.4]:25']", "5: listener[0].address[0]: '[1.2.3.4]:25': an IPv6 address"),
        (
            "name='a'\nservice='mx'\naddress=['localhost:25']",
            "5: listener[0].address[0]: 'localhost:25': 'localhost' is not",
        ),
        (
            "name='a'\nservice='mx'\naddress=['0.0.0.0:25', '127.0.0.1:25']",
            "5: listener[0].address[1]: '127.0.0.1:25' is taken already by listener 'a'",
        ),
        (
            "name='a'\nservice='mx'\naddress=['[::]:25']\ntrusted=['::/0']",
            '6: listener[0].trusted: has no meaning with service = "mx"',
        ),
        (
            "name='a'\nservice='relay'\naddress=['[::]:25']\ntrusted=['10.0.0.1/8']",
            "6: listener[0].trusted[0]: '10.0.0.1/8' is not a network such as 192.0.2.0/24; did you mean '10.0.0.0/8'?",
        ),
        ("name='a'\nservice='relay'\naddress=['[::]:25']", "5: listener[0].address[0]: '[::]:25': a relay without"),
        ("name='a'\nservice='mx'\naddress=['[::]:25']\ninterface='eth 0'", "6: listener[0].interface: 'eth 0' cannot"),
    ],
)
def test_faults_of_listeners(rows: str, expected: str) -> None:
    assert only_fault(listener(rows)).startswith(expected)


def test_port_0_may_be_asked_for_twice_and_devices_do_not_clash() -> None:
    one = "name='a'\nservice='mx'\naddress=['127.0.0.1:0', '127.0.0.1:0', '0.0.0.0:25']\ninterface='eth0'\n"
    other = "[[listener]]\nname='b'\nservice='mx'\naddress=['0.0.0.0:25', '[::]:25']\ninterface='eth1'"
    assert len(parse(listener(one + other), "f").listener) == 2


def test_development_defaults(tmp_path: Path) -> None:
    config = development("Box.Example", f"{tmp_path}/spool/", "me")
    assert config.development
    assert config.hostname == "box.example"
    assert config.local.domains == ("box.example", "localhost")
    assert config.local.postmaster == "me"
    assert config.user == ""
    assert config.log.to == "stderr"
    assert [entry.address for entry in config.listener] == [
        ("127.0.0.1:2525", "[::1]:2525"),
        ("127.0.0.1:2526", "[::1]:2526"),
    ]
    assert {config.local.users, config.local.mail_root, config.pid_file} == {
        f"{tmp_path}/spool/users",
        f"{tmp_path}/spool/mail",
        f"{tmp_path}/spool/mtad.pid",
    }
    assert parse(dump(config), "f") == config


@pytest.mark.parametrize("name", ["localhost", "my_box", "", "ü"])
def test_development_defaults_hold_with_any_machine_name(name: str) -> None:
    config = development(name, "/s")
    assert config.local.domains == ("localhost",)
    assert parse(dump(config), "f") == config


def test_only_the_development_defaults_are_development() -> None:
    assert not parse(MINIMAL, "f").development


names = st.from_regex(r"[a-z][a-z0-9]{0,10}(\.[a-z]{2,5}){0,2}", fullmatch=True)
paths = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=10).map(lambda text: "/" + text)
durations = st.floats(1, 1000, allow_nan=False).map(lambda number: Duration(round(number, 3)))
configs = st.builds(
    Config,
    hostname=names,
    spool=paths,
    local=st.builds(Local, domains=st.lists(names, unique=True, max_size=3).map(tuple), mail_root=paths),
    listener=st.lists(st.integers(0, 65535), unique=True, max_size=3).map(
        lambda ports: tuple(Listener(f"l{port}", "mx", (f"127.0.0.1:{port}",)) for port in ports)
    ),
    delivery=st.builds(Delivery, next_hop=names, port=st.integers(1, 65535), connect_timeout=durations),
    retry=st.builds(Retry, minimum=durations, lifetime=durations),
    dns=st.builds(Dns, servers=st.just(("[::1]:53",))),
    limits=st.builds(Limits, message_size=st.integers(65536, 1 << 40).map(Size)),
    log=st.builds(Log, to=paths, format=st.sampled_from(["json", "postfix"])),
)


@settings(max_examples=50)
@given(configs)
def test_dump_and_parse_are_inverse(config: Config) -> None:
    # Invariant: what is dumped reads as the same configuration.
    assert parse(dump(config), "f") == config


@pytest.mark.parametrize("name", ["a", "a.b", "a-b.c", "1.2", "x" * 63, ".".join(["x" * 49] * 5)])
def test_domains(name: str) -> None:
    assert is_domain(name)


@pytest.mark.parametrize(
    "name", ["", ".", "a.", ".a", "a..b", "-a", "a-", "a_b", "x" * 64, ".".join(["x" * 50] * 6), "a\n"]
)
def test_no_domains(name: str) -> None:
    assert not is_domain(name)


@pytest.mark.parametrize("name", ["root", "a.b", "ü", "x" * 255, "a@b", "two words"])
def test_user_names(name: str) -> None:
    assert is_user_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "a/b", "/", "a\0b", "a\nb", "x" * 256, "ü" * 128, " a", "a\x7f", "a\u2028", "\ud800"]
)
def test_no_user_names(name: str) -> None:
    assert not is_user_name(name)


def test_split_address() -> None:
    assert split_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert split_address("[0:0::1]:65535") == ("::1", 65535)
    for text in (
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:-1",
        "127.0.0.1:\u0665",
        "[::1:25",
        "1.2.3:25",
        "1.2.3.4:99999999999",
    ):
        with pytest.raises(ValueError, match="'"):
            split_address(text)
