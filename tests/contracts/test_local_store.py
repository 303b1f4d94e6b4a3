"""The contract of `LocalStore`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from machine.ports import StaleWrite
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


def at(epoch: int, revision: int, **changes: object) -> AccountCommit:
    grant = Grant(epoch, "a", "a-1", Stamp("1"))
    return a_commit(grant, Stamp("1"), revision=revision, **changes)  # type: ignore[arg-type]


async def test_a_new_disk_is_empty(disk: LocalWorld) -> None:
    async with disk.open() as store:
        assert await store.list_accounts() == Listing(())
        assert await store.highest_epoch() == 0
        assert list(await store.list_transitions(10)) == []


async def test_a_saved_copy_comes_back_also_after_a_restart(disk: LocalWorld) -> None:
    copy = replace(a_copy(parts={MAIN_PART: MAIN, REST: bytes(1000)}), commit_id="c7")
    async with disk.open() as store:
        await store.save_account(replace(copy, stamp=Stamp("of the shared store")))
        assert await store.list_accounts() == Listing((copy,))
    async with disk.open() as store:
        assert await store.list_accounts() == Listing((copy,))


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
        assert one(await store.list_accounts()).removed


async def test_an_older_copy_never_overwrites_a_newer(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy(epoch=3, revision=5))
        for epoch, revision in ((3, 4), (2, 99)):
            with pytest.raises(StaleWrite):
                await store.save_account(a_copy(epoch=epoch, revision=revision, parts={}))
        assert one(await store.list_accounts()) == a_copy(epoch=3, revision=5)


async def test_a_newer_epoch_overwrites_though_its_revision_is_lower(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy(epoch=3, revision=5))
        newer = a_copy(epoch=4, revision=1, parts={MAIN_PART: b"new"})
        await store.save_account(newer)
        assert one(await store.list_accounts()) == newer


async def test_saving_the_same_version_again_is_no_error(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy())
        await store.save_account(a_copy(parts={MAIN_PART: b"again"}))
        assert one(await store.list_accounts()).parts == {MAIN_PART: b"again"}


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
        assert one(await store.list_accounts()) == wanted
    async with disk.open() as store:
        assert one(await store.list_accounts()) == wanted


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
        copy = one(await store.list_accounts())
        assert (copy.parts, copy.version) == (parts, Version(1, 151))
    async with disk.open() as store:
        assert one(await store.list_accounts()) == copy


async def test_a_commit_without_a_copy_is_stale(disk: LocalWorld) -> None:
    async with disk.open() as store:
        with pytest.raises(StaleWrite):
            await store.apply(at(1, 2))
        assert await store.list_accounts() == Listing(())


async def test_an_older_commit_is_stale_and_changes_nothing(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy(epoch=2, revision=2))
        await store.apply(at(2, 3, parts={MAIN_PART: b"3"}))
        before = one(await store.list_accounts())
        for epoch, revision in ((2, 2), (1, 99)):
            with pytest.raises(StaleWrite):
                await store.apply(at(epoch, revision, parts={MAIN_PART: b"old"}))
        assert one(await store.list_accounts()) == before
        with pytest.raises(StaleWrite):
            await store.save_account(a_copy(epoch=2, revision=2))


async def test_the_same_commit_twice_is_applied_once(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy())
        commit = at(1, 2, parts={MAIN_PART: b"2", SESSIONS: None})
        await store.apply(commit)
        once = one(await store.list_accounts())
        await store.apply(commit)
        assert one(await store.list_accounts()) == once


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
        assert await store.list_accounts() == Listing((a_copy(BELA),))
        with pytest.raises(StaleWrite):
            await store.apply(at(1, 3))


async def test_after_a_remove_an_older_version_can_be_saved(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy(epoch=5, revision=5))
        await store.apply(at(5, 6))
        await store.remove_account(ANNA, purge=False)
        await store.save_account(a_copy())
        assert await store.list_accounts() == Listing((a_copy(),))


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
        assert one(listing, BELA) == a_copy(BELA)


async def test_a_readable_copy_replaces_an_unreadable_one(disk: LocalWorld) -> None:
    async with disk.open() as store:
        await store.save_account(a_copy(epoch=4))
        disk.damage_account(ANNA)
        await store.save_account(a_copy(epoch=3))
        assert await store.list_accounts() == Listing((a_copy(epoch=3),))


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
