"""Every gRPC status becomes an error that says what to do; against a real server."""

from __future__ import annotations

import grpc
import pytest
import trio

from daemon.firestore.accounts import FirestoreAccountStore
from daemon.firestore.client import FirestoreClient, open_firestore
from daemon.firestore.documents import update_write
from daemon.firestore.errors import Refused
from daemon.firestore.lease import FirestoreLeaseStore
from machine.ports import LeaseMissing, LeaseRefused, StoreMisconfigured, StoreUnavailable
from machine.records import Fence, LeaseState, LeaseWrite
from tests.firestore.refusing_server import start_refusing_server

S = grpc.StatusCode
UNAVAILABLE = [
    S.UNAVAILABLE,
    S.DEADLINE_EXCEEDED,
    S.ABORTED,
    S.INTERNAL,
    S.CANCELLED,
    S.UNKNOWN,
    S.RESOURCE_EXHAUSTED,
    S.DATA_LOSS,
    S.OUT_OF_RANGE,
]
FOR_GOOD = [S.PERMISSION_DENIED, S.UNAUTHENTICATED, S.INVALID_ARGUMENT, S.UNIMPLEMENTED]
REFUSED = [S.FAILED_PRECONDITION, S.ALREADY_EXISTS, S.NOT_FOUND]


async def commit_once(client: FirestoreClient) -> None:
    await client.commit([update_write(client.document("a", "b"), {"x": 1})])


@pytest.mark.parametrize("status", UNAVAILABLE)
async def test_an_answer_that_says_nothing_is_unavailable(status: grpc.StatusCode) -> None:
    with start_refusing_server(status) as server, trio.fail_after(10):
        async with open_firestore("p", emulator_host=server.host) as client:
            store = FirestoreAccountStore(client, "g")
            for call in (lambda: commit_once(client), store.list_accounts):
                with pytest.raises(StoreUnavailable) as unavailable:
                    await call()
                assert unavailable.value.code == status.name.lower()
            assert server.calls == 2, "the library retried"


@pytest.mark.parametrize("status", FOR_GOOD)
async def test_a_refusal_for_good_says_what_to_change(status: grpc.StatusCode) -> None:
    with start_refusing_server(status) as server, trio.fail_after(10):
        async with open_firestore("p", emulator_host=server.host) as client:
            lease = FirestoreLeaseStore(client, "g")
            for call in (lambda: commit_once(client), lease.read):
                with pytest.raises(StoreMisconfigured, match=status.name.lower()):
                    await call()


@pytest.mark.parametrize("status", REFUSED)
async def test_a_precondition_that_fails_is_refused(status: grpc.StatusCode) -> None:
    fence = Fence(1, "a", "a-1", "", LeaseState.HELD)
    with start_refusing_server(status) as server, trio.fail_after(10):
        async with open_firestore("p", emulator_host=server.host) as client:
            with pytest.raises(Refused) as refused:
                await commit_once(client)
            assert refused.value.code == status.name.lower()
            lease = FirestoreLeaseStore(client, "g")
            wanted = LeaseMissing if status is S.NOT_FOUND else LeaseRefused
            with pytest.raises(wanted):
                await lease.write(LeaseWrite(fence=fence))


@pytest.mark.parametrize(
    ("status", "details"),
    [
        (S.NOT_FOUND, "The database (default) does not exist for project p"),
        (S.FAILED_PRECONDITION, "The Cloud Firestore API is not available in Datastore Mode"),
    ],
)
async def test_a_missing_database_is_no_missing_document(
    status: grpc.StatusCode, details: str
) -> None:
    with start_refusing_server(status, details) as server, trio.fail_after(10):
        async with open_firestore("p", emulator_host=server.host) as client:
            with pytest.raises(StoreMisconfigured, match="WATCHKEEPER_FIRESTORE_PROJECT"):
                await client.get(client.document("a", "b"))
            with pytest.raises(StoreMisconfigured):
                await commit_once(client)


async def test_nobody_there_is_unavailable() -> None:
    with trio.fail_after(10):
        async with open_firestore("p", emulator_host="127.0.0.1:1") as client:
            with pytest.raises(StoreUnavailable):
                await commit_once(client)


async def test_each_call_says_which_database_it_is_for() -> None:
    with start_refusing_server(S.ABORTED) as server, trio.fail_after(10):
        async with open_firestore("p", "other", emulator_host=server.host) as client:
            with pytest.raises(StoreUnavailable):
                await commit_once(client)
    assert server.metadata["google-cloud-resource-prefix"] == "projects/p/databases/other"
    assert server.metadata["x-goog-request-params"] == "project_id=p&database_id=other"


async def test_a_listener_without_permission_says_so_and_asks_slowly() -> None:
    troubles: list[str] = []
    with start_refusing_server(S.PERMISSION_DENIED) as server, trio.fail_after(10):
        async with open_firestore("p", emulator_host=server.host) as client:
            store = FirestoreLeaseStore(client, "g", note_trouble=troubles.append)
            async with store.watch_fence():
                await trio.sleep(1.0)
            assert server.calls == 1
            assert len(troubles) == 1
            assert "roles/datastore.user" in troubles[0]


async def test_a_listener_that_fails_at_once_backs_off() -> None:
    troubles: list[str] = []
    with start_refusing_server(S.INTERNAL) as server, trio.fail_after(10):
        async with open_firestore("p", emulator_host=server.host) as client:
            store = FirestoreLeaseStore(client, "g", note_trouble=troubles.append)
            async with store.watch_fence():
                # Pauses of at most 0.5, 1, 2 s, at least half of each.
                await trio.sleep(2.0)
            assert 2 <= server.calls <= 4
            assert store.listen_restarts == len(troubles) - 1


async def test_a_cancelled_call_is_cancelled_at_the_server() -> None:
    with start_refusing_server(None) as server, trio.fail_after(10):
        async with open_firestore("p", emulator_host=server.host) as client:
            name = client.document("a", "b")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.get, name)
                nursery.start_soon(client.batch_get, [name])
                while server.calls < 2:
                    await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            with trio.fail_after(1):
                while server.cancelled < 2:
                    await trio.sleep(0.01)


async def test_a_calls_deadline_ends_it_at_the_server_too() -> None:
    with start_refusing_server(None) as server, trio.fail_after(10):
        async with open_firestore("p", emulator_host=server.host) as client:
            with trio.move_on_after(0.2) as late:
                await client.get(client.document("a", "b"))
            assert late.cancelled_caught
            with trio.fail_after(1):
                while server.cancelled < 1:
                    await trio.sleep(0.01)
