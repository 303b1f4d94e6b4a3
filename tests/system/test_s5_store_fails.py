"""S5: the shared store cannot be read at first, for long, or in part, while the lease lives on.

Accounts and lease use connections of their own, so the proxy can reset the one on which the list of
accounts is asked for, and no other.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx
import pytest
import trio

from tests.fault_proxy import FaultProxy, open_fault_proxy
from tests.system.cluster import Cluster, Node, firestore_env, open_cluster
from tests.system.steps import (
    ALONE,
    BOTH,
    DISK,
    LONG_ON_FIRESTORE,
    SHARED,
    arrived_readable_once,
    dashboard,
    restored,
    send_all,
    state_dir,
    statuses,
    wait_logged,
)

pytestmark = pytest.mark.system

ACCOUNTS_QUERY = b"\x12\x08accounts"
"""A query's `from.collection_id` on the wire; a document's name has the word without the length."""

IMPATIENT = {"WATCHKEEPER_RESTORE_TRY_S": "1", "WATCHKEEPER_RESTORE_GIVE_UP_S": "2"}


@asynccontextmanager
async def open_behind_proxy(
    tmp_path: Path, emulator: str
) -> AsyncIterator[tuple[Cluster, FaultProxy]]:
    """A group whose way to the emulator can be cut."""
    async with (
        open_fault_proxy(emulator) as proxy,
        open_cluster(tmp_path, firestore_env(tmp_path, proxy.host)) as cluster,
    ):
        yield cluster, proxy


async def _paired_and_stopped(cluster: Cluster, **extra: str) -> tuple[Node, dict[str, str]]:
    """A node that paired two accounts, sent a message with each and ended in order."""
    node = await cluster.start("a", state="ACTIVE", **ALONE, **extra)
    await cluster.add_paired(node, "ann", "ben")
    accepted = await send_all(cluster, node, "ann", "ann before")
    accepted |= await send_all(cluster, node, "ben", "ben before")
    assert await node.stop() == 0
    return node, accepted


@pytest.mark.emulator
async def test_accounts_come_back_when_firestore_fails_the_first_tries(
    tmp_path: Path, firestore_emulator: str
) -> None:
    async with open_behind_proxy(tmp_path, firestore_emulator) as (cluster, proxy):
        node, accepted = await _paired_and_stopped(cluster)
        # Without a copy of its own, only the shared store can bring them back.
        shutil.rmtree(state_dir(node))
        proxy.refused = ACCOUNTS_QUERY
        await cluster.restart(node)
        with trio.fail_after(20):
            # The one who stands by may ask first; a try of the restore is among three.
            while "try 2" not in node.log():
                await trio.sleep(0.05)
        proxy.refused = None
        report = await restored(cluster, node)
        assert report["retries"][SHARED] >= 2
        assert report["failures"] == []
        assert (report["foundShared"], report["foundDisk"], report["restored"]) == (2, 0, 2)
        assert report["takenFrom"] == {SHARED: 2}
        accepted |= await send_all(cluster, node, "ann", "ann after")
        await arrived_readable_once(cluster, node, accepted)


@pytest.mark.emulator
@pytest.mark.long
async def test_the_disk_brings_accounts_back_when_firestore_never_lists_them(
    tmp_path: Path, firestore_emulator: str
) -> None:
    async with open_behind_proxy(tmp_path, firestore_emulator) as (cluster, proxy):
        node, accepted = await _paired_and_stopped(cluster, **IMPATIENT)
        proxy.refused = ACCOUNTS_QUERY
        await cluster.restart(node, state="ACTIVE")
        report = await restored(cluster, node)
        assert (report["foundShared"], report["foundDisk"], report["restored"]) == (None, 2, 2)
        assert [failure["accountId"] for failure in report["failures"]] == [None]
        assert report["failures"][0]["cause"].startswith(f"{SHARED} could not be read")
        assert report["takenFrom"] == {DISK: 2}
        accepted |= await send_all(cluster, node, "ann", "ann after")
        await arrived_readable_once(cluster, node, accepted)
        assert proxy.refusals > 1


@pytest.mark.long
@pytest.mark.emulator
async def test_an_account_that_no_readable_copy_names_is_not_called_unknown(
    tmp_path: Path, firestore_emulator: str
) -> None:
    async with open_behind_proxy(tmp_path, firestore_emulator) as (cluster, proxy):
        node, accepted = await _paired_and_stopped(cluster, **IMPATIENT)
        shutil.rmtree(state_dir(node))
        proxy.refused = ACCOUNTS_QUERY
        await cluster.restart(node)
        answers: list[httpx.Response] = []
        with trio.move_on_after(8):
            while True:
                answers.append(await cluster.send(node, "ann", f"asked {len(answers)}"))
                await trio.sleep(0.25)
        assert {r.json().get("error") for r in answers} & {"account_not_found"} == set()
        proxy.refused = None
        await cluster.wait_connected(node, "ann", "ben")
        for answer in answers:
            if answer.status_code < 300:
                accepted[answer.json()["messageId"]] = "asked"
        accepted |= await send_all(cluster, node, "ben", "ben after")
        await arrived_readable_once(cluster, node, accepted)


@pytest.mark.emulator
@pytest.mark.long
async def test_a_stale_disk_copy_that_nobody_refreshed_loses_to_the_shared_one(
    tmp_path: Path, firestore_emulator: str
) -> None:
    async with open_behind_proxy(tmp_path, firestore_emulator) as (cluster, proxy):
        node, accepted = await _paired_and_stopped(cluster)
        backup = shutil.copytree(state_dir(node), tmp_path / "backup")
        await cluster.restart(node, state="ACTIVE")
        await cluster.wait_connected(node, "ann", "ben")
        accepted |= await send_all(cluster, node, "ann", "two", "three")
        assert await node.stop() == 0
        shutil.rmtree(state_dir(node))
        shutil.copytree(backup, state_dir(node))

        # A standby refreshes its copy at its start: that has to fail for this test.
        proxy.refused = ACCOUNTS_QUERY
        await cluster.restart(node)
        await wait_logged(node, "disk copy could not be brought up to date")
        proxy.refused = None
        report = await restored(cluster, node)
        assert (report["restored"], report["failures"]) == (2, [])
        assert report["takenFrom"] == {SHARED: 2}
        accepted |= await send_all(cluster, node, "ann", "four")
        await arrived_readable_once(cluster, node, accepted)


def _scribble_over_ann(tmp_path: Path, env: dict[str, str]) -> None:
    """Leave ann's record in the shared store with credentials that mean nothing."""
    if env["WATCHKEEPER_STORE"] == "sqlite":
        with closing(sqlite3.connect(tmp_path / "shared" / "shared.db")) as database, database:
            database.execute("UPDATE accounts SET main = x'00FF' WHERE account_id = 'ann'")
        return
    project = env["WATCHKEEPER_FIRESTORE_PROJECT"]
    url = (
        f"http://{env['FIRESTORE_EMULATOR_HOST']}/v1/projects/{project}/databases/(default)"
        "/documents/watchkeeper/default-data/accounts/ann"
    )
    wrong = {"fields": {"packed": {"stringValue": "not bytes"}}}
    answer = httpx.patch(
        url,
        params={"updateMask.fieldPaths": "packed"},
        json=wrong,
        headers={"Authorization": "Bearer owner"},
    )
    assert answer.status_code == 200, answer.text


