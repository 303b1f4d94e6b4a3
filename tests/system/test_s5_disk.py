"""S5: this host's disk copy is damaged, stale or newer: the right one wins, the report says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.system.cluster import Cluster, Node
from tests.system.steps import (
    ALONE,
    BOTH,
    DISK,
    LONG_ON_FIRESTORE,
    SHARED,
    arrived_readable_once,
    lines_of,
    restored,
    send_all,
    state_dir,
)

pytestmark = [pytest.mark.system, LONG_ON_FIRESTORE]

LOCAL_FILE = "local.db"
SHORT_TERM = {
    "WATCHKEEPER_LEASE_TTL_S": "5",
    "WATCHKEEPER_LEASE_RENEW_S": "1.5",
    "WATCHKEEPER_LEASE_ATTEMPT_S": "1",
    "WATCHKEEPER_LEASE_MARGIN_S": "1",
}


def _garbage(path: Path) -> None:
    path.write_bytes(b"this was a database once " * 1000)


def _truncated(path: Path) -> None:
    content = path.read_bytes()
    assert len(content) > 40_000
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("damage", [_garbage, pytest.param(_truncated, marks=pytest.mark.long)])
async def test_a_damaged_disk_copy_is_set_aside_and_the_shared_copy_wins(
    cluster: Cluster, damage: Callable[[Path], None]
) -> None:
    node = await cluster.start("a", state="ACTIVE", **ALONE)
    await cluster.add_paired(node, "ann", "ben")
    accepted = await send_all(cluster, node, "ann", "one", "two")
    assert await node.stop() == 0
    damage(state_dir(node) / LOCAL_FILE)
    damaged = (state_dir(node) / LOCAL_FILE).read_bytes()

    await cluster.restart(node, state="ACTIVE")
    report = await restored(cluster, node)
    assert (report["foundShared"], report["restored"]) == (2, 2)
    assert [failure["accountId"] for failure in report["failures"]] == [None]
    cause = report["failures"][0]["cause"]
    assert cause.startswith(f"{DISK}: {LOCAL_FILE} was damaged")
    assert cause.endswith(f"{LOCAL_FILE}.quarantined-1")
    assert (state_dir(node) / f"{LOCAL_FILE}.quarantined-1").read_bytes() == damaged
    accepted |= await send_all(cluster, node, "ann", "three")
    await arrived_readable_once(cluster, node, accepted)


async def test_a_stale_disk_copy_never_replaces_the_shared_one(cluster: Cluster) -> None:
    node = await cluster.start("a", state="ACTIVE", **ALONE)
    await cluster.add_paired(node, "ann", "ben")
    accepted = await send_all(cluster, node, "ann", "one")
    assert await node.stop() == 0
    backup = cluster.directory / "backup"
    shutil.copytree(state_dir(node), backup)

    await cluster.restart(node, state="ACTIVE")
    await cluster.wait_connected(node, "ann")
    accepted |= await send_all(cluster, node, "ann", "two", "three", "four")
    assert await node.stop() == 0
    shutil.rmtree(state_dir(node))
    shutil.copytree(backup, state_dir(node))

    await cluster.restart(node, state="ACTIVE")
    report = await restored(cluster, node)
    assert (report["restored"], report["failures"]) == (2, [])
    # The standby may have brought its copy up to date before it became ACTIVE.
    assert sum(report["takenFrom"].get(source, 0) for source in (SHARED, BOTH)) == 2
    accepted |= await send_all(cluster, node, "ann", "five")
    await arrived_readable_once(cluster, node, accepted)


async def _killed_before_replication(cluster: Cluster) -> tuple[Node, dict[str, str]]:
    """A node that acknowledged keys which only its disk has, and was killed."""
    node = await cluster.start(
        "a",
        state="ACTIVE",
        WATCHKEEPER_DURABILITY="local",
        WATCHKEEPER_REPLICATE_WITHIN_S="20",
        **SHORT_TERM,
        **ALONE,
    )
    await cluster.add_paired(node, "ann", "ben")
    # Each acceptance takes along what was behind; the keys of the last message are not.
    accepted = await send_all(cluster, node, "ann", "one", "two", "three")
    # A receipt may answer the last send before its keys are on the disk.
    with trio.fail_after(10):
        while len(lines_of(node, "of ann acknowledged by the server")) < len(accepted):
            await trio.sleep(0.02)
    await node.kill()
    return node, accepted


@pytest.mark.long
async def test_a_newer_disk_copy_wins_and_is_pushed(cluster: Cluster) -> None:
    node, accepted = await _killed_before_replication(cluster)
    await cluster.restart(node, state="ACTIVE")
    report = await restored(cluster, node)
    assert (report["restored"], report["failures"]) == (2, [])
    assert report["takenFrom"].get(DISK, 0) >= 1
    assert lines_of(node, r"account ann: this disk's copy .* was newer")
    accepted |= await send_all(cluster, node, "ann", "four")
    await arrived_readable_once(cluster, node, accepted)
    assert await node.stop() == 0

    # What was pushed is complete: an instance with nothing on its disk goes on from it.
    b = await cluster.start("b", state="ACTIVE", **SHORT_TERM)
    report = await restored(cluster, b)
    assert (report["restored"], report["failures"]) == (2, [])
    accepted |= await send_all(cluster, b, "ann", "five")
    await arrived_readable_once(cluster, b, accepted)
