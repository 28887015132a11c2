"""The commands of a client's transaction with the parameters that the server knows: MAIL and RCPT.

`Mail` is what is to be said, `mail_command` and `rcpt_command` say it to a server with these `Capabilities`. A parameter
whose extension the server does not offer is left out, but never one that the content needs: whether a message can go to a
server at all is decided before, in `mtad.delivery.suit`.

Invariants: every field goes through `dialogue.command`, which lets nothing pass that could end a line.

Standards: RFC 5321 section 4.1.1, RFC 1870 (SIZE), RFC 6152 and RFC 3030 section 3 (BODY), RFC 6531 section 3.4 (SMTPUTF8),
RFC 3461 section 4 (RET, ENVID, NOTIFY, ORCPT), RFC 6533 section 3 (ORCPT with UTF-8).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from mtad.envelope import Recipient
from mtad.smtp.capabilities import Capabilities
from mtad.smtp.dialogue import command
from mtad.smtp.parameters import encode_xtext

Body = Literal["", "8BITMIME", "BINARYMIME"]


class Mail(msgspec.Struct, frozen=True):
    """What one transaction carries.

    ``sender`` is a Mailbox or "", ``size`` the octets of the content as it is sent, without dot-stuffing. ``body`` is what
    the content needs, and ``utf8`` whether the message needs SMTPUTF8; ``ret`` and ``envid`` are the envelope's.
    """

    sender: str
    recipients: tuple[Recipient, ...]
    size: int
    body: Body = ""
    utf8: bool = False
    ret: Literal["", "full", "hdrs"] = ""
    envid: str = ""


def mail_command(mail: Mail, capabilities: Capabilities) -> bytes:
    """MAIL with its parameters.

    Raises:
        ValueError: the caller's fault: the sender cannot stand in a command.
    """
    fields = ["MAIL FROM:<", mail.sender, ">"]
    if capabilities.size:
        fields.append(f" SIZE={mail.size}")
    if mail.body:
        fields.append(f" BODY={mail.body}")
    if mail.utf8:
        fields.append(" SMTPUTF8")
    if capabilities.dsn:
        if mail.ret:
            fields.append(f" RET={mail.ret.upper()}")
        if mail.envid:
            fields.append(f" ENVID={_xtext(mail.envid)}")
    return command(*fields, utf8=mail.utf8)


def rcpt_command(recipient: Recipient, mail: Mail, capabilities: Capabilities) -> bytes:
    """RCPT with its parameters.

    Raises:
        ValueError: the caller's fault: the address cannot stand in a command.
    """
    fields = ["RCPT TO:<", recipient.address, ">"]
    if capabilities.dsn:
        if recipient.notify:
            fields.append(f" NOTIFY={','.join(recipient.notify).upper()}")
        if recipient.orcpt:
            kind, _, address = recipient.orcpt.partition(";")
            fields.append(f" ORCPT={_xtext(kind)};{_xtext(address)}")
    return command(*fields, utf8=mail.utf8)


def _xtext(text: str) -> str:
    """Text as a parameter's value; what is more than US-ASCII, which no server of ours lets in, as RFC 6533 has it."""
    return encode_xtext("".join(char if char.isascii() else rf"\x{{{ord(char):X}}}" for char in text))
