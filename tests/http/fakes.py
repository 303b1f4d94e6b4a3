"""Hand-written stand-ins for the instance and its term, sharing one small world.

`World` is what the shared store is to the real ones: accounts, messages, the holder.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import trio

from daemon.http.auth import Tokens
from daemon.http.ports import ApiSettings
from machine.inbox import InboxPage, make_page, read_cursor
from machine.ports import StoreUnavailable
from machine.records import (
    PENDING_STATES,
    Account,
    AccountId,
    AccountStatus,
    Identity,
    InboundMessage,
    InboxEntry,
    InboxPlace,
    Message,
    MessageId,
    MessageState,
    Transition,
)
from machine.refusals import (
    AccountAlreadyExists,
    AccountNotFound,
    IdempotencyKeyReused,
    MessageNotFound,
    NotActive,
    Refusal,
)
from machine.states import State
from machine.views import AccountView, Holder, LeaseStatus, PairingCode, QrCode, RestoreReport

TOKEN = "a-token-nobody-may-see-7341"
NOW = 1_738_324_800.0


def settings(**changes: object) -> ApiSettings:
    given: dict[str, object] = {
        "tokens": Tokens((TOKEN,)),
        "version": "1.2.3",
        "bind": "127.0.0.1:0",
        "send_wait_s": 0.05,
        **changes,
    }
    return ApiSettings(**given)  # type: ignore[arg-type]  # fields by name, checked when built


def make_message_id(
    account_id: AccountId, idempotency_key: str | None, rng: random.Random
) -> MessageId:
    if idempotency_key is None:
        return MessageId(f"3EB0{rng.getrandbits(72):018X}")
    return MessageId(f"KEY-{account_id}-{idempotency_key}".replace(" ", "_"))


def an_account(account_id: str, status: AccountStatus = AccountStatus.CONNECTED) -> Account:
    return Account(
        account_id=AccountId(account_id),
        name=account_id.title(),
        status=status,
        created_at=NOW,
        updated_at=NOW,
        since=NOW,
        phone="4915123456789",
    )


@dataclass
class World:
    """What outlives a term: the accounts, the messages, and who holds the lease."""

    accounts: dict[str, Account] = field(default_factory=dict)
    messages: dict[str, Message] = field(default_factory=dict)
    received: list[InboundMessage] = field(default_factory=list)
    delivered: list[str] = field(default_factory=list)
    instances: list[FakeInstance] = field(default_factory=list)
    epoch: int = 0
    away: bool = False

    def activate(self, chosen: FakeInstance | None) -> None:
        """Give the lease to `chosen`, or to nobody."""
        self.epoch += 1
        for instance in self.instances:
            if instance.desk is not None and instance is not chosen:
                instance.desk.end()
                instance.desk = None
                instance.state = State.PASSIVE
        holder = None
        if chosen is not None:
            who = chosen.identity
            holder = Holder(who.name, who.incarnation, who.address, self.epoch)
            chosen.desk = FakeDesk(self, self.epoch)
            chosen.state = State.ACTIVE
        for instance in self.instances:
            instance.holder = holder
            instance.changed()

    def add(self, *accounts: Account) -> None:
        for account in accounts:
            self.accounts[account.account_id] = account


class FakeDesk:
    """Acks at once, unless `acks` is cleared. `refusal`, once set, is what every call raises."""

    def __init__(self, world: World, epoch: int) -> None:
        self.world = world
        self.epoch = epoch
        self.over = trio.Event()
        self.acks = True
        self.ends_as = MessageState.SERVER_ACK
        self.failure: str | None = None
        self.refusal: Exception | None = None
        self.hangs = False
        self.calls: list[str] = []
        self.asked_phone: str | None = None
        self.purges: list[bool] = []

    @property
    def outbox_depth(self) -> int:
        return sum(1 for m in self.world.messages.values() if m.state in PENDING_STATES)

    def end(self) -> None:
        self.over.set()

    async def _enter(self, call: str) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append(call)
        if self.over.is_set():
            raise NotActive("the term is over")
        if self.hangs:
            await self.over.wait()
            raise NotActive("the term is over")
        if self.refusal is not None:
            raise self.refusal

    def _view(self, account_id: str) -> AccountView:
        if account_id not in self.world.accounts:
            raise AccountNotFound(f"no account {account_id}; list them first")
        return AccountView(self.world.accounts[account_id], in_memory=True, queued=0)

    async def list_accounts(self) -> tuple[AccountView, ...]:
        await self._enter("list")
        return tuple(self._view(account_id) for account_id in self.world.accounts)

    async def account(self, account_id: AccountId) -> AccountView:
        await self._enter("account")
        return self._view(account_id)

    async def add_account(self, account_id: AccountId, name: str) -> AccountView:
        await self._enter("add")
        if account_id in self.world.accounts:
            raise AccountAlreadyExists(f"{account_id} is taken: choose another id")
        account = replace(an_account(account_id, AccountStatus.QR_READY), name=name, phone=None)
        self.world.add(account)
        return self._view(account_id)

    async def qr(self, account_id: AccountId) -> QrCode:
        await self._enter("qr")
        self._view(account_id)
        return QrCode("2@" + "x" * 200, NOW + 20)

    async def pairing_code(self, account_id: AccountId, phone: str) -> PairingCode:
        await self._enter("pairing_code")
        self._view(account_id)
        self.asked_phone = phone
        return PairingCode("ABCD1234", NOW + 60)

    async def reconnect(self, account_id: AccountId) -> AccountView:
        await self._enter("reconnect")
        return self._view(account_id)

    async def log_out(self, account_id: AccountId) -> AccountView:
        await self._enter("log_out")
        return self._view(account_id)

    async def repair(self, account_id: AccountId) -> AccountView:
        await self._enter("repair")
        return self._view(account_id)

    async def remove_account(self, account_id: AccountId, *, purge: bool) -> None:
        await self._enter("remove")
        self._view(account_id)
        self.purges.append(purge)
        del self.world.accounts[account_id]

    async def accept(
        self,
        *,
        message_id: MessageId,
        account_id: AccountId,
        to: str,
        text: str,
        idempotency_key: str | None,
    ) -> Message:
        await self._enter("accept")
        self._view(account_id)
        known = self.world.messages.get(message_id)
        if known is not None:
            if (known.to, known.text) != (to, text):
                raise IdempotencyKeyReused("this key belongs to another message")
            return known
        message = Message(
            message_id=message_id,
            account_id=account_id,
            to=to,
            text=text,
            state=MessageState.QUEUED,
            epoch=self.epoch,
            created_at=NOW,
            updated_at=NOW,
            idempotency_key=idempotency_key,
            state_at={MessageState.QUEUED: NOW},
        )
        self.world.messages[message_id] = message
        return message

    async def wait_progress(self, message_id: MessageId) -> Message:
        await self._enter("wait_progress")
        if not self.acks:
            self._move(message_id, MessageState.SENDING)
            await self.over.wait()
            raise NotActive("the term is over")
        self.world.delivered.append(message_id)
        return self._move(message_id, self.ends_as)

    def _move(self, message_id: MessageId, state: MessageState) -> Message:
        message = self.world.messages[message_id]
        moved = replace(
            message, state=state, error=self.failure, state_at={**message.state_at, state: NOW}
        )
        self.world.messages[message_id] = moved
        return moved

    async def message(self, message_id: MessageId) -> Message:
        await self._enter("message")
        if message_id not in self.world.messages:
            raise MessageNotFound(f"no message {message_id}")
        return self.world.messages[message_id]

    async def import_accounts(self, directory: str) -> Mapping[str, object]:
        await self._enter("import")
        return {"directory": directory, "imported": ["old"], "failed": []}


class FakeInstance:
    """An instance whose state the test sets."""

    def __init__(self, world: World, name: str = "a", address: str = "http://127.0.0.1:9") -> None:
        self.world = world
        self.identity = Identity(name, f"{name}-incarnation", address)
        self.state = State.PASSIVE
        self.since = NOW
        self.transitions: list[Transition] = []
        self.holder: Holder | None = None
        self.lease_status: LeaseStatus | None = None
        self.desk: FakeDesk | None = None
        self.restore_report: RestoreReport | None = None
        self.alive = True
        self.drains: list[str] = []
        self.step_downs: list[tuple[str, str | None]] = []
        self._changed = trio.Event()
        world.instances.append(self)

    def changed(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def at(self, address: str) -> None:
        self.identity = replace(self.identity, address=address)

    def request_drain(self, reason: str) -> None:
        self.drains.append(reason)
        self.state = State.DRAINING

    def request_step_down(self, reason: str, *, handoff_to: str | None = None) -> None:
        self.step_downs.append((reason, handoff_to))

    async def wait_changed(self) -> None:
        await self._changed.wait()

    async def list_accounts(self) -> tuple[AccountView, ...]:
        await trio.lowlevel.checkpoint()
        if self.world.away:
            raise StoreUnavailable("the store is away")
        return tuple(
            AccountView(account, in_memory=False, queued=0)
            for account in self.world.accounts.values()
        )

    async def list_inbox(self, account_id: AccountId, *, cursor: str, count_max: int) -> InboxPage:
        await trio.lowlevel.checkpoint()
        if self.world.away:
            raise StoreUnavailable("the store is away")
        place = read_cursor(cursor)
        if account_id not in self.world.accounts:
            raise AccountNotFound(f"no account {account_id}")
        entries = [
            InboxEntry(InboxPlace(1, 1, number), message)
            for number, message in enumerate(self.world.received)
            if message.account_id == account_id
            and (place is None or InboxPlace(1, 1, number) > place)
        ]
        return make_page(entries, cursor=cursor, count_max=count_max)


class Notes:
    """A journal that remembers."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, object]]] = []

    def __call__(self, event: str, /, **fields: object) -> None:
        self.said.append((event, fields))

    def names(self) -> list[str]:
        return [event for event, _ in self.said]


def every_refusal() -> list[type[Refusal]]:
    return [kind for kind in Refusal.__subclasses__() if kind is not NotActive]
