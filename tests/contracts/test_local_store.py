"""The contract of `LocalStore`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from machine.ports import LocalStore, StaleWrite
from machine.records import (
    MAIN_PART,
    AccountCommit,
    AccountCopy,
    AccountId,
    AccountStatus,
    Grant,
    Listing,
    PartName,
    Stamp,
    Transition,
    Version,
)
from tests.contracts.samples import (
    ANNA,
    BELA,
    MAIN,
    SESSIONS,
    a_commit,
    a_copy,
    an_account,
)
from tests.contracts.worlds import LocalWorld

REST = PartName("rest.7")


def one(listing: Listing, account_id: AccountId = ANNA) -> AccountCopy:
    (found,) = [copy for copy in listing.copies if copy.account.account_id == account_id]
    return found


def as_listed(copy: AccountCopy) -> AccountCopy:
    parts = {name: data for name, data in copy.parts.items() if name == MAIN_PART}
    return replace(copy, parts=parts, complete=parts == copy.parts)


async def whole(store: LocalStore) -> AccountCopy:
    """Anna's copy, of which the listing holds the main part alone."""
    copy = await store.fetch_account(ANNA)
    assert copy is not None
    assert one(await store.list_accounts()) == as_listed(copy)
    return copy


def at(epoch: int, revision: int, **changes: object) -> AccountCommit:
    grant = Grant(epoch, "a", "a-1", Stamp("1"))
    return a_commit(grant, Stamp("1"), revision=revision, **changes)  # type: ignore[arg-type]


async def test_a_new_disk_is_empty(disk: LocalWorld) -> None:
    async with disk.open() as store:
        assert await store.list_accounts() == Listing(())
        assert await store.fetch_account(ANNA) is None
        assert await store.highest_epoch() == 0
        assert list(await store.list_transitions(10)) == []


async def test_a_saved_copy_comes_back_also_after_a_restart(disk: LocalWorld) -> None:
    copy = replace(a_copy(parts={MAIN_PART: MAIN, REST: bytes(1000)}), commit_id="c7")
    async with disk.open() as store:
        await store.save_account(replace(copy, stamp=Stamp("of the shared store")))
        assert await store.list_accounts() == Listing((as_listed(copy),))
        assert await store.fetch_account(ANNA) == copy
    async with disk.open() as store:
        assert await store.list_accounts() == Listing((as_listed(copy),))
        assert await store.fetch_account(ANNA) == copy


async def test_a_listed_copy_has_its_main_part_and_says_whether_there_are_others(
    disk: LocalWorld,
) -> None:
    main = {MAIN_PART: MAIN}
    async with disk.open() as store:
        await store.save_account(a_copy(parts=main))
        alone = one(await store.list_accounts())
        assert (alone.parts, alone.complete) == (main, True)
        await store.apply(at(1, 2, parts={MAIN_PART: MAIN, SESSIONS: b"s"}))
        beside = one(await store.list_accounts())
        assert (beside.parts, beside.complete) == (main, False)
        await store.apply(at(1, 3, parts={SESSIONS: None}))
        assert one(await store.list_accounts()).complete
        assert (await whole(store)).parts == main


async def test_a_commit_of_plain_fields_keeps_every_part(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy())
        await store.apply(at(1, 2, account=an_account(status=AccountStatus.BANNED)))
        copy = await whole(store)
        assert copy.account.status is AccountStatus.BANNED
        assert copy.parts == a_copy().parts


async def test_a_commit_that_deletes_every_part_leaves_none(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy())
        await store.apply(at(1, 2, parts={MAIN_PART: None, SESSIONS: None}))
        copy = await whole(store)
        assert (copy.parts, copy.complete) == ({}, True)


async def test_a_copy_without_keys_is_kept(disk: LocalWorld) -> None:
    bare = replace(
        a_copy(parts={}),
        account=replace(an_account(), phone=None, last_error=None, last_connected_at=None),
    )
    async with disk.open() as store:
        await store.save_account(bare)
    async with disk.open() as store:
        assert await store.list_accounts() == Listing((bare,))


