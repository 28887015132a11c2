"""The one table of settings: names, types, defaults, bounds and what each is for.

The structs below are the table. `mtad.configfile` reads a TOML file into them; `tools/gendocs` makes the reference page and
the commented example of them; `mtad.config_table` hands the table out as data. Durations are seconds (float) here and
strings with a unit in the file; sizes are octets here and in the file an integer, or a string with a unit.

Invariants: a value is never changed after it was made. The structs do not check anything when they are built by hand: only
`mtad.configfile.parse` does. Nothing here does I/O.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, field

MINUTE: Final = 60.0
HOUR: Final = 3600.0
DAY: Final = 86400.0
MIB: Final = 1024 * 1024

#: The shortest time-out, in seconds: a time-out of nothing would end every dialogue.
SHORTEST: Final = 0.001
#: The longest duration, in seconds: ten years fit every clock and every file time, and nobody means more.
LONGEST: Final = 3650 * DAY
#: RFC 5321 section 4.5.3.1.7: a server takes messages of at least 64 K octets.
SMALLEST_MESSAGE: Final = 64 * 1024


class Duration(float):
    """Seconds; in the file a string with a unit: ``"300s" "5m" "4h" "5d"``."""


class Size(int):
    """Octets; in the file an integer, or a string with a unit: ``"25MiB"``."""


def _seconds(description: str, least: float = SHORTEST) -> Meta:
    """What a duration is for; msgspec keeps bounds of its own numbers only, so ours stand in ``extra``."""
    return Meta(description=description, extra={"minimum": least, "maximum": LONGEST})


def _octets(description: str, least: int) -> Meta:
    return Meta(description=description, extra={"minimum": least, "maximum": 1 << 40})


def _path(description: str) -> Meta:
    return Meta(description=description, extra={"path": True})


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Local(_Section, frozen=True):
    """Mail that is stored here."""

    domains: Annotated[tuple[str, ...], Meta(description="Mail for these domains is stored here; nobody else's is.")] = ()
    mail_root: Annotated[str, _path("The Maildirs are `<mail_root>/<user>/`.")] = "/var/mail/mtad"
    users: Annotated[str, _path("File with lines `user : address`; compared without case.")] = "/etc/mtad/users"
    passwords: Annotated[str, _path("File with lines `login : hash`.")] = "/etc/mtad/passwords"
    senders: Annotated[
        tuple[str, ...],
        Meta(
            description="What a login may send as besides the addresses of the user of its name: `login : address`, "
            "`login : @domain`, or `login : *` for anything."
        ),
    ] = ()
    postmaster: Annotated[str, Meta(description="The user who gets mail for postmaster, in any local domain.")] = "root"


class Listener(_Section, frozen=True):
    """A listening service; the table may stand any number of times."""

    name: Annotated[str, Meta(description="How logs and `mtad status` call it.", min_length=1)]
    service: Annotated[
        Literal["mx", "relay", "submission"],
        Meta(description="mx: anyone to local users; relay: clients in `trusted` to anywhere; submission: AUTH first."),
    ]
    address: Annotated[
        tuple[str, ...], Meta(description="Where to listen: `ADDRESS:PORT`, IPv6 in brackets.", min_length=1)
    ]
    interface: Annotated[str, Meta(description="Listen on this network device only, such as `eth0`; empty: on all.")] = ""
    tls: Annotated[
        Literal["none", "starttls", "implicit"],
        Meta(description="none: clear text; starttls: the client may ask for TLS; implicit: TLS from the first octet."),
    ] = "none"
    trusted: Annotated[
        tuple[str, ...],
        Meta(description="Networks whose clients may relay. A relay without it may listen on loopback only."),
    ] = ()
    auth_without_tls: Annotated[
        Literal["never", "loopback"],
        Meta(description="Whether clients on this machine may log in without TLS."),
    ] = "never"
    bare_line_ends: Annotated[
        Literal["refuse", "normalize"],
        Meta(
            description="What becomes of a CR or LF on its own in a message of a client that is trusted or has logged in; "
            "of others it is always refused."
        ),
    ] = "refuse"


class Sni(_Section, frozen=True):
    """Another certificate, for clients that ask for one of its names; the table may stand any number of times."""

    certificate: Annotated[str, _path("The certificate chain in PEM.")]
    key: Annotated[str, _path("Its private key in PEM.")]


class Tls(_Section, frozen=True):
    """The certificate of this host. Changed files serve the next client without a restart."""

    certificate: Annotated[str, _path("The certificate chain in PEM, this host's own first.")] = "/etc/mtad/cert.pem"
    key: Annotated[str, _path("Its private key in PEM, without a passphrase; `user` must be able to read it.")] = (
        "/etc/mtad/key.pem"
    )
    sni: tuple[Sni, ...] = ()

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The paths of all certificates and their keys; the first is for clients that ask for none."""
        return ((self.certificate, self.key), *((other.certificate, other.key) for other in self.sni))


