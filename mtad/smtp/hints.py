"""What a server asks for between the lines of its replies: fewer connections, another time, another address of ours.

SMTP has no field for any of that, only words; these functions know the usual ones. What they find steers how mail is tried
again, never whether: a sentence that is not understood costs a little time, one that is misread costs no message.

- `asks_for_less`: come with less at a time. 421 says so in itself; others say it with words.
- `retry_after`: come back in so many seconds, as greylisting and rate limits say it.
- `blames_address`: it is the address we come from, or its name, that is not liked.

All are pure. Their time is linear in the length of the reply, which `mtad.delivery.words` bounds.

Standards: RFC 5321 sections 3.8 and 4.2.2 (421), RFC 6647 (greylisting), RFC 7372 (5.7.23, 5.7.25, 5.7.26).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Final

from mtad.outcome import Deferred, Delivered, Failed, Outcome

_GREYLISTED: Final = re.compile(r"\bgr[ea]y[- ]?list", re.IGNORECASE)

# Of Postfix's anvil, Exim's ratelimit, sendmail's conncontrol and ratecontrol, Exchange, and of the large providers.
_LESS: Final = re.compile(
    r"too (?:many|much) (?:\w+[ -]){0,4}?(?:connect|session|messages?\b|e?-?mails?\b|requests?\b|deliver)"
    r"|too many recipients (?:from|this|per)"
    r"|too (?:fast|quickly|frequent)|slow(?:ing)? down|excessive (?:volume|rate|number|connect)|unusual (?:rate|volume)"
    r"|unexpected volume|high volume|concurren\w+ (?:\w+ ){0,3}(?:limit|exceed|reached)|(?:max\w*|number of) concurrent"
    r"|rate[- ]?(?:over)?limit|rate (?:control|exceed)|\brate (?:\w+ ){0,5}(?:exceed|over ?limit)|throttl"
    r"|(?:connect\w*|messages?|sending|hourly|daily|session|volume) (?:\w+ ){0,2}(?:limit|quota) (?:\w+ ){0,3}"
    r"(?:exceed|reached)"
    r"|exceed\w* (?:\w+ ){0,5}(?:\brate\b|connection|hourly|daily|sending)|server (?:is )?(?:too )?busy",
    re.IGNORECASE,
)

# Statuses that are about the rate in themselves: of Gmail, and of Outlook for the reputation or the tenant of an address.
_RATE_STATUS: Final = re.compile(r"4\.7\.(?:28|[56]\d\d)")

_SECONDS: Final[Mapping[str, float]] = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_COUNTS: Final[Mapping[str, int]] = {
    "a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5,
    "ten": 10, "fifteen": 15, "twenty": 20, "thirty": 30,
}  # fmt: skip

_COUNT: Final = rf"(?:\d{{1,6}}|(?:{'|'.join(_COUNTS)})(?= ))"
_UNIT: Final = r"(?:days?|d|hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s)(?![a-z])"
_PART: Final = re.compile(rf"({_COUNT})[ -]?({_UNIT})", re.IGNORECASE)
_CLOCK: Final = re.compile(r"(\d{1,3}):([0-5]\d):([0-5]\d)")
# 300 seconds / 4m59s / 4 minutes and 59 seconds / 00:04:59
_DURATION: Final = (
    rf"(?P<duration>\d{{1,3}}:[0-5]\d:[0-5]\d"
    rf"|{_COUNT}[ -]?{_UNIT}\.?(?:,? ?(?:and )?{_COUNT}[ -]?{_UNIT}\.?){{0,3}})"
)
_ABOUT: Final = r"(?:(?:at least|about|approximately|approx\.?|around|another|the next|a further|up to|more than|~) ?)?"
_AGAIN: Final = (
    r"(?:try|tr(?:y|ies)ing|retry|retried|retrying|retries|again|come back|back|resend|re-?send|resubmit|reconnect|return"
    r"|connect|deliver(?:y|ed)?|later|accept(?:ed)?|available|redeliver)"
)
_PUT_OFF: Final = (
    r"(?:gr[ea]y[- ]?list(?:ed|ing)?|wait|waiting|hold off|delay(?:ed)?|defer(?:red)?|postponed?|paused?|back ?off"
    r"|(?:rate[- ]?)?limited|throttled|blocked|block|banned|suspended|locked)"
)
_FILLER: Final = r"(?:[ .,:;()-]|\b(?:again|later|please|only|this|the|your|message|mail|e-?mail|delivery|it)\b){0,12}?"

#: Characters of a reply in which a time is looked for: it is asked of each recipient of a message, and is never far away.
_FAR_ENOUGH: Final = 500

# Each ties a duration to words for coming back, so that "100 messages in 60 seconds" is none.
_HINTS: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b{_AGAIN}\b{_FILLER}\b(?:in|after) {_ABOUT}{_DURATION}",
        rf"\b{_PUT_OFF}\b{_FILLER}(?:\b(?:for|in|of) |[ :(]){_ABOUT}{_DURATION}",
        rf"{_DURATION} (?:later|remaining|left|from now|before (?:you |re-?|try|send|anoth|the next|next))",
        r"\bretry[-_ ]?(?:after|in|time|delay)\b ?[:=]? ?(?P<bare>\d{1,6})(?![\d:.]| ?[a-z%])",
    )
)

# The statuses of RFC 7372 that stand for checks of the address we come from: SPF, reverse name, several at once.
_ADDRESS_STATUS: Final = re.compile(r"[45]\.7\.(?:23|25|26)")
_POLICY_STATUS: Final = re.compile(r"[45]\.(?:7\.\d+|0\.0)")
_ADDRESS: Final = re.compile(
    r"ipv6|\bptr\b|\br-?dns\b|reverse[- ]?(?:dns|host|name|look|map|resol|record|entry|address|client)"
    r"|forward-confirmed|\bfcrdns\b"
    r"|\b(?:client|sending|connecting|remote|source|your|originating) (?:host|ips?\b|ip[- ]address|server|network|mta)"
    r"|\bip[- ](?:address|reputation|name)|\b(?:banned|blocked|listed|unknown) (?:\w+ ){0,2}ip\b|\bdns[bw]l\b|\brbl\b"
    r"|\bhost ?name (?:lookup|not found|mismatch)",
    re.IGNORECASE,
)
_V6: Final = re.compile(
    r"(?<![0-9a-z:.])[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}(?:\.\d{1,3}){0,3}(?![0-9a-z:])", re.IGNORECASE
)


def asks_for_less(outcome: Outcome) -> bool:
    """Whether the server asks for fewer connections or fewer messages at a time, be it in a refusal for good.

    Greylisting does not, whatever code it uses: each new message would be told the same. Nor does a mailbox that gets too
    much (X.2.Y, RFC 3463): that is not about us.
    """
    if isinstance(outcome, Delivered) or not outcome.reply or _GREYLISTED.search(outcome.reply):
        return False
    if outcome.reply.startswith("421"):
        return True
    if outcome.status[1:4] == ".2.":
        return False
    return _RATE_STATUS.fullmatch(outcome.status) is not None or _LESS.search(outcome.reply) is not None


def retry_after(text: str) -> float | None:
    """In how many seconds a server wants us back, out of what it said; None when it does not say.

    What is meant as an upper limit ("try again within 4 hours") and what is no number ("in a few minutes") is no hint.
    """
    start = text[:_FAR_ENOUGH]
    for hint in _HINTS:
        match = hint.search(start)
        if match is not None:
            bare = match.groupdict().get("bare")
            return float(bare) if bare else _duration(match["duration"])
    return None


def blames_address(outcome: Outcome) -> bool:
    """Whether a server refuses us for the address we come from: for its reverse name, its reputation, SPF.

    The same message may be welcome from another address. Asked about replies that came over IPv6.
    """
    if not isinstance(outcome, (Deferred, Failed)) or not outcome.reply:
        return False
    if _ADDRESS_STATUS.fullmatch(outcome.status):
        return True
    if not _POLICY_STATUS.fullmatch(outcome.status) or _GREYLISTED.search(outcome.reply):
        return False
    return _ADDRESS.search(outcome.reply) is not None or any(_is_v6(found[0]) for found in _V6.finditer(outcome.reply))


def _duration(text: str) -> float:
    clock = _CLOCK.fullmatch(text)
    if clock is not None:
        return int(clock[1]) * 3600.0 + int(clock[2]) * 60.0 + int(clock[3])
    total = 0.0
    for count, unit in _PART.findall(text):
        number = _COUNTS.get(count.lower())
        total += (int(count) if number is None else number) * _SECONDS[unit[0].lower()]
    return total


def _is_v6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False  # a time of day, or a token of somebody's
    return True
