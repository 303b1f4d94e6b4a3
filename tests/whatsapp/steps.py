"""Steps that the tests with real instances, real Baileys and the fake server have in common."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from tests.bridge.node.install import install_node_side
from tests.system.cluster import REACH_S, Cluster, Node, open_cluster, sqlite_env
from tests.whatsapp.server import FakeWhatsApp


@asynccontextmanager
async def open_whatsapp_cluster(
    directory: Path, whatsapp: FakeWhatsApp, **extra: str
) -> AsyncIterator[Cluster]:
    """Instances on one SQLite store, connected to the fake server through Baileys."""
    install_node_side()
    env = {
        **sqlite_env(directory),
        "WATCHKEEPER_CONNECTOR": "baileys",
        "WATCHKEEPER_WHATSAPP_URL": whatsapp.url,
        **extra,
    }
    async with open_cluster(directory, env) as cluster:
        yield cluster


async def pair(
    cluster: Cluster, node: Node, whatsapp: FakeWhatsApp, account_id: str, phone: str
) -> None:
    """Add an account through the API and scan its QR code; returns when it is connected."""
    path = "/api/whatsapp/accounts"
    body = {"accountId": account_id, "name": f"{account_id}'s"}
    await cluster.json(node, "POST", path, json=body)
    await whatsapp.scan(phone, await shown_qr(cluster, node, account_id))
    await cluster.wait_connected(node, account_id)


async def shown_qr(cluster: Cluster, node: Node, account_id: str) -> str:
    """The QR code to scan now."""
    with trio.fail_after(REACH_S):
        while True:
            answer = await cluster.ask(
                node,
                "GET",
                f"/api/whatsapp/accounts/{account_id}/qr",
            )
            if answer.status_code == 200:
                return str(answer.json()["qr"])
            await trio.sleep(0.05)


async def received(cluster: Cluster, node: Node, account_id: str) -> list[dict[str, Any]]:
    """Everything an account has received, page by page, as a caller reads it."""
    messages: list[dict[str, Any]] = []
    cursor = ""
    while True:
        query = {"accountId": account_id, "direction": "in", "cursor": cursor, "limit": 100}
        page = await cluster.json(node, "GET", "/api/whatsapp/messages", params=query)
        messages += page["messages"]
        if not page["more"]:
            return messages
        cursor = page["cursor"]


async def wait_received(
    cluster: Cluster, node: Node, account_id: str, count: int, within_s: float = REACH_S
) -> list[dict[str, Any]]:
    """What an account has received, once it is at least `count` messages."""
    with trio.fail_after(within_s):
        while len(messages := await received(cluster, node, account_id)) < count:
            await trio.sleep(0.05)
    return messages


def bridges_of(node: Node) -> list[int]:
    """The node's bridge processes that have accounts or may get some."""
    assert node.process is not None
    return [pid for pid in _descendants(node.process.pid) if _is_bridge(pid)]


def kill_all(node: Node, *, daemon: bool = True, bridges: bool = True) -> None:
    """SIGKILL to the daemon with its warden, to its bridges, or to all of them in one instant."""
    assert node.process is not None
    family = [node.process.pid, *_descendants(node.process.pid)]
    doomed = [pid for pid in family if (bridges if _is_bridge(pid) else daemon)]
    # Stopped first: none of them may act on the death of another.
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [each for child in map(int, children) for each in (child, *_descendants(child))]


def _is_bridge(pid: int) -> bool:
    try:
        return b"main.mjs" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