async def test_the_mark_of_a_removed_account_is_kept(disk: LocalWorld) -> None:
    mark = replace(a_copy(parts={}), removed=True)
    async with disk.open() as store:
        await store.save_account(mark)
    async with disk.open() as store:
        assert (await whole(store)).removed


async def test_an_older_copy_never_overwrites_a_newer(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy(epoch=3, revision=5))
        for epoch, revision in ((3, 4), (2, 99)):
            with pytest.raises(StaleWrite):
                await store.save_account(a_copy(epoch=epoch, revision=revision, parts={}))
        assert await whole(store) == a_copy(epoch=3, revision=5)


async def test_a_newer_epoch_overwrites_though_its_revision_is_lower(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy(epoch=3, revision=5))
        newer = a_copy(epoch=4, revision=1, parts={MAIN_PART: b"new"})
        await store.save_account(newer)
        assert await whole(store) == newer


async def test_saving_the_same_version_again_is_no_error(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy())
        await store.save_account(a_copy(parts={MAIN_PART: b"again"}))
        assert (await whole(store)).parts == {MAIN_PART: b"again"}


async def test_a_commit_is_applied_to_the_copy_also_after_a_restart(disk: LocalWorld) -> None:
    new = PartName("new")
    account = an_account(status=AccountStatus.BANNED)
    commit = at(1, 2, account=account, parts={MAIN_PART: b"2", SESSIONS: None, new: b"n"})
    wanted = AccountCopy(
        account,
        Version(1, 2),
        {MAIN_PART: b"2", REST: b"r", new: b"n"},
        complete=True,
        commit_id=commit.commit_id,
    )
    async with disk.open() as store:
        await store.save_account(a_copy(parts={MAIN_PART: MAIN, SESSIONS: b"s", REST: b"r"}))
        await store.apply(commit)
        assert await whole(store) == wanted
    async with disk.open() as store:
        assert await whole(store) == wanted


async def test_many_commits_add_up(disk: LocalWorld) -> None:
    # More than are kept beside a copy before they are folded into it, in number and in bytes.
    parts: dict[PartName, bytes] = {MAIN_PART: MAIN}
    async with disk.open() as store:
        await store.save_account(a_copy(parts=parts))
        for number in range(150):
            name = PartName(f"bucket-{number % 7}")
            data = None if number % 11 == 10 else bytes([number]) * (number * 50)
            main = f"main-{number}".encode()
            await store.apply(at(1, number + 2, parts={MAIN_PART: main, name: data}))
            parts[MAIN_PART] = main
            if data is None:
                parts.pop(name, None)
            else:
                parts[name] = data
        copy = await whole(store)
        assert (copy.parts, copy.version) == (parts, Version(1, 151))
    async with disk.open() as store:
        assert await whole(store) == copy


async def test_a_commit_without_a_copy_is_stale(disk: LocalWorld) -> None:
    async with disk.open() as store:
        with pytest.raises(StaleWrite):
            await store.apply(at(1, 2))
        assert await store.list_accounts() == Listing(())


async def test_an_older_commit_is_stale_and_changes_nothing(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy(epoch=2, revision=2))
        await store.apply(at(2, 3, parts={MAIN_PART: b"3"}))
        before = await whole(store)
        for epoch, revision in ((2, 2), (1, 99)):
            with pytest.raises(StaleWrite):
                await store.apply(at(epoch, revision, parts={MAIN_PART: b"old"}))
        assert await whole(store) == before
        with pytest.raises(StaleWrite):
            await store.save_account(a_copy(epoch=2, revision=2))


async def test_the_same_commit_twice_is_applied_once(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy())
        commit = at(1, 2, parts={MAIN_PART: b"2", SESSIONS: None})
        await store.apply(commit)
        once = await whole(store)
        await store.apply(commit)
        assert await whole(store) == once


