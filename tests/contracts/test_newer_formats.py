"""What a newer release wrote is refused with what to do, and nothing of ours goes over it.

A store may refuse the one record (Firestore), or everything that it is in a file with (SQLite).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable
from typing import TypeVar

import pytest
import trio

from machine.ports import (
    LeaseRefused,
    StaleWrite,
    StoreMisconfigured,
)
from machine.records import AccountCopy, Grant, LeaseWrite, MessageState, Stamp
from tests.contracts.samples import (
    ANNA,
    AT,
    BELA,
    a_commit,
    a_lease,
    a_message,
    acquire,
    acquisition,
    an_inbound,
    create,
)
from tests.contracts.worlds import Document, SharedWorld

WHAT_TO_DO = r"(?s)(newer.*(2|3).*|(2|3).*newer.*)([Ss]tart an instance|Run that release)"
"""The number found is above the one read (2 in SQLite files, 1 elsewhere)."""

T = TypeVar("T")


async def unless_refused(answer: Awaitable[T]) -> T | None:
    """The answer; `None` where everything is refused that is in one file with a newer record."""
    refusal: StoreMisconfigured | None = None
    try:
        return await answer
    except StoreMisconfigured as error:
        refusal = error
    assert re.search(WHAT_TO_DO, str(refusal)), refusal
    return None


async def test_a_newer_lease_is_not_read_and_not_taken(world: SharedWorld) -> None:
    await world.lease.initialise()
    await acquire(world.lease, "b")
    view = await world.lease.read()
    await world.make_newer("lease", "")
    before = await world.dump()
    with pytest.raises(StoreMisconfigured, match=WHAT_TO_DO):
        await world.lease.read()
    with pytest.raises(StoreMisconfigured, match=WHAT_TO_DO):
        await world.lease.read_heartbeat()
    renewal = LeaseWrite(lease=a_lease("b", view.lease.epoch), lease_stamp=view.lease_stamp)
    for write in (acquisition(view, "a"), renewal):
        with pytest.raises((LeaseRefused, StoreMisconfigured)):
            await world.lease.write(write)
    assert await world.dump() == before


async def test_a_newer_fence_is_not_read_and_not_written(world: SharedWorld) -> None:
    await world.lease.initialise()
    await acquire(world.lease, "b")
    view = await world.lease.read()
    await world.make_newer("fence", "")
    before = await world.dump()
    with pytest.raises(StoreMisconfigured, match=WHAT_TO_DO):
        await world.lease.read()
    with pytest.raises((LeaseRefused, StoreMisconfigured)):
        await world.lease.write(acquisition(view, "a"))
    assert await world.dump() == before


@pytest.mark.parametrize("which", ["lease", "fence"])
async def test_initialise_leaves_a_newer_lease_alone(world: SharedWorld, which: Document) -> None:
    await world.lease.initialise()
    await world.make_newer(which, "")
    before = await world.dump()
    assert not await unless_refused(world.lease.initialise(epoch=7))
    assert await world.dump() == before


async def test_whom_to_forward_to_is_heard_of_a_newer_fence(world: SharedWorld) -> None:
    await world.lease.initialise()
    await acquire(world.lease, "b")
    async with world.lease.watch_fence() as fences:
        with trio.fail_after(10):
            assert (await fences.receive()).holder == "b"
        await world.make_newer("fence", "")
    async with world.lease.watch_fence() as fences:
        with trio.fail_after(10):
            fence = await fences.receive()
    assert (fence.epoch, fence.holder, fence.address) == (1, "b", "http://b:8080")
    assert fence.history == ()


async def one_account(world: SharedWorld) -> tuple[Grant, Stamp]:
    await world.lease.initialise()
    grant = await acquire(world.lease, "a")
    stamp = await create(world.accounts, grant)
    message = a_message("m1", state=MessageState.SERVER_ACK)
    pending = a_message("m2")
    commit = a_commit(
        grant, stamp, new_messages=[message, pending], inbound=[an_inbound("i1"), an_inbound("i2")]
    )
    return grant, await world.accounts.commit(commit)


async def test_a_newer_account_is_listed_as_such_and_not_written_over(world: SharedWorld) -> None:
    grant, stamp = await one_account(world)
    await world.make_newer("account", ANNA)
    before = await world.dump()
    listing = await unless_refused(world.accounts.list_accounts())
    fetched = await unless_refused(world.accounts.fetch_account(ANNA))
    assert (listing is None) is (fetched is None)
    if listing is not None and fetched is not None:
        said_newer(*listing.copies, fetched)
    with pytest.raises((StaleWrite, StoreMisconfigured)):
        await world.accounts.commit(a_commit(grant, stamp, revision=9))
    seal = world.accounts.seal([a_commit(grant, stamp, revision=9)])
    assert await unless_refused(seal) in (None, [None])
    assert await world.dump() == before


def said_newer(*copies: AccountCopy) -> None:
    for copy in copies:
        assert (copy.account.account_id, copy.newer) == (ANNA, True)
        assert copy.fault is not None
        assert re.search(WHAT_TO_DO, copy.fault), copy.fault


async def test_another_account_is_read_beside_a_newer_one_or_neither(world: SharedWorld) -> None:
    grant, _ = await one_account(world)
    await create(world.accounts, grant, BELA)
    await world.make_newer("account", ANNA)
    listing = await unless_refused(world.accounts.list_accounts())
    if listing is not None:
        newer = {copy.account.account_id: copy.newer for copy in listing.copies}
        assert newer == {ANNA: True, BELA: False}


async def test_a_newer_message_stays_as_it_is(world: SharedWorld) -> None:
    grant, stamp = await one_account(world)
    for message_id in ("m1", "m2"):
        await world.make_newer("message", message_id)
    before = await world.dump()
    assert await unless_refused(world.outbox.list_pending()) in (None, [])
    for message_id in ("m1", "m2"):
        with pytest.raises(StoreMisconfigured, match=WHAT_TO_DO):
            await world.outbox.fetch_message(a_message(message_id).message_id)
    with pytest.raises(StoreMisconfigured):
        # `MessageExists` would hand on what cannot be read.
        await world.accounts.commit(a_commit(grant, stamp, new_messages=[a_message("m1")]))
    purge = world.outbox.purge_messages(grant, before=AT + 99, count_max=9)
    assert await unless_refused(purge) in (None, 0)
    assert await world.dump() == before


async def test_a_newer_received_message_hides_no_other(world: SharedWorld) -> None:
    await one_account(world)
    await world.make_newer("inbox", "i1")
    before = await world.dump()
    entries = await unless_refused(world.inbox.list_inbox(ANNA, after=None, count_max=9))
    if entries is not None:
        assert [entry.message.message_id for entry in entries] == ["i2"]
    assert await world.dump() == before