class DeliveryPolicy(_Section, frozen=True):
    """What is different for mail to some domains, or to all whose MX is one of some hosts; there may be any number."""

    domain: Annotated[
        tuple[str, ...], Meta(description="For `example.com` alone, or as `.example.com` for every domain below it.")
    ] = ()
    mx: Annotated[
        tuple[str, ...],
        Meta(
            description="For all domains whose MX is this host, or as `.example.com` one below it: they share the limits."
        ),
    ] = ()
    concurrency: Annotated[int, Meta(description="As `delivery.destination_concurrency`; 0: the same.", ge=0)] = 0
    rate: Annotated[
        str, Meta(description='Messages in a time, at most: `"100/1m"`, a tenth of it at once. Empty: no limit.')
    ] = ""
    recipients: Annotated[int, Meta(description="As `delivery.destination_recipients`; 0: the same.", ge=0, le=1000)] = 0
    messages: Annotated[int, Meta(description="Messages over one connection; 0: as many as there are.", ge=0)] = 0
    next_hop: Annotated[
        str, Meta(description="As `delivery.next_hop`; `@`: the domain's own MX; empty: as for all other mail.")
    ] = ""
    port: Annotated[int, Meta(description="As `delivery.port`; 0: as for all other mail.", ge=0, le=65535)] = 0
    tls: Annotated[
        Literal["inherit", "none", "opportunistic", "required", "implicit"],
        Meta(description="As `delivery.tls`; inherit: as for all other mail."),
    ] = "inherit"
    credentials: Annotated[str, _path("As `delivery.credentials`; empty: as for all other mail.")] = ""


