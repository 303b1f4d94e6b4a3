"""One account's messages: accepted, waiting, in flight, settled. What it holds is durable already.

Lives here: order, limits, and who waits for what. Never lives here: a store (`machine.ledger`
writes) or a connection (`machine.session` sends).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import islice

import trio

from machine.records import PENDING_STATES, AccountId, Message, MessageId, MessageState
from machine.refusals import IdempotencyKeyReused, OutboxFull

_MESSAGE_ID = re.compile(r"3EB0[0-9A-F]{18}")
_ORDER = {state: rank for rank, state in enumerate(MessageState)}


def make_message_id(
    account_id: AccountId, idempotency_key: str | None, rng: random.Random
) -> MessageId:
    """Make a message's id, once, before anything else is done with it.

    With an idempotency key it follows from account and key, so every instance makes the same one.
    The form is that of WhatsApp Web's own ids: `3EB0` and 18 hexadecimal digits.
    """
    if idempotency_key is None:
        return MessageId(f"3EB0{rng.getrandbits(72):018X}")
    digest = hashlib.sha256(f"{account_id}\0{idempotency_key}".encode()).hexdigest()
    return MessageId(f"3EB0{digest[:18].upper()}")


def is_message_id(message_id: MessageId) -> bool:
    """Whether an id has the form that `make_message_id` gives: else it is none of ours."""
    return _MESSAGE_ID.fullmatch(message_id) is not None


def same_message(message: Message, *, account_id: AccountId, to: str, text: str) -> bool:
    """Whether a message says the same, to the same recipient."""
    return (message.account_id, message.to, message.text) == (account_id, to, text)


def moved(
    message: Message,
    state: MessageState,
    *,
    at: float,
    epoch: int,
    error: str | None = None,
    attempts: int | None = None,
) -> Message:
    """The message in a later state; every state keeps the time when it was first reached."""
    return replace(
        message,
        state=state,
        updated_at=at,
        epoch=epoch,
        error=error,
        attempts=message.attempts if attempts is None else attempts,
        state_at={state: at, **message.state_at},
    )


def is_progress(old: MessageState, new: MessageState) -> bool:
    """Whether `new` is further than `old`. `failed` and what the recipient did are final."""
    return old is not MessageState.FAILED and _ORDER[new] > _ORDER[old]


class AccountOutbox:
    """The pending messages of one account in order, and the last settled ones.

    Between calls: every pending message is in the shared store too; `pending` has at most
    `pending_max` entries, counting the places reserved by `reserve`.
    """

    def __init__(self, account_id: AccountId, *, pending_max: int, settled_kept: int) -> None:
        self.account_id = account_id
        self._pending_max = pending_max
        self._settled_kept = settled_kept
        self._pending: OrderedDict[MessageId, Message] = OrderedDict()
        self._settled: OrderedDict[MessageId, Message] = OrderedDict()
        self._reserved = 0
        self._untried: set[MessageId] = set()
        self._unrecorded: set[MessageId] = set()
        self._tried: dict[MessageId, str] = {}
        self._changed: dict[MessageId, trio.Event] = {}
        self._arrived = trio.Event()

    @property
    def depth(self) -> int:
        """How many messages are pending, those being accepted right now included."""
        return len(self._pending) + self._reserved

    @property
    def oldest_at(self) -> float | None:
        """When the message that has waited longest was accepted (wall clock)."""
        return next((message.created_at for message in self._pending.values()), None)

    @property
    def idle(self) -> bool:
        """Nothing is pending: what is accepted now can go out at once."""
        return self.depth == 0

    def find(self, message_id: MessageId) -> Message | None:
        """A message that is still in memory."""
        return self._pending.get(message_id) or self._settled.get(message_id)

    def latest(self, message: Message) -> Message:
        """`message` itself, or what is in memory of it where that is further: a receipt is."""
        known = self.find(message.message_id)
        if known is None or not is_progress(message.state, known.state):
            return message
        return known

    def find_same(self, message_id: MessageId, *, to: str, text: str) -> Message | None:
        """An earlier message with this id. Raises `IdempotencyKeyReused` when it says otherwise."""
        known = self.find(message_id)
        if known is not None:
            require_same(known, account_id=self.account_id, to=to, text=text)
        return known

    def reserve(self) -> None:
        """Keep a place for a message that is about to be written. Raises `OutboxFull`."""
        if self.depth >= self._pending_max:
            raise OutboxFull(
                f"account {self.account_id} has {self.depth} messages waiting, which is the limit; "
                "send again later, or see why the account is not connected",
                retry_after_s=5,
            )
        self._reserved += 1

    def accept(self, message: Message) -> None:
        """Put in a new message, which is durable now. It may be `sending` already, ahead of it."""
        if message.state is MessageState.SENDING:
            self._untried.add(message.message_id)
        self.put(message)

    def try_now(self, message: Message) -> None:
        """Note that a message goes to the connection in this instant."""
        self._untried.discard(message.message_id)
        # Last, also when it was tried before: the order is that of the wire.
        self._tried.pop(message.message_id, None)
        self._tried[message.message_id] = message.to
        self.put(message)

    def note_recorded(self, message_id: MessageId) -> tuple[Message, ...]:
        """The keys that sending it changed are durable, and so are those of all before it.

        Not those behind it: a receipt may say of one that its recipient has it, and its own ack,
        with the keys, still come to nothing. Answers those before it whose receipts can be stored
        now (see `in_doubt`).
        """
        to = self._tried.get(message_id)
        before: list[Message] = []
        for other, other_to in list(self._tried.items()) if to is not None else ():
            if other == message_id:
                del self._tried[other]
                break
            if other_to == to and other not in self._pending:
                del self._tried[other]
                settled = self._settled.get(other)
                if settled is not None:
                    before.append(settled)
        return tuple(before)

    def in_doubt(self, message_id: MessageId) -> bool:
        """Whether it went to a connection and the keys that this changed are not durable yet.

        A receipt for it is not stored before they are: a crash in between would leave a message
        that is settled, and its recipient's session with a key that was used, and nobody to know.
        """
        return message_id in self._tried

    def doubt(self, message: Message) -> None:
        """Have its recipient in doubt until `end_doubt`, though a receipt says that it has it."""
        self._tried[message.message_id] = message.to

    def end_doubt(self, message_id: MessageId) -> None:
        """What keeps its recipient's session from using a key twice is durable."""
        self._tried.pop(message_id, None)

    def queued_after(self, message_id: MessageId, count_max: int) -> tuple[Message, ...]:
        """The next messages in order that no connection has had and the store has as `queued`."""
        queued = (m for m in self._pending.values() if m.state is MessageState.QUEUED)
        return tuple(islice((m for m in queued if m.message_id != message_id), count_max))

    def note_acked(self, message_id: MessageId) -> None:
        """The server has it, and the record of that is on its way. `note_unrecorded` if that fails.

        Pending still, for nothing of it is durable; but not to be sent.
        """
        if message_id in self._pending:
            self._unrecorded.add(message_id)

    def note_unrecorded(self, message_id: MessageId) -> None:
        """The record of its ack came to nothing: it is to be sent again."""
        self._unrecorded.discard(message_id)
        self._arrived.set()

    @property
    def untried(self) -> tuple[Message, ...]:
        """Stored as `sending` when they were accepted, and never given to a connection."""
        return tuple(m for m in self._pending.values() if m.message_id in self._untried)

    def unreserve(self) -> None:
        """Give a place back: its message is in the outbox now, or was not written."""
        self._reserved -= 1

    def load(self, messages: Iterable[Message]) -> None:
        """Take over the pending messages of earlier terms, before any that came in since."""
        newer = self._pending
        self._pending = OrderedDict()
        for message in messages:
            if message.message_id not in newer and message.message_id not in self._settled:
                self._pending[message.message_id] = message
        self._pending.update(newer)
        self._arrived.set()

    def put(self, message: Message) -> None:
        """Note what is known of a message now, and wake whoever waits for it.

        A message only moves forward: a receipt that overtook the server's ack stays.
        """
        if self.latest(message) is not message:
            return
        if message.state in PENDING_STATES:
            self._pending[message.message_id] = message
            self._arrived.set()
        else:
            self._pending.pop(message.message_id, None)
            self._untried.discard(message.message_id)
            self._unrecorded.discard(message.message_id)
            self._settled[message.message_id] = message
            self._settled.move_to_end(message.message_id)
            while len(self._settled) > self._settled_kept:
                self._settled.popitem(last=False)
        changed = self._changed.pop(message.message_id, None)
        if changed is not None:
            changed.set()

    async def next_pending(self, besides: Collection[MessageId] = ()) -> Message:
        """Wait for the oldest message that is to be sent. It stays in the outbox."""
        while True:
            for message in self._pending.values():
                if message.message_id not in self._unrecorded and message.message_id not in besides:
                    return message
            self._arrived = trio.Event()
            await self._arrived.wait()

    async def wait_settled(self, message_id: MessageId) -> Message | None:
        """Wait until a message is not pending any more; `None` when it is not in memory."""
        while message_id in self._pending:
            await self._changed.setdefault(message_id, trio.Event()).wait()
        return self._settled.get(message_id)

    def doubtful_recipients(self) -> frozenset[str]:
        """Recipients that may have had a message which nobody recorded as sent.

        Also where a receipt says that they had it: its keys may have come to nothing all the same.
        """
        pending = (
            message.to
            for message in self._pending.values()
            if message.state is MessageState.SENDING and message.message_id not in self._untried
        )
        return frozenset((*pending, *self._tried.values()))


def require_same(message: Message, *, account_id: AccountId, to: str, text: str) -> None:
    """Raise `IdempotencyKeyReused` unless an earlier message under this id says the same."""
    if not same_message(message, account_id=account_id, to=to, text=text):
        raise IdempotencyKeyReused(
            f"this Idempotency-Key was used for another message ({message.message_id}); "
            "use a new key for a new message"
        )
