"""What the first release wrote is read, restored and brought up to today's formats."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import trio

from daemon.auth_codec import Keyring, PackedAuthCodec, parse_key
from daemon.firestore.accounts import FirestoreAccountStore
from daemon.firestore.client import open_firestore
from daemon.firestore.documents import Fields
from daemon.firestore.lease import FirestoreLeaseStore
from daemon.sqlite.local import open_local
from daemon.sqlite.shared import SCHEMA, open_sqlite_shared
from machine.ports import AccountStore, LeaseStore
from machine.records import AccountCopy, KeyName, LeaseState
from tests.emulator import new_project
from tests.system.cluster import (
    KEY,
    Cluster,
    Node,
    firestore_env,
    open_cluster,
    sqlite_env,
)
from tests.system.steps import ALONE, arrived_readable_once, restored, statuses
from tests.upgrades.documents import load_documents, read_documents
from tests.upgrades.first_release import (
    FIXTURES,
    GROUP,
    IMPORTED,
    PAIRED,
    QUEUED,
    SENDING,
    imported_keys,
)

STORES = ["sqlite", pytest.param("firestore", marks=pytest.mark.emulator)]
TAKEN_S = 40.0
"""The dead holder's lease is younger than a ttl where the documents have just been loaded."""


def put(source: Path, target: Path) -> Path:
    """A copy to work on."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def rows(path: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(query).fetchall()


def put_disk(directory: Path) -> Path:
    for name in ("local.db", "epoch"):
        put(FIXTURES / "sqlite" / name, directory / name)
    return directory


async def load_firestore(project: str, emulator: str) -> None:
    text = (FIXTURES / "firestore" / "documents.json").read_text(encoding="utf-8")
    await load_documents(project, emulator, json.loads(text))


@pytest.fixture(
    params=["sqlite", pytest.param("firestore", marks=[pytest.mark.emulator, pytest.mark.long])]
)
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A group whose store is as the first release left it."""
    put(FIXTURES / request.param / "loopback.db", tmp_path / "loopback" / "loopback.db")
    if request.param == "sqlite":
        env = sqlite_env(tmp_path)
        put(FIXTURES / "sqlite" / "shared.db", tmp_path / "shared" / "shared.db")
    else:
        env = firestore_env(tmp_path, request.getfixturevalue("firestore_emulator"))
        project, emulator = env["WATCHKEEPER_FIRESTORE_PROJECT"], env["FIRESTORE_EMULATOR_HOST"]
        await load_firestore(project, emulator)
    async with open_cluster(tmp_path, env) as cluster:
        yield cluster


@pytest.mark.system
async def test_every_account_is_restored_and_what_waited_is_delivered(cluster: Cluster) -> None:
    node = cluster.make("a", **ALONE)
    await is_restored(cluster, node)
    assert await node.stop() == 0
    await is_of_todays_format(cluster)


@pytest.mark.system
@pytest.mark.parametrize("cluster", ["sqlite"], indirect=True)
async def test_the_first_releases_disk_counts_too(cluster: Cluster) -> None:
    node = cluster.make("a", **ALONE)
    disk = put_disk(Path(node.env["WATCHKEEPER_STATE_DIR"]))
    report = await is_restored(cluster, node)
    assert report["foundDisk"] == len(PAIRED) + 1
    assert await node.stop() == 0
    assert not list(disk.glob("*.quarantined-*"))


async def is_restored(cluster: Cluster, node: Node) -> dict[str, Any]:
    """Start `node`, and see it bring everything back; its restore report."""
    await cluster.restart(node)
    await cluster.wait_state(node, "ACTIVE", within_s=TAKEN_S)
    report = await restored(cluster, node)
    assert (report["failures"], report["total"], report["restored"]) == ([], 4, 3)
    connected = dict.fromkeys(PAIRED, "connected")
    assert await statuses(cluster, node) == {**connected, IMPORTED: "stopped"}
    await delivered_once(cluster, node, SENDING, QUEUED)
    for account_id in PAIRED:
        answer = await cluster.send(node, account_id, "today's")
        assert answer.json()["status"] == "server_ack"
    await arrived_readable_once(cluster, node, {})
    return report


