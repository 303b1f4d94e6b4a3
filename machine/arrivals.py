"""What comes in on one account's connections: keys, received messages, receipts, asked bodies.

Nothing here waits for a store: it goes to the account's ledger, which tells when it is durable.

Never lives here: the connection's own life (`machine.session`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import trio

from machine.closes import RESTRICTED
from machine.inbox import bounded
from machine.ledger import Ledger
from machine.limits import Limits
from machine.old_messages import LookingTerm, OldMessages
from machine.outbox import AccountOutbox, is_progress, moved
from machine.ports import BodyAsked, KeysChanged, MessageProgressed, MessageReceived, Ports
from machine.records import (
    PENDING_STATES,
    Grant,
    KeyChange,
    KeyName,
    Message,
    MessageId,
    MessageState,
)

UNSTORED_MAX = 1000
"""Received messages that wait for their commit. Over it the connection is not read on: the server
hears of no arrival, and keeps what is to come."""

Failed = Callable[[Exception], None]
"""Told when a change was not stored: the connection must end, and the server tells it again."""


class ArrivalsTerm(LookingTerm, Protocol):
    """What arrivals need of their term."""

    grant: Grant


class Arrivals:
    """Takes what a connection tells to the ledger and the outbox, in order.

    Between calls: of a pairing, nothing was handed on before a phone confirmed it.
    """

    def __init__(
        self,
        ledger: Ledger,
        outbox: AccountOutbox,
        *,
        term: ArrivalsTerm,
        ports: Ports,
        limits: Limits,
    ) -> None:
        self._ledger = ledger
        self._outbox = outbox
        self._term = term
        self._ports = ports
        self._old = OldMessages(outbox, term=term, ports=ports, limits=limits)
        self._unstored = 0
        self._stored_one = trio.Event()
        self._unconfirmed: dict[KeyName, bytes | None] | None = None
        self._confirmed = False
        self._restricted = False

    def begin(self, *, pairing: bool) -> None:
        """A new connection is opened. What an interrupted pairing has made until now is gone."""
        self._unconfirmed = {} if pairing else None
        self._confirmed = self._restricted = False

    def confirm(self) -> None:
        """A phone has scanned: what comes next completes the new identity."""
        self._confirmed = True

    def change_keys(self, event: KeysChanged, failed: Failed) -> None:
        """Have keys stored. Those of a pairing all at once: half an identity would be opened."""
        change = event.change
        if self._unconfirmed is not None:
            self._unconfirmed.update(change.values)
            if not self._confirmed:
                event.stored.set()
                return
            change, self._unconfirmed = KeyChange(self._unconfirmed), None
        self._ledger.post(keys=change, applied=event.stored.set, failed=failed)

    async def receive(self, event: MessageReceived, failed: Failed) -> None:
        """Have a received message stored, with its keys. Waits while too many are waiting."""
        while self._unstored >= UNSTORED_MAX:
            self._stored_one = trio.Event()
            await self._stored_one.wait()
        message = bounded(event.message)
        self._unstored += 1

        def gone() -> None:
            self._unstored -= 1
            self._stored_one.set()

        def applied() -> None:
            gone()
            event.stored.set()
            self._ports.journal.note(
                "message.received",
                account_id=message.account_id,
                message_id=message.message_id,
            )

        def not_stored(error: Exception) -> None:
            gone()
            failed(error)

        self._ledger.post(keys=event.keys, inbound=(message,), applied=applied, failed=not_stored)

    def progress(self, event: MessageProgressed) -> None:
        """A receipt: store how far the message has come, unless it was further already.

        After a failover the message is in the store only: it is looked up.
        """

        def found(known: Message | None) -> None:
            if known is None or not is_progress(known.state, event.state):
                return
            further = moved(
                known,
                event.state,
                at=self._ports.clocks.wall(),
                epoch=self._term.grant.epoch,
                error=event.error,
            )
            self._take(known, further)
            if event.state is MessageState.FAILED:
                self.tell_failed(event.message_id, event.error or "the server said no more")

        self._old.look_up(event.message_id, found)

    def _take(self, known: Message, further: Message) -> None:
        """Put a receipt in, and have it stored; not before the keys that its message changed."""
        if self._outbox.in_doubt(known.message_id):
            self._outbox.put(further)
            return
        applied = None
        if known.state in PENDING_STATES:
            # Sent in an earlier term. What dropped its recipient's session is queued before this.
            self._outbox.doubt(known)
            applied = partial(self._end_doubt, further)
        self._outbox.put(further)
        self._ledger.post(messages=(further,), applied=applied)

    def _end_doubt(self, stored: Message) -> None:
        self._outbox.end_doubt(stored.message_id)
        latest = self._outbox.latest(stored)
        if latest is not stored:
            self._ledger.post(messages=(latest,))

    def tell_failed(self, message_id: MessageId, cause: str) -> None:
        """Tell that a message failed for good; once a connection, that its account may not send."""
        told = {"account_id": self._outbox.account_id, "message_id": message_id}
        self._ports.journal.note("message.failed", **told, cause=cause)
        if cause.startswith(f"refused_{RESTRICTED}") and not self._restricted:
            self._restricted = True
            self._ports.journal.note("account.restricted", **told)

    def give_body(self, event: BodyAsked) -> None:
        """Answer with a message's text, from memory or the store; with `None` if neither has it."""
        self._old.look_up(
            event.message_id,
            lambda known: event.answer(None if known is None else known.text),
        )
