"""Write the fixtures anew, with the first release's own code.

`python -m tests.upgrades.make_fixtures`, with the Firestore emulator. They are as that release
left them: there is no reason to write them again, unless the scenario grows.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import trio

from tests.emulator import start_emulator
from tests.system.cluster import (
    KEY,
    ROOT,
    Cluster,
    Node,
    firestore_env,
    open_cluster,
    sqlite_env,
)
from tests.upgrades.documents import export_documents
from tests.upgrades.first_release import (
    FIXTURES,
    GROUP,
    IMPORTED,
    PAIRED,
    QUEUED,
    SENDING,
    SENT,
    extract,
    imported_keys,
)

WRITE_ACCOUNT = Path(__file__).parent / "write_account.py"


async def leave_behind(cluster: Cluster, node: Node) -> None:
    """Three accounts in use, and a crash: one message without its ack, another behind it."""
    await cluster.add_paired(node, *PAIRED)
    for account_id in PAIRED:
        for text in SENT:
            assert (await cluster.send(node, account_id, text)).status_code == 200
    lost = {"accountId": "ben", "ackLost": True, "ackTimes": 1, "ackLostCloseS": 60}
    await cluster.json(node, "POST", "/api/loopback/behaviour", json=lost)
    async with trio.open_nursery() as nursery:
        for text in (SENDING, QUEUED):
            nursery.start_soon(_send_in_vain, cluster, node, text)
            await trio.sleep(0.5)
        node.signal(signal.SIGKILL)
        await node.wait_ended()
        nursery.cancel_scope.cancel()


async def _send_in_vain(cluster: Cluster, node: Node, text: str) -> None:
    # The kill leaves its caller without an answer.
    with suppress(httpx.TransportError):
        await cluster.send(node, "ben", text)


async def write_imported(node: Node, first: Path, **where: str) -> None:
    """The account with Baileys' keys, by the first release's stores."""
    given = {
        "account": IMPORTED,
        "keys": {name: value.decode() for name, value in imported_keys().items()},
        "key": KEY,
        "disk": node.env["WATCHKEEPER_STATE_DIR"],
        **where,
    }
    await trio.run_process(
        [sys.executable, str(WRITE_ACCOUNT)],
        cwd=first,
        env={**os.environ, "PYTHONPATH": str(first)},
        stdin=json.dumps(given).encode(),
    )


def keep(source: Path, target: Path) -> None:
    """One database, with what is still in its log."""
    with closing(sqlite3.connect(source)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


async def make_sqlite(first: Path, work: Path) -> None:
    """shared.db, and the disk of the instance that held the lease."""
    async with open_cluster(work, sqlite_env(work)) as cluster:
        node = await cluster.start_from(first, "first", state="ACTIVE")
        await leave_behind(cluster, node)
        await write_imported(node, first, shared=str(work / "shared" / "shared.db"))
        disk = Path(node.env["WATCHKEEPER_STATE_DIR"])
    keep(work / "shared" / "shared.db", FIXTURES / "sqlite" / "shared.db")
    keep(disk / "local.db", FIXTURES / "sqlite" / "local.db")
    shutil.copyfile(disk / "epoch", FIXTURES / "sqlite" / "epoch")
    keep(work / "loopback" / "loopback.db", FIXTURES / "sqlite" / "loopback.db")


async def make_firestore(first: Path, work: Path, emulator: str) -> None:
    """Every document, as JSON."""
    env = firestore_env(work, emulator)
    # The lease, too, is to be of the first release's making.
    await _init(first, env)
    async with open_cluster(work, env) as cluster:
        node = await cluster.start_from(first, "first", state="ACTIVE")
        await leave_behind(cluster, node)
        project = env["WATCHKEEPER_FIRESTORE_PROJECT"]
        where = {"project": project, "emulator": emulator, "group": GROUP}
        await write_imported(node, first, **where)
        documents: list[dict[str, Any]] = await export_documents(project, emulator, GROUP)
    target = FIXTURES / "firestore" / "documents.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(documents, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    keep(work / "loopback" / "loopback.db", FIXTURES / "firestore" / "loopback.db")


async def _init(first: Path, env: dict[str, str]) -> None:
    await trio.run_process(
        [sys.executable, "-m", "daemon", "init"], cwd=first, env={**os.environ, **env}
    )


async def main() -> None:
    """Both stores' fixtures."""
    with tempfile.TemporaryDirectory() as name, start_emulator() as emulator:
        work = Path(name)
        first = extract(work / "first")
        for part in ("sqlite", "firestore"):
            (work / part).mkdir()
        await make_sqlite(first, work / "sqlite")
        await make_firestore(first, work / "firestore", emulator.host)


if __name__ == "__main__":
    assert Path.cwd() == ROOT, "from the checkout's own directory"
    trio.run(main)
