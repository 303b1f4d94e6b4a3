"""The contract of `AccountStore`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from machine.ports import AccountExists, MessageExists, StaleWrite, StoreUnavailable
from machine.records import (
    COMMIT_WRITES_MAX,
    MAIN_PART,
    Account,
    AccountCopy,
    AccountId,
    AccountStatus,
    LeaseWrite,
    Listing,
    MessageId,
    MessageState,
    PartName,
    Version,
)
from tests.contracts.samples import (
    ANNA,
    BELA,
    MAIN,
    SESSIONS,
    a_commit,
    a_message,
    acquire,
    an_account,
    create,
)
from tests.contracts.worlds import NETWORKED_ADAPTERS, SharedWorld

REST = PartName("rest.7")


def one(listing: Listing, account_id: AccountId = ANNA) -> AccountCopy:
    (found,) = [copy for copy in listing.copies if copy.account.account_id == account_id]
    return found


async def test_a_new_store_lists_nothing(world: SharedWorld) -> None:
    assert await world.accounts.list_accounts() == Listing(())
    assert await world.accounts.fetch_account(ANNA) is None


async def test_a_created_account_comes_back_as_it_was(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    parts = {MAIN_PART: MAIN, SESSIONS: bytes(range(256)) * 40, REST: b""}
    stamp = await create(world.accounts, grant, parts=parts)
    wanted = AccountCopy(an_account(), Version(1, 1), parts, complete=True, stamp=stamp)
    assert await world.accounts.fetch_account(ANNA) == wanted
    listed = one(await world.accounts.list_accounts())
    assert listed == replace(wanted, parts={MAIN_PART: MAIN}, complete=False)


async def test_an_account_without_more_than_its_main_part_is_complete_in_the_list(
    world: SharedWorld,
) -> None:
    await world.lease.initialise()
    await create(world.accounts, await acquire(world.lease))
    assert one(await world.accounts.list_accounts()).complete


async def test_an_account_that_was_never_paired_has_no_parts(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    bare = Account(ANNA, "Anna", AccountStatus.QR_READY, 1.5, 1.5, 1.5)
    await world.accounts.create_account(grant, bare, Version(1, 1), {})
    copy = await world.accounts.fetch_account(ANNA)
    assert copy is not None
    assert (copy.account, copy.parts, copy.complete) == (bare, {}, True)
    assert one(await world.accounts.list_accounts()).complete


async def test_the_same_account_is_not_created_twice(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    await create(world.accounts, grant)
    with pytest.raises(AccountExists):
        await create(world.accounts, grant, parts={MAIN_PART: b"other"})
    assert one(await world.accounts.list_accounts()).parts == {MAIN_PART: MAIN}


async def test_an_old_holder_creates_nothing(world: SharedWorld) -> None:
    await world.lease.initialise()
    old = await acquire(world.lease, "a")
    await acquire(world.lease, "b")
    with pytest.raises(StaleWrite):
        await create(world.accounts, old)
    assert not (await world.accounts.list_accounts()).copies


async def test_a_holder_creates_though_its_fence_was_touched(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease, "a")
    view = await world.lease.read()
    paused = replace(view.fence, paused=True)
    await world.lease.write(LeaseWrite(fence=paused, fence_stamp=view.fence_stamp))
    await create(world.accounts, grant)
    assert len((await world.accounts.list_accounts()).copies) == 1


async def test_a_commit_changes_fields_version_and_the_named_parts_only(
    world: SharedWorld,
) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(
        world.accounts, grant, parts={MAIN_PART: MAIN, SESSIONS: b"old", REST: b"rest"}
    )
    account = an_account(status=AccountStatus.LOGGED_OUT, name="Anna")
    account = replace(account, phone=None, last_error=None, last_connected_at=None)
    new = PartName("new")
    commit = a_commit(
        grant,
        stamp,
        account=account,
        parts={MAIN_PART: b"main-2", SESSIONS: b"new", REST: None, new: b"n"},
    )
    after = await world.accounts.commit(commit)
    assert after != stamp
    assert await world.accounts.fetch_account(ANNA) == AccountCopy(
        account,
        Version(1, 2),
        {MAIN_PART: b"main-2", SESSIONS: b"new", new: b"n"},
        complete=True,
        stamp=after,
        commit_id=commit.commit_id,
    )


async def test_a_commit_without_parts_keeps_them(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    parts = {MAIN_PART: MAIN, SESSIONS: b"s"}
    stamp = await create(world.accounts, grant, parts=parts)
    await world.accounts.commit(a_commit(grant, stamp))
    copy = await world.accounts.fetch_account(ANNA)
    assert copy is not None
    assert copy.parts == parts


async def test_deleting_a_part_that_is_not_there_is_no_error(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    await world.accounts.commit(a_commit(grant, stamp, parts={MAIN_PART: MAIN, REST: None}))


async def test_commits_go_on_from_the_stamp_that_each_returns(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    for revision in range(2, 7):
        stamp = await world.accounts.commit(a_commit(grant, stamp, revision=revision))
    assert one(await world.accounts.list_accounts()).version == Version(1, 6)


async def test_the_same_commit_twice_is_applied_once(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    commit = a_commit(grant, stamp, parts={MAIN_PART: b"once"}, new_messages=[a_message("m1")])
    after = await world.accounts.commit(commit)
    before = await world.accounts.fetch_account(ANNA)
    assert await world.accounts.commit(commit) == after
    assert await world.accounts.fetch_account(ANNA) == before


@pytest.mark.parametrize("adapter", NETWORKED_ADAPTERS)
async def test_a_commit_without_an_answer_is_found_applied(world: SharedWorld) -> None:
    assert world.lost_replies is not None
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    commit = a_commit(grant, stamp, new_messages=[a_message("m1")])
    async with world.lost_replies():
        with pytest.raises((StoreUnavailable, trio.TooSlowError)), trio.fail_after(2.0):
            await world.accounts.commit(commit)
    applied = one(await world.accounts.list_accounts())
    assert applied.commit_id == commit.commit_id
    assert await world.accounts.commit(commit) == applied.stamp
    assert await world.outbox.fetch_message(MessageId("m1")) == a_message("m1")


async def test_a_stale_commit_is_refused_and_writes_nothing(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    await world.accounts.commit(a_commit(grant, stamp))
    before = await world.accounts.fetch_account(ANNA)
    late = a_commit(
        grant, stamp, revision=9, parts={SESSIONS: b"late"}, new_messages=[a_message("late")]
    )
    with pytest.raises(StaleWrite):
        await world.accounts.commit(late)
    assert await world.accounts.fetch_account(ANNA) == before
    assert await world.outbox.fetch_message(MessageId("late")) is None


async def test_a_commit_to_an_unknown_account_is_stale(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    commit = a_commit(grant, stamp, account=an_account(BELA), new_messages=[a_message("m1")])
    with pytest.raises(StaleWrite):
        await world.accounts.commit(commit)
    assert await world.accounts.fetch_account(BELA) is None
    assert await world.outbox.fetch_message(MessageId("m1")) is None


async def test_after_a_seal_the_old_holders_commit_is_stale(world: SharedWorld) -> None:
    await world.lease.initialise()
    old = await acquire(world.lease, "a")
    stamp = await create(world.accounts, old)
    new = await acquire(world.lease, "b")
    (sealed,) = await world.accounts.seal([a_commit(new, stamp)])
    assert sealed is not None
    with pytest.raises(StaleWrite):
        await world.accounts.commit(a_commit(old, stamp, messages=[a_message("m1")]))
    assert one(await world.accounts.list_accounts()).version == Version(2, 2)
    assert await world.outbox.fetch_message(MessageId("m1")) is None


async def test_a_taken_message_id_writes_nothing_and_shows_what_is_there(
    world: SharedWorld,
) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    there = a_message("m1", state=MessageState.SERVER_ACK)
    stamp = await world.accounts.commit(a_commit(grant, stamp, new_messages=[there]))
    before = await world.accounts.fetch_account(ANNA)
    commit = a_commit(
        grant,
        stamp,
        revision=3,
        parts={MAIN_PART: b"never"},
        new_messages=[a_message("m0"), a_message("m1")],
        messages=[a_message("m2")],
    )
    with pytest.raises(MessageExists) as exists:
        await world.accounts.commit(commit)
    assert exists.value.message == there
    assert await world.accounts.fetch_account(ANNA) == before
    for message_id in ("m0", "m2"):
        assert await world.outbox.fetch_message(MessageId(message_id)) is None
    await world.accounts.commit(replace(commit, new_messages=(a_message("m0"),)))


async def test_a_commit_is_taken_up_to_the_limit_and_refused_whole_over_it(
    world: SharedWorld,
) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    # The account is one write, with its main part; the message that is one too many another.
    messages = [a_message(f"m{number}") for number in range(COMMIT_WRITES_MAX)]
    commit = a_commit(grant, stamp, parts={MAIN_PART: MAIN}, new_messages=messages[:-1])
    assert commit.fits
    over = replace(commit, new_messages=tuple(messages))
    assert not over.fits
    with pytest.raises(ValueError, match="501 documents"):
        await world.accounts.commit(over)
    assert await world.outbox.fetch_message(messages[0].message_id) is None
    stamp = await world.accounts.commit(commit)
    assert len(await world.outbox.list_pending()) == COMMIT_WRITES_MAX - 1
    with pytest.raises(ValueError, match="501 documents"):
        await world.accounts.seal([replace(over, stamp=stamp)])


async def test_a_commit_of_too_many_bytes_is_refused_whole(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    large = "ä" * 60_000
    messages = tuple(replace(a_message(f"m{number}"), text=large) for number in range(80))
    sizes = [a_commit(grant, stamp, new_messages=messages[:count]).fits for count in range(81)]
    most = sizes.index(False) - 1
    assert 70 < most < 80
    with pytest.raises(ValueError, match="bytes"):
        await world.accounts.commit(a_commit(grant, stamp, new_messages=messages[: most + 1]))
    assert not await world.outbox.list_pending()
    # The emulator takes 4 MiB in one call and not, as Firestore itself, 10.
    await world.accounts.commit(a_commit(grant, stamp, new_messages=messages[:30]))
    assert len(await world.outbox.list_pending()) == 30


async def test_fifty_commits_of_fifty_accounts_at_once_all_land(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    names = [AccountId(f"account-{number:02}") for number in range(50)]

    async def create_and_commit(account_id: AccountId) -> None:
        stamp = await create(world.accounts, grant, account_id)
        message = a_message(f"m-{account_id}", account_id)
        await world.accounts.commit(
            a_commit(grant, stamp, account=an_account(account_id), new_messages=[message])
        )

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for account_id in names:
                nursery.start_soon(create_and_commit, account_id)
    listing = await world.accounts.list_accounts()
    assert sorted(copy.account.account_id for copy in listing.copies) == names
    assert {copy.version for copy in listing.copies} == {Version(1, 2)}
    assert len(await world.outbox.list_pending()) == 50


async def test_two_commits_of_one_account_at_once_have_one_winner(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    refused: list[str] = []

    async def write(data: bytes) -> None:
        try:
            await world.accounts.commit(a_commit(grant, stamp, parts={MAIN_PART: data}))
        except StaleWrite:
            refused.append(data.decode())

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(write, str(number).encode())
    assert len(refused) == 7
    winner = one(await world.accounts.list_accounts()).parts[MAIN_PART].decode()
    assert sorted([*refused, winner]) == [str(number) for number in range(8)]


async def test_a_seal_answers_for_each_account_in_order(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    names = [AccountId(f"account-{number:02}") for number in range(30)]
    stamps = {name: await create(world.accounts, grant, name) for name in names}
    moved = {names[3], names[17], names[29]}
    for name in moved:
        await world.accounts.commit(a_commit(grant, stamps[name], account=an_account(name)))
    new = await acquire(world.lease, "b")
    unknown = AccountId("unknown")
    commits = [
        a_commit(new, stamps.get(name, stamps[names[0]]), revision=5, account=an_account(name))
        for name in (*names, unknown)
    ]
    answers = await world.accounts.seal(commits)
    assert len(answers) == len(commits)
    listing = await world.accounts.list_accounts()
    for name, answer in zip((*names, unknown), answers, strict=True):
        if name in moved:
            assert answer is None
            assert one(listing, name).version == Version(1, 2)
        elif name == unknown:
            assert answer is None
        else:
            copy = one(listing, name)
            assert (copy.version, copy.stamp) == (Version(2, 5), answer)
            assert copy.parts == {MAIN_PART: MAIN}


async def test_a_seal_of_nothing_answers_nothing(world: SharedWorld) -> None:
    assert list(await world.accounts.seal([])) == []


async def test_the_same_seal_twice_is_applied_once(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    commits = [a_commit(grant, await create(world.accounts, grant))]
    assert list(await world.accounts.seal(commits)) == list(await world.accounts.seal(commits))


@pytest.mark.parametrize("purge", [False, True])
async def test_a_removed_account_leaves_only_its_mark(world: SharedWorld, purge: bool) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant, parts={MAIN_PART: MAIN, SESSIONS: b"s"})
    await create(world.accounts, grant, BELA)
    await world.accounts.remove_account(grant, ANNA, stamp, purge=purge)
    listing = await world.accounts.list_accounts()
    mark = one(listing)
    assert mark.removed
    assert mark.parts == {}
    assert mark.version > Version(1, 1)
    assert not one(listing, BELA).removed
    fetched = await world.accounts.fetch_account(ANNA)
    assert fetched is not None
    assert fetched.removed
    assert fetched.parts == {}


async def test_a_removed_account_is_written_no_more(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    await world.accounts.remove_account(grant, ANNA, stamp, purge=False)
    mark = one(await world.accounts.list_accounts())
    assert mark.stamp is not None
    for expected in (stamp, mark.stamp):
        with pytest.raises(StaleWrite):
            await world.accounts.commit(a_commit(grant, expected, revision=9))
        with pytest.raises(StaleWrite):
            await world.accounts.remove_account(grant, ANNA, expected, purge=True)


async def test_a_removed_account_can_be_created_again(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant, parts={MAIN_PART: MAIN, SESSIONS: b"s"})
    await world.accounts.remove_account(grant, ANNA, stamp, purge=False)
    mark = one(await world.accounts.list_accounts())
    version = Version(mark.version.epoch, mark.version.revision + 1)
    again = await world.accounts.create_account(grant, an_account(), version, {MAIN_PART: b"2"})
    copy = await world.accounts.fetch_account(ANNA)
    assert copy is not None
    assert (copy.removed, copy.stamp, copy.version) == (False, again, version)
    assert copy.parts == {MAIN_PART: b"2"}
    await world.accounts.commit(a_commit(grant, again, revision=9))


async def test_a_stale_remove_is_refused_and_keeps_the_account(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    stamp = await create(world.accounts, grant)
    await world.accounts.commit(a_commit(grant, stamp))
    before = await world.accounts.fetch_account(ANNA)
    with pytest.raises(StaleWrite):
        await world.accounts.remove_account(grant, ANNA, stamp, purge=True)
    with pytest.raises(StaleWrite):
        await world.accounts.remove_account(grant, BELA, stamp, purge=True)
    assert await world.accounts.fetch_account(ANNA) == before


async def test_archiving_parts_changes_nothing_of_the_account(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    await create(world.accounts, grant, parts={MAIN_PART: MAIN, SESSIONS: b"s"})
    copy = await world.accounts.fetch_account(ANNA)
    assert copy is not None
    await world.accounts.archive_parts(copy, "repair")
    await world.accounts.archive_parts(copy, "repair")
    assert await world.accounts.fetch_account(ANNA) == copy
    assert len((await world.accounts.list_accounts()).copies) == 1


async def test_an_unreadable_account_is_listed_with_its_fault_and_hides_no_other(
    world: SharedWorld,
) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    await create(world.accounts, grant)
    await create(world.accounts, grant, BELA)
    await world.damage_account(ANNA)
    listing = await world.accounts.list_accounts()
    assert one(listing, ANNA).fault
    assert one(listing, BELA).fault is None
    assert one(listing, BELA).parts == {MAIN_PART: MAIN}
    fetched = await world.accounts.fetch_account(ANNA)
    assert fetched is not None
    assert fetched.fault


async def test_an_unreadable_account_is_not_overwritten_by_a_create(world: SharedWorld) -> None:
    await world.lease.initialise()
    grant = await acquire(world.lease)
    await create(world.accounts, grant)
    await world.damage_account(ANNA)
    with pytest.raises(AccountExists):
        await create(world.accounts, grant)
    assert one(await world.accounts.list_accounts()).fault