@LONG_ON_FIRESTORE
async def test_a_record_that_means_nothing_is_quarantined_and_the_others_live(
    cluster: Cluster, tmp_path: Path
) -> None:
    node, accepted = await _paired_and_stopped(cluster)
    shutil.rmtree(state_dir(node))
    _scribble_over_ann(tmp_path, cluster.env)
    await cluster.restart(node, state="ACTIVE")
    report = await restored(cluster, node)
    assert [failure["accountId"] for failure in report["failures"]] == ["ann"]
    assert report["restored"] == 1
    assert await statuses(cluster, node) == {"ann": "quarantined", "ben": "connected"}
    refused = await cluster.send(node, "ann", "never")
    assert (refused.status_code, refused.json()["error"]) == (409, "account_quarantined")
    accepted |= await send_all(cluster, node, "ben", "ben after")
    await arrived_readable_once(cluster, node, accepted)


@pytest.mark.long
@LONG_ON_FIRESTORE
async def test_a_record_that_means_nothing_is_mended_from_this_disk(
    cluster: Cluster, tmp_path: Path
) -> None:
    node, accepted = await _paired_and_stopped(cluster)
    _scribble_over_ann(tmp_path, cluster.env)
    await cluster.restart(node, state="ACTIVE")
    report = await restored(cluster, node)
    assert (report["restored"], report["failures"]) == (2, [])
    assert report["takenFrom"] == {BOTH: 2}
    accepted |= await send_all(cluster, node, "ann", "ann after")
    await arrived_readable_once(cluster, node, accepted)
    assert await node.stop() == 0
    # The shared copy is whole again: an instance without a copy of its own restores from it.
    b = await cluster.start("b", state="ACTIVE")
    report = await restored(cluster, b)
    assert (report["restored"], report["failures"], report["foundShared"]) == (2, [], 2)
    assert (await dashboard(cluster, b))["instance"]["state"] == "ACTIVE"
    accepted |= await send_all(cluster, b, "ann", "ann on b")
    await arrived_readable_once(cluster, b, accepted)
