"""Why recipients are deferred: which kind of reason it is, and the reason without what is different each time.

A deferral is a text and a reply, in the words of those who wrote them. `kind_of` finds what was in the way; `normalised`
takes queue ids, host names, addresses and numbers out of it, so that ten thousand deferrals become ten groups. All
functions are pure.

Invariants: `normalised` never raises, and adds no line.
Standards: RFC 3463 (enhanced status codes), RFC 6647 (greylisting).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, Literal

from mtad.outcome import Deferred
from mtad.smtp.hints import asks_for_less

#: What was in the way: the DNS; the TLS policy; our own login at the next hop; nobody took the connection; the dialogue
#: broke off; greylisting; the server wants less from us; any other reply; a mailbox of this machine; this machine itself.
Kind = Literal["dns", "tls", "login", "connect", "broken", "greylisted", "limited", "reply", "mailbox", "machine"]

#: How the scheduler begins the reason of what it defers because the destination is suspended.
SUSPENDED: Final = "delivery temporarily suspended: "

_GREYLISTED: Final = re.compile(r"gr[ae]y-? ?list|postgrey|gr[ae]ylst", re.I)
#: Alternatives in the order of their claims; what is kept comes first.
_VOLATILE: Final = re.compile(
    r"""
    (?P<keep> (?: \bsaid:\s | \bto\ me:\s )[245]\d\d(?:[ -][245]\.\d{1,3}\.\d{1,3}\b)?
            | (?<![\w.])[245]\.\d{1,3}\.\d{1,3}(?![\w.]) )
  | (?P<url> https?://[^\s<>()]+ )
  | (?P<address> <[^<>\s]*@[^<>\s]*> | (?<![\w.+-])"?[\w.!\#$%&'*+/=?^`{|}~-]+"?@[\w.-]*\w )
  | (?P<host> (?: \bhost\s | \bconnect\ to\s | \b(?:with|of|for|server|verified:|TLS:)\s | \bname= )
              [\w.-]+\[[^\]\s]+\](?::\d+)?
            | \bname=[^\s]+ | (?<=mailbox\ of\ )[^\s:]+ )
  | (?P<time> (?<![\w:.])\d{1,2}:\d\d(?::\d\d)?(?![\w:]) )
  | (?P<ip> \[? (?: IPv6: )?
            (?: (?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]) | (?<![\w:])(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}(?![\w:]) )
            \]? (?::\d+)? )
  | (?P<id> (?<![\w.-]) (?=[\w.-]*\d) [\w.-]{8,} (?<![.-]) )
  | (?P<number> (?<![\w.])\d+(?:\.\d+)?(?=\b|[a-z]\b) )
    """,
    re.X | re.I,
)  # fmt: skip
_HOST_WORD: Final = re.compile(r"(?:host|connect to|with|of|for|server|verified:|TLS:) |name=", re.I)
_PATH_WITH_NUMBER: Final = re.compile(r"(?<=/)[^/]*\d[^/]*")


def kind_of(reason: Deferred) -> Kind:
    """What was in the way."""
    text = reason.text.removeprefix(SUSPENDED)
    if text.startswith(("SASL authentication failed", "credentials for ")):
        return "login"
    if reason.reply or " said: " in text or " refused to talk to me: " in text:
        return _kind_of_reply(reason)
    if reason.status in {"4.7.4", "4.7.5"}:
        return "tls"
    if reason.status == "4.4.3" or "Name service error" in text:
        return "dns"
    if text.startswith("connect to "):
        return "connect"
    if text.startswith(("conversation with ", "lost connection with ", "protocol error of ")):
        return "broken"
    return "mailbox" if text.startswith("cannot store in the mailbox") else "machine"


def _kind_of_reply(reason: Deferred) -> Kind:
    said = reason.reply or reason.text
    if _GREYLISTED.search(said):
        return "greylisted"
    return "limited" if asks_for_less(reason) else "reply"


def normalised(reason: str) -> str:
    """A reason without what is different each time; HOST, ADDRESS, ID and N stand for what was there."""
    return _normalised(reason.removeprefix(SUSPENDED))


@lru_cache(maxsize=4096)
def _normalised(text: str) -> str:
    return _VOLATILE.sub(_name, text)


def _name(match: re.Match[str]) -> str:
    found = match[0]
    match match.lastgroup:
        case "keep":
            return found
        case "time" | "number":
            return "N"
        case "url":
            return _PATH_WITH_NUMBER.sub("ID", found.partition("?")[0].partition("#")[0])
        case "address":
            return "<ADDRESS>" if found.startswith("<") else "ADDRESS"
        case "host":
            word = _HOST_WORD.match(found)
            return (word[0] if word else "") + "HOST"
        case "ip":
            return "ADDRESS"
    return "ID"
