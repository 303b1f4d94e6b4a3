"""Small records to write, each with only what a test wants to say about it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from machine.ports import AccountStore, LeaseStore
from machine.records import (
    MAIN_PART,
    Account,
    AccountCommit,
    AccountCopy,
    AccountId,
    AccountStatus,
    Fence,
    Grant,
    InboundMessage,
    Lease,
    LeaseState,
    LeaseView,
    LeaseWrite,
    Message,
    MessageId,
    MessageState,
    PartName,
    Stamp,
    Version,
)

TTL_S = 15.0
AT = 1_700_000_000.25
MAIN = b"\x00main\xff"
SESSIONS = PartName("sessions-0")
ANNA = AccountId("anna")
BELA = AccountId("bela")

_numbers = itertools.count(1)


def a_lease(
    holder: str = "a", epoch: int = 1, nonce: str = "", state: LeaseState = LeaseState.HELD
) -> Lease:
    nonce = nonce or f"nonce-{next(_numbers)}"
    return Lease(holder, f"{holder}-1", epoch, nonce, TTL_S, state)


def a_fence(
    holder: str = "a", epoch: int = 1, state: LeaseState = LeaseState.HELD, reason: str = ""
) -> Fence:
    return Fence(epoch, holder, f"{holder}-1", f"http://{holder}:8080", state, reason=reason)


def acquisition(view: LeaseView, holder: str) -> LeaseWrite:
    """What a candidate writes that has read `view`."""
    epoch = view.fence.epoch + 1
    return LeaseWrite(
        a_lease(holder, epoch), a_fence(holder, epoch), view.lease_stamp, view.fence_stamp
    )


async def acquire(store: LeaseStore, holder: str = "a") -> Grant:
    """Make `holder` the holder of the next epoch."""
    view = await store.read()
    stamps = await store.write(acquisition(view, holder))
    assert stamps.fence_stamp is not None
    return Grant(view.fence.epoch + 1, holder, f"{holder}-1", stamps.fence_stamp)


def an_account(
    account_id: AccountId = ANNA, *, status: AccountStatus = AccountStatus.CONNECTED, name: str = ""
) -> Account:
    return Account(
        account_id,
        name or f"Name of {account_id}",
        status,
        created_at=AT,
        updated_at=AT + 1,
        since=AT + 2,
        phone="4915112345",
        last_error="408: lost",
        last_connected_at=AT + 3,
        banned_until=AT + 4,
        sessions_doubtful=True,
    )


def a_message(
    message_id: str,
    account_id: AccountId = ANNA,
    *,
    state: MessageState = MessageState.QUEUED,
    at: float = AT,
    epoch: int = 1,
) -> Message:
    return Message(
        MessageId(message_id),
        account_id,
        "491700000",
        f"text of {message_id} äöü 🙂\n\x00",
        state,
        epoch,
        created_at=at,
        updated_at=at + 0.5,
        idempotency_key=f"key-{message_id}",
        error=None,
        attempts=2,
        state_at={MessageState.QUEUED: at, state: at + 0.5},
    )


def an_inbound(
    message_id: str,
    account_id: AccountId = ANNA,
    *,
    chat: str = "491700000",
    text: str = "",
    at: float = AT,
) -> InboundMessage:
    return InboundMessage(
        account_id,
        MessageId(message_id),
        chat,
        sender="491711111",
        sender_name="Zoë 🙂",
        text=text or f"text of {message_id} äöü 🙂\n\x00",
        sent_at=at - 1,
        received_at=at,
    )


def a_commit(
    grant: Grant,
    stamp: Stamp,
    *,
    revision: int = 2,
    account: Account | None = None,
    parts: Mapping[PartName, bytes | None] | None = None,
    new_messages: Sequence[Message] = (),
    messages: Sequence[Message] = (),
    inbound: Sequence[InboundMessage] = (),
) -> AccountCommit:
    return AccountCommit(
        grant,
        f"commit-{next(_numbers)}",
        account if account is not None else an_account(),
        Version(grant.epoch, revision),
        stamp,
        parts if parts is not None else {},
        tuple(new_messages),
        tuple(messages),
        tuple(inbound),
    )


async def create(
    store: AccountStore,
    grant: Grant,
    account_id: AccountId = ANNA,
    parts: Mapping[PartName, bytes] | None = None,
) -> Stamp:
    """A new account at revision 1."""
    wanted = {MAIN_PART: MAIN} if parts is None else parts
    return await store.create_account(
        grant, an_account(account_id), Version(grant.epoch, 1), wanted
    )


def a_copy(
    account_id: AccountId = ANNA,
    *,
    epoch: int = 1,
    revision: int = 1,
    parts: Mapping[PartName, bytes] | None = None,
) -> AccountCopy:
    """A complete copy, as it is saved to the disk."""
    wanted = {MAIN_PART: MAIN, SESSIONS: b"s"} if parts is None else parts
    return AccountCopy(an_account(account_id), Version(epoch, revision), wanted, complete=True)
