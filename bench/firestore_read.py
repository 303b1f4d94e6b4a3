"""How long `list_accounts` takes, beside the same documents as undecoded gRPC bytes.

Run: `python -m bench.firestore_read [--json] [COUNT…]`. Needs the Firestore emulator (or
WATCHKEEPER_TEST_EMULATOR=host:port). All rows of a count are measured in turn in one run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import trio
from google.auth.credentials import AnonymousCredentials
from google.cloud import firestore

from daemon.firestore import protos
from daemon.firestore.accounts import FirestoreAccountStore
from daemon.firestore.client import FirestoreClient, open_firestore
from daemon.firestore.layout import ACCOUNTS, Layout, account_write
from daemon.firestore.lease import COLLECTION
from machine.records import (
    COMMIT_WRITES_MAX,
    MAIN_PART,
    Account,
    AccountId,
    AccountStatus,
    Version,
)
from tests.emulator import new_project, start_emulator

GROUP = "bench"
BLOB_BYTES = 2048
ROUNDS = 5
COUNTS = (1_000, 10_000)


def main(arguments: list[str]) -> None:
    counts = [int(word) for word in arguments if word.isdigit()] or list(COUNTS)
    rows: list[dict[str, object]] = []
    with emulator_host() as host:
        for count in counts:
            rows += trio.run(measure, host, count)
    if "--json" in arguments:
        print(json.dumps(rows))
        return
    print(f"{'accounts':>8}  {'how':<34} {'median s':>8} {'min s':>7} {'x floor':>7}")
    for row in rows:
        print(
            f"{row['accounts']:>8}  {row['how']:<34} {row['median_s']:>8.3f} "
            f"{row['min_s']:>7.3f} {row['times_floor']:>7.2f}"
        )


@contextmanager
def emulator_host() -> Iterator[str]:
    if host := os.environ.get("WATCHKEEPER_TEST_EMULATOR"):
        yield host
        return
    with start_emulator() as emulator:
        yield emulator.host


async def measure(host: str, count: int) -> list[dict[str, object]]:
    project = new_project()
    times: dict[str, list[float]] = {}
    gaps: list[float] = []
    async with open_firestore(project, emulator_host=host) as client:
        await fill(client, count)
        store = FirestoreAccountStore(client, GROUP)

        async def ours() -> int:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch_loop, gaps)
                listing = await store.list_accounts()
                nursery.cancel_scope.cancel()
            return len(listing.copies)

        def floor() -> int:
            return read_undecoded(host, client, None)

        def parsed() -> int:
            return read_undecoded(host, client, protos.RunQueryResponse.FromString)

        def stock() -> int:
            return read_stock(host, project)

        for _ in range(ROUNDS):
            for name, read in {
                "gRPC bytes, undecoded (floor)": floor,
                "gRPC bytes, parsed only": parsed,
                "stock client, stream()": stock,
            }.items():
                times.setdefault(name, []).append(timed(read, count))
            started_at = time.perf_counter()
            assert await ours() == count
            times.setdefault("list_accounts", []).append(time.perf_counter() - started_at)
    floor_s = statistics.median(times["gRPC bytes, undecoded (floor)"])
    rows: list[dict[str, object]] = [
        {
            "accounts": count,
            "how": name,
            "median_s": statistics.median(taken),
            "min_s": min(taken),
            "times_floor": statistics.median(taken) / floor_s,
        }
        for name, taken in times.items()
    ]
    longest_s = max(gaps)
    rows.append(
        {
            "accounts": count,
            "how": "longest gap of the loop meanwhile",
            "median_s": longest_s,
            "min_s": longest_s,
            "times_floor": longest_s / floor_s,
        }
    )
    return rows


def timed(read: Callable[[], int], count: int) -> float:
    started_at = time.perf_counter()
    assert read() == count
    return time.perf_counter() - started_at


async def watch_loop(gaps: list[float]) -> None:
    """Note how long the loop leaves a task waiting that asks for a turn each millisecond."""
    while True:
        asked_at = time.perf_counter()
        await trio.sleep(0.001)
        gaps.append(time.perf_counter() - asked_at - 0.001)


async def fill(client: FirestoreClient, count: int) -> None:
    layout = Layout(client, GROUP)
    writes = []
    for number in range(count):
        account = Account(
            AccountId(f"account-{number:06}"),
            f"Name {number}",
            AccountStatus.CONNECTED,
            1_700_000_000.25,
            1_700_000_001.25,
            1_700_000_002.25,
            phone=f"49151{number:08}",
            last_connected_at=1_700_000_003.25,
        )
        parts = {MAIN_PART: os.urandom(BLOB_BYTES)}
        name = layout.account(account.account_id)
        writes.append(account_write(name, account, Version(1, 7), f"commit-{number}", parts))
    for start in range(0, count, COMMIT_WRITES_MAX):
        await client.commit(writes[start : start + COMMIT_WRITES_MAX])


def read_undecoded(
    host: str, client: FirestoreClient, parse: Callable[[bytes], object] | None
) -> int:
    """Read the query as gRPC gives it to a plain loop, without looking into it."""
    request = protos.RunQueryRequest(parent=Layout(client, GROUP).parent)
    request.structured_query.from_.add(collection_id=ACCOUNTS)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(host, options) as channel:
        method = channel.unary_stream(
            protos.SERVICE + "RunQuery",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=parse,
        )
        # The stream's last message has no document: it only says when the query was read.
        return sum(1 for message in method(request, timeout=300) if has_document(message))


def has_document(message: Any) -> bool:
    if isinstance(message, bytes):
        return len(message) > BLOB_BYTES
    return bool(message.HasField("document"))


def read_stock(host: str, project: str) -> int:
    os.environ["FIRESTORE_EMULATOR_HOST"] = host
    anonymous = AnonymousCredentials()  # type: ignore[no-untyped-call] # google-auth has no types
    client = firestore.Client(project, credentials=anonymous)
    try:
        data = client.collection(COLLECTION).document(f"{GROUP}-data").collection(ACCOUNTS)
        return sum(1 for snapshot in data.stream() if snapshot.to_dict())
    finally:
        client.close()  # type: ignore[no-untyped-call] # as above


if __name__ == "__main__":
    main(sys.argv[1:])
