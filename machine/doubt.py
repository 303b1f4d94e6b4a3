"""Whether an account's Signal sessions may be older than what was on the wire. Pure.

Opened with older sessions, everything after a ratchet step is unreadable, both ways; opened
without any, nothing is (WHATSAPP.md, fact 5). So where doubt remains, all sessions of the account
are dropped; what that costs is one key exchange for each contact.

Never lives here: dropping them (the connector), remembering the doubt (`machine.ledger`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from machine.limits import Durability


class Source(Enum):
    """Where an account's bytes are taken from."""

    SHARED = "the shared store"
    DISK = "this disk"
    EQUAL = "this disk (same version in the shared store)"
    NEITHER = "neither copy"


class SharedCopy(Enum):
    """What is known of an account's copy in the shared store."""

    LISTED = "listed"
    MISSING = "the store was listed, and does not have it"
    UNKNOWN = "the store could not be listed: this account is read alone before it is opened"


@dataclass(frozen=True, slots=True)
class LastTerm:
    """How the term before this one ended.

    `settled`: its holder gave the lease back, and the shared store had everything. `here`: it was
    held with this very disk.
    """

    settled: bool = True
    here: bool = True


ONLY_DISK = "only this disk has it; the shared store may have had newer keys"
NOT_SETTLED = (
    "the last term ended without handing over everything, and its keys counted when the holder's "
    "disk had them; that disk may have newer ones"
)


def doubt_sessions(
    source: Source, *, shared: SharedCopy, on_disk: bool, durability: Durability, last: LastTerm
) -> str | None:
    """Why the sessions of a copy from `source` may be old; `None` when they are not.

    `on_disk`: this disk has a readable copy of the account too. With durability `remote` the shared
    store has every key that ever counted, so only a copy that it lost is in doubt.
    """
    if source is Source.NEITHER:
        return None
    if source is Source.DISK and shared is SharedCopy.MISSING:
        return ONLY_DISK
    if durability is Durability.REMOTE or last.settled:
        return None
    if source is Source.DISK and shared is SharedCopy.LISTED:
        # Only the disk of who held the lease last is ahead of the shared store.
        return None
    if last.here and on_disk:
        return None
    return NOT_SETTLED
