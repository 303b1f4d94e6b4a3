"""The first release and today's at once, as in a rolling upgrade: real processes, real stores."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import trio

from daemon.firestore.client import open_firestore
from daemon.firestore.documents import update_write
from daemon.firestore.lease import COLLECTION
from tests.system.cluster import Cluster, Node, firestore_env, open_cluster, sqlite_env
from tests.system.steps import ALONE, arrived_readable_once, lines_of, send_all, wait_logged
from tests.upgrades.documents import read_documents
from tests.upgrades.first_release import GROUP, extract

pytestmark = [pytest.mark.system, pytest.mark.long]

TTL_S = 15.0
"""The default of both releases."""
REFUSED = 2


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first release's code."""
    return extract(tmp_path_factory.mktemp("first"))


@pytest.fixture(params=["sqlite", pytest.param("firestore", marks=pytest.mark.emulator)])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    if request.param == "sqlite":
        env = sqlite_env(tmp_path)
    else:
        env = firestore_env(tmp_path, request.getfixturevalue("firestore_emulator"))
    async with open_cluster(tmp_path, env) as cluster:
        yield cluster


@pytest.fixture
def shared_db(cluster: Cluster) -> Path:
    return cluster.directory / "shared" / "shared.db"


def format_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        found: int = database.execute("PRAGMA user_version").fetchone()[0]
        return found


def everything_in(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        return list(database.iterdump())


async def test_the_earlier_holder_is_not_disturbed_and_hands_over(
    cluster: Cluster, first: Path
) -> None:
    a = await cluster.start_from(first, "a", state="ACTIVE")
    await cluster.add_paired(a, "ann")
    sent = await send_all(cluster, a, "ann", "before there was another")
    b = await cluster.start("b", state="PASSIVE")
    await wait_logged(b, "account restore skipped, lease held by a")
    # A whole renewal, a new account and a send through either instance: all of it writes.
    await trio.sleep(TTL_S / 2)
    await cluster.add_paired(a, "ben")
    sent |= await send_all(cluster, a, "ben", "beside the later release")
    sent |= await send_all(cluster, b, "ann", "through the later release")
    answers: list[httpx.Response] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_send_through_both, cluster, [a, b], answers)
        assert await a.stop() == 0
        await cluster.wait_state(b, "ACTIVE")
        await cluster.wait_connected(b, "ann", "ben")
        nursery.cancel_scope.cancel()
    assert {answer.status_code for answer in answers} <= {200, 202}
    assert "ERROR" not in a.log()
    sent |= await send_all(cluster, b, "ben", "under the later release")
    await arrived_readable_once(cluster, b, sent)


async def _send_through_both(
    cluster: Cluster, nodes: list[Node], answers: list[httpx.Response]
) -> None:
    while True:
        for node in nodes:
            try:
                answers.append(await cluster.send(node, "ann", f"during, {len(answers)}"))
            except httpx.ConnectError:
                continue
        await trio.sleep(0.02)


@pytest.mark.parametrize("cluster", ["sqlite"], indirect=True)
async def test_an_earlier_release_that_is_started_on_an_upgraded_file_says_what_to_do(
    cluster: Cluster, first: Path, shared_db: Path
) -> None:
    a = await cluster.start_from(first, "a", state="ACTIVE")
    await cluster.add_paired(a, "ann")
    b = await cluster.start("b", state="PASSIVE", **ALONE)
    earlier = format_of(shared_db)
    await a.stop()
    await cluster.wait_state(b, "ACTIVE")
    assert format_of(shared_db) > earlier
    # The first release looks at the file alone, and its log is folded into it at the latest when
    # the last instance ends.
    await b.stop()
    before = everything_in(shared_db)
    a.spawn()
    assert await a.wait_ended() == REFUSED
    assert lines_of(a, "written by a newer watchkeeper")
    assert everything_in(shared_db) == before


@pytest.mark.parametrize("cluster", ["sqlite"], indirect=True)
async def test_after_a_crash_of_the_later_release_an_earlier_standby_changes_nothing(
    cluster: Cluster, first: Path, shared_db: Path
) -> None:
    old = await cluster.start_from(first, "old", state="ACTIVE")
    await cluster.add_paired(old, "ann")
    b = await cluster.start("b", state="PASSIVE")
    await wait_logged(old, "standby b is there")
    step_down = {"reason": "upgrade", "handoffTo": "b"}
    await cluster.json(old, "POST", "/api/admin/step-down", json=step_down)
    await cluster.wait_state(b, "ACTIVE")
    await cluster.wait_state(old, "PASSIVE")
    sent = await send_all(cluster, old, "ann", "through the earlier release")
    await b.kill()
    before = everything_in(shared_db)
    await trio.sleep(TTL_S + 3)
    assert not await cluster.answers(old, "/active")
    assert everything_in(shared_db) == before
    c = await cluster.start("c", **ALONE)
    await cluster.wait_state(c, "ACTIVE")
    await cluster.wait_connected(c, "ann")
    sent |= await send_all(cluster, c, "ann", "after the crash")
    await arrived_readable_once(cluster, c, sent)


@pytest.mark.parametrize(
    "cluster", [pytest.param("firestore", marks=pytest.mark.emulator)], indirect=True
)
async def test_a_standby_stands_back_from_a_lease_of_a_newer_format(cluster: Cluster) -> None:
    newer = await cluster.start("newer", state="ACTIVE")
    await cluster.add_paired(newer, "ann")
    older = await cluster.start("older", state="PASSIVE")
    await wait_logged(older, "account restore skipped, lease held by newer")
    await newer.kill()
    project = cluster.env["WATCHKEEPER_FIRESTORE_PROJECT"]
    emulator = cluster.env["FIRESTORE_EMULATOR_HOST"]
    async with open_firestore(project, emulator_host=emulator) as client:
        lease = client.document(COLLECTION, f"{GROUP}-lease")
        await client.commit([update_write(lease, {"format": 2})])
        before = await read_documents(project, emulator, GROUP)
        await trio.sleep(TTL_S + 3)
        assert await cluster.answers(older, "/passive")
        assert lines_of(
            older, r"format 2 is newer than this release reads \(1\).*Start an instance"
        )
        assert await read_documents(project, emulator, GROUP) == before
        # Back from a backup, say: it goes on by itself.
        await client.commit([update_write(lease, {"format": 1})])
    await cluster.wait_state(older, "ACTIVE")
    await cluster.wait_connected(older, "ann")
