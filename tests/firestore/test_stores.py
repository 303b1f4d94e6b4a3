"""What only Firestore's stores promise, beyond the contract suite: against the emulator."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial

import pytest
import trio

from daemon.firestore.accounts import FirestoreAccountStore
from daemon.firestore.client import FirestoreClient, Line, open_firestore
from daemon.firestore.documents import Fields, delete_write, update_write
from daemon.firestore.layout import ARCHIVE, PARTS, Layout
from daemon.firestore.lease import COLLECTION, FirestoreLeaseStore
from daemon.firestore.outbox import FirestoreOutboxStore
from machine.ports import StaleWrite, StoreMisconfigured, StoreUnavailable
from machine.records import MAIN_PART, AccountId, MessageState, PartName, Stamp, Version
from tests.contracts.samples import (
    ANNA,
    MAIN,
    SESSIONS,
    a_commit,
    a_message,
    acquire,
    an_account,
    create,
)
from tests.emulator import new_project
from tests.fault_proxy import Fault, FaultProxy, open_fault_proxy

pytestmark = pytest.mark.emulator

GROUP = "g"


class Stores:
    """One group's stores over one client, behind a proxy."""

    def __init__(self, client: FirestoreClient, proxy: FaultProxy) -> None:
        self.client = client
        self.proxy = proxy
        self.troubles: list[str] = []
        self.lease = FirestoreLeaseStore(client, GROUP)
        self.accounts = FirestoreAccountStore(client, GROUP)
        self.outbox = FirestoreOutboxStore(client, GROUP, note_trouble=self.troubles.append)
        self.layout = Layout(client, GROUP)


@pytest.fixture
async def stores(firestore_emulator: str) -> AsyncIterator[Stores]:
    async with (
        open_fault_proxy(firestore_emulator) as proxy,
        open_firestore(new_project(), emulator_host=proxy.host) as client,
    ):
        stores = Stores(client, proxy)
        await stores.lease.initialise()
        yield stores


async def test_fields_of_others_survive_our_commits(stores: Stores) -> None:
    grant = await acquire(stores.lease)
    stamp = await create(stores.accounts, grant)
    name = stores.layout.account(ANNA)
    await stores.client.commit([update_write(name, {"note": "by hand"})])
    copy = await stores.accounts.fetch_account(ANNA)
    assert copy is not None
    assert copy.stamp is not None
    assert copy.stamp != stamp
    await stores.accounts.commit(a_commit(grant, copy.stamp, parts={MAIN_PART: b"new"}))
    assert Fields(await stores.client.get(name)).text("note") == "by hand"


async def test_a_creation_without_an_answer_is_recognised(stores: Stores) -> None:
    grant = await acquire(stores.lease)
    await stores.client.get(stores.client.document("a", "b"), line=Line.DATA)
    await stores.proxy.set_fault(Fault.LOSE_REPLIES)
    with pytest.raises(StoreUnavailable), trio.fail_after(2):
        await create(stores.accounts, grant)
    await stores.proxy.set_fault(Fault.PASS)
    stamp = await create(stores.accounts, grant)
    await stores.accounts.commit(a_commit(grant, stamp))


async def test_a_seal_of_many_takes_few_calls_and_leaves_out_only_the_stale(
    stores: Stores,
) -> None:
    grant = await acquire(stores.lease)
    names = [AccountId(f"a{number:04}") for number in range(1100)]
    stamps = {}
    writes = []
    for name in names:
        account = an_account(name)
        writes += stores.accounts._writes_of(a_commit(grant, _any_stamp(), account=account))
    for write in writes:
        write.ClearField("current_document")
    for start in range(0, len(writes), 500):
        await stores.client.commit(writes[start : start + 500])
    for copy in (await stores.accounts.list_accounts()).copies:
        stamps[copy.account.account_id] = copy.stamp
    commits = []
    for number, name in enumerate(names):
        stamp = stamps[name] if number % 300 else _any_stamp()
        assert stamp is not None
        commits.append(a_commit(grant, stamp, revision=9, account=an_account(name)))
    calls = stores.client.operations.calls
    answers = await stores.accounts.seal(commits)
    # Three batches, each refused, looked through and committed again.
    assert stores.client.operations.calls - calls <= 6
    assert [number for number, answer in enumerate(answers) if answer is None] == [
        0,
        300,
        600,
        900,
    ]
    again = await stores.accounts.seal(commits)
    assert list(again) == list(answers)