class Delivery(_Section, frozen=True):
    """How mail goes out."""

    port: Annotated[int, Meta(description="The port on which next hops listen.", ge=1, le=65535)] = 25
    next_hop: Annotated[
        str,
        Meta(
            description="A smarthost `host` or `host:port` for all remote mail; `[host]`: without MX lookup. Empty: by MX."
        ),
    ] = ""
    tls: Annotated[
        Literal["none", "opportunistic", "required", "implicit"],
        Meta(
            description="none: clear text; opportunistic: TLS when the next hop offers it, with any certificate; required: "
            "TLS with a good certificate, or no delivery; implicit: the same from the first octet, as always on port 465."
        ),
    ] = "opportunistic"
    credentials: Annotated[
        str, _path("File with lines `next-hop : login : password`, for next hops that want AUTH; empty: nothing is shown.")
    ] = ""
    auth_without_tls: Annotated[
        Literal["never", "loopback"],
        Meta(description="Whether a next hop on this machine may be shown credentials without TLS."),
    ] = "never"
    ca_file: Annotated[
        str, _path("Authorities in PEM that a required certificate must lead to; empty: those of the system.")
    ] = ""
    destination_concurrency: Annotated[int, Meta(description="Deliveries at a time to one destination.", ge=1)] = 20
    destination_recipients: Annotated[int, Meta(description="Recipients in one transaction.", ge=1, le=1000)] = 50
    processes: Annotated[int, Meta(description="Delivery processes.", ge=1, le=64)] = 2
    threads: Annotated[int, Meta(description="Deliveries at a time in one delivery process.", ge=1, le=1000)] = 100
    connection_idle: Annotated[
        Duration, _seconds("How long an open connection waits for the next message to the same destination.", least=0)
    ] = Duration(2.0)
    connect_timeout: Annotated[Duration, _seconds("For the connect to one address.")] = Duration(30.0)
    helo_timeout: Annotated[Duration, _seconds("For the greeting, and for the reply to EHLO or HELO.")] = Duration(300.0)
    # Postfix has 300s. A server that stalls here takes mail in clear text, which must not wait five minutes for that.
    starttls_timeout: Annotated[Duration, _seconds("For the reply to STARTTLS, and once more for the TLS handshake.")] = (
        Duration(30.0)
    )
    mail_timeout: Annotated[Duration, _seconds("For the reply to MAIL.")] = Duration(300.0)
    rcpt_timeout: Annotated[Duration, _seconds("For the reply to RCPT.")] = Duration(300.0)
    data_init_timeout: Annotated[Duration, _seconds("For the reply to DATA.")] = Duration(120.0)
    data_xfer_timeout: Annotated[Duration, _seconds("For each piece of the content to be taken.")] = Duration(180.0)
    data_done_timeout: Annotated[Duration, _seconds("For the reply to the final dot.")] = Duration(600.0)
    rset_timeout: Annotated[Duration, _seconds("For the reply to RSET.")] = Duration(20.0)
    policy: tuple[DeliveryPolicy, ...] = ()


class Retry(_Section, frozen=True):
    """When to try again, and when to give up."""

    minimum: Annotated[Duration, _seconds("The shortest wait between attempts.")] = Duration(300.0)
    maximum: Annotated[Duration, _seconds("The longest wait between attempts.")] = Duration(4000.0)
    lifetime: Annotated[Duration, _seconds("After this time in the queue mail goes back to its sender.", least=0)] = (
        Duration(5 * DAY)
    )
    bounce_lifetime: Annotated[Duration, _seconds("The same for reports.", least=0)] = Duration(5 * DAY)
    warn_after: Annotated[
        Duration, _seconds("Tell the sender, once, about mail that waits for longer; 0s: never.", least=0)
    ] = Duration(0.0)
    on_doubt: Annotated[
        Literal["retry", "hold"],
        Meta(
            description="What becomes of a recipient who may have the message, because a process died before the reply was "
            "recorded. retry: it is sent again; hold: it is kept until `mtaq release`."
        ),
    ] = "retry"
    destination_pause: Annotated[
        Duration, _seconds("How long a destination that cannot be reached is left alone before it is tried again.", least=0)
    ] = Duration(60.0)


class Dns(_Section, frozen=True):
    """Whom to ask."""

    servers: Annotated[
        tuple[str, ...], Meta(description="Name servers, `address` or `address:port`; empty: those of the system.")
    ] = ()
    timeout: Annotated[Duration, _seconds("For one question, all servers and repetitions included.")] = Duration(10.0)


