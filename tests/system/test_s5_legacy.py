"""S5: directories that Baileys wrote become accounts at the restore; broken ones are reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.baileys.directories import make_directories
from tests.system.cluster import Cluster
from tests.system.steps import (
    ALONE,
    LONG_ON_FIRESTORE,
    arrived_readable_once,
    dashboard,
    lines_of,
    restored,
    send_all,
    statuses,
)

pytestmark = [pytest.mark.system, pytest.mark.node, LONG_ON_FIRESTORE]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four accounts as Baileys wrote them. Shared: copy before changing anything."""
    return make_directories(tmp_path_factory.mktemp("baileys") / "sessions", 4)


@pytest.fixture
def sessions(made: Path, tmp_path: Path) -> Path:
    """Two sound directories, one with half a `creds.json`, one without, and a stranger's file."""
    directory = Path(shutil.copytree(made, tmp_path / "sessions"))
    creds = directory / "account-2" / "creds.json"
    creds.write_bytes(creds.read_bytes()[:100])
    (directory / "account-3" / "creds.json").unlink()
    (directory / "account-0" / "notes.txt").write_text("not of Baileys\n")
    return directory


def _everything_in(directory: Path) -> dict[str, tuple[bytes, int, int]]:
    """Each file's bytes, mode and time of change."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            stat = path.stat()
            found[str(path)] = (path.read_bytes(), stat.st_mode, stat.st_mtime_ns)
    return found


@pytest.mark.long
async def test_legacy_sessions_become_accounts_and_broken_ones_are_quarantined(
    cluster: Cluster, sessions: Path
) -> None:
    before = _everything_in(sessions)
    node = await cluster.start(
        "a", state="ACTIVE", WATCHKEEPER_LEGACY_SESSIONS_DIR=str(sessions), **ALONE
    )
    report = await restored(cluster, node)
    await cluster.wait_connected(node, "account-0", "account-1")
    assert await statuses(cluster, node) == {
        "account-0": "connected",
        "account-1": "connected",
        "account-2": "quarantined",
        "account-3": "quarantined",
    }
    failed = {failure["accountId"]: failure for failure in report["failures"]}
    assert set(failed) == {"account-2", "account-3"}
    assert all("creds.json" in f["cause"] and f["advice"] for f in failed.values())
    accepted = await send_all(cluster, node, "account-0", "from an imported account")
    assert await node.stop() == 0
    assert _everything_in(sessions) == before

    # A later start knows them already: the directory is not taken for newer than what we have.
    await cluster.restart(node, state="ACTIVE")
    await cluster.wait_connected(node, "account-0", "account-1")
    assert len(lines_of(node, "account account-0 imported")) == 1
    accepted |= await send_all(cluster, node, "account-0", "after a restart")
    await arrived_readable_once(cluster, node, accepted)
    assert await node.stop() == 0

    # An instance that has no such directory has the accounts from the shared store.
    b = await cluster.start("b", state="ACTIVE", **ALONE)
    await cluster.wait_connected(b, "account-0", "account-1")
    assert (await dashboard(cluster, b))["restore"]["restored"] == 2
    accepted |= await send_all(cluster, b, "account-1", "from another host")
    await arrived_readable_once(cluster, b, accepted)
    assert _everything_in(sessions) == before
