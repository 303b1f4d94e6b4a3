"""The contract of `LeaseStore`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from machine.ports import LeaseMissing, LeaseRefused, StoreUnavailable
from machine.records import (
    Fence,
    FenceChange,
    LeaseStamps,
    LeaseState,
    LeaseView,
    LeaseWrite,
    Stamp,
)
from tests.contracts.samples import a_fence, a_lease, acquire, acquisition
from tests.contracts.worlds import NETWORKED_ADAPTERS, Document, SharedWorld

SLACK_S = 0.1
CONTENDERS = 16


def same_documents(one: LeaseView, other: LeaseView) -> bool:
    """Whether nothing was written between the two reads."""
    return replace(one, age_s=0.0) == replace(other, age_s=0.0)


async def test_without_documents_a_read_is_missing_and_never_free(world: SharedWorld) -> None:
    with pytest.raises(LeaseMissing):
        await world.lease.read()


@pytest.mark.parametrize("which", ["lease", "fence"])
async def test_one_document_missing_is_missing(world: SharedWorld, which: Document) -> None:
    await world.lease.initialise()
    await world.delete_document(which)
    with pytest.raises(LeaseMissing):
        await world.lease.read()


@pytest.mark.parametrize("which", ["lease", "fence"])
async def test_initialise_does_not_complete_half_a_lease(
    world: SharedWorld, which: Document
) -> None:
    await world.lease.initialise()
    await world.delete_document(which)
    with pytest.raises(LeaseMissing):
        await world.lease.initialise()
    with pytest.raises(LeaseMissing):
        await world.lease.read()


async def test_write_to_a_missing_document_creates_nothing(world: SharedWorld) -> None:
    write = LeaseWrite(a_lease(), a_fence(), Stamp("1"), Stamp("1"))
    with pytest.raises((LeaseMissing, LeaseRefused)):
        await world.lease.write(write)
    with pytest.raises(LeaseMissing):
        await world.lease.read()


async def test_the_heartbeat_alone_is_the_same_lease(world: SharedWorld) -> None:
    with pytest.raises(LeaseMissing):
        await world.lease.read_heartbeat()
    await world.lease.initialise()
    await acquire(world.lease, "a")
    await world.age_lease(0.5)
    view, beat = await world.lease.read(), await world.lease.read_heartbeat()
    assert (beat.lease, beat.lease_stamp) == (view.lease, view.lease_stamp)
    assert view.age_s - SLACK_S <= beat.age_s <= view.age_s + 5.0
    stamps = await world.lease.write(
        LeaseWrite(lease=a_lease("a", nonce="again"), lease_stamp=beat.lease_stamp)
    )
    after = await world.lease.read_heartbeat()
    assert (after.lease.nonce, after.lease_stamp) == ("again", stamps.lease_stamp)
    assert after.age_s < beat.age_s


@pytest.mark.parametrize(("which", "there"), [("lease", False), ("fence", True)])
async def test_the_heartbeat_does_not_ask_for_the_fence(
    world: SharedWorld, which: Document, there: bool
) -> None:
    await world.lease.initialise(epoch=4)
    await world.delete_document(which)
    if there:
        assert (await world.lease.read_heartbeat()).lease.epoch == 4
    else:
        with pytest.raises(LeaseMissing):
            await world.lease.read_heartbeat()


async def test_initialise_makes_both_documents_released(world: SharedWorld) -> None:
    assert await world.lease.initialise(epoch=7)
    view = await world.lease.read()
    assert view.lease.state is LeaseState.RELEASED
    assert view.fence.state is LeaseState.RELEASED
    assert view.lease.epoch == view.fence.epoch == 7
    assert view.lease.holder == view.fence.holder == ""
    assert not view.fence.paused


async def test_initialise_again_touches_nothing(world: SharedWorld) -> None:
    await world.lease.initialise()
    await acquire(world.lease, "a")
    before = await world.lease.read()
    assert not await world.lease.initialise(epoch=99)
    assert same_documents(before, await world.lease.read())


async def test_every_field_comes_back_as_it_was_written(world: SharedWorld) -> None:
    await world.lease.initialise()
    view = await world.lease.read()
    lease = a_lease("b", 3, "nonce")
    changes = tuple(
        FenceChange(1_700_000_000.5 + n, n, LeaseState.HANDOFF, "operator", f"Grund {n} äöü")
        for n in range(20)
    )
    fence = Fence(
        epoch=3,
        holder="b",
        incarnation="b-1",
        address="http://[::1]:8080",
        state=LeaseState.HANDOFF,
        handoff_to="c",
        paused=True,
        settled=True,
        step_down_of=3,
        reason="maintenance",
        changed_by="operator",
        history=changes,
    )
    stamps = await world.lease.write(LeaseWrite(lease, fence, view.lease_stamp, view.fence_stamp))
    after = await world.lease.read()
    assert after.lease == lease
    assert after.fence == fence
    assert stamps == LeaseStamps(after.lease_stamp, after.fence_stamp)


async def test_writing_one_document_leaves_the_other_alone(world: SharedWorld) -> None:
    await world.lease.initialise()
    before = await world.lease.read()
    stamps = await world.lease.write(LeaseWrite(lease=a_lease(), lease_stamp=before.lease_stamp))
    assert stamps.fence_stamp is None
    middle = await world.lease.read()
    assert (middle.fence, middle.fence_stamp) == (before.fence, before.fence_stamp)
    assert middle.lease_stamp == stamps.lease_stamp != before.lease_stamp
    stamps = await world.lease.write(LeaseWrite(fence=a_fence(), fence_stamp=before.fence_stamp))
    assert stamps.lease_stamp is None
    after = await world.lease.read()
    assert (after.lease, after.lease_stamp) == (middle.lease, middle.lease_stamp)
    assert after.fence_stamp == stamps.fence_stamp != before.fence_stamp


@pytest.mark.parametrize("stale", ["lease", "fence"])
async def test_a_stale_precondition_is_refused_and_writes_nothing(
    world: SharedWorld, stale: Document
) -> None:
    await world.lease.initialise()
    old = await world.lease.read()
    if stale == "lease":
        await world.lease.write(LeaseWrite(lease=a_lease("x"), lease_stamp=old.lease_stamp))
    else:
        await world.lease.write(LeaseWrite(fence=a_fence("x"), fence_stamp=old.fence_stamp))
    before = await world.lease.read()
    with pytest.raises(LeaseRefused):
        await world.lease.write(acquisition(old, "late"))
    assert same_documents(before, await world.lease.read())


async def test_a_renewal_after_another_took_the_lease_is_refused(world: SharedWorld) -> None:
    await world.lease.initialise()
    await acquire(world.lease, "a")
    mine = await world.lease.read()
    await acquire(world.lease, "b")
    with pytest.raises(LeaseRefused):
        await world.lease.write(LeaseWrite(lease=a_lease("a"), lease_stamp=mine.lease_stamp))
    assert (await world.lease.read()).lease.holder == "b"


async def test_the_same_stamp_serves_once(world: SharedWorld) -> None:
    await world.lease.initialise()
    view = await world.lease.read()
    same = a_lease("a")
    await world.lease.write(LeaseWrite(lease=same, lease_stamp=view.lease_stamp))
    with pytest.raises(LeaseRefused):
        await world.lease.write(LeaseWrite(lease=same, lease_stamp=view.lease_stamp))


async def test_force_writes_both_under_the_fences_stamp_alone(world: SharedWorld) -> None:
    await world.lease.initialise()
    await acquire(world.lease, "a")
    view = await world.lease.read()
    # The holder goes on renewing; an operator's force must not lose that race for ever.
    await world.lease.write(LeaseWrite(lease=a_lease("a"), lease_stamp=view.lease_stamp))
    released = replace(view.fence, epoch=2, state=LeaseState.RELEASED)
    lease = a_lease("a", 2, state=LeaseState.RELEASED)
    await world.lease.write(LeaseWrite(lease, released, fence_stamp=view.fence_stamp))
    after = await world.lease.read()
    assert (after.lease, after.fence) == (lease, released)


async def test_sixteen_contenders_have_one_winner(world: SharedWorld) -> None:
    await world.lease.initialise()
    won: list[str] = []

    async def contend(name: str) -> None:
        view = await world.lease.read()
        have_read.append(name)
        if len(have_read) == CONTENDERS:
            all_have_read.set()
        await all_have_read.wait()
        try:
            await world.lease.write(acquisition(view, name))
        except LeaseRefused:
            return
        won.append(name)

    have_read: list[str] = []
    all_have_read = trio.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number in range(CONTENDERS):
                nursery.start_soon(contend, f"c{number}")
    assert len(won) == 1
    view = await world.lease.read()
    assert view.lease.holder == view.fence.holder == won[0]
    assert view.lease.epoch == view.fence.epoch == 1


async def test_age_grows_with_time_and_begins_again_at_a_write(world: SharedWorld) -> None:
    await world.lease.initialise()
    first = await world.lease.read()
    assert 0.0 <= first.age_s < 5.0
    await world.age_lease(0.5)
    later = await world.lease.read()
    assert later.age_s >= first.age_s + 0.5 - SLACK_S
    await world.lease.write(LeaseWrite(lease=a_lease(), lease_stamp=later.lease_stamp))
    assert (await world.lease.read()).age_s < later.age_s


async def test_a_change_of_the_fence_does_not_make_the_lease_younger(world: SharedWorld) -> None:
    await world.lease.initialise()
    await world.age_lease(0.5)
    view = await world.lease.read()
    await world.lease.write(LeaseWrite(fence=a_fence(), fence_stamp=view.fence_stamp))
    assert (await world.lease.read()).age_s >= view.age_s


@pytest.mark.parametrize("adapter", NETWORKED_ADAPTERS)
async def test_a_write_without_an_answer_is_recognised_by_reading(world: SharedWorld) -> None:
    assert world.lost_replies is not None
    await world.lease.initialise()
    write = acquisition(await world.lease.read(), "a")
    async with world.lost_replies():
        with pytest.raises((StoreUnavailable, trio.TooSlowError)), trio.fail_after(2.0):
            await world.lease.write(write)
    view = await world.lease.read()
    assert view.lease == write.lease
    assert view.fence == write.fence
    with pytest.raises(LeaseRefused):
        await world.lease.write(write)


async def test_the_watch_begins_with_the_present_fence(world: SharedWorld) -> None:
    await world.lease.initialise()
    await acquire(world.lease, "a")
    with trio.fail_after(10):
        async with world.lease.watch_fence() as changes:
            assert (await changes.receive()).holder == "a"


async def test_the_watch_tells_of_each_later_change(world: SharedWorld) -> None:
    await world.lease.initialise()
    with trio.fail_after(10):
        async with world.lease.watch_fence() as changes:
            await changes.receive()
            for holder in ("a", "b"):
                await acquire(world.lease, holder)
                while (await changes.receive()).holder != holder:
                    pass


async def test_the_watch_keeps_the_newest_for_a_slow_reader(world: SharedWorld) -> None:
    await world.lease.initialise()
    with trio.fail_after(20):
        async with world.lease.watch_fence() as changes:
            assert (await changes.receive()).epoch == 0
            for number in range(5):
                await acquire(world.lease, f"h{number}")
                # Long enough for each to arrive while nobody reads.
                await trio.sleep(0.06)
            told = 0
            while told != 5:
                epoch = (await changes.receive()).epoch
                assert epoch >= told
                told = epoch


async def test_the_watch_waits_for_a_fence_that_is_not_there_yet(world: SharedWorld) -> None:
    with trio.fail_after(20):
        async with world.lease.watch_fence() as changes:
            await world.lease.initialise()
            await acquire(world.lease, "a")
            while (await changes.receive()).holder != "a":
                pass


async def test_renewals_do_not_stir_the_watch(world: SharedWorld) -> None:
    await world.lease.initialise()
    with trio.fail_after(10):
        async with world.lease.watch_fence() as changes:
            await changes.receive()
            view = await world.lease.read()
            await world.lease.write(LeaseWrite(lease=a_lease(), lease_stamp=view.lease_stamp))
            with trio.move_on_after(0.2) as quiet:
                await changes.receive()
            assert quiet.cancelled_caught


async def test_an_error_in_the_watchs_block_leaves_it_as_it_is(world: SharedWorld) -> None:
    with pytest.raises(KeyError):
        async with world.lease.watch_fence():
            raise KeyError