class Limits(_Section, frozen=True):
    """What a client may ask of this server."""

    message_size: Annotated[Size, _octets("The largest message taken.", SMALLEST_MESSAGE)] = Size(25 * MIB)
    recipients: Annotated[int, Meta(description="Recipients of one message.", ge=100)] = 1000
    connections: Annotated[int, Meta(description="Connections at a time, of the whole server.", ge=1)] = 10000
    connections_per_client: Annotated[
        int, Meta(description="Connections at a time of one client; an IPv6 client is its /64.", ge=1)
    ] = 50
    command_timeout: Annotated[Duration, _seconds("For a client to complete its next command.")] = Duration(300.0)
    data_timeout: Annotated[Duration, _seconds("For the whole of a message's content.")] = Duration(1800.0)
    # Postfix's smtpd_min_data_rate and its default; a modem of 1984 was twice as fast.
    data_rate: Annotated[
        int, Meta(description="Octets a second of content at least, averaged over `data_window`; 0: as slowly as it likes.")
    ] = 500
    data_window: Annotated[
        Duration, _seconds("How long a client may send content more slowly than at `data_rate`, or nothing at all.")
    ] = Duration(300.0)
    tls_timeout: Annotated[Duration, _seconds("For the whole of a TLS handshake.")] = Duration(30.0)
    greeting_delay: Annotated[
        Duration, _seconds("How long an mx listener holds its greeting back, to catch who talks first.", least=0)
    ] = Duration(0.0)
    bad_commands: Annotated[int, Meta(description="Refused commands in one session before it is ended.", ge=1)] = 20
    bad_commands_in_a_row: Annotated[
        int, Meta(description="Refused commands in a row before the session is ended.", ge=1)
    ] = 10
    wrong_passwords: Annotated[
        int, Meta(description="Wrong passwords of one client within an hour before it may not try again.", ge=1)
    ] = 20
    junk_commands: Annotated[
        int, Meta(description="Commands that lead nowhere (NOOP, RSET, HELP, EHLO) between two messages.", ge=1)
    ] = 100
    # Postfix under stress has 10 s and one error.
    stress_timeout: Annotated[
        Duration,
        _seconds(
            "From when more than two thirds of `connections` are in use until fewer than half are, no deadline of a "
            "command, of a handshake, or of silence in content is longer."
        ),
    ] = Duration(10.0)
    stress_bad_commands: Annotated[
        int, Meta(description="Refused commands, or such as lead nowhere, that a session may have in that time.", ge=1)
    ] = 5


class Processes(_Section, frozen=True):
    """The processes of the server."""

    listeners: Annotated[int, Meta(description="Listener processes.", ge=1, le=64)] = 2
    processors: Annotated[
        Literal["one", "any"], Meta(description="one: each listener and delivery process stays on one, which is cheaper.")
    ] = "one"
    stop_timeout: Annotated[
        Duration, _seconds("How long `mtad stop` lets sessions and deliveries finish what they are at.", least=0)
    ] = Duration(30.0)


class Log(_Section, frozen=True):
    """Where the log goes."""

    to: Annotated[str, Meta(description="stderr, syslog, journal, or the path of a file.")] = "stderr"
    format: Annotated[
        Literal["postfix", "json"], Meta(description="postfix: lines that Postfix's tools read; json: one object a line.")
    ] = "postfix"


class Config(_Section, frozen=True):
    """This host as a whole."""

    hostname: Annotated[str, Meta(description="The name of this host in greetings, EHLO and Received:.", min_length=1)]
    spool: Annotated[str, _path("The queue directories.")] = "/var/spool/mtad"
    user: Annotated[str, Meta(description="Whom to become when started as root; empty: stay.")] = "mtad"
    pid_file: Annotated[str, _path("Where `mtad start` writes the process id of the master.")] = "/run/mtad/mtad.pid"
    local: Local = field(default_factory=Local)
    listener: tuple[Listener, ...] = ()
    tls: Tls = field(default_factory=Tls)
    delivery: Delivery = field(default_factory=Delivery)
    retry: Retry = field(default_factory=Retry)
    dns: Dns = field(default_factory=Dns)
    limits: Limits = field(default_factory=Limits)
    processes: Processes = field(default_factory=Processes)
    log: Log = field(default_factory=Log)

    @property
    def development(self) -> bool:
        """True for the built-in development defaults, which alone keep the users file inside the spool."""
        return self.local.users == f"{self.spool}/users"
