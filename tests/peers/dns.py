"""A DNS server for tests: zones as data, UDP and TCP on one port of 127.0.0.1, every question remembered.

    zones = {"example.org": {"MX": ["10 mx.example.org."], "TXT": SERVFAIL}, "mx.example.org": {"A": "127.0.0.5"}}
    with DnsServer(zones) as dns:
        resolver = Resolver([dns.address])
        ...
        assert dns.count("mx.example.org", "A") == 1

A name that is listed, or that has listed names below it, exists: a type it does not have is answered with "no data". Any
other name is NXDOMAIN. CNAMEs are followed within the data, as a recursive server does. Instead of records a type can have
a `Fault`, and so can a whole name. Records may be replaced while the server runs (`set`).

Answers that are larger than what the question allows for UDP are truncated; TCP gives all of them.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from types import TracebackType
from typing import Final, NamedTuple

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.rrset

TTL: Final = 60

_SOA: Final = "ns.test. hostmaster.test. 1 3600 600 86400 30"
_CHAIN: Final = 8


class Fault(Enum):
    """What a server can do instead of answering."""

    SERVFAIL = "servfail"
    REFUSED = "refused"
    NXDOMAIN = "nxdomain"
    SILENT = "silent"  # no answer at all
    GARBAGE = "garbage"  # octets that are no DNS message, with the right id
    FORGED = "forged"  # a fine answer with another id
    QUESTION = "question"  # a fine answer to another question
    POINTER = "pointer"  # a name that points to itself
    EMPTY = "empty"  # a record without data
    TRICKLE = "trickle"  # truncated over UDP; over TCP an octet every 50 ms
    TRUNCATED = "truncated"  # truncated over UDP, and TCP closes without an answer


SERVFAIL: Final = Fault.SERVFAIL
REFUSED: Final = Fault.REFUSED
NXDOMAIN: Final = Fault.NXDOMAIN
SILENT: Final = Fault.SILENT
GARBAGE: Final = Fault.GARBAGE
FORGED: Final = Fault.FORGED
QUESTION: Final = Fault.QUESTION
POINTER: Final = Fault.POINTER
EMPTY: Final = Fault.EMPTY
TRICKLE: Final = Fault.TRICKLE
TRUNCATED: Final = Fault.TRUNCATED

Records = str | Sequence[str] | Fault
Entry = Mapping[str, Records] | Fault
Zones = Mapping[str, Entry]


class _Slow(bytes):
    """An answer that takes its time."""


class Question(NamedTuple):
    """A question that was asked: name in lower case without the final dot, type as text, "udp" or "tcp"."""

    name: str
    type: str
    transport: str


class DnsServer:
    """The server; a context manager. Methods may be called from any thread."""

    def __init__(self, zones: Zones | None = None, ttl: int = TTL) -> None:
        """Take ``zones``, see the module; ``ttl`` in seconds for all records."""
        self._ttl = ttl
        self._lock = threading.Condition()
        self._entries: dict[str, Entry] = {}
        self._questions: list[Question] = []
        self._closed = False
        self._threads: list[threading.Thread] = []
        self.replace(zones or {})
        self._udp, self._tcp = _bind()
        self.port: int = self._udp.getsockname()[1]

    @property
    def address(self) -> str:
        """Where it answers, as the setting ``dns.servers`` wants it: ``127.0.0.1:PORT``."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> DnsServer:
        for target in (self._serve_udp, self._serve_tcp):
            thread = threading.Thread(target=target, name=target.__name__, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering; the port is free afterwards."""
        self._closed = True
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wake:
            wake.sendto(b"", ("127.0.0.1", self.port))
        self._tcp.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._udp.close()
        self._tcp.close()

    def replace(self, zones: Zones) -> None:
        """Forget all names and take these."""
        with self._lock:
            self._entries = {_key(name): entry for name, entry in zones.items()}

    def set(self, name: str, entry: Entry) -> None:
        """Add or replace one name."""
        with self._lock:
            self._entries[_key(name)] = entry

    def questions(self, name: str | None = None, kind: str | None = None) -> list[Question]:
        """What was asked so far, in order; of this name and type only, if given."""
        with self._lock:
            return self._select(name, kind)

    def count(self, name: str | None = None, kind: str | None = None) -> int:
        """How many questions there were."""
        return len(self.questions(name, kind))

    def forget(self) -> None:
        """Count from zero again."""
        with self._lock:
            self._questions.clear()

    def wait(self, name: str | None = None, kind: str | None = None, count: int = 1, timeout: float = 10.0) -> None:
        """Wait until ``count`` such questions were asked; AssertionError after ``timeout`` seconds."""
        with self._lock:
            done = self._lock.wait_for(lambda: len(self._select(name, kind)) >= count, timeout)
            assert done, f"not asked for {name} {kind} {count} times: {self._questions}"

    def _select(self, name: str | None, kind: str | None) -> list[Question]:
        wanted = None if name is None else _key(name)
        return [
            question
            for question in self._questions
            if (wanted is None or question.name == wanted) and (kind is None or question.type == kind)
        ]

    def _serve_udp(self) -> None:
        while True:
            data, peer = self._udp.recvfrom(4096)
            if self._closed:
                return
            answer = self._answer(data, "udp")
            if answer is not None:
                self._udp.sendto(answer, peer)

    def _serve_tcp(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._tcp.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    self._converse(connection)
                except OSError:
                    pass  # the client has gone

    def _converse(self, connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        while len(head := stream.read(2)) == 2:
            data = stream.read(struct.unpack("!H", head)[0])
            answer = self._answer(data, "tcp")
            if answer is None:
                return
            framed = struct.pack("!H", len(answer)) + answer
            if isinstance(answer, _Slow):
                for octet in framed:
                    connection.sendall(bytes((octet,)))
                    time.sleep(0.05)
            connection.sendall(framed)

    def _answer(self, data: bytes, transport: str) -> bytes | None:
        query = dns.message.from_wire(data)
        asked = query.question[0]
        kind = dns.rdatatype.to_text(asked.rdtype)
        name = _key(asked.name.to_text())
        with self._lock:
            self._questions.append(Question(name, kind, transport))
            self._lock.notify_all()
            found = self._find(name, kind)
            response = dns.message.make_response(query, recursion_available=True)
            if isinstance(found, Fault):
                return self._fail(found, response, transport)
            self._fill(response, asked.name, asked.rdtype)
        limit = max(query.payload, 512) if transport == "udp" else 65535
        wire = response.to_wire(max_size=65535)
        if len(wire) <= limit:
            return wire
        response.answer, response.flags = [], response.flags | dns.flags.TC
        return response.to_wire()

    def _fail(self, fault: Fault, response: dns.message.Message, transport: str) -> bytes | None:
        if fault is Fault.SILENT or (fault is Fault.TRUNCATED and transport == "tcp"):
            return None
        if fault is Fault.GARBAGE:
            return response.to_wire()[:12] + b"\xc0\x0c\xff\xff\xff"
        if fault is Fault.POINTER:
            return response.to_wire()[:12] + b"\xc0\x0c\0\x0f\0\1"
        if fault is Fault.EMPTY:
            head = bytearray(response.to_wire())[:12]
            head[7] = 1
            asked = response.question[0]
            question = asked.name.to_wire() + struct.pack("!HH", asked.rdtype, 1)  # type: ignore[operator]  # no file
            return bytes(head[:10]) + b"\0\0" + question + b"\xc0\x0c" + struct.pack("!HHIH", asked.rdtype, 1, TTL, 0)
        if fault is Fault.TRICKLE and transport == "tcp":
            return _Slow(response.to_wire())
        if fault is Fault.FORGED:
            response.id ^= 0x5555
        elif fault is Fault.QUESTION:
            response.question = [dns.rrset.RRset(dns.name.from_text("other.test"), dns.rdataclass.IN, dns.rdatatype.A)]
        elif fault in {Fault.TRUNCATED, Fault.TRICKLE}:
            response.flags |= dns.flags.TC
        else:
            response.set_rcode(dns.rcode.from_text(fault.name))
        return response.to_wire()

    def _fill(self, response: dns.message.Message, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> None:
        for _ in range(_CHAIN):
            found = self._find(_key(name.to_text()), dns.rdatatype.to_text(kind))
            if found is None or isinstance(found, Fault):  # only behind a CNAME can it be a fault here
                response.set_rcode(dns.rcode.NXDOMAIN if found is None else dns.rcode.SERVFAIL)
                break
            if found:
                response.answer.append(dns.rrset.from_text_list(name, self._ttl, "IN", kind, found))
                return
            alias = self._find(_key(name.to_text()), "CNAME")
            if not alias or isinstance(alias, Fault):
                break
            response.answer.append(dns.rrset.from_text_list(name, self._ttl, "IN", "CNAME", alias))
            name = dns.name.from_text(alias[0])
        else:
            if len({one.name for one in response.answer}) == _CHAIN:  # no loop, but too long: a resolver gives up
                response.answer = []
                response.set_rcode(dns.rcode.SERVFAIL)
        response.authority.append(dns.rrset.from_text(name, self._ttl, "IN", "SOA", _SOA))

    def _find(self, name: str, kind: str) -> Sequence[str] | Fault | None:
        """The records; none of this type: empty; no such name: None."""
        entry = self._entries.get(name)
        if entry is None:
            below = "." + name
            return () if any(other.endswith(below) for other in self._entries) else None
        if isinstance(entry, Fault):
            return None if entry is Fault.NXDOMAIN else entry
        records = entry.get(kind, ())
        return (records,) if isinstance(records, str) else records


def reverse(address: str) -> str:
    """The name that a PTR record for ``address`` belongs to."""
    return _key(dns.reversename.from_address(address).to_text())


def _key(name: str) -> str:
    return name.lower().rstrip(".")


def _bind() -> tuple[socket.socket, socket.socket]:
    """A UDP and a TCP socket on the same free port."""
    while True:
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tcp.bind(("127.0.0.1", 0))
        try:
            udp.bind(tcp.getsockname())
        except OSError:
            tcp.close()
            udp.close()
            continue
        tcp.listen()
        return udp, tcp
