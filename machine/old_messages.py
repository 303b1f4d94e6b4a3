"""An account's messages that are in the store and not in memory any more, looked up when needed.

What the other side sends decides how often that is, so it is bounded: one look at a time for each
account, a limit on those that wait, and an id that the store does not know is asked for once.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from machine.limits import Limits
from machine.outbox import AccountOutbox, is_message_id
from machine.places import Places
from machine.ports import Ports, StoreUnavailable
from machine.records import Message, MessageId

WAITING_MAX = 200
"""Looks that wait, of one account. Over it a receipt is dropped: the message's state then stays
behind until the next one; and a body that is asked for is not given."""
UNKNOWN_MAX = 1000
"""Ids that the store does not know, remembered by one account: mostly sent from the phone."""


class LookingTerm(Protocol):
    """What looking needs of its term."""

    reading: Places

    def spawn(self, work: Callable[[], Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Look:
    message_id: MessageId
    found: Callable[[Message | None], None]


class OldMessages:
    """Looks of one account. Each ends with one call of its `found`, or with the term."""

    def __init__(
        self, outbox: AccountOutbox, *, term: LookingTerm, ports: Ports, limits: Limits
    ) -> None:
        self._outbox = outbox
        self._term = term
        self._ports = ports
        self._limits = limits
        self._waiting: deque[_Look] = deque()
        self._looking = False
        self._unknown: OrderedDict[MessageId, None] = OrderedDict()

    def look_up(self, message_id: MessageId, found: Callable[[Message | None], None]) -> None:
        """Have `found` called with the message, or with `None`: not known, or not readable now."""
        known = self._outbox.find(message_id)
        if known is not None or not is_message_id(message_id) or message_id in self._unknown:
            found(known)
        elif len(self._waiting) >= WAITING_MAX:
            self._ports.journal.note(
                "message.look_dropped", account_id=self._outbox.account_id, message_id=message_id
            )
            found(None)
        else:
            self._waiting.append(_Look(message_id, found))
            if not self._looking:
                self._looking = True
                self._term.spawn(self._look)

    async def _look(self) -> None:
        try:
            while self._waiting:
                look = self._waiting.popleft()
                known = self._outbox.find(look.message_id)
                if known is None and look.message_id not in self._unknown:
                    known = await self._fetch(look)
                look.found(known)
        finally:
            self._looking = False

    async def _fetch(self, look: _Look) -> Message | None:
        try:
            async with self._term.reading.hold(0.0):
                with trio.fail_after(self._limits.store_try_s):
                    message = await self._ports.outbox.fetch_message(look.message_id)
        except (StoreUnavailable, trio.TooSlowError):
            return None
        if message is not None and message.account_id == self._outbox.account_id:
            return message
        self._unknown[look.message_id] = None
        while len(self._unknown) > UNKNOWN_MAX:
            self._unknown.popitem(last=False)
        return None
