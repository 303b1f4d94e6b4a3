"""The contract of `InboxStore`: received messages are written by account commits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio

from machine.ports import StaleWrite, StoreUnavailable
from machine.records import (
    MAIN_PART,
    AccountId,
    Grant,
    InboundMessage,
    InboxEntry,
    InboxPlace,
    MessageId,
    Stamp,
)
from tests.contracts.samples import (
    ANNA,
    AT,
    BELA,
    a_commit,
    a_message,
    acquire,
    an_account,
    an_inbound,
    create,
)
from tests.contracts.worlds import NETWORKED_ADAPTERS, SharedWorld


async def stocked(world: SharedWorld, *messages: InboundMessage) -> tuple[Grant, Stamp]:
    """A store with one account that has received these messages."""
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    return grant, await world.accounts.commit(a_commit(grant, stamp, inbound=messages))


async def read(
    world: SharedWorld,
    account_id: AccountId = ANNA,
    after: InboxPlace | None = None,
    count_max: int = 100,
) -> Sequence[InboxEntry]:
    return await world.inbox.list_inbox(account_id, after=after, count_max=count_max)


async def ids(world: SharedWorld, account_id: AccountId = ANNA) -> list[str]:
    return [entry.message.message_id for entry in await read(world, account_id)]


async def test_a_new_account_has_received_nothing(world: SharedWorld) -> None:
    await stocked(world)
    assert list(await read(world)) == []


async def test_a_received_message_comes_back_as_it_was_written(world: SharedWorld) -> None:
    full = an_inbound("A/1 ~\\`.", chat="1203-4@group/ü")
    bare = replace(an_inbound("m2"), sender_name=None)
    await stocked(world, full, bare)
    assert list(await read(world)) == [
        InboxEntry(InboxPlace(1, 2, 0), full),
        InboxEntry(InboxPlace(1, 2, 1), bare),
    ]


async def test_messages_are_read_in_the_order_in_which_they_were_stored(
    world: SharedWorld,
) -> None:
    grant, stamp = await stocked(world, an_inbound("z", at=AT + 9), an_inbound("a", at=AT))
    stamp = await world.accounts.commit(
        a_commit(grant, stamp, revision=10, inbound=[an_inbound("m", at=AT - 9)])
    )
    later = await acquire(world.lease, "b")
    await world.accounts.commit(a_commit(later, stamp, revision=3, inbound=[an_inbound("b")]))
    assert await ids(world) == ["z", "a", "m", "b"]


async def test_reading_on_from_a_place_neither_skips_nor_repeats(world: SharedWorld) -> None:
    grant, stamp = await stocked(world, *(an_inbound(f"m{number}") for number in range(5)))
    first = await read(world, count_max=2)
    assert [entry.message.message_id for entry in first] == ["m0", "m1"]
    rest = await read(world, after=first[-1].place)
    assert [entry.message.message_id for entry in rest] == ["m2", "m3", "m4"]
    assert list(await read(world, after=rest[-1].place)) == []
    await world.accounts.commit(a_commit(grant, stamp, revision=3, inbound=[an_inbound("new")]))
    assert [e.message.message_id for e in await read(world, after=rest[-1].place)] == ["new"]


async def test_the_first_text_stays_and_what_else_is_in_the_commit_is_written(
    world: SharedWorld,
) -> None:
    grant, stamp = await stocked(world, an_inbound("m1", text="first"))
    again = [an_inbound("m1", text="second"), an_inbound("m2"), an_inbound("m1", chat="49171")]
    stamp = await world.accounts.commit(
        a_commit(
            grant,
            stamp,
            revision=3,
            parts={MAIN_PART: b"keys of both"},
            new_messages=[a_message("out")],
            inbound=again,
        )
    )
    entries = await read(world)
    assert [(e.message.message_id, e.message.chat) for e in entries] == [
        ("m1", "491700000"),
        ("m2", "491700000"),
        ("m1", "49171"),
    ]
    assert entries[0] == InboxEntry(InboxPlace(1, 2, 0), an_inbound("m1", text="first"))
    copy = await world.accounts.fetch_account(ANNA)
    assert copy is not None
    assert copy.stamp == stamp
    assert copy.parts[MAIN_PART] == b"keys of both"
    assert await world.outbox.fetch_message(MessageId("out")) is not None


async def test_only_known_messages_still_leave_the_commits_keys(world: SharedWorld) -> None:
    grant, stamp = await stocked(world, an_inbound("m1"))
    await world.accounts.commit(
        a_commit(grant, stamp, revision=3, parts={MAIN_PART: b"new"}, inbound=[an_inbound("m1")])
    )
    assert await ids(world) == ["m1"]
    copy = await world.accounts.fetch_account(ANNA)
    assert copy is not None
    assert copy.parts[MAIN_PART] == b"new"


async def test_a_stale_commit_stores_no_message(world: SharedWorld) -> None:
    grant, stamp = await stocked(world)
    await world.accounts.commit(a_commit(grant, stamp, revision=3))
    with pytest.raises(StaleWrite):
        await world.accounts.commit(a_commit(grant, stamp, revision=4, inbound=[an_inbound("m1")]))
    assert await ids(world) == []


@pytest.mark.parametrize("adapter", NETWORKED_ADAPTERS)
async def test_a_commit_without_an_answer_stores_its_messages_once(world: SharedWorld) -> None:
    assert world.lost_replies is not None
    grant, stamp = await stocked(world)
    commit = a_commit(grant, stamp, revision=3, inbound=[an_inbound("m1"), an_inbound("m2")])
    async with world.lost_replies():
        with pytest.raises((StoreUnavailable, trio.TooSlowError)), trio.fail_after(2.0):
            await world.accounts.commit(commit)
    # The same object again, as often as it takes: a connection may have broken meanwhile.
    with trio.fail_after(20.0):
        while True:
            try:
                await world.accounts.commit(commit)
                break
            except StoreUnavailable:
                await trio.sleep(0.1)
    assert await ids(world) == ["m1", "m2"]


async def test_accounts_with_alike_names_keep_their_messages_apart(world: SharedWorld) -> None:
    grant, _ = await stocked(world, an_inbound("m1"))
    for name in ("anna2", "anna.", "ann"):
        other = AccountId(name)
        stamp = await create(world.accounts, grant, other)
        await world.accounts.commit(
            a_commit(
                grant,
                stamp,
                account=an_account(other),
                inbound=[an_inbound("m1", other, text=name)],
            )
        )
    for name in ("anna2", "anna.", "ann"):
        entries = await read(world, AccountId(name))
        assert [entry.message.text for entry in entries] == [name]
    assert len(await read(world)) == 1


async def test_purge_deletes_the_oldest_before_the_moment_at_most_so_many(
    world: SharedWorld,
) -> None:
    grant, _ = await stocked(
        world, *(an_inbound(f"m{number}", at=AT - 50 + 10 * number) for number in range(6))
    )
    stamp = await create(world.accounts, grant, BELA)
    await world.accounts.commit(
        a_commit(
            grant, stamp, account=an_account(BELA), inbound=[an_inbound("b", BELA, at=AT - 100)]
        )
    )
    assert await world.inbox.purge_inbox(grant, before=AT, count_max=0) == 0
    assert await world.inbox.purge_inbox(grant, before=AT, count_max=3) == 3
    assert await ids(world, BELA) == []
    assert await ids(world) == ["m2", "m3", "m4", "m5"]
    assert await world.inbox.purge_inbox(grant, before=AT, count_max=100) == 3
    assert await ids(world) == ["m5"]


async def test_an_old_holder_purges_no_received_message(world: SharedWorld) -> None:
    old, _ = await stocked(world, an_inbound("m1", at=AT - 100))
    await acquire(world.lease, "b")
    with pytest.raises(StaleWrite):
        await world.inbox.purge_inbox(old, before=AT, count_max=9)
    assert await ids(world) == ["m1"]


async def test_a_removed_accounts_received_messages_can_still_be_read(world: SharedWorld) -> None:
    grant, stamp = await stocked(world, an_inbound("m1"))
    await world.accounts.remove_account(grant, ANNA, stamp, purge=False)
    assert await ids(world) == ["m1"]