async def test_a_seal_whose_message_is_taken_leaves_out_only_its_account(stores: Stores) -> None:
    grant = await acquire(stores.lease)
    commits = []
    for number in range(5):
        account_id = AccountId(f"a{number}")
        stamp = await create(stores.accounts, grant, account_id)
        if number == 3:
            first = a_commit(
                grant, stamp, account=an_account(account_id), new_messages=[a_message("taken")]
            )
            stamp = await stores.accounts.commit(first)
        messages = [a_message("taken")] if number == 3 else []
        commits.append(
            a_commit(
                grant, stamp, revision=7, account=an_account(account_id), new_messages=messages
            )
        )
    answers = await stores.accounts.seal(commits)
    assert [answer is None for answer in answers] == [False, False, False, True, False]


async def test_a_seal_with_a_lost_reply_is_finished_by_the_same_seal(stores: Stores) -> None:
    grant = await acquire(stores.lease)
    stamp = await create(stores.accounts, grant)
    commits = [a_commit(grant, stamp)]
    await stores.proxy.set_fault(Fault.LOSE_REPLIES)
    with pytest.raises(StoreUnavailable), trio.fail_after(2):
        await stores.accounts.seal(commits)
    await stores.proxy.set_fault(Fault.PASS)
    (answer,) = await stores.accounts.seal(commits)
    copy = await stores.accounts.fetch_account(ANNA)
    assert copy is not None
    assert copy.stamp == answer


async def test_a_fetch_never_mixes_two_commits(stores: Stores) -> None:
    grant = await acquire(stores.lease)
    stamp = await create(stores.accounts, grant, parts={MAIN_PART: b"1", SESSIONS: b"1"})
    torn: list[str] = []
    fetched = 0

    async def write() -> None:
        nonlocal stamp
        for revision in range(2, 40):
            data = str(revision).encode()
            parts = {MAIN_PART: data, SESSIONS: data}
            stamp = await stores.accounts.commit(
                a_commit(grant, stamp, revision=revision, parts=parts)
            )
            if revision % 8 == 0:
                # A rest, so that a fetch can succeed too.
                await trio.sleep(0.2)
        nursery.cancel_scope.cancel()

    async def fetch() -> None:
        nonlocal fetched
        while True:
            try:
                copy = await stores.accounts.fetch_account(ANNA)
            except StoreUnavailable:
                # Written faster than read, three times in a row.
                continue
            assert copy is not None
            fetched += 1
            if copy.parts[MAIN_PART] != copy.parts[SESSIONS]:
                torn.append(str(copy.version))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            nursery.start_soon(fetch)
    assert not torn
    assert fetched


async def test_a_part_that_is_gone_is_a_fault(stores: Stores) -> None:
    grant = await acquire(stores.lease)
    await create(stores.accounts, grant, parts={MAIN_PART: MAIN, SESSIONS: b"s"})
    part = stores.layout.part(stores.layout.account(ANNA), SESSIONS)
    await stores.client.commit([delete_write(part)])
    copy = await stores.accounts.fetch_account(ANNA)
    assert copy is not None
    assert copy.fault is not None
    assert str(SESSIONS) in copy.fault
    assert copy.parts == {MAIN_PART: MAIN}


async def test_names_of_all_kinds_are_kept(stores: Stores) -> None:
    grant = await acquire(stores.lease)
    odd = AccountId("../a b`c\\~é__")
    parts = {MAIN_PART: MAIN, PartName("x`y\\z.ü/~"): b"1", PartName("."): b"2"}
    stamp = await create(stores.accounts, grant, odd, parts)
    copy = await stores.accounts.fetch_account(odd)
    assert copy is not None
    assert (copy.account.account_id, copy.parts, copy.fault) == (odd, parts, None)
    gone = {PartName("x`y\\z.ü/~"): None, MAIN_PART: MAIN}
    await stores.accounts.commit(a_commit(grant, stamp, account=an_account(odd), parts=gone))
    copy = await stores.accounts.fetch_account(odd)
    assert copy is not None
    assert (copy.parts, copy.fault) == ({MAIN_PART: MAIN, PartName("."): b"2"}, None)


async def test_a_removed_accounts_bytes_are_in_the_archive_until_it_is_purged(
    stores: Stores,
) -> None:
    grant = await acquire(stores.lease)
    parts = {MAIN_PART: MAIN, SESSIONS: b"s"}
    stamp = await create(stores.accounts, grant, parts=parts)
    await stores.accounts.remove_account(grant, ANNA, stamp, purge=False)
    (kept,) = await stores.client.list_documents(stores.layout.parent, ARCHIVE)
    fields = Fields(kept)
    assert fields.blob_or_none("packed") == MAIN
    assert (fields.text("accountId"), fields.text("archivedFor")) == (ANNA, "removed")
    (part,) = await stores.client.list_documents(kept.name, PARTS)
    assert Fields(part).blob_or_none("packed") == b"s"
    assert not await stores.client.list_documents(stores.layout.account(ANNA), PARTS)
    stamp = await create(stores.accounts, grant, parts=parts)
    await stores.accounts.remove_account(grant, ANNA, stamp, purge=True)
    assert not await stores.client.list_documents(stores.layout.parent, ARCHIVE)
    assert not await stores.client.list_documents(kept.name, PARTS)


