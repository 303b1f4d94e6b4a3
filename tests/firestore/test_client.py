"""The client against a real emulator: deadlines, cancellation, threads, lines. In real time."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio

from daemon.firestore.accounts import FirestoreAccountStore
from daemon.firestore.client import FirestoreClient, Line, open_firestore
from daemon.firestore.documents import update_write
from daemon.firestore.layout import Layout, account_write
from daemon.firestore.lease import FirestoreLeaseStore
from daemon.firestore.outbox import FirestoreOutboxStore
from machine.ports import LeaseMissing, StoreUnavailable
from machine.records import MAIN_PART, AccountId, LeaseWrite, Version
from tests.contracts.samples import ANNA, a_commit, a_lease, acquire, an_account, create
from tests.emulator import Emulator, new_project
from tests.fault_proxy import Fault, open_fault_proxy

pytestmark = pytest.mark.emulator

GROUP = "g"
SLACK_S = 0.2


@pytest.fixture
async def client(firestore_emulator: str) -> AsyncIterator[FirestoreClient]:
    async with open_firestore(new_project(), emulator_host=firestore_emulator) as client:
        yield client


async def test_every_call_ends_at_its_own_deadline_while_the_server_hangs(
    own_emulator: Emulator,
) -> None:
    async with open_firestore(new_project(), emulator_host=own_emulator.host) as client:
        lease = FirestoreLeaseStore(client, GROUP)
        accounts = FirestoreAccountStore(client, GROUP)
        outbox = FirestoreOutboxStore(client, GROUP)
        await lease.initialise()
        grant = await acquire(lease)
        stamp = await create(accounts, grant)
        view = await lease.read()
        calls: list[Callable[[], Awaitable[object]]] = [
            lease.read,
            lambda: lease.write(LeaseWrite(lease=a_lease(), lease_stamp=view.lease_stamp)),
            accounts.list_accounts,
            lambda: accounts.fetch_account(ANNA),
            lambda: accounts.commit(a_commit(grant, stamp)),
            lambda: accounts.seal([a_commit(grant, stamp)]),
            lambda: create(accounts, grant, AccountId("new")),
            outbox.list_pending,
        ]
        took_s: dict[int, float] = {}

        async def call_until(number: int, deadline_s: float) -> None:
            started_at = trio.current_time()
            with trio.move_on_after(deadline_s) as scope:
                await calls[number]()
            assert scope.cancelled_caught
            took_s[number] = trio.current_time() - started_at - deadline_s

        own_emulator.pause()
        try:
            async with trio.open_nursery() as nursery:
                for number in range(len(calls)):
                    nursery.start_soon(call_until, number, 0.3 + 0.1 * number)
        finally:
            own_emulator.resume()
        assert len(took_s) == len(calls)
        assert max(took_s.values()) < SLACK_S
        with trio.fail_after(10):
            while True:
                try:
                    await lease.read()
                    break
                except StoreUnavailable:
                    await trio.sleep(0.05)


async def test_a_cancelled_call_ends_at_once_and_reaches_the_server(
    firestore_emulator: str,
) -> None:
    async with (
        open_fault_proxy(firestore_emulator) as proxy,
        open_firestore(new_project(), emulator_host=proxy.host) as client,
    ):
        await client.get(client.document("a", "b"))
        await proxy.set_fault(Fault.FREEZE)
        async with trio.open_nursery() as nursery:
            for call in (client.get, lambda name: client.batch_get([name])):
                nursery.start_soon(call, client.document("a", "b"))
            await trio.sleep(0.1)
            cancelled_at = trio.current_time()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - cancelled_at < SLACK_S


async def test_two_hundred_calls_at_once_take_no_thread_each(client: FirestoreClient) -> None:
    name = client.document("a", "b")
    await client.commit([update_write(name, {"x": 1})])
    await client.batch_get([name])
    before = threading.active_count()
    most = 0

    async def read(streaming: bool) -> None:
        nonlocal most
        await (client.batch_get([name]) if streaming else client.get(name))
        most = max(most, threading.active_count())

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(read, number % 10 == 0)
    # Streams share four readers; gRPC has one thread for a channel that is at work.
    assert most <= before + 4


async def test_nothing_is_left_of_a_closed_client(firestore_emulator: str) -> None:
    before = threading.active_count()
    async with open_fault_proxy(firestore_emulator) as proxy:
        async with open_firestore(new_project(), emulator_host=proxy.host) as client:
            store = FirestoreLeaseStore(client, GROUP)
            await store.initialise()
            await client.get(client.document("a", "b"))
            async with store.watch_fence() as changes:
                await changes.receive()
                assert proxy.connections == len(Line)
        with trio.fail_after(2):
            while proxy.connections or threading.active_count() > before:
                await trio.sleep(0.01)


async def test_a_bulk_read_does_not_slow_the_heartbeat(client: FirestoreClient) -> None:
    lease = FirestoreLeaseStore(client, GROUP)
    accounts = FirestoreAccountStore(client, GROUP)
    await lease.initialise()
    layout = Layout(client, GROUP)
    for block in range(4):
        writes = []
        for number in range(300):
            account = an_account(AccountId(f"a-{block}-{number}"))
            name = layout.account(account.account_id)
            parts = {MAIN_PART: bytes(10_000)}
            writes.append(account_write(name, account, Version(1, 1), "", parts))
        await client.commit(writes)
    took_s: list[float] = []

    async def beat() -> None:
        while True:
            started_at = trio.current_time()
            await lease.read()
            took_s.append(trio.current_time() - started_at)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat)
            for _ in range(3):
                assert len((await accounts.list_accounts()).copies) == 1200
            nursery.cancel_scope.cancel()
    assert len(took_s) > 5
    assert sorted(took_s)[len(took_s) // 2] < 0.1
    assert max(took_s) < 1.0


async def test_a_connection_that_swallows_everything_is_replaced(firestore_emulator: str) -> None:
    async with (
        open_fault_proxy(firestore_emulator) as proxy,
        open_firestore(new_project(), emulator_host=proxy.host) as client,
    ):
        store = FirestoreLeaseStore(client, GROUP)
        await store.initialise()
        await proxy.set_fault(Fault.FREEZE)
        for _ in range(2):
            with trio.move_on_after(0.2):
                await store.read()
        # The old connection stays frozen for good; only a new one can get through.
        proxy.leave_frozen()
        await proxy.set_fault(Fault.PASS)
        with trio.fail_after(1):
            await store.read()


async def test_a_cancelled_call_says_nothing_of_its_connection(firestore_emulator: str) -> None:
    async with (
        open_fault_proxy(firestore_emulator) as proxy,
        open_firestore(new_project(), emulator_host=proxy.host) as client,
    ):
        name = client.document("a", "b")
        await client.get(name)
        await proxy.set_fault(Fault.FREEZE)
        for _ in range(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.get, name)
                await trio.sleep(0.02)
                nursery.cancel_scope.cancel()
        await proxy.set_fault(Fault.PASS)
        await client.get(name)
        assert proxy.accepted == 1


async def test_operations_are_counted_as_firestore_bills_them(client: FirestoreClient) -> None:
    lease = FirestoreLeaseStore(client, GROUP)
    accounts = FirestoreAccountStore(client, GROUP)
    with pytest.raises(LeaseMissing):
        await lease.read()
    assert client.operations.reads == 2
    await lease.initialise()
    grant = await acquire(lease)
    # Two documents made, two written.
    assert client.operations.writes == 4
    reads = client.operations.reads
    stamp = await create(accounts, grant)
    # The account and the verify write; the delete of a mark that may be there.
    assert (client.operations.writes, client.operations.deletes) == (6, 1)
    await accounts.commit(a_commit(grant, stamp))
    assert client.operations.writes == 7
    assert client.operations.reads == reads
    await accounts.list_accounts()
    assert client.operations.reads == reads + 1