async def delivered_once(cluster: Cluster, node: Node, *texts: str) -> None:
    with trio.fail_after(TAKEN_S):
        while True:
            arrived = [message["text"] for message in await cluster.received(node)]
            if all(text in arrived for text in texts):
                break
            await trio.sleep(0.05)
    assert [arrived.count(text) for text in texts] == [1] * len(texts)


async def is_of_todays_format(cluster: Cluster) -> None:
    if cluster.env["WATCHKEEPER_STORE"] == "sqlite":
        path = cluster.directory / "shared" / "shared.db"
        assert rows(path, "PRAGMA user_version") == [(SCHEMA.version,)]
        return
    project = cluster.env["WATCHKEEPER_FIRESTORE_PROJECT"]
    documents = await read_documents(project, cluster.env["FIRESTORE_EMULATOR_HOST"], GROUP)
    pair = [document for document in documents if "-data/" not in document.name]
    assert [Fields(document).integer("format") for document in pair] == [1, 1]
    accounts = [d for d in documents if d.name.split("/")[-2] == "accounts"]
    assert len(accounts) == len(PAIRED) + 1
    assert all(Fields(document).flag("sessionsDoubtful") in {True, False} for document in accounts)


@asynccontextmanager
async def open_todays(
    store: str, directory: Path, request: pytest.FixtureRequest
) -> AsyncIterator[tuple[LeaseStore, AccountStore]]:
    """Today's stores on what the first release wrote."""
    if store == "sqlite":
        path = put(FIXTURES / "sqlite" / "shared.db", directory / "shared.db")
        async with open_sqlite_shared(path) as shared:
            yield shared, shared
        return
    emulator, project = str(request.getfixturevalue("firestore_emulator")), new_project()
    await load_firestore(project, emulator)
    async with open_firestore(project, emulator_host=emulator) as client:
        yield FirestoreLeaseStore(client, GROUP), FirestoreAccountStore(client, GROUP)


def keys_of(copy: AccountCopy | None) -> Mapping[KeyName, bytes]:
    assert copy is not None
    codec = PackedAuthCodec(Keyring(parse_key(KEY)))
    return codec.unpack(copy.account.account_id, copy.parts)


@pytest.mark.parametrize("store", STORES)
async def test_every_key_is_what_was_written(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    async with open_todays(store, tmp_path, request) as (leases, accounts):
        view = await leases.read()
        assert (view.lease.holder, view.lease.state) == ("first", LeaseState.HELD)
        assert (view.fence.epoch, view.fence.settled) == (1, False)
        listed = (await accounts.list_accounts()).copies
        assert {copy.account.account_id: copy.fault for copy in listed} == dict.fromkeys(
            (*PAIRED, IMPORTED)
        )
        found = await accounts.fetch_account(IMPORTED)
        assert keys_of(found) == imported_keys()
        assert found is not None
        assert (found.account.banned_until, found.account.sessions_doubtful) == (None, False)


async def test_every_key_on_its_disk_is_what_was_written(tmp_path: Path) -> None:
    async with open_local(put_disk(tmp_path / "disk")) as local:
        assert await local.highest_epoch() == 1
        assert len((await local.list_accounts()).copies) == len(PAIRED) + 1
        assert keys_of(await local.fetch_account(IMPORTED)) == imported_keys()
        assert [t.dest for t in await local.list_transitions(9)] == ["PASSIVE", "ACTIVE"]


async def test_reading_the_first_releases_file_changes_no_byte_of_it(tmp_path: Path) -> None:
    path = put(FIXTURES / "sqlite" / "shared.db", tmp_path / "shared.db")
    before = path.read_bytes()
    async with open_sqlite_shared(path) as shared, shared.watch_fence() as fences:
        with trio.fail_after(5):
            assert (await fences.receive()).holder == "first"
        await shared.read()
        await shared.list_accounts()
        await shared.fetch_account(IMPORTED)
        assert len(await shared.list_pending()) == 2
        assert await shared.list_inbox(IMPORTED, after=None, count_max=9) == []
        assert not await shared.initialise()
    assert path.read_bytes() == before
