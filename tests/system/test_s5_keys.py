"""S5: a wrong encryption key loses nothing; a new one takes over from the old one."""

from __future__ import annotations

import base64
import sqlite3
from contextlib import closing
from typing import Any

import pytest
import trio

from tests.seed import open_stores
from tests.system.cluster import KEY, Cluster, Node
from tests.system.steps import (
    ALONE,
    LONG_ON_FIRESTORE,
    arrived_readable_once,
    lines_of,
    restored,
    send_all,
    state_dir,
    statuses,
)

pytestmark = [pytest.mark.system, LONG_ON_FIRESTORE]

OTHER_KEY = base64.b64encode(b"o" * 32).decode()
ACCOUNTS = ("ann", "ben")


async def _paired_and_stopped(cluster: Cluster) -> tuple[Node, dict[str, str]]:
    node = await cluster.start("a", state="ACTIVE", **ALONE)
    await cluster.add_paired(node, *ACCOUNTS)
    accepted = await send_all(cluster, node, "ann", "one")
    assert await node.stop() == 0
    return node, accepted


async def _shared_bytes(cluster: Cluster) -> dict[str, Any]:
    """Every account's version and packed bytes, as the shared store has them."""
    async with open_stores(cluster.env) as stores:
        found: dict[str, Any] = {}
        for copy in (await stores.accounts.list_accounts()).copies:
            whole = await stores.accounts.fetch_account(copy.account.account_id)
            assert whole is not None
            found[whole.account.account_id] = (whole.version, dict(whole.parts))
        return found


def _disk_rows(node: Node) -> list[Any]:
    with closing(sqlite3.connect(state_dir(node) / "local.db")) as database:
        tables = database.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT IN"
            " ('transitions', 'reports') ORDER BY name"
        ).fetchall()
        return [database.execute(f"SELECT * FROM {name}").fetchall() for (name,) in tables]


@pytest.mark.long
async def test_a_wrong_key_quarantines_everything_and_overwrites_nothing(cluster: Cluster) -> None:
    node, accepted = await _paired_and_stopped(cluster)
    shared, disk = await _shared_bytes(cluster), _disk_rows(node)
    assert set(shared) == set(ACCOUNTS)

    node.env["WATCHKEEPER_ENCRYPTION_KEY"] = OTHER_KEY
    await cluster.restart(node, state="ACTIVE")
    report = await restored(cluster, node)
    assert report["restored"] == 0
    assert sorted(failure["accountId"] for failure in report["failures"]) == list(ACCOUNTS)
    assert all("key" in failure["cause"] for failure in report["failures"])
    assert set((await statuses(cluster, node)).values()) == {"quarantined"}
    refused = await cluster.send(node, "ann", "never")
    assert (refused.status_code, refused.json()["error"]) == (409, "account_quarantined")
    assert await node.stop() == 0
    assert await _shared_bytes(cluster) == shared
    assert _disk_rows(node) == disk

    node.env["WATCHKEEPER_ENCRYPTION_KEY"] = KEY
    await cluster.restart(node, state="ACTIVE")
    report = await restored(cluster, node)
    assert (report["restored"], report["failures"]) == (2, [])
    accepted |= await send_all(cluster, node, "ann", "two")
    await arrived_readable_once(cluster, node, accepted)


@pytest.mark.long
async def test_a_new_key_takes_over_and_the_old_one_can_go(cluster: Cluster) -> None:
    node, accepted = await _paired_and_stopped(cluster)
    node.env["WATCHKEEPER_ENCRYPTION_KEY"] = OTHER_KEY
    await cluster.restart_with(node, WATCHKEEPER_ENCRYPTION_KEYS_OLD=KEY)
    assert (await restored(cluster, node))["failures"] == []
    with trio.fail_after(20):
        while len(lines_of(node, "re-encrypted with the active key")) < len(ACCOUNTS):
            await trio.sleep(0.05)
    accepted |= await send_all(cluster, node, "ann", "two")
    assert await node.stop() == 0

    await cluster.restart(node, state="ACTIVE")
    report = await restored(cluster, node)
    assert (report["restored"], report["failures"]) == (2, [])
    accepted |= await send_all(cluster, node, "ann", "three")
    await arrived_readable_once(cluster, node, accepted)
