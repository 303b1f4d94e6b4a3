"""Messages that accounts received: how large they may be, and the cursor that reads on.

Never lives here: when they count as stored (`machine.ledger`), and a store.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from machine.records import InboundMessage, InboxEntry, InboxPlace, MessageId
from machine.refusals import CursorUnknown

PAGE_MAX = 100
"""Messages in one answer: 26 MB if all are as long as can be, in characters of four bytes."""

TEXT_CHARS_MAX = 65_536
"""WhatsApp's own limit for a text. What is over it is cut off: refused, the message would be
delivered again for ever."""
NAME_CHARS_MAX = 200
"""Of a chat, a sender, a sender's name, an id: they are a few dozen. A message's document must be
no larger than `machine.records.DOCUMENT_BYTES` without its text."""

MOMENT_MAX = 253_402_300_800.0
"""The year 10000, which neither a store nor a calendar has."""

_CURSOR = re.compile(r"([0-9]{1,12})\.([0-9]{1,12})\.([0-9]{1,4})")


@dataclass(frozen=True, slots=True)
class InboxPage:
    """Some received messages in order. `cursor` reads on from here, at any instance, for ever.

    `more`: there were others already.
    """

    messages: tuple[InboundMessage, ...]
    cursor: str
    more: bool


def make_page(entries: Sequence[InboxEntry], *, cursor: str, count_max: int) -> InboxPage:
    """A page of the first `count_max` entries that were found after `cursor`."""
    shown = entries[:count_max]
    return InboxPage(
        tuple(entry.message for entry in shown),
        make_cursor(shown[-1].place) if shown else cursor,
        more=len(entries) > count_max,
    )


def make_cursor(place: InboxPlace) -> str:
    """A place as callers keep it. They read nothing out of it: its form is ours to change."""
    text = f"{place.epoch}.{place.revision}.{place.number}"
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> InboxPlace | None:
    """The place that a cursor stands for; `None`, the beginning, for an empty one.

    Raises `CursorUnknown`.
    """
    if not cursor:
        return None
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        text = ""
    match = _CURSOR.fullmatch(text)
    if match is None:
        raise CursorUnknown(
            "this cursor is none of ours: give back the one of the last answer as it was, or none "
            "to begin with the oldest message"
        )
    return InboxPlace(*map(int, match.groups()))


def bounded(message: InboundMessage) -> InboundMessage:
    """The message as every store takes it: what is over a limit is cut off, what is none replaced.

    One that a store cannot take would be delivered again for ever. An id and a chat tell messages
    apart; those of a sane server are never cut.
    """
    name = message.sender_name
    return replace(
        message,
        message_id=MessageId(_storable(message.message_id, NAME_CHARS_MAX)),
        chat=_storable(message.chat, NAME_CHARS_MAX),
        sender=_storable(message.sender, NAME_CHARS_MAX),
        sender_name=None if name is None else _storable(name, NAME_CHARS_MAX),
        text=_storable(message.text, TEXT_CHARS_MAX),
        sent_at=message.sent_at if 0 <= message.sent_at < MOMENT_MAX else 0.0,
    )


def _storable(text: str, chars_max: int) -> str:
    # Half a character, which JSON can spell, is none.
    return text[:chars_max].encode(errors="replace").decode()