async def test_an_old_holder_removes_nothing(stores: Stores) -> None:
    old = await acquire(stores.lease, "a")
    stamp = await create(stores.accounts, old)
    await acquire(stores.lease, "b")
    with pytest.raises(StaleWrite):
        await stores.accounts.remove_account(old, ANNA, stamp, purge=True)
    listing = await stores.accounts.list_accounts()
    assert [copy.removed for copy in listing.copies] == [False]


async def test_of_a_commit_and_a_removal_at_once_one_wins(stores: Stores) -> None:
    grant = await acquire(stores.lease)
    for number in range(10):
        account_id = AccountId(f"a{number}")
        stamp = await create(stores.accounts, grant, account_id)
        commit = a_commit(grant, stamp, account=an_account(account_id))
        won: list[str] = []

        async def run(name: str, change: Callable[[], Awaitable[object]], won: list[str]) -> None:
            try:
                await change()
            except StaleWrite:
                return
            won.append(name)

        remove = partial(stores.accounts.remove_account, grant, account_id, stamp, purge=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, "remove", remove, won)
            # So that it falls between the removal's reading and its commit.
            await trio.sleep(0.002 * number)
            nursery.start_soon(run, "commit", partial(stores.accounts.commit, commit), won)
        assert len(won) == 1, won


async def test_a_broken_document_is_archived_as_it_is(stores: Stores) -> None:
    grant = await acquire(stores.lease)
    await create(stores.accounts, grant)
    name = stores.layout.account(ANNA)
    await stores.client.commit([update_write(name, {"status": 7, "odd": [1, {"a": b"b"}]})])
    copy = await stores.accounts.fetch_account(ANNA)
    assert copy is not None
    await stores.accounts.archive_parts(copy, "repair")
    (kept,) = await stores.client.list_documents(stores.layout.parent, ARCHIVE)
    fields = Fields(kept)
    assert (fields.raw("status"), fields.raw("odd")) == (7, [1, {"a": b"b"}])


async def test_an_unreadable_message_stays_and_hides_no_other(stores: Stores) -> None:
    grant = await acquire(stores.lease)
    stamp = await create(stores.accounts, grant)
    messages = [a_message("good"), a_message("bad")]
    await stores.accounts.commit(a_commit(grant, stamp, new_messages=messages))
    bad = stores.layout.message(messages[1].message_id)
    await stores.client.commit([update_write(bad, {"to": 5})])
    assert [one.message_id for one in await stores.outbox.list_pending()] == ["good"]
    assert len(stores.troubles) == 1
    assert "bad" in stores.troubles[0]
    with pytest.raises(StoreMisconfigured, match="'to'"):
        await stores.outbox.fetch_message(messages[1].message_id)


async def test_a_purge_gets_past_many_old_pending_messages(stores: Stores) -> None:
    grant = await acquire(stores.lease)
    stamp = await create(stores.accounts, grant)
    for start in (0, 300):
        pending = [a_message(f"p{start + number}", at=10.0) for number in range(300)]
        stamp = await stores.accounts.commit(a_commit(grant, stamp, new_messages=pending))
    settled = [a_message("old", state=MessageState.READ, at=20.0)]
    await stores.accounts.commit(a_commit(grant, stamp, new_messages=settled))
    assert await stores.outbox.purge_messages(grant, before=30.0, count_max=10) == 1
    assert len(await stores.outbox.list_pending()) == 600


async def test_a_lease_of_another_format_is_misconfigured(stores: Stores) -> None:
    name = stores.client.document(COLLECTION, f"{GROUP}-fence")
    await stores.client.commit([update_write(name, {"paused": "perhaps"})])
    with pytest.raises(StoreMisconfigured, match="paused"):
        await stores.lease.read()


async def test_marks_and_accounts_are_listed_as_of_one_moment(stores: Stores) -> None:
    grant = await acquire(stores.lease)
    stamp = await create(stores.accounts, grant)
    seen: list[int] = []

    async def remove_and_create() -> None:
        nonlocal stamp
        for revision in range(1, 12):
            await stores.accounts.remove_account(grant, ANNA, stamp, purge=True)
            version = Version(grant.epoch, 10 * revision)
            stamp = await stores.accounts.create_account(
                grant, replace(an_account(), created_at=float(revision)), version, {}
            )
        nursery.cancel_scope.cancel()

    async def watch() -> None:
        while True:
            seen.append(len((await stores.accounts.list_accounts()).copies))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(remove_and_create)
            nursery.start_soon(watch)
    assert set(seen) == {1}


def _any_stamp() -> Stamp:
    return Stamp("1.000000000")