async def test_fifty_commits_of_fifty_accounts_at_once_all_land(disk: LocalWorld) -> None:
    names = [AccountId(f"account-{number:02}") for number in range(50)]
    async with disk.open() as store:

        async def save_and_apply(account_id: AccountId) -> None:
            await store.save_account(a_copy(account_id))
            await store.apply(at(1, 2, account=an_account(account_id)))

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for name in names:
                    nursery.start_soon(save_and_apply, name)
        copies = (await store.list_accounts()).copies
        assert sorted(copy.account.account_id for copy in copies) == names
        assert {copy.version for copy in copies} == {Version(1, 2)}


@pytest.mark.parametrize("purge", [False, True])
async def test_a_removed_account_is_gone(disk: LocalWorld, purge: bool) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy())
        await store.save_account(a_copy(BELA))
        await store.apply(at(1, 2))
        await store.remove_account(ANNA, purge=purge)
        await store.remove_account(ANNA, purge=purge)
        assert await store.list_accounts() == Listing((as_listed(a_copy(BELA)),))
        assert await store.fetch_account(ANNA) is None
        with pytest.raises(StaleWrite):
            await store.apply(at(1, 3))


async def test_after_a_remove_an_older_version_can_be_saved(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy(epoch=5, revision=5))
        await store.apply(at(5, 6))
        await store.remove_account(ANNA, purge=False)
        await store.save_account(a_copy())
        assert await store.list_accounts() == Listing((as_listed(a_copy()),))


async def test_an_unreadable_copy_is_listed_with_its_fault_and_hides_no_other(
    disk: LocalWorld,
) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy())
        await store.save_account(a_copy(BELA))
        disk.damage_account(ANNA)
        listing = await store.list_accounts()
        damaged = one(listing)
        assert damaged.fault
        assert not damaged.complete
        assert not damaged.parts
        # An unreadable copy must not lose to an older one.
        assert damaged.version == a_copy().version
        assert await store.fetch_account(ANNA) == damaged
        assert one(listing, BELA) == as_listed(a_copy(BELA))


async def test_unreadable_parts_show_when_the_account_is_fetched(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy())
        await store.save_account(a_copy(BELA))
        disk.damage_rest(ANNA)
        assert one(await store.list_accounts()) == as_listed(a_copy())
        copy = await store.fetch_account(ANNA)
        assert copy is not None
        assert copy.fault
        assert (copy.account, copy.version) == (an_account(), a_copy().version)
        assert (copy.parts, copy.complete) == ({}, False)
        assert await store.fetch_account(BELA) == a_copy(BELA)


async def test_a_readable_copy_replaces_one_with_unreadable_parts(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy(epoch=4))
        disk.damage_rest(ANNA)
        await store.save_account(a_copy(epoch=3))
        assert await whole(store) == a_copy(epoch=3)


async def test_a_commit_on_an_unreadable_copy_is_stale(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy())
        disk.damage_account(ANNA)
        with pytest.raises(StaleWrite):
            await store.apply(at(1, 2, parts={MAIN_PART: b"2"}))
        assert one(await store.list_accounts()).fault


async def test_a_readable_copy_replaces_an_unreadable_one(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy(epoch=4))
        disk.damage_account(ANNA)
        await store.save_account(a_copy(epoch=3))
        assert await whole(store) == a_copy(epoch=3)


async def test_the_epoch_only_rises_and_survives_a_restart(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.raise_epoch(7)
        await store.raise_epoch(3)
        assert await store.highest_epoch() == 7
    async with disk.open() as store:
        assert await store.highest_epoch() == 7
        await store.raise_epoch(2**40)
        assert await store.highest_epoch() == 2**40


async def test_the_newest_transitions_come_back_oldest_first(disk: LocalWorld) -> None:
    transitions = [
        Transition("PASSIVE", "ACTIVE", "activate", f"reason {n} äöü", 1.5 + n, 0.25, n, "a")
        for n in range(5)
    ]
    async with disk.open() as store:
        for transition in transitions:
            await store.append_transition(transition)
        assert list(await store.list_transitions(3)) == transitions[2:]
    async with disk.open() as store:
        assert list(await store.list_transitions(100)) == transitions
        assert list(await store.list_transitions(0)) == []


async def test_a_report_is_taken(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.append_report({"epoch": 1, "failures": [{"cause": "x"}], "total": None})
