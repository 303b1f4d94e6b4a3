"""S3: the store hangs for longer than the ttl: the holder stops itself before another could act."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path

import pytest
import trio

from tests.emulator import Emulator
from tests.system.cluster import Cluster, Node, firestore_env, open_cluster, sqlite_env

pytestmark = pytest.mark.system

TTL_S = 6.0
TIMES = {
    "WATCHKEEPER_LEASE_TTL_S": str(TTL_S),
    "WATCHKEEPER_LEASE_RENEW_S": "1.5",
    "WATCHKEEPER_LEASE_ATTEMPT_S": "1",
    "WATCHKEEPER_LEASE_MARGIN_S": "1",
}


@asynccontextmanager
async def locked_out(path: Path) -> AsyncIterator[None]:
    """Nobody else can write the file, nor wait long enough for it."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as database:
        await trio.to_thread.run_sync(database.execute, "PRAGMA busy_timeout = 5000")
        await trio.to_thread.run_sync(database.execute, "BEGIN IMMEDIATE")
        try:
            yield
        finally:
            database.execute("ROLLBACK")


@asynccontextmanager
async def paused(emulator: Emulator) -> AsyncIterator[None]:
    """The store's process does not run: calls are taken, and nobody answers."""
    emulator.pause()
    try:
        yield
    finally:
        emulator.resume()


async def _until_it_stops(cluster: Cluster, holder: Node, hung_at: float) -> float:
    """Seconds from the hang until the holder does not act any more."""
    with trio.fail_after(TTL_S + 5):
        while await cluster.answers(holder, "/active"):
            await trio.sleep(0.02)
    return trio.current_time() - hung_at


async def _exactly_one_after_healing(cluster: Cluster, nodes: list[Node]) -> None:
    active = await cluster.wait_active(*nodes, within_s=TTL_S + 5)
    await cluster.wait_connected(active, "ann")
    for _ in range(20):
        acting = [node for node in nodes if await cluster.answers(node, "/active")]
        assert len(acting) == 1
        await trio.sleep(0.05)
    evictions = await cluster.json(active, "GET", "/api/loopback/evictions")
    assert evictions["count"] == 0


async def _hang_and_heal(cluster: Cluster, hang: AbstractAsyncContextManager[None]) -> None:
    a = await cluster.start("a", state="ACTIVE", **TIMES)
    await cluster.add_paired(a, "ann")
    b = await cluster.start("b", state="PASSIVE", **TIMES)
    async with hang:
        hung_at = trio.current_time()
        stopped_after_s = await _until_it_stops(cluster, a, hung_at)
        # The last renewal was asked for before the hang began.
        assert stopped_after_s < TTL_S
        assert not await cluster.answers(b, "/active")
        await trio.sleep(max(0.0, TTL_S + 2 - stopped_after_s))
        assert not await cluster.answers(a, "/active")
        assert not await cluster.answers(b, "/active")
    await _exactly_one_after_healing(cluster, [a, b])
    assert "lease lost" in a.log()


@pytest.mark.long
async def test_a_locked_database_ends_the_term_before_the_ttl(tmp_path: Path) -> None:
    async with open_cluster(tmp_path, sqlite_env(tmp_path)) as cluster:
        await _hang_and_heal(cluster, locked_out(tmp_path / "shared" / "shared.db"))


@pytest.mark.long
@pytest.mark.emulator
async def test_a_stopped_emulator_ends_the_term_before_the_ttl(
    tmp_path: Path, own_emulator: Emulator
) -> None:
    env = firestore_env(tmp_path, own_emulator.host)
    async with open_cluster(tmp_path, env) as cluster:
        await _hang_and_heal(cluster, paused(own_emulator))
