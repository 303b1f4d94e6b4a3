"""The contract of `OutboxStore`: messages are written by account commits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from machine.ports import StaleWrite
from machine.records import Grant, Message, MessageId, MessageState, Stamp
from tests.contracts.samples import (
    ANNA,
    AT,
    BELA,
    a_commit,
    a_message,
    acquire,
    an_account,
    create,
)
from tests.contracts.worlds import SharedWorld


async def stocked(world: SharedWorld, *messages: Message) -> tuple[Grant, Stamp]:
    """A store with one account and these messages."""
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    return grant, await world.accounts.commit(a_commit(grant, stamp, new_messages=messages))


async def test_a_new_store_has_no_messages(world: SharedWorld) -> None:
    assert list(await world.outbox.list_pending()) == []
    assert await world.outbox.fetch_message(MessageId("m1")) is None


async def test_a_message_comes_back_as_it_was_written(world: SharedWorld) -> None:
    full = replace(a_message("m1"), error="463: restricted", idempotency_key="Ключ / \\ ~")
    bare = Message(MessageId("m2"), ANNA, "49170", "", MessageState.QUEUED, 1, AT, AT)
    await stocked(world, full, bare)
    assert await world.outbox.fetch_message(MessageId("m1")) == full
    assert await world.outbox.fetch_message(MessageId("m2")) == bare


async def test_a_written_message_replaces_what_was_there(world: SharedWorld) -> None:
    grant, stamp = await stocked(world, a_message("m1"))
    further = a_message("m1", state=MessageState.DELIVERED)
    await world.accounts.commit(a_commit(grant, stamp, revision=3, messages=[further]))
    assert await world.outbox.fetch_message(MessageId("m1")) == further


async def test_pending_are_the_queued_and_sending_oldest_first(world: SharedWorld) -> None:
    states = list(MessageState)
    messages = [
        a_message(f"m{number}", state=state, at=AT - number) for number, state in enumerate(states)
    ]
    grant, _ = await stocked(world, *messages)
    stamp = await create(world.accounts, grant, BELA)
    other = a_message("m-bela", BELA, at=AT - 0.5)
    await world.accounts.commit(
        a_commit(grant, stamp, account=an_account(BELA), new_messages=[other])
    )
    pending = [message.message_id for message in await world.outbox.list_pending()]
    assert pending == ["m1", "m-bela", "m0"]


async def test_purge_deletes_settled_messages_before_the_moment_only(world: SharedWorld) -> None:
    old = [
        a_message("old-failed", state=MessageState.FAILED, at=AT - 100),
        a_message("old-ack", state=MessageState.SERVER_ACK, at=AT - 100),
        a_message("old-read", state=MessageState.READ, at=AT - 100),
    ]
    kept = [
        a_message("old-queued", at=AT - 100),
        a_message("old-sending", state=MessageState.SENDING, at=AT - 100),
        a_message("new", state=MessageState.READ, at=AT + 100),
    ]
    grant, _ = await stocked(world, *old, *kept)
    assert await world.outbox.purge_messages(grant, before=AT, count_max=100) == 3
    for message in old:
        assert await world.outbox.fetch_message(message.message_id) is None
    for message in kept:
        assert await world.outbox.fetch_message(message.message_id) == message
    assert await world.outbox.purge_messages(grant, before=AT, count_max=100) == 0


async def test_purge_deletes_at_most_what_it_may(world: SharedWorld) -> None:
    messages = [
        a_message(f"m{number}", state=MessageState.READ, at=AT - 100 + number)
        for number in range(5)
    ]
    grant, _ = await stocked(world, *messages)
    assert await world.outbox.purge_messages(grant, before=AT, count_max=2) == 2
    assert await world.outbox.purge_messages(grant, before=AT, count_max=0) == 0
    assert await world.outbox.purge_messages(grant, before=AT, count_max=9) == 3


async def test_an_old_holder_purges_nothing(world: SharedWorld) -> None:
    old, _ = await stocked(world, a_message("m1", state=MessageState.READ, at=AT - 100))
    await acquire(world.lease, "b")
    with pytest.raises(StaleWrite):
        await world.outbox.purge_messages(old, before=AT, count_max=9)
    assert await world.outbox.fetch_message(MessageId("m1")) is not None


async def test_a_removed_accounts_messages_can_still_be_looked_up(world: SharedWorld) -> None:
    grant, stamp = await stocked(world, a_message("m1", state=MessageState.READ))
    await world.accounts.remove_account(grant, ANNA, stamp, purge=False)
    assert await world.outbox.fetch_message(MessageId("m1")) is not None
